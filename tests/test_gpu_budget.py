"What tests/gpu_budget.py writes: every update's beta by eq. 2 from the KL it logged, and errors."

import json
import math

import gpu_budget
import numpy as np
import pandas as pd
import pytest
import torch

import klrb.rlhf.many as many
import klrb.rlhf.plateau as plateau
from klrb.rlhf.many import Scores, Settings
from test_many import PROMPTS, SETTINGS, Length, stack_of, tiny

CONTROL = dict(gain=0.3, proportional=2.0, memory=0.6)
LIMITS = (0.05, 2.0)
ARMS = [("fitted", "kl_rb"), ("mc", "kl_mc")]


class Reward(Length):
    "That has no processes."

    def close(self):
        "Nothing to end."


@pytest.fixture
def run(tmp_path, monkeypatch):
    "The script on tiny models."

    def load(prepared, reference, workers, eval_prompts, device):
        model = stack_of(tiny(9))
        return plateau.Inputs(model, dict(reference=model), PROMPTS, PROMPTS, Reward())

    monkeypatch.setattr(plateau, "load_inputs", load)
    monkeypatch.setattr(many, "Settings", lambda **given: Settings(**SETTINGS | given))

    def answer(**given):
        given = dict(out=tmp_path, prepared=tmp_path, device="cpu", seeds=2, prompts=2) | given
        given |= CONTROL | dict(limits=",".join(map(str, LIMITS)), rate=0.02)
        given |= dict(arms=",".join(map(":".join, ARMS)), targets="0.3,1.5", train_prompts=3)
        argv = [o for k, v in given.items() for o in (f"--{k.replace('_', '-')}", str(v))]
        gpu_budget.main(argv)
        tables = (pd.read_csv(tmp_path / o) for o in ("training.csv.gz", "evaluation.csv"))
        return *tables, json.loads((tmp_path / "result.json").read_text())

    return answer


def by_hand(kl, target, beta=0.5):
    "Eq. 2 of the chapter on the budget: the betas of all updates."
    low, high = map(math.log, LIMITS)
    integral, errors, betas = math.log(beta), [], [beta]
    for error in np.clip(kl / target - 1, -1, 1):
        integral = min(high, max(low, integral + CONTROL["gain"] * error))
        errors.append(error)
        weights = CONTROL["memory"] ** np.arange(len(errors))[::-1]
        x = integral + CONTROL["proportional"] * np.average(errors, weights=weights)
        betas.append(math.exp(min(high, max(low, x))))
    return betas[:-1]  # the last belongs to an update that is not made


def test_beta_answers_to_the_kl_that_was_logged(run, monkeypatch):
    monkeypatch.setattr(gpu_budget, "SAVE_EVERY", 2)  # so that the table is written in parts
    training, _, _ = run(updates=5, eval_every=2)
    assert len(training) == 2 * 2 * 2 * 5
    assert not training.duplicated(["method", "measured", "target", "seed", "update"]).any()
    for (_, measured, target, _), rows in training.groupby(
        ["method", "measured", "target", "seed"]
    ):
        assert rows["update"].tolist() == [1, 2, 3, 4, 5]
        expected = by_hand(rows[measured].to_numpy(), target)
        assert np.allclose(rows.beta, expected, rtol=1e-5)  # seven digits of the table
    assert training.beta.nunique() > 8  # and it does move


def test_the_tables_and_the_settings(run):
    training, judged, result = run(updates=3, eval_every=2, eval_completions=3)
    assert set(zip(training.method, training.measured)) == set(ARMS)
    when = judged.groupby("prompts")["update"].unique().map(list).to_dict()
    assert when == dict(evaluation=[2, 3], train=[3])
    assert not judged.duplicated(["method", "target", "seed", "prompts", "update"]).any()
    assert judged.kl_stderr.gt(0).all()
    several = judged[judged.prompts == "evaluation"].kl_stderr_within
    assert several.gt(0).all() and judged[judged.prompts == "train"].kl_stderr_within.isna().all()
    assert result["updates_made"] == 3 and result["beta"] == 0.5
    assert {k: result[k] for k in CONTROL} == CONTROL and result["limits"] == "0.05,2.0"
    assert result["settings"]["prompts_per_update"] == 2 and result["seconds"] is None
    assert result["evaluated"] == dict(evaluation=[len(PROMPTS.texts), 3], train=[3, 1])


def test_what_is_published(run, tmp_path, monkeypatch):
    "Against each run's own rows, by numpy."
    monkeypatch.setattr(gpu_budget, "LATE", 3)
    monkeypatch.setattr(gpu_budget, "BINS", 2)
    training, judged, _ = run(updates=4, eval_every=3)
    runs, bins = (pd.read_csv(tmp_path / f"{o}.csv") for o in ("runs", "training"))
    assert len(runs) == 8 and len(bins) == 16
    for _, row in runs.iterrows():
        own, drawn, last = (
            o[(o[gpu_budget.RUN] == row[gpu_budget.RUN]).all(axis=1)]
            for o in (training, bins, judged)
        )
        kl, beta = own.kl_rb.to_numpy(), own.beta.to_numpy()
        means = np.cumsum(kl) / np.arange(1, 5)  # fewer than ten updates: of all so far
        outside = np.flatnonzero(abs(means / row.target - 1) > 0.1) + 1
        assert np.isclose(row.kl, kl[1:].mean(), rtol=1e-3)
        assert np.isclose(row.beta_change, np.diff(np.log(beta[1:])).std(ddof=1), rtol=1e-3)
        assert np.isclose(row.mc_sd, own.kl_mc.to_numpy()[1:].std(ddof=1), rtol=1e-3)
        assert np.isclose(row.peak, means.max(), rtol=1e-3) and row.settled == outside.max()
        assert drawn["update"].tolist() == [2, 4]
        assert np.allclose(drawn.kl_rb, kl.reshape(2, 2).mean(1), rtol=1e-3)
        for prompts in ("train", "evaluation"):
            final = last[(last["update"] == 4) & (last.prompts == prompts)]
            assert np.isclose(row[f"kl_rb_{prompts}"], final.kl_rb.item(), rtol=1e-3)
            assert np.isclose(row[f"kl_stderr_{prompts}"], final.kl_stderr.item(), rtol=1e-3)


def test_a_run_without_time_still_writes(run):
    training, judged, result = run(updates=3, seconds=0)
    assert training.empty and "kl_mc" in training and result["updates_made"] == 0
    assert set(judged.prompts) == {"train", "evaluation"} and set(judged["update"]) == {0}
    assert judged.kl_rb.abs().max() < 1e-9  # the reference itself


def test_an_interrupted_run_keeps_what_it_has(run, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_budget, "SAVE_EVERY", 2)
    update = many.ManyRuns.update

    def stopped(self):
        if self.updates == 3:
            raise KeyboardInterrupt
        return update(self)

    monkeypatch.setattr(many.ManyRuns, "update", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(updates=5, eval_every=2)
    assert set(pd.read_csv(tmp_path / "training.csv.gz")["update"]) == {1, 2}
    assert set(pd.read_csv(tmp_path / "evaluation.csv")["update"]) == {2}
    assert json.loads((tmp_path / "result.json").read_text())["updates_made"] == 2


def test_standard_errors_of_the_kl():
    "Two arms evaluated apart, in two batches each: 3 prompts, 2 completions."
    gen = torch.Generator().manual_seed(0)
    kl = torch.rand(2, 6, 4, generator=gen, dtype=torch.float64)
    mask = (torch.rand(2, 6, 4, generator=gen) < 0.7).double()
    found = [
        (slice(arm, arm + 1), part.stop - part.start, Scores(None, None, *pair), None)
        for arm in range(2)
        for part in (slice(0, 4), slice(4, 6))
        for pair in [(mask[arm : arm + 1, part], kl[arm : arm + 1, part])]
    ]
    errors = gpu_budget.kl_errors(found, 2)
    totals = (kl * mask).sum(-1).numpy().reshape(2, 3, 2)
    for arm, rows in enumerate(totals):
        over = np.std(rows.mean(1), ddof=1) / math.sqrt(3)
        half = (rows[:, 0] - rows[:, 1]) / 2  # variance of a mean of two: its square
        assert math.isclose(errors["kl_stderr"][arm], over)
        assert math.isclose(errors["kl_stderr_within"][arm], math.sqrt((half**2).sum()) / 3)
