"""Candidates for the kernels on a CUDA device: exploration, not part of the package."""

import math
from dataclasses import dataclass

import torch

LOW = -8e37  # below every finite float32 logit in use, and finite itself


@dataclass(frozen=True)
class Variant:
    "How `LinearKL` works on one device."

    rows: int = 1024  # tokens of a tile
    columns: int = 4096  # vocabulary entries of a tile
    products: str = "low"  # low: bf16 operands, float32 output; float32: operands upcast first
    grad: str = "low"  # dtype of a gradient tile in its products: low, float32, or split (two bf16 summands)
    dynamic: bool | None = True  # of torch.compile; None: automatic
    compiled: bool = True  # else eager


def e2_near(delta):
    series = delta / math.factorial(8)
    for k in range(7, 1, -1):
        series = (series + (-1) ** k / math.factorial(k)) * delta
    return series * delta


def sums(a, b, local):
    "Nine numbers of a tile for each row, relative to the tile's own maxima."
    top_p, top_q = a.amax(-1, True).clamp(min=LOW), b.amax(-1, True).clamp(min=LOW)
    x, delta = a - top_p, (a - b) - (top_p - top_q)
    p, q = x.exp(), (b - top_q).exp()
    p_delta = torch.where(p > 0, p * delta, 0.0)
    terms = torch.where(delta.abs() < 0.5, p * e2_near(delta), q - p + p_delta)
    e = torch.where(p > 0, p * x, 0.0)
    total = [o.sum(-1, True) for o in (p, q, -p_delta, terms, e)]
    return torch.cat([top_p, top_q, *total, a.gather(1, local), b.gather(1, local)], 1)


def combine(stats, here):
    "Eq. 1 of notebook 04 for all tiles at once, (tiles, rows, 9) in float64."
    top_p, top_q, zp, zq, m, s, e, pick_p, pick_q = stats.unbind(-1)
    new_p, new_q = top_p.amax(0), top_q.amax(0)
    rho_p, rho_q, a = (
        (top_p - new_p).exp(),
        (top_q - new_q).exp(),
        (new_p - new_q) - (top_p - top_q),
    )
    e2 = torch.where(
        a.abs() < 1e-3, rho_p * a * a * (0.5 + a / 6 + a * a / 24), rho_q - rho_p - rho_p * a
    )
    s = (rho_q * s + (rho_q - rho_p) * m + e2 * zp).sum(0)
    m = (rho_p * (m + a * zp)).sum(0)
    e = (rho_p * (e + (top_p - new_p) * zp)).sum(0)
    zp, zq = (rho_p * zp).sum(0), (rho_q * zq).sum(0)
    picks = [torch.where(here, o, 0.0).sum(0) for o in (pick_p, pick_q)]
    return new_p, new_q, zp, zq, m, s, e, *picks


def gradient(a, b, top, shift, by_delta, by_one, local, g_p, low):
    "A tile of the policy's gradient, rounded to `low`'s dtype."
    x, delta = a - top, ((a - b) - shift).clamp(-1e30, 1e30)
    p = x.exp()
    value = torch.where(p > 0, p * (by_delta * delta + by_one), 0.0)
    columns = torch.arange(a.shape[1], device=a.device)
    value = value + torch.where(columns == local, g_p, 0.0)
    low.copy_(value)
    return value


def gradient_only(*args):
    gradient(*args)


def gradient_split(*args):
    value = gradient(*args)
    return (value - args[-1].float()).to(args[-1].dtype)


_compiled = {}


def run(function, variant, *args):
    if not variant.compiled:
        return function(*args)
    key = function, variant.dynamic
    if key not in _compiled:
        _compiled[key] = torch.compile(function, dynamic=variant.dynamic)
    return _compiled[key](*args)


def multiply(a, b, out, low):
    if low:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def accumulate(out, a, b, low):
    if low:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(a.float(), b.float())


def cuts(n, size):
    return [slice(o, min(o + size, n)) for o in range(0, n, size)]


class LinearKL(torch.autograd.Function):
    "KL and log-probability of a policy's token, with gradients to the policy's hidden states and head."

    @staticmethod
    def forward(ctx, h, w, g, u, ids, variant):
        low = variant.products == "low" and h.dtype in (torch.bfloat16, torch.float16) and h.is_cuda
        columns, n = cuts(len(w), variant.columns), len(h)
        stats = torch.empty(len(columns), n, 9, device=h.device)
        here = torch.stack([(ids >= c.start) & (ids < c.stop) for c in columns])
        size = min(n, variant.rows) * min(variant.columns, len(w))
        buffers = torch.empty(2, size, device=h.device)
        for t, c in enumerate(columns):
            for r in cuts(n, variant.rows):
                shape = r.stop - r.start, c.stop - c.start
                a, b = (o[: shape[0] * shape[1]].view(shape) for o in buffers)
                multiply(h[r], w[c].T, a, low)
                multiply(g[r], u[c].T, b, low)
                local = torch.where(here[t, r], ids[r] - c.start, 0)[:, None]
                stats[t, r] = run(sums, variant, a, b, local)
        top_p, top_q, zp, zq, m, s, e, pick_p, pick_q = combine(stats.double(), here)
        y = (m + s) / zp
        ratio = torch.where(y.abs() < 0.5, torch.log1p(y), (zq / zp).log())
        kl = torch.where(y.abs() < 0.5, s / zp - (y - ratio), ratio - m / zp).clamp(min=0.0)
        ctx.save_for_backward(h, w, g, u, ids, top_p, top_q, zp, kl, ratio)
        ctx.variant, ctx.low = variant, low
        return kl.float(), (pick_p - top_p - zp.log()).float()

    @staticmethod
    def backward(ctx, g_kl, g_p):
        h, w, g, u, ids, top_p, top_q, zp, kl, ratio = ctx.saved_tensors
        variant, low, n = ctx.variant, ctx.low, len(h)
        g_kl, g_p = g_kl.double(), g_p.double()
        rows = [
            o.float()[:, None]
            for o in (top_p, top_p - top_q, g_kl / zp, (g_kl * (ratio - kl) - g_p) / zp, g_p)
        ]
        low_grad = low and variant.grad in ("low", "split")
        dh, dw = torch.zeros(h.shape, device=h.device), torch.empty_like(w)
        size = min(n, variant.rows) * min(variant.columns, len(w))
        buffers = torch.empty(2, size, device=h.device)
        spare = torch.empty(size, device=h.device, dtype=h.dtype if low_grad else torch.float32)
        part = torch.empty(min(variant.columns, len(w)), w.shape[1], device=h.device)
        for c in cuts(len(w), variant.columns):
            share = part[: c.stop - c.start].zero_()
            for r in cuts(n, variant.rows):
                shape = r.stop - r.start, c.stop - c.start
                a, b = (o[: shape[0] * shape[1]].view(shape) for o in buffers)
                grad = spare[: a.numel()].view(shape)
                multiply(h[r], w[c].T, a, low)
                multiply(g[r], u[c].T, b, low)
                local = (ids[r] - c.start)[:, None]
                args = (a, b, *(o[r] for o in rows[:4]), local, rows[4][r], grad)
                rest = run(
                    gradient_split if variant.grad == "split" and low else gradient_only,
                    variant,
                    *args,
                )
                for o in [grad] if rest is None else [grad, rest]:
                    accumulate(dh[r], o, w[c], low_grad)
                    accumulate(share, o.T, h[r], low_grad)
            dw[c] = share
        return dh.to(h.dtype), dw, None, None, None, None


def linear_kl(h, w, g, u, ids, variant=Variant()):
    flat = lambda o: o.reshape(-1, o.shape[-1])
    return LinearKL.apply(flat(h), w, flat(g), u, ids.reshape(-1), variant)


def step_sums(a, b):
    a, b = a.float(), b.float()
    return sums(a, b, torch.zeros(len(a), 1, dtype=torch.long, device=a.device))


def step_gradient(a, b, top, shift, by_delta, by_one, out):
    a, b = a.float(), b.float()
    p = (a - top).exp()
    out.copy_(
        torch.where(p > 0, p * (by_delta * ((a - b) - shift).clamp(-1e30, 1e30) + by_one), 0.0)
    )


class StepKL(torch.autograd.Function):
    "From logits, in slices of columns (forward), so that a slice is read from memory once."

    @staticmethod
    def forward(ctx, a, b, variant):
        a2, b2 = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        stats = torch.stack(
            [
                run(step_sums, variant, a2[:, c], b2[:, c])
                for c in cuts(a2.shape[1], variant.columns)
            ]
        )
        top_p, top_q, zp, zq, m, s, *_ = combine(
            stats.double(), torch.zeros_like(stats[..., 0], dtype=torch.bool)
        )
        y = (m + s) / zp
        ratio = torch.where(y.abs() < 0.5, torch.log1p(y), (zq / zp).log())
        kl = torch.where(y.abs() < 0.5, s / zp - (y - ratio), ratio - m / zp).clamp(min=0.0)
        ctx.save_for_backward(a, b, top_p, top_q, zp, kl, ratio)
        ctx.variant = variant
        return kl.float().view(a.shape[:-1])

    @staticmethod
    def backward(ctx, grad):
        a, b, top_p, top_q, zp, kl, ratio = ctx.saved_tensors
        grad = grad.reshape(-1).double()
        rows = [
            o.float()[:, None] for o in (top_p, top_p - top_q, grad / zp, grad * (ratio - kl) / zp)
        ]
        out = torch.empty_like(a)
        flat = [o.reshape(-1, a.shape[-1]) for o in (a, b)]
        run(step_gradient, ctx.variant, *flat, *rows, out.view(-1, a.shape[-1]))
        return out, None, None
