"""The kernels on a CUDA card, `pytest -m gpu tests/test_gpu.py`; small checks also on the CPU.

Needs torch and pytest only. Oracles are the formulas as they are written, in float64 on the CPU.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.testing import assert_close

from klrb import fused, steps
from klrb.fused import LMHead, linear_step_kl
from klrb.steps import step_kl

INF = math.inf
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, no_cuda])
devices = pytest.mark.parametrize("device", ["cpu", CUDA])
only_cuda = pytest.mark.parametrize("device", [CUDA])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def from_logits(a, b):
    "KL in float64, with 0 log 0 = 0."
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    excluded = p == -INF
    return (p.exp() * (p.masked_fill(excluded, 0) - q.masked_fill(excluded, 0))).sum(-1)


def error(got, wanted):
    "Relative error in the Frobenius norm."
    return ((got.detach().double().cpu() - wanted).norm() / wanted.norm()).item()


UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}  # largest rounding


# ---- from logits ----


def choose(code, device, monkeypatch):
    "The kernels of `klrb.gpu`, or PyTorch's, eager or compiled."
    if device == "cpu":
        if code != "eager":
            pytest.skip("test_fused.py and test_triton.py have it on the CPU")
        return
    for module in (steps, fused):
        monkeypatch.setattr(module, "COMPILE_FROM", 0 if code == "compiled" else 2**60)
        if code != "triton":
            monkeypatch.setattr(module, "gpu_kernels", lambda *logits: None)


codes = pytest.mark.parametrize("code", ["eager", "compiled", "triton"])


@only_cuda
def test_the_kernels_of_our_own_are_used(device):
    pytest.importorskip("triton")
    logits = torch.zeros(2, 300, device=device)
    assert steps.gpu_kernels(logits, logits).__name__ == "klrb.gpu"
    assert steps.gpu_kernels(logits, logits.double()) is None
    assert steps.gpu_kernels(logits, logits.T) is None


@devices
@dtypes
@codes
def test_step_kl_and_both_gradients(device, dtype, code, monkeypatch):
    choose(code, device, monkeypatch)
    a, b = 2 * randn(5, 7, 1013), 2 * randn(5, 7, 1013, seed=1)
    a[0, 0, 3] = a[1, 1, 5] = b[1, 1, 5] = -INF
    x, y = (o.to(device, dtype).requires_grad_() for o in (a, b))
    exact = [o.detach().double().cpu().requires_grad_() for o in (x, y)]
    weights = randn(5, 7, seed=2)
    value, truth = step_kl(x, y), from_logits(*exact)
    assert value.device.type == device and value.dtype == torch.float32
    assert_close(value.double().cpu(), truth, rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad((weights.to(value) * value).sum(), (x, y))
    wanted = torch.autograd.grad((weights * truth).sum(), exact)
    for g, w in zip(grads, wanted):
        assert g.dtype == dtype and g.isfinite().all()
        assert error(g, w.nan_to_num()) < 2 * UNIT[dtype] + 2e-6


@devices
def test_limits_of_the_support(device):
    a = torch.tensor(
        [[0.0, 0.0, -INF], [0.0, 0.0, 0.0], [math.nan, 0.0, 0.0], [-INF, -INF, -INF]], device=device
    )
    b = torch.tensor(
        [[0.0, 0.0, 0.0], [0.0, 0.0, -INF], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], device=device
    )
    x = a.clone().requires_grad_()
    value = step_kl(x, b)
    assert_close(value[0].item(), math.log(3 / 2))
    assert value[1] == INF and value[2:].isnan().all()
    value.sum().backward()
    assert x.grad.isfinite().all() and (x.grad[1:] == 0).all()


@devices
def test_a_probability_below_the_smallest_normal_number(device):
    "It counts, where the reference excludes it."
    a, b = torch.zeros(2, 1, 130, device=device)
    a[0, 7], b[0, 7] = -100.0, -INF
    assert step_kl(a, b) == INF
    a[0, 7] = -110.0  # 0 in float32
    assert step_kl(a, b) < 1e-6


@devices
def test_equal_models_strides_and_no_step_at_all(device):
    a = randn(3, 4, 50).float().to(device)
    assert (step_kl(a, a) == 0).all()
    b = randn(3, 4, 50, seed=1).float().to(device)
    wide = torch.stack([a, b], -1)  # stride 2 over the vocabulary
    assert_close(step_kl(wide[..., 0], wide[..., 1]), step_kl(a, b))
    assert_close(step_kl(a.transpose(0, 1), b.transpose(0, 1)), step_kl(a, b).T)
    empty = a[:0].clone().requires_grad_()
    step_kl(empty, b[:0]).sum().backward()
    assert empty.grad.shape == (0, 4, 50)


@devices
def test_models_that_nearly_agree_keep_their_digits(device):
    b = 2 * randn(4, 50257).float()
    a = b + 1e-4 * randn(4, 50257, seed=1).float()
    truth = step_kl(a.double(), b.double())
    assert_close(step_kl(a.to(device), b.to(device)).double().cpu(), truth, rtol=1e-3, atol=0)


@devices
@pytest.mark.parametrize("vocab", [50_000, 150_000])
def test_flat_logits_with_one_moved_token(device, vocab):
    "More of the kind, and the gradients, in test_flat.py."
    b = 0.3 * randn(1, vocab).float()
    a = b.clone()
    a[0, b.argmax()] += 0.1
    truth = step_kl(a.double(), b.double())
    a, b = a.to(device), b.to(device)
    assert_close(step_kl(a, b).double().cpu(), truth, rtol=1e-4, atol=0)
    one = torch.ones(1, 1, 1, device=device)
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    assert_close(
        linear_step_kl(one, a.T.contiguous(), one, b.T.contiguous(), ids).step_kl[0].double().cpu(),
        truth,
        rtol=1e-4,
        atol=0,
    )


def test_two_devices_are_refused():
    meta = torch.device("meta")
    with pytest.raises(ValueError, match="`ref_logits` is on meta"):
        step_kl(torch.zeros(2, 3), torch.zeros(2, 3, device=meta))


@only_cuda
def test_two_devices_are_refused_here_too(device):
    a = torch.zeros(2, 3, device=device)
    with pytest.raises(ValueError, match="`ref_logits` is on cpu"):
        step_kl(a, torch.zeros(2, 3))
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    with pytest.raises(ValueError, match="`ref_hidden` is on cpu"):
        linear_step_kl(a[None], a, torch.zeros(1, 2, 3), a, ids)


# ---- from hidden states ----


class Case(NamedTuple):
    "Two heads and the hidden states before them, in float64 on the CPU."

    h: torch.Tensor
    w: torch.Tensor
    c: torch.Tensor
    g: torch.Tensor
    u: torch.Tensor
    d: torch.Tensor


def case(vocab=301, seed=0):
    shapes = (2, 5, 64), (vocab, 64), (vocab,), (2, 5, 48), (vocab, 48), (vocab,)
    made = [randn(*o, seed=10 * seed + i) for i, o in enumerate(shapes)]
    return Case(*(o * (0.3 if i in (1, 4) else 1) for i, o in enumerate(made)))


class Settings(NamedTuple):
    "What a call may have besides tensors."

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    vocab_size: int | None = None


def oracle(o, ids, s=Settings()):
    "The four outputs from full logits."

    def logprobs(h, w, c, scale, softcap):
        z = (h @ w.T + c) * scale
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return (z[..., : s.vocab_size] / s.temperature).log_softmax(-1)

    p, q = logprobs(o.h, o.w, o.c, s.scale, s.softcap), logprobs(o.g, o.u, o.d, 1.0, None)
    excluded = p == -INF
    safe = p.masked_fill(excluded, 0)
    kl = (p.exp() * (safe - q.masked_fill(excluded, 0))).sum(-1)
    at = lambda x: x.gather(-1, ids[..., None])[..., 0]  # noqa: E731
    return kl, at(p), at(q), -(p.exp() * safe).sum(-1)


def ours(o, ids, s=Settings(), mask=None):
    heads = LMHead(o.w, o.c, s.scale, s.softcap), LMHead(o.u, o.d)
    return linear_step_kl(o.h, heads[0], o.g, heads[1], ids, s.temperature, mask, s.vocab_size)


def compare(o, ids, device, dtype, s=Settings(), mask=None):
    "Values and all six gradients against the oracle from the same rounded inputs."
    near = Case(*(x.to(device, dtype).requires_grad_() for x in o))
    exact = Case(*(x.detach().double().cpu().requires_grad_() for x in near))
    weights = randn(4, *ids.shape, seed=99)
    if mask is not None:
        weights = weights * mask
    values = ours(near, ids.to(device), s, None if mask is None else mask.to(device))
    truth = oracle(exact, ids.clamp(min=0), s)
    for v, t in zip(values, truth):
        t = t if mask is None else t * mask
        assert_close(v.double().cpu(), t, rtol=2e-5, atol=2e-5)
    total = sum((w.to(v) * v).sum() for w, v in zip(weights, values))
    grads = torch.autograd.grad(total, near)
    wanted = torch.autograd.grad(sum((w * t).sum() for w, t in zip(weights, truth)), exact)
    for name, g, t in zip(Case._fields, grads, wanted):
        assert g.dtype == dtype and error(g, t) < 3 * UNIT[dtype] + 5e-6, (name, error(g, t))


def small_tiles(monkeypatch, size):
    for name in ("TILE_SIZE", "CUDA_TILE_SIZE"):
        monkeypatch.setattr(fused, name, size)
    for name in ("TILE_ROWS", "CUDA_TILE_ROWS"):
        monkeypatch.setattr(fused, name, 4 if size < 2**20 else 1024)
    if size < 2**20:
        monkeypatch.setattr(fused, "CUDA_KEEP_UP_TO", 0)
    monkeypatch.setattr(fused, "CUDA_GRAD_COLUMNS", 200)


def token_ids(vocab, seed=0):
    return torch.randint(vocab, (2, 5), generator=torch.Generator().manual_seed(seed))


@devices
@dtypes
@pytest.mark.parametrize(
    "settings", [Settings(), Settings(0.5, 3.0, 0.7), Settings(vocab_size=290)]
)
@pytest.mark.parametrize("tile_size,keep", [(2**20, 2**22), (320, 0)])
@codes
def test_linear_step_kl_and_all_gradients(
    device, dtype, settings, tile_size, keep, code, monkeypatch
):
    choose(code, device, monkeypatch)
    small_tiles(monkeypatch, tile_size)
    monkeypatch.setattr(fused, "KEEP_UP_TO", keep)
    compare(case(), token_ids(290), device, dtype, settings)


@pytest.mark.parametrize(
    "dtype,of_gradients", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]
)
def test_low_precision_factors_as_on_a_card(dtype, of_gradients, monkeypatch):
    "The dtypes that a CUDA device gets, with a product that the CPU has."
    seen = set()

    def multiply(a, b, out, add=False):
        assert a.dtype == b.dtype and out.dtype == torch.float32
        seen.add(a.dtype)
        product = a.float() @ b.float()
        out.copy_(out + product if add else product)

    monkeypatch.setattr(fused, "_multiply", multiply)
    monkeypatch.setattr(fused.Side, "product_dtypes", lambda side, _: (dtype, of_gradients))
    monkeypatch.setattr(fused, "KEEP_UP_TO", 0)
    small_tiles(monkeypatch, 320)
    for settings in (Settings(), Settings(0.5, 3.0, 0.7), Settings(vocab_size=290)):
        compare(case(), token_ids(290), "cpu", dtype, settings)
    assert seen == {dtype, of_gradients}


@devices
@dtypes
def test_masked_steps_and_excluded_tokens(device, dtype, monkeypatch):
    small_tiles(monkeypatch, 200)
    o, ids = case(), token_ids(200)
    o.c[250:260] = -INF
    o.d[255:260] = -INF
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    values = ours(Case(*(x.to(device, dtype) for x in o)), ids.to(device), mask=mask.to(device))
    assert all((v.cpu()[mask == 0] == 0).all() for v in values)
    ids = torch.where(mask == 1, ids, -100)
    near = Case(*(x.to(device, dtype) for x in o))
    garbage = near._replace(
        h=near.h.masked_fill(mask.to(device)[..., None] == 0, math.nan).requires_grad_()
    )
    sum(v.sum() for v in ours(garbage, ids.to(device), mask=mask.to(device))).backward()
    assert garbage.h.grad.isfinite().all() and (garbage.h.grad[mask.to(device) == 0] == 0).all()
    exact = Case(*(x.double().cpu() for x in near))
    for v, t in zip(
        ours(near, ids.to(device), mask=mask.to(device)), oracle(exact, ids.clamp(min=0))
    ):
        assert_close(v.double().cpu(), torch.where(mask == 1, t, 0), rtol=2e-5, atol=2e-5)


@devices
def test_all_steps_masked_or_no_step(device):
    o, ids = (
        Case(*(x.float().to(device).requires_grad_() for x in case())),
        token_ids(301).to(device),
    )
    values = ours(o, ids, mask=torch.zeros_like(ids))
    sum(v.sum() for v in values).backward()
    assert all((v == 0).all() for v in values) and (o.w.grad == 0).all()
    empty = o._replace(h=o.h[:0], g=o.g[:0])
    assert all(v.shape == (0, 5) for v in ours(empty, ids[:0]))


@devices
def test_autocast_does_not_round(device):
    o, ids = Case(*(x.float().to(device) for x in case())), token_ids(301).to(device)
    plain = ours(o, ids)
    with torch.autocast(device, dtype=torch.bfloat16):
        for v, w in zip(ours(o, ids), plain):
            assert_close(v, w, rtol=0, atol=0)


@devices
@pytest.mark.parametrize("setting", ["high", "medium"])
def test_lower_precision_of_float32_products_is_not_used(device, setting):
    "TF32, or bfloat16 on some CPUs, keeps three digits of each factor."
    torch.manual_seed(0)
    o, ids = Case(*(x.float().to(device) for x in case(vocab=4000))), token_ids(4000).to(device)
    plain, before = ours(o, ids), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        for v, w in zip(ours(o, ids), plain):
            assert_close(v, w, rtol=0, atol=0)
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)


@devices
def test_strided_inputs(device):
    o, ids = Case(*(x.float().to(device) for x in case())), token_ids(301).to(device)
    strided = o._replace(
        h=o.h.transpose(0, 1).contiguous().transpose(0, 1),
        w=o.w.T.contiguous().T,
        g=torch.stack([o.g, o.g], -1)[..., 0],
    )
    for v, w in zip(ours(strided, ids), ours(o, ids)):
        assert_close(v, w, rtol=1e-5, atol=1e-5)


# ---- graphs, compilation, synchronisation ----


@devices
def test_inside_a_function_that_the_user_compiles(device):
    backend = "inductor" if device == "cuda" else "aot_eager"
    a, b = (randn(6, 1000, seed=i).float().to(device) for i in range(2))
    whole = torch.compile(lambda x, y: step_kl(2 * x, y).mean(), fullgraph=True, backend=backend)
    x, y = a.clone().requires_grad_(), a.clone().requires_grad_()
    value, plain = whole(x, b), step_kl(2 * y, b).mean()
    assert_close(value, plain, rtol=1e-5, atol=0)
    value.backward()
    plain.backward()
    assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-7)
    torch._dynamo.reset()


def check_replay(call, inputs, **tolerance):
    "A CUDA graph of `call`, after three calls on a side stream, against it on other inputs."
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = call()
    for o in inputs:
        o.data.copy_(o.data.flip(0))  # so that the replay must compute
    graph.replay()
    torch.cuda.synchronize()
    for got, wanted in zip([o.clone() for o in static], call()):
        assert_close(got, wanted, **tolerance)


def step_kl_graph(vocab):
    a, b = (randn(32, vocab, seed=i).float().cuda() for i in range(2))
    a.requires_grad_()

    def call():
        value = step_kl(a, b)
        return value, torch.autograd.grad(value.sum(), a)[0]

    check_replay(call, [a, b], rtol=1e-5, atol=1e-7)


def linear_step_kl_graph(dtype, masked, compiled):
    if compiled:
        steps.COMPILE_FROM = fused.COMPILE_FROM = 0
    o, ids = Case(*(x.to("cuda", dtype).requires_grad_() for x in case())), token_ids(301).cuda()
    lengths = torch.tensor([[3], [4]], device="cuda")
    mask = (torch.arange(5, device="cuda") < lengths) if masked else None

    def call():
        values = ours(o, ids, mask=mask)
        return *values, *torch.autograd.grad(sum(v.sum() for v in values), [o.h, o.w])

    check_replay(call, [o.h, o.g], rtol=1e-3, atol=1e-4)


GRAPHS = {
    "step_kl eager": partial(step_kl_graph, 1013),
    "step_kl compiled": partial(step_kl_graph, 140_000),
}
for one in (torch.float32, torch.bfloat16, torch.float16):
    for how in (False, True):
        key = f"linear_step_kl {one} {'masked' if how else 'all'}"
        GRAPHS[key] = partial(linear_step_kl_graph, one, how, False)
GRAPHS["linear_step_kl compiled"] = partial(linear_step_kl_graph, torch.bfloat16, True, True)


def try_graphs():
    "What each graph fails with, or an empty string."
    found = {}
    for name, check in GRAPHS.items():
        try:
            check()
            found[name] = ""
        except Exception as fault:  # noqa: BLE001  (reported by the test of this name)
            found[name] = f"{type(fault).__name__}: {fault}"[:1500]
    return found


@pytest.fixture(scope="module")
def graph_faults():
    "From a process of its own: a broken capture leaves the process without a generator."
    here = Path(__file__).parent
    source = "import json, test_gpu; print('RESULT', json.dumps(test_gpu.try_graphs()))"
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(here.parent), str(here)]))
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=env)
    lines = [o for o in done.stdout.splitlines() if o.startswith("RESULT ")]
    assert lines, done.stderr[-2000:]
    return json.loads(lines[0].removeprefix("RESULT "))


@only_cuda
@pytest.mark.parametrize("name", GRAPHS)
def test_cuda_graphs(device, name, graph_faults):
    assert not graph_faults[name], graph_faults[name]


def tiles_of(o, ids):
    "`linear_step_kl` after its checks, which look at the ids once."
    return fused._LinearStepKL.apply(
        o.h.reshape(-1, 64),
        o.w,
        o.c,
        o.g.reshape(-1, 48),
        o.u,
        o.d,
        ids.reshape(-1),
        301,
        [fused.Bend(1.0, None, 1.0)] * 2,
    )


def test_no_value_is_looked_at(monkeypatch):
    "On the device `meta`, which has no values: `.item()`, `nonzero` and the like raise there."
    monkeypatch.setattr(fused, "_exact_products", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(fused, "CUDA_TILE_SIZE", 320)
    a, b = (torch.empty(4, 5, 1013, device="meta", requires_grad=o) for o in (True, False))
    step_kl(a, b).sum().backward()
    assert a.grad.shape == a.shape
    for keep in (0, 2**22):
        monkeypatch.setattr(fused, "CUDA_KEEP_UP_TO", keep)
        o = Case(*(x.float().to("meta").requires_grad_() for x in case()))
        values = tiles_of(o, token_ids(301).to("meta"))
        sum(v.sum() for v in values).backward()
        assert all(x.grad.shape == x.shape for x in o)
    with pytest.raises((RuntimeError, NotImplementedError)):  # so that the check can fail
        a.sum().item()


@only_cuda
def test_the_host_never_waits(device):
    "But for one look at the ids, before the first tile."
    a, b = (randn(4, 5, 1013, seed=i).float().to(device) for i in range(2))
    a.requires_grad_()
    o, ids = (
        Case(*(x.float().to(device).requires_grad_() for x in case())),
        token_ids(301).to(device),
    )
    for _ in range(2):  # the first time for what is compiled and set up
        torch.cuda.set_sync_debug_mode("error" if _ else "default")
        try:
            step_kl(a, b).sum().backward()
            values = tiles_of(o, ids)
            sum(v.sum() for v in values).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@only_cuda
@pytest.mark.parametrize("rows_of_a_tile", [1024, 4096])
def test_a_batch_of_real_size(device, rows_of_a_tile, monkeypatch):
    "Several tiles in both directions at real sizes, in bfloat16; the oracle sees some rows."
    torch.manual_seed(0)
    tokens, hidden, vocab = 1500, 256, 60_001
    h, w = torch.randn(tokens, hidden, device=device), torch.randn(vocab, hidden, device=device) / 8
    inputs = [h, w, h + 0.1 * torch.randn_like(h), w + 0.01 * torch.randn_like(w)]
    h, w, g, u = (o.bfloat16() for o in inputs)
    h.requires_grad_()
    w.requires_grad_()
    ids = torch.randint(vocab, (1, tokens), device=device)
    monkeypatch.setattr(fused, "CUDA_TILE_ROWS", rows_of_a_tile)
    monkeypatch.setattr(fused, "CUDA_KEEP_UP_TO", 0)
    out = linear_step_kl(h[None], w, g[None], u, ids)
    rows = slice(0, tokens, 50)
    p, q = (x[rows].double() @ y.double().T for x, y in ((h, w), (g, u)))
    assert_close(out.step_kl[0, rows].double(), from_logits(p, q), rtol=1e-4, atol=1e-7)
    weights = torch.zeros(tokens, device=device)
    weights[rows] = 1
    grads = torch.autograd.grad((weights * out.step_kl[0]).sum(), (h, w))
    wanted = torch.autograd.grad(from_logits(p, q).sum(), (h, w))
    for x, y in zip(grads, wanted):
        assert error(x, y.double().cpu()) < 3 * UNIT[torch.bfloat16]
