"""RLOO on many copies of one Llama at once, on a GPU: how the training study of profile smol ran.

Needs `klrb`, transformers and a finished preparation (`experiments/prepare`, profile smol with
`device = "cuda"`); TRL is not needed. Arms, the runs, are all combinations of methods, betas and
seeds; their weights are stacked along a leading axis. Arms of one seed read the same prompts and
draw with the same noise. `python tests/gpu_smol.py --help` lists the settings.

One H200 trains 20 arms of SmolLM2-135M, 8 rollouts each, for 60 updates in about 45 s.
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from klrb.update import (
    CoefficientFit,
    UpdateCoefficients,
    update_baseline,
    update_coefficients,
    update_statistics,
    update_surrogate,
)

BEGAN = time.perf_counter()


def say(*words) -> None:
    print(f"[{time.perf_counter() - BEGAN:6.1f} s]", *words, flush=True)


# ---- the model ----


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # x (A, B, L, H), weight (A, H)
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return (x * scale.to(x.dtype)) * weight[:, None, None]


def linear(x: Tensor, weight: Tensor) -> Tensor:  # (A, B, L, I) and (A, O, I) to (A, B, L, O)
    out = torch.bmm(x.flatten(1, 2), weight.transpose(1, 2))
    return out.unflatten(1, x.shape[1:3])


def rotations(config: PreTrainedConfig, positions: Tensor, dtype: torch.dtype):
    "Cosines and sines of the rotary positions, (A, B, 1, L, D) each."
    dim = config.hidden_size // config.num_attention_heads
    powers = torch.arange(0, dim, 2, device=positions.device).float() / dim
    angles = positions[..., None].float() / config.rope_parameters["rope_theta"] ** powers
    angles = torch.cat([angles, angles], -1)[:, :, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x (A, B, heads, L, D)
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def readable(mask: Tensor, queries: int, at: int) -> Tensor:
    "Which of the keys of `mask` (A, B, S) the queries from `at` on read, (A, B, L, S)."
    query = torch.arange(at, at + queries, device=mask.device)[:, None]
    key = torch.arange(mask.shape[-1], device=mask.device)[None]
    return (key <= query) & mask[:, :, None] | (key == query)


@dataclass
class Llama:
    "Llama without biases and with a tied head, for weights that are stacked by arm."

    config: PreTrainedConfig

    def heads(self, x: Tensor, number: int) -> Tensor:  # (A, B, L, .) to (A, B, number, L, D)
        return x.unflatten(-1, (number, -1)).transpose(2, 3)

    def hidden(
        self,
        weights: dict[str, Tensor],  # by the names of `LlamaForCausalLM`, (A, ...) each
        ids: Tensor,  # (A, B, L)
        positions: Tensor,  # (A, B, L)
        allowed: Tensor,  # of `readable`, (A, B, L, S)
        cache: list[tuple[Tensor, Tensor]] | None = None,  # of `new_cache`, filled here
        at: int = 0,  # where in the cache
    ) -> Tensor:  # last hidden states, (A, B, L, H)
        config, pairs = self.config, ids.shape[:2]
        groups = config.num_attention_heads // config.num_key_value_heads
        arm = torch.arange(len(ids), device=ids.device)[:, None, None]
        x = weights["model.embed_tokens.weight"][arm, ids]
        turn = rotations(config, positions, x.dtype)
        for i in range(config.num_hidden_layers):
            layer = f"model.layers.{i}."
            y = rms_norm(x, weights[layer + "input_layernorm.weight"], config.rms_norm_eps)
            q, k, v = (
                self.heads(linear(y, weights[layer + f"self_attn.{name}_proj.weight"]), number)
                for name, number in (
                    ("q", config.num_attention_heads),
                    ("k", config.num_key_value_heads),
                    ("v", config.num_key_value_heads),
                )
            )
            q, k = rotate(q, *turn), rotate(k, *turn)
            if cache is not None:
                for kept, new in zip(cache[i], (k, v)):
                    kept[:, :, :, at : at + ids.shape[2]] = new
                k, v = cache[i]
            k, v = (o.repeat_interleave(groups, 2) for o in (k, v))
            given = (o.flatten(0, 1) for o in (q, k, v))
            mixed = F.scaled_dot_product_attention(*given, attn_mask=allowed.flatten(0, 1)[:, None])
            mixed = mixed.unflatten(0, pairs).transpose(2, 3).flatten(3)
            x = x + linear(mixed, weights[layer + "self_attn.o_proj.weight"])
            y = rms_norm(x, weights[layer + "post_attention_layernorm.weight"], config.rms_norm_eps)
            gate, up = (linear(y, weights[layer + f"mlp.{o}_proj.weight"]) for o in ("gate", "up"))
            x = x + linear(F.silu(gate) * up, weights[layer + "mlp.down_proj.weight"])
        return rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)

    def head(self, weights: dict[str, Tensor]) -> Tensor:  # (A, V, H)
        return weights["model.embed_tokens.weight"]

    def new_cache(self, weights: dict[str, Tensor], arms: int, rollouts: int, size: int):
        config = self.config
        dim = config.hidden_size // config.num_attention_heads
        shape = arms, rollouts, config.num_key_value_heads, size, dim
        like = weights["model.norm.weight"]
        return [
            (like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.num_hidden_layers)
        ]


# ---- rollouts and their scores ----


class Prompts:
    "Prompts padded on the left."

    def __init__(self, tokenizer, texts, device: str):
        rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        self.texts, width = list(texts), max(map(len, rows))
        self.ids = torch.zeros(len(rows), width, dtype=torch.long)
        self.mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            self.ids[i, width - len(row) :] = torch.tensor(row)
            self.mask[i, width - len(row) :] = True
        self.ids, self.mask = self.ids.to(device), self.mask.to(device)


def places(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def sample(
    model: Llama,
    weights: dict[str, Tensor],
    ids: Tensor,  # prompts, (A, B, P)
    mask: Tensor,  # (A, B, P)
    length: int,  # T
    eos: int,  # ends a completion
    generators: list[torch.Generator],  # one for each seed
    seed_of: Tensor,  # which of them an arm draws with, (A,)
    ends: bool = True,  # False: the end is never drawn
) -> tuple[Tensor, Tensor]:  # completions, 1 up to and including their end, (A, B, T) each
    arms, rollouts, width = ids.shape
    full = torch.cat([mask, mask.new_ones(arms, rollouts, length)], -1)
    cache, head = (
        model.new_cache(weights, arms, rollouts, width + length),
        model.head(weights).transpose(1, 2),
    )
    seen = readable(full, width, 0)
    hidden = model.hidden(weights, ids, places(mask), seen, cache, 0)[:, :, -1:]
    alive, tokens, kept = mask.new_ones(arms, rollouts), [], []
    for t in range(length):
        logits = torch.bmm(hidden[:, :, 0], head).float()
        if not ends:
            logits[..., eos] = -torch.inf
        noise = torch.stack(
            [torch.empty_like(logits[0]).exponential_(generator=o) for o in generators]
        )
        token = (logits - noise.log()[seed_of]).argmax(-1)  # Gumbel: minus the log of exponentials
        tokens.append(token.masked_fill(~alive, eos))
        kept.append(alive)
        alive = alive & (token != eos)
        if t + 1 < length:
            position = mask.sum(-1, keepdim=True) + t
            seen = readable(full, 1, width + t)
            given = tokens[-1][..., None], position, seen, cache, width + t
            hidden = model.hidden(weights, *given)
    return torch.stack(tokens, -1), torch.stack(kept, -1)


def step_hidden(model, weights, ids, mask, completions, kept) -> Tensor:  # (A, B, T, H)
    all_ids = torch.cat([ids, completions], -1)[..., :-1]
    all_mask = torch.cat([mask, kept], -1)[..., :-1]
    seen = readable(all_mask, all_ids.shape[-1], 0)
    return model.hidden(weights, all_ids, places(all_mask), seen)[:, :, ids.shape[-1] - 1 :]


def score(model, weights, reference, *rollouts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    "Log-probability under policy and reference of the sampled tokens, step KL, (A B, T) each."
    hidden = step_hidden(model, weights, *rollouts)
    logits = torch.bmm(hidden.flatten(1, 2), model.head(weights).transpose(1, 2)).float()
    with torch.no_grad():
        parts = zip(*(o.flatten(0, 1)[None].split(512, 1) for o in rollouts))
        ref_hidden = torch.cat([step_hidden(model, reference, *part) for part in parts], 1)
        ref_logits = (ref_hidden[0].flatten(0, 1) @ model.head(reference)[0].T).float()
    shape = -1, hidden.shape[2], logits.shape[-1]
    p, q = (o.view(shape).log_softmax(-1) for o in (logits, ref_logits))
    token = rollouts[2].flatten(0, 1)[..., None]
    return p.gather(-1, token)[..., 0], q.gather(-1, token)[..., 0], (p.exp() * (p - q)).sum(-1)


class Rewards:
    "A reward that reads no text twice."

    def __init__(self, reward):
        self.reward, self.known = reward, {}

    def __call__(self, texts: list[str]) -> np.ndarray:
        new = sorted({text for text in texts if text not in self.known}, key=len)
        for start in range(0, len(new), 1024):
            part = new[start : start + 1024]
            self.known.update(zip(part, map(float, self.reward.score(part))))
        return np.array([self.known[text] for text in texts])


# ---- runs ----


def prompt_orders(seeds: list[int], number: int, needed: int) -> list[np.ndarray]:
    orders = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        rounds = [rng.permutation(number) for _ in range(needed // number + 1)]
        orders.append(np.concatenate(rounds)[:needed])
    return orders


class Runs:
    "All arms: policies, optimizer, fits and tables."

    def __init__(self, args, arms, tokenizer, model, start, reference, prompts, evaluation):
        self.args, self.arms, self.tokenizer, self.model = args, arms, tokenizer, model
        self.reference, self.prompts, self.evaluation = reference, prompts, evaluation
        seeds = sorted({arm["seed"] for arm in arms})
        self.seed_of = torch.tensor([seeds.index(o["seed"]) for o in arms], device=args.device)
        self.generators = [torch.Generator(args.device).manual_seed(1000 + o) for o in seeds]
        self.orders = prompt_orders(seeds, len(prompts.texts), args.updates * args.prompts)
        self.weights = {
            name: o.unsqueeze(0).repeat(len(arms), *([1] * o.dim())).requires_grad_()
            for name, o in start.items()
        }
        self.optimizer = torch.optim.AdamW(
            list(self.weights.values()),
            lr=args.learning_rate,
            eps=1e-5,  # of the profile
            weight_decay=0.0,
            fused=args.device == "cuda",
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda o: 1 - o / args.updates if args.linear else 1.0
        )
        self.fits = [CoefficientFit() if o["method"] == "fitted" else None for o in arms]
        self.training, self.evaluations = [], []

    def texts(self, index: Tensor, prompts: Prompts, completions: Tensor, kept: Tensor):
        rows = zip(completions.flatten(0, 1).cpu().numpy(), kept.flatten(0, 1).cpu().numpy())
        done = self.tokenizer.batch_decode(
            [row[keep].tolist() for row, keep in rows], skip_special_tokens=True
        )
        return [prompts.texts[i] + o for i, o in zip(index.flatten().tolist(), done)]

    def coefficients(self) -> tuple[Tensor, Tensor]:  # past and noise, (A,) each
        pairs = [
            fit.coefficients(arm["beta"])
            if fit
            else update_coefficients(arm["method"], arm["beta"])
            for arm, fit in zip(self.arms, self.fits)
        ]
        return tuple(torch.tensor(o, device=self.args.device) for o in zip(*pairs))

    def loss(self, rewards, logp, logq, mask, kl, baseline, past, noise) -> Tensor:
        "Sum over arms of the loss of each."
        betas = torch.tensor([o["beta"] for o in self.arms], device=self.args.device)
        rollouts, total = len(rewards) // len(self.arms), 0.0
        for beta in sorted({o["beta"] for o in self.arms}):
            chosen = (betas == torch.tensor(beta, device=betas.device)).nonzero()[:, 0]
            within = torch.arange(rollouts, device=betas.device)
            rows = (chosen[:, None] * rollouts + within).flatten()
            each = (o[chosen].repeat_interleave(rollouts) for o in (past, noise))
            total = total + len(chosen) * update_surrogate(
                *(o[rows] for o in (rewards, logp, logq, mask, kl)),
                beta,
                UpdateCoefficients(*each),
                baseline=baseline.rows(rows),
            )
        return total

    def update(self, number: int, reward) -> None:
        args, arms = self.args, len(self.arms)
        taken = slice(number * args.prompts, (number + 1) * args.prompts)
        picked = torch.tensor(np.stack([o[taken] for o in self.orders]), device=args.device)
        index = picked.repeat_interleave(args.generations, 1)[self.seed_of]  # (A, B)
        ids, mask = self.prompts.ids[index], self.prompts.mask[index]
        drawn = args.length, self.tokenizer.eos_token_id, self.generators, self.seed_of
        completions, kept = sample(self.model, self.weights, ids, mask, *drawn)
        rollouts = ids, mask, completions, kept
        logp, logq, kl = score(self.model, self.weights, self.reference, *rollouts)
        texts = self.texts(index, self.prompts, completions, kept)
        rewards = torch.tensor(reward(texts), device=args.device, dtype=torch.float32)
        done = kept.flatten(0, 1)
        with torch.no_grad():
            group = torch.arange(len(rewards), device=args.device) // args.generations
            given = rewards, logp, logq, done, kl
            baseline = update_baseline(*given, group)
            statistics = update_statistics(*given, baseline).cpu().unflatten(0, (arms, -1))
        past, noise = self.coefficients()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(*given, baseline, past, noise).backward()
        norm = sum(o.grad.flatten(1).pow(2).sum(1) for o in self.weights.values()).sqrt()
        self.optimizer.step()
        self.schedule.step()
        for fit, found in zip(self.fits, statistics):
            if fit:
                fit.update(found)
        values = dict(reward=rewards, kl_rb=kl, kl_mc=logp - logq)
        means = {
            name: (o if o.dim() == 1 else o.masked_fill(~done, 0.0).sum(-1)).view(arms, -1).mean(1)
            for name, o in values.items()
        } | dict(grad_norm=norm, past=past, noise=noise)
        columns = {name: o.detach().cpu().tolist() for name, o in means.items()}
        self.training.append(pd.DataFrame(self.arms).assign(update=number, **columns))

    @torch.no_grad()
    def evaluate(self, number: int, reward, judge) -> pd.DataFrame:
        args, arms, pieces = self.args, len(self.arms), []
        generators = [torch.Generator(args.device).manual_seed(7)]
        one = torch.zeros(arms, dtype=torch.long, device=args.device)
        eos = self.tokenizer.eos_token_id
        index = torch.arange(len(self.evaluation.texts), device=args.device)
        for part in index.repeat_interleave(args.eval_completions).split(args.eval_chunk):
            ids, mask = (
                o[part].expand(arms, -1, -1) for o in (self.evaluation.ids, self.evaluation.mask)
            )
            drawn = args.length, eos, generators, one
            completions, kept = sample(self.model, self.weights, ids, mask, *drawn)
            rollouts = ids, mask, completions, kept
            logp, logq, kl = score(self.model, self.weights, self.reference, *rollouts)
            texts = self.texts(part.expand(arms, -1), self.evaluation, completions, kept)
            nats = dict(kl_rb=kl, kl_mc=logp - logq, ref_logprob=logq)
            off = ~kept.flatten(0, 1)
            sums = {name: o.masked_fill(off, 0.0).sum(-1).cpu() for name, o in nats.items()}
            pieces.append(
                pd.DataFrame(
                    dict(
                        arm=np.repeat(np.arange(arms), len(part)),
                        prompt=part.tolist() * arms,
                        reward=reward(texts),
                        judge=judge.score(texts) if judge else math.nan,
                        **sums,
                        length=kept.flatten(0, 1).sum(-1).cpu(),
                    )
                )
            )
        per_prompt = pd.concat(pieces).groupby(["arm", "prompt"]).mean().groupby("arm")
        spread = per_prompt.sem()[["reward", "kl_rb"]].add_suffix("_stderr")
        table = pd.DataFrame(self.arms).join(per_prompt.mean()).join(spread)
        table = table.assign(objective=table.reward - table.beta * table.kl_rb, update=number)
        self.evaluations.append(table)
        return table


def train(runs: Runs, args, reward, judge, out: Path) -> None:
    def save():
        for name in ("training", "evaluations"):
            if frames := getattr(runs, name):
                path = out / f"{args.name}_{name}.csv"
                pd.concat(frames).to_csv(path, index=False, float_format="%.6g")

    number = 0
    while number < args.updates and time.perf_counter() - BEGAN < args.seconds:
        if number % args.eval_every == 0:
            table = runs.evaluate(number, reward, judge)
            columns = ["objective", "reward", "kl_rb"]
            say(f"update {number}\n{table.groupby(['beta', 'method'])[columns].mean().round(3)}")
        runs.update(number, reward)
        number += 1
        if number % 20 == 0:
            save()
    runs.evaluate(number, reward, judge)
    save()
    say(f"{number} updates of {len(runs.arms)} runs")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--prepared", type=Path, required=True, help="folder of the preparation")
    p.add_argument("--out", type=Path, required=True, help="folder of the tables")
    p.add_argument("--name", required=True, help="how the tables' names begin")
    p.add_argument("--device", default="cuda")
    p.add_argument("--methods", default="mc,rb_sequence,rb,fitted")
    p.add_argument("--betas", default="0.1,0.3")
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--updates", type=int, default=60)
    p.add_argument("--linear", action="store_true", help="the rate falls to 0 at the last update")
    p.add_argument("--learning-rate", type=float, default=1e-4)
    p.add_argument("--prompts", type=int, default=2, help="of an update")
    p.add_argument("--generations", type=int, default=4, help="completions per prompt")
    p.add_argument("--length", type=int, default=16, help="tokens of a completion")
    p.add_argument("--eval-every", type=int, default=50)
    p.add_argument("--eval-completions", type=int, default=4)
    p.add_argument("--eval-chunk", type=int, default=32, help="rollouts of an arm at once")
    p.add_argument("--seconds", type=float, default=math.inf, help="no update begins after them")
    p.add_argument("--tf32", action="store_true", help="matrix products in TF32")
    return p


def main(args: argparse.Namespace, reward=None, judge=None) -> Runs:
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.prepared / "reference")
    loaded = AutoModelForCausalLM.from_pretrained(args.prepared / "reference", dtype=torch.float32)
    if loaded.config.model_type != "llama" or not loaded.config.tie_word_embeddings:
        raise SystemExit("the reference must be a Llama with a tied head")
    weights = {
        name: o.detach().to(args.device)
        for name, o in loaded.state_dict().items()
        if name != "lm_head.weight"
    }
    tables = [
        Prompts(
            tokenizer, pd.read_parquet(args.prepared / f"{o}_prompts.parquet").prompt, args.device
        )
        for o in ("rloo", "evaluation")
    ]
    if reward is None:
        from klrb.rlhf.reward import load_judge, load_reward

        reward = load_reward("minilm-imdb", args.prepared / "reward", args.device)
        reward.batch_size = 1024
        judge = load_judge("tfidf", args.prepared / "judge")
    arms = [
        dict(method=method, beta=float(beta), seed=seed)
        for beta in args.betas.split(",")
        for method in args.methods.split(",")
        for seed in range(args.seeds)
    ]
    reference = {name: o[None] for name, o in weights.items()}
    given = tokenizer, Llama(loaded.config), weights, reference, *tables
    runs = Runs(args, arms, *given)
    train(runs, args, Rewards(reward), judge, args.out)
    return runs


if __name__ == "__main__":
    main(parser().parse_args())
