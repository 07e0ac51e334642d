"""What two ways of computing may differ by: bounds of rounding errors, from the sums that are made.

They hold for every order of a sum, with and without vectors, FMA and compiler. u is half the spacing of floats at 1. A
sum of n terms makes n roundings of partial sums, none above sum|x|. In the worst case they add up to n u sum|x|. Taken as
independent, each uniform within u, their sum has a standard deviation of at most sqrt(n/3) u sum|x|; six of these are
exceeded once in 500 million sums. (The model is that of Higham and Mary, A new approach to probabilistic rounding error
analysis, SIAM J. Sci. Comput. 41, 2019.)
"""
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.testing import assert_close

FUNCTION = 8  # roundings in an exp, log or expm1: 4 ulp, as the vector libraries promise at worst
FUSED = 32  # roundings of an element besides its sum: the series of e2, products, casts


def unit(dtype: torch.dtype) -> float:
    "Largest relative error of one rounding"
    return torch.finfo(dtype).eps / 2


def gamma(terms: int, dtype: torch.dtype = torch.float64) -> float:
    "Largest error of a sum of so many terms, in units of the sum of their absolute values"
    return min(terms, 6 * math.sqrt(terms / 3)) * unit(dtype)


def _dtype(value):
    "The widest error among nested values: a Python number is float64"
    if isinstance(value, Tensor):
        return value.dtype if value.dtype.is_floating_point else torch.float64
    if not isinstance(value, (list, tuple)):
        return torch.float64
    return max((_dtype(o) for o in value), key=unit, default=torch.float64)


def agree(value, exact, terms: int = 2**12, size: float = 1.0, **kwargs):
    """Both come from sums of at most `terms` terms, whose absolute values add up to at most `size` or the value itself.

    `terms` counts every rounding on the way: the default has room for some hundred terms, each with its exp and log, which
    the small cases of the tests do not exceed.
    """
    tolerance = 2 * gamma(terms, max(_dtype(value), _dtype(exact), key=unit))  # each of the two may be off
    assert_close(value, exact, rtol=tolerance, atol=tolerance * size, **kwargs)


def unbiased(moments, exact: float | None = None) -> bool:
    """Whether the mean of `exact_moments` or `exact_gradient_moments` is exact up to rounding.

    The mean is a sum of probabilities times values; the absolute values add up to less than the standard deviation plus
    the mean. `exact` may be left out where the moments know it, as those of gradients do.
    """
    exact = torch.as_tensor(moments.exact if exact is None else exact)
    error = (torch.as_tensor(moments.mean) - exact).norm()
    return bool(error < 2 * gamma(2**16) * (math.sqrt(max(moments.variance, 0)) + exact.norm()))


def assert_within(value: Tensor, exact: Tensor, tolerance: Tensor):
    "Every element within its own tolerance; what is not finite must be the same"
    value, exact = value.detach().double(), exact.detach().double()
    assert value.shape == exact.shape, (value.shape, exact.shape)
    finite = exact.isfinite()
    assert_close(value[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True)
    error, tolerance = (value - exact).abs()[finite], tolerance.expand_as(exact)[finite]
    wrong = ~(error <= tolerance)
    worst = (error / tolerance)[wrong].tolist()
    assert not worst, f"{len(worst)} of {len(error)} elements off by up to {max(worst):.3g} tolerances"


class StepKL(NamedTuple):
    "Of each step: the KL, (..., ), and its gradients in both logits, (..., V); or what each may be off by"
    kl: Tensor
    policy_grad: Tensor
    ref_grad: Tensor


def exact_step_kl(policy_logits: Tensor, ref_logits: Tensor) -> StepKL:
    "The textbook form in float64; a step that is not finite has no gradient"
    logp, logq = (o.detach().double().log_softmax(-1) for o in (policy_logits, ref_logits))
    p, q = logp.exp(), logq.exp()
    d = torch.where(p > 0, logp - logq, 0.0)
    kl = (p * d).sum(-1).masked_fill(p.isnan().any(-1) | q.isnan().any(-1), math.nan)
    no_gradient = ~kl.isfinite()[..., None]
    policy_grad = torch.where(p > 0, p * (d - kl[..., None]), 0.0)
    return StepKL(kl, policy_grad.masked_fill(no_gradient, 0.0), (q - p).masked_fill(no_gradient, 0.0))


def step_kl_error(policy_logits: Tensor, ref_logits: Tensor, dtype: torch.dtype,
                  policy_error: Tensor | float = 0.0, ref_error: Tensor | float = 0.0) -> StepKL:
    """What `step_kl` and the textbook may be off by: eq. 7 of 01_steps with a first-order error at each operation.

    `dtype` is the one in which the sums are made; the two `_error` are those of the logits, where they are products.
    """
    a, b = policy_logits.detach().double(), ref_logits.detach().double()
    u, terms = unit(dtype), a.shape[-1]
    top_p, top_q = (o.amax(-1, True) for o in (a, b))
    none = (a == -math.inf) | (b == -math.inf)  # p = 0, or the KL is infinite
    x, x_ref = (a - top_p).masked_fill(a == -math.inf, 0.0), (b - top_q).masked_fill(b == -math.inf, 0.0)
    apart = (a - b).masked_fill(none, 0.0)
    delta = apart - (top_p - top_q).masked_fill(none, 0.0)
    p, q = (a - top_p).exp(), (b - top_q).exp()
    of_p = u * (x.abs() + FUNCTION) + policy_error  # relative errors
    of_q = u * (x_ref.abs() + FUNCTION) + ref_error
    of_delta = u * (apart.abs() + (top_p - top_q).abs() + delta.abs()) + policy_error + ref_error
    near = (delta.abs() < 0.5) & ~none
    term = torch.where(near, p * (torch.expm1(-delta) + delta), q - p + p * delta)
    by_series = (of_p + FUSED * u) * term
    by_parts = q * of_q + p * of_p * (1 + delta.abs()) + FUSED * u * (q + p * (1 + delta.abs()))
    of_term = (q - p).abs() * of_delta + torch.where(near, by_series, by_parts)

    total = lambda o: o.sum(-1, True)
    zp, zq, m, s = total(p), total(q), -total(p * delta), total(term)
    sums = gamma(terms, dtype)
    of_zp, of_zq = sums + total(p * of_p) / zp, sums + total(q * of_q) / zq
    of_m = (sums * total((p * delta).abs()) + total((p * delta).abs() * (of_p + u) + p * of_delta)) / zp
    of_s = (sums * s + total(of_term)) / zp
    y, s, m = zq / zp - 1, s / zp, m / zp
    of_y = of_m + of_s + y.abs() * of_zp
    small = y.abs() < 0.5
    of_ratio = torch.where(small, of_y / (1 + y), of_zp + of_zq)
    of_kl = torch.where(small, of_s + s * of_zp + (y / (1 + y)).abs() * of_y, of_zp * (1 + m.abs()) + of_zq + of_m)
    ratio = (zq / zp).log()
    kl, d, P, Q = (ratio - m).clamp(min=0), delta + ratio, p / zp, q / zq
    of_kl = of_kl + u * kl
    of_policy = P * ((of_p + of_zp + FUSED * u) * (d - kl).abs() + of_delta + of_ratio + of_kl
                     + FUSED * u * (delta.abs() + (ratio - kl).abs()))
    logs = [u * (o + t).abs() for o, t in ((zp.log(), top_p), (zq.log(), top_q))]
    of_p, of_q, of_d = of_p + of_zp + logs[0], of_q + of_zq + logs[1], of_delta + of_ratio + u * (ratio.abs() + d.abs())
    by_parts = Q * of_q + P * of_p + u * (Q - P).abs()
    by_series = (Q - P).abs() * (of_p + FUSED * u) + Q * of_d
    of_ref = torch.where(d.abs() < 0.6, torch.maximum(by_series, by_parts * (d.abs() > 0.4)), by_parts)
    textbook = gamma(terms) * total((P * (P.log().abs() + Q.log().abs())).nan_to_num(0.0, 0.0))
    least = torch.finfo(dtype).tiny  # below it a float has fewer digits, or is 0
    error = StepKL(of_kl + textbook, of_policy + textbook * (P + Q), of_ref + textbook * (P + Q))
    kl, *grads = (o.nan_to_num(nan=0.0) + terms * least for o in error)
    return StepKL(kl.squeeze(-1), *grads)
