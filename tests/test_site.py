"""The book on the web before Sphinx: links, labels and directives of the notebooks.

The built site is tested by `make test-site`.
"""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "site"))

import api  # noqa: E402
import book  # noqa: E402
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
