"""The KL budget of the pocket model on one device: final KL against the target, by RB and by MC.

python tests/gpu_budget.py --prepared FOLDER --out FOLDER [--seconds SECONDS] [--device cuda]
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path


def main():
    import pandas as pd
    import torch

    from klrb.budget import KLBudget
    from klrb.rlhf.many import Arm, ManyRuns, PromptTable, Settings, UpdateLoss, join_stacks
    from klrb.rlhf.plateau import load_inputs

    p = argparse.ArgumentParser()
    p.add_argument("--prepared", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--device", default="cuda")
    p.add_argument("--seconds", type=float, default=math.inf)
    p.add_argument("--updates", type=int, default=400)
    p.add_argument("--seeds", type=int, default=8)
    p.add_argument("--workers", type=int, default=0)
    p.add_argument("--eval-every", type=int, default=50)
    p.add_argument("--schedule", default="linear")
    p.add_argument("--rate", type=float, default=1.5e-4)
    p.add_argument("--gain", type=float, default=0.02)
    p.add_argument("--proportional", type=float, default=1.0)
    p.add_argument("--targets", default="1,2,4")
    args = p.parse_args()
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    inputs = load_inputs(args.prepared, "klrb/assets/pocket", args.workers, device=args.device)
    given = [("fitted", "kl_rb"), ("fitted", "kl_mc"), ("mc", "kl_rb"), ("rb", "kl_rb")]
    rows = [
        dict(method=method, measured=measured, target=float(target), seed=seed)
        for target in args.targets.split(",")
        for method, measured in given
        for seed in range(args.seeds)
    ]
    arms = [Arm(o["method"], 0.5, o["seed"], args.rate, args.schedule) for o in rows]
    budgets = [KLBudget(o["target"], 0.5, args.gain, args.proportional) for o in rows]
    loss = UpdateLoss(arms, inputs.reference.device)
    policies = join_stacks([inputs.reference] * len(arms))
    settings = Settings(updates=args.updates)
    seen = inputs.train.texts[:512], inputs.train.ids[:512], inputs.train.mask[:512]
    trained = PromptTable(*seen)
    runs = ManyRuns(arms, policies, inputs.reference, inputs.train, settings, loss, inputs.reward)
    training, evaluations = [], []

    def evaluate():
        for name, table in (("evaluation", inputs.evaluation), ("train", trained)):
            if name == "train" and runs.updates < args.updates:
                continue
            found = runs.evaluate(table, 4 if name == "evaluation" else 1)()
            values = {k: o.tolist() for k, o in found.items()}
            frame = pd.DataFrame(rows).assign(
                prompts=name, update=runs.updates, beta=loss.beta.tolist(), **values
            )
            evaluations.append(frame)
        pd.concat(evaluations).to_csv(args.out / "evaluation.csv", index=False, float_format="%.6g")
        shown = evaluations[-1].groupby(["target", "method", "measured"])[["kl_rb", "reward"]]
        print(
            runs.updates,
            f"{time.monotonic() - began:.0f} s\n",
            shown.agg(["mean", "std"]).round(3),
            flush=True,
        )

    while runs.updates < args.updates and time.monotonic() - began < args.seconds:
        means = runs.update()
        beta = loss.beta.tolist()
        frame = pd.DataFrame(rows).assign(
            update=runs.updates,
            beta=beta,
            **{k: means[k].tolist() for k in ("kl_rb", "kl_mc", "reward", "grad_norm")},
        )
        training.append(frame)
        moved = [
            b.update(means[o["measured"]][i].item()) for i, (b, o) in enumerate(zip(budgets, rows))
        ]
        loss.beta = torch.tensor(moved, dtype=loss.beta.dtype, device=loss.beta.device)
        if runs.updates % args.eval_every == 0 and runs.updates < args.updates:
            evaluate()
            pd.concat(training).to_csv(
                args.out / "training.csv.gz", index=False, float_format="%.5g"
            )
    evaluate()
    pd.concat(training).to_csv(args.out / "training.csv.gz", index=False, float_format="%.5g")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    (args.out / "result.json").write_text(
        json.dumps(dict(settings, seconds=time.monotonic() - began), default=str)
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
