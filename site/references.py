"""python site/references.py [--check]: site/references.bib -> nbs/theory/114_references.ipynb

The list that links lead to on a code host; the site has its own, made by sphinxcontrib-bibtex.
"""

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NBS = HERE.parent / "nbs"
TARGET = NBS / "theory" / "114_references.ipynb"
HEAD = """# References

> Every work that the book leans on, and the chapters that cite it.

Of most works from 2025 and 2026 we have read abstracts, excerpts or code, not the whole text; \
[related work](113_related_work.ipynb) says what we take from each. Links to the papers lead \
outside."""
CITED = re.compile(r"114_references\.ipynb#([\w-]+)")


def entries(path: Path) -> dict:
    "Fields of every entry of a .bib file, by key."
    found = {}
    text = path.read_text(encoding="utf-8")
    for kind, key, body in re.findall(r"^@(\w+)\{([\w-]+),\n(.*?)^\}", text, re.M | re.S):
        fields = dict(re.findall(r"^\s*(\w+) = \{(.*)\},?$", body, re.M))
        if key in found:
            raise ValueError(f"{path.name} has {key} twice")
        found[key] = dict(kind=kind, **fields)
    return found


def plain(text: str) -> str:
    return re.sub(r"[{}]", "", text).replace("--", "–")


def names(authors: str) -> str:
    "Amini, Vieira & Cotterell; more than three are the first et al."
    people = [o.strip() for o in authors.split(" and ")]
    family = [plain(o.partition(",")[0]) for o in people if o != "others"]
    if len(family) > 3 or "others" in people:
        return f"{family[0]} et al."
    return " & ".join(filter(None, [", ".join(family[:-1]), family[-1]]))


def line(key: str, work: dict, chapters: list) -> str:
    where = next(
        (work[o] for o in ("journal", "booktitle", "publisher", "institution") if o in work), ""
    )
    if "volume" in work:
        where += " " + work["volume"]
    if "pages" in work:
        where += ", " + work["pages"].replace("--", "–")
    link = f"https://arxiv.org/abs/{work['eprint']}" if "eprint" in work else work.get("url", "")
    title = f"*{plain(work['title'])}*"
    text = f'- <a id="{key}"></a>**{names(work["author"])} {work["year"]}.** {title}.'
    if where:
        text += f" {plain(where)}."
    if link:
        shown = f"arXiv:{work['eprint']}" if "eprint" in work else "web page"
        text += f" [{shown}]({link})."
    cited = ", ".join(f"[{Path(o).name[:3]}]({o})" for o in chapters)
    return text + (f" Cited in {cited}." if cited else "")


def citations() -> dict:
    "Key -> paths, from 114's folder, of the chapters that cite it."
    found = {}
    for path in sorted(NBS.glob("**/*.ipynb")):
        if path == TARGET or ".ipynb_checkpoints" in path.parts:
            continue
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for key in CITED.findall("".join(cell["source"])):
                inside = path.parent == TARGET.parent
                there = Path(path.name) if inside else ".." / path.relative_to(NBS)
                found.setdefault(key, [])
                if there.as_posix() not in found[key]:
                    found[key].append(there.as_posix())
    return found


def render(bib: Path = HERE / "references.bib") -> str:
    "The notebook as text."
    works, cited = entries(bib), citations()
    if unknown := sorted(set(cited) - set(works)):
        raise ValueError(f"cited but not in {bib.name}: {', '.join(unknown)}")
    first = [o for o in works if works[o]["author"].strip("{")[0].upper() < "M"]
    cells, letters = [HEAD], [("A to L", first), ("M to Z", [o for o in works if o not in first])]
    for title, keys in letters:
        keys = sorted(keys, key=lambda o: (plain(works[o]["author"]).lower(), works[o]["year"]))
        rows = [line(o, works[o], cited.get(o, [])) for o in keys]
        cells.append(f"## {title}\n\n" + "\n".join(rows))
    kernel = dict(display_name="python3", language="python", name="python3")
    notebook = dict(
        cells=[
            dict(
                cell_type="markdown",
                id=f"refs-{i}",
                metadata={},
                source=text.splitlines(keepends=True),
            )
            for i, text in enumerate(cells)
        ],
        metadata=dict(kernelspec=kernel),
        nbformat=4,
        nbformat_minor=5,
    )
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main():
    text = render()
    if "--check" not in sys.argv:
        TARGET.write_text(text, encoding="utf-8")
    elif text != TARGET.read_text(encoding="utf-8"):
        sys.exit("nbs/theory/114_references.ipynb is stale: run python site/references.py")


if __name__ == "__main__":
    main()
