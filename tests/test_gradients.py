"""Gradients: exact bias by enumeration, the surrogate against loops, and bad input."""

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st

import klrb.gradients as gradients
from klrb.exact import (
    TabularLM,
    enumerate_rollouts,
    exact_gradient_moments,
    exact_kl_gradient,
)
from klrb.gradients import GRADIENTS, kl_baseline, kl_surrogate
from klrb.steps import k1, k2, k3, step_divergence, step_kl, step_kl_topk, topk_tail
from rounding import agree, assert_within, gamma, unbiased, unit

fast = settings(max_examples=40, deadline=None, derandomize=True)
UNBIASED = [m for m, o in GRADIENTS.items() if o.unbiased]
BIASED = [m for m, o in GRADIENTS.items() if not o.unbiased]
MODELS = [(v, t, s) for v, t in itertools.product((2, 3, 4), (2, 3, 4, 5)) for s in (0, 1)]
SMALL = [
    (v, t, s)
    for v, t, n in ((2, 2, 6), (2, 3, 5), (2, 4, 3), (2, 5, 2), (3, 2, 4), (3, 3, 2), (4, 2, 3))
    for s in range(n)
]


@pytest.fixture(autouse=True)
def forget_warning():
    gradients._warn_single.cache_clear()


def triple(vocab_size, max_length, seed=0):
    return tuple(
        TabularLM(vocab_size, max_length, seed=seed + 1000 * i) for i in range(3)
    )  # policy, reference, sampler


def surrogate_of(method, baseline=None, k=1, off_policy=False, **kwargs):
    def surrogate(r):
        tail = topk_tail(r.policy_logits.topk(k).indices, r.completion_ids)
        step = (
            step_kl_topk(r.policy_logits, r.ref_logits, r.completion_ids, k)
            if method == "rb_topk"
            else step_kl(r.policy_logits, r.ref_logits)
        )
        b = baseline(r) if callable(baseline) else baseline
        return kl_surrogate(
            method,
            r.policy_logprobs,
            r.ref_logprobs,
            r.mask,
            step,
            baseline=b,
            prompt_ids=r.prompt_ids,
            in_tail=tail,
            old_logprobs=r.old_logprobs if off_policy else None,
            **kwargs,
        )

    return surrogate


def batch(seed=0, B=6, T=5, V=7, dtype=torch.float64, mask=None):
    "A policy with one logit vector per position, so that a gradient has somewhere to go."
    gen = torch.Generator().manual_seed(seed)
    policy_logits, ref_logits, old_logits = torch.randn(
        3, B, T, V, generator=gen, dtype=torch.float64
    ).to(dtype)
    ids = torch.randint(V, (B, T), generator=gen)
    if mask is None:
        mask = (torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=gen)).long()
    return dict(
        policy_logits=policy_logits.requires_grad_(),
        ref_logits=ref_logits,
        old_logits=old_logits,
        ids=ids,
        mask=mask,
    )


def surrogate(method, x, k=2, off_policy=False, **kwargs):
    logp, logq, old = (
        x[o].log_softmax(-1).gather(-1, x["ids"][..., None])[..., 0]
        for o in ("policy_logits", "ref_logits", "old_logits")
    )
    step = (
        step_kl_topk(x["policy_logits"], x["ref_logits"], x["ids"], k)
        if method == "rb_topk"
        else step_kl(x["policy_logits"], x["ref_logits"])
    )
    return kl_surrogate(
        method,
        logp,
        logq,
        x["mask"],
        step,
        in_tail=topk_tail(x["policy_logits"].topk(k).indices, x["ids"]),
        old_logprobs=old if off_policy else None,
        **kwargs,
    )


def gradient(method, x, **kwargs):
    return torch.autograd.grad(surrogate(method, x, **kwargs), x["policy_logits"])[0]


@pytest.mark.parametrize("vocab_size,max_length,seed", MODELS)
def test_bias_of_one_rollout(vocab_size, max_length, seed):
    policy, reference, old = triple(vocab_size, max_length, seed)
    position = torch.linspace(-1, 2, max_length, dtype=torch.float64)

    def fixed(r):  # any function of the position, however bad
        return position.expand(len(r), -1)

    for method in UNBIASED:
        for kwargs in (
            dict(),
            dict(baseline=fixed),
            dict(off_policy=True),
            dict(off_policy=True, baseline=fixed),
        ):
            m = exact_gradient_moments(
                surrogate_of(method, **kwargs),
                policy,
                reference,
                sampler=old if "off_policy" in kwargs else None,
            )
            assert unbiased(m), (method, kwargs)
    for method in BIASED:
        assert (
            exact_gradient_moments(surrogate_of(method), policy, reference).relative_bias > 1e-3
        ), method


@pytest.mark.parametrize("vocab_size,max_length,seed", SMALL)
def test_bias_with_leave_one_out(vocab_size, max_length, seed):
    "All ordered pairs of rollouts, with the leave-one-out baseline, on and off policy."
    policy, reference, old = triple(vocab_size, max_length, seed)
    for method in UNBIASED:
        for off_policy in (False, True):
            m = exact_gradient_moments(
                surrogate_of(method, "loo", off_policy=off_policy),
                policy,
                reference,
                2,
                old if off_policy else None,
            )
            assert unbiased(m), (method, off_policy)


def test_leave_one_out_in_groups_of_three():
    policy, reference, old = triple(2, 2)
    for method in UNBIASED:
        assert unbiased(exact_gradient_moments(surrogate_of(method, "loo"), policy, reference, 3))


@pytest.mark.parametrize("k", range(5))
def test_topk_of_every_size(k):
    policy, reference, old = triple(3, 3)
    for off_policy in (False, True):
        m = exact_gradient_moments(
            surrogate_of("rb_topk", k=k, off_policy=off_policy),
            policy,
            reference,
            sampler=old if off_policy else None,
        )
        assert unbiased(m)

    def plain(r):
        steps = step_kl_topk(r.policy_logits, r.ref_logits, r.completion_ids, k)
        return (steps * r.mask).sum(-1).mean()

    one = TabularLM(3, 1, seed=0), TabularLM(3, 1, seed=1)
    assert (exact_gradient_moments(plain, *one).relative_bias > 1e-3) == (k < 4)


@pytest.mark.parametrize("off_policy", [False, True])
def test_topk_joins_its_neighbours(off_policy):
    x = batch(0, V=6)
    for baseline in (None, "loo"):
        kwargs = dict(off_policy=off_policy, baseline=baseline)
        agree(gradient("rb_topk", x, k=6, **kwargs), gradient("rb", x, **kwargs))
        agree(gradient("rb_topk", x, k=0, **kwargs), gradient("mc_to_go", x, **kwargs))


def test_orientation_figures():
    "Total variances on two tokens and three steps, by enumeration, as the notebook prints them."
    policy, reference = TabularLM(2, 3, seed=0), TabularLM(2, 3, seed=1)
    variance = {
        m: exact_gradient_moments(surrogate_of(m), policy, reference).variance for m in GRADIENTS
    }
    expected = dict(mc=4.96, mc_to_go=2.89, rb_sequence=2.38, rb=0.82, rb_topk=2.61)
    for method, value in expected.items():
        assert abs(variance[method] - value) < 0.01
    bias = {
        m: exact_gradient_moments(surrogate_of(m), policy, reference).relative_bias for m in BIASED
    }
    for method, value in dict(step_loss=0.45, k2_loss=0.45, k1_loss=1.0, k3_loss=0.64).items():
        assert abs(bias[method] - value) < 0.01


def naive_weights(method, step, sampled, mask, tail):
    "Score weights by three loops."
    B, T = mask.shape
    out = torch.zeros(B, T, dtype=torch.float64)
    for i in range(B):
        for m in range(T):
            for n in range(T):
                if not mask[i, n]:
                    continue
                if method == "mc":
                    out[i, m] += sampled[i, n]
                elif method == "mc_to_go":
                    out[i, m] += sampled[i, n] if n >= m else 0
                elif method == "rb":
                    out[i, m] += step[i, n] if n > m else 0
                elif method == "rb_sequence":
                    out[i, m] += step[i, n]
                elif method == "rb_topk":
                    out[i, m] += (
                        step[i, n] if n > m else sampled[i, n] * tail[i, n] if n == m else 0
                    )
    return out


@pytest.mark.parametrize("method", UNBIASED)
@pytest.mark.parametrize("seed", range(3))
def test_surrogate_and_baseline_against_loops(method, seed):
    x = batch(seed, B=7, mask=torch.ones(7, 5).long().tril(3) if seed == 2 else None)
    prompts = torch.tensor([4, 4, 4, 9, 9, 9, 9])
    x["mask"][5] = 0  # a rollout without a step says nothing
    logp, logq = (
        x[o].log_softmax(-1).gather(-1, x["ids"][..., None])[..., 0]
        for o in ("policy_logits", "ref_logits")
    )
    tail = topk_tail(x["policy_logits"].topk(2).indices, x["ids"])
    step = (
        step_kl_topk(x["policy_logits"], x["ref_logits"], x["ids"], 2)
        if method == "rb_topk"
        else step_kl(x["policy_logits"], x["ref_logits"])
    )
    mask = x["mask"].bool()
    weights = naive_weights(method, step.detach(), (logp - logq).detach(), mask, tail)
    baseline = torch.zeros_like(weights)
    for i in range(7):
        others = [j for j in range(7) if j != i and prompts[j] == prompts[i] and mask[j].any()]
        baseline[i] = weights[others].mean(0)
    agree(kl_baseline(method, logp, logq, x["mask"], step, prompts, tail), baseline)
    total = torch.where(mask, logp * (weights - baseline).detach(), 0.0).sum()
    if method.startswith("rb"):
        total = total + torch.where(mask, step, 0.0).sum()
    by_hand = torch.autograd.grad(total / 7, x["policy_logits"])[0]
    agree(gradient(method, x, prompt_ids=prompts), by_hand)


@pytest.mark.parametrize("method,step_form", [("k1_loss", k1), ("k2_loss", k2), ("k3_loss", k3)])
def test_losses_against_autograd(method, step_form):
    x = batch(0)
    logp, logq = (
        x[o].log_softmax(-1).gather(-1, x["ids"][..., None])[..., 0]
        for o in ("policy_logits", "ref_logits")
    )
    by_hand = torch.autograd.grad(
        (step_form(logp, logq) * x["mask"]).sum() / 6, x["policy_logits"]
    )[0]
    agree(gradient(method, x), by_hand)


@pytest.mark.parametrize("method", [m for m, o in GRADIENTS.items() if o.has_score])
def test_precomputed_baseline_over_micro_batches(method):
    "A trainer may split a prompt's rollouts: baseline of the whole batch, then any split."
    x = batch(3, B=8)
    prompts = torch.tensor([0, 1, 0, 1, 2, 2, 0, 1])
    logp, logq = (
        x[o].log_softmax(-1).gather(-1, x["ids"][..., None])[..., 0].detach()
        for o in ("policy_logits", "ref_logits")
    )
    step = (
        step_kl_topk(x["policy_logits"], x["ref_logits"], x["ids"], 2)
        if method == "rb_topk"
        else step_kl(x["policy_logits"], x["ref_logits"])
    ).detach()
    tail = topk_tail(x["policy_logits"].topk(2).indices, x["ids"])
    baseline = kl_baseline(method, logp, logq, x["mask"], step, prompts, tail)
    assert not baseline.requires_grad and baseline.shape == (8, 5)
    if method in ("mc", "rb_sequence"):
        agree(baseline, baseline[:, :1].expand(8, 5))
    for off_policy in (False, True) if GRADIENTS[method].unbiased else (False,):
        whole = gradient(method, x, prompt_ids=prompts, off_policy=off_policy)
        agree(gradient(method, x, baseline=baseline, off_policy=off_policy), whole)
        parts = torch.zeros_like(whole)
        for rows in (slice(0, 3), slice(3, 8)):
            part = {k: v[rows].detach().requires_grad_(k == "policy_logits") for k, v in x.items()}
            parts[rows] = (
                gradient(method, part, baseline=baseline[rows], off_policy=off_policy)
                * len(part["ids"])
                / 8
            )
        agree(parts, whole)


@pytest.mark.parametrize("method", UNBIASED)
def test_value_is_the_estimate(method):
    x = batch(4)
    logp, logq = (
        x[o].log_softmax(-1).gather(-1, x["ids"][..., None])[..., 0]
        for o in ("policy_logits", "ref_logits")
    )
    values = dict(
        mc=k1(logp, logq),
        mc_to_go=k1(logp, logq),
        rb_topk=step_kl_topk(x["policy_logits"], x["ref_logits"], x["ids"], 2),
    )
    steps = values.get(method, step_kl(x["policy_logits"], x["ref_logits"]))
    agree(surrogate(method, x).item(), (steps * x["mask"]).sum(-1).mean().item())


@pytest.mark.parametrize("method", UNBIASED)
def test_old_logprobs_of_the_policy_change_nothing(method):
    x = batch(5)
    x["old_logits"] = x["policy_logits"].detach()
    for baseline in (None, "loo"):
        agree(
            gradient(method, x, off_policy=True, baseline=baseline),
            gradient(method, x, baseline=baseline),
        )


def test_differentiable_ratios_are_the_rb_gradient():
    x = batch(6)
    logp, old = (
        x[o].log_softmax(-1).gather(-1, x["ids"][..., None])[..., 0]
        for o in ("policy_logits", "old_logits")
    )
    ratio = torch.where(x["mask"] == 1, logp - old.detach(), 0.0)
    before = (ratio.cumsum(1) - ratio).exp()
    by_hand = torch.autograd.grad(
        (before * step_kl(x["policy_logits"], x["ref_logits"]) * x["mask"]).sum() / 6,
        x["policy_logits"],
    )[0]
    agree(gradient("rb", x, off_policy=True, baseline=None), by_hand)


@pytest.mark.parametrize("method", UNBIASED)
def test_truncated_ratios(method):
    policy, reference, old = triple(2, 3)
    wide = exact_gradient_moments(
        surrogate_of(method, off_policy=True, max_ratio=1e9), policy, reference, sampler=old
    )
    tight = exact_gradient_moments(
        surrogate_of(method, off_policy=True, max_ratio=1.0), policy, reference, sampler=old
    )
    assert unbiased(wide) and tight.relative_bias > 1e-3 and tight.variance < wide.variance


def test_stale_tokens_that_the_policy_now_excludes():
    "Off-policy, a token of policy probability 0 ends the rollout's weight; it does not give NaN."
    policy, reference, old = triple(2, 3)
    with torch.no_grad():
        policy.table[0, 1] = -torch.inf
    for method in UNBIASED:
        m = exact_gradient_moments(
            surrogate_of(method, off_policy=True), policy, reference, sampler=old
        )
        assert m.mean.isfinite().all() and unbiased(m), method


@fast
@given(
    st.integers(0, 10**6),
    st.sampled_from(list(GRADIENTS)),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.booleans(),
)
def test_masked_positions_do_not_matter(seed, method, garbage, off_policy):
    x = batch(seed)
    masked = x["mask"] == 0
    logp, logq, old = (
        x[o].detach().log_softmax(-1).gather(-1, x["ids"][..., None])[..., 0]
        for o in ("policy_logits", "ref_logits", "old_logits")
    )
    old = old if off_policy and GRADIENTS[method].unbiased else None
    tail = topk_tail(x["policy_logits"].topk(2).indices, x["ids"])

    def gradients_of(fill, mask):
        policy_logits, ref_logits = (
            x[o].detach().masked_fill(masked[..., None], fill)
            for o in ("policy_logits", "ref_logits")
        )
        leaves = policy_logits.requires_grad_(), logp.masked_fill(masked, fill).requires_grad_()
        step = (
            step_kl_topk(policy_logits, ref_logits, x["ids"], 2)
            if method == "rb_topk"
            else step_kl(policy_logits, ref_logits)
        )
        others = [None if o is None else o.masked_fill(masked, fill) for o in (logq, old)]
        baseline = (
            torch.linspace(-1, 1, 5).expand(6, 5).masked_fill(masked, fill)
            if GRADIENTS[method].has_score and seed % 2
            else "loo"
        )
        kl_surrogate(
            method, leaves[1], others[0], mask, step, others[1], baseline=baseline, in_tail=tail
        ).backward()
        return [o.grad if o.grad is not None else torch.zeros(()) for o in leaves]

    clean = gradients_of(0.5, x["mask"])
    for mask in (x["mask"], x["mask"].bool(), x["mask"].float()):
        for dirty, g in zip(gradients_of(garbage, mask), clean):
            assert dirty.isfinite().all()
            agree(dirty, g)
            assert g.ndim == 0 or (g[masked] == 0).all()


@pytest.mark.filterwarnings("ignore:A prompt has a single rollout")
@fast
@given(
    st.integers(0, 10**6), st.sampled_from(list(GRADIENTS)), st.integers(2, 7), st.integers(1, 5)
)
def test_permutation_holes_and_empty_rollouts(seed, method, B, T):
    mask = (torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.6).long()
    mask[0, 0] = 1
    x = batch(seed, B=B, T=T, mask=mask)
    prompts = torch.arange(B) % 2
    g = gradient(method, x, prompt_ids=prompts)
    assert (g[mask.sum(-1) == 0] == 0).all()
    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    permuted = {k: v.detach()[order].requires_grad_(k == "policy_logits") for k, v in x.items()}
    agree(gradient(method, permuted, prompt_ids=prompts[order]), g[order])


@pytest.mark.parametrize("method", list(GRADIENTS))
def test_a_rollout_without_a_step_contributes_zero(method):
    x = batch(7, B=5)
    x["mask"][4] = 0
    g = gradient(method, x)
    rest = {k: v[:4].detach().requires_grad_(k == "policy_logits") for k, v in x.items()}
    agree(g[:4], gradient(method, rest) * 4 / 5)
    assert (g[4] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", UNBIASED)
def test_low_precision_inputs(dtype, method):
    x = batch(8, dtype=dtype)
    value = surrogate(method, x)
    assert value.dtype == torch.float32 and value.ndim == 0
    if method in ("rb", "rb_sequence"):
        assert value >= 0
    g = torch.autograd.grad(value, x["policy_logits"])[0]
    assert g.dtype == dtype and g.isfinite().all()
    wide = {
        k: v.detach().double().requires_grad_(k == "policy_logits") if v.is_floating_point() else v
        for k, v in x.items()
    }
    if dtype != torch.float32 and method == "rb_topk":
        return  # ties of half precision may choose another top set in float64
    logs = sum(
        x[o].detach().double().log_softmax(-1).gather(-1, x["ids"][..., None])[..., 0].abs()
        for o in ("policy_logits", "ref_logits")
    )
    size = (logs * x["mask"]).sum(-1).max() / len(
        logs
    )  # a weight is a sum of log-probabilities, itself and its baseline
    assert_within(g, gradient(method, wide), (6 * unit(dtype) + gamma(32, torch.float32)) * size)


@pytest.mark.parametrize("method", UNBIASED)
def test_excluded_tokens_give_finite_gradients(method):
    x = batch(9)
    x["ids"] = x["ids"] % 4
    with torch.no_grad():
        x["policy_logits"][..., 5] = x["ref_logits"][..., 5] = -math.inf  # both exclude
        x["policy_logits"][..., 6] = -math.inf  # only the policy does
    assert gradient(method, x).isfinite().all()


def test_single_rollouts_warn_once():
    x = batch(10, B=3)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            g = gradient("rb", x, prompt_ids=torch.tensor([0, 0, 1]))
    assert len(seen) == 1 and "single rollout" in str(seen[0].message)
    agree(g[2], gradient("rb", x, baseline=None)[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients._warn_single.cache_clear()
        gradient("rb", x, prompt_ids=torch.tensor([0, 0, 0]))


def test_nothing_flows_through_reference_or_baseline():
    x = batch(11)
    logp, logq = (
        x[o].log_softmax(-1).gather(-1, x["ids"][..., None])[..., 0]
        for o in ("policy_logits", "ref_logits")
    )
    logq.requires_grad_()
    baseline = torch.ones_like(logp, requires_grad=True)
    kl_surrogate(
        "rb", logp, logq, x["mask"], step_kl(x["policy_logits"], x["ref_logits"]), baseline=baseline
    ).backward()
    assert logq.grad is None and baseline.grad is None and x["policy_logits"].grad is not None


def test_what_code_can_query():
    assert UNBIASED == ["mc", "mc_to_go", "rb", "rb_sequence", "rb_topk"]
    assert BIASED == ["k1_loss", "k2_loss", "k3_loss", "step_loss", "vopd", "k3_reward"]
    assert all(name in kl_surrogate.__doc__ for name in BIASED)
    agree(
        exact_kl_gradient(*triple(2, 2)[:2]).sum(-1), torch.zeros(3).double()
    )  # logits have a null direction


def call(method="rb", B=2, T=3, **changes):
    args = (
        dict(
            policy_logprobs=torch.zeros(B, T),
            ref_logprobs=torch.zeros(B, T),
            mask=torch.ones(B, T),
            step_kl=torch.zeros(B, T),
        )
        | changes
    )
    return kl_surrogate(method, **args)


f, NAN = torch.zeros, torch.tensor([[0.0, 0, 0], [0, math.nan, 0]])
MINUS_INF = torch.tensor([[0.0, 0, 0], [0, 0, -math.inf]])


@pytest.mark.parametrize(
    "error,kwargs,message",
    [
        (ValueError, dict(method="k4"), "`method` is 'k4'; it must be one of mc, mc_to_go, rb,"),
        (ValueError, dict(step_kl=None), "`step_kl` is None; method 'rb'"),
        (ValueError, dict(method="rb_topk", step_kl=None), "step_kl_topk"),
        (ValueError, dict(method="rb_topk"), "`in_tail` is None"),
        (ValueError, dict(method="rb_topk", in_tail=f(2, 2)), "`in_tail` has shape"),
        (ValueError, dict(ref_logprobs=f(2, 4)), r"`ref_logprobs` has shape \(2, 4\)"),
        (ValueError, dict(step_kl=f(2)), "`step_kl` has shape"),
        (ValueError, dict(old_logprobs=f(3, 3)), "`old_logprobs` has shape"),
        (ValueError, dict(mask=f(2)), "`mask` has shape"),
        (ValueError, dict(mask=f(2, 3) - 1), "`mask` holds -1"),
        (ValueError, dict(mask=f(2, 3)), "0 everywhere"),
        (TypeError, dict(mask=[[1, 1, 1]] * 2), "`mask` is a list"),
        (ValueError, dict(B=0), "empty batch"),
        (
            TypeError,
            dict(policy_logprobs=f(2, 3).long()),
            "`policy_logprobs` has dtype torch.int64",
        ),
        (TypeError, dict(policy_logprobs=0.0), "`policy_logprobs` is a float"),
        (ValueError, dict(policy_logprobs=NAN), "`policy_logprobs` is NaN at rollout 1, step 1"),
        (ValueError, dict(step_kl=NAN), "`step_kl` is NaN at rollout 1, step 1"),
        (
            ValueError,
            dict(ref_logprobs=MINUS_INF),
            "`ref_logprobs` is -inf at rollout 1, step 2.*infinite",
        ),
        (ValueError, dict(step_kl=-MINUS_INF), "`step_kl` is inf at rollout 1, step 2.*infinite"),
        (ValueError, dict(policy_logprobs=MINUS_INF), "cannot have sampled this token"),
        (ValueError, dict(old_logprobs=MINUS_INF), "the sampler cannot have drawn"),
        (ValueError, dict(baseline="mean"), "`baseline` is 'mean'"),
        (ValueError, dict(baseline=1.0), "`baseline` is 1.0"),
        (ValueError, dict(baseline=f(2)), "`baseline` has shape"),
        (ValueError, dict(method="step_loss", baseline=f(2, 3)), "no score term"),
        (ValueError, dict(method="k3_reward", old_logprobs=f(2, 3)), "biased on-policy already"),
        (ValueError, dict(method="vopd", old_logprobs=f(2, 3)), "biased on-policy already"),
        (
            ValueError,
            dict(method="vopd", baseline=f(2, 3)),
            "exact KL of each step as its baseline",
        ),
        (ValueError, dict(method="vopd", step_kl=None), "`step_kl` is None; method 'vopd'"),
        (ValueError, dict(method="vopd", discount=0.5), "must be 1 for method 'vopd'"),
        (ValueError, dict(method="mc", discount=0), "must be 1 for method 'mc', and below 1 only"),
        (
            ValueError,
            dict(method="rb_sequence", discount=0.9),
            "must be 1 for method 'rb_sequence'",
        ),
        (ValueError, dict(method="k2_loss", discount=0.0), "must be 1 for method 'k2_loss'"),
        (ValueError, dict(discount=-0.1), "`discount` is -0.1; it must be a number from 0 to 1"),
        (ValueError, dict(discount=1.1), "`discount` is 1.1; it must be a number from 0 to 1"),
        (ValueError, dict(discount=math.nan), "`discount` is nan"),
        (ValueError, dict(discount=None), "`discount` is None"),
        (ValueError, dict(discount=True), "`discount` is True"),
        (ValueError, dict(discount="1"), "`discount` is '1'"),
        (ValueError, dict(max_ratio=2.0), "`max_ratio` is 2.0"),
        (ValueError, dict(max_ratio=0.0, old_logprobs=f(2, 3)), "`max_ratio` is 0.0"),
        (ValueError, dict(prompt_ids=f(3).long()), "`prompt_ids` has shape"),
        (TypeError, dict(prompt_ids=f(2)), "`prompt_ids` must be an integer tensor"),
    ],
)
def test_bad_input(error, kwargs, message):
    with pytest.raises(error, match=message):
        call(**kwargs)


def test_baseline_of_a_method_without_score():
    with pytest.raises(ValueError, match="no score term"):
        kl_baseline("k2_loss", f(2, 3), f(2, 3), f(2, 3) + 1)
    with pytest.raises(ValueError, match="takes no other"):
        kl_baseline("vopd", f(2, 3), f(2, 3), f(2, 3) + 1, f(2, 3))
    with pytest.raises(ValueError, match="`discount` is 2"):
        kl_baseline("rb", f(2, 3), f(2, 3), f(2, 3) + 1, f(2, 3), discount=2)


def logprobs_of(x):
    "Of the drawn tokens, under policy and reference."
    every = (x[o].log_softmax(-1) for o in ("policy_logits", "ref_logits"))
    return [o.gather(-1, x["ids"][..., None])[..., 0] for o in every]


@pytest.mark.parametrize("seed", range(3))
def test_vopd_against_a_loop(seed):
    x = batch(seed)
    logp, logq = logprobs_of(x)
    p = x["policy_logits"].softmax(-1)
    total, value = 0.0, 0.0
    for i, n in x["mask"].nonzero().tolist():
        apart = x["policy_logits"][i, n].log_softmax(-1) - x["ref_logits"][i, n].log_softmax(-1)
        exact = (p[i, n] * apart).sum().detach()
        total = total + logp[i, n] * ((logp - logq)[i, n].detach() - exact)
        value += exact / 6
    agree(surrogate("vopd", x).item(), value.item())
    by_hand = torch.autograd.grad(total / 6, x["policy_logits"], retain_graph=True)[0]
    agree(gradient("vopd", x), by_hand)
    agree(gradient("vopd", x, baseline=None), gradient("vopd", x, baseline="loo"))
    step = torch.ones(6, 5, dtype=torch.float64, requires_grad=True)
    kl_surrogate("vopd", logp, logq, x["mask"], step).backward()
    assert step.grad is None  # the baseline is detached


@pytest.mark.parametrize("vocab_size,max_length,seed", SMALL[::3])
def test_distillation_gradients(vocab_size, max_length, seed):
    """Which gradients of the KL(student || teacher) are right, and the common mean of those of
    each token's own step."""
    student, teacher, _ = triple(vocab_size, max_length, seed)
    forms = {m: surrogate_of(m) for m in (*UNBIASED, "step_loss", "k2_loss", "vopd")}
    forms |= {f"{m} 0": surrogate_of(m, discount=0.0) for m in ("mc_to_go", "rb", "rb_topk")}
    forms["reward"] = lambda r: (  # the exact KL in the reward of its own step
        (r.policy_logprobs * step_kl(r.policy_logits, r.ref_logits).detach() * r.mask).sum(-1)
    ).mean()
    found = {m: exact_gradient_moments(form, student, teacher) for m, form in forms.items()}
    size = found["rb"].exact.norm().item()
    for method in UNBIASED:
        assert (found[method].mean - found[method].exact).norm() < 1e-10
        assert unbiased(found[method])
    for method in ("k2_loss", "vopd", "mc_to_go 0", "rb 0", "rb_topk 0"):
        agree(found[method].mean, found["step_loss"].mean)
        assert (found[method].mean - found[method].exact).norm() > 1e-3 * size
    agree(found["reward"].mean, torch.zeros_like(student.table))
    agree(found["rb 0"].variance, found["step_loss"].variance)
    agree(found["mc_to_go 0"].variance, found["k2_loss"].variance)


def discounted(student, teacher, discount):
    "The mean gradient, from the score of each step's past times its exact KL, by autograd."
    r = enumerate_rollouts(student, teacher)
    exact = step_kl(r.policy_logits, r.ref_logits) * r.mask
    logp = r.policy_logprobs * r.mask
    total = 0.0
    for n in range(r.mask.shape[1]):
        past = sum(discount ** (n - m) * logp[:, m] for m in range(n))
        total = total + (r.prob * (exact[:, n] + past * exact[:, n].detach())).sum()
    return torch.autograd.grad(total, student.table)[0]


@pytest.mark.parametrize("method", ["mc_to_go", "rb", "rb_topk"])
@pytest.mark.parametrize("discount", [0.0, 0.3, 0.95, 1])
def test_discount(method, discount):
    "On and off policy, with and without baseline: one mean, which has no bias at 1."
    student, teacher, old = triple(2, 3)
    wanted = discounted(student, teacher, discount)
    exact = exact_kl_gradient(student, teacher)
    assert ((wanted - exact).norm() < 1e-3 * exact.norm()) == (discount == 1)
    for off_policy, baseline, size in itertools.product((False, True), (None, "loo"), (1, 2)):
        if (baseline is None) != (size == 1):
            continue
        form = surrogate_of(method, baseline, off_policy=off_policy, discount=discount)
        m = exact_gradient_moments(form, student, teacher, size, old if off_policy else None)
        agree(m.mean, wanted, terms=2**16, size=1 + m.variance**0.5)


@pytest.mark.parametrize("method", ["mc_to_go", "rb", "rb_topk"])
@pytest.mark.parametrize("discount", [0, 0.5, 1.0])
def test_discounted_weights_against_loops(method, discount):
    x = batch(2, B=7)
    logp, logq = (o.detach() for o in logprobs_of(x))
    tail = topk_tail(x["policy_logits"].topk(2).indices, x["ids"])
    whole = step_kl(x["policy_logits"], x["ref_logits"])
    top = step_kl_topk(x["policy_logits"], x["ref_logits"], x["ids"], 2)
    step = (top if method == "rb_topk" else whole).detach()
    weights = torch.zeros_like(logp)
    for i, m in itertools.product(range(7), range(5)):
        for n in range(m, 5):
            later = step[i, n] if n > m else tail[i, n] * (logp - logq)[i, n] * (method != "rb")
            part = (logp - logq)[i, n] if method == "mc_to_go" else later
            weights[i, m] += (discount ** (n - m) if n > m else 1) * part * x["mask"][i, n]
    baseline = (weights.sum(0) - weights) / 6
    args = method, logp, logq, x["mask"], step, None, tail
    agree(kl_baseline(*args, discount=discount), baseline)
    by_loo = gradient(method, x, discount=discount)
    agree(gradient(method, x, discount=discount, baseline=baseline), by_loo)


def test_discounts_at_the_ends():
    "Sample by sample: without a discount nothing changes, and at 0 only the own step is left."
    x = batch(3)
    for method in ("mc_to_go", "rb", "rb_topk"):
        assert (gradient(method, x, discount=1) == gradient(method, x)).all()
        agree(surrogate(method, x, discount=0.5).item(), surrogate(method, x).item())
    agree(gradient("mc_to_go", x, discount=0, baseline=None), gradient("k2_loss", x))
    agree(gradient("rb", x, discount=0), gradient("step_loss", x))


def weighted(r):
    "Forward and reverse KL of each step, by the teacher's entropy."
    logq = r.ref_logits.log_softmax(-1)
    weight = -(logq.exp() * logq).sum(-1) / math.log(r.ref_logits.shape[-1])
    forward, reverse = (
        step_kl(r.ref_logits, r.policy_logits),
        step_kl(r.policy_logits, r.ref_logits),
    )
    return weight * forward + (1 - weight) * reverse


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon", "chi_square", weighted])
@pytest.mark.parametrize("off_policy", [False, True])
def test_the_score_of_any_divergence_of_the_steps(divergence, off_policy):
    "`rb` follows the expected sum of whatever is passed as `step_kl`; the step loss does not."
    student, teacher, old = triple(2, 3)

    def steps(r):
        if callable(divergence):
            return divergence(r)
        return step_divergence(divergence, r.policy_logits, r.ref_logits)

    def form(r, method):
        old_logprobs = r.old_logprobs if off_policy else None
        args = method, r.policy_logprobs, r.ref_logprobs, r.mask, steps(r), old_logprobs
        return kl_surrogate(*args, prompt_ids=r.prompt_ids)

    r = enumerate_rollouts(student, teacher)
    probability = (r.policy_logprobs * r.mask).sum(-1).exp()
    total = (probability * (steps(r) * r.mask).sum(-1)).sum()
    wanted = torch.autograd.grad(total, student.table)[0]
    sampler = old if off_policy else None
    m = exact_gradient_moments(lambda r: form(r, "rb"), student, teacher, 2, sampler)
    agree(m.mean, wanted, terms=2**16, size=1 + m.variance**0.5)
    if not off_policy:
        m = exact_gradient_moments(lambda r: form(r, "step_loss"), student, teacher)
        assert (m.mean - wanted).norm() > 0.1 * wanted.norm()
