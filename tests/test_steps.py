"""One step: against naive float64 formulas, limits written out by hand, and enumeration."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import FUNCTION, agree, assert_within, exact_step_kl, gamma, step_kl_error, unit

from klrb.exact import TabularLM, enumerate_rollouts, exact_kl, exact_moments
from klrb.steps import (
    DIVERGENCES,
    FDivergence,
    check_batch,
    k1,
    k2,
    k3,
    step_divergence,
    step_kl,
    step_kl_from_topk,
    step_kl_topk,
    topk_tail,
)

INF = math.inf
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
fast = settings(max_examples=60, deadline=None, derandomize=True)


def logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    return (
        scale
        * torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ).to(dtype)


def naive_kl(policy_logits, ref_logits):
    "Term by term in float64, with the limits of the support written out."
    p, q = policy_logits.double().softmax(-1), ref_logits.double().softmax(-1)
    total = 0.0
    for a, b in zip(p.tolist(), q.tolist()):
        if a > 0:
            total += INF if b == 0 else a * (math.log(a) - math.log(b))
    return total


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (4, 1, 300)])
@pytest.mark.parametrize("seed", [0, 1])
def test_step_kl_against_float64(dtype, shape, seed):
    a, b = logits(*shape, seed=seed, dtype=dtype)
    value = step_kl(a, b)
    assert value.shape == shape[:2]
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_within(value, exact_step_kl(a, b).kl, step_kl_error(a, b, value.dtype).kl)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("distance", [0.0, 1e-6, 1e-3, 1.0])
def test_never_negative_and_zero_for_equal_models(dtype, distance):
    b = logits(8, 16, 1000, seed=3)[0].to(dtype)
    noise = torch.randn(b.shape, generator=torch.Generator().manual_seed(4))
    a = (b.float() + distance * noise).to(dtype)
    value = step_kl(a, b)
    assert (value >= 0).all()
    assert (step_kl(b, b) == 0).all()
    wide = step_kl(b.float() + distance * noise, b.float())  # close and still not rounded away
    assert (wide >= 0).all() and (distance == 0 or (wide > 0).all())
    pair = b.float() + distance * noise, b.float()
    assert_within(wide, exact_step_kl(*pair).kl, step_kl_error(*pair, torch.float32).kl)


def test_relative_accuracy_when_models_nearly_agree():
    b = 2 * torch.randn(10, 50257, generator=torch.Generator().manual_seed(0))
    a = b + 1e-4 * torch.randn(10, 50257, generator=torch.Generator().manual_seed(1))
    truth, tolerance = exact_step_kl(a, b).kl, step_kl_error(a, b, torch.float32).kl
    textbook = (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)
    assert truth.max() < 1e-8
    assert_within(step_kl(a, b), truth, tolerance)
    assert ((textbook - truth).abs() / tolerance).median() > 10  # so that the test can fail


@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_autograd_of_the_textbook_form(seed):
    a, b = (o.clone().requires_grad_() for o in logits(2, 3, 6, seed=seed))
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    weights = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    naive = torch.autograd.grad((weights * (p.exp() * (p - q)).sum(-1)).sum(), (a, b))
    ours = torch.autograd.grad((weights * step_kl(a, b)).sum(), (a, b))
    agree(ours, naive)
    assert torch.autograd.gradcheck(step_kl, (a, b))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_more_rows_than_one_chunk(dtype):
    "Large batches are worked through in pieces: values and gradients must not know."
    a, b = logits(3, 250, 900, seed=5)
    a[1, 7, 3] = -INF
    weights = torch.randn(3, 250, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    x, y = (o.to(dtype).requires_grad_() for o in (a, b))
    value = step_kl(x, y)
    exact, error = exact_step_kl(x, y), step_kl_error(x, y, dtype)
    assert_within(value, exact.kl, error.kl)
    weights = weights.to(dtype)
    grads = torch.autograd.grad((weights * value).sum(), (x, y))
    for found, truth, tolerance in zip(grads, exact[1:], error[1:]):
        assert_within(
            found,
            weights[..., None].double() * truth,
            weights[..., None].double().abs() * tolerance,
        )
    transposed = step_kl(x.transpose(0, 1), y.transpose(0, 1))  # not contiguous
    assert_within(transposed, exact.kl.T, error.kl.T)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (5,), (2, 5)])
def test_any_leading_shape(shape):
    x = torch.zeros(shape, requires_grad=True)
    step_kl(x, torch.ones(shape)).sum().backward()
    assert step_kl(x, x).shape == shape[:-1] and x.grad.shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("big", [60.0, 1e4, 3e38])
def test_extreme_logits(dtype, big):
    rows = torch.tensor(
        [[big, 0.0, -big], [-big, 0.0, big], [0.0, 0.0, 0.0], [big, big, -big]], dtype=dtype
    )
    for a in rows:
        for b in rows:
            x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
            value = step_kl(x, y)
            assert value >= 0 and not value.isnan()
            if value.isfinite():
                value.backward()
                assert x.grad.isfinite().all() and y.grad.isfinite().all()


patterns = st.tuples(
    st.lists(st.sampled_from([0.0, 1.0, -2.0, 5.0, -INF]), min_size=4, max_size=4),
    st.lists(st.sampled_from([0.0, 1.0, -2.0, 5.0, -INF]), min_size=4, max_size=4),
).filter(lambda o: max(o[0]) > -INF and max(o[1]) > -INF)


@fast
@given(patterns)
def test_support_rules(pattern):
    a, b = (torch.tensor(o, dtype=torch.float64, requires_grad=True) for o in pattern)
    value = step_kl(a, b)
    truth = naive_kl(a.detach(), b.detach())
    if truth == INF:
        assert value.item() == INF
        return
    agree(value.item(), truth)
    value.backward()
    assert a.grad.isfinite().all() and b.grad.isfinite().all()
    p, q = a.detach().softmax(-1), b.detach().softmax(-1)
    d = torch.where(p > 0, p.log() - q.log(), 0.0)
    agree(a.grad, torch.where(p > 0, p * (d - truth), 0.0))
    agree(b.grad, q - p)


@fast
@given(
    patterns, st.sampled_from([n for n in DIVERGENCES]), st.sampled_from([-1.0, 0.3, 0.5, 2.0, 3.0])
)
def test_divergences_against_generator_and_limits(pattern, name, alpha):
    a, b = (torch.tensor(o, dtype=torch.float64, requires_grad=True) for o in pattern)
    p, q = a.detach().softmax(-1), b.detach().softmax(-1)
    row, truth = DIVERGENCES[name], 0.0
    for x, y in zip(p, q):
        if x > 0 and y > 0:
            truth += (y * row.f(x / y, alpha)).item()
        elif y > 0:
            truth += y.item() * row.at_zero(alpha)
        elif x > 0:
            truth += x.item() * row.at_infinity(alpha)
    value = step_divergence(name, a, b, alpha)
    if truth == INF:
        assert value.item() == INF
    else:
        t = (p / q)[(p > 0) & (q > 0)]
        size = (
            1
            + (
                q[(p > 0) & (q > 0)]
                * (1 + t) ** max(2, abs(alpha))
                * (1 + t.log().abs() + t ** min(0, alpha))
            )
            .sum()
            .item()
        )
        agree(value.item(), truth, size=4 * size)  # what any generator adds and subtracts
        value.backward()
        assert a.grad.isfinite().all() and b.grad.isfinite().all()


def divergence_error(name, policy_logits, ref_logits):
    "What float32 may do to a divergence of close models: the log-ratio is off by `slip`."
    u, (a, b) = unit(torch.float32), (policy_logits.double(), ref_logits.double())
    logs = [o.log_softmax(-1) for o in (a, b)]
    of_logsumexp = [
        u * (o.logsumexp(-1, True).abs() + 2 * FUNCTION)
        + (gamma(o.shape[-1], torch.float32) + u * (log.abs().amax(-1, True)))
        for o, log in zip((a, b), logs)
    ]
    slip = sum(of_logsumexp) + 4 * u * (logs[0] - logs[1]).abs()
    q, d = logs[1].exp(), (logs[0] - logs[1]).abs()
    if name == "total_variation":
        return (q * slip).sum(-1)
    curvature = {
        "jensen_shannon": 0.25,
        "squared_hellinger": 0.5,
        "chi_square": 2.0,
        "jeffreys": 2.0,
    }.get(name, 1.0)
    return (
        1.1 * curvature * (q * (d * slip + 0.5 * slip**2 + FUNCTION * u * d**2)).sum(-1)
    )  # 1.1: higher orders, d < 0.01


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_divergence_gradients_and_accuracy(name):
    a, b = (o.clone().requires_grad_() for o in logits(2, 2, 5))
    assert torch.autograd.gradcheck(lambda x, y: step_divergence(name, x, y), (a, b))
    near = b.detach().float() + 1e-3 * torch.randn(
        2, 2, 5, generator=torch.Generator().manual_seed(0)
    )
    single, double = (
        step_divergence(name, near, b.detach().float()),
        step_divergence(name, near.double(), b.detach().float().double()),
    )
    assert (single >= 0).all()
    assert_within(single, double, divergence_error(name, near, b.detach().float()))
    assert (step_divergence(name, b, b) == 0).all()


def test_divergences_that_have_names_elsewhere():
    a, b = logits(3, 4, 6)
    p, q = a.softmax(-1), b.softmax(-1)
    m = (p + q) / 2
    agree(
        step_divergence("jensen_shannon", a, b),
        0.5 * ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)),
    )
    agree(step_divergence("total_variation", a, b), 0.5 * (p - q).abs().sum(-1))
    agree(step_divergence("chi_square", a, b), ((p - q) ** 2 / q).sum(-1))
    agree(step_divergence("jeffreys", a, b), step_kl(a, b) + step_kl(b, a))
    agree(step_divergence("forward_kl", a, b), step_kl(b, a))
    for alpha, other in (
        (1.0, step_kl(a, b)),
        (0.0, step_kl(b, a)),
        (2.0, 0.5 * step_divergence("chi_square", a, b)),
        (0.5, 2 * step_divergence("squared_hellinger", a, b)),
    ):
        agree(step_divergence("alpha", a, b, alpha), other)
    own = FDivergence(
        "triangular",
        lambda t, alpha: (t - 1) ** 2 / (t + 1),
        lambda alpha: 1.0,
        lambda alpha: 1.0,
        "none",
    )
    agree(step_divergence(own, a, b), ((p - q) ** 2 / (p + q)).sum(-1))


@pytest.mark.parametrize("seed", range(3))
def test_only_kl_has_the_chain_rule(seed):
    policy, reference = TabularLM(3, 3, seed=seed), TabularLM(3, 3, seed=seed + 50)
    r = enumerate_rollouts(policy, reference)
    logp, logq = ((o * r.mask).sum(-1).detach() for o in (r.policy_logprobs, r.ref_logprobs))
    for name, row in DIVERGENCES.items():
        whole = (logq.exp() * row.f((logp - logq).exp(), 0.5)).sum().item()
        steps = (
            (
                r.prob
                * (step_divergence(name, r.policy_logits, r.ref_logits) * r.mask).sum(-1).detach()
            )
            .sum()
            .item()
        )
        assert (abs(whole - steps) < gamma(2**12) * max(1, whole)) == (
            row.chain_rule == "policy"
        ), name


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_is_a_division_of_both_logits(temperature):
    a, b = logits(2, 3, 7)
    p, q = ((o / temperature).softmax(-1) for o in (a, b))
    agree(step_kl(a / temperature, b / temperature), (p * (p / q).log()).sum(-1))
    agree(step_kl(a + 3.0, b - 1.0), step_kl(a, b))  # a shift of all logits changes nothing


@fast
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4), st.integers(1, 9))
def test_shape_and_permutation(seed, B, T, V):
    a, b = logits(B, T, V, seed=seed)
    value = step_kl(a, b)
    assert value.shape == (B, T)
    gen = torch.Generator().manual_seed(seed)
    rows, tokens = torch.randperm(B, generator=gen), torch.randperm(V, generator=gen)
    agree(step_kl(a[rows], b[rows]), value[rows])
    agree(step_kl(a[..., tokens], b[..., tokens]), value)


@pytest.mark.parametrize("garbage", [math.nan, INF, -INF])
@pytest.mark.parametrize(
    "function",
    [
        step_kl,
        lambda a, b: step_divergence("jensen_shannon", a, b),
        lambda a, b: step_kl_topk(a, b, torch.zeros(2, 3, dtype=torch.long), 2),
    ],
)
def test_garbage_stays_in_its_step(garbage, function):
    a, b = logits(2, 3, 5)
    clean = function(a, b)
    x, y = a.clone(), b.clone()
    x[1, 2], y[0, 1] = garbage, garbage
    x.requires_grad_(), y.requires_grad_()
    value = function(x, y)
    bad = torch.zeros(2, 3, dtype=torch.bool)
    bad[1, 2] = bad[0, 1] = True
    assert value[bad].isnan().all()
    agree(value[~bad], clean[~bad])
    value.masked_fill(bad, 0.0).sum().backward()
    assert x.grad.isfinite().all() and y.grad.isfinite().all()


def test_sampled_estimators():
    a, b = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -0.5]])
    agree(k1(a, b), torch.tensor([[0.5, -1.5]]))
    agree(k2(a, b), torch.tensor([[0.125, 1.125]]))
    agree(k3(a, b), torch.tensor([[math.exp(-0.5) - 0.5, math.exp(1.5) - 2.5]]))
    assert k3(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    x = torch.logspace(-12, 1, 200, dtype=torch.float64)
    for sign in (
        1,
        -1,
    ):  # both branches and the joint between them; the float64 oracle loses digits below 1e-3
        value = k3(-sign * x[None], torch.zeros_like(x)[None])[0]

        def series(y):
            return torch.tensor(
                [math.fsum(o**k / math.factorial(k) for k in range(2, 60)) for o in y.tolist()],
                dtype=torch.float64,
            )

        size = torch.where(
            x < 0.0625, series(x), torch.expm1(x) + x
        )  # what is added and subtracted
        assert_within(value, series(sign * x), gamma(60) * series(x) + FUNCTION * gamma(2) * size)


MODELS = [(v, t, s) for v in (2, 3, 4) for t in (1, 2, 3) for s in (0, 1, 2)]


@pytest.mark.parametrize("vocab_size,max_length,seed", MODELS)
def test_step_values_are_unbiased(vocab_size, max_length, seed):
    policy, reference = (
        TabularLM(vocab_size, max_length, seed=seed),
        TabularLM(vocab_size, max_length, seed=seed + 1000),
    )
    exact = exact_kl(policy, reference).item()

    def total(f):
        return exact_moments(lambda r: (f(r) * r.mask).sum(-1), policy, reference).mean

    agree(total(lambda r: step_kl(r.policy_logits, r.ref_logits)), exact, size=10)
    agree(total(lambda r: k1(r.policy_logprobs, r.ref_logprobs)), exact, size=10)
    agree(total(lambda r: k3(r.policy_logprobs, r.ref_logprobs)), exact, size=10)
    assert abs(total(lambda r: k2(r.policy_logprobs, r.ref_logprobs)) - exact) > 1e-3
    for k in range(vocab_size + 2):
        agree(
            total(lambda r: step_kl_topk(r.policy_logits, r.ref_logits, r.completion_ids, k)),
            exact,
            size=10,
        )


def test_topk_ends_and_stored_form():
    a, b = logits(3, 4, 6)
    ids = torch.randint(6, (3, 4), generator=torch.Generator().manual_seed(0))
    logp, logq = a.log_softmax(-1), b.log_softmax(-1)
    at = [o.gather(-1, ids[..., None])[..., 0] for o in (logp, logq)]
    agree(step_kl_topk(a, b, ids, 0), k1(*at))
    agree(step_kl_topk(a, b, ids, 6), step_kl(a, b))
    for k in range(6):
        top = a.topk(k).indices
        stored = step_kl_from_topk(top, logp.gather(-1, top), logq.gather(-1, top), ids, *at)
        agree(stored, step_kl_topk(a, b, ids, k))
        by_hand = (
            sum(logp[0, 0, v].exp() * (logp[0, 0, v] - logq[0, 0, v]) for v in top[0, 0].tolist())
            if k
            else 0.0
        )
        if topk_tail(top, ids)[0, 0]:
            by_hand = by_hand + at[0][0, 0] - at[1][0, 0]
        agree(float(by_hand), stored[0, 0].item())


def test_topk_with_excluded_tokens():
    a, b = (
        torch.tensor([[[1.0, 0.0, -INF, -INF]]]).double(),
        torch.tensor([[[0.0, 1.0, 0.0, -INF]]]).double(),
    )
    for k in (2, 3):
        agree(
            step_kl_topk(a, b, torch.tensor([[0]]), k),
            torch.tensor([[naive_kl(a[0, 0], b[0, 0])]], dtype=torch.float64),
        )
    assert step_kl_topk(b, a, torch.tensor([[0]]), 3).item() == INF
    x = b.clone().requires_grad_()
    step_kl_topk(x, a, torch.tensor([[0]]), 3).masked_fill(
        torch.tensor([[True]]), 0.0
    ).sum().backward()
    assert x.grad.isfinite().all()


def test_unknown_token_ids_are_nan_and_stay_in_their_step():
    a, b = logits(2, 3, 5)
    ids = torch.zeros(2, 3, dtype=torch.long)
    padded = ids.clone()
    padded[0, 2], padded[1, 1] = -100, 7
    value, clean = step_kl_topk(a, b, padded, 2), step_kl_topk(a, b, ids, 2)
    assert value.isnan().nonzero().tolist() == [[0, 2], [1, 1]]
    agree(value[~value.isnan()], clean[~value.isnan()])


f = torch.zeros


@pytest.mark.parametrize(
    "error,call,message",
    [
        (
            ValueError,
            lambda: step_kl(f(2, 3, 5), f(2, 3, 6)),
            r"`ref_logits` has shape \(2, 3, 6\).*tokenizer",
        ),
        (ValueError, lambda: step_kl(f(()), f(())), r"must be \(B, T, V\)"),
        (ValueError, lambda: step_kl(f(2, 0), f(2, 0)), r"V of at least 1"),
        (
            TypeError,
            lambda: step_kl(f(2, 5).long(), f(2, 5).long()),
            "`policy_logits` has dtype torch.int64",
        ),
        (TypeError, lambda: step_kl([[0.0]], f(1, 1)), "`policy_logits` is a list"),
        (TypeError, lambda: step_kl(f(2, 3), f(2, 3).to(torch.float8_e5m2)), "at least 16 bits"),
        (ValueError, lambda: k1(f(2, 3), f(3, 2)), "`ref_logprobs`"),
        (TypeError, lambda: k3(f(2, 3), f(2, 3).int()), "`ref_logprobs` has dtype"),
        (
            ValueError,
            lambda: step_divergence("renyi", f(1, 1, 2), f(1, 1, 2)),
            "'renyi'.*total_variation",
        ),
        (ValueError, lambda: step_divergence("alpha", f(1, 1, 2), f(1, 1, 3)), "tokenizer"),
        (
            ValueError,
            lambda: step_kl_topk(f(1, 1, 4), f(1, 1, 4), f(1, 1).long(), 5),
            "`k` is 5.*4",
        ),
        (ValueError, lambda: step_kl_topk(f(1, 1, 4), f(1, 1, 4), f(1, 1).long(), -1), "`k` is -1"),
        (
            ValueError,
            lambda: step_kl_topk(f(1, 1, 4), f(1, 1, 4), f(1, 1).long(), 2.0),
            "`k` is 2.0",
        ),
        (
            ValueError,
            lambda: step_kl_topk(f(1, 1, 4), f(1, 1, 4), f(1, 2).long(), 2),
            "`completion_ids` has shape",
        ),
        (
            TypeError,
            lambda: step_kl_topk(f(1, 1, 4), f(1, 1, 4), f(1, 1), 2),
            "`completion_ids` has dtype",
        ),
        (ValueError, lambda: topk_tail(f(1, 2, 4), f(1, 3)), "`topk_ids` has shape"),
        (
            ValueError,
            lambda: step_kl_from_topk(
                f(1, 1, 3).long(), f(1, 1, 2), f(1, 1, 2), f(1, 1).long(), f(1, 1), f(1, 1)
            ),
            "`topk_ids` has shape",
        ),
        (ValueError, lambda: check_batch(f(2, 3), policy_logprobs=f(2, 2)), "`mask` has shape"),
        (ValueError, lambda: check_batch(f(2), policy_logprobs=f(2)), r"must be \(B, T\)"),
        (ValueError, lambda: check_batch(f(0, 3), policy_logprobs=f(0, 3)), "empty batch"),
        (ValueError, lambda: check_batch(f(2, 3), policy_logprobs=f(2, 3)), "0 everywhere"),
        (ValueError, lambda: check_batch(2 + f(2, 3), policy_logprobs=f(2, 3)), "`mask` holds 2"),
        (TypeError, lambda: check_batch([[1]], policy_logprobs=f(1, 1)), "`mask` is a list"),
    ],
)
def test_bad_input(error, call, message):
    with pytest.raises(error, match=message):
        call()


MEMORY = """
import ctypes, torch
from klrb.steps import step_kl

def status(key):
    return int(next(o for o in open("/proc/self/status") if o.startswith(key)).split()[1]) / 1024

torch.set_num_threads(1)
a = torch.randn(512, 151936).requires_grad_()
b = a.detach() + 0.1
for _ in range(3):  # the first one compiles
    a.grad = None
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    step_kl(a, b).sum().backward()
print(status("VmHWM") - before - a.grad.nbytes / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory, as Linux has it")
def test_the_memory_of_a_chunk_is_used_again_for_the_next():
    "Ten chunks of at most 32 MiB: two may be resident, where compiled code has a temporary."
    run = [sys.executable, "-c", MEMORY]
    env = {o: v for o, v in os.environ.items() if not o.startswith("MALLOC_")}
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2 * 32
