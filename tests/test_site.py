"""The book on the web before Sphinx: links, labels and directives of the notebooks.

The built site is tested by `make test-site`.
"""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "site"))

import api  # noqa: E402
import book  # noqa: E402
import prefixes  # noqa: E402
import references  # noqa: E402

REPOSITORY = "https://example.org/klrb"
NOTEBOOKS = [o for o in sorted(book.NBS.glob("**/*.ipynb")) if ".ipynb_checkpoints" not in o.parts]


def markdown(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(book.source(o) for o in cells if o["cell_type"] == "markdown")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "Every page, and what was counted"
    target = tmp_path_factory.mktemp("source")
    return target, book.build(target, REPOSITORY)


def test_every_link_of_the_book_leads_somewhere(built):
    "A link to nothing raises BookError while the pages are written"
    target, counts = built
    assert counts["links"] >= 150 and counts["citations"] >= 60 and counts["exercises"] >= 30
    assert counts["pages"] == len(list(target.glob("**/*.ipynb"))) == len(NOTEBOOKS)


def test_many_works_are_cited_and_all_are_known():
    cited, works = set(references.citations()), set(references.entries(book.BIBLIOGRAPHY))
    assert len(cited) >= 40 and cited <= works
    assert {"amini2025", "shah2025", "tang2025", "liu2025", "oh2026", "qqworld2026"} <= cited


def test_list_of_references_is_made_of_the_bibliography():
    made = references.render()
    hint = "run python site/references.py"
    assert references.TARGET.read_text(encoding="utf-8") == made, hint


def test_no_chapter_is_named_by_a_bare_number():
    pattern = re.compile(r"\b[Nn]otebooks? `?\d")
    texts = {o: markdown(o) for o in NOTEBOOKS} | {"README": (ROOT / "README.md").read_text()}
    assert not [name for name, text in texts.items() if pattern.search(text)]


def test_nothing_that_only_a_site_renders_stands_in_a_notebook():
    pattern = re.compile(r"\{(?:cite|ref|eq|numref|doc|prf)[:\w]*\}`|^```\{|^:::", re.M)
    assert not [o for o in NOTEBOOKS if pattern.search(markdown(o))]


def test_every_theory_chapter_has_exercises():
    kept = {"100", "113", "114"}  # pictures, related work, the list of references
    chapters = {o.name[:3] for o in (book.NBS / "theory").glob("1*.ipynb")} - kept
    exercises = {"1" + o.name[1:3] for o in (book.NBS / "exercises").glob("8*.ipynb")}
    assert chapters <= exercises
    for path in (book.NBS / "exercises").glob("8*.ipynb"):
        assert len(book.EXERCISE.findall(markdown(path))) >= 4


def test_directives_are_obeyed_and_not_shown(built):
    target, _ = built
    for path in target.glob("**/*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            assert not re.search(r"^#\|", cell["source"], re.M)
    page = json.loads((target / "theory" / "101_one_step.ipynb").read_text())
    text = "\n".join(o["source"] for o in page["cells"])
    assert "IProgress" not in text and "def k1(" in text  # hidden, exported
    figures = [
        o["metadata"]["mystnb"]["figure"] for o in page["cells"] if "mystnb" in o["metadata"]
    ]
    assert figures[0]["caption"].startswith("**Fig. 101.1** 200 Monte Carlo draws")
    folded = [o for o in page["cells"] if "hide-input" in o["metadata"].get("tags", [])]
    assert any(o["source"].startswith("def check_float") for o in folded)


# ---- the transform, on a book of two pages ----


def page(name: str, *texts: str) -> book.Page:
    cells = [dict(cell_type="markdown", source=text) for text in texts]
    made = book.Page(name, dict(cells=cells), name.rpartition("/")[2][:3])
    book.label_page(made)
    return made


ONE = page("theory/101_one_step", "# One\n\n$$a = b. \\tag{1}$$\n\n> **Theorem (T).** As eq. 1.")
TWO = page("theory/102_value", "# Two\n\n$$c = d, \\tag{1}$$ $$e \\tag{2}$$")


@pytest.fixture
def rewrite(tmp_path):
    works = page("theory/114_references", "# References")
    pages = {o.name: o for o in (ONE, TWO, works)}
    made = book.Rewriter(pages, {"rao1945"}, REPOSITORY, tmp_path)
    return lambda text, where=TWO: made.markdown(where, text)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("[eq. 1 of one](101_one_step.ipynb#eq-1)", "[eq. 101.1 of one](#eq-101-1)"),
        ("by eq. 2 and eq. 7", "by eq. [102.2](#eq-102-2) and eq. 7"),
        ("Eqs. 1 and 2 say", "Eqs. [102.1](#eq-102-1) and [102.2](#eq-102-2) say"),
        ("`eq. 1` in code", "`eq. 1` in code"),
        ("[one](101_one_step.ipynb)", "[one](101_one_step.ipynb)"),
        ("[thm](101_one_step.ipynb#theorem-1)", "[thm](#theorem-101-1)"),
        ("[Rao 1945](114_references.ipynb#rao1945)", "Rao {cite:year}`rao1945`"),
        ("[Rao (1945)](114_references.ipynb#rao1945)", "Rao ({cite:year}`rao1945`)"),
        ("[tests](../../tests/rounding.py)", f"[tests]({REPOSITORY}/blob/main/tests/rounding.py)"),
        ("[page](../../site/prefix_explorer.md)", "[page](../prefix_explorer.md)"),
        ("[code](../../site/book.py)", f"[code]({REPOSITORY}/blob/main/site/book.py)"),
        ("[out](https://arxiv.org/abs/1)", "[out](https://arxiv.org/abs/1)"),
    ],
)
def test_links(rewrite, text, wanted):
    assert rewrite(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "[gone](109_gone.ipynb)",
        "[eq. 9](101_one_step.ipynb#eq-9)",
        "[fig. 1](101_one_step.ipynb#fig-none)",
        "![gone](gone.png)",
    ],
)
def test_a_link_to_nothing_is_refused(rewrite, text):
    with pytest.raises(book.BookError):
        rewrite(text)


def test_formulas_get_targets_and_the_chapter_in_their_tags(rewrite):
    made = rewrite("as\n$$a = b. \\tag{1}$$\nsays")
    assert "(eq-102-1)=\n$$\na = b. \\tag{102.1}\n$$" in made
    lines = rewrite("$$\\begin{aligned}a\\\\b\\end{aligned} \\tag{2}$$")
    assert ":nowrap:" in lines and "\\begin{equation}" in lines  # a split could not be tagged


def test_quotations_become_environments(rewrite):
    made = rewrite(
        "> **Theorem (T).** As eq. 1:\n>\n> $$x$$\n\n> **Proof.** Clear.\n\n> A claim.", ONE
    )
    assert "(theorem-101-1)=" in made and "{admonition} Theorem 101.1 (T)" in made
    assert "{prf:proof}\nClear." in made and "> A claim." in made
    assert made.index("$$\nx\n$$") < made.index("{prf:proof}")


def test_a_label_is_given_once():
    with pytest.raises(book.BookError, match="two things"):
        page("theory/103_x", "$$a \\tag{1}$$", "$$b \\tag{1}$$")


def test_a_solution_goes_below_its_exercise_and_none_may_miss():
    text = ["# E", "### Exercise 1: one\n\nDo it.", "### Exercise 2\n\nAgain.", "## Solutions"]
    both = page("exercises/801_x", *text, "### Solution 1\n\nSo.", "### Solution 2", "Thus.")
    made = [o["source"] for o in book.with_solutions(both, both.notebook["cells"])]
    assert "Exercise 801.1: one" in made[1] and made[3] == "So." and made[4] == "</details>"
    assert "Thus." in made and "## Solutions" not in made
    one = page("exercises/802_x", *text, "### Solution 1\n\nSo.")
    with pytest.raises(book.BookError, match="no solution"):
        book.with_solutions(one, one.notebook["cells"])


def test_api_pages_have_the_docments(built):
    target, _ = built
    text = (target / "api" / "klrb.steps.md").read_text()
    assert "{py:function} k3(policy_logprobs, ref_logprobs)" in text
    assert "| `ref_logprobs` | `Tensor` |  | log-probability of each sampled token under" in text
    assert "| *returns* | `Tensor` | | log-ratio plus q/p - 1, (B, T) |" in text
    assert api.prose("a * b of `x*y`, **biased**") == "a \\* b of `x*y`, **biased**"


def test_references_are_read_and_written():
    work = dict(author="Rao, C. R. and Doe, A. and Poe, B. and Roe, C.", title="{T}", year="1945")
    assert references.names(work["author"]) == "Rao et al."
    assert references.names("Rao, C. R. and {DeepSeek}") == "Rao & DeepSeek"
    line = references.line("rao1945", work | dict(eprint="1.2"), ["101_one_step.ipynb"])
    assert line == (
        '- <a id="rao1945"></a>**Rao et al. 1945.** *T*. '
        "[arXiv:1.2](https://arxiv.org/abs/1.2). Cited in [101](101_one_step.ipynb)."
    )


# ---- launch buttons and the workflow ----

LAUNCHED = [o for o in book.read_pages().values() if book.light(o)]


def imported(tree: ast.AST, everywhere: bool) -> set:
    "Names of imported modules; without `everywhere`, those that importing the module imports"
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {o.name for o in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "klrb." * (node.level > 0) + (node.module or "")
            found |= {base.rstrip("."), *(f"{base}.{o.name}" for o in node.names)}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found |= imported(node, everywhere)
    return found


def needed(names: set) -> set:
    "Top-level packages that `names` lead to, through the modules of klrb"
    seen, todo = set(), set(names)
    while todo:
        name = todo.pop()
        seen.add(name)
        path = ROOT / (name.replace(".", "/") + ".py")
        if name.startswith("klrb.") and path.exists():
            todo |= imported(ast.parse(path.read_text(encoding="utf-8")), False) - seen
    return {o.partition(".")[0] for o in seen} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("page", LAUNCHED, ids=[o.name for o in LAUNCHED])
def test_a_chapter_with_a_launch_button_needs_what_the_launchers_install(page):
    cells = [o for o in page.notebook["cells"] if o["cell_type"] == "code"]
    found = set().union(*(imported(ast.parse(book.source(o)), True) for o in cells))
    installed = {"torch", "klrb", "fastcore", "matplotlib", "pandas", "numpy", "IPython"}
    assert needed(found) <= installed
    code = "\n".join(map(book.source, cells))
    assert not re.search(r"\.\./|outputs/", code)  # no clone beside it


def test_the_walk_of_imports_sees_what_a_launcher_lacks():
    assert "transformers" in needed({"klrb.models"}) and "trl" in needed({"klrb.rloo"})
    assert imported(ast.parse("def f():\n    import scipy"), True) == {"scipy"}
    assert not imported(ast.parse("def f():\n    import scipy"), False)


def test_binder_installs_the_clone_that_it_starts_in():
    "pip takes a path of a requirements file from where it runs, which is the clone"
    lines = (ROOT / ".binder" / "requirements.txt").read_text().split("\n")
    assert "-e ." in lines and "-e .." not in lines
    assert {"torch", "fastcore", "matplotlib", "pandas", "jinja2"} <= set(lines)


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")))
def test_workflows_call_what_there_is(path):
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    targets = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.M)
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert all(("run" in o) != ("uses" in o) for o in steps)
    for step in steps:
        assert re.fullmatch(r"[\w/-]+@v\d+", step.get("uses", "actions/checkout@v4"))
        for target in re.findall(r"\bmake (\w[\w-]*)", step.get("run", "")):
            assert target in targets
        if step.get("run", "").startswith(".ci/"):
            assert (ROOT / step["run"]).exists()
    if path.name == "pages.yml":
        upload = next(o for o in steps if "upload-pages-artifact" in o.get("uses", ""))
        assert upload["with"]["path"] in (ROOT / "Makefile").read_text()


# ---- the interactive page ----


@pytest.fixture(scope="module")
def explorer():
    return json.loads(prefixes.TARGET.read_text(encoding="utf-8"))


def stored(row: dict, side: str) -> torch.Tensor:
    "Probabilities as the page has them"
    weights = torch.tensor(prefixes.unpacked(row[side]), dtype=torch.float64).square()
    return weights / weights.sum()


def test_integers_are_packed_and_unpacked():
    numbers = [0, 1, 31, 32, 33, 1023, 1024, 4096, 2**20]
    assert prefixes.unpacked(prefixes.packed(numbers)) == numbers
    assert len(prefixes.packed([31, 32])) == 3


def test_the_interactive_page_has_every_probability(explorer):
    assert prefixes.TARGET.stat().st_size <= 150_000
    assert len({row["text"] for row in explorer["prefixes"]}) == 12
    for row in explorer["prefixes"]:
        for side in ("policy", "reference"):
            roots = torch.tensor(prefixes.unpacked(row[side]), dtype=torch.float64)
            assert len(roots) == len(explorer["tokens"]) == 4096 and roots.min() >= 1
            # A root is off by at most 1/2, a square by its root + 1/4; raised to 1, by less than 1.
            bound = (roots + 1.25).sum() / explorer["scale"] ** 2
            assert abs(roots.square().sum() / explorer["scale"] ** 2 - 1) <= bound
            assert abs(stored(row, side).sum() - 1) < 1e-12


def test_the_interactive_page_has_the_models_kl(explorer):
    """Of the probabilities as stored, against float64 from the models.

    A root's error d is uniform within 1/2 of a unit. Its first order moves the KL by
    2 sqrt(p) (log p/q - KL) d, or 2 sqrt(q) (1 - p/q) d for the reference; its second, in the
    mean, by at most (|log p/q| + 3 + p/q) d^2.
    """
    for row in explorer["prefixes"]:
        p, q = stored(row, "policy"), stored(row, "reference")
        log_ratio = (p / q).log()
        kl = (p * log_ratio).sum()
        first = (p * (log_ratio - kl) ** 2).sum() + (q * (1 - p / q) ** 2).sum()
        error = (first / 3).sqrt() / explorer["scale"]
        second = (log_ratio.abs() + 3 + p / q).sum() / 12 / explorer["scale"] ** 2
        off = abs(kl.item() - row["kl"])
        assert off <= 5 * error + second
        assert off < 0.0005  # as the page says


def test_the_interactive_page_has_the_shipped_reference(explorer):
    "Its distributions, from the model itself; the policy needs a study, so its weights are named"
    transformers = pytest.importorskip("transformers")
    pocket = ROOT / "klrb" / "assets" / "pocket"
    assert explorer["reference_sha256"] == prefixes.digest(pocket)
    tokenizer = transformers.AutoTokenizer.from_pretrained(pocket)
    model = transformers.AutoModelForCausalLM.from_pretrained(pocket, dtype="float64").eval()
    assert explorer["tokens"] == [tokenizer.decode([o]) for o in range(len(tokenizer))]
    for row in explorer["prefixes"]:
        with torch.no_grad():
            logits = model(tokenizer(row["text"], return_tensors="pt").input_ids).logits[0, -1]
        roots = torch.tensor(prefixes.unpacked(row["reference"]))
        wanted = (logits.softmax(-1).sqrt() * explorer["scale"]).clamp(min=1)
        assert (roots - wanted).abs().max() <= 0.5 + 1e-6


def test_the_interactive_page_says_what_its_numbers_say(built, explorer):
    target, _ = built
    text = (target / "prefix_explorer.md").read_text(encoding="utf-8")
    assert f"over all {explorer['prompts']} the mean KL" in text
    assert f"is {explorer['mean_kl']:.3f} nats" in text and f"1/{explorer['scale']}" in text
    assert "(theory/101_one_step.ipynb)" in text  # for the site
    index = json.loads((target / "index.ipynb").read_text())["cells"]
    assert "theory/101_one_step\nprefix_explorer\ntheory/102" in index[-1]["source"]
    assert "(prefix_explorer.md)" in "".join(o["source"] for o in index)
