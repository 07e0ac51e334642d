"`target_kl` of the trainers: beta moves by earlier batches only, is logged, and survives a stop."

import json

import pytest
import torch
from datasets import Dataset

from klrb.budget import KLBudget
from klrb.errors import InputError, InputTypeError
from klrb.grpo import RBGRPOConfig, RBGRPOTrainer
from klrb.models import load_model, load_tokenizer
from klrb.rloo import RBRLOOConfig, RBRLOOTrainer

CPU = dict(report_to=[], gradient_checkpointing=False, disable_tqdm=True, use_cpu=True, bf16=False)
PROMPTS = Dataset.from_dict(dict(prompt=["The film", "I saw this", "Never", "It was"] * 4))
TRAINERS = dict(rloo=(RBRLOOConfig, RBRLOOTrainer), grpo=(RBGRPOConfig, RBGRPOTrainer))


def count_e(completions, prompts, **kwargs):
    return [float(c.count("e")) for c in completions]


def make(kind, folder, **settings):
    settings = (
        dict(
            beta=0.1,
            target_kl=0.2,
            per_device_train_batch_size=8,
            num_generations=2,
            max_completion_length=4,
            max_steps=4,
            logging_steps=1,
            learning_rate=1e-3,
            seed=1,
        )
        | CPU
        | settings
    )
    config, trainer = TRAINERS[kind]
    models = (load_model("tiny-random", seed=seed) for seed in (1, 0))
    given = config(str(folder), **settings), PROMPTS, load_tokenizer("tiny-random")
    return trainer(*models, count_e, *given)


def column(trainer, name):
    return [o[name] for o in trainer.state.log_history if name in o]


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_beta_follows_the_kl_of_the_batches_before(tmp_path, kind):
    trainer = make(kind, tmp_path, save_strategy="no")
    trainer.train()
    measured, used = column(trainer, "kl_sequence_rb"), column(trainer, "beta")
    budget = KLBudget(0.2, 0.1)
    for kl, beta in zip(measured, used):
        assert beta == pytest.approx(budget.beta, rel=1e-6)
        budget.update(kl)
    assert used[0] == pytest.approx(0.1) and len({round(o, 6) for o in used}) == 4
    assert all(o > 0 for o in column(trainer, "kl_sequence_rb_stderr"))


def test_the_loss_is_weighed_by_the_beta_that_is_logged(tmp_path):
    trainer = make("rloo", tmp_path, save_strategy="no")
    trainer.model.train()
    rows = [dict(prompt=o) for o in PROMPTS["prompt"][:4] for _ in range(2)]
    torch.manual_seed(0)
    trainer._generate_and_score_completions(rows)
    torch.manual_seed(0)
    batch = trainer._generate_and_score_completions(rows)
    assert trainer.kl_beta != 0.1
    with_budget = trainer._compute_loss(trainer.model, batch)
    fixed = make("rloo", tmp_path, target_kl=None, beta=trainer.kl_beta, save_strategy="no")
    fixed.model.train()
    torch.manual_seed(0)
    same = fixed._generate_and_score_completions(rows)
    assert fixed._compute_loss(fixed.model, same).item() == pytest.approx(with_budget.item())


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    whole = make("rloo", tmp_path / "whole", save_strategy="no")
    whole.train()
    first = make("rloo", tmp_path / "run", save_strategy="steps", save_steps=2)
    first.train()
    folder = tmp_path / "run" / "checkpoint-2"
    state = json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]
    assert state["klrb.budget.KLBudget"]["target"] == 0.2
    later = make("rloo", tmp_path / "again", save_strategy="no")
    later.train(resume_from_checkpoint=str(folder))
    assert column(later, "beta")[-2:] == pytest.approx(column(whole, "beta")[-2:])
    without = make("rloo", tmp_path / "none", save_strategy="steps", save_steps=2, target_kl=None)
    without.train()
    with pytest.raises(InputError, match="has no KL budget"):
        make("rloo", tmp_path / "no", save_strategy="no").train(
            resume_from_checkpoint=str(tmp_path / "none" / "checkpoint-2")
        )


@pytest.mark.parametrize("config", [RBRLOOConfig, RBGRPOConfig])
@pytest.mark.parametrize(
    "settings, error, message",
    [
        (dict(target_kl=0.0), InputError, "`target_kl` is 0.0; it must be positive"),
        (dict(target_kl=-3.0), InputError, "`target_kl` is -3.0"),
        (dict(target_kl="3"), InputTypeError, "`target_kl` is '3'; it must be a number"),
        (dict(target_kl=3.0, beta=0.0), InputError, "`beta` is 0.0; it must be positive"),
        (dict(target_kl=float("inf")), InputError, "`target_kl` is inf"),
    ],
)
def test_bad_targets_are_refused(tmp_path, config, settings, error, message):
    with pytest.raises(error, match=message):
        config(str(tmp_path), **CPU | dict(beta=0.1) | settings)
