"""The judge of exercises marks wrong answers wrong, says where, and gives nothing away."""

import math

import pytest
import torch

from klrb.best_of_n import best_of_n
from klrb.errors import InputError, InputTypeError
from klrb.exact import TabularLM, enumerate_rollouts, exact_gradient_moments, exact_kl
from klrb.exact import exact_kl_gradient, exact_moments
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


# ---- exercises that bring models or a target of their own: 812, 815, 816 ----

STUDENT, TEACHER = TabularLM(2, 3, seed=0), TabularLM(2, 3, seed=1)


def of_strings(value):
    "Autograd of `value(log p, log q)` of all strings of the pair"
    r = enumerate_rollouts(STUDENT, TEACHER)
    logp, logq = ((o * r.mask).sum(-1) for o in (r.policy_logprobs, r.ref_logprobs))
    return torch.autograd.grad(value(logp, logq), STUDENT.table)[0]


def js_of_texts(logp, logq):
    logm = (0.5 * (logp.exp() + logq.exp())).log()
    return 0.5 * (logp.exp() * (logp - logm) + logq.exp() * (logq - logm)).sum()


def sum_of_forward(logp, logq):
    "Expected sum of the steps' KL(teacher || student) over the student's strings"
    x = enumerate_rollouts(STUDENT, TEACHER)
    return (logp.exp() * (forward_steps(x) * x.mask).sum(-1)).sum()


def forward_steps(r):
    logp, logq = (o.log_softmax(-1) for o in (r.policy_logits, r.ref_logits))
    return (logq.exp() * (logq - logp)).sum(-1)


def soft(r):
    return (forward_steps(r) * r.mask).sum(-1).mean()


def hard(r):
    return -score(r).sum(-1).mean()


def scored(r):
    D = forward_steps(r) * r.mask
    return (D + score(r) * (to_go(D) - D).detach()).sum(-1).mean()


def to_mixture(r, own_prefix):
    "`rb` towards the mean of both models: of texts, or of next-token distributions"
    both = torch.stack([r.policy_logits, r.ref_logits]).detach().log_softmax(-1)
    drawn = torch.stack([r.policy_logprobs, r.ref_logprobs]).detach() * r.mask
    weight = (own_prefix * (drawn.cumsum(-1) - drawn)).log_softmax(0)[..., None]
    logp, logm = r.policy_logits.log_softmax(-1), (weight + both).logsumexp(0)
    K = (logp.exp() * (logp - logm)).sum(-1) * r.mask
    return 0.5 * (K + score(r) * (to_go(K) - K).detach()).sum(-1).mean()


def forward_of_texts(logp, logq):
    return (logq.exp() * (logq - logp)).sum()


DIRECTIONS = {
    "812.2 soft": (soft, forward_of_texts, TEACHER, True),
    "812.2 hard": (hard, forward_of_texts, TEACHER, True),
    "812.2 soft, the student's strings": (soft, forward_of_texts, None, False),
    "812.2 hard, the student's strings": (hard, forward_of_texts, None, False),
    "812.2 the other sign": (lambda r: -hard(r), forward_of_texts, TEACHER, False),
    "812.3 with its score": (scored, sum_of_forward, None, True),
    "812.3 held fixed": (soft, sum_of_forward, None, False),
    "812.3 the future twice": (lambda r: 2 * scored(r) - soft(r), sum_of_forward, None, False),
    "812.6 of texts": (lambda r: to_mixture(r, 1.0), js_of_texts, None, True),
    "812.6 of steps": (lambda r: to_mixture(r, 0.0), js_of_texts, None, False),
    "812.6 towards the teacher": (rb, js_of_texts, None, False),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_other_directions_are_marked(name):
    function, value, sampler, right = DIRECTIONS[name]
    given = dict(policy=STUDENT, reference=TEACHER, sampler=sampler, target=of_strings(value))
    verdict = check_gradient(function, **given)
    assert bool(verdict) == right and (verdict.bias > 0.1) == (not right)
    assert bool(verdict.where) == (not right)


def best_of_four():
    "Best of four as a model, its reference, and the probability of each reward"
    reference = TabularLM(2, 3, seed=0)
    r = enumerate_rollouts(reference, reference)
    reward = ((r.completion_ids == 0) * r.mask).sum(-1).double()
    weights, model = best_of_n(r.prob, reward, 4), TabularLM(2, 3)
    rows = model.prefix_rows(r.completion_ids)
    with torch.no_grad():
        model.table.zero_()
        for n in range(3):
            index = rows[:, n], r.completion_ids[:, n]
            model.table.index_put_(index, weights * r.mask[:, n], accumulate=True)
        model.table.log_()
    return model, reference, torch.stack([r.prob[reward == o].sum() for o in range(4)])


@pytest.mark.parametrize(
    "form, right",
    [
        (lambda at, below: ((at**4 - below**4) / (at - below)).log(), True),
        (lambda at, below: math.log(4) + 3 * at.log(), False),  # as if no two rewards tied
        (lambda at, below: (at**4 - below**4).log(), False),  # of the level, not of the string
        (lambda at, below: ((at**3 - below**3) / (at - below)).log(), False),  # best of three
    ],
)
def test_best_of_four_is_marked(form, right):
    model, reference, levels = best_of_four()

    def answer(r):
        after = levels.cumsum(0)
        level = ((r.completion_ids == 0) * r.mask).sum(-1)
        return form(after[level], (after - levels)[level])

    for method in ("mc", None):
        verdict = check_value(answer, method, policy=model, reference=reference)
        assert bool(verdict) == right and (abs(verdict.bias) > 0.01) == (not right)


def beta_of(r):
    "Where a budget would put beta after one rollout"
    return 0.5 * (mc(r).detach() - 1).clamp(-1, 1).exp()


def weighed(r, pair):
    K = exact_steps(r) * r.mask
    each = (K + score(r) * (to_go(K) - K).detach()).sum(-1).view(-1, 2)
    own = beta_of(r).view(-1, 2)
    return (each * dict(own=own, other=own.flip(1), mean=own.mean(1, True))[pair]).mean()


@pytest.mark.parametrize("pair, right", [("other", True), ("own", False), ("mean", False)])
def test_beta_of_the_same_batch_is_marked(pair, right):
    "816.5; the mean over the batch holds the own rollout too, and has half of the bias"
    r = enumerate_rollouts(STUDENT, TEACHER)
    target = (r.prob * beta_of(r)).sum() * exact_kl_gradient(STUDENT, TEACHER)
    verdict = check_gradient(lambda r: weighed(r, pair), STUDENT, TEACHER, target, group_size=2)
    assert bool(verdict) == right and (verdict.bias > 0.1) == (not right)
