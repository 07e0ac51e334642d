"""The whole update: bias and trace by enumeration, special cases, fits, bad input."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

import klrb.gradients as gradients
from klrb.errors import InputError
from klrb.exact import TabularLM, enumerate_rollouts, exact_gradient_moments
from klrb.gradients import kl_surrogate
from klrb.steps import step_kl
from klrb.update import (
    CoefficientFit,
    UpdateCoefficients,
    update_baseline,
    update_coefficients,
    update_statistics,
    update_surrogate,
)

METHODS = ("rb", "rb_sequence", "mc")
pytestmark = pytest.mark.filterwarnings("ignore:A prompt has a single rollout")


@pytest.fixture(autouse=True)
def forget_warning():
    gradients._warn_single.cache_clear()


SMALL = [(v, t, s) for v, t, n in ((2, 2, 10), (1, 4, 6), (3, 2, 4), (2, 3, 2)) for s in range(n)]


def problem(vocab_size, max_length, seed=0):
    "Policy, reference, sampler and a reward for each string."
    models = [TabularLM(vocab_size, max_length, seed=seed + 1000 * i) for i in range(3)]
    reward = torch.randn(
        len(enumerate_rollouts(*models[:2])),
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )
    return *models, reward


def look_up(policy, reference, reward):
    x = enumerate_rollouts(policy, reference)
    table = {tuple(o.tolist()): v for o, v in zip(x.completion_ids, reward)}
    return lambda r: torch.stack([table[tuple(o.tolist())] for o in r.completion_ids])


def loss_of(rewards, beta, member, off_policy=False, **kwargs):
    return lambda r: update_surrogate(
        rewards(r),
        r.policy_logprobs,
        r.ref_logprobs,
        r.mask,
        step_kl(r.policy_logits, r.ref_logits),
        beta,
        member,
        old_logprobs=r.old_logprobs if off_policy else None,
        prompt_ids=r.prompt_ids,
        **kwargs,
    )


def exact_update(policy, reference, reward, beta):
    "Gradient of the objective: autograd through the sum over all strings."
    x = enumerate_rollouts(policy, reference)
    logp, logq = ((o * x.mask).sum(-1) for o in (x.policy_logprobs, x.ref_logprobs))
    objective = (logp.exp() * (reward - beta * (logp - logq))).sum()
    return objective.item(), torch.autograd.grad(objective, policy.table)[0]


def optimal_policy(reference, reward, beta):
    x = enumerate_rollouts(reference, reference)
    weight = x.prob.detach() * (reward / beta).exp()
    policy = TabularLM(reference.vocab_size, reference.max_length)
    table = torch.zeros_like(policy.table.data)
    table.index_put_(
        (policy.prefix_rows(x.completion_ids), x.completion_ids),
        weight[:, None] * x.mask,
        accumulate=True,
    )
    policy.table.data = table.log()
    return policy


@pytest.mark.parametrize("vocab_size,max_length,seed", SMALL)
def test_every_member_is_unbiased(vocab_size, max_length, seed):
    policy, reference, old, reward = problem(vocab_size, max_length, seed)
    rewards, beta = look_up(policy, reference, reward), (0.0, 0.3, 2.0)[seed % 3]
    _, exact = exact_update(policy, reference, reward, beta)
    members = [update_coefficients(o, beta) for o in METHODS] + [
        UpdateCoefficients(-2.0, 0.7),
        UpdateCoefficients(5.0, 1.5),
    ]
    for member, off_policy in itertools.product(members, (False, True)):
        loss = loss_of(rewards, beta, member, off_policy)
        m = exact_gradient_moments(loss, policy, reference, 2, old if off_policy else None)
        assert (m.mean + exact).abs().max() < 1e-10, (member, off_policy)


def test_without_baseline_and_in_groups_of_three():
    policy, reference, _, reward = problem(2, 2)
    rewards, member = look_up(policy, reference, reward), UpdateCoefficients(0.4, -1.0)
    _, exact = exact_update(policy, reference, reward, 0.5)
    for size, baseline in ((1, None), (3, "loo")):
        m = exact_gradient_moments(
            loss_of(rewards, 0.5, member, baseline=baseline), policy, reference, size
        )
        assert (m.mean + exact).abs().max() < 1e-10


def test_value_is_minus_the_objective():
    policy, reference, old, reward = problem(2, 3)
    rewards = look_up(policy, reference, reward)
    objective, _ = exact_update(policy, reference, reward, 0.5)
    for off_policy in (False, True):
        x = enumerate_rollouts(policy, reference, old if off_policy else None)
        values = torch.stack(
            [
                loss_of(rewards, 0.5, UpdateCoefficients(1.0, 2.0), off_policy)(x[[i]])
                for i in range(len(x))
            ]
        )
        assert_close((x.prob * values).sum().item(), -objective)


@pytest.mark.parametrize("vocab_size,max_length,seed", SMALL[:4] + SMALL[-1:])
@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_sampled_penalty_is_silent_at_the_optimum(vocab_size, max_length, seed, beta):
    _, reference, _, reward = problem(vocab_size, max_length, seed)
    policy, rewards = optimal_policy(reference, reward, beta), look_up(reference, reference, reward)
    trace = {
        o: exact_gradient_moments(
            loss_of(rewards, beta, update_coefficients(o, beta)), policy, reference, 2
        ).variance
        for o in METHODS
    }
    assert abs(trace["mc"]) < 1e-12 * trace["rb"]
    assert trace["rb"] > 1e-3


def rollouts(seed=0, B=7, T=5, V=6, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    policy_logits, ref_logits, old_logits = torch.randn(
        3, B, T, V, generator=gen, dtype=torch.float64
    ).to(dtype)
    policy_logits.requires_grad_()
    ids = torch.randint(V, (B, T), generator=gen)
    mask = (torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=gen)).long()
    mask[5] = 0  # a rollout without a step
    logprobs = [
        o.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        for o in (policy_logits, ref_logits, old_logits)
    ]
    return dict(
        logits=policy_logits,
        rewards=torch.randn(B, generator=gen, dtype=torch.float64).to(dtype),
        lp=logprobs[0],
        lq=logprobs[1],
        old=logprobs[2].detach(),
        mask=mask,
        step=step_kl(policy_logits, ref_logits),
        prompts=torch.tensor([4, 4, 4, 9, 9, 9, 9]),
    )


def given(x):
    return x["rewards"], x["lp"], x["lq"], x["mask"], x["step"]


def gradient(x, loss):
    return torch.autograd.grad(loss, x["logits"], retain_graph=True)[0]


def others_of(x, i):
    return [
        j for j in range(7) if j != i and x["prompts"][j] == x["prompts"][i] and x["mask"][j].any()
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_cases_are_reward_plus_kl_surrogate(method, off_policy, dtype):
    x = rollouts(1, dtype=dtype)
    old = x["old"] if off_policy else None
    loss = update_surrogate(
        *given(x), 0.7, update_coefficients(method, 0.7), old_logprobs=old, prompt_ids=x["prompts"]
    )
    mask = x["mask"].bool()
    reward_part = 0.0
    for i in range(7):
        advantage = x["rewards"][i] - x["rewards"][others_of(x, i)].mean()
        logp = x["lp"][i][mask[i]].sum()
        ratio = (logp.detach() - x["old"][i][mask[i]].sum()).exp() if off_policy else 1.0
        reward_part = reward_part - advantage * ratio * logp / 7
    kl = kl_surrogate(method, x["lp"], x["lq"], x["mask"], x["step"], old, prompt_ids=x["prompts"])
    rounding = (
        100 * torch.finfo(dtype).eps * gradient(x, kl).abs().max().item()
    )  # sums of at most 35 terms
    assert_close(gradient(x, loss), gradient(x, reward_part + 0.7 * kl), rtol=0, atol=rounding)


@pytest.mark.parametrize("seed", range(3))
def test_against_loops(seed):
    "Every score's weight, written out; coefficients of each rollout's own."
    x, beta = rollouts(seed), 0.4
    past, noise = torch.randn(2, 7, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    mask = x["mask"].bool()
    lp, kl = (x[o].detach() for o in ("lp", "step"))
    k = torch.where(mask, kl, 0.0)
    d = torch.where(mask, lp - x["lq"] - kl, 0.0).sum(1)
    expected = 0.0
    for i in range(7):
        for m in range(5):
            if not mask[i, m]:
                continue

            def weight(j):
                return (
                    x["rewards"][j]
                    - beta * k[j, m + 1 :].sum()
                    - past[i] * k[j, : m + 1].sum()
                    - noise[i] * d[j]
                )

            centre = torch.stack([weight(j) for j in others_of(x, i)]).mean()
            expected = (
                expected
                - (weight(i) - centre) * x["lp"][i, m] / 7
                + (beta - noise[i]) * x["step"][i, m] / 7
            )
    member = UpdateCoefficients(past, noise)
    loss = update_surrogate(*given(x), beta, member, prompt_ids=x["prompts"])
    assert_close(gradient(x, loss), gradient(x, expected))
    valid = mask.any(1)
    assert_close(loss.detach(), (beta * k.sum() - x["rewards"][valid].sum()) / 7)


def test_padding_and_order_do_not_matter():
    x, member = rollouts(2), UpdateCoefficients(0.3, 0.6)
    plain = gradient(x, update_surrogate(*given(x), 0.4, member, prompt_ids=x["prompts"]))
    hidden = x["mask"] == 0
    for value in (math.nan, -math.inf):
        y = x | {o: x[o].masked_fill(hidden, value) for o in ("lp", "lq", "step")}
        y["rewards"] = x["rewards"].masked_fill(~x["mask"].bool().any(1), math.nan)
        assert_close(
            gradient(x, update_surrogate(*given(y), 0.4, member, prompt_ids=x["prompts"])), plain
        )
    order = torch.tensor([3, 6, 0, 5, 1, 4, 2])
    y = {o: v[order] for o, v in x.items()}
    assert_close(
        gradient(x, update_surrogate(*given(y), 0.4, member, prompt_ids=y["prompts"])), plain
    )


@pytest.mark.parametrize("off_policy", [False, True])
def test_micro_batches_with_a_baseline_of_the_whole(off_policy):
    x, member = rollouts(3), UpdateCoefficients(torch.linspace(-1, 1, 7).double(), 0.6)
    old = x["old"] if off_policy else None
    whole = gradient(
        x, update_surrogate(*given(x), 0.4, member, old_logprobs=old, prompt_ids=x["prompts"])
    )
    baseline = update_baseline(*given(x), prompt_ids=x["prompts"])
    parts = 0.0
    for rows in (slice(0, 2), slice(2, 7)):
        part = update_surrogate(
            *(o[rows] for o in given(x)),
            0.4,
            UpdateCoefficients(member.past[rows], 0.6),
            old_logprobs=None if old is None else old[rows],
            baseline=baseline.rows(rows),
        )
        parts = parts + gradient(x, part) * (rows.stop - rows.start) / 7
    assert_close(parts, whole)
    assert baseline.others.tolist() == [2, 2, 2, 2, 2, 3, 2]


def test_a_token_that_the_policy_excludes_now():
    x = rollouts(4)
    x["mask"][0] = 1
    lp = x["lp"].clone()
    lp[0, 2] = -torch.inf
    arguments = x["rewards"], lp, x["lq"], x["mask"], x["step"], 0.4, UpdateCoefficients(0.1, 0.2)
    with pytest.raises(ValueError, match="cannot have sampled"):
        update_surrogate(*arguments, prompt_ids=x["prompts"])
    found = gradient(
        x,
        update_surrogate(*arguments, old_logprobs=x["old"], baseline=None, prompt_ids=x["prompts"]),
    )
    assert found.isfinite().all()
    # its whole-sequence parts have ratio 0; the exact KL of its first three steps remains
    kl = kl_surrogate("rb", lp, x["lq"], x["mask"], x["step"], x["old"], None)
    assert_close(found[0], 0.3 * gradient(x, kl)[0])


def test_mc_needs_no_step_kl_and_the_cap_of_ratios():
    x = rollouts(5)
    with_step = update_surrogate(
        *given(x), 0.4, update_coefficients("mc", 0.4), prompt_ids=x["prompts"]
    )
    without = update_surrogate(
        *given(x)[:4], None, 0.4, update_coefficients("mc", 0.4), prompt_ids=x["prompts"]
    )
    assert_close(gradient(x, with_step), gradient(x, without))
    old = x["lp"].detach() - 1.0  # every ratio exceeds the cap
    capped = update_surrogate(
        *given(x)[:4],
        None,
        0.4,
        update_coefficients("mc", 0.4),
        old_logprobs=old,
        max_ratio=1.0,
        prompt_ids=x["prompts"],
    )
    assert_close(gradient(x, capped), gradient(x, without))


BAD = {
    "rewards` must be a tensor": dict(rewards=torch.ones(7, dtype=torch.long)),
    "rewards` has shape": dict(rewards=torch.ones(6)),
    "rewards` is nan at rollout 1": dict(rewards=torch.tensor([0, math.nan, 0, 0, 0, 0, 0.0])),
    "rewards` is inf at rollout 2": dict(rewards=torch.tensor([0, 0, math.inf, 0, 0, 0, 0.0])),
    "beta` is -1": dict(beta=-1.0),
    "beta` is nan": dict(beta=math.nan),
    "beta` is a Tensor": dict(beta=torch.tensor(1.0)),
    "past` is not finite": dict(coefficients=UpdateCoefficients(math.inf, 0.0)),
    "noise` has shape": dict(coefficients=UpdateCoefficients(0.0, torch.ones(3))),
    "noise` carries a graph": dict(
        coefficients=UpdateCoefficients(0.0, torch.ones(7, requires_grad=True))
    ),
    "needs the KL of every step": dict(step_kl=None),
    "baseline` must be": dict(baseline="mean"),
    "one entry per rollout": dict(prompt_ids=torch.zeros(3, dtype=torch.long)),
    "max_ratio": dict(max_ratio=2.0),
    "0 everywhere": dict(mask=torch.zeros(7, 5)),
    "mask` has shape": dict(mask=torch.ones(7, 4)),
}


@pytest.mark.parametrize("message", BAD)
def test_refusals(message):
    x = rollouts(6)
    names = ("rewards", "policy_logprobs", "ref_logprobs", "mask", "step_kl")
    arguments = dict(zip(names, given(x))) | dict(beta=0.5, prompt_ids=x["prompts"]) | BAD[message]
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        update_surrogate(**arguments)
    assert "\n" not in str(caught.value)


def test_infinite_kl_is_refused():
    x = rollouts(6)
    step = x["step"].clone()
    step[0, 0] = math.inf
    with pytest.raises(ValueError, match="KL.*infinite"):
        update_surrogate(*given(x)[:4], step, 0.5, prompt_ids=x["prompts"])
    with pytest.raises(InputError, match="one of rb, rb_sequence, mc"):
        update_coefficients("k3", 0.5)


# ---- the fit ----


def fit_to(statistics, beta, **kwargs):
    fit = CoefficientFit(**kwargs)
    fit.update(statistics)
    return torch.tensor([list(fit.coefficients(beta))], dtype=torch.float64)


def bias_of_fits(seed, beta):
    "Relative bias of the mean update, coefficients of three sources, over all 4**4 groups."
    policy, reference, _, reward = problem(1, 3, seed)
    strings = enumerate_rollouts(policy, reference)
    _, exact = exact_update(policy, reference, reward, beta)
    groups = torch.cartesian_prod(*[torch.arange(4)] * 4)
    index, prompts = groups.flatten(), torch.arange(512).repeat_interleave(2)
    r = strings[index]
    logits = r.policy_logits.detach().requires_grad_()
    logprobs = logits.log_softmax(-1).gather(-1, r.completion_ids[..., None])[..., 0]
    values = reward[index], logprobs, r.ref_logprobs, r.mask, step_kl(logits, r.ref_logits)
    statistics = update_statistics(*values, update_baseline(*values, prompt_ids=prompts)).view(
        256, 4, 5, 5
    )

    def other(o):
        member = CoefficientFit().leave_prompt_out(beta, o, torch.tensor([7, 7, 3, 3]))
        return torch.stack(list(member), 1)

    def earlier_and_other(o):
        "The first prompt as an earlier batch, the second for a batch of two prompts of one kind."
        fit = CoefficientFit()
        fit.update(o[:2])
        return torch.stack(list(fit.leave_prompt_out(beta, o[2:], torch.tensor([1, 1]))), 1).repeat(
            2, 1
        )

    sources = dict(
        same=(lambda o: fit_to(o, beta).expand(4, 2), slice(0, 2)),
        other=(other, slice(0, 2)),
        earlier=(lambda o: fit_to(o[:2], beta).expand(4, 2), slice(2, 4)),
        both=(earlier_and_other, slice(2, 4)),
    )
    prob, rows, bias = (
        strings.prob[groups].prod(-1),
        policy.prefix_rows(r.completion_ids).view(256, 4, 3),
        {},
    )
    for name, (source, counted) in sources.items():
        member = UpdateCoefficients(*torch.cat([source(o) for o in statistics]).unbind(-1))
        loss = update_surrogate(*values, beta, member, prompt_ids=prompts)
        grad = torch.autograd.grad(1024 * loss, logits, retain_graph=True)[0].view(256, 4, 3, 2)
        grad = (prob[:, None, None, None] * grad)[:, counted] / 2
        mean = torch.zeros_like(exact).index_add_(0, rows[:, counted].flatten(), grad.flatten(0, 2))
        bias[name] = ((mean + exact).norm() / exact.norm()).item()
    return bias


@pytest.mark.parametrize("seed", range(20))
def test_fitted_coefficients_do_not_bias(seed):
    bias = bias_of_fits(seed, (0.2, 1.0)[seed % 2])
    assert bias.pop("same") > 1e-3  # what the other sources are there to avoid
    assert max(bias.values()) < 1e-10, bias


def population_statistics(policy, reference, reward):
    "Statistics of all ordered pairs, each times its probability."
    strings = enumerate_rollouts(policy, reference)
    n = len(strings)
    pairs = torch.cartesian_prod(torch.arange(n), torch.arange(n))
    r = strings[pairs.flatten()]
    values = (
        reward[pairs.flatten()],
        r.policy_logprobs.detach(),
        r.ref_logprobs,
        r.mask,
        step_kl(r.policy_logits, r.ref_logits),
    )
    statistics = update_statistics(
        *values, update_baseline(*values, prompt_ids=torch.arange(n * n).repeat_interleave(2))
    )
    return statistics * strings.prob[pairs].prod(-1).repeat_interleave(2)[:, None, None]


@pytest.mark.parametrize(
    "beta,seed,from_reference",
    [
        (0.2, 0, True),
        (0.5, 1, True),
        (2.0, 2, True),
        (0.2, 3, False),
        (0.5, 4, False),
        (2.0, 5, False),
    ],
)
def test_fit_is_as_quiet_as_the_better_method_along_the_exact_walk(beta, seed, from_reference):
    policy, reference, _, reward = problem(2, 2, seed)
    if from_reference:
        policy.table.data = reference.table.data.clone()
    rewards = look_up(policy, reference, reward)
    for update in range(129):
        if update in (1, 8, 128):
            fit = CoefficientFit(prior_rollouts=0.0)
            fit.update(population_statistics(policy, reference, reward))
            members = {o: update_coefficients(o, beta) for o in METHODS} | dict(
                fitted=fit.coefficients(beta)
            )
            trace = {
                o: exact_gradient_moments(loss_of(rewards, beta, m), policy, reference, 2).variance
                for o, m in members.items()
            }
            assert trace["fitted"] <= 1.05 * min(trace["mc"], trace["rb"]), (update, trace)
        policy.table.data += exact_update(policy, reference, reward, beta)[1] / beta


def test_statistics_against_loops():
    x = rollouts(7)
    x["prompts"][0] = 1  # alone with its prompt
    with pytest.warns(UserWarning, match="single rollout"):
        baseline = update_baseline(*given(x), prompt_ids=x["prompts"])
    found = update_statistics(*given(x), baseline)
    mask = x["mask"].bool()
    lp, kl = (torch.where(mask, x[o].detach(), 0.0) for o in ("lp", "step"))
    noise = lp.sum(1) - torch.where(mask, x["lq"], 0.0).sum(1) - kl.sum(1)
    for i in range(7):
        expected = torch.zeros(5, 5, dtype=torch.float64)
        others = others_of(x, i)
        for m in range(5):
            if not mask[i, m] or not others:
                continue

            def row(j):
                return torch.stack(
                    [x["rewards"][j], kl[j, m + 1 :].sum(), kl[j, : m + 1].sum(), noise[j]]
                )

            centred = row(i) - torch.stack([row(j) for j in others]).mean(0)
            f = torch.cat([torch.ones(1, dtype=torch.float64), centred])
            expected += (1 - lp[i, m].exp()) * f[:, None] * f
        assert_close(found[i], expected)


def test_fit_finds_coefficients_that_were_put_in():
    "Rewards that are a known combination: the fit returns it; zero before the first batch."
    x = rollouts(8)
    fit = CoefficientFit(prior_rollouts=0.0)
    assert fit.coefficients(0.5) == UpdateCoefficients(0.0, 0.0)
    mask = x["mask"].bool()
    lp, kl = (torch.where(mask, x[o].detach(), 0.0) for o in ("lp", "step"))
    noise = lp.sum(1) - torch.where(mask, x["lq"], 0.0).sum(1) - kl.sum(1)
    x["rewards"] = 0.8 * noise + 0.5 * kl.sum(1)
    statistics = update_statistics(*given(x), update_baseline(*given(x), prompt_ids=x["prompts"]))
    for _ in range(3):
        fit.update(statistics)
        assert_close(
            torch.tensor(fit.coefficients(0.5)), torch.tensor((0.5, 0.8)), rtol=1e-9, atol=1e-9
        )
    shrunk = CoefficientFit(prior_rollouts=50.0)
    shrunk.update(statistics)
    past, noise = shrunk.coefficients(
        0.5
    )  # ridge regression shrinks the distance to its prior, which is mc
    assert 0.01 < math.hypot(past - 0.5, noise - 0.5) < 0.27


def test_many_fits_at_once_find_what_was_put_in():
    "Sums of three batches below each other, as stacks of runs have them."
    x, noises = rollouts(8), (0.8, -0.3, 2.0)
    mask = x["mask"].bool()
    lp, kl, lq = (torch.where(mask, x[o].detach(), 0.0).sum(1) for o in ("lp", "step", "lq"))
    batches = []
    for noise in noises:
        x["rewards"] = noise * (lp - lq - kl) + 0.5 * kl
        baseline = update_baseline(*given(x), prompt_ids=x["prompts"])
        batches.append(update_statistics(*given(x), baseline))
    sums = torch.stack([o.sum(0) for o in batches])
    found = CoefficientFit(prior_rollouts=0.0).solve(sums, torch.full((3,), 6.0), 0.5)
    expected = torch.tensor([(0.5, noise) for noise in noises], dtype=torch.float64)
    assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_decay_and_state():
    statistics = [
        update_statistics(*given(x), update_baseline(*given(x), prompt_ids=x["prompts"]))
        for x in (rollouts(s) for s in range(3))
    ]
    fit = CoefficientFit(decay=0.5)
    for o in statistics:
        fit.update(o)
    by_hand = sum(0.5 ** (2 - i) * o.sum(0) for i, o in enumerate(statistics))
    assert_close(fit.sums, by_hand)
    assert_close(fit.rollouts, 6 * (0.25 + 0.5 + 1))  # one rollout in seven has no step
    resumed = CoefficientFit(decay=0.5)
    resumed.load_state_dict(fit.state_dict())
    for o in (fit, resumed):
        o.update(statistics[0])
    assert fit.coefficients(0.3) == resumed.coefficients(0.3)
    with pytest.raises(InputError, match="decay"):
        CoefficientFit().load_state_dict(fit.state_dict())
    split = CoefficientFit(decay=0.5)  # of two processes, gathered
    split.update(torch.cat([statistics[0][:3], statistics[0][3:]]))
    assert_close(split.sums, statistics[0].sum(0))


def test_no_signal_gives_mc():
    "At the reference there is nothing to fit: beta, and no large number for the next batch."
    x = rollouts(9)
    for noise in (0.0, 1e-8):
        y = x | dict(
            lq=x["lp"].detach() + noise * torch.randn(7, 5, dtype=torch.float64),
            step=x["step"] * noise**2,
        )
        fit = CoefficientFit()
        fit.update(
            update_statistics(*given(y), update_baseline(*given(y), prompt_ids=x["prompts"]))
        )
        assert max(abs(o - 0.5) for o in fit.coefficients(0.5)) < 1e-6
    lonely = CoefficientFit()
    lonely.update(torch.zeros(3, 5, 5))
    assert lonely.coefficients(0.5) == UpdateCoefficients(0.0, 0.0)


def test_fit_refusals():
    for kwargs in (
        dict(decay=1.0),
        dict(decay=-0.1),
        dict(prior_rollouts=-1.0),
        dict(decay=math.nan),
    ):
        with pytest.raises(InputError, match="must be at least 0"):
            CoefficientFit(**kwargs)
    fit = CoefficientFit()
    with pytest.raises(InputError, match="update_statistics"):
        fit.update(torch.zeros(5, 5))
    with pytest.raises(InputError, match="not finite"):
        fit.update(torch.full((1, 5, 5), math.nan))
    with pytest.raises(InputError, match="beta"):
        fit.coefficients(-1.0)
    with pytest.raises(InputError, match="prompt_ids.*one entry"):
        fit.leave_prompt_out(0.5, torch.zeros(2, 5, 5), torch.zeros(3))
    with pytest.raises(InputError, match="state_dict"):
        fit.load_state_dict(dict(sums=torch.zeros(5, 5)))
