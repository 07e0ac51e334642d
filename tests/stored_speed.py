"""`measure_hidden` from files against the fused kernel alone on the same tensors in memory.

    python tests/stored_speed.py TABLE ROWS [float32|bfloat16] [STEPS THAT COUNT]

Adds its pairs to a table. Random states and heads of SmolLM2's shape, rows of 256 steps, one CPU
core; process time, so that others do not count. What was found is in
outputs/published/speed/stored.csv.
"""

import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save_file

from klrb.compare.stored import measure_hidden
from klrb.fused import linear_step_kl

STEPS, WIDTH, VOCABULARY, PAIRS = 256, 576, 49152, 6


def make(folder, rows, dtype, counting):
    "Two files of states and two heads, and what is in them."
    gen = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (rows, STEPS), generator=gen)
    mask = (torch.arange(STEPS) < counting).expand(rows, STEPS).contiguous()
    inputs = []
    for name in "ab":
        hidden = torch.randn(rows, STEPS, WIDTH, generator=gen).to(dtype)
        weight = (torch.randn(VOCABULARY, WIDTH, generator=gen) / 8).to(dtype)
        tensors = dict(hidden_states=hidden, token_ids=ids, mask=mask.to(torch.uint8))
        save_file(tensors, folder / f"{name}.safetensors")
        save_file(dict(weight=weight), folder / f"{name}-head.safetensors")
        inputs += [hidden, weight]
    return inputs, ids, mask


def measure(folder, rows, dtype, counting):
    inputs, ids, mask = make(folder, rows, dtype, counting)
    files = [folder / f"{o}.safetensors" for o in "ab"]
    heads = [folder / f"{o}-head.safetensors" for o in "ab"]
    ways = dict(
        kernel=lambda: linear_step_kl(*inputs, ids, completion_mask=mask),
        stored=lambda: measure_hidden(files, heads, device="cpu"),
    )
    for pair in range(PAIRS + 1):
        taken = {}
        for name in list(ways)[:: 1 if pair % 2 else -1]:
            began = time.process_time()
            ways[name]()
            taken[name] = time.process_time() - began
        if pair:  # the first one starts up
            yield taken


if __name__ == "__main__":
    torch.set_num_threads(1)
    table, rows = Path(sys.argv[1]), int(sys.argv[2])
    kind = sys.argv[3] if len(sys.argv) > 3 else "float32"
    counting = int(sys.argv[4]) if len(sys.argv) > 4 else STEPS
    about = dict(format=kind, tokens=rows * counting, padding=rows * (STEPS - counting))
    with tempfile.TemporaryDirectory() as name:
        for taken in measure(Path(name), rows, getattr(torch, kind), counting):
            print(taken, taken["kernel"] / taken["stored"], flush=True)
            row = pd.DataFrame(
                [about | {f"{o}_seconds": round(taken[o], 3) for o in ("kernel", "stored")}]
            )
            row.to_csv(table, mode="a", header=not table.exists(), index=False)
