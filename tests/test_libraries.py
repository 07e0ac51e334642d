"""The table of libraries against the code that is installed here, and against the gradients."""

import importlib.metadata
import re
from collections import Counter

import pytest

from klrb.gradients import GRADIENTS
from klrb.libraries import LibraryRow, library_rows

ROWS = library_rows()
WITH_CODE = [row for row in ROWS if row.package]
OUTSIDE = {"vopd", "zero", "none"}


def name(row):
    return f"{row.library}-{row.setting}"


def lines_problem(row: LibraryRow, text: str) -> str:
    "Why the cited lines of `text` do not carry the row; empty if they do"
    first, last = re.fullmatch(r"[^:]+:(\d+)(?:-(\d+))?", row.source).groups()
    cited = text.splitlines()[int(first) - 1 : int(last or first)]
    return "" if any(row.quote in line for line in cited) else f"{row.quote!r} is not there"


@pytest.mark.parametrize("row", WITH_CODE, ids=name)
def test_cited_lines_say_so(row):
    try:
        found = importlib.metadata.distribution(row.package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{row.package} is not installed")
    if found.version != row.version:
        pytest.skip(f"{row.package} {found.version} is installed, the row is about {row.version}")
    text = found.locate_file(row.source.partition(":")[0]).read_text(encoding="utf-8")
    assert not lines_problem(row, text)


def test_a_row_about_trl_is_really_checked():
    "The version that the study pins is the one that the table describes"
    installed = importlib.metadata.version("trl")
    assert sum(row.package == "trl" and row.version == installed for row in ROWS) >= 5


def test_check_of_lines_finds_a_wrong_number():
    row = next(row for row in WITH_CODE if row.package == "trl")
    text = "\n".join(["nothing"] * 5 + [row.quote])
    assert lines_problem(row, text)


def test_defaults_of_trl_are_what_the_notes_say():
    trl = pytest.importorskip("trl")
    assert trl.GRPOConfig.__dataclass_fields__["beta"].default == 0.0
    assert trl.GRPOConfig.__dataclass_fields__["use_bias_correction_kl"].default is True
    assert trl.RLOOConfig.__dataclass_fields__["beta"].default == 0.05


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_row_is_well_formed(row):
    assert row.place in ("reward", "loss", "distillation", "none")
    assert row.evidence in ("source", "thread")
    assert row.method in GRADIENTS or row.method in OUTSIDE
    assert bool(row.quote) == bool(row.package)
    assert row.unbiased or not row.unless
    if row.unbiased:
        assert GRADIENTS[row.method].unbiased
    elif row.method != "rb_topk":  # followed for the token's own step only
        assert row.method in OUTSIDE or not GRADIENTS[row.method].unbiased
    for option, sign, values in row.conditions:
        assert option and sign in ("=", "!=") and all(values)


def test_no_two_rows_are_about_the_same_setting():
    again = Counter((row.library, row.version, row.setting) for row in ROWS)
    assert max(again.values()) == 1
