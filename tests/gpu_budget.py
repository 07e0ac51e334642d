"""The KL budget of the pocket model on one device: final KL against the target, by RB and by MC.

python tests/gpu_budget.py --prepared FOLDER --out FOLDER [--seconds SECONDS] [--device cuda]

The published run: --arms fitted:kl_rb,fitted:kl_mc --updates 1000 --rate 4.5e-5 --proportional 3
--gain 0.036 --limits 0.1,10 --eval-every 250 --train-prompts 1792 --train-completions 4
--eval-completions 8. The default rate and gains are those of the run before it, of 300 updates.

Tables grow while it runs: training.csv.gz (every update), evaluation.csv. Settings: result.json.
At the end `condense` writes what is published: runs.csv (a row a run), training.csv (bins of it).
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BETA = 0.5  # where it starts
ARMS = "fitted:kl_rb,fitted:kl_mc,mc:kl_rb,rb:kl_rb"  # method of the update : what is measured
LOGGED = ("kl_rb", "kl_mc", "reward", "grad_norm")
SAVE_EVERY = 10  # updates
RUN = ["method", "measured", "target", "seed"]  # what tells a run from the others
LATE = 100  # updates at the end of a run, of whose batches runs.csv holds the means
BINS = 40  # of a run, in training.csv


def arguments(argv=None) -> argparse.Namespace:
    "What a run is told."
    p = argparse.ArgumentParser()
    p.add_argument("--prepared", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--device", default="cuda")
    p.add_argument("--seconds", type=float, default=math.inf, help="then the final evaluation")
    p.add_argument("--workers", type=int, default=0, help="processes of the reward")
    p.add_argument("--arms", default=ARMS, help="method:measured, comma-separated")
    p.add_argument("--targets", default="1,2,4")
    p.add_argument("--seeds", type=int, default=8)
    p.add_argument("--updates", type=int, default=400)
    p.add_argument("--prompts", type=int, default=8, help="of an update; 4 completions each")
    p.add_argument("--schedule", default="linear")
    p.add_argument("--rate", type=float, default=1.5e-4)
    p.add_argument("--gain", type=float, default=0.02)
    p.add_argument("--proportional", type=float, default=1.0)
    p.add_argument("--memory", type=float, default=0.8)
    p.add_argument("--limits", default="1e-4,1e4", help="beta stays between them")
    p.add_argument("--eval-every", type=int, default=50)
    p.add_argument("--eval-prompts", type=int, default=256, help="that are not trained on")
    p.add_argument("--eval-completions", type=int, default=4)
    p.add_argument("--train-prompts", type=int, default=512, help="evaluated at the end")
    p.add_argument("--train-completions", type=int, default=1)
    return p.parse_args(argv)


def kl_errors(found, completions: int) -> dict:  # of the mean of `kl_rb`, (A,) each
    "Standard errors: over prompts, and given the prompts (of their completions alone)."
    import torch

    values = {}  # parts of the arms, in order
    for arms, _, scores, _ in found:
        kl = (scores.step_kl * scores.mask).sum(-1).double().unflatten(-1, (-1, completions))
        values.setdefault(arms.start, []).append(kl)
    kl = torch.cat([torch.cat(o, 1) for o in values.values()])  # (A, prompts, completions)
    prompts = kl.shape[1]
    errors = dict(kl_stderr=(kl.mean(-1).var(-1) / prompts).sqrt())
    if completions > 1:
        errors["kl_stderr_within"] = (kl.var(-1).mean(-1) / (prompts * completions)).sqrt()
    return errors


def describe(rows) -> dict:  # `rows`: every update of one run
    "A run by the batches that it trained on; times and the peak by the running mean of ten."
    import numpy as np

    late, target = rows.iloc[-LATE:], rows.target.iloc[0]
    means = rows.kl_rb.rolling(10, min_periods=1).mean()
    outside = rows["update"][(means / target - 1).abs() > 0.1]
    return dict(
        kl=late.kl_rb.mean(),
        reward=late.reward.mean(),
        beta=late.beta.mean(),
        beta_change=np.log(late.beta).diff().std(),  # from one update to the next
        rb_sd=late.kl_rb.std(),
        mc_sd=late.kl_mc.std(),
        settled=outside.max(),  # the last update at which the KL was not within 10 %
        peak=means.max(),
    )


def condense(folder: Path) -> None:
    "The two tables that are published: runs.csv, and training.csv, means of `BINS` bins a run."
    import pandas as pd

    training = pd.read_csv(folder / "training.csv.gz")
    judged = pd.read_csv(folder / "evaluation.csv")
    runs = pd.DataFrame(
        [dict(zip(RUN, run)) | describe(rows) for run, rows in training.groupby(RUN, sort=False)]
    )
    judged = judged[judged["update"] == training["update"].max()].set_index(RUN)
    columns = [o for o in ("kl_rb", "kl_stderr", "kl_stderr_within", "reward") if o in judged]
    for prompts, rows in judged.groupby("prompts"):
        runs = runs.join(rows[columns].add_suffix(f"_{prompts}"), on=RUN)
    runs.to_csv(folder / "runs.csv", index=False, float_format="%.5g")
    width = max(1, training["update"].max() // BINS)
    last = ((training["update"] - 1) // width + 1) * width  # of the bin
    means = training.assign(update=last).groupby([*RUN, "update"], sort=False).mean().reset_index()
    means.to_csv(folder / "training.csv", index=False, float_format="%.4g")


def make_runs(rows, args):
    "The inputs, and the runs that start from the reference."
    from klrb.rlhf.many import Arm, ManyRuns, Settings, UpdateLoss, join_stacks
    from klrb.rlhf.plateau import load_inputs

    class Runs(ManyRuns):
        "Whose evaluation says how exact its KL is."

        def _averages(self, found, completions):
            return super()._averages(found, completions) | kl_errors(found, completions)

    model = ROOT / "klrb" / "assets" / "pocket"
    inputs = load_inputs(args.prepared, model, args.workers, args.eval_prompts, args.device)
    arms = [Arm(o["method"], BETA, o["seed"], args.rate, args.schedule) for o in rows]
    loss = UpdateLoss(arms, inputs.reference.device)
    policies = join_stacks([inputs.reference] * len(arms))
    settings = Settings(updates=args.updates, prompts_per_update=args.prompts)
    runs = Runs(arms, policies, inputs.reference, inputs.train, settings, loss, inputs.reward)
    return inputs, runs


def main(argv=None):
    import pandas as pd
    import torch

    from klrb.budget import KLBudget
    from klrb.rlhf.many import PromptTable

    args = arguments(argv)
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [
        dict(method=method, measured=measured, target=float(target), seed=seed)
        for target in args.targets.split(",")
        for method, measured in (o.split(":") for o in args.arms.split(","))
        for seed in range(args.seeds)
    ]
    control = dict(gain=args.gain, proportional=args.proportional, memory=args.memory)
    control["limits"] = tuple(map(float, args.limits.split(",")))
    budgets = [KLBudget(o["target"], BETA, **control) for o in rows]
    inputs, runs = make_runs(rows, args)
    loss, all_prompts, number = runs.loss, inputs.train, args.train_prompts
    trained = PromptTable(*(o[:number] for o in vars(all_prompts).values()))
    tables = dict(
        evaluation=(inputs.evaluation, args.eval_completions),
        train=(trained, args.train_completions),
    )
    evaluations, training = [], []
    header = pd.DataFrame(columns=[*rows[0], "update", "beta", *LOGGED])
    header.to_csv(args.out / "training.csv.gz", index=False)

    def passed():
        return time.monotonic() - began

    def write_result():
        used = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
        used["seconds"] = args.seconds if math.isfinite(args.seconds) else None
        cuda = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
        made = dict(updates_made=runs.updates, took=passed(), card=cuda, torch=torch.__version__)
        sizes = {k: [len(table.texts), n] for k, (table, n) in tables.items()}  # prompts, each
        answer = used | dict(made, beta=BETA, settings=asdict(runs.settings), evaluated=sizes)
        (args.out / "result.json").write_text(json.dumps(answer, indent=1) + "\n")

    def evaluate(name):
        table, completions = tables[name]
        found = runs.evaluate(table, completions, rows_at_once=128)()
        values = {k: o.tolist() for k, o in found.items()}
        beta = loss.beta.tolist()
        frame = pd.DataFrame(rows).assign(prompts=name, update=runs.updates, beta=beta, **values)
        evaluations.append(frame)
        pd.concat(evaluations).to_csv(args.out / "evaluation.csv", index=False, float_format="%.6g")
        off = frame.assign(off=100 * (frame.kl_rb / frame.target - 1))
        shown = off.groupby(["target", "method", "measured"]).off.agg(["mean", "std", "min", "max"])
        print(
            f"{name}, {runs.updates} updates, {passed():.0f} s, % off\n", shown.round(2), flush=True
        )
        write_result()

    def save():
        if training:
            kept = pd.concat(training)[list(header)]
            kept.to_csv(
                args.out / "training.csv.gz",
                index=False,
                header=False,
                mode="a",
                float_format="%.7g",
            )
            training.clear()
            print(f"{runs.updates} updates, {passed():.0f} s", flush=True)

    def step():
        beta = loss.beta.tolist()
        means = runs.update()
        logged = {k: means[k].tolist() for k in LOGGED}
        training.append(pd.DataFrame(rows).assign(update=runs.updates, beta=beta, **logged))
        moved = [b.update(logged[o["measured"]][i]) for i, (b, o) in enumerate(zip(budgets, rows))]
        loss.beta = torch.tensor(moved, dtype=loss.beta.dtype, device=loss.beta.device)

    write_result()
    while runs.updates < args.updates and passed() < args.seconds:
        step()
        if runs.updates % SAVE_EVERY == 0:
            save()
        if runs.updates % args.eval_every == 0 and runs.updates < args.updates:
            evaluate("evaluation")
    save()
    evaluate("train")
    evaluate("evaluation")
    if runs.updates:
        condense(args.out)
    inputs.reward.close()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
