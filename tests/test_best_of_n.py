"""Best of n and the tilted reference against enumeration, and estimates against their truth."""

import itertools
import math

import pytest
import torch

from klrb.best_of_n import (
    MIN_ESS,
    best_of_n,
    best_of_n_bound,
    best_of_n_kl,
    best_of_n_reward,
    tilted_ceiling,
)

PROB = torch.tensor([0.1, 0.25, 0.2, 0.15, 0.3], dtype=torch.float64)
TIES = torch.tensor([1.0, 2.0, 1.0, 3.0, 2.0], dtype=torch.float64)
DISTINCT = torch.tensor([0.3, -1.0, 2.0, 0.7, 0.1], dtype=torch.float64)


def by_listing(prob, rewards, n):
    "Every n-tuple of draws; a tie is broken at random"
    found = torch.zeros_like(prob)
    for draw in itertools.product(range(len(prob)), repeat=n):
        chance, top = prob[list(draw)].prod(), rewards[list(draw)].max()
        kept = [o for o in draw if rewards[o] == top]
        for o in kept:
            found[o] += chance / len(kept)
    return found


@pytest.mark.parametrize("rewards", [TIES, DISTINCT, torch.zeros(5)])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_distribution_and_kl_by_listing_all_draws(rewards, n):
    wanted = by_listing(PROB, rewards, n)
    found = best_of_n(PROB, rewards, n)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    kl = (wanted * (wanted / PROB).log()).sum().item()
    assert kl <= best_of_n_bound(n) + 1e-12
    # shares that are the probabilities: the plug-in is exact, and the jackknife close
    counts = (PROB * 20_000).round().long()
    draws = rewards.repeat_interleave(counts)
    assert best_of_n_kl(draws, n).value == pytest.approx(kl, abs=2e-4)
    mean = (wanted * rewards).sum().item()
    assert best_of_n_reward(draws, n) == pytest.approx(mean, abs=1e-3)


def test_the_bound_is_reached_where_nothing_ties():
    n, strings = 8, 4000
    prob = torch.full((strings,), 1 / strings, dtype=torch.float64)
    found = best_of_n(prob, torch.arange(strings).double(), n)
    kl = (found * (found / prob).log()).sum().item()
    assert kl == pytest.approx(best_of_n_bound(n), rel=1e-3) and kl < best_of_n_bound(n)
    draws = torch.rand(300, generator=torch.Generator().manual_seed(0))
    estimate = best_of_n_kl(draws, n)
    assert estimate.value == pytest.approx(best_of_n_bound(n), rel=0.01)


def test_rewards_of_the_best_are_unbiased():
    "Every sample of 4 draws, weighed by its probability"
    wanted = (by_listing(PROB, TIES, 3) * TIES).sum().item()
    total = 0.0
    for draw in itertools.product(range(5), repeat=4):
        total += PROB[list(draw)].prod().item() * best_of_n_reward(TIES[list(draw)], 3)
    assert total == pytest.approx(wanted, rel=1e-12)


def test_intervals_of_the_kl_cover():
    gen = torch.Generator().manual_seed(0)
    wanted = by_listing(PROB, TIES, 4)
    kl = (wanted * (wanted / PROB).log()).sum().item()
    hits = 0
    for _ in range(200):
        o = best_of_n_kl(TIES[torch.multinomial(PROB, 200, True, generator=gen)], 4)
        hits += abs(o.value - kl) < 1.96 * o.stderr
    assert hits >= 180  # 190 expected, standard deviation 3.1


def tilt(beta, rewards=TIES):
    weights = PROB * (rewards / beta).exp()
    weights = weights / weights.sum()
    return (weights * (weights / PROB).log()).sum().item(), (weights * rewards).sum().item()


@pytest.mark.parametrize("beta", [5.0, 1.0, 0.5])
def test_the_ceiling_of_the_draws_is_the_ceiling(beta):
    gen = torch.Generator().manual_seed(0)
    draws = TIES[torch.multinomial(PROB.expand(50, -1), 200, True, generator=gen)]
    found = tilted_ceiling(draws, beta)
    kl, reward = tilt(beta)
    assert abs(found.kl.value - kl) < 4 * found.kl.stderr
    assert abs(found.reward.value - reward) < 4 * found.reward.stderr
    moved = tilted_ceiling(draws + 100 * torch.arange(50)[:, None], beta)  # prompts differ
    assert moved.kl.value == pytest.approx(found.kl.value, rel=1e-6)


def test_no_policy_is_above_it():
    "Any other distribution with this KL or less has less reward"
    gen = torch.Generator().manual_seed(0)
    kl, reward = tilt(0.7)
    for _ in range(500):
        other = (PROB.log() + 0.8 * torch.randn(5, generator=gen, dtype=torch.float64)).softmax(0)
        if (other * (other / PROB).log()).sum() <= kl:
            assert (other * TIES).sum() <= reward + 1e-12


def test_there_is_no_value_where_the_draws_do_not_tell():
    draws = torch.zeros(3, 100)
    draws[:, 0] = 1.0
    found = tilted_ceiling(draws, 0.05)
    assert found.ess < MIN_ESS and math.isnan(found.kl.value) and math.isnan(found.reward.value)
    one = draws.clone()
    one[1:] = torch.rand(2, 100, generator=torch.Generator().manual_seed(0))
    assert math.isnan(tilted_ceiling(one, 0.05).kl.value)  # a single prompt is enough
    assert tilted_ceiling(draws, 0.05, min_ess=0).reward.value > 0.9


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: best_of_n_bound(0), "`n` is 0"),
        (lambda: best_of_n_bound(2.5), "`n` is 2.5"),
        (lambda: best_of_n_bound(True), "`n` is True"),
        (lambda: best_of_n(PROB, TIES[:3], 2), "5 entries and `rewards` 3"),
        (lambda: best_of_n(PROB / 2, TIES, 2), "sums to 0.5"),
        (lambda: best_of_n(-PROB, TIES, 2), "must sum to 1"),
        (lambda: best_of_n_kl(TIES, 6), "there are 5 rewards"),
        (lambda: best_of_n_kl(TIES[:1], 1), "at least two draws"),
        (lambda: best_of_n_kl(TIES[:0], 1), "not empty"),
        (lambda: best_of_n_kl(TIES[None], 1), "must be a vector"),
        (lambda: best_of_n_kl(TIES / 0, 2), "NaN or infinity"),
        (lambda: best_of_n_kl([1.0, 2.0], 2), "must be a torch tensor"),
        (lambda: best_of_n_reward(TIES, 9), "there are 5 rewards"),
        (lambda: tilted_ceiling(TIES, 1.0), "it must be (P, m)"),
        (lambda: tilted_ceiling(TIES[None, :1], 1.0), "m of at least 2"),
        (lambda: tilted_ceiling(TIES[None] * math.nan, 1.0), "NaN or infinity"),
        (lambda: tilted_ceiling(TIES[None], 0.0), "must be positive and finite"),
        (lambda: tilted_ceiling(TIES[None], math.inf), "must be positive and finite"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert message in str(error.value)
