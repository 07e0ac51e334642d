"""The claims table: its rule against independent computations, and the notebook on made-up results that contradict the paper."""
import json
from itertools import chain, combinations
from pathlib import Path

import numpy as np, pandas as pd, papermill, pytest
from scipy import stats

from klrb.sweeps.claims import holm, outcome, p_value, verdict

NBS = Path(__file__).resolve().parents[1] / "nbs"


@pytest.mark.parametrize("z", [-4., -1.96, 0., 0.3, 3.])
@pytest.mark.parametrize("df", [np.inf, 4, 31])
def test_p_value_recovers_the_test_behind_an_interval(z, df):
    stderr, half = 0.2, stats.t.ppf(0.975, df) * 0.2
    expected = 2 * stats.t.cdf(-abs(z), df)
    np.testing.assert_allclose(p_value(z*stderr, z*stderr - half, z*stderr + half, 0, df), expected, atol=1e-12)
    np.testing.assert_allclose(p_value(*np.exp([z*stderr, z*stderr - half, z*stderr + half]), 1, df), expected, atol=1e-12)


def test_holm_is_bonferroni_closed_over_all_subsets():
    "The closed testing procedure: a hypothesis falls when every set with it does, by Bonferroni"
    rng = np.random.default_rng(0)
    for p in (rng.uniform(0, 0.2, size=6) for _ in range(20)):
        subsets = [set(o) for o in chain.from_iterable(combinations(range(6), n) for n in range(1, 7))]
        closed = [max(min(1., len(o) * min(p[list(o)])) for o in subsets if i in o) for i in range(6)]
        np.testing.assert_allclose(holm(p), closed, rtol=1e-12)
        with_gap = np.insert(p, 3, np.nan)
        np.testing.assert_array_equal(holm(with_gap), np.insert(holm(p), 3, np.nan))


@pytest.mark.parametrize("effect, p, expects, null, said", [
    (0.1, 0.01, "below", 1, "for"), (9., 0.01, "below", 1, "against"), (0.1, 0.2, "below", 1, "open"), (0.1, np.nan, "below", 1, "open"),
    (9., 0.01, "above", 1, "for"), (0.1, 0.01, "above", 1, "against"), (0.3, 0.01, "equal", 0, "against"), (0.3, 0.9, "equal", 0, "open"),
    (1.05, np.nan, "at most", 1.15, "for"), (1.2, np.nan, "at most", 1.15, "against")])
def test_outcome(effect, p, expects, null, said): assert outcome(effect, p, expects, null) == said


def test_nothing_found_is_no_verdict():
    assert verdict(pd.DataFrame(columns=["setting", "condition", "outcome"]), always=True) == "not run yet"
    for always in (True, False):
        assert verdict(pd.DataFrame([("pocket", "all", "open")], columns=["setting", "condition", "outcome"]), always) == "not seen"


@pytest.mark.parametrize("call, says", [
    (lambda: p_value(1., 2., 1., 1), "`low` is 2"), (lambda: p_value(1., 0., 2., 0.5), "`null` is 0.5"),
    (lambda: outcome(1., 0.1, "less", 1), "`expects` is 'less'")])
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says): call()


# ---- the notebook ----

def publish(profile: Path, rb: float, classes=("positive", "negative"), pareto=True, seeds=5):
    "Made-up results in which every ratio RB/MC is `rb`, with an interval of a tenth on either side"
    def table(part, name, *rows): pd.DataFrame(list(rows)).to_csv(profile / part / name, index=False)
    def finish(part, **result): (profile / part / "result.json").write_text(json.dumps(dict(made_up=False) | result))
    around = lambda x, names=("ratio", "low", "high"): dict(zip(names, (x, x/1.1, x*1.1)))
    (profile / "variance").mkdir(parents=True)
    groups = ("all", *classes)
    table("variance", "value.csv", *(dict(estimator=e, prompts=o, M=1, mean=1.6, std=s, negative=n, negative_low=n, negative_high=n, repetitions=12800)
                                     for o in groups for e, s, n in (("mc", 1., 0.2), ("rb", rb**0.5, 0.))))
    table("variance", "variance_ratio.csv", *(dict(estimator=e, prompts=o, M=M) | around(x) for o in groups for e, M, x in (
        ("rb", 1, 1/rb), ("cv", 1, 0.2), ("cv_fitted", 10, 0.1), ("cv_fitted", 100, 2.), ("ht", 100, 1.))))
    table("variance", "gradient_means.csv", *(dict(method=m, baseline="loo", z=9. if rb > 1 else 0.5) for m in ("rb_sequence", "rb")))
    table("variance", "gradient.csv", *(dict(method=m, baseline="loo") | around(rb, ("relative", "low", "high")) for m in ("rb_sequence", "rb")))
    table("variance", "update.csv", *(dict(method="rb", beta=b) | around(x, ("against_mc", "against_mc_low", "against_mc_high")) for b, x in ((0.3, 1.), (1., rb))))
    table("variance", "timings.csv", *(dict(part=p, ms_per_rollout=m) for p, m in (("sampling", 10.), ("two forward passes", 10.), ("step KL", 1.))))
    finish("variance", prompts=64, completions=200, batches=64, update={"0.3": {}, "1": {}})
    if not pareto: return
    (profile / "pareto").mkdir()
    table("pareto", "cells.csv", *(dict(metric="reward", kl_estimator="rb", beta=b) for b in (0.3, 1.)))
    table("pareto", "spread.csv", *(dict(metric=o, kl_estimator="rb") | around(1., ("ratio", "low", "high")) for o in ("reward", "kl_rb", "objective")))
    table("pareto", "front_share.csv", dict(kl_estimator="rb", runs=10, run_share=0.5) | around(0.5, ("front_share", "low", "high")))
    table("pareto", "paired.csv", dict(metric="objective", kl_estimator="rb", beta="all", seeds=seeds, mean=0.01, low=-0.1, high=0.12))
    finish("pareto", runs=20, planned=30, seeds=seeds, flat_cells=3, cells=4)


def run(published: Path) -> tuple:
    "The table of claims, by key, and the table of tests that the notebook makes of `published`"
    out = published / "claims"
    papermill.execute_notebook(NBS / "22_claims.ipynb", published / "executed.ipynb", progress_bar=False, kernel_name="python3", cwd=NBS,
                               parameters=dict(published=str(published), out_dir=str(out), num_models=20))
    assert (out / "effects.svg").is_file() and (out / "effects.png").is_file()
    return pd.read_csv(out / "claims.csv").set_index("key"), pd.read_csv(out / "tests.csv")


@pytest.fixture(scope="module")
def contradicted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contradicted")
    publish(folder / "pocket", rb=10.)
    return run(folder)


def test_verdicts_turn_when_rb_is_worse(contradicted):
    table, tests = contradicted
    assert table.verdict.gradient_bias == "false as stated" and table.verdict.practice.startswith("not seen; the opposite when pocket")
    assert table.verdict.gradient == "holds when exact; the opposite when pocket"
    assert table.verdict["update"].startswith("not seen; the opposite when pocket")  # at one beta louder, at the other nothing
    assert table.verdict.stability == table.verdict.pareto == "not seen"
    assert table.verdict.sequence == "false as stated" and table.verdict.step == "holds"
    assert table.verdict.cv_fitted == "holds when exact (best weight known), pocket (M = 100); the opposite when pocket (M = 10)"


def test_what_was_not_run_is_said(contradicted):
    table, tests = contradicted
    assert table.smol.practice == table.smol.pareto == "not run yet" and not (tests.setting == "smol").any()
    assert table.pocket.pareto.startswith("partial: 20 of 30 runs; ")
    assert table.elsewhere.cost == "–" and table.verdict.cost == "holds"


def test_every_test_is_counted_once(contradicted):
    table, tests = contradicted
    tested = tests.p.notna()
    assert table.tests.sum() == tested.sum() == (tests.setting == "pocket").sum() - 2  # all but the share below 0 and the time
    np.testing.assert_allclose(tests.p_holm[tested], holm(tests.p[tested]), rtol=1e-5)
    assert table.after_holm.sum() == (tests.p_holm < 0.05).sum()


def test_smol_fills_its_column(tmp_path):
    publish(tmp_path / "pocket", rb=10.)
    publish(tmp_path / "smol", rb=0.1, classes=("positive", "negative", "adversarial"), pareto=False)
    for seed in range(3):
        (tmp_path / f"smol/rloo/rb-seed{seed}").mkdir(parents=True)
        (tmp_path / f"smol/rloo/rb-seed{seed}/result.json").write_text("{}")
    table, tests = run(tmp_path)
    assert table.verdict.practice == "holds when smol; the opposite when pocket"
    assert "adversarial prompts 0.10" in table.smol.practice and table.smol.pareto == "3 runs, not compared yet"
    assert table.short.practice.startswith("smol: variance, RB/MC: positive prompts 0.10 [0.091, 0.11]")
    np.testing.assert_allclose(table.effect.practice, 0.1)
