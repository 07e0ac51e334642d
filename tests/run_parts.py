"""Where the seconds of an RLOO run of the pocket model go, on one CPU core.

    python tests/run_parts.py PREPARED OUT [UPDATES]

PREPARED is the folder of a pocket preparation, OUT the CSV that is written, in seconds of the
processor, so that others do not count. `plain` are the parts of the same update without TRL, in the
stacked engine with one policy. What was found is in outputs/published/speed/run.csv.
"""

import functools
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

BEGAN = time.process_time()
SPENT, NESTED = defaultdict(float), []


def timed(name, function):
    "Adds what a call takes, without what is timed inside of it, to `SPENT`."

    @functools.wraps(function)
    def call(*args, **kwargs):
        begin = time.process_time()
        NESTED.append(0.0)
        try:
            return function(*args, **kwargs)
        finally:
            whole = time.process_time() - begin
            SPENT[name] += whole - NESTED.pop()
            if NESTED:
                NESTED[-1] += whole

    return call


def run(prepared, updates):
    import torch

    torch.set_num_threads(1)
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from klrb.rlhf import training
    from klrb.rlhf.profiles import get_profile
    from klrb.rloo import RBRLOOTrainer

    SPENT["imports"] = time.process_time() - BEGAN
    for name, owner, method in (
        ("models and data", training, "_load"),
        ("generation", RBRLOOTrainer, "_generate_single_turn"),
        ("step KLs before the update", RBRLOOTrainer, "_score_generated"),
        ("loss", RBRLOOTrainer, "_compute_loss"),
        ("gradient", Accelerator, "backward"),
        ("optimiser", AcceleratedOptimizer, "step"),
        ("rest of the updates", RBRLOOTrainer, "training_step"),
        ("evaluation", training, "_judge"),
    ):
        setattr(owner, method, timed(name, getattr(owner, method)))
    with tempfile.TemporaryDirectory() as out:
        call = timed("rest of the run", training.rloo_run)
        call(get_profile("pocket"), prepared, out, updates=updates)


def plain(prepared, updates=5):
    from klrb.rlhf.many import Arm, ManyRuns, Settings, UpdateLoss
    from klrb.rlhf.plateau import load_inputs

    inputs = load_inputs(prepared, "klrb/assets/pocket", 0)
    arms = [Arm("rb")]
    given = arms, inputs.reference.copies(1), inputs.reference, inputs.train
    runs = ManyRuns(*given, Settings(), UpdateLoss(arms, "cpu"), inputs.reward)
    runs.update()
    runs.sampled = timed("plain: generation", runs.sampled)
    runs._learn = timed("plain: loss, gradient, optimiser", runs._learn)
    for _ in range(updates):
        runs.update()
    for name in ("plain: generation", "plain: loss, gradient, optimiser"):
        SPENT[name] /= updates


def main():
    import pandas as pd

    prepared, out, updates = sys.argv[1], sys.argv[2], int((sys.argv[3:] or [40])[0])
    run(prepared, updates)
    plain(prepared)
    once = "imports", "models and data", "evaluation", "rest of the run"
    rows = [
        dict(
            part=name,
            seconds=spent,
            of="the run" if name in once else "an update",
        )
        for name, spent in SPENT.items()
    ]
    table = pd.DataFrame(rows)
    per_update = (table.of == "an update") & ~table.part.str.startswith("plain")
    table.loc[per_update, "seconds"] /= updates
    table.to_csv(out, index=False, float_format="%.4g")
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
