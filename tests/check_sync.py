"""Generated files against their notebooks.

python tests/check_sync.py export   nbdev_export and nbdev_clean; with --check any change fails
python tests/check_sync.py readme   nbs/index.ipynb -> README.md; with --check only compare
"""

import argparse
import difflib
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from jinja2 import DictLoader
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
README_NOTE = "<!-- Generated from nbs/index.ipynb by `make readme`: edit the notebook. -->\n\n"

# Outputs become text blocks; the language is fixed: nbdev_clean may drop it from the metadata.
TEMPLATE = """{%- extends 'markdown/index.md.j2' -%}
{% block input %}
```python
{{ cell.source }}
```
{% endblock input %}
{% block stream %}
```text
{{ output.text | trim }}
```
{% endblock stream %}
{% block data_text %}
```text
{{ output.data['text/plain'] | trim }}
```
{% endblock data_text %}
"""


def snapshot(root: Path) -> dict:
    "Content of every notebook and module by path, relative to `root`"
    files = [*root.glob("nbs/**/*.ipynb"), *root.glob("klrb/**/*.py")]
    return {
        str(o.relative_to(root)): o.read_text(encoding="utf-8")
        for o in sorted(files)
        if ".ipynb_checkpoints" not in o.parts
    }


def diff(before: dict, after: dict) -> str:
    "Unified diff between two snapshots"
    lines = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, ""), after.get(name, "")
        lines += difflib.unified_diff(
            old.splitlines(), new.splitlines(), name, name + " (regenerated)", lineterm=""
        )
        if name not in before:
            lines.append(f"{name}: did not exist before the export")
        elif old != new and old.split() == new.split():
            lines.append(f"{name}: white space differs")
    return "\n".join(lines)


def export(root: Path = ROOT) -> str:
    "Run nbdev_export and nbdev_clean under `root` and return what they changed as a diff"
    before = snapshot(root)
    bin_dir = Path(sys.executable).parent
    for tool in "nbdev_export", "nbdev_clean":
        subprocess.run([sys.executable, str(bin_dir / tool)], cwd=root, check=True)
    return diff(before, snapshot(root))


def _root_links(text: str) -> str:
    "Markdown and HTML links relative to nbs/ rewritten relative to the root"

    def move(match):
        before, link, after = match.groups()
        if re.match(r"[a-z][a-z0-9+.-]*:|[#/]", link, re.I):
            return match[0]
        path, mark, anchor = link.partition("#")
        return before + posixpath.normpath(posixpath.join("nbs", path)) + mark + anchor + after

    text = re.sub(r"(\]\(\s*)([^)\s]+)([^)]*\))", move, text)
    return re.sub(r"""(\b(?:src|href)=["'])([^"']+)(["'])""", move, text)


def render_readme(nb: nbformat.NotebookNode) -> str:
    """Markdown of `nb`, with links from the root.

    Hidden cells are left out, cells with `echo: false` have no source, directives are stripped.
    """
    cells = []
    for cell in nb.cells:
        lines = cell.source.splitlines()
        directives = [re.sub(r"^#\|\s*", "", o).strip() for o in lines if re.match(r"#\|", o)]
        if any(re.match(r"hide\b|default_exp\b", o) for o in directives):
            continue
        if cell.cell_type == "code":
            cell.source = "\n".join(o for o in lines if not re.match(r"#\|", o)).strip()
            if not cell.source:
                continue
            if "echo: false" in directives:
                printed = "".join(o.get("text", "") for o in cell.outputs)
                cell = nbformat.v4.new_markdown_cell(f"```\n{printed.rstrip()}\n```")
            for output in cell.get("outputs", []):
                data = output.get("data", {"text/plain": ""})
                if "text/markdown" in data:
                    output.data = {"text/markdown": data["text/markdown"]}
                elif any(o.startswith("image/") for o in data):
                    raise ValueError(
                        "nbs/index.ipynb has an image among its outputs, which a README cannot "
                        "carry: link the saved file, ![...](../outputs/published/...), "
                        "in a markdown cell"
                    )
                elif "data" in output:
                    output.data = {"text/plain": data.get("text/plain", "")}
        elif cell.cell_type == "markdown":
            cell.source = _root_links(cell.source)
        cells.append(cell)
    nb.cells = cells
    exporter = MarkdownExporter(
        extra_loaders=[DictLoader({"readme.md.j2": TEMPLATE})], template_file="readme.md.j2"
    )
    text, _ = exporter.from_notebook_node(nb)
    text = "\n".join(o.rstrip() for o in text.splitlines())
    return README_NOTE + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def readme(check: bool, root: Path = ROOT) -> str:
    "Write README.md, or with `check` only return how it differs from nbs/index.ipynb"
    source, target = root / "nbs/index.ipynb", root / "README.md"
    if not source.exists():
        if target.exists():
            return "README.md exists, but nbs/index.ipynb, which it is generated from, does not"
        print("neither nbs/index.ipynb nor README.md exists yet")
        return ""
    new = render_readme(nbformat.read(source, as_version=4))
    old = target.read_text(encoding="utf-8") if target.exists() else ""
    if not check:
        target.write_text(new, encoding="utf-8")
    return diff({"README.md": old}, {"README.md": new})


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["export", "readme"])
    parser.add_argument("--check", action="store_true", help="fail on any difference and show it")
    args = parser.parse_args()
    os.chdir(ROOT)
    changes = export() if args.what == "export" else readme(args.check)
    if not args.check:
        return
    if not changes:
        return print("in sync")
    print(changes)
    sys.exit(
        "Not in sync. The files above have been regenerated: look at them and commit them."
        if args.what == "export"
        else "README.md is stale: run `make readme` and commit it."
    )


if __name__ == "__main__":
    main()
