"""On-policy distillation of SmolLM2 into half of its layers, many students at once on a GPU.

    python tests/gpu_smol_distill.py prepare --model MODEL --out PREPARED
    python tests/gpu_smol_distill.py train --model MODEL --prepared PREPARED --out FOLDER

`prepare` writes the texts and prompts (needs klrb with its data sets); `train` needs klrb, pandas
and transformers. The student is the teacher without every second layer. It first follows the
teacher on real reviews (forward KL, off-policy), since without that it writes no text at all; all
arms start there. Then rates are tried for every gradient on a seed of their own, and the arms that
are compared run: weights stacked along a leading axis, as in tests/gpu_smol.py. A stage whose time
is up ends early and is judged where it stands: the published runs that try rates made 118 of 150
updates, those that are compared 120.

The arms whose texts cannot end were trained from the same `start.pt` with --plan '{"ends": false,
"methods": ["mc_to_go", "k2_loss", "step_loss", "rb"], "rates": [3e-5, 1e-4, 3e-4, 1e-3],
"tune_updates": 100}'; they made 139 updates.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from gpu_smol import Llama, Prompts, places, prompt_orders, readable, sample, say, step_hidden
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from klrb.rlhf.many import Arm, Scores, Stack, StackedAdamW
from klrb.rlhf.many_distill import METHODS, DistillationLoss, gradient_table, surrogate

BEGAN = time.perf_counter()


@dataclass(frozen=True)
class Plan:
    "Numbers of the study; the defaults are those that the published run was to make."

    methods: tuple[str, ...] = METHODS
    ends: bool = True  # False: no text ends, for teacher and student the end has no probability
    rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4)  # tried for each; one: taken as it is
    tune_updates: int = 150  # of the runs that try them
    tune_seeds: tuple[int, ...] = (1000,)
    seeds: tuple[int, ...] = (0, 1, 2)
    updates: int = 150
    prompts: int = 8  # of an update
    num_generations: int = 4  # completions of each
    length: int = 24  # tokens of a completion
    evaluate_at: tuple[int, ...] = (0, 25, 50, 75, 100, 125, 150)
    eval_prompts: int = 128
    eval_completions: int = 2  # of each
    eval_chunk: int = 32  # rollouts of an arm at once
    trace_batches: int = 32  # independent batches behind a covariance
    trace_chunk: int = 8  # of them at once
    trace_at: tuple[int, ...] = (0, 75, 150)  # updates of the `rb` run of the first seed
    first_updates: int = 800  # off-policy, on reviews
    first_rate: float = 5e-4  # falls linearly, after a tenth of warm-up
    first_batch: int = 32  # reviews of an off-policy update
    text_tokens: int = 128  # of a review
    test_texts: int = 256  # reviews of the perplexity
    sample_prompts: int = 4  # whose completions are written down


def prepare(args: argparse.Namespace, plan: Plan) -> None:
    "Texts and prompts, as tables."
    from klrb.models import load_tokenizer
    from klrb.rlhf.reviews import load_reviews, make_prompts, split_reviews

    splits, tokenizer = split_reviews(load_reviews()), load_tokenizer(str(args.model))
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    for name, number in (("rloo", len(splits["rloo"]) * 9 // 10), ("evaluation", 256)):
        made = make_prompts(splits[name], tokenizer, number)
        made.to_parquet(args.out / f"{name}_prompts.parquet")
    for name in ("lm_train", "lm_test"):
        texts = pd.DataFrame(dict(text=[o[: 8 * plan.text_tokens] for o in splits[name]["text"]]))
        texts.to_parquet(args.out / f"{name}.parquet")


# ---- models ----


def half_of(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    "Layers 0, 2, 4, … under the numbers 0, 1, 2, …, and all that is in no layer."
    found = {name: o for name, o in weights.items() if ".layers." not in name}
    for new, old in enumerate(range(0, layers, 2)):
        start = f"model.layers.{old}."
        found |= {
            f"model.layers.{new}.{name.removeprefix(start)}": o
            for name, o in weights.items()
            if name.startswith(start)
        }
    return found


def copies(weights: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    return {name: o[:1].repeat(number, *[1] * (o.dim() - 1)) for name, o in weights.items()}


def as_stack(weights: dict[str, Tensor]) -> Stack:  # for the optimizer, which reads no shape
    return Stack(weights, None)


def leaves_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: o.detach().requires_grad_() for name, o in weights.items()}


def log_probs(
    model: Llama, weights: dict[str, Tensor], hidden: Tensor, without: int | None = None
) -> Tensor:
    "(A, B, T, V) in float32; the token `without` has no probability."
    logits = torch.bmm(hidden.flatten(1, 2), model.head(weights).transpose(1, 2)).float()
    if without is not None:
        far = torch.zeros_like(logits[0, 0]).index_fill_(
            0, torch.tensor(without, device=logits.device), 1e4
        )
        logits = logits - far  # finite, so that the KL has no 0 times infinity
    return logits.log_softmax(-1).unflatten(1, hidden.shape[1:3])


@torch.no_grad()
def teacher_log_probs(
    model: Llama, weights: dict[str, Tensor], rollouts, without: int | None = None
) -> Tensor:
    "Of one teacher, for all arms' rollouts, (A, B, T, V)."
    arms = rollouts[0].shape[:2]
    parts = zip(*(o.flatten(0, 1)[None].split(512, 1) for o in rollouts))
    hidden = torch.cat([step_hidden(model, weights, *part) for part in parts], 1)
    return log_probs(model, weights, hidden, without)[0].unflatten(0, arms)


def score(student, weights, teacher, teacher_weights, rollouts, without=None) -> Scores:
    "What a loss reads, (A, B, T) each."
    logp = log_probs(student, weights, step_hidden(student, weights, *rollouts), without)
    logq = teacher_log_probs(teacher, teacher_weights, rollouts, without)
    token = rollouts[2][..., None]
    kl = (logp.exp() * (logp - logq)).sum(-1)
    picked = (o.gather(-1, token)[..., 0] for o in (logp, logq))
    return Scores(*picked, rollouts[3].to(kl.dtype), kl)


# ---- off-policy, on reviews ----


class Texts:
    "Beginnings of reviews, padded on the right."

    def __init__(self, tokenizer, texts, tokens: int, device: str):
        rows = [tokenizer(o, add_special_tokens=False).input_ids[:tokens] for o in texts]
        rows = [o for o in rows if len(o) > 1]
        self.ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        self.mask = torch.zeros_like(self.ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            self.ids[i, : len(row)] = torch.tensor(row)
            self.mask[i, : len(row)] = True
        self.ids, self.mask = self.ids.to(device), self.mask.to(device)


def text_log_probs(model, weights, ids, mask) -> Tensor:  # (A, B, L - 1, V)
    hidden = model.hidden(weights, ids, places(mask), readable(mask, ids.shape[-1], 0))
    return log_probs(model, weights, hidden[:, :, :-1])


def first_stage(student, weights, teacher, teacher_weights, texts: Texts, plan: Plan):
    "Train one student in place, forward KL on reviews; the loss of every update."
    order = prompt_orders([0], len(texts.ids), plan.first_updates * plan.first_batch)[0]
    device = texts.ids.device
    order = torch.tensor(order, device=device).split(plan.first_batch)
    optimizer = StackedAdamW(as_stack(weights), torch.tensor([plan.first_rate], device=device))
    losses, warm = [], max(1, plan.first_updates // 10)
    for number, rows in enumerate(order):
        ids, mask = texts.ids[rows][None], texts.mask[rows][None]
        leaves = leaves_of(weights)
        logp = text_log_probs(student, leaves, ids, mask)
        with torch.no_grad():
            logq = text_log_probs(teacher, teacher_weights, ids, mask)
        kl = (logq.exp() * (logq - logp)).sum(-1)
        loss = kl.masked_fill(~mask[..., 1:], 0.0).sum() / mask[..., 1:].sum()
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
        left = 1 - number / plan.first_updates
        factor = torch.tensor([min(left, (number + 1) / warm)], device=device)
        optimizer.step(slice(0, 1), gradients, factor, number + 1)
        losses.append(loss.detach())
    return [o.item() for o in losses]


@torch.no_grad()
def perplexities(model, weights, texts: Texts, chunk: int = 16) -> list[float]:
    "Of every arm, over the tokens of all texts."
    arms = len(weights["model.norm.weight"])
    total, count = torch.zeros(arms, dtype=torch.float64), 0
    for ids, mask in zip(texts.ids.split(chunk), texts.mask.split(chunk)):
        given = (o.expand(arms, -1, -1) for o in (ids, mask))
        found = text_log_probs(model, weights, *given)
        picked = found.gather(-1, ids[None, :, 1:, None].expand(arms, -1, -1, 1))[..., 0]
        total += picked.masked_fill(~mask[None, :, 1:], 0.0).double().sum((1, 2)).cpu()
        count += mask[:, 1:].sum().item()
    return (-total / count).exp().tolist()


# ---- on-policy ----


@dataclass
class Study:
    "What all stages read."

    plan: Plan
    tokenizer: object
    student: Llama
    teacher: Llama
    teacher_weights: dict[str, Tensor]
    start: dict[str, Tensor]  # of one student, after the off-policy stage
    train: Prompts
    evaluation: Prompts
    test: Texts
    out: Path
    deadline: float  # of `time.perf_counter`
    device: str

    def drawn(self, generators, seed_of):
        "Arguments of `sample` after the prompts."
        eos = self.tokenizer.eos_token_id
        return self.plan.length, eos, generators, seed_of, self.plan.ends

    def scores(self, weights, rollouts) -> Scores:
        without = None if self.plan.ends else self.tokenizer.eos_token_id
        given = self.student, weights, self.teacher, self.teacher_weights, rollouts
        return score(*given, without)


def append(path: Path, frame: pd.DataFrame) -> None:
    frame.to_csv(path, mode="a", header=not path.exists(), index=False, float_format="%.6g")


class Runs:
    "The arms of one stage."

    def __init__(self, study: Study, arms: list[Arm], phase: str):
        plan, self.study, self.arms, self.phase = study.plan, study, arms, phase
        self.total = plan.updates if phase == "final" else plan.tune_updates
        seeds = sorted({o.seed for o in arms})
        self.seed_of = torch.tensor([seeds.index(o.seed) for o in arms], device=study.device)
        self.generators = [torch.Generator(study.device).manual_seed(1000 + o) for o in seeds]
        self.orders = prompt_orders(seeds, len(study.train.texts), self.total * plan.prompts)
        self.weights = copies(study.start, len(arms))
        rates = torch.tensor([o.learning_rate for o in arms], device=study.device)
        self.optimizer = StackedAdamW(as_stack(self.weights), rates)
        self.loss, self.updates = DistillationLoss(arms), 0
        self.tokens = torch.zeros(len(arms), dtype=torch.float64)
        self.norm = torch.full((len(arms),), float("nan"))

    def update(self) -> None:
        study, plan = self.study, self.study.plan
        taken = slice(self.updates * plan.prompts, (self.updates + 1) * plan.prompts)
        picked = torch.tensor(np.stack([o[taken] for o in self.orders]), device=study.device)
        index = picked.repeat_interleave(plan.num_generations, 1)[self.seed_of]
        ids, mask = study.train.ids[index], study.train.mask[index]
        drawn = study.drawn(self.generators, self.seed_of)
        rollouts = ids, mask, *sample(study.student, self.weights, ids, mask, *drawn)
        leaves = leaves_of(self.weights)
        scores = study.scores(leaves, rollouts)
        loss = self.loss(scores, None, slice(0, len(self.arms)), plan.num_generations)
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
        left = torch.full((len(self.arms),), 1 - self.updates / self.total, device=study.device)
        self.updates += 1
        whole = slice(0, len(self.arms))
        self.norm = self.optimizer.step(whole, gradients, left, self.updates)
        self.tokens += rollouts[3].sum((1, 2)).double().cpu()

    @torch.no_grad()
    def evaluate(self) -> None:
        "Held-out sequence KL of every arm; all arms read the same prompts and the same noise."
        study, plan, arms, pieces = self.study, self.study.plan, len(self.arms), []
        generators = [torch.Generator(study.device).manual_seed(7)]
        same = torch.zeros(arms, dtype=torch.long, device=study.device)
        prompts = torch.arange(len(study.evaluation.texts), device=study.device)
        for part in prompts.repeat_interleave(plan.eval_completions).split(plan.eval_chunk):
            ids, mask = (
                o[part].expand(arms, -1, -1) for o in (study.evaluation.ids, study.evaluation.mask)
            )
            drawn = study.drawn(generators, same)
            rollouts = ids, mask, *sample(study.student, self.weights, ids, mask, *drawn)
            pieces.append(judged(study.scores(self.weights, rollouts), part))
        found = pd.concat(pieces).groupby(["arm", "prompt"]).mean().groupby("arm")
        rows = dict(
            pair="smol",
            phase=self.phase,
            gradient=[o.method for o in self.arms],
            learning_rate=[o.learning_rate for o in self.arms],
            seed=[o.seed for o in self.arms],
            update=self.updates,
        )
        spread = found.kl_rb.sem().rename("kl_stderr")
        table = pd.DataFrame(rows).join(found.mean()).join(spread)
        table = table.assign(tokens=self.tokens.tolist(), grad_norm=self.norm.tolist())
        append(study.out / "evaluation.csv", table)
        shown = table.groupby(["gradient", "learning_rate"]).kl_rb.mean().round(2)
        say(self.phase, self.updates, dict(shown))


def judged(scores: Scores, prompts: Tensor) -> pd.DataFrame:  # a row per rollout
    logp, logq, mask, kl = scores
    arms, rows = mask.shape[:2]
    per_step = dict(kl_rb=kl, kl_mc=logp - logq, length=mask)
    sums = {k: (o * mask).sum(-1).flatten().double().cpu() for k, o in per_step.items()}
    return pd.DataFrame(
        dict(arm=np.repeat(np.arange(arms), rows), prompt=prompts.tolist() * arms, **sums)
    )


def run_stage(study: Study, arms: list[Arm], phase: str) -> tuple[Runs, dict[int, dict]]:
    "Train and judge; the weights of the first `rb` arm at the updates of `trace_at`."
    runs, plan, kept = Runs(study, arms, phase), study.plan, {}
    now = time.perf_counter()
    deadline = study.deadline if phase == "final" else now + (study.deadline - now) / 2
    first = [i for i, o in enumerate(arms) if o.method == "rb"][:1]
    judged_at = plan.evaluate_at if phase == "final" else ()
    while True:
        if phase == "final" and runs.updates in plan.trace_at:
            for i in first:
                kept[runs.updates] = {k: o[i : i + 1].clone() for k, o in runs.weights.items()}
        last = runs.updates == runs.total or time.perf_counter() > deadline
        if last or runs.updates in judged_at:
            runs.evaluate()
        if last:
            return runs, kept
        runs.update()


def best_rates(out: Path) -> dict[str, float]:
    "The rate with the smallest mean KL at the end of the runs that try them."
    table = pd.read_csv(out / "evaluation.csv").query("phase == 'tune'")
    table = table[table["update"] == table["update"].max()]
    means = table.groupby(["gradient", "learning_rate"]).kl_rb.mean().dropna()
    return {k: float(o.droplevel(0).idxmin()) for k, o in means.groupby(level=0)}


def gradient_rows(study: Study, weights: dict[str, Tensor], update: int) -> pd.DataFrame:
    "Deviations of every method's gradient on the same batches."
    plan, found, rollouts = study.plan, [], []
    size, number = plan.trace_chunk, plan.trace_batches
    order = prompt_orders([999], len(study.train.texts), number * plan.prompts)[0]
    picked = torch.tensor(order, device=study.device).view(number, plan.prompts)
    generators = [torch.Generator(study.device).manual_seed(9000 + o) for o in range(number)]
    for begin in range(0, number, size):
        index = picked[begin : begin + size].repeat_interleave(plan.num_generations, 1)
        ids, mask = study.train.ids[index], study.train.mask[index]
        each = generators[begin : begin + size], torch.arange(len(index), device=study.device)
        drawn = study.drawn(*each)
        policies = copies(weights, len(index))
        rollouts.append((ids, mask, *sample(study.student, policies, ids, mask, *drawn)))

    def gradients(method: str) -> Tensor:  # (batches, parameters)
        rows = []
        for part in rollouts:
            leaves = leaves_of(copies(weights, len(part[0])))
            loss = surrogate(method, study.scores(leaves, part), plan.num_generations)
            grads = torch.autograd.grad(loss, list(leaves.values()))
            rows.append(torch.cat([o.flatten(1) for o in grads], 1))
        return torch.cat(rows)

    exact = gradients("rb")
    for method in plan.methods:
        values = exact if method == "rb" else gradients(method)
        mean, other = values.mean(0), (values - exact).mean(0)
        row = dict(pair="smol", update=update, gradient=method, batch=range(number))
        row |= dict(mean=mean.square().sum().item(), bias=other.square().sum().item())
        row["deviation"] = [(o - mean).square().sum().item() for o in values]
        row["difference"] = [(o - e - other).square().sum().item() for o, e in zip(values, exact)]
        found.append(pd.DataFrame(row))
        del values
    return pd.concat(found)


def write_samples(study: Study, runs: Runs) -> None:
    "Completions of the first seed of every method, of the start and of the teacher."
    plan = study.plan
    rows = torch.arange(plan.sample_prompts, device=study.device)
    first = {o.method: i for i, o in reversed(list(enumerate(runs.arms)))}
    given = {name: {k: o[i : i + 1] for k, o in runs.weights.items()} for name, i in first.items()}
    models = {
        "start": (study.student, study.start),
        "teacher": (study.teacher, study.teacher_weights),
    }
    models |= {name: (study.student, o) for name, o in given.items()}
    frames = []
    for name, (model, weights) in models.items():
        ids, mask = study.evaluation.ids[rows][None], study.evaluation.mask[rows][None]
        generators = [torch.Generator(study.device).manual_seed(5)]
        drawn = study.drawn(generators, torch.zeros(1, dtype=torch.long, device=study.device))
        completions, kept = sample(model, weights, ids, mask, *drawn)
        texts = [
            study.tokenizer.decode(row[keep].tolist(), skip_special_tokens=True)
            for row, keep in zip(completions[0].cpu(), kept[0].cpu())
        ]
        prompts = [study.evaluation.texts[i] for i in range(len(rows))]
        frames.append(pd.DataFrame(dict(model=name, prompt=prompts, completion=texts)))
    pd.concat(frames).to_csv(study.out / "samples.csv", index=False)


def load(args: argparse.Namespace, plan: Plan) -> Study:
    "Teacher, student, texts; the off-policy stage is not made yet."
    gguf = args.model.suffix == ".gguf"
    folder, given = (
        (args.model.parent, dict(gguf_file=args.model.name)) if gguf else (args.model, {})
    )
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given)
    if loaded.config.model_type != "llama" or not loaded.config.tie_word_embeddings:
        raise SystemExit("the teacher must be a Llama with a tied head")
    teacher = {
        name: o.detach().to(args.device)[None]
        for name, o in loaded.state_dict().items()
        if name != "lm_head.weight"
    }
    layers = loaded.config.num_hidden_layers
    config = type(loaded.config)(
        **loaded.config.to_dict() | dict(num_hidden_layers=(layers + 1) // 2)
    )
    tokenizer = AutoTokenizer.from_pretrained(args.prepared)
    train, evaluation = (
        Prompts(
            tokenizer,
            pd.read_parquet(args.prepared / f"{o}_prompts.parquet").prompt[:most],
            args.device,
        )
        for o, most in (("rloo", None), ("evaluation", plan.eval_prompts))
    )
    texts = pd.read_parquet(args.prepared / "lm_test.parquet").text[: plan.test_texts]
    test = Texts(tokenizer, texts, plan.text_tokens, args.device)
    models = Llama(config), Llama(loaded.config), teacher
    start = {name: o.clone() for name, o in half_of(teacher, layers).items()}
    deadline = BEGAN + args.seconds
    given = plan, tokenizer, *models, start, train, evaluation, test, args.out, deadline
    return Study(*given, args.device)


def make_start(study: Study, args: argparse.Namespace) -> dict[str, float]:  # perplexities
    "Read the student that all arms start from, or make it by the off-policy stage."
    student, teacher = (study.student, study.start), (study.teacher, study.teacher_weights)
    found = dict(teacher=perplexities(*teacher, study.test)[0])
    found["half"] = perplexities(*student, study.test)[0]
    if args.start.is_file():
        kept = torch.load(args.start, map_location=args.device, weights_only=True)
        study.start.update(kept)
    else:
        reviews = pd.read_parquet(args.prepared / "lm_train.parquet").text
        texts = Texts(study.tokenizer, reviews, study.plan.text_tokens, args.device)
        losses = first_stage(*student, *teacher, texts, study.plan)
        table = pd.DataFrame(dict(update=range(len(losses)), loss=losses))
        table.to_csv(args.out / "first.csv", index=False, float_format="%.5g")
        torch.save(study.start, args.start)
    return found | dict(start=perplexities(*student, study.test)[0])


def tuning(plan: Plan) -> list[Arm]:
    "Runs that choose the rates."
    return [
        Arm(method, 1.0, seed, rate, "linear")
        for method in plan.methods
        for rate in plan.rates
        for seed in plan.tune_seeds
    ]


def train(args: argparse.Namespace, plan: Plan) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    args.out.mkdir(parents=True, exist_ok=True)
    args.start = args.start or args.out / "start.pt"
    for old in ("evaluation.csv", "gradients.csv", "rates.csv"):
        (args.out / old).unlink(missing_ok=True)
    study = load(args, plan)
    say("loaded")
    found = make_start(study, args)
    result = dict(plan=asdict(plan), perplexity=found, device=device_name(args.device))
    say("start", found)
    if len(plan.rates) > 1:
        run_stage(study, tuning(plan), "tune")
        rates = best_rates(args.out)
    else:
        rates = dict.fromkeys(plan.methods, plan.rates[0])
    pd.DataFrame(dict(pair="smol", gradient=rates.keys(), learning_rate=rates.values())).to_csv(
        args.out / "rates.csv", index=False
    )
    say(rates)
    arms = [Arm(o, 1.0, seed, rates[o], "linear") for o in plan.methods for seed in plan.seeds]
    runs, kept = run_stage(study, arms, "final")
    ends = pd.DataFrame(dict(gradient=[o.method for o in arms], seed=[o.seed for o in arms]))
    ends.assign(
        update=runs.updates, perplexity=perplexities(study.student, runs.weights, study.test)
    ).to_csv(args.out / "perplexity.csv", index=False, float_format="%.6g")
    write_samples(study, runs)
    result |= dict(updates=runs.updates, seconds=time.perf_counter() - BEGAN)
    (args.out / "result.json").write_text(json.dumps(result, indent=1))
    del runs
    for update, weights in kept.items():
        if time.perf_counter() > study.deadline:
            break
        append(args.out / "gradients.csv", gradient_rows(study, weights, update))
        say("gradients", update)
    if (args.out / "gradients.csv").exists():
        table = gradient_table(pd.read_csv(args.out / "gradients.csv"))
        table.to_csv(args.out / "noise.csv", index=False, float_format="%.6g")
    result |= dict(seconds=time.perf_counter() - BEGAN)
    (args.out / "result.json").write_text(json.dumps(result, indent=1))


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=["prepare", "train"])
    p.add_argument("--model", type=Path, required=True, help="the teacher, a folder or a GGUF file")
    p.add_argument("--prepared", type=Path, help="folder that `prepare` wrote")
    p.add_argument("--out", type=Path, required=True, help="folder of the tables")
    p.add_argument("--start", type=Path, help="the first student; made when it is not there")
    p.add_argument("--device", default="cuda")
    p.add_argument("--seconds", type=float, default=3600.0, help="no update begins after them")
    p.add_argument("--plan", default="{}", help="settings to replace, as JSON")
    return p


if __name__ == "__main__":
    options = parser().parse_args()
    settings = {
        k: tuple(o) if isinstance(o, list) else o for k, o in json.loads(options.plan).items()
    }
    dict(prepare=prepare, train=train)[options.what](options, replace(Plan(), **settings))
