"""The trainer whose update is fitted: special cases, sources of the coefficients, resuming."""

import io
import json
import math

import pandas as pd
import pytest
import torch

from klrb.errors import InputError
from klrb.models import completion_logits, load_model, load_tokenizer
from klrb.rlhf.profiles import get_profile
from klrb.rloo import UNBIASED, RBRLOOTrainer
from klrb.style import LABELS, in_order
from klrb.sweeps.study import study_grid
from klrb.update import CoefficientFit
from test_trainer_models import build
from trainers import PROMPTS, TEXTS, Killed, count_e, make_trainer, move, rollout_rows, train_run

ROWS = rollout_rows(TEXTS[:4], 3)
BETA = 0.3


def make(folder, reward=count_e, **settings):
    defaults = dict(
        kl_estimator="fitted", per_device_train_batch_size=12, num_generations=3, logging_steps=1
    )
    return make_trainer(folder, reward=reward, **defaults | settings)


def generate(t):
    "A batch of four prompts whose completions differ in length."

    def ending(self, *args):
        ids = sample(*args)
        return [row[: 1 + i % 6] for i, row in enumerate(ids)]

    sample, t._generate_single_turn = t._generate_single_turn, ending.__get__(t)
    torch.manual_seed(3)
    return t._generate_and_score_completions(ROWS)


def gradient(t, batch, past=None, noise=None):
    t.model.zero_grad()
    if past is not None:
        batch = dict(
            batch,
            update_past=torch.full_like(batch["advantages"], past),
            update_noise=torch.full_like(batch["advantages"], noise),
        )
    t._compute_loss(t.model, batch).backward()
    return torch.cat([p.grad.flatten() for p in t.model.parameters() if p.grad is not None])


def assert_near(ours, theirs, relative=1e-5):
    assert (ours - theirs).norm() < relative * theirs.norm()


# The update itself


@pytest.mark.parametrize("moved", [False, True], ids=["on-policy", "second use of a batch"])
@pytest.mark.parametrize(
    "method, past, noise", [("mc", BETA, BETA), ("rb_sequence", BETA, 0.0), ("rb", 0.0, 0.0)]
)
def test_special_cases_have_the_gradient_of_the_present_estimators(
    tmp_path, method, past, noise, moved
):
    other, ours = (
        make(tmp_path, kl_estimator=name, num_iterations=2) for name in (method, "fitted")
    )
    batch, theirs = generate(ours), generate(other)
    assert (
        torch.equal(batch["completion_ids"], theirs["completion_ids"])
        and batch["completion_mask"].sum(1).unique().numel() > 3
    )
    if moved:
        for t in (other, ours):
            move(t)
    expected = gradient(other, theirs)
    assert_near(gradient(ours, batch, past, noise), expected)
    assert (
        gradient(ours, batch, 2.0, 1.0) - expected
    ).norm() > 0.1 * expected.norm()  # coefficients do matter


@pytest.mark.parametrize(
    "beta, past, noise", [(BETA, 0.7, 0.2), (BETA, -0.4, 1.5), (0.0, 0.3, 0.1)]
)
def test_the_gradient_of_any_member_is_eq_3_written_out(tmp_path, beta, past, noise):
    """Oracle: both models' logits in float64, every term of eq. 3 of the update's chapter."""
    t = make(tmp_path, beta=beta, temperature=1.0)
    batch = generate(t)
    ours = gradient(t, batch, past, noise).double()
    policy, reference = (load_model("tiny-random", seed=seed).double() for seed in (1, 0))
    fields = [
        batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    ]
    mask = fields[3].double()
    logp, logq = (completion_logits(m, *fields).log_softmax(-1) for m in (policy, reference))
    logq = logq.detach()
    chosen, chosen_ref = (
        o.gather(-1, fields[2][..., None]).squeeze(-1) * mask for o in (logp, logq)
    )
    kl = (logp.exp() * (logp - logq)).sum(-1) * mask

    def centred(values):
        groups = values.detach().view(4, 3, -1)
        return (groups - (groups.sum(1, keepdim=True) - groups) / 2).view(12, -1)

    rewards = torch.tensor(
        count_e(
            [
                load_tokenizer("tiny-random").decode(ids[m.bool()], skip_special_tokens=True)
                for ids, m in zip(fields[2], fields[3])
            ],
            None,
        ),
        dtype=torch.float64,
    )
    up_to, score = kl.cumsum(1), chosen.sum(1, keepdim=True)
    noise_of_ratio = (chosen - chosen_ref - kl).sum(1)
    update = (score * centred(rewards)).sum() - beta * (
        kl + chosen * centred(up_to[:, -1:] - up_to)
    ).sum()
    update = (
        update
        - noise * ((score * centred(noise_of_ratio)).sum() - kl.sum())
        - past * (chosen * centred(up_to)).sum()
    )
    (-update / 12).backward()
    assert_near(ours, torch.cat([p.grad.flatten() for p in policy.parameters()]), 1e-4)


def test_micro_batches_give_the_update_of_the_whole_batch(tmp_path):
    t = make(tmp_path)
    batch = generate(t) | dict(
        update_past=torch.full((12,), 0.5), update_noise=torch.full((12,), 0.2)
    )
    whole = gradient(t, batch)
    order = torch.tensor(
        [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    )  # the completions of every prompt are parted
    parts = [
        gradient(t, {name: value[part] for name, value in batch.items()}) for part in order.split(4)
    ]
    assert_near(torch.stack(parts).mean(0), whole)


def test_a_policy_with_adapters_has_the_special_cases_too(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        r=4,
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    ours = make(
        tmp_path, policy=load_model("tiny-random", seed=0), reference=None, peft_config=lora
    )
    torch.manual_seed(0)
    other = make(
        tmp_path,
        policy=load_model("tiny-random", seed=0),
        reference=None,
        peft_config=lora,
        kl_estimator="mc",
    )
    batch, theirs = generate(ours), generate(other)
    assert ours._metrics["train"]["kl_sequence_rb"][0] > 1e-3
    assert_near(gradient(ours, batch, BETA, BETA), gradient(other, theirs))


@pytest.mark.parametrize("method, past, noise", [("mc", BETA, BETA), ("rb", 0.0, 0.0)])
def test_a_mixture_of_experts_keeps_its_auxiliary_loss(tmp_path, method, past, noise):
    ours, other = (
        make(
            tmp_path,
            policy=build("mixtral", 1),
            reference=build("mixtral", 0),
            kl_estimator=name,
            router_aux_loss_coef=0.5,
        )
        for name in ("fitted", method)
    )
    batch, theirs = generate(ours), generate(other)
    assert_near(gradient(ours, batch, past, noise), gradient(other, theirs), 1e-4)
    assert ours._metrics["train"]["aux_loss"] == other._metrics["train"]["aux_loss"]


# The coefficients


class Spy:
    "Keeps, for every generation batch, its coefficients and what it contributes to the fit."

    def __init__(self, monkeypatch):
        self.used, self.losses, self.statistics = [], [], []
        prepare, loss, update = (
            RBRLOOTrainer._generate_and_score_completions,
            RBRLOOTrainer._compute_loss,
            CoefficientFit.update,
        )

        def generated(t, inputs):
            batch = prepare(t, inputs)
            self.used.append(
                (batch["update_past"].unique().item(), batch["update_noise"].unique().item())
            )
            return batch

        def computed(t, model, inputs):
            self.losses.append((len(self.used), inputs["update_past"].unique().item()))
            return loss(t, model, inputs)

        def updated(fit, statistics):
            self.statistics.append(statistics.clone())
            update(fit, statistics)

        monkeypatch.setattr(RBRLOOTrainer, "_generate_and_score_completions", generated)
        monkeypatch.setattr(RBRLOOTrainer, "_compute_loss", computed)
        monkeypatch.setattr(CoefficientFit, "update", updated)


def test_coefficients_come_from_earlier_generation_batches_only(tmp_path, monkeypatch):
    """Two updates of two micro-batches each for every generation batch."""
    spy = Spy(monkeypatch)
    t = make(
        tmp_path,
        max_steps=6,
        num_iterations=2,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=2,
    )
    t.train()
    assert len(spy.used) == len(spy.statistics) == 3 and spy.used[0] == (0.0, 0.0)
    fit = CoefficientFit()
    for batch, (past, noise) in enumerate(spy.used):
        expected = fit.coefficients(BETA)
        assert (past, noise) == pytest.approx(expected, rel=1e-6)  # float32
        assert {a for number, a in spy.losses if number == batch + 1} == {past}
        fit.update(spy.statistics[batch])
    assert len(spy.losses) == 12 and all(abs(a) > 1e-6 for a, _ in spy.used[1:])
    logs = [log for log in t.state.log_history if "update_past" in log]
    assert [log["step"] for log in logs] == [1, 3, 5]  # with the batch that they belong to
    assert [(log["update_past"], log["update_noise"]) for log in logs] == [
        pytest.approx(o, rel=1e-6) for o in spy.used
    ]


def test_the_reward_of_a_batch_moves_the_coefficients_of_the_next_one_and_not_its_own(tmp_path):
    def coefficients(factor):
        calls = []

        def reward(completions, prompts, **kwargs):
            calls.append(1)
            return [o * (factor if len(calls) == 3 else 1.0) for o in count_e(completions, prompts)]

        t = make(tmp_path, reward, max_steps=4, learning_rate=0.0)  # the same rollouts
        t.train()
        return [log["update_noise"] for log in t.state.log_history if "update_noise" in log]

    one, other = coefficients(1.0), coefficients(5.0)
    assert one[:3] == other[:3] and one[3] != other[3]


def test_what_is_evaluated_does_not_join_the_fit(tmp_path):
    t = make(tmp_path, max_steps=1, num_generations_eval=1, per_device_eval_batch_size=4)
    t.train()
    before = t.coefficient_fit.state_dict()
    metrics = t.evaluate(PROMPTS)
    assert math.isfinite(metrics["eval_loss"]) and torch.equal(
        t.coefficient_fit.sums, before["sums"]
    )
    assert metrics["eval_update_past"] == t.coefficient_fit.coefficients(BETA).past


def test_training_anew_begins_without_coefficients(tmp_path):
    """`auto_find_batch_size` starts again with the same seed: it would sample the same again."""
    t = make(tmp_path, max_steps=2)
    t.train()
    t.train()
    past = [log["update_past"] for log in t.state.log_history if "update_past" in log]
    assert past[0] == 0 and past[1] != 0


# Runs


def run(folder, updates, kill_at=None, save_every=0):
    metrics, weights, _ = train_run(
        folder, updates, kill_at, save_every, kl_estimator="fitted", num_iterations=2
    )
    frame = pd.read_csv(io.StringIO(metrics))
    return weights, frame[frame.metric != "seconds"].reset_index(drop=True)


def test_a_run_of_thirty_updates_is_finite_and_writes_its_coefficients_down(tmp_path):
    frame = run(tmp_path / "run", 30)[1]
    assert set(frame.step) == set(range(1, 31)) and frame.value.map(math.isfinite).all()
    objective, past, noise = (
        frame[frame.metric == name].value for name in ("objective", "update_past", "update_noise")
    )
    assert len(objective) == 15  # generation batches
    for values in (past, noise):
        assert len(values) == 15 and values.iloc[0] == 0 and (values.iloc[1:] != 0).all()
    assert set(frame[frame.metric.str.startswith("update_")].unit) == {"log-odds/nat"}


def test_a_killed_run_goes_on_with_the_same_coefficients(tmp_path):
    weights, whole = run(tmp_path / "whole", 10)
    for kill_at in (4, 2):
        with pytest.raises(Killed):
            run(tmp_path / "killed", 10, kill_at, save_every=4)
    state = json.loads(
        next((tmp_path / "killed" / "trainer").glob("checkpoint-*/trainer_state.json")).read_text()
    )
    assert torch.tensor(
        state["stateful_callbacks"]["klrb.update.CoefficientFit"]["sums"]
    ).shape == (5, 5)
    resumed, metrics = run(tmp_path / "killed", 10)
    pd.testing.assert_frame_equal(metrics, whole)
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())


def test_a_checkpoint_without_coefficients_is_refused(tmp_path):
    settings = dict(max_steps=2, save_strategy="steps", save_steps=1)
    make(tmp_path, kl_estimator="rb", **settings).train()
    with pytest.raises(InputError, match="from update 1 and has no coefficients"):
        make(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_masked_prefix_is_refused(tmp_path):
    with pytest.raises(
        InputError, match="`mask_truncated_completions` is True.*`kl_estimator='fitted'`"
    ):
        make(tmp_path, mask_truncated_completions=True)
    with pytest.raises(InputError, match="the unbiased methods are .*fitted"):
        make(tmp_path, kl_estimator="fit")


def test_a_study_may_have_it(tmp_path):
    assert "fitted" in UNBIASED and study_grid(get_profile("smoke", estimators=("rb", "fitted")))[
        "kl_estimator"
    ] == ["rb", "fitted"]
    assert in_order(["fitted", "mc"]) == ["mc", "fitted"] and LABELS["fitted"]
