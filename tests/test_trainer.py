"""The RLOO trainer without logits: what it computes, under every way of training."""

import socket
from functools import partial

import pytest
import torch
from torch.multiprocessing import spawn
from torch.testing import assert_close
from transformers import TrainerCallback

import klrb.rloo
from klrb.models import load_model, load_tokenizer
from klrb.rlhf.profiles import get_profile
from klrb.rlhf.judging import evaluate_policy
from klrb.rloo import RBRLOOTrainer
from trainers import PROMPTS, be_one_of_two, count_e, make_trainer, rollout_rows

FOUR = PROMPTS.select(range(4))
make = partial(make_trainer, prompts=FOUR)


def norm(gradients):
    "Of all parameters together."
    return torch.stack([g.norm() for g in gradients.values()]).norm()


def generate(t, seed=3):
    torch.manual_seed(seed)
    return t._generate_and_score_completions(rollout_rows(FOUR["prompt"], 2))


def loss_and_gradients(t, batch):
    t.model.zero_grad()
    loss = t._compute_loss(t.model, batch)
    loss.backward()
    return loss.detach(), {
        name: p.grad for name, p in t.model.named_parameters() if p.grad is not None
    }


# No logits outside generation


class LogitsBuilt(Exception):
    pass


def forbid_logits(model):
    "Let the head of `model` raise wherever it is called, but in `generate`."
    allowed, generate = [], model.generate

    def guarded(*args, **kwargs):
        allowed.append(True)
        try:
            return generate(*args, **kwargs)
        finally:
            allowed.pop()

    def refuse(module, args):
        if not allowed:
            raise LogitsBuilt

    model.generate = guarded
    model.get_output_embeddings().register_forward_pre_hook(refuse)


@pytest.mark.parametrize("kl_estimator", ["mc", "rb"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_no_logits_are_built_outside_generation(tmp_path, kl_estimator, beta):
    t = make(
        tmp_path,
        kl_estimator=kl_estimator,
        beta=beta,
        max_steps=3,
        num_iterations=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
    )
    for model in (t.model, t.ref_model):
        forbid_logits(model)
    t.train()
    assert t.state.global_step == 3
    evaluate_policy(
        t.model, t.ref_model, load_tokenizer("tiny-random"), FOUR, count_e, get_profile("smoke")
    )
    with pytest.raises(LogitsBuilt):
        t.model(torch.zeros(1, 1, dtype=torch.long))  # the guard works


@pytest.mark.parametrize(
    "kl_estimator, exact", [("mc", False), ("mc_to_go", False), ("rb", True), ("rb_sequence", True)]
)
def test_the_reference_reads_a_generation_batch_once_and_the_loss_of_mc_has_no_step_kl(
    tmp_path, monkeypatch, kl_estimator, exact
):
    calls, read = [], []

    def spy(policy_hidden, policy_head, ref_hidden, *args, **kwargs):
        calls.append((torch.is_grad_enabled(), policy_hidden.shape[:2]))
        return kernel(policy_hidden, policy_head, ref_hidden, *args, **kwargs)

    kernel = klrb.rloo.linear_step_kl
    monkeypatch.setattr("klrb.rloo.linear_step_kl", spy)
    t = make(
        tmp_path,
        kl_estimator=kl_estimator,
        max_steps=4,
        num_iterations=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    t.ref_model.transformer.register_forward_hook(lambda *args: read.append(1))
    t.train()
    assert len(read) == 2  # one generation batch, in two halves; four updates
    assert (
        calls == [(False, (4, 6))] * 2 + [(True, (4, 6))] * 8 * exact
    )  # at the completion's 6 positions only


# Ways of training


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, checkpointed = make(tmp_path), make(tmp_path, gradient_checkpointing=True)
    checkpointed.model.gradient_checkpointing_enable()
    batch = generate(plain)
    (loss, gradients), (other_loss, other_gradients) = (
        loss_and_gradients(t, batch) for t in (plain, checkpointed)
    )
    assert (
        checkpointed.model.is_gradient_checkpointing and gradients.keys() == other_gradients.keys()
    )
    assert_close(loss, other_loss)
    for name, value in gradients.items():
        assert_close(other_gradients[name], value)


def test_autocast_keeps_the_kl_of_equal_weights_at_zero(tmp_path):
    """Exactly: any rounding difference between the two models' ways would show as a KL."""
    t = make(tmp_path, load_model("tiny-random", seed=0), bf16=True, max_steps=1)
    dtypes = []
    t.model.transformer.h[0].mlp.register_forward_hook(
        lambda module, args, output: dtypes.append(output.dtype)
    )
    batch = generate(t)
    assert dtypes[-1] == torch.bfloat16
    assert t._metrics["train"]["kl_sequence_rb"] == t._metrics["train"]["kl_sequence_mc"] == [0.0]
    seen = []
    t._score = lambda *args: seen.append(RBRLOOTrainer._score(t, *args)) or seen[-1]
    loss_and_gradients(t, batch)
    assert (seen[0].step_kl == 0).all() and (
        seen[0].policy_logprobs == batch["old_per_token_logps"]
    ).all()


def test_autocast_is_near_float32(tmp_path):
    exact, rounded = make(tmp_path), make(tmp_path, bf16=True)
    batch = generate(exact)
    (loss, gradients), (other_loss, other_gradients) = (
        loss_and_gradients(t, batch) for t in (exact, rounded)
    )
    difference = norm({name: g - other_gradients[name] for name, g in gradients.items()})
    assert difference < 0.05 * norm(gradients) and abs(loss - other_loss) < 0.02 * abs(
        loss
    )  # bfloat16 has 8 bits


# Adapters


def lora(**settings):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["c_attn", "c_fc"],
        fan_in_fan_out=True,
        r=4,
        **settings,
    )


def with_adapters_moved(t):
    with torch.no_grad():
        for name, p in t.model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.3)
    return t


@pytest.mark.parametrize("kl_estimator", ["mc", "rb"])
def test_a_policy_with_adapters_is_its_own_reference(tmp_path, kl_estimator):
    """Oracle: the merged policy against the base model, as two ordinary models."""
    ours = with_adapters_moved(
        make(tmp_path, load_model("tiny-random", seed=0), None, lora(), kl_estimator=kl_estimator)
    )
    batch = generate(ours)
    loss, gradients = loss_and_gradients(ours, batch)
    assert gradients and all("lora" in name for name in gradients)
    merged = (
        with_adapters_moved(make(tmp_path, load_model("tiny-random", seed=0), None, lora()))
        .model.merge_and_unload()
        .requires_grad_()
    )
    two_models = make(
        tmp_path, merged, load_model("tiny-random", seed=0), kl_estimator=kl_estimator
    )
    other = generate(two_models)
    assert torch.equal(batch["completion_ids"], other["completion_ids"])
    for name in ("kl_sequence_rb", "kl_sequence_mc"):
        assert ours._metrics["train"][name][0] == pytest.approx(
            two_models._metrics["train"][name][0], rel=1e-4
        )
    assert ours._metrics["train"]["kl_sequence_rb"][0] > 0.1
    assert_close(loss, loss_and_gradients(two_models, other)[0], rtol=1e-4, atol=1e-4)


def test_fresh_adapters_have_no_kl_and_a_head_trained_in_full_gets_its_gradient(tmp_path):
    t = make(tmp_path, load_model("tiny-random", seed=0), None, lora(modules_to_save=["lm_head"]))
    batch = generate(t)
    assert t._metrics["train"]["kl_sequence_rb"] == [0.0]
    gradients = loss_and_gradients(t, batch)[1]
    assert any("lm_head.modules_to_save" in name for name in gradients)
    assert not any("original_module" in name for name in gradients)


def test_without_adapters_a_reference_is_needed(tmp_path):
    with pytest.raises(ValueError, match="`ref_model` is None, but `model` has no adapters"):
        make(tmp_path, reference=None)


def test_sharded_heads_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("klrb.rloo.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="use ZeRO-2"):
        make(tmp_path)


# Two processes


class Gradients(TrainerCallback):
    "Keeps the gradient of every update, after accumulation and synchronisation."

    def __init__(self):
        self.kept = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.kept.append(
            {
                name.removeprefix("module."): p.grad.clone()
                for name, p in model.named_parameters()
                if p.grad is not None
            }
        )


def fixed_completions(self, prompt_ids, images, fields):
    """In place of sampling, which differs between processes: tokens, and a length, that depend on
    the prompt and the completion's number."""

    def draw(ids, i):
        generator = torch.Generator().manual_seed(sum(ids) + i)
        return torch.randint(2, 4096, (2 + (sum(ids) + i) % 5,), generator=generator)

    return [draw(ids, i % 2).tolist() for i, ids in enumerate(prompt_ids)]


POLICIES = {
    "all weights, rb": dict(kl_estimator="rb"),
    "all weights, mc": dict(kl_estimator="mc"),
    "all weights, fitted": dict(kl_estimator="fitted"),
    "adapters and a head of its own": dict(reference=None, adapters=True),
}


def train_fixed(folder, name, processes):
    "Two updates of 8 rollouts. Losses, both KLs, gradients and weights."
    settings, keep = dict(POLICIES[name]), Gradients()
    if settings.pop("adapters", False):
        settings["peft_config"] = lora(modules_to_save=["lm_head"])
    t = make(
        folder,
        max_steps=2,
        optim="sgd",
        learning_rate=1e-3,
        logging_steps=1,
        max_grad_norm=1e9,
        per_device_train_batch_size=8 // processes**2,
        gradient_accumulation_steps=processes,
        **settings,
    )
    t._generate_single_turn = fixed_completions.__get__(t)
    t.add_callback(keep)
    t.train()
    assert (type(t.model_wrapped).__name__ == "DistributedDataParallel") == (processes > 1)
    names = ["loss", "reward", "kl_sequence_rb", "kl_sequence_mc", "grad_norm"]
    if "fitted" in name:
        names += ["update_past", "update_noise"]
    logs = [{key: log[key] for key in names} for log in t.state.log_history if "loss" in log]
    return logs, keep.kept, {name: p.detach() for name, p in t.model.named_parameters()}


def one_of_two(rank, folder, port):
    be_one_of_two(rank, port)
    results = {name: train_fixed(folder, name, 2) for name in POLICIES}
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_kl_loss_and_gradient_of_one(tmp_path):
    """gloo, on the CPU, with gradient accumulation: each process sees two of four prompts, two
    rollouts at a time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(one_of_two, (tmp_path, port), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in POLICIES:
        logs, gradients, weights = train_fixed(tmp_path, name, 1)
        for their_logs, their_gradients, their_weights in (first[name], second[name]):
            for ours, theirs in zip(
                logs, their_logs, strict=True
            ):  # the loss sums terms of order 10 that may cancel, in float32
                assert theirs == pytest.approx(ours, rel=1e-4, abs=2e-5)
            for ours, theirs in zip(gradients, their_gradients, strict=True):
                assert (
                    norm({key: g - theirs.pop(key) for key, g in ours.items()}) < 1e-4 * norm(ours)
                    and not theirs
                )
            assert_close(their_weights, weights, rtol=1e-4, atol=1e-6)
        assert logs[1]["kl_sequence_rb"] > 1e-3 and len(gradients) == 2
