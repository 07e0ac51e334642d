"""Speed and memory of the step KL on a CUDA card: one process, CUDA events, no network.

    python tests/gpu_speed.py --out FOLDER [--budget SECONDS] [--parts copy,hidden,logits,...]

Writes `gpu.csv` and `environment.json` after every measurement. Needs torch only; TRL's kernel and
transformers are measured where they can be imported. `--klrb FOLDER` measures another version of
klrb, the one in that folder, and `--methods a,b` leaves all others out.
"""

import argparse
import csv
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = sys.argv[sys.argv.index("--klrb") + 1] if "--klrb" in sys.argv else Path(__file__).parents[1]
sys.path.insert(0, str(HERE))
from klrb import fused, steps  # noqa: E402
from klrb.fused import linear_step_kl  # noqa: E402
from klrb.steps import step_kl  # noqa: E402

SHAPES = [(768, 576, 49152), (4096, 2048, 151936), (8192, 4096, 128256)]  # tokens, H, V
FIELDS = [
    "card",
    "part",
    "what",
    "dtype",
    "tokens",
    "hidden",
    "vocab",
    "direction",
    "median_ms",
    "iqr_ms",
    "repeats",
    "extra_mb",
    "rate",
    "unit",
    "error",
    "note",
]
FORWARD, BOTH = DIRECTIONS = ["forward", "forward + backward"]
DEVICE, GEN = "cuda", None  # set by `main`


class Table:
    "Rows that are on disk as soon as they are there."

    def __init__(self, out: Path, budget: float):
        self.path, self.began, self.budget = out / "gpu.csv", time.monotonic(), budget
        self.card = torch.cuda.get_device_name() if DEVICE == "cuda" else "none (a dry run)"
        with open(self.path, "w", newline="") as file:
            csv.DictWriter(file, FIELDS).writeheader()

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.began)

    def add(self, **row):
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, FIELDS).writerow(dict(card=self.card, **row))
        shown = [f"{o:.4g}" if isinstance(o, float) else str(o) for o in row.values()]
        print(f"{time.monotonic() - self.began:6.1f}", *shown, flush=True)


def milliseconds(call):
    if DEVICE == "cpu":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_memory(call, inputs):
    "Peak of the allocator in a call, beyond what was there and the gradients left, in MB."
    if DEVICE == "cpu":
        call()
        return math.nan
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    left = sum(o.grad.nbytes for o in inputs if o.grad is not None)
    return (torch.cuda.max_memory_allocated() - before - left) / 1e6


def measure(call, inputs=(), repeats=20, seconds=0.3):
    "Median and interquartile range in ms, and peak memory beyond inputs and gradients in MB."

    def clear():
        for o in inputs:
            o.grad = None

    call()  # compiles
    clear()
    extra = peak_memory(call, inputs)
    clear()
    times, began = [], time.monotonic()
    while len(times) < 3 or len(times) < repeats and time.monotonic() - began < seconds:
        clear()
        times.append(milliseconds(call))
    clear()
    q = statistics.quantiles(times, n=4)
    return dict(median_ms=q[1], iqr_ms=q[2] - q[0], repeats=len(times), extra_mb=extra)


def attempt(table, call, inputs=(), work=None, seconds=0.3, **labels):
    "Measure `call` and write a row, also when there is too little memory or time, or a fault."
    if table.left() < 0:
        return
    try:
        result = measure(call, inputs, seconds=seconds)
        if work:
            result["rate"] = work / result["median_ms"] * 1e3
    except torch.OutOfMemoryError:
        result = dict(note="out of memory")
    except Exception as fault:  # noqa: BLE001  (one method's fault must not cost the others' rows)
        result = dict(note=short(fault))
    for o in inputs:
        o.grad = None
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    table.add(**labels | result)


def short(fault):
    return f"{type(fault).__name__}: {str(fault)[:300]}".replace("\n", " ")


# ---- methods ----


def paper(policy_logits, ref_logits):
    logp, logq = policy_logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)


def paper_float32(policy_logits, ref_logits):
    return paper(policy_logits.float(), ref_logits.float())


def kl_div(policy_logits, ref_logits):
    logp, logq = policy_logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return F.kl_div(logq, logp, reduction="none", log_target=True).sum(-1)


def trl_divergence():
    "TRL's kernel, or None."
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except Exception as fault:  # noqa: BLE001  (not installed, or too new a transformers)
        print("TRL's kernel is not here:", short(fault), flush=True)
        return None
    apply = ChunkedDivergenceFunction.apply
    return lambda h, w, g, u, ids: apply(h, w, None, g, u, None, 1.0)[0]


def head_then(divergence, h, w, g, u, ids):
    return divergence(h @ w.T, g @ u.T)


def ours(h, w, g, u, ids):
    return linear_step_kl(h[None], w, g[None], u, ids[None]).step_kl


def both(function, inputs, backward):
    with torch.set_grad_enabled(backward):
        value = function(*inputs)
    if backward:
        value.float().sum().backward()


# ---- inputs ----


def randn(*shape):
    return torch.randn(*shape, device=DEVICE, generator=GEN)


def near(x, scale=0.1):
    return x + scale * x.std() * torch.randn(x.shape, device=x.device, generator=GEN)


def hidden_inputs(tokens, hidden, vocab, dtype, scale=0.1):
    h, w = randn(tokens, hidden), 2 * hidden**-0.5 * randn(vocab, hidden)
    ids = torch.randint(vocab, (tokens,), device=DEVICE, generator=GEN)
    made = [o.to(dtype) for o in (h, w, near(h, scale), near(w, scale))]
    return [o.requires_grad_() if i < 2 else o for i, o in enumerate([*made, ids])]


def logit_inputs(tokens, vocab, dtype):
    x = 2 * randn(tokens, vocab)
    y = x.to(dtype).clone()
    for rows in y.split(1024):
        rows += 0.2 * randn(*rows.shape).to(dtype)
    return [x.to(dtype).requires_grad_(), y]


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def cases(options, most_float32):
    for dtype in (getattr(torch, o) for o in options.dtypes.split(",")):
        for shape in SHAPES[: most_float32 if dtype == torch.float32 else 3]:
            yield shape, dtype


def chosen(options, **methods):
    "The methods that are wanted and there."
    wanted = options.methods.split(",") if options.methods else methods
    return {k: o for k, o in methods.items() if k in wanted and o is not None}


# ---- parts ----


def copy_part(table, options):
    x = torch.zeros(2**31 if DEVICE == "cuda" else 2**20, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    attempt(
        table,
        lambda: y.copy_(x),
        work=2 * x.nbytes / 1e12,
        unit="TB/s",
        part="copy",
        what="copy of 2 GiB",
    )
    for dtype in (torch.bfloat16, torch.float32):
        n = 8192 if DEVICE == "cuda" else 64
        a = randn(n, n).to(dtype)
        attempt(
            table,
            lambda: a @ a,
            work=2 * n**3 / 1e12,
            unit="TFLOP/s",
            part="copy",
            what="product of 8192",
            dtype=name_of(dtype),
        )


def errors_part(table, options):
    "Error of values and gradients against float64, from the same bfloat16 inputs."
    methods = dict(
        paper=partial(head_then, paper),
        paper_float32=partial(head_then, paper_float32),
        linear_step_kl=ours,
    )
    for scale in (0.1, 0.001):
        shape = (256, 1024, 16384) if DEVICE == "cuda" else (8, 16, 300)
        inputs = hidden_inputs(*shape, torch.bfloat16, scale)
        exact = [o.detach().double() for o in inputs[:4]] + inputs[4:]
        exact = [o.requires_grad_() if i < 2 else o for i, o in enumerate(exact)]
        weights, truth = randn(len(inputs[0])), head_then(paper, *exact)
        true_grads = torch.autograd.grad((weights * truth).sum(), exact[:2])
        targets = dict(zip(("value", "d hidden", "d weight"), (truth.detach(), *true_grads)))
        rounded = {k: o.float() if k == "value" else o.bfloat16() for k, o in targets.items()}
        found = {"the truth, rounded": rounded}
        for what, f in methods.items():
            value = f(*inputs)
            grads = torch.autograd.grad((weights * value).sum(), inputs[:2])
            found[what] = dict(zip(targets, (value.detach(), *grads)))
        for what, values in found.items():
            for name, want in targets.items():
                error = ((values[name].double() - want).norm() / want.norm()).item()
                table.add(
                    part="errors",
                    what=what,
                    direction=name,
                    dtype="bfloat16",
                    error=error,
                    note=f"KL {truth.mean():.2e}",
                )


def logits_part(table, options):
    compiled = torch.compile(paper)
    for (tokens, _, vocab), dtype in cases(options, 2):
        inputs = logit_inputs(tokens, vocab, dtype)
        methods = chosen(options, step_kl=step_kl, paper=paper, kl_div=kl_div, compiled=compiled)
        for direction in DIRECTIONS:
            moved = inputs[0].nbytes * (5 if direction == BOTH else 2)
            for what, f in methods.items():
                attempt(
                    table,
                    lambda: both(f, inputs, direction == BOTH),
                    inputs[:1],
                    work=moved / 1e12,
                    unit="TB/s",
                    part="logits",
                    what=what,
                    dtype=name_of(dtype),
                    tokens=tokens,
                    vocab=vocab,
                    direction=direction,
                )
        inputs = None  # its memory is needed
        torch._dynamo.reset()


def floor_rows(table, inputs, labels):
    "The products that cannot be avoided, with outputs in the inputs' dtype as a head makes them."
    h, w, g, u, _ = [o.detach() for o in inputs]
    flops = 2 * len(h) * h.shape[1] * len(w) / 1e12
    grad = h @ w.T

    def forward():
        return h @ w.T, g @ u.T

    def back():
        return grad @ w, grad.T @ h

    calls = {2: forward, 4: lambda: (forward(), back()), 6: lambda: (forward(), forward(), back())}
    for products, call in calls.items():
        attempt(
            table,
            call,
            work=products * flops,
            unit="TFLOP/s",
            what=f"floor, {products} products",
            direction=FORWARD if products == 2 else BOTH,
            **labels,
        )


def hidden_part(table, options):
    trl = trl_divergence()
    for (tokens, hidden, vocab), dtype in cases(options, 1):
        inputs = hidden_inputs(tokens, hidden, vocab, dtype)
        labels = dict(
            part="hidden", dtype=name_of(dtype), tokens=tokens, hidden=hidden, vocab=vocab
        )
        floor_rows(table, inputs, labels)
        methods = chosen(
            options,
            linear_step_kl=ours,
            paper=partial(head_then, paper),
            paper_float32=partial(head_then, paper_float32),
            compiled=partial(head_then, torch.compile(paper)),
            trl=trl,
        )
        for direction in DIRECTIONS:
            for what, f in methods.items():
                if dtype == torch.float32 and what == "paper_float32":
                    continue
                attempt(
                    table,
                    lambda: both(f, inputs, direction == BOTH),
                    inputs[:2],
                    what=what,
                    direction=direction,
                    **labels,
                )
        inputs = None  # its memory is needed
        torch._dynamo.reset()


def tiles_part(table, options):
    "Sizes of a tile: time against memory, where the gradients' products are of two widths."
    names = "CUDA_TILE_ROWS", "CUDA_TILE_SIZE", "CUDA_GRAD_COLUMNS"
    before = [getattr(fused, o) for o in names]
    for shape in SHAPES[1:]:
        tokens, hidden, vocab = shape
        inputs = hidden_inputs(*shape, torch.bfloat16)
        labels = dict(part="tiles", dtype="bfloat16", tokens=tokens, hidden=hidden, vocab=vocab)
        for rows, power, wide in TILES:
            for name, value in zip(names, (rows, 2**power, wide)):
                setattr(fused, name, value)
            for direction in DIRECTIONS:
                attempt(
                    table,
                    lambda: both(ours, inputs, direction == BOTH),
                    inputs[:2],
                    what=f"linear_step_kl, tile {rows} rows, 2^{power}, gradients {wide}",
                    direction=direction,
                    seconds=0.2,
                    **labels,
                )
        inputs = None  # its memory is needed
    for name, value in zip(names, before):
        setattr(fused, name, value)


TILES = [(8192, 23, 4096), (8192, 24, 4096), (4096, 24, 4096), (8192, 23, 2048), (4096, 23, 4096)]


def launch_part(table, options):
    "Columns of a program and its warps, for the kernels from logits."
    gpu = steps.gpu_kernels(torch.empty(1, 1, device=DEVICE))
    if gpu is None:
        table.add(part="launch", note="klrb.gpu does not work here")
        return
    tokens, _, vocab = SHAPES[2]
    a, b = (o.detach() for o in logit_inputs(tokens, vocab, torch.bfloat16))
    grad = torch.empty_like(a)
    labels = dict(part="launch", dtype="bfloat16", tokens=tokens, vocab=vocab, unit="TB/s")
    before = gpu.SUMS_BLOCK, gpu.GRADS_BLOCK, dict(gpu.WARPS_FROM)

    def sums():
        made = gpu.RowSums(tokens, [vocab], False, a.device)
        made.add(a, b, None, 0)
        return made.finish()[0]

    stats = sums()
    weights = gpu.row_weights(stats, [stats[0].float(), None, None, None], everything=False)
    for block, warps in ((1024, 2), (2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16)):
        gpu.SUMS_BLOCK = gpu.GRADS_BLOCK = block
        gpu.WARPS_FROM[block] = warps
        what = f"{block} columns, {warps} warps"
        attempt(table, sums, work=2 * a.nbytes / 1e12, what=f"sums, {what}", **labels)
        attempt(
            table,
            lambda: gpu.write_grads(a, b, None, weights, 0, 0, (grad, None)),
            work=3 * a.nbytes / 1e12,
            what=f"gradient, {what}",
            **labels,
        )
        gpu.SUMS_BLOCK, gpu.GRADS_BLOCK = before[:2]
        gpu.WARPS_FROM.clear()
        gpu.WARPS_FROM.update(before[2])


def growth_part(table, options):
    "A decade of tokens, and nearly one of the vocabulary."
    base = (8192, 1024, 16384) if DEVICE == "cuda" else (8, 4, 50)
    for rows, columns in ((1, 1), (3, 1), (10, 1), (1, 3), (1, 10)):
        tokens, hidden, vocab = base[0] * rows, base[1], base[2] * columns
        inputs = hidden_inputs(tokens, hidden, vocab, torch.bfloat16)
        attempt(
            table,
            lambda: both(ours, inputs, True),
            inputs[:2],
            part="growth",
            what="linear_step_kl",
            dtype="bfloat16",
            tokens=tokens,
            hidden=hidden,
            vocab=vocab,
            direction=BOTH,
            seconds=0.4,
        )
        inputs = None  # its memory is needed


def profile_part(table, options):
    from torch.profiler import ProfilerActivity, profile

    text = []
    calls = {
        "linear_step_kl, small": (ours, hidden_inputs(*SHAPES[0], torch.bfloat16)),
        "linear_step_kl": (ours, hidden_inputs(*SHAPES[1], torch.bfloat16)),
        "step_kl": (step_kl, logit_inputs(SHAPES[1][0], SHAPES[1][2], torch.bfloat16)),
    }
    kinds = [getattr(ProfilerActivity, o) for o in {"CPU", DEVICE.upper()}]
    for what, (f, inputs) in calls.items():
        for _ in range(3):
            both(f, inputs, True)
            for o in inputs:
                o.grad = None
        with profile(activities=kinds) as events:
            both(f, inputs, True)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        rows = events.key_averages().table(
            sort_by=f"self_{DEVICE}_time_total", row_limit=15, max_name_column_width=70
        )
        shape = [tuple(o.shape) for o in inputs[:2]]
        text.append(f"== {what}, forward + backward, {shape}, bfloat16\n{rows}")
    (options.out / "profile.txt").write_text("\n".join(text))
    print("\n".join(o[:2500] for o in text), flush=True)


def model_part(table, options):
    "One step of RLOO and one of distillation with a random Llama: backbone, head, loss, gradients."
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens, batch, hidden, vocab, layers = 512, 8, 1024, 128256, 8
    if DEVICE == "cpu":
        tokens, batch, hidden, vocab, layers = 5, 2, 32, 50, 1
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    policy, reference = (LlamaForCausalLM(config).to(DEVICE, torch.bfloat16) for _ in range(2))
    ids = torch.randint(vocab, (batch, tokens), device=DEVICE, generator=GEN)
    advantages = randn(batch, 1)

    def step(loss_of):
        with torch.no_grad():
            g = reference.model(ids).last_hidden_state
        loss_of(policy.model(ids).last_hidden_state, g).backward()

    def from_logits(h, g, rloo):
        p, q = policy.lm_head(h).float(), reference.lm_head(g).detach().float()
        kl = paper(p, q)
        if not rloo:
            return kl.mean()
        return (kl - advantages * p.log_softmax(-1).gather(-1, ids[..., None])[..., 0]).mean()

    def from_hidden(h, g, rloo):
        ref_weight = reference.lm_head.weight.detach()
        out = linear_step_kl(h, policy.lm_head.weight, g, ref_weight, ids)
        return (out.step_kl - advantages * out.policy_logprobs if rloo else out.step_kl).mean()

    methods = {"paper's formula, float32 logits": from_logits, "linear_step_kl": from_hidden}
    for rloo in (True, False):
        for what, f in methods.items():
            attempt(
                table,
                lambda: step(partial(f, rloo=rloo)),
                list(policy.parameters()),
                part="model",
                what=what,
                dtype="bfloat16",
                tokens=batch * tokens,
                hidden=hidden,
                vocab=vocab,
                direction="RLOO step" if rloo else "distillation step",
                seconds=1.5,
            )


PARTS = dict(
    copy=copy_part,
    hidden=hidden_part,
    logits=logits_part,
    errors=errors_part,
    launch=launch_part,
    tiles=tiles_part,
    growth=growth_part,
    model=model_part,
    profile=profile_part,
)


def environment(card):
    "What the numbers depend on, beside the code."
    known = dict(
        card=card,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        python=platform.python_version(),
    )
    if DEVICE == "cpu":
        return known
    card = torch.cuda.get_device_properties(0)
    return known | dict(
        memory_gb=card.total_memory / 1e9,
        multiprocessors=card.multi_processor_count,
        capability=torch.cuda.get_device_capability(),
        driver=driver(),
    )


def driver():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, text=True, capture_output=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def main():
    global DEVICE, GEN
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("outputs/smoke/gpu"))
    parser.add_argument("--budget", type=float, default=300, help="seconds")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--dtypes", default="bfloat16,float32", help="the types to measure")
    parser.add_argument("--device", default="cuda", help="cpu: a dry run at toy sizes")
    parser.add_argument("--klrb", help="folder with another version of klrb, to measure that one")
    parser.add_argument(
        "--methods", help="measure these only: linear_step_kl,step_kl,paper,trl,..."
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    DEVICE = options.device
    if DEVICE == "cpu":
        SHAPES[:] = [(6, 4, 40), (8, 4, 50), (8, 4, 60)]
    elif not torch.cuda.is_available():
        sys.exit("gpu_speed: no CUDA device here")
    GEN = torch.Generator(DEVICE).manual_seed(0)
    table = Table(options.out, options.budget)
    (options.out / "environment.json").write_text(json.dumps(environment(table.card)))
    for name in options.parts.split(","):
        began = time.monotonic()
        try:
            if table.left() > 0:
                PARTS[name](table, options)
        except Exception as fault:  # noqa: BLE001  (the other parts still run)
            table.add(part=name, note=short(fault))
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        print(f"== {name}: {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
