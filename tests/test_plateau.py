"""The plateau study: its plan, the covariance of the update by products, and what it writes."""

import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from klrb.rlhf.many import Settings
from klrb.rlhf.plateau import (
    Clock,
    Inputs,
    Plan,
    deviations,
    read_products,
    run_study,
    trace_rows,
    update_products,
)
from test_many import DOUBLE, EOS, PROMPTS, SETTINGS, Length, stack_of, tiny, written_out

SMALL = dict(
    updates=4,
    seeds=2,
    methods=("mc", "rb", "fitted"),
    betas=(0.5,),
    evaluate_every=2,
    log_every=2,
    trace_batches=4,
    trace_seeds=1,
)


@pytest.fixture
def inputs():
    reference = stack_of(tiny(9))
    return Inputs(
        reference, dict(reference=reference, dpo=stack_of(tiny(8))), *[PROMPTS] * 2, Length()
    )


def test_the_plan_has_every_method_weight_and_start():
    plan = Plan()
    arms = plan.arms("constant")
    assert len(arms) == 4 * (3 + 1) * 8 and len(set(arms)) == len(arms)
    assert {(o.start, o.beta) for o in arms} == {
        ("reference", 0.2),
        ("reference", 0.5),
        ("reference", 1.0),
        ("dpo", 1.0),
    }
    assert {o.learning_rate for o in plan.arms("half")} == {plan.learning_rate / 2}
    assert {o.schedule for o in plan.arms("linear")} == {"linear"}
    settings = {o: plan.settings(o) for o in ("constant", "pairs")}
    assert {o.prompts_per_update * o.num_generations for o in settings.values()} == {32}
    assert settings["pairs"].num_generations == 2


def test_products_are_those_of_the_written_out_updates(inputs):
    "Squared deviations of six batches' updates at a beta and coefficients, by autograd in float64."
    policy, reference = tiny(0), tiny(9)
    settings, arms, (beta, a, c) = Settings(**SETTINGS), [], (0.7, 0.4, -0.3)
    products, _ = update_products(stack_of(policy), inputs, settings, 6, 50)
    runs = rollouts_of(inputs, settings, policy, 6, 50)
    for i in range(6):
        reward = runs[2][i]
        loss = written_out(policy, reference, runs[1], reward, i, beta, a, c, 2)
        gradient = torch.autograd.grad(loss, list(policy.parameters()))
        arms.append(torch.cat([o.flatten() for o in gradient]))
    updates = torch.stack(arms)
    expected = (updates - updates.mean(0)).square().sum(1)
    weights = torch.tensor([1.0, beta, a, c], dtype=DOUBLE)
    found = torch.einsum("j,njk,k->n", weights, products, weights)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def rollouts_of(inputs, settings, policy, batches, first):
    from klrb.rlhf.many import Arm, ManyRuns

    arms = [Arm(seed=first + o) for o in range(batches)]
    given = stack_of(policy).copies(batches), inputs.reference, inputs.train, settings
    part, rollouts, rewards = ManyRuns(arms, *given, None, inputs.reward).sampled()[0]
    return part, rollouts, rewards()


def test_deviations_never_use_a_batchs_own_coefficients():
    "The best member of the other parts; hand-made products whose optimum is known."
    rng = np.random.default_rng(0)
    root = rng.normal(size=(40, 3, 4))
    products = np.einsum("nsj,nsk->njk", root, root)
    statistics = np.einsum("nsj,nsk->njk", *[rng.normal(size=(40, 9, 5))] * 2)
    values, overall = deviations(products, statistics, 0.5)
    total = products.sum(0)

    def trace(total, a, c):
        weights = np.array([1, 0.5, a, c])
        return weights @ total @ weights

    best = overall["best"]
    for step in (-0.01, 0.01):
        assert trace(total, best[0] + step, best[1]) > trace(total, *best)
        assert trace(total, best[0], best[1] + step) > trace(total, *best)
    changed = products.copy()
    changed[0] *= 5  # its own part's coefficients stay
    again = deviations(changed, statistics, 0.5)[0]
    assert np.isclose(again["best"][0], 5 * values["best"][0])
    assert not np.allclose(again["best"][1:4], values["best"][1:4])
    assert np.allclose(values["mc"], [trace(o, 0.5, 0.5) for o in products])
    assert np.allclose(values["rb"], [trace(o, 0.0, 0.0) for o in products])
    rows = trace_rows(products, statistics, 0.5).set_index("method")
    better = min(values["mc"].sum(), values["rb"].sum())
    assert np.isclose(rows.to_better["fitted"], values["fitted"].sum() / better)
    assert (rows.relative_low <= rows.relative).all() and (
        rows.relative <= rows.relative_high
    ).all()


def test_a_study_writes_what_the_results_read(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Plan, "settings", lambda self, stage: Settings(**SETTINGS | dict(updates=4))
    )
    result = run_study(Plan(**SMALL), inputs, tmp_path)
    assert result["done"] == dict(constant=4, traces=2 + 3 * 2 * 3, half=4, linear=4, pairs=4)
    assert json.loads((tmp_path / "result.json").read_text())["done"] == result["done"]
    judged = pd.read_csv(tmp_path / "evaluation.csv")
    at = judged.groupby("stage")["update"].unique().map(list).to_dict()
    assert at == dict(constant=[0, 2, 4], half=[0, 4], linear=[0, 4], pairs=[0, 4])
    assert not judged.duplicated(["stage", "method", "beta", "seed", "start", "update"]).any()
    assert np.allclose(judged.objective, judged.reward - judged.beta * judged.kl_rb, atol=1e-3)
    logged = pd.read_csv(tmp_path / "training.csv")
    assert set(logged["update"]) == {2, 4} and logged.grad_norm.gt(0).all()
    policies = read_products(tmp_path / "products.csv")
    assert ("dpo", "", 0.0, 0, 0) in policies and ("reference", "fitted", 0.5, 0, 4) in policies
    assert all(o.shape == (4, 4, 4) and s.shape == (4, 5, 5) for o, s in policies.values())
    assert EOS == Settings(**SETTINGS).eos_token_id


def test_a_study_stops_when_its_time_is_up(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Plan, "settings", lambda self, stage: Settings(**SETTINGS | dict(updates=4))
    )
    clock = Clock(1000.0, time.monotonic())
    left = iter([1000.0] * 4 + [-1.0] * 100)  # the study, two updates and a print of the first
    monkeypatch.setattr(Clock, "left", lambda self: next(left))
    result = run_study(Plan(**SMALL), inputs, tmp_path, clock)
    assert result["done"] == dict(constant=2)
    assert pd.read_csv(tmp_path / "evaluation.csv")["update"].max() == 2


def test_the_published_differences_are_those_of_the_published_runs():
    "The primary comparison by hand: mean over beta, then over seeds, with Student's interval."
    folder = Path(__file__).parents[1] / "outputs" / "published" / "pocket" / "plateau"
    runs = pd.read_csv(folder / "runs.csv").query("start == 'reference' and stage == 'constant'")
    assert (runs.groupby(["beta", "method"]).seed.nunique() == 8).all()
    means = runs.groupby(["seed", "method"]).objective.mean().unstack()
    paired = pd.read_csv(folder / "paired.csv", dtype={"beta": str})
    paired = paired.query("start == 'reference' and beta == 'all' and metric == 'objective'")
    assert len(paired) == 5
    for row in paired.itertuples():
        each = means[row.first] - means[row.second]
        half = 2.364624 * each.std() / 8**0.5
        found = np.array([row.mean, row.low, row.high])
        assert np.allclose(found, each.mean() + half * np.array([0, -1, 1]), atol=2e-4)
        assert row.above == (each > 0).sum()
