"""A step of klrb's trainers against one of TRL's, same completions.

    python tests/distill_speed.py time distill|grpo LAYERS ROWS PAIRS
    python tests/distill_speed.py memory distill|grpo rb|trl LAYERS ROWS

Models of SmolLM2's shape with random weights, on one CPU core. `time` gives the processor's seconds
of both in pairs, so that others do not count, and their ratio; `memory` the peak of a step after
the first, beyond what was there before it, in MB of the process and of its tensors. A step is
everything but the sampling and the optimiser: the other model's pass, the policy's, loss and
gradient; GRPO's is TRL's with k3 against ours with the exact penalty. What was found is in
outputs/published/speed/distill.csv.
"""

import ctypes
import math
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest.mock import patch

import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, logging
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from klrb.distill import RBDistillationConfig, RBDistillationTrainer
from klrb.grpo import RBGRPOConfig, RBGRPOTrainer
from klrb.models import completion_hidden, load_tokenizer

PROMPT, STEPS = 8, 24  # tokens
CPU = dict(report_to=[], bf16=False, gradient_checkpointing=False, disable_tqdm=True, use_cpu=True)
FIELDS = "prompt_ids", "prompt_mask", "completion_ids", "completion_mask"


def model(layers, seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def completions(rows):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, 49152, (rows, PROMPT + STEPS), generator=generator)


def make(kind, name, layers, rows):
    "One trainer, and the function that takes its step."
    data = Dataset.from_dict(dict(prompt=["The film was so"] * rows))
    settings = dict(CPU, per_device_train_batch_size=rows, max_completion_length=STEPS)
    folder, models = tempfile.mkdtemp(), (model(layers, 0), model(layers, 1))
    tokenizer, ids = load_tokenizer("pocket"), completions(rows)
    if kind == "distill" and name == "trl":
        config = DistillationConfig(folder, **settings)
        trainer = DistillationTrainer(*models, config, data, processing_class=tokenizer)
    elif kind == "distill":
        config = RBDistillationConfig(folder, **settings)
        trainer = RBDistillationTrainer(*models, config, data, tokenizer)
    else:
        trainer = make_grpo(name, models, data, tokenizer, folder, settings)
        trainer._generate_single_turn = lambda *_, **__: (ids[:, PROMPT:].tolist(), None)
        trainer._tokenize_prompts = lambda prompts: (ids[:, :PROMPT].tolist(), None, {})
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer, distill_loss if kind == "distill" else grpo_loss


def make_grpo(name, models, data, tokenizer, folder, settings):
    def reward(completions, **kwargs):
        return [float(i % 3) for i in range(len(completions))]

    settings = settings | dict(num_generations=4, beta=0.1)
    if name == "rb":
        config = RBGRPOConfig(folder, **settings)
        return RBGRPOTrainer(*models, reward, config, data, tokenizer)
    given = dict(train_dataset=data, processing_class=tokenizer)
    with patch.object(grpo_trainer, "create_model_from_path", lambda *_, **__: models[1]):
        return GRPOTrainer(models[0], reward, GRPOConfig(folder, **settings), **given)


def distill_loss(trainer, rows):
    "Ours reads the teacher when the completions have been generated."
    ids = completions(rows)
    parts = [part for o in (ids, torch.ones_like(ids)) for part in o.split([PROMPT, STEPS], 1)]
    batch = dict(zip(FIELDS, (parts[0], parts[2], parts[1], parts[3])))
    batch["num_items_in_batch"] = torch.tensor(float(rows * STEPS))
    if isinstance(trainer, RBDistillationTrainer):
        hidden = trainer._on_teacher(completion_hidden, *(batch[name] for name in FIELDS))
        batch["teacher_hidden"] = hidden
    return trainer.compute_loss(trainer.model, batch)


def grpo_loss(trainer, rows):
    inputs = [dict(prompt="The film was so")] * rows
    return trainer.compute_loss(trainer.model, trainer._generate_and_score_completions(inputs))


def step(trainer, loss, rows):
    "Seconds of one step."
    trainer.model.zero_grad()
    began = time.process_time()
    loss(trainer, rows).backward()
    return time.process_time() - began


def median_interval(values):
    "At least 95 % for six values or more: between two of them, counted from either end."
    values, n = sorted(values), len(values)
    tails = [2 * sum(math.comb(n, j) for j in range(k + 1)) / 2**n for k in range(n // 2)]
    least = max(sum(o <= 0.05 for o in tails) - 1, 0)
    return values[least], values[-1 - least]


def measure_time(kind, layers, rows, pairs):
    trainers = {name: make(kind, name, layers, rows) for name in ("rb", "trl")}
    found = []
    for i in range(pairs + 1):
        order = ("rb", "trl") if i % 2 else ("trl", "rb")
        taken = {name: step(*trainers[name], rows) for name in order}
        found += [taken] * (i > 0)  # the first pair starts up
        print(taken, flush=True)
    medians = {name: statistics.median(o[name] for o in found) for name in ("rb", "trl")}
    ratios = [o["rb"] / o["trl"] for o in found]
    low, high = median_interval(ratios)
    print("seconds", medians, "ratio", statistics.median(ratios), "from", low, "to", high)


def of_process(name):
    "A line of Linux's /proc/self/status, in MB."
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(o.split()[1]) / 1e3 for o in lines if o.startswith(name))


def tensors_peak(call):
    "Peak of torch's allocations in a call, in MB."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = found.profiler.kineto_results.events()
    events = sorted((o for o in events if o.name() == "[memory]"), key=lambda o: o.start_ns())
    now = peak = 0
    for o in events:
        now += o.nbytes()
        peak = max(peak, now)
    return peak / 1e6


def measure_memory(kind, name, layers, rows):
    trainer, loss = make(kind, name, layers, rows)
    step(trainer, loss, rows)  # loads and compiles what is needed once
    trainer.model.zero_grad()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # and the peak is the size of now
    before = of_process("VmRSS")
    for _ in range(2):
        step(trainer, loss, rows)
    print("MB of a step", of_process("VmHWM") - before, "beside", before, flush=True)
    trainer.model.zero_grad()
    print("MB of its tensors", tensors_peak(lambda: step(trainer, loss, rows)))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if sys.argv[1] == "time":
        measure_time(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        measure_memory(*sys.argv[2:4], *map(int, sys.argv[4:]))
