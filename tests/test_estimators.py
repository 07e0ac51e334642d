"""Values: exact bias by enumeration, and small cases worked by hand."""

import itertools
import math
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats

import klrb.estimators as estimators
from klrb import intervals
from klrb.estimators import ESTIMATORS, KLEstimate, kl_estimate
from klrb.exact import MarkovLM, TabularLM, enumerate_rollouts, exact_kl, exact_moments, markov_kl
from klrb.steps import step_kl
from rounding import agree, gamma, unbiased

fast = settings(max_examples=40, deadline=None, derandomize=True)
MODELS = [(v, t, s) for v, t in itertools.product((2, 3, 4), (2, 3, 4, 5)) for s in (0, 1)]
GROUPED = ("cv_fitted", "ht", "rb_cv")


def pair(vocab_size, max_length, seed=0):
    return TabularLM(vocab_size, max_length, seed=seed), TabularLM(
        vocab_size, max_length, seed=seed + 1000
    )


def estimate(method, r, **kwargs):
    return kl_estimate(
        method,
        r.policy_logprobs,
        r.ref_logprobs,
        r.mask,
        step_kl(r.policy_logits, r.ref_logits),
        completion_ids=r.completion_ids,
        **kwargs,
    )


def batch(seed=0, B=6, T=5, V=7, dtype=torch.float64):
    "Random tensors that belong together: tokens, log-probabilities, step KLs, mixed lengths."
    gen = torch.Generator().manual_seed(seed)
    policy_logits, ref_logits = torch.randn(2, B, T, V, generator=gen, dtype=torch.float64).to(
        dtype
    )
    ids = torch.randint(V, (B, T), generator=gen)
    policy_logprobs, ref_logprobs = (
        o.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        for o in (policy_logits, ref_logits)
    )
    mask = (torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=gen)).long()
    return dict(
        policy_logprobs=policy_logprobs,
        ref_logprobs=ref_logprobs,
        mask=mask,
        step_kl=step_kl(policy_logits, ref_logits),
    )


@pytest.mark.parametrize("vocab_size,max_length,seed", MODELS)
def test_bias_of_one_rollout(vocab_size, max_length, seed):
    models = pair(vocab_size, max_length, seed)
    exact = exact_kl(*models).item()
    for method in ("mc", "k2", "k3", "cv", "rb"):
        m = exact_moments(lambda r: estimate(method, r).values, *models)
        assert unbiased(m, exact) if ESTIMATORS[method].unbiased else abs(m.mean - exact) > 1e-3, (
            method
        )
    assert (estimate("rb", enumerate_rollouts(*models)).values >= 0).all()


GROUPS = (
    [(2, 2, s, 3) for s in range(12)]
    + [(3, 2, s, 3) for s in range(5)]
    + [(2, 3, s, 3) for s in range(1)]
    + [(4, 2, 0, 2), (3, 3, 0, 2), (2, 4, 0, 2)]
)


@pytest.mark.parametrize("vocab_size,max_length,seed,group_size", GROUPS)
def test_bias_of_groups(vocab_size, max_length, seed, group_size, monkeypatch):
    "`ht` and the cross-fitted combinations, with slopes from as few as two other rollouts."
    fit = estimators._cross_fitted
    monkeypatch.setattr(
        estimators, "_cross_fitted", lambda values, control: fit(values, control, at_least=3)
    )
    models = pair(vocab_size, max_length, seed)
    exact = exact_kl(*models).item()
    for method in GROUPED:
        m = exact_moments(lambda r: estimate(method, r).values, *models, group_size=group_size)
        assert unbiased(m, exact), method


@pytest.mark.parametrize("seed", range(3))
def test_cross_fitting_as_shipped(seed):
    models = TabularLM(1, 3, seed=seed), TabularLM(1, 3, seed=seed + 2)
    for method in GROUPED:
        m = exact_moments(lambda r: estimate(method, r).values, *models, group_size=10)
        assert unbiased(m, exact_kl(*models).item())


def test_fitting_on_the_averaged_rollouts_would_be_biased():
    "What cross-fitting avoids, so that the test above can fail."
    models = pair(2, 2)

    def plug_in(r):
        x = ((r.policy_logprobs - r.ref_logprobs) * r.mask).sum(-1)
        K = (step_kl(r.policy_logits, r.ref_logits) * r.mask).sum(-1)
        D = x - K
        spread = ((D - D.mean()) ** 2).sum()
        return K + (0 if spread < 1e-20 else -((K - K.mean()) * (D - D.mean())).sum() / spread) * D

    assert abs(exact_moments(plug_in, *models, group_size=3).mean - exact_kl(*models).item()) > 1e-3


def test_cross_fitted_slopes_against_a_loop():
    gen = torch.Generator().manual_seed(0)
    values, control = torch.randn(2, 30, generator=gen, dtype=torch.float64)
    for i, out in enumerate(estimators._cross_fitted(values, control).tolist()):
        rest = torch.arange(30) != i
        cov = torch.stack([values[rest], control[rest]]).cov()
        agree(out, (values[i] - cov[0, 1] / cov[1, 1] * control[i]).item())
    agree(
        estimators._cross_fitted(values, torch.ones(30).double()), values
    )  # a control without spread
    agree(estimators._cross_fitted(values[:9], control[:9]), values[:9])  # too few


def test_rb_cv_is_asymptotically_never_worse():
    "4,000 rollouts at once: variance of the cross-fitted values against the better parent."
    for seed in range(4):
        models = pair(3, 3, seed)
        r = enumerate_rollouts(*models)
        r = r[r.prob.multinomial(4000, True, generator=torch.Generator().manual_seed(seed))]
        var = {m: estimate(m, r).values.var().item() for m in ("mc", "rb", "rb_cv")}
        assert var["rb_cv"] <= 1.01 * min(var["mc"], var["rb"])


def test_counterexample_to_the_variance_theorem():
    "Strings `a` and `bc` with p = 1/2 and q = 1/4 each: Monte Carlo is constant, RB is not."
    policy, reference = TabularLM(3, 2), TabularLM(3, 2)
    rows = {
        0: ([0.5, 0.5, 0, 0], [0.25, 0.75, 0, 0]),
        1: ([0, 0, 0, 1], [0, 0, 0, 1]),
        2: ([0, 0, 1, 0], [0, 0, 1 / 3, 2 / 3]),
    }
    with torch.no_grad():
        for row, probs in rows.items():
            for model, prob in zip((policy, reference), probs):
                model.table[row] = torch.tensor(prob, dtype=torch.float64).log()
    mc, rb = (
        exact_moments(lambda r: estimate(m, r).values, policy, reference) for m in ("mc", "rb")
    )
    agree([mc.mean, rb.mean], [math.log(2)] * 2)
    assert math.sqrt(mc.variance) < gamma(2**12)
    agree(rb.variance, (math.log(3) / 2) ** 2)


def test_horvitz_thompson_by_hand():
    models = pair(2, 2)
    r = enumerate_rollouts(*models)
    index = [0, 3, 3, 1]
    k1 = ((r.policy_logprobs - r.ref_logprobs) * r.mask).sum(-1)
    expected = sum(r.prob[i] / (1 - (1 - r.prob[i]) ** 4) * k1[i] for i in {0, 1, 3}).item()
    agree(estimate("ht", r[index]).mean, expected)
    without_ids = kl_estimate("ht", r.policy_logprobs[index], r.ref_logprobs[index], r.mask[index])
    agree(without_ids.mean, expected)
    prompts = torch.tensor([5, 5, 9, 9])  # the same string under two prompts is two strings
    per_prompt = [estimate("ht", r[index[:2]]).mean, estimate("ht", r[index[2:]]).mean]
    agree(estimate("ht", r[index], prompt_ids=prompts).mean, sum(per_prompt) / 2)


def test_horvitz_thompson_becomes_monte_carlo_for_unlikely_strings():
    logprobs = torch.full((4, 300), -5.0) - torch.arange(4)[:, None]  # probabilities that underflow
    for scale in (1.0, 0.01):
        args = scale * logprobs, scale * logprobs - 0.01, torch.ones(4, 300)
        ht, mc = kl_estimate("ht", *args).mean, kl_estimate("mc", *args).mean
        drawn_twice = (
            4 * (scale * logprobs).sum(-1).exp().max().item()
        )  # order of the difference: n times the probability
        agree(ht, mc) if drawn_twice < 1e-16 else agree(
            ht / mc, 1.0, size=drawn_twice / gamma(2**12)
        )
    certain = kl_estimate("ht", torch.zeros(2, 3), torch.full((2, 3), -1.0), torch.ones(2, 3))
    agree(certain.mean, 3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distance", [0.0, 1e-6, 0.1])
def test_rb_is_never_negative(dtype, distance):
    gen = torch.Generator().manual_seed(0)
    ref_logits = torch.randn(8, 6, 500, generator=gen).to(dtype)
    policy_logits = (ref_logits.float() + distance * torch.randn(8, 6, 500, generator=gen)).to(
        dtype
    )
    values = kl_estimate(
        "rb",
        torch.zeros(8, 6, dtype=dtype),
        torch.zeros(8, 6, dtype=dtype),
        torch.ones(8, 6),
        step_kl(policy_logits, ref_logits),
    ).values
    assert (values >= 0).all()
    if distance == 0:
        assert (values == 0).all()


@fast
@given(
    st.integers(0, 10**6),
    st.sampled_from(list(ESTIMATORS)),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e30]),
)
def test_masked_positions_do_not_matter(seed, method, garbage):
    x = batch(seed)
    clean = kl_estimate(method, **x)
    dirty = {k: v.masked_fill(x["mask"] == 0, garbage) if k != "mask" else v for k, v in x.items()}
    for mask in (dirty["mask"], dirty["mask"].bool(), dirty["mask"].float()):
        other = kl_estimate(method, **dirty | dict(mask=mask))
        agree([other.mean, other.stderr], [clean.mean, clean.stderr], equal_nan=True)


@fast
@given(st.integers(0, 10**6), st.sampled_from(list(ESTIMATORS)), st.integers(1, 14))
def test_permutation_and_padding(seed, method, B):
    x = batch(seed, B=B)
    clean = kl_estimate(method, **x)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    permuted = kl_estimate(method, **{k: v[order] for k, v in x.items()})
    agree(permuted.values, clean.values[order], equal_nan=True)
    agree([permuted.mean, permuted.stderr], [clean.mean, clean.stderr], equal_nan=True)
    padded = {k: torch.cat([v, torch.zeros_like(v[:, :2])], 1) for k, v in x.items()}
    agree(kl_estimate(method, **padded).mean, clean.mean)


@pytest.mark.parametrize("method", list(ESTIMATORS))
def test_rollouts_without_a_step_are_left_out(method):
    x = batch(1, B=14)
    empty = {k: v.clone() for k, v in x.items()}
    empty["mask"][[2, 5]] = 0
    rest = [i for i in range(14) if i not in (2, 5)]
    e, direct = (
        kl_estimate(method, **empty),
        kl_estimate(method, **{k: v[rest] for k, v in x.items()}),
    )
    assert e.n == 12 and e.values.shape == (14,) and e.values[[2, 5]].isnan().all()
    agree(e.values[rest], direct.values)
    agree([e.mean, e.stderr], [direct.mean, direct.stderr])


def test_masks_with_holes():
    "Tool output in the middle of a completion is masked: the steps around it count."
    x = batch(2)
    x["mask"] = torch.ones_like(x["mask"])
    x["mask"][:, 2] = 0
    agree(
        kl_estimate("rb", **x).values,
        (x["step_kl"] * x["mask"]).sum(-1).double(),
        check_dtype=False,
    )


def test_standard_error_and_interval():
    x = batch(3, B=20)
    e = kl_estimate("mc", **x)
    agree(e.stderr, e.values.std().item() / math.sqrt(20))
    low, high = e.ci()
    agree(
        [low, high], [float(o) for o in stats.t.interval(0.95, 19, e.mean, e.stderr)]
    )  # one degree of freedom less
    assert e.ci(0.5)[0] > low
    single = kl_estimate("rb", **{k: v[:1] for k, v in x.items()})
    assert math.isnan(single.stderr) and single.n == 1 and all(map(math.isnan, single.ci()))
    with pytest.raises(ValueError, match="`level` is 95"):
        e.ci(95)


def test_clustered_standard_error():
    x = batch(4, B=12)
    prompts = torch.tensor([7, 7, 7, 1, 1, 1, 3, 3, 3, 2, 2, 2])
    e = kl_estimate("rb", **x, prompt_ids=prompts)
    means = torch.stack([e.values[prompts == p].mean() for p in (7, 1, 3, 2)])
    agree(e.stderr, means.std().item() / 2)  # clusters of equal size: the error of their means
    assert e.num_prompts == 4 and e.n == 12
    agree(
        list(e.ci()), [float(o) for o in stats.t.interval(0.95, 3, e.mean, e.stderr)]
    )  # prompts, not rollouts
    alone = kl_estimate("rb", **x, prompt_ids=torch.arange(12))
    agree(alone.stderr, kl_estimate("rb", **x).stderr)


def test_clustering_covers_where_independence_does_not():
    "Prompts of different KL, ten rollouts each: the naive error is too small."
    gen = torch.Generator().manual_seed(0)
    naive = clustered = 0
    for _ in range(300):
        values = (1 + torch.randn(8, 1, generator=gen)).expand(8, 10) + 0.1 * torch.randn(
            8, 10, generator=gen
        )
        args = "mc", values.reshape(80, 1), torch.zeros(80, 1), torch.ones(80, 1)
        for e, name in (
            (kl_estimate(*args), "naive"),
            (kl_estimate(*args, prompt_ids=torch.arange(8).repeat_interleave(10)), "clustered"),
        ):
            low, high = e.ci()
            hit = low < 1 < high
            if name == "naive":
                naive += hit
            else:
                clustered += hit
    # of 300 hits at 95 %, within 4.5 standard errors; normal quantiles would give about 91 %
    assert naive / 300 < 0.6 and abs(clustered / 300 - 0.95) < 4.5 * math.sqrt(0.95 * 0.05 / 300)


def test_length_normalized():
    x = batch(5, B=9)
    e, total = kl_estimate("rb", **x, length_normalized=True), kl_estimate("rb", **x)
    lengths = x["mask"].sum(-1).double()
    agree(e.mean, total.values.sum().item() / lengths.sum().item())
    agree(e.values.mean().item(), e.mean)
    residual = total.values - e.mean * lengths
    agree(e.stderr, residual.std().item() / 3 / lengths.mean().item())
    assert e.unit == "nats per token"


def test_long_strings_in_float32():
    "120 steps of a Markov model, 300 rollouts; tolerance: 4.5 standard errors computed here."
    policy, reference = (MarkovLM(6, 120, seed=0, eos_bias=-4.0) for _ in range(2))
    with torch.no_grad():
        reference.table += 0.3 * torch.randn(
            7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
    torch.manual_seed(0)
    ids, mask, alive = (
        torch.full((300, 121), 6),
        torch.zeros(300, 120),
        torch.ones(300, dtype=torch.bool),
    )
    for n in range(120):
        mask[:, n] = alive
        ids[alive, n + 1] = policy.table.detach()[ids[alive, n]].softmax(-1).multinomial(1)[:, 0]
        alive = alive & (ids[:, n + 1] != 6)
    policy_logits, ref_logits = (m(ids[:, 1:]).detach().float() for m in (policy, reference))
    logp, logq = (
        o.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] for o in (policy_logits, ref_logits)
    )
    for method in ("mc", "rb", "rb_cv"):
        e = kl_estimate(method, logp, logq, mask, step_kl(policy_logits, ref_logits))
        assert abs(e.mean - markov_kl(policy, reference).item()) < 4.5 * e.stderr


def test_infinite_kl_is_reported():
    x = batch(6)
    x["mask"] = torch.ones_like(x["mask"])
    x["ref_logprobs"][0, 1], x["step_kl"][0, 1] = -math.inf, math.inf
    for method in ("mc", "k2", "k3", "cv", "rb", "rb_cv", "cv_fitted"):
        assert kl_estimate(method, **x).mean == math.inf, method


def test_repr_and_html():
    e = KLEstimate(1.2345, 0.0567, 64, torch.zeros(64), "rb", num_prompts=16)
    assert repr(e) == "KLEstimate(rb: 1.234 ± 0.057 nats per sequence, 64 rollouts of 16 prompts)"
    assert "<td>rb</td>" in e._repr_html_() and "64 rollouts of 16 prompts" in e._repr_html_()


def test_html_without_scipy(monkeypatch):
    "A plain install has none: no interval in the table, and `ci` says what is missing."
    for name in ("scipy", "scipy.special"):
        monkeypatch.setitem(sys.modules, name, None)
    intervals.t_quantile.cache_clear()
    e = KLEstimate(1.2345, 0.0567, 64, torch.zeros(64), "rb")
    assert "needs scipy" in e._repr_html_() and "0.057" in e._repr_html_()
    with pytest.raises(ImportError, match="scipy"):
        e.ci()


f = torch.zeros


@pytest.mark.parametrize(
    "error,call,message",
    [
        (
            ValueError,
            lambda: kl_estimate("k4", f(1, 1), f(1, 1), f(1, 1) + 1),
            "'k4'; it must be one of mc, k2",
        ),
        (ValueError, lambda: kl_estimate("rb", f(1, 1), f(1, 1), f(1, 1) + 1), "`step_kl` is None"),
        (
            ValueError,
            lambda: kl_estimate("rb_cv", f(1, 1), f(1, 1), f(1, 1) + 1),
            "`step_kl` is None",
        ),
        (ValueError, lambda: kl_estimate("mc", f(2, 1), f(2, 2), f(2, 1) + 1), "`ref_logprobs`"),
        (
            ValueError,
            lambda: kl_estimate("rb", f(2, 1), f(2, 1), f(2, 1) + 1, f(2, 2)),
            "`step_kl`",
        ),
        (ValueError, lambda: kl_estimate("mc", f(2, 1), f(2, 1), f(2)), "`mask` has shape"),
        (
            ValueError,
            lambda: kl_estimate("mc", f(2, 1), f(2, 1), f(2, 1) + 0.5),
            "`mask` holds 0.5",
        ),
        (ValueError, lambda: kl_estimate("mc", f(2, 1), f(2, 1), f(2, 1)), "0 everywhere"),
        (ValueError, lambda: kl_estimate("mc", f(0, 1), f(0, 1), f(0, 1)), "empty batch"),
        (
            TypeError,
            lambda: kl_estimate("mc", f(2, 1).long(), f(2, 1), f(2, 1) + 1),
            "`policy_logprobs` has dtype",
        ),
        (
            ValueError,
            lambda: kl_estimate("mc", f(2, 1), torch.tensor([[0.0], [math.nan]]), f(2, 1) + 1),
            "`ref_logprobs` is NaN at rollout 1, step 0",
        ),
        (
            ValueError,
            lambda: kl_estimate("mc", f(2, 1), f(2, 1), f(2, 1) + 1, prompt_ids=f(3).long()),
            "`prompt_ids` has shape",
        ),
        (
            ValueError,
            lambda: kl_estimate("ht", f(2, 1), f(2, 1), f(2, 1) + 1, completion_ids=f(2, 2).long()),
            "`completion_ids` has shape",
        ),
    ],
)
def test_bad_input(error, call, message):
    with pytest.raises(error, match=message):
        call()
