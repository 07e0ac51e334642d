"The GRPO trainer: its penalty beside TRL's loss, under every way of normalising and training."

import dataclasses
import inspect

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.testing import assert_close
from trl import GRPOConfig, GRPOTrainer, RLOOTrainer

from klrb.errors import InputError, InputTypeError
from klrb.grpo import _FIXED, _LOSSES, _OWN, RBGRPOConfig, RBGRPOTrainer
from klrb.models import completion_logits, load_model, load_tokenizer
from klrb.rlhf.sampling import FREE
from klrb.rloo import ExactPenalty, RBRLOOConfig

CPU = dict(report_to=[], gradient_checkpointing=False, disable_tqdm=True, use_cpu=True, bf16=False)
PROMPTS = Dataset.from_dict(dict(prompt=["The film", "I saw this film with", "Never", "It was"]))
ROWS = [dict(prompt=o) for o in PROMPTS["prompt"] for _ in range(2)]
BETA = 0.3


def count_e(completions, prompts, **kwargs):
    return [float(c.count("e")) for c in completions]


def make(folder, kl_estimator="rb", beta=BETA, reference="given", peft_config=None, **settings):
    settings = (
        dict(
            per_device_train_batch_size=8,
            num_generations=2,
            max_completion_length=6,
            temperature=0.8,
            seed=1,
            save_strategy="no",
        )
        | CPU
        | settings
    )
    config = RBGRPOConfig(str(folder), kl_estimator=kl_estimator, beta=beta, **settings)
    trainer = RBGRPOTrainer(
        load_model("tiny-random", seed=1),
        load_model("tiny-random", seed=0) if reference == "given" else reference,
        count_e,
        config,
        PROMPTS,
        load_tokenizer("tiny-random"),
        peft_config=peft_config,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = config.gradient_accumulation_steps
    return trainer


def generate(trainer, seed=3):
    torch.manual_seed(seed)
    return trainer._generate_and_score_completions(ROWS)


def gradient(trainer, batch):
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, batch).backward()
    return torch.cat([p.grad.flatten().double() for p in trainer.model.parameters()])


def by_hand(trainer, batch, method, old=None):
    "Mean over rollouts of the surrogate, written out in float64 from logits; its gradient."
    state = {name: o.double() for name, o in trainer.model.state_dict().items()}
    policy = load_model("tiny-random", seed=1).double()
    policy.load_state_dict(state)
    reference = load_model("tiny-random", seed=0).double()
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    fields = [batch[name] for name in names]
    mask = fields[3].double()
    logp, logq = (
        (completion_logits(o, *fields) / trainer.temperature).log_softmax(-1)
        for o in (policy, reference)
    )
    kl = (logp.exp() * (logp - logq.detach())).sum(-1) * mask
    chosen, ref_chosen = (
        o.gather(-1, fields[2][..., None]).squeeze(-1) * mask for o in (logp, logq.detach())
    )
    log_ratio = torch.zeros_like(chosen) if old is None else (chosen.detach() - old * mask)
    after_ratio = log_ratio.cumsum(1).exp()  # up to and including the token
    ratio = torch.cat([torch.ones_like(after_ratio[:, :1]), after_ratio[:, :-1]], 1)
    if method == "step":
        penalty = (ratio * kl).sum()
    elif method == "mc":
        whole = (after_ratio * (chosen - ref_chosen).detach()).sum(1, keepdim=True)
        penalty = ((whole - others(whole)) * chosen).sum()
    else:
        weighted = (ratio * kl).detach()
        future = weighted.sum(1, keepdim=True) - weighted.cumsum(1)
        baseline = batch.get("kl_baseline", others(future) * mask).double()
        penalty = (ratio * kl).sum() + ((future - after_ratio * baseline) * chosen).sum()
    penalty = penalty / len(mask)
    return torch.cat([o.flatten() for o in torch.autograd.grad(penalty, list(policy.parameters()))])


def others(values):  # of the other completion of the prompt
    return values.view(4, 2, -1).flip(1).view(values.shape)


def share(loss_type, mask, tokens, length):
    "What the loss of TRL weighs a mean over rollouts by."
    if loss_type == "dr_grpo":
        return 1 / length
    return len(mask) / (mask.sum() if loss_type == "bnpo" else tokens).double()


@pytest.mark.parametrize("method", ["rb", "step", "mc"])
@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo", "bnpo"])
def test_the_penalty_is_what_it_says_by_what_the_loss_is_divided_by(tmp_path, method, loss_type):
    with_it, without = (make(tmp_path, method, beta, loss_type=loss_type) for beta in (BETA, 0.0))
    batch = generate(with_it)
    parts = gradient(with_it, batch) - gradient(without, generate(without))
    expected = BETA * by_hand(with_it, batch, method)
    mask = batch["completion_mask"]
    expected = expected * share(loss_type, mask, batch["num_items_in_batch"], 6)
    # float32 gradients of both losses, whose difference this is
    assert (parts - expected).norm() < 1e-4 * expected.norm()


def test_stale_rollouts_are_weighed_by_the_ratio_of_their_prefix(tmp_path):
    given = dict(num_iterations=2, loss_type="dr_grpo")
    with_it, without = (make(tmp_path, "rb", beta, **given) for beta in (BETA, 0.0))
    batch, plain = generate(with_it), generate(without)
    gen = torch.Generator().manual_seed(5)
    with torch.no_grad():  # an update later
        for ours, theirs in zip(with_it.model.parameters(), without.model.parameters()):
            step = 0.02 * torch.randn(ours.shape, generator=gen)
            ours += step
            theirs += step
    parts = gradient(with_it, batch) - gradient(without, plain)
    old = batch["old_per_token_logps"].double()
    expected = BETA * by_hand(with_it, batch, "rb", old) / 6
    on_policy = BETA * by_hand(with_it, batch, "rb") / 6
    assert (parts - expected).norm() < 1e-3 * expected.norm()
    assert (parts - on_policy).norm() > 1e-2 * expected.norm()  # the ratios are not all 1


def test_micro_batches_add_up(tmp_path):
    whole = make(tmp_path, per_device_train_batch_size=8)
    parts = make(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    batch = generate(parts)
    expected = gradient(whole, batch)
    found = 0.0
    for rows in (slice(0, 4), slice(4, 8)):
        micro = {name: o[rows] if o.dim() else o for name, o in batch.items()}
        found = found + gradient(parts, micro)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    # a batch of the loss that is the whole generation batch finds its baselines itself
    read = []
    whole.model.transformer.register_forward_pre_hook(
        lambda module, args, given: read.append(given["use_cache"]), with_kwargs=True
    )
    fresh = generate(whole)
    assert True in read and False not in read  # in sampling only
    assert "kl_baseline" in batch and "kl_baseline" not in fresh
    shuffled = {name: o.flip(0) if o.dim() else o for name, o in fresh.items()}  # as TRL may
    for given in (fresh, shuffled):
        assert (gradient(whole, given) - expected).norm() < 1e-5 * expected.norm()
    assert read.count(False) == 2  # once for each loss
    logged = [o._metrics["train"] for o in (whole, parts)]
    for name in ("kl_sequence_rb", "kl_sequence_rb_stderr", "kl_sequence_mc"):
        assert logged[0][name][0] == pytest.approx(logged[1][name][0], rel=1e-5)


@pytest.mark.parametrize("method", ["rb", "step"])
def test_a_policy_with_fresh_adapters_has_no_penalty(tmp_path, method):
    lora = LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM", r=2, init_lora_weights=True)
    trainer = make(tmp_path, method, reference=None, peft_config=lora)
    trainer._compute_loss(trainer.model, generate(trainer))
    assert abs(trainer._metrics["train"]["kl_sequence_rb"][0]) < 1e-6


def test_fitted_joins_the_plain_loss(tmp_path):
    trainer = make(
        tmp_path, "fitted", scale_rewards="none", max_steps=3, logging_steps=1, learning_rate=1e-3
    )
    trainer.train()
    log = [o for o in trainer.state.log_history if "update_past" in o]
    assert log[0]["update_past"] == 0 and log[-1]["update_past"] != 0


def test_every_setting_of_trl_is_known():
    "A new release of TRL brings new ones: each must be put where it belongs."
    known = FREE | _OWN | _FIXED.keys() | {"generation_kwargs"}
    assert {o.name for o in dataclasses.fields(GRPOConfig)} <= known
    assert not _OWN & FREE and not _OWN & _FIXED.keys()


SIGNATURES = dict(
    _generate_single_turn=None,  # passed through, whatever it takes
    _get_per_token_logps_and_entropies=(
        "self model input_ids attention_mask logits_to_keep batch_size compute_entropy "
        "compute_aux_loss"
    ),
    _generate_and_score_completions="self inputs",
    _compute_loss="self model inputs",
    _get_train_sampler="self dataset",
)


@pytest.mark.parametrize("trainer", [RLOOTrainer, GRPOTrainer])
def test_the_methods_of_trl_that_are_overridden_are_as_they_were(trainer):
    ours = {name for name in vars(ExactPenalty) if hasattr(trainer, name)}
    ours = {name for name in ours if not name.startswith("__")}
    assert ours == set(SIGNATURES), "overrides other methods of TRL than the ones listed here"
    for name, expected in SIGNATURES.items():
        found = " ".join(inspect.signature(getattr(trainer, name)).parameters)
        assert expected is None or found.startswith(expected), (
            f"TRL's {trainer.__name__}.{name} now takes ({found}), not ({expected})"
        )


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(loss_type="grpo"), "`loss_type` is 'grpo'"),
        (dict(loss_type="sapo"), "`loss_type` is 'sapo'"),
        (dict(loss_type="luspo"), "`loss_type` is 'luspo'"),
        (dict(kl_estimator="k3"), "`kl_estimator` is 'k3'"),
        (dict(kl_estimator="rb_topk"), "`kl_estimator` is 'rb_topk'"),
        (dict(beta=-1.0), "`beta` is -1.0"),
        (dict(num_generations=1, per_device_train_batch_size=8), "`num_generations` is 1"),
        (dict(top_k=20), "`top_k` is 20"),
        (dict(min_p=0.1), "`min_p` is 0.1"),
        (dict(repetition_penalty=1.1), "`repetition_penalty` is 1.1"),
        (dict(use_liger_kernel=True), "`use_liger_kernel` is True"),
        (dict(cast_lm_head_to_fp32=True), "`cast_lm_head_to_fp32` is True"),
        (dict(kl_estimator="fitted", scale_rewards="batch"), "`scale_rewards` is 'batch'"),
        (
            dict(kl_estimator="fitted", scale_rewards="none", num_iterations=2),
            "needs an update whose reward part is the plain score",
        ),
        (dict(generation_kwargs=dict(typical_p=0.5)), "`generation_kwargs` sets `typical_p`"),
    ],
)
def test_bad_settings_are_refused_by_name(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        RBGRPOConfig(str(tmp_path), **CPU | settings)


def test_other_arguments_are_refused_by_name(tmp_path):
    models = load_model("tiny-random", seed=1), load_model("tiny-random", seed=0)
    rest = count_e, RBRLOOConfig(str(tmp_path), **CPU), PROMPTS, load_tokenizer("tiny-random")
    with pytest.raises(InputTypeError, match="`args` is a RBRLOOConfig; RBGRPOTrainer needs"):
        RBGRPOTrainer(*models, *rest)
    config = RBGRPOConfig(str(tmp_path), num_generations=2, **CPU)
    rest = count_e, config, PROMPTS, load_tokenizer("tiny-random")
    with pytest.raises(InputTypeError, match="do not know `tools`"):
        RBGRPOTrainer(*models, *rest, tools=[len])
    with pytest.raises(InputError, match="`ref_model` is None"):
        RBGRPOTrainer(models[0], None, *rest)
    stale = RBGRPOConfig(
        str(tmp_path), kl_estimator="step", num_generations=2, num_iterations=2, **CPU
    )
    with pytest.raises(InputError, match="fresh rollouts only"):
        RBGRPOTrainer(*models, count_e, stale, *rest[2:])
    config.loss_type = "grpo"
    with pytest.raises(InputError, match="`loss_type` is 'grpo'"):
        RBGRPOTrainer(*models, *rest)


def test_losses_that_are_allowed_are_losses_of_trl():
    help_text = GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert all(f"'{name}'" in help_text for name in _LOSSES)


def test_equal_weights_give_no_penalty(tmp_path):
    trainer = make(tmp_path)
    trainer.model.load_state_dict(load_model("tiny-random", seed=0).state_dict())
    ours = gradient(trainer, generate(trainer))
    assert trainer._metrics["train"]["kl_sequence_rb"][0] == 0
    without = make(tmp_path, beta=0.0)
    without.model.load_state_dict(load_model("tiny-random", seed=0).state_dict())
    plain = gradient(without, generate(without))
    assert_close(ours, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())
