"""The judge of exercises marks wrong answers wrong, says where, and gives nothing away."""

import math

import pytest
import torch

from klrb.errors import InputError, InputTypeError
from klrb.exact import TabularLM, exact_gradient_moments, exact_kl, exact_moments
from klrb.exercises import Verdict, check_gradient, check_value


def log_ratio(r):
    return (r.policy_logprobs - r.ref_logprobs) * r.mask


def mc(r):
    return log_ratio(r).sum(-1)


def exact_steps(r):
    logp, logq = (o.log_softmax(-1) for o in (r.policy_logits, r.ref_logits))
    return (logp.exp() * (logp - logq)).sum(-1)


def k3(r):
    return torch.expm1(-log_ratio(r)) + log_ratio(r)


RIGHT_VALUES = {
    "mc": (mc, "mc"),
    "k2": (lambda r: log_ratio(r) ** 2 / 2, "k2"),
    "k3": (k3, "k3"),
    "rb per step": (exact_steps, "rb"),
    "rb": (lambda r: (exact_steps(r) * r.mask).sum(-1), "rb"),
    "any unbiased one": (k3, None),
    "an unbiased one with a strange control": (lambda r: mc(r) + torch.expm1(-mc(r)) * 3, None),
}
EOS = -1  # of TabularLM: the last id


def is_end(r):
    return r.completion_ids == r.policy_logits.shape[-1] - 1


WRONG_VALUES = {
    "sign": (lambda r: -mc(r), "sign"),
    "mean over steps": (lambda r: mc(r) / r.mask.sum(-1), "mean over steps"),
    "EOS dropped": (lambda r: (log_ratio(r) * ~is_end(r)).sum(-1), "EOS"),
    "EOS dropped, exact": (lambda r: (exact_steps(r) * ~is_end(r) * r.mask).sum(-1), "EOS"),
    "square": (lambda r: log_ratio(r) ** 2 / 2, "square"),
    "bits": (lambda r: mc(r) / math.log(2), "bits"),
    "padding": (lambda r: (r.policy_logprobs - r.ref_logprobs).sum(-1), "padding"),
    "a constant off": (lambda r: mc(r) + 1e-6, "sum over all strings"),
    "probabilities, not logits": (lambda r: r.policy_logits.softmax(-1).max(-1).values, "sum over"),
}


@pytest.mark.parametrize("name", RIGHT_VALUES)
def test_right_value_is_right(name):
    function, method = RIGHT_VALUES[name]
    verdict = check_value(function, method)
    assert verdict and not verdict.where and not verdict.hint


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_wrong_value_is_wrong(name):
    function, word = WRONG_VALUES[name]
    verdict = check_value(function)
    assert not verdict and word in verdict.hint


@pytest.mark.parametrize("method", ["mc", "k2", "k3", "rb"])
def test_one_method_is_not_another(method):
    for name, (function, own) in RIGHT_VALUES.items():
        if own is not None:
            assert bool(check_value(function, method)) == (own == method), name


def test_numbers_of_a_verdict_are_those_of_the_enumeration():
    pair = TabularLM(2, 3, seed=5), TabularLM(2, 3, seed=6)
    wrong = check_value(lambda r: mc(r) + 0.25, policy=pair[0], reference=pair[1])
    moments = exact_moments(mc, *pair)
    assert wrong.bias == pytest.approx(0.25) and wrong.variance == pytest.approx(moments.variance)
    never = check_value(k3, policy=pair[0], reference=pair[1])
    assert never.negative == 0 and 0 < check_value(mc).negative < 1


def test_the_place_is_the_first_one():
    "One step of one rollout is off: the judge names it"

    def off(r):
        steps = exact_steps(r).clone()
        here = (r.completion_ids[:, 0] == 1) & (r.mask[:, 1] == 1)  # the second step after `b`
        steps[here, 1] += 0.5
        return steps

    policy, reference = TabularLM(2, 3, seed=0), TabularLM(2, 3, seed=1)
    for method in ("rb", None):
        verdict = check_value(off, method, policy, reference)
        assert '("b' in verdict.where and "step 1, unmasked" in verdict.where


def test_wrong_only_on_a_masked_step_is_found():
    def leaky(r):
        return mc(r) + 0.1 * ((1 - r.mask) * r.ref_logprobs).sum(-1)

    assert "step 1, masked" in check_value(leaky).where


def score(r):
    return r.policy_logprobs * r.mask


def to_go(x):
    return x.flip(-1).cumsum(-1).flip(-1)


def rb(r):
    K = exact_steps(r) * r.mask
    later = (to_go(K) - K).detach()
    return (K + score(r) * later).sum(-1).mean()


def leave_one_out(r, own=False):
    value = mc(r).detach().view(-1, 2)
    other = value.flip(1) if not own else value.mean(1, True).expand_as(value)
    return (score(r).sum(-1).view(-1, 2) * (value - other)).mean()


RIGHT_GRADIENTS = {
    "reinforce": (lambda r: (score(r).sum(-1) * mc(r).detach()).mean(), 1),
    "to go": (lambda r: (score(r) * to_go(log_ratio(r).detach())).sum(-1).mean(), 1),
    "rb": (rb, 1),
    "leave-one-out": (leave_one_out, 2),
}
WRONG_GRADIENTS = {
    "differentiated": (lambda r: mc(r).mean(), 1, "mean is zero"),
    "sign": (lambda r: -rb(r), 1, "sign"),
    "exact KL as a loss": (
        lambda r: (exact_steps(r) * r.mask).sum(-1).mean(),
        1,
        "where the string",
    ),
    "k2 as a loss": (lambda r: (log_ratio(r) ** 2 / 2).sum(-1).mean(), 1, "where the string"),
    "k3 as a loss": (lambda r: k3(r).sum(-1).mean(), 1, "other direction"),
    "not halved": (lambda r: 2 * rb(r), 1, "factor of two"),
    "own mean as baseline": (lambda r: leave_one_out(r, own=True), 2, "half"),
    "future with the own step": (
        lambda r: (score(r) * to_go(exact_steps(r) * r.mask).detach()).sum(-1).mean(),
        1,
        "prefix",
    ),
}


@pytest.mark.parametrize("name", RIGHT_GRADIENTS)
def test_right_gradient_is_right(name):
    function, group_size = RIGHT_GRADIENTS[name]
    assert check_gradient(function, group_size=group_size)


@pytest.mark.parametrize("name", WRONG_GRADIENTS)
def test_wrong_gradient_is_wrong(name):
    function, group_size, word = WRONG_GRADIENTS[name]
    verdict = check_gradient(function, group_size=group_size)
    assert not verdict and word in verdict.hint and verdict.where and verdict.bias > 1e-3


def test_gradient_off_at_one_prefix_is_placed_there():
    policy, reference = TabularLM(2, 3, seed=0), TabularLM(2, 3, seed=1)

    def off(r):
        after_b = (r.completion_ids[:, 0] == 1) & (r.mask[:, 1] == 1)
        return rb(r) + 0.1 * (score(r)[:, 1] * (r.completion_ids[:, 1] == 0) * after_b).mean()

    verdict = check_gradient(off, policy, reference)
    assert verdict.where == 'prefix "b", step 1, unmasked'


def test_noise_can_be_part_of_the_question():
    policy, reference = TabularLM(2, 3, seed=0), TabularLM(2, 3, seed=1)
    variance = exact_gradient_moments(rb, policy, reference).variance
    limit = dict(policy=policy, reference=reference, variance_below=1.01 * variance)
    assert check_gradient(rb, **limit)
    louder = check_gradient(RIGHT_GRADIENTS["reinforce"][0], **limit)
    assert not louder and "variance" in louder.hint


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(InputTypeError, match="must return a tensor"):
        check_value(lambda r: 0.5)
    with pytest.raises(InputError, match="returned shape"):
        check_value(lambda r: mc(r).mean())
    with pytest.raises(InputError, match="must be one of mc"):
        check_value(mc, "k4")
    with pytest.raises(InputError, match="together"):
        check_gradient(rb, policy=TabularLM(1, 1))


def test_verdict_is_readable_and_gives_no_answer_away():
    verdict = check_value(lambda r: -mc(r))
    assert isinstance(verdict, Verdict)
    assert str(verdict).startswith("wrong: bias") and "hint: " in str(verdict)
    exact = exact_kl(TabularLM(2, 3, seed=0, scale=1.0), TabularLM(2, 3, seed=100, scale=1.0))
    assert f"{exact.item():.4g}" not in str(check_value(lambda r: 0 * mc(r) + 1))
