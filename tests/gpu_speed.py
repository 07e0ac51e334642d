"""Speed and memory of the step KL on a CUDA card: one process, CUDA events, no network.

    python tests/gpu_speed.py --out FOLDER [--budget SECONDS] [--parts copy,logits,hidden,...]

Writes `gpu.csv` and `environment.json` after every measurement. Needs torch only; TRL's kernel and
transformers are measured where they can be imported.
"""

import argparse
import csv
import json
import math
import platform
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from klrb import fused  # noqa: E402
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
DIRECTIONS = ["forward", "forward + backward"]
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
    "Peak of the allocator during a call, beyond what was there before and the gradients left behind, in MB."
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


def measure(call, inputs=(), repeats=20, seconds=1.5):
    "Median and interquartile range in ms, and peak memory beyond inputs and gradients in MB."

    def clear():
        for o in inputs:
            o.grad = None

    call()  # compiles
    clear()
    extra = peak_memory(call, inputs)
    times, began = [], time.monotonic()
    while len(times) < 3 or len(times) < repeats and time.monotonic() - began < seconds:
        clear()
        times.append(milliseconds(call))
    clear()
    q = statistics.quantiles(times, n=4)
    return dict(median_ms=q[1], iqr_ms=q[2] - q[0], repeats=len(times), extra_mb=extra)


def attempt(
    table, call, inputs=(), repeats=20, seconds=1.5, rate=None, unit="", error="", **labels
):
    "Measure `call` and write a row, also when there is too little memory or time, or a fault."
    if table.left() < 0:
        return None
    try:
        result = measure(call, inputs, repeats, seconds)
        if rate:
            rate = rate / result["median_ms"] * 1e3
    except torch.OutOfMemoryError:
        result, rate = dict(note="out of memory"), None
    except Exception as fault:  # noqa: BLE001  (one method's fault must not cost the others' rows)
        result, rate = (
            dict(note=f"{type(fault).__name__}: {str(fault)[:200]}".replace("\n", " ")),
            None,
        )
    for o in inputs:
        o.grad = None
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    table.add(**labels | result, rate=rate, unit=unit, error=error)
    return result.get("median_ms")


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
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return lambda h, w, g, u, ids: ChunkedDivergenceFunction.apply(h, w, None, g, u, None, 1.0)[0]


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


def near(x):
    return x + 0.1 * x.std() * torch.randn(x.shape, device=x.device, generator=GEN)


def hidden_inputs(tokens, hidden, vocab, dtype):
    h, w = randn(tokens, hidden), 2 * hidden**-0.5 * randn(vocab, hidden)
    ids = torch.randint(vocab, (tokens,), device=DEVICE, generator=GEN)
    made = [h.to(dtype), w.to(dtype), near(h).to(dtype), near(w).to(dtype), ids]
    return [o.requires_grad_() if i < 2 else o for i, o in enumerate(made)]


def logit_inputs(tokens, vocab, dtype):
    x = 2 * randn(tokens, vocab)
    y = x.to(dtype).clone()
    for rows in y.split(1024):
        rows += 0.2 * randn(*rows.shape).to(dtype)
    return [x.to(dtype).requires_grad_(), y]


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


# ---- parts ----


def copy_part(table, options):
    x = torch.zeros(2**31 if DEVICE == "cuda" else 2**20, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    attempt(
        table,
        lambda: y.copy_(x),
        rate=2 * x.nbytes / 1e12,
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
            rate=2 * n**3 / 1e12,
            unit="TFLOP/s",
            part="copy",
            what="product of 8192",
            dtype=name_of(dtype),
        )


def products_part(table, options):
    "Single products of a tile: rows x H x columns, in bfloat16, by dtype of the output and by place in the algorithm."
    divide = 1 if DEVICE == "cuda" else 64
    for rows, hidden, columns in (
        (1024, 2048, 4096),
        (2048, 2048, 4096),
        (4096, 2048, 4096),
        (1024, 2048, 8192),
        (4096, 2048, 8192),
        (1024, 4096, 4096),
        (4096, 4096, 4096),
        (8192, 4096, 4096),
    ):
        rows, hidden, columns = rows // divide, hidden // divide, columns // divide
        h, w = randn(rows, hidden).bfloat16(), randn(columns, hidden).bfloat16()
        z, grad = torch.empty(rows, columns, device=DEVICE), randn(rows, columns).bfloat16()
        dh, dw = (
            torch.zeros(rows, hidden, device=DEVICE),
            torch.zeros(columns, hidden, device=DEVICE),
        )
        kinds = {
            "logits, bfloat16 out": lambda: h @ w.T,
            "logits, float32 out": lambda: torch.mm(h, w.T, out_dtype=torch.float32, out=z),
            "d hidden, bfloat16 out": lambda: grad @ w,
            "d hidden, float32 sum": lambda: torch.addmm(
                dh, grad, w, out_dtype=torch.float32, out=dh
            ),
            "d weight, bfloat16 out": lambda: grad.T @ h,
            "d weight, float32 sum": lambda: torch.addmm(
                dw, grad.T, h, out_dtype=torch.float32, out=dw
            ),
        }
        for what, f in kinds.items():
            ten = lambda: [f() for _ in range(10)]  # noqa: B023, E731
            attempt(
                table,
                ten,
                rate=20 * rows * hidden * columns / 1e12,
                unit="TFLOP/s",
                part="products",
                what=what,
                tokens=rows,
                hidden=hidden,
                vocab=columns,
                dtype="bfloat16",
                note="ten in a row",
            )


def logits_part(table, options):
    from gpu_variants import StepKL, Variant

    for (tokens, _, vocab), dtype in cases(options):
        inputs = logit_inputs(tokens, vocab, dtype)
        methods = dict(
            paper=paper,
            paper_float32=paper_float32,
            kl_div=kl_div,
            compiled=torch.compile(paper),
            step_kl=step_kl,
        )
        if options.explore and tokens == SHAPES[1][0]:
            for columns, dynamic in ((8192, True), (8192, False), (16384, False), (2**20, False)):
                v = Variant(columns=columns, dynamic=dynamic)
                methods[f"slices {columns} dynamic={dynamic}"] = partial(
                    lambda a, b, v: StepKL.apply(a, b, v), v=v
                )
        for direction in DIRECTIONS:
            back = "backward" in direction
            moved = inputs[0].nbytes * (5 if back else 2)
            for what, f in methods.items():
                attempt(
                    table,
                    lambda: both(f, inputs, back),
                    inputs[:1],
                    rate=moved / 1e12,
                    unit="TB/s",
                    part="logits",
                    what=what,
                    dtype=name_of(dtype),
                    tokens=tokens,
                    vocab=vocab,
                    direction=direction,
                )
        del inputs
        torch._dynamo.reset()


def cases(options):
    for dtype in (getattr(torch, o) for o in options.dtypes.split(",")):
        for shape in SHAPES[: 2 if dtype == torch.float32 else 3]:
            yield shape, dtype


def floor_rows(table, inputs, labels):
    "The products that cannot be avoided, with outputs in the inputs' dtype as a head makes them."
    h, w, g, u, _ = [o.detach() for o in inputs]
    flops = 2 * len(h) * h.shape[1] * len(w) / 1e12
    grad = h @ w.T
    forward = lambda: (h @ w.T, g @ u.T)  # noqa: E731

    def back():
        return grad @ w, grad.T @ h

    common = dict(labels, unit="TFLOP/s")
    attempt(
        table, forward, rate=2 * flops, what="floor, 2 products", direction=DIRECTIONS[0], **common
    )
    attempt(
        table,
        lambda: (forward(), back()),
        rate=4 * flops,
        what="floor, 4 products",
        direction=DIRECTIONS[1],
        **common,
    )
    attempt(
        table,
        lambda: (forward(), forward(), back()),
        rate=6 * flops,
        what="floor, 6 products",
        direction=DIRECTIONS[1],
        **common,
    )


def hidden_part(table, options):
    try:
        trl = trl_divergence()
    except Exception as fault:  # noqa: BLE001  (not installed, or too new a transformers)
        trl = None
        print("TRL's kernel is not here:", type(fault).__name__, fault, flush=True)
    for (tokens, hidden, vocab), dtype in cases(options):
        inputs = hidden_inputs(tokens, hidden, vocab, dtype)
        labels = dict(
            part="hidden", dtype=name_of(dtype), tokens=tokens, hidden=hidden, vocab=vocab
        )
        floor_rows(table, inputs, labels)
        methods = dict(
            paper=partial(head_then, paper),
            kl_div=partial(head_then, kl_div),
            paper_float32=partial(head_then, paper_float32),
            compiled=partial(head_then, torch.compile(paper)),
            trl=trl,
            linear_step_kl=ours,
        )
        for direction in DIRECTIONS:
            for what, f in methods.items():
                if f is None or (dtype == torch.float32 and what == "paper_float32"):
                    continue
                attempt(
                    table,
                    lambda: both(f, inputs, "backward" in direction),
                    inputs[:2],
                    what=what,
                    direction=direction,
                    seconds=1.0,
                    **labels,
                )
        del inputs
        torch._dynamo.reset()


def variants_part(table, options):
    "Candidates side by side, in bfloat16."
    from gpu_variants import Variant, linear_kl

    base = Variant()
    first = [
        (r, c)
        for r in (512, 1024, 2048, 4096)
        for c in (2048, 4096, 8192, 16384)
        if 2**21 <= r * c <= 2**25
    ]
    chosen = {f"tile {r}x{c}": replace(base, rows=r, columns=c) for r, c in first}
    chosen |= {
        "upcast 1024x4096": replace(base, products="float32"),
        "grad float32 1024x4096": replace(base, grad="float32"),
        "grad split 1024x4096": replace(base, grad="split"),
        "eager 1024x4096": replace(base, compiled=False),
        "eager 4096x4096": replace(base, compiled=False, rows=4096),
        "static 1024x4096": replace(base, dynamic=False),
        "static 2048x4096": replace(base, dynamic=False, rows=2048),
        "static 4096x4096": replace(base, dynamic=False, rows=4096),
    }
    for tokens, hidden, vocab in SHAPES[1:]:
        inputs = hidden_inputs(tokens, hidden, vocab, torch.bfloat16)
        labels = dict(part="variants", dtype="bfloat16", tokens=tokens, hidden=hidden, vocab=vocab)
        for what, v in chosen.items():
            slow = "upcast" in what or "float32" in what
            if slow and tokens > 4096:
                continue
            f = lambda *o: linear_kl(*o, variant=v)[0]  # noqa: B023, E731
            for direction in DIRECTIONS:
                attempt(
                    table,
                    lambda: both(f, inputs, "backward" in direction),
                    inputs[:2],
                    what=what,
                    repeats=10,
                    seconds=0.5,
                    direction=direction,
                    **labels,
                )
        if tokens == 4096:
            for size in (2**19, 2**22, 2**23):
                fused.TILE_SIZE, before = size, fused.TILE_SIZE
                for direction in DIRECTIONS:
                    attempt(
                        table,
                        lambda: both(ours, inputs, "backward" in direction),
                        inputs[:2],
                        what=f"linear_step_kl, tile 2^{size.bit_length() - 1}",
                        repeats=3,
                        seconds=0.5,
                        direction=direction,
                        **labels,
                    )
                fused.TILE_SIZE = before
        del inputs
        torch._dynamo.reset()


def errors_part(table, options):
    "Error of values and gradients against float64, from the same bfloat16 inputs, by kind of product."
    from gpu_variants import Variant, linear_kl

    for seed, scale in ((0, 1.0), (1, 0.01)):
        torch.manual_seed(seed)
        h, w = randn(256, 1024), 2 / 32 * randn(16384, 1024)
        inputs = [
            h,
            w,
            h + 0.1 * scale * randn(256, 1024),
            w + 0.1 * scale * 2 / 32 * randn(16384, 1024),
        ]
        inputs = [o.bfloat16() for o in inputs] + [torch.randint(16384, (256,), device=DEVICE)]
        inputs = [o.requires_grad_() if i < 2 else o for i, o in enumerate(inputs)]
        weights = randn(256)
        exact = [o.detach().double().requires_grad_() if i < 2 else o for i, o in enumerate(inputs)]
        exact[2:4] = [o.double() for o in exact[2:4]]
        truth = head_then(paper, *exact)
        true_grads = torch.autograd.grad((weights * truth).sum(), exact[:2])
        methods = dict(
            paper=partial(head_then, paper),
            paper_float32=partial(head_then, paper_float32),
            linear_step_kl=lambda *o: ours(*o)[0],
        )
        for grad in ("low", "split", "float32"):
            methods[f"grad {grad}"] = partial(
                lambda *o, v: linear_kl(*o, variant=v)[0], v=Variant(grad=grad, columns=4096)
            )
        methods["upcast"] = lambda *o: linear_kl(
            *o, variant=Variant(products="float32", grad="float32")
        )[0]
        for what, f in methods.items():
            try:
                value = f(*inputs)
                grads = torch.autograd.grad((weights * value).sum(), inputs[:2])
            except Exception as fault:  # noqa: BLE001
                table.add(part="errors", what=what, note=f"{type(fault).__name__}: {fault}"[:200])
                continue
            pairs = [
                ("value", value, truth),
                ("d hidden", grads[0], true_grads[0]),
                ("d weight", grads[1], true_grads[1]),
            ]
            for name, got, want in pairs:
                got = got.double()
                rounded = (
                    want.to(torch.bfloat16).double() if name != "value" else want.float().double()
                )
                table.add(
                    part="errors",
                    what=what,
                    direction=name,
                    dtype="bfloat16",
                    note=f"KL {truth.mean():.2e}",
                    error=((got - want).norm() / want.norm()).item(),
                    rate=((rounded - want).norm() / want.norm()).item(),
                    unit="error of rounding the truth",
                )


def profile_part(table, options):
    from torch.profiler import ProfilerActivity, profile
    from gpu_variants import Variant, linear_kl

    inputs = hidden_inputs(*SHAPES[1], torch.bfloat16)
    text = []
    tall = Variant(rows=4096, dynamic=False)
    methods = dict(
        linear_step_kl=ours,
        dynamic=lambda *o: linear_kl(*o, variant=Variant())[0],
        static=lambda *o: linear_kl(*o, variant=tall)[0],
    )
    for what, f in methods.items():
        both(f, inputs, True)
        with profile(
            activities=[getattr(ProfilerActivity, o) for o in {"CPU", DEVICE.upper()}]
        ) as events:
            both(f, inputs, True)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        average = events.key_averages()
        text.append(f"== {what}, forward + backward, {SHAPES[1]}, bfloat16\n")
        text.append(
            average.table(
                sort_by=f"self_{DEVICE}_time_total", row_limit=15, max_name_column_width=70
            )
        )
    (options.out / "profile.txt").write_text("\n".join(text))
    print("\n".join(o[:3000] for o in text), flush=True)


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
        h = policy.model(ids).last_hidden_state
        loss_of(h, g).backward()

    def from_logits(h, g, rloo):
        p, q = policy.lm_head(h).float(), reference.lm_head(g).detach().float()
        kl = paper(p, q)
        picked = p.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        return (kl - advantages * picked if rloo else kl).mean()

    def from_hidden(h, g, rloo):
        out = linear_step_kl(h, policy.lm_head.weight, g, reference.lm_head.weight.detach(), ids)
        return (out.step_kl - advantages * out.policy_logprobs if rloo else out.step_kl).mean()

    parameters = list(policy.parameters())
    for rloo in (True, False):
        for what, f in (
            ("paper's formula, float32 logits", from_logits),
            ("linear_step_kl", from_hidden),
        ):
            attempt(
                table,
                lambda: step(partial(f, rloo=rloo)),
                parameters,
                part="model",
                what=what,
                dtype="bfloat16",
                tokens=batch * tokens,
                hidden=hidden,
                vocab=vocab,
                direction="RLOO step" if rloo else "distillation step",
                seconds=2.0,
            )


PARTS = dict(
    copy=copy_part,
    products=products_part,
    errors=errors_part,
    variants=variants_part,
    profile=profile_part,
    hidden=hidden_part,
    logits=logits_part,
    model=model_part,
)


def main():
    global DEVICE, GEN
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("outputs/smoke/gpu"))
    parser.add_argument(
        "--budget", type=float, default=300, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--parts", default="copy,hidden,logits,profile,model")
    parser.add_argument(
        "--dtypes", default="bfloat16,float32", help="float32 leaves out the largest size"
    )
    parser.add_argument("--device", default="cuda", help="cpu: a dry run at toy sizes")
    parser.add_argument(
        "--explore", action="store_true", help="more candidates among the methods from logits"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    DEVICE = options.device
    if DEVICE == "cpu":
        SHAPES[:] = [(6, 4, 40), (8, 4, 50), (8, 4, 60)]
    elif not torch.cuda.is_available():
        sys.exit("gpu_speed: no CUDA device here")
    GEN = torch.Generator(DEVICE).manual_seed(0)
    sys.path.insert(0, str(Path(__file__).parent))
    table = Table(options.out, options.budget)
    (options.out / "environment.json").write_text(json.dumps(environment(table.card)))
    for name in options.parts.split(","):
        began = time.monotonic()
        try:
            if table.left() > 0:
                PARTS[name](table, options)
        except Exception as fault:  # noqa: BLE001  (the other parts still run)
            table.add(
                part=name, note=f"{type(fault).__name__}: {str(fault)[:300]}".replace("\n", " ")
            )
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        print(f"== {name}: {time.monotonic() - began:.1f} s", flush=True)


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
    import subprocess

    try:
        return subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            text=True,
            capture_output=True,
            timeout=20,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


if __name__ == "__main__":
    main()
