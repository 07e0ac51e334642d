"""Reference pages from the source of klrb: signatures, and docments as tables of parameters.

The source is read, not imported: building the site needs neither torch nor anything else of klrb's.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def comments(text: str) -> dict:
    "The comment on each line that has one, without its mark."
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {o.start[0]: o.string.lstrip("# ") for o in tokens if o.type == tokenize.COMMENT}


def annotation(node) -> str:
    return ast.unparse(node) if node is not None else ""


def docment(node, notes: dict, last: int = 0) -> str:
    "The comment on the line of a parameter, or on a line of its own above it."
    for line in range(node.lineno, (last or node.end_lineno) + 1):
        if line in notes:
            return notes[line]
    return ""


def parameters(function, notes: dict) -> list:
    "(name, type, default, docment) of each."
    args = function.args
    every = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(every) - len(args.defaults)) + list(args.defaults)
    pairs = list(zip(every, defaults)) + list(zip(args.kwonlyargs, args.kw_defaults))
    if args.vararg:
        pairs.append((args.vararg, None))
    if args.kwarg:
        pairs.append((args.kwarg, None))
    rows = []
    for arg, default in pairs:
        if arg.arg in ("self", "cls"):
            continue
        end = default.end_lineno if default is not None else arg.end_lineno
        shown = ast.unparse(default) if default is not None else ""
        rows.append((arg.arg, annotation(arg.annotation), shown, docment(arg, notes, end)))
    return rows


def fields(cls, notes: dict) -> list:
    rows = []
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if node.target.id.startswith("_"):
                continue
            default = ast.unparse(node.value) if node.value is not None else ""
            note = docment(node, notes)
            rows.append((node.target.id, annotation(node.annotation), default, note))
    return rows


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def table(rows: list, returns: tuple | None = None) -> list:
    if not rows and not (returns and any(returns)):
        return []
    lines = ["| name | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, kind, default, note in rows:
        kind, default = (f"`{cell(o)}`" if o else "" for o in (kind, default))
        lines.append(f"| `{name}` | {kind} | {default} | {prose(cell(note))} |")
    if returns and any(returns):
        kind = f"`{cell(returns[0])}`" if returns[0] else ""
        lines.append(f"| *returns* | {kind} | | {prose(cell(returns[1]))} |")
    return [*lines, ""]


def prose(text: str) -> str:
    "A docstring as Markdown; a stray * or < is itself."
    parts = re.split(r"(`[^`]*`|\*\*[^*]+\*\*)", text)
    parts[::2] = [re.sub(r"([*<>_\[\]$])", r"\\\1", o) for o in parts[::2]]
    return "".join(parts)


def documentation(node) -> str:
    return prose(ast.get_docstring(node) or "")


def returned(function, notes: dict) -> tuple:
    kind = annotation(function.returns)
    line = function.returns.end_lineno if function.returns is not None else 0
    note = notes.get(line, "") if line else ""
    return (kind, note) if kind not in ("", "None") or note else ()


def signature(function) -> str:
    return (
        "("
        + ", ".join(
            name + (f"={default}" if default else "")
            for name, _, default, _ in parameters(function, {})
        )
        + ")"
    )


def function_block(function, notes: dict, kind: str = "function", colons: str = ":::") -> list:
    name = function.name
    lines = [f"{colons}{{py:{kind}}} {name}{signature(function)}", "", documentation(function), ""]
    return [*lines, *table(parameters(function, notes), returned(function, notes)), colons, ""]


def class_block(cls, notes: dict) -> list:
    methods = [o for o in cls.body if isinstance(o, ast.FunctionDef)]
    init = next((o for o in methods if o.name == "__init__"), None)
    shown = signature(init) if init else ""
    lines = [f"::::{{py:class}} {cls.name}{shown}", "", documentation(cls), ""]
    lines += table(parameters(init, notes) if init else fields(cls, notes))
    for method in methods:
        if not method.name.startswith("_"):
            lines += function_block(method, notes, "method")
    return [*lines, "::::", ""]


def module_page(path: Path, pages: dict) -> tuple:
    "Name and text of the page of one module; no text if it exports nothing."
    text = path.read_text(encoding="utf-8")
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    made = re.search(r"File to edit: (\S+\.ipynb)", text)
    tree, notes = ast.parse(text), comments(text)
    public = re.search(r"^__all__ = \[(.*?)\]", text, re.M | re.S)
    exported = set(re.findall(r"'([\w.]+)'", public[1])) if public else set()
    body = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in exported:
            body += function_block(node, notes)
        elif isinstance(node, ast.ClassDef) and node.name in exported:
            body += class_block(node, notes)
    if not body:
        return name, ""
    chapter = ""
    if made:
        chapter = (path.parent / made[1]).resolve().relative_to(ROOT / "nbs").as_posix()
        title = pages[chapter.removesuffix(".ipynb")].title
        chapter = f"Written in [{title}](../{chapter}).\n"
    head = [f"# `{name}`", "", chapter, f"```{{py:currentmodule}} {name}", "```", ""]
    return name, "\n".join([*head, *body])


def write(target: Path, pages: dict, rewriter) -> list:
    "A page per module that exports something, and their index."
    target.mkdir(parents=True)
    names = []
    for path in sorted((ROOT / "klrb").glob("**/*.py")):
        name, text = module_page(path, pages)
        if text:
            (target / f"{name}.md").write_text(text, encoding="utf-8")
            names.append(name)
    index = ["# The library", "", "Every public name, by module, with its parameters.", ""]
    index += ["```{toctree}", ":maxdepth: 1", "", *names, "```", ""]
    (target / "index.md").write_text("\n".join(index), encoding="utf-8")
    return names
