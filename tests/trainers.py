"""One small trainer for all tests of the trainer, and one run of it that can be killed."""

import os

import torch
from datasets import Dataset

from klrb.models import load_model, load_tokenizer
from klrb.rlhf.profiles import get_profile
from klrb.rlhf.training import rloo_config, train_rloo
from klrb.rloo import RBRLOOConfig, RBRLOOTrainer

CPU = dict(
    report_to=[],
    gradient_checkpointing=False,
    disable_tqdm=True,
    use_cpu=True,
    save_strategy="no",
    bf16=False,
)
TEXTS = [
    "The film",
    "I saw this film with",
    "Never",
    "It was a bit of a",
    "This",
    "A story",
    "He",
    "My",
]
PROMPTS = Dataset.from_dict(dict(prompt=TEXTS, label=[0, 1] * 4))


def be_one_of_two(rank, port):
    "The environment that `accelerate launch` gives each of two processes on the CPU."
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )
    torch.set_num_threads(1)


class Killed(Exception):
    "Stands for the end of the process."


def rollout_rows(prompts, group):
    "What TRL gives a generation batch: every prompt `group` times."
    return [dict(prompt=p) for p in prompts for _ in range(group)]


def count_e(completions, prompts=None, **kwargs):
    return [float(c.count("e")) for c in completions]


def make_trainer(
    folder,
    policy=None,
    reference="given",
    peft_config=None,
    reward=count_e,
    prompts=PROMPTS,
    **settings,
):
    "A trainer in training mode; `reference=None` leaves it out."
    defaults = dict(
        kl_estimator="rb",
        beta=0.3,
        per_device_train_batch_size=8,
        num_generations=2,
        max_completion_length=6,
        temperature=0.8,
        seed=1,
    )
    made = RBRLOOTrainer(
        policy or load_model("tiny-random", seed=1),
        load_model("tiny-random", seed=0) if reference == "given" else reference,
        reward,
        RBRLOOConfig(str(folder), **defaults | CPU | settings),
        prompts,
        load_tokenizer("tiny-random"),
        peft_config=peft_config,
    )
    made.model.train()
    return made


def train_run(
    folder,
    updates,
    kill_at=None,
    save_every=4,
    kl_estimator="rb",
    num_iterations=4,
    learning_rate=1e-3,
    policy=None,
    reference="given",
    resume=True,
):
    """Text of the metrics, weights, and number of generation batches of a run.

    `kill_at`: the generation batch, counted from 1, whose reward ends the run.
    """
    folder.mkdir(exist_ok=True)
    calls = []

    def reward(completions, prompts, **kwargs):
        calls.append(1)
        if len(calls) == kill_at:
            raise Killed
        return count_e(completions)

    profile = get_profile("smoke", num_iterations=num_iterations, learning_rate=learning_rate)
    config = rloo_config(
        profile,
        folder / "trainer",
        kl_estimator,
        beta=0.3,
        seed=3,
        updates=updates,
        save_every=save_every,
    )
    policy = train_rloo(
        policy or load_model("tiny-random", seed=1),
        load_model("tiny-random", seed=0) if reference == "given" else reference,
        load_tokenizer("tiny-random"),
        PROMPTS,
        reward,
        config,
        folder / "metrics.csv",
        resume=resume,
        start="reference",
    )
    return (folder / "metrics.csv").read_text(), policy.state_dict(), len(calls)


def move(made, scale=0.02):
    "Move what is trained, the same way each time."
    with torch.no_grad():
        for p in made.model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
