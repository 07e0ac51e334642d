"""A training run that was killed goes on as if nothing had happened."""

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from klrb.models import load_model
from trainers import Killed, train_run

UPDATES = 20  # of 4 per generation batch and 8 per epoch: two epochs and a half


def train(folder, updates=UPDATES, **settings):
    return train_run(folder, updates, **settings)


def curve(text):
    return [line for line in text.splitlines() if ",seconds," not in line]


def checkpoints(folder):
    return sorted(o.name for o in (folder / "trainer").glob("checkpoint-*"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole") / "run", save_every=0)


@pytest.mark.parametrize(
    "kill_at, kept",
    [(4, 12), (5, 16), (1, None)],
    ids=["inside an epoch", "between epochs", "before any checkpoint"],
)
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(
    tmp_path, undisturbed, kill_at, kept
):
    with pytest.raises(Killed):
        train(tmp_path, kill_at=kill_at)
    assert checkpoints(tmp_path) == ([f"checkpoint-{kept}"] if kept else [])
    if kept:
        assert (
            pd.read_csv(tmp_path / "metrics.csv").step.max() == kept
        )  # the last update of the last whole batch
    metrics, weights, generated = train(tmp_path)
    assert curve(metrics) == curve(undisturbed[0])
    assert all(torch.equal(weights[name], value) for name, value in undisturbed[1].items())
    assert generated == (UPDATES - (kept or 0)) // 4  # nothing was done twice


def test_a_run_killed_twice_equals_the_uninterrupted_one(tmp_path, undisturbed):
    for kill_at in (3, 2):
        with pytest.raises(Killed):
            train(tmp_path, kill_at=kill_at)
    assert checkpoints(tmp_path) == ["checkpoint-12"]
    assert curve(train(tmp_path)[0]) == curve(undisturbed[0])


def test_damaged_and_foreign_checkpoints_are_not_used(tmp_path, undisturbed):
    with pytest.raises(Killed):
        train(tmp_path, kill_at=4)
    trainer = tmp_path / "trainer"
    (trainer / "checkpoint-16").mkdir()  # killed while it was written: everything but the last file
    for file in (trainer / "checkpoint-12").iterdir():
        if file.name != "complete.json":
            (trainer / "checkpoint-16" / file.name).write_bytes(file.read_bytes()[:100])
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("rb,3,refer")  # and a row cut short
    metrics, _, generated = train(tmp_path)
    assert curve(metrics) == curve(undisturbed[0]) and generated == 2
    with pytest.raises(Killed):
        train(tmp_path, kill_at=4, resume=False)
    assert train(tmp_path, learning_rate=2e-3)[2] == 5  # another run: it starts over


def test_checkpoints_are_between_generation_batches_and_contain_no_pickle_that_is_trusted(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, kill_at=3, save_every=5)  # rounded up to 8
    assert checkpoints(tmp_path) == ["checkpoint-8"]
    folder = tmp_path / "trainer" / "checkpoint-8"
    assert load_file(folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(folder / name, weights_only=True)


def test_nothing_is_saved_at_the_end_or_without_being_asked(tmp_path):
    train(tmp_path / "a", updates=4)
    train(tmp_path / "b", updates=8, save_every=0)
    assert checkpoints(tmp_path / "a") == checkpoints(tmp_path / "b") == []


def test_a_policy_with_adapters_resumes_too(tmp_path):
    peft = pytest.importorskip("peft")

    def policy():
        torch.manual_seed(0)
        return peft.get_peft_model(
            load_model("tiny-random", seed=1),
            peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True),
        )

    whole, weights, _ = train(tmp_path / "whole", updates=8, policy=policy(), reference=None)
    with pytest.raises(Killed):
        train(tmp_path / "killed", updates=8, kill_at=2, policy=policy(), reference=None)
    metrics, resumed, generated = train(
        tmp_path / "killed", updates=8, policy=policy(), reference=None
    )
    assert curve(metrics) == curve(whole) and generated == 1
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
