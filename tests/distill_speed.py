"""A step of `RBDistillationTrainer` against one of TRL's `DistillationTrainer`, same completions.

    python tests/distill_speed.py time LAYERS ROWS     seconds of both, in pairs, and their ratio
    python tests/distill_speed.py memory rb|trl LAYERS ROWS    peak beyond the loaded models, MB

Models of SmolLM2's shape with random weights, on one CPU core; process time, so that others do not
count. A step is the teacher's pass, the student's, loss and gradient. What was found is in
outputs/published/speed/distill.csv.
"""

import resource
import statistics
import sys
import tempfile
import time
import warnings

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, logging
from trl import DistillationConfig, DistillationTrainer

from klrb.distill import RBDistillationConfig, RBDistillationTrainer
from klrb.models import completion_hidden, load_tokenizer

PROMPT, STEPS, PAIRS = 8, 24, 4  # tokens, tokens, pairs of steps
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


def make(name, layers, rows):
    data = Dataset.from_dict(dict(prompt=["The film was so"] * rows))
    settings = dict(CPU, per_device_train_batch_size=rows, max_completion_length=STEPS)
    folder, models = tempfile.mkdtemp(), (model(layers, 0), model(layers, 1))
    tokenizer = load_tokenizer("pocket")
    if name == "trl":
        config = DistillationConfig(folder, **settings)
        return DistillationTrainer(*models, config, data, processing_class=tokenizer)
    return RBDistillationTrainer(*models, RBDistillationConfig(folder, **settings), data, tokenizer)


def completions(rows):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 49152, (rows, PROMPT + STEPS), generator=generator)
    parts = [part for o in (ids, torch.ones_like(ids)) for part in o.split([PROMPT, STEPS], 1)]
    values = parts[0], parts[2], parts[1], parts[3]
    return dict(zip(FIELDS, values)) | dict(num_items_in_batch=torch.tensor(float(rows * STEPS)))


def step(trainer, batch):
    "Seconds of one step; ours reads the teacher when the completions have been generated."
    trainer.model.train()
    trainer.model.zero_grad()
    began = time.process_time()
    if isinstance(trainer, RBDistillationTrainer):
        hidden = trainer._on_teacher(completion_hidden, *(batch[name] for name in FIELDS))
        batch = batch | dict(teacher_hidden=hidden)
    trainer.compute_loss(trainer.model, batch).backward()
    return time.process_time() - began


def measure_time(layers, rows):
    trainers, batch = {o: make(o, layers, rows) for o in ("rb", "trl")}, completions(rows)
    found = []
    for i in range(PAIRS + 1):
        order = ("rb", "trl") if i % 2 else ("trl", "rb")
        taken = {name: step(trainers[name], batch) for name in order}
        found += [taken] * (i > 0)  # the first pair starts up
        print(taken, flush=True)
    ratios = sorted(o["rb"] / o["trl"] for o in found)
    print("rb / trl", statistics.median(ratios), "from", ratios[0], "to", ratios[-1])


def measure_memory(name, layers, rows):
    trainer, batch = make(name, layers, rows), completions(rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        step(trainer, batch)
    print("MB", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if sys.argv[1] == "time":
        measure_time(*map(int, sys.argv[2:]))
    else:
        measure_memory(sys.argv[2], *map(int, sys.argv[3:]))
