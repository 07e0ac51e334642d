"""nbs/ as committed -> the pages that Sphinx reads. Nothing is executed.

The notebooks are plain Markdown and code, to be read in Jupyter and on a code host. What a site can
do better is made here: directives of nbdev are obeyed, links to equations, figures, theorems and
works become numbered references, long code folds, solutions open on demand.
"""

import json
import posixpath
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NBS = ROOT / "nbs"
PARTS = {
    "theory": "1 Theory",
    "kernels": "2 Kernels",
    "judge": "3 Judge",
    "compare": "4 Compare",
    "rlhf": "5 RLHF",
    "sweeps": "6 Sweeps",
    "results": "7 Results",
    "exercises": "8 Exercises",
    "ground": "Ground",
    "experiments": "Experiments",
}
EXTRA = {"prefix_explorer": "theory/101_one_step"}  # pages of this folder, and what they follow
REFERENCES = "theory/114_references"  # on the site, the bibliography
BIBLIOGRAPHY = HERE / "references.bib"
LONG = 24  # lines; longer code folds
ENVIRONMENTS = ("Theorem", "Proposition", "Lemma", "Corollary", "Definition", "Proof", "Remark")
# A chapter that imports nothing else runs wherever torch does.
LIGHT = set(
    "klrb torch matplotlib pandas fastcore functools pathlib math typing itertools dataclasses "
    "collections copy warnings random statistics __future__ importlib csv IPython".split()
)


class BookError(Exception):
    "A link that leads nowhere, or a label that is taken."


@dataclass
class Page:
    "A notebook and what others may refer to in it."

    name: str  # path under nbs/ without suffix
    notebook: dict
    number: str  # "104"; "" for pages without one
    labels: dict = field(default_factory=dict)  # anchor -> (target on the site, text)

    @property
    def title(self) -> str:
        heading = re.search(r"^# (.+)$", "\n".join(map(source, self.notebook["cells"])), re.M)
        return heading[1]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def directives(cell: dict) -> dict:
    "`#| name: value` lines of a code cell."
    found = {}
    if cell["cell_type"] == "code":
        for line in source(cell).splitlines():
            if match := re.match(r"#\|\s*([\w-]+):?\s*(.*)$", line):
                found[match[1]] = match[2].strip().strip('"').replace('\\"', '"')
    return found


# ---- what can be referred to ----

TAG = re.compile(r"\\tag\{(\d+)\}")
QUOTED = re.compile(r"^> \*\*(%s)(?: \(([^)]+)\))?\.\*\*" % "|".join(ENVIRONMENTS), re.M)
EXERCISE = re.compile(r"^### Exercise (\d+)(?:: (.+))?$", re.M)
SOLUTION = re.compile(r"^### Solution (\d+)\s*$", re.M)


def label_page(page: Page) -> None:
    "Fill `labels`: equations, figures, environments and exercises, numbered within the chapter."
    key, counts = page.number or page.name.rpartition("/")[2], {}

    def add(anchor, target, text):
        if anchor in page.labels:
            raise BookError(f"{page.name}: two things are called #{anchor}")
        page.labels[anchor] = (target, text)

    for cell in page.notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = source(cell)
            for number in TAG.findall(text):
                add(f"eq-{number}", f"eq-{key}-{number}", f"eq. {key}.{number}")
            for kind, _ in QUOTED.findall(text):
                if kind != "Proof":
                    counts[kind] = counts.get(kind, 0) + 1
                    number = counts[kind]
                    kind = kind.lower()
                    add(f"{kind}-{number}", f"{kind}-{key}-{number}", f"{kind} {key}.{number}")
            for number, _ in EXERCISE.findall(text):
                add(f"exercise-{number}", f"exercise-{key}-{number}", f"exercise {key}.{number}")
        elif "fig-cap" in (found := directives(cell)) and images(cell):
            counts["figure"] = counts.get("figure", 0) + 1
            name = found.get("label", f"fig-{counts['figure']}")
            add(name, f"{name}-{key}", f"fig. {key}.{counts['figure']}")


def has_image(output: dict) -> bool:
    return any(mime.startswith("image/") for mime in output.get("data", {}))


def images(cell: dict) -> int:
    return sum(map(has_image, cell.get("outputs", [])))


def read_pages() -> dict:
    pages = {}
    for path in sorted(NBS.glob("**/*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        name = path.relative_to(NBS).with_suffix("").as_posix()
        notebook = json.loads(path.read_text(encoding="utf-8"))
        number = path.name[:3] if path.name[:3].isdigit() else ""
        pages[name] = Page(name, notebook, number)
        label_page(pages[name])
    return pages


# ---- Markdown ----

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
CODE = re.compile(r"(```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]+\$)", re.S)
EXERCISE_MENTION = re.compile(r"\b([Ee]xercise) (\d+)\b(?![:.]\d)")
MENTION = re.compile(r"(?<![\w\[#-])([Ee]qs?)\. (\d+)(?:( (?:and|to) )(\d+))?(?![\d\]])")


class Rewriter:
    "Markdown of a notebook into MyST for one page."

    def __init__(self, pages: dict, works: set, repository: str, target: Path):
        self.pages, self.works = pages, works
        self.repository, self.target = repository, target
        self.counts = dict(links=0, citations=0)

    def markdown(self, page: Page, text: str) -> str:
        text = self.environments(page, text)
        text = self.displays(page, text)
        parts = CODE.split(text)
        parts[::2] = [self.mentions(page, o) for o in parts[::2]]
        return LINK.sub(lambda match: self.link(page, match), "".join(parts))

    def displays(self, page: Page, text: str) -> str:
        "Each displayed formula on lines of its own, with its target and the chapter in its tag."
        chapter = page.number + "." if page.number else ""

        def display(match):
            body = match[1].strip()
            number = TAG.search(body)
            target = f"({page.labels[f'eq-{number[1]}'][0]})=\n" if number else ""
            body = TAG.sub(rf"\\tag{{{chapter}\1}}", body)
            if number and r"\\" in body:  # Sphinx would split it, and a split has no tag
                body = f"\\begin{{equation}}\n{body}\n\\end{{equation}}"
                return f"\n\n{target}```{{math}}\n:nowrap: true\n\n{body}\n```\n\n"
            return f"\n\n{target}$$\n{body}\n$$\n\n"

        return re.sub(r"^ *\$\$(.+?)\$\$", display, text, flags=re.S | re.M)

    def mentions(self, page: Page, text: str) -> str:
        "`eq. 3` in running text, where the chapter has one, becomes a link."

        def one(number):
            target, shown = page.labels[f"eq-{number}"]
            self.counts["links"] += 1
            return f"[{shown.removeprefix('eq. ')}](#{target})"

        def mention(match):
            numbers = [o for o in (match[2], match[4]) if o]
            if any(f"eq-{o}" not in page.labels for o in numbers):
                return match[0]
            joined = (match[3] or "").join(one(o) for o in numbers)
            return f"{match[1]}. {joined}"

        def exercise(match):
            if f"exercise-{match[2]}" not in page.labels:
                return match[0]
            target, shown = page.labels[f"exercise-{match[2]}"]
            self.counts["links"] += 1
            return f"[{match[1]} {shown.rpartition(' ')[2]}](#{target})"

        pieces = re.split(
            r"(^#+ .*$|\[(?:[^\[\]]|\[[^\]]*\])*\]\([^)]*\))", text, flags=re.M
        )  # headings and links stay
        for i in range(0, len(pieces), 2):
            pieces[i] = EXERCISE_MENTION.sub(exercise, MENTION.sub(mention, pieces[i]))
        return "".join(pieces)

    def link(self, page: Page, match) -> str:
        image, text, address = match.groups()
        if re.match(r"[a-z][a-z0-9+.-]*:", address, re.I):
            return match[0]
        path, _, anchor = address.partition("#")
        if not path:
            if anchor in page.labels:
                return self.reference(page, page, text, anchor)
            return match[0]
        folder = "site" if page.name in EXTRA else f"nbs/{posixpath.dirname(page.name)}"
        where = posixpath.normpath(posixpath.join(folder, path))
        if not (ROOT / where).exists():
            raise BookError(f"{page.name}: {address} does not exist")
        if image:
            return f"![{text}]({self.asset(page, where)})"
        name = posixpath.splitext(where)[0].removeprefix("nbs/")
        if name in self.pages and where.endswith(".ipynb"):
            if name == REFERENCES and anchor:
                return self.citation(page, match, anchor)
            other = self.pages[name]
            self.counts["links"] += 1
            if anchor and anchor in other.labels:
                return self.reference(page, other, text, anchor)
            if re.match(r"(eq|fig|theorem|exercise)-", anchor):
                raise BookError(f"{page.name}: {name} has no {anchor}")
            here = posixpath.dirname(page.name) or "."
            to = posixpath.relpath(name, here) + ".ipynb"
            return f"[{text}]({to}{'#' + anchor if anchor else ''})"
        extra = where.removeprefix("site/").removesuffix(".md")
        if extra in EXTRA:
            self.counts["links"] += 1
            return f"[{text}]({posixpath.relpath(extra, posixpath.dirname(page.name) or '.')}.md)"
        kind = "tree" if (ROOT / where).is_dir() else "blob"
        return f"[{text}]({self.repository}/{kind}/main/{where})"

    def reference(self, page: Page, other: Page, text: str, anchor: str) -> str:
        "The words around a number stay, the number gets its chapter."
        target, shown = other.labels[anchor]
        number = anchor.rpartition("-")[2]
        full = shown.rpartition(" ")[2]
        if anchor.startswith("fig-"):
            text = re.sub(r"\b([Ff]ig\.|[Ff]igure) \d+\b", rf"\1 {full}", text)
        else:
            text = re.sub(rf"(?<![\d.]){number}(?![\d.])", full, text, count=1)
        return f"[{text}](#{target})"

    def citation(self, page: Page, match, key: str) -> str:
        if key not in self.works:
            raise BookError(f"{page.name}: references.bib has no {key}")
        self.counts["citations"] += 1
        words = re.fullmatch(r"(.*?) ?(\(?)\d{4}\w?\)?", match[2])
        if not words:
            return f"{{cite:t}}`{key}`"
        year = f"{{cite:year}}`{key}`"
        return f"{words[1]} ".lstrip() + (f"({year})" if words[2] else year)

    def asset(self, page: Page, where: str) -> str:
        to = self.target / "_assets" / where.replace("/", "_")
        to.parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(ROOT / where, to)
        return "/_assets/" + to.name

    def environments(self, page: Page, text: str) -> str:
        "> **Theorem (name).** ... becomes an environment; a quotation ends with its last > line."

        def environment(match):
            kind, title = re.match(QUOTED, match[0]).groups()
            body = re.sub(r"^> ?", "", match[0], flags=re.M)
            body = re.sub(r"^\*\*.*?\.\*\*\s*", "", body, count=1)
            if kind == "Proof":
                return f"\n:::::{{prf:proof}}\n{body}\n:::::\n"
            self.counts[kind] = self.counts.get(kind, 0) + 1
            done = self.done.setdefault((page.name, kind), 0) + 1
            self.done[page.name, kind] = done
            target, shown = page.labels[f"{kind.lower()}-{done}"]
            heading = shown.rpartition(" ")[2] + (f" ({title})" if title else "")
            return (
                f"\n({target})=\n:::::{{admonition}} {kind} {heading}\n"
                f":class: {kind.lower()} proof\n\n{body}\n:::::\n"
            )

        self.done = getattr(self, "done", {})
        return re.sub(rf"(?:{QUOTED.pattern})[^\n]*(?:\n>[^\n]*)*", environment, text, flags=re.M)


# ---- cells ----


def markdown_cell(text: str) -> dict:
    return dict(cell_type="markdown", metadata={}, source=text)


def visible(cell: dict) -> bool:
    found = directives(cell)
    if "hide" in found or "include" in found and found["include"] == "false":
        return False
    code = [o for o in source(cell).splitlines() if o.strip() and not o.startswith("#|")]
    return cell["cell_type"] != "code" or bool(code)


def code_cells(page: Page, cell: dict) -> list:
    "The code without its directives, with tags for myst-nb; tables that follow a figure apart."
    found, tags = directives(cell), []
    lines = [o for o in source(cell).splitlines() if not re.match(r"#\|", o)]
    metadata = {}
    if found.get("echo") == "false":
        tags.append("remove-input")
    elif found.get("code-fold") == "true" or "fig-cap" in found or len(lines) > LONG:
        tags.append("hide-input")
    if "fig-cap" in found and images(cell) == 1:
        name = next(
            (target, shown)
            for anchor, (target, shown) in page.labels.items()
            if anchor == found.get("label")
        )
        caption = f"**{name[1].capitalize()}** {found['fig-cap']}"
        metadata["mystnb"] = dict(figure=dict(caption=caption, name=name[0]))
        metadata["mystnb"]["image"] = dict(alt=found["fig-cap"])
    metadata["tags"] = tags
    outputs = [output_of(o) for o in cell.get("outputs", [])]
    text = "\n".join(lines).strip("\n")
    if "mystnb" not in metadata:
        return [new_code(text, metadata, outputs)]
    drawn = [o for o in outputs if has_image(o)]
    rest = [o for o in outputs if not has_image(o)]
    cells = [new_code(text, metadata, drawn)]
    if rest:  # the caption is that of the picture alone
        cells.append(new_code("# what else the cell shows", dict(tags=["remove-input"]), rest))
    return cells


def new_code(text: str, metadata: dict, outputs: list) -> dict:
    return dict(
        cell_type="code", execution_count=None, metadata=metadata, outputs=outputs, source=text
    )


def output_of(output: dict) -> dict:
    "Tables are HTML; other objects as text."
    output = json.loads(json.dumps(output))
    data = output.get("data")
    if data and "text/html" in data:
        html = "".join(data["text/html"])
        output["data"] = {"text/html": f'<div class="wide">{html}</div>'}
    return output


def launch_line(page: Page, repository: str) -> str:
    "Where a chapter runs that needs torch only."
    slug = repository.removeprefix("https://github.com/")
    path = f"nbs/{page.name}.ipynb"
    colab = f"https://colab.research.google.com/github/{slug}/blob/main/{path}"
    binder = f"https://mybinder.org/v2/gh/{slug}/main?labpath={path}"
    return (
        f'<p class="launch">Run it: <a href="{colab}">Colab</a> (first '
        f"<code>%pip install fastcore git+{repository}</code>) · "
        f'<a href="{binder}">Binder</a> (installs klrb, torch and what the figures need)</p>'
    )


def light(page: Page) -> bool:
    "Whether torch and what draws figures are enough, and no file of the repository is read."
    code = "\n".join(source(o) for o in page.notebook["cells"] if o["cell_type"] == "code")
    modules = set(re.findall(r"^(?:from|import) (\w+)", code, re.M))
    return bool(modules) and modules <= LIGHT and "outputs/published" not in code


def page_cells(page: Page, rewriter: Rewriter) -> list:
    cells, titled = [], False
    for cell in page.notebook["cells"]:
        if not visible(cell):
            continue
        if cell["cell_type"] == "markdown":
            text = rewriter.markdown(page, source(cell))
            if not titled and re.search(r"^# ", text, re.M):
                titled = True
                if page.number:
                    text = re.sub(r"^# ", f"# {page.number} ", text, count=1, flags=re.M)
                if light(page):
                    text = text + "\n\n" + launch_line(page, rewriter.repository) + "\n"
            cells.append(markdown_cell(text))
        elif cell["cell_type"] == "code":
            cells += code_cells(page, cell)
    return cells


def with_solutions(page: Page, cells: list) -> list:
    "Exercises become environments, and each solution goes below its exercise, closed."
    solutions, kept, number = {}, [], None
    for cell in cells:
        text = source(cell)
        if cell["cell_type"] == "markdown":
            if match := SOLUTION.search(text):
                number = match[1]
                text = SOLUTION.sub("", text).strip()
                solutions[number] = [markdown_cell(text)] if text else []
                continue
            if re.match(r"## ", text) and number:
                number = None
            if re.match(r"## Solutions\s*$", text):
                continue
        if number:
            solutions[number].append(cell)
        else:
            kept.append(cell)
    out = []
    for cell in kept:
        match = EXERCISE.search(source(cell)) if cell["cell_type"] == "markdown" else None
        if not match:
            out.append(cell)
            continue
        target = page.labels[f"exercise-{match[1]}"][0]
        body = source(cell)[match.end() :].strip()
        before = source(cell)[: match.start()].strip()
        if before:
            out.append(markdown_cell(before))
        number = page.labels[f"exercise-{match[1]}"][1].rpartition(" ")[2]
        title = f"Exercise {number}" + (f": {match[2]}" if match[2] else "")
        box = f":::::{{admonition}} {title}\n:class: exercise\n\n{body}\n:::::\n"
        out.append(markdown_cell(f"({target})=\n{box}"))
        if match[1] not in solutions:
            raise BookError(f"{page.name}: exercise {match[1]} has no solution")
        out.append(markdown_cell('<details class="solution"><summary>Solution</summary>'))
        out += solutions[match[1]]
        out.append(markdown_cell("</details>"))
    return out


# ---- the book ----


def toctrees(pages: dict, api: list) -> str:
    text = []
    for part, caption in PARTS.items():
        names = sorted(o for o in pages if o.startswith(part + "/"))
        for extra, chapter in EXTRA.items():
            if chapter in names:
                names.insert(names.index(chapter) + 1, extra)
        if names:
            text += ["```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```", ""]
    text += ["```{toctree}", ":hidden:", ":caption: Reference", "", "api/index", "```", ""]
    return "\n".join(text)


def build(target: Path, repository: str) -> dict:
    "Write every page under `target`; returns how many links and citations there are."
    import api
    import references

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    pages = read_pages()
    rewriter = Rewriter(pages, set(references.entries(BIBLIOGRAPHY)), repository, target)
    shutil.copy(BIBLIOGRAPHY, target)
    api_pages = api.write(target / "api", pages, rewriter)
    for name, page in pages.items():
        cells = page_cells(page, rewriter)
        if page.name.startswith("exercises/"):
            cells = with_solutions(page, cells)
        if name == REFERENCES:
            cells = [cells[0], markdown_cell("```{bibliography}\n:all:\n```")]
        if name == "index":
            cells.append(markdown_cell(toctrees(pages, api_pages)))
        metadata = dict(kernelspec=dict(display_name="Python 3", language="python", name="python3"))
        metadata["language_info"] = dict(name="python")
        notebook = dict(cells=cells, metadata=metadata, nbformat=4, nbformat_minor=4)
        path = target / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(json.dumps(notebook))
    for extra in EXTRA:
        page, text = Page(extra, {}, ""), (HERE / f"{extra}.md").read_text(encoding="utf-8")
        (target / f"{extra}.md").write_text(rewriter.markdown(page, text), encoding="utf-8")
    return dict(
        rewriter.counts,
        pages=len(pages),
        exercises=sum(
            anchor.startswith("exercise-") for page in pages.values() for anchor in page.labels
        ),
    )
