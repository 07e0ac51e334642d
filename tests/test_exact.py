"""The judge: enumeration against recursions, finite differences and brute force written here."""
import ast
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

import klrb.exact
from klrb.exact import (MarkovLM, TabularLM, enumerate_rollouts, exact_gradient_moments, exact_kl, exact_kl_gradient,
                        exact_moments, markov_kl)
from rounding import agree, unbiased, unit

SIZES = [(1, 1), (1, 4), (2, 1), (2, 3), (2, 5), (3, 3), (4, 2), (4, 4)]


def pair(vocab_size, max_length, seed=0, scale=1.0):
    return (TabularLM(vocab_size, max_length, seed=seed, scale=scale),
            TabularLM(vocab_size, max_length, seed=seed + 1000, scale=scale))


def string_kl(policy, reference):
    "KL by a dictionary of strings, built by walking prefixes."
    def strings(model, row=0, prefix=(), prob=1.0):
        probs = model.table[row].softmax(-1).tolist()
        out = {prefix + (model.eos_id,): prob * probs[-1]}
        for v in range(model.vocab_size):
            longer = prefix + (v,)
            child = strings(model, row * model.vocab_size + v + 1, longer, prob * probs[v]) if len(longer) < model.max_length else {longer: prob * probs[v]}
            out.update(child)
        return out
    p, q = strings(policy), strings(reference)
    return sum(p[y] * math.log(p[y] / q[y]) for y in p), p


def sequence_k1(r): return ((r.policy_logprobs - r.ref_logprobs) * r.mask).sum(-1)


@pytest.mark.parametrize("vocab_size,max_length", SIZES)
def test_enumeration_against_a_tree_walk(vocab_size, max_length):
    policy, reference = pair(vocab_size, max_length)
    exact, strings = string_kl(policy, reference)
    rollouts = enumerate_rollouts(policy, reference)
    assert len(rollouts) == len(strings)
    agree(rollouts.prob.sum().item(), 1.0)
    agree(exact_kl(policy, reference).item(), exact)
    for ids, mask, prob in zip(rollouts.completion_ids.tolist(), rollouts.mask.tolist(), rollouts.prob.tolist()):
        agree(strings[tuple(i for i, m in zip(ids, mask) if m)], prob)


def test_rollouts_have_the_shapes_of_a_real_model():
    r = enumerate_rollouts(*pair(3, 4))
    B, T, V = len(r), 4, 4
    assert r.policy_logits.shape == r.ref_logits.shape == (B, T, V)
    assert r.policy_logprobs.shape == r.ref_logprobs.shape == r.old_logprobs.shape == r.mask.shape == (B, T)
    assert r.policy_logits.requires_grad and not r.ref_logits.requires_grad and not r.prob.requires_grad
    after_eos = (r.completion_ids == 3).cumsum(1) - (r.completion_ids == 3).long() > 0
    assert torch.equal(r.mask == 0, after_eos)
    assert len(r[:5]) == 5 and r[:5].policy_logits.shape == (5, T, V)


def test_kl_of_equal_uniform_and_excluding_models():
    policy, reference = pair(2, 3)
    assert exact_kl(policy, policy).item() == 0
    uniform = TabularLM(2, 3, scale=0.0)
    entropy = -(enumerate_rollouts(policy, policy).prob.log() * enumerate_rollouts(policy, policy).prob).sum()
    r = enumerate_rollouts(policy, uniform)
    agree(exact_kl(policy, uniform), -entropy + (r.prob * r.mask.sum(-1)).sum() * math.log(3), check_dtype=False)
    with torch.no_grad(): reference.table[0, 0] = -torch.inf
    assert exact_kl(policy, reference).item() == math.inf
    assert exact_kl(reference, policy).isfinite()
    assert len(enumerate_rollouts(reference, policy)) < len(enumerate_rollouts(policy, reference))  # what cannot be drawn is left out


@pytest.mark.parametrize("vocab_size,max_length", [(2, 3), (3, 2)])
def test_gradient_against_finite_differences(vocab_size, max_length):
    policy, reference = pair(vocab_size, max_length)
    gradient, h = exact_kl_gradient(policy, reference), 1e-6
    gen = torch.Generator().manual_seed(0)
    start = policy.table.detach().clone()
    for _ in range(3):
        direction = torch.randn(start.shape, generator=gen, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad(): policy.table.copy_(start + sign * h * direction)
            values.append(exact_kl(policy, reference).item())
        third = direction.abs().sum()**3 * h**2  # what a central difference leaves out: derivatives of a softmax are below 1
        tolerance = third + 2**6 * unit(torch.float64) / h  # and the rounding of both values
        assert abs((values[0] - values[1]) / (2 * h) - (gradient * direction).sum()) < tolerance


@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_moments_against_brute_force(group_size):
    policy, reference = pair(2, 2)
    r = enumerate_rollouts(policy, reference)
    values = sequence_k1(r).detach().tolist()
    mean = square = 0.0
    for group in itertools.product(range(len(r)), repeat=group_size):
        prob = math.prod(r.prob[i].item() for i in group)
        estimate = max(values[i] for i in group)  # not a mean: something that depends on the whole group
        mean, square = mean + prob * estimate, square + prob * estimate**2
    biggest = (lambda x: sequence_k1(x).max().expand(len(x))) if group_size > 1 else sequence_k1
    m = exact_moments(biggest, policy, reference, group_size)
    agree(m.mean, mean)
    agree(m.variance, square - mean**2)
    agree(m.std, math.sqrt(m.variance))


def test_moments_under_another_sampler():
    policy, reference = pair(2, 3)
    old = TabularLM(2, 3, seed=5)
    ratio = lambda r: ((r.policy_logprobs - r.old_logprobs) * r.mask).sum(-1).exp()
    agree(exact_moments(ratio, policy, reference, sampler=old).mean, 1.0)
    weighted = exact_moments(lambda r: ratio(r) * sequence_k1(r), policy, reference, sampler=old)
    agree(weighted.mean, exact_kl(policy, reference).item())


@pytest.mark.parametrize("group_size", [1, 2])
def test_gradient_moments_against_one_backward_per_group(group_size):
    policy, reference = pair(2, 2)
    def surrogate(r):
        logp = (r.policy_logprobs * r.mask).sum(-1)
        weight = sequence_k1(r).detach().view(-1, group_size)
        return (logp.view(-1, group_size) * (weight - weight.flip(1) * (group_size > 1))).mean()
    r = enumerate_rollouts(policy, reference)
    mean, square = 0.0, 0.0
    for group in itertools.product(range(len(r)), repeat=group_size):
        prob = math.prod(r.prob[i].item() for i in group)
        gradient = torch.autograd.grad(surrogate(r[list(group)]), policy.table, retain_graph=True)[0]
        mean, square = mean + prob * gradient, square + prob * gradient.square().sum().item()
    m = exact_gradient_moments(surrogate, policy, reference, group_size)
    agree(m.mean, mean)
    agree(m.variance, square - mean.square().sum().item())
    assert unbiased(m)


def test_many_chunks_give_the_same_moments(monkeypatch):
    policy, reference = pair(2, 3)
    surrogate = lambda r: ((r.policy_logprobs * r.mask).sum(-1) * sequence_k1(r).detach()).mean()
    whole = exact_gradient_moments(surrogate, policy, reference, 2)
    one_by_one = exact_gradient_moments(surrogate, policy, reference, 2, separate=True)
    agree(whole.mean, one_by_one.mean)
    agree(whole.variance, one_by_one.variance)


def test_mixing_prompts_is_noticed():
    policy, reference = pair(2, 3)
    token_mean = lambda r: sequence_k1(r).sum() / r.mask.sum()
    with pytest.raises(ValueError, match="separate=True"): exact_gradient_moments(token_mean, policy, reference)
    assert exact_gradient_moments(token_mean, policy, reference, separate=True).relative_bias > 1e-3


@pytest.mark.parametrize("length", [1, 2, 5])
def test_markov_recursion_against_enumeration(length):
    policy, reference = (MarkovLM(2, length, seed=s, eos_bias=-1.0) for s in (0, 1))
    tables = []
    for markov in (policy, reference):
        table = TabularLM(2, length)
        ids = enumerate_rollouts(table, table).completion_ids
        with torch.no_grad(): table.table[table.prefix_rows(ids)] = markov(ids)
        tables.append(table)
    agree(markov_kl(policy, reference), exact_kl(*tables))
    assert markov_kl(policy, policy).item() == 0
    agree(markov_kl(policy, reference, 1).item(), exact_kl(*tables).item() if length == 1 else markov_kl(*(MarkovLM(2, 1, seed=s, eos_bias=-1.0) for s in (0, 1))).item())


def test_markov_support():
    policy, reference = MarkovLM(2, 50, seed=0), MarkovLM(2, 50, seed=1)
    with torch.no_grad(): policy.table[:, 0] = -torch.inf
    assert markov_kl(policy, reference).isfinite()
    assert markov_kl(reference, policy).item() == math.inf


@pytest.mark.parametrize("call,message", [
    (lambda: TabularLM(0, 3), "`vocab_size` is 0"),
    (lambda: TabularLM(2, 2.5), "`max_length` is 2.5"),
    (lambda: MarkovLM(2, 0), "`max_length` is 0"),
    (lambda: enumerate_rollouts(TabularLM(2, 3), TabularLM(3, 3)), "`reference`"),
    (lambda: exact_kl(TabularLM(2, 3), TabularLM(2, 4)), "`reference`"),
    (lambda: enumerate_rollouts(*pair(2, 3), sampler=TabularLM(3, 3)), "`sampler`"),
    (lambda: exact_moments(sequence_k1, *pair(2, 2), group_size=0), "`group_size` is 0"),
    (lambda: exact_gradient_moments(sequence_k1, *pair(2, 2), group_size=1.5), "`group_size` is 1.5"),
    (lambda: exact_gradient_moments(sequence_k1, *pair(2, 2)), "`surrogate` returned shape"),
    (lambda: exact_moments(lambda r: r.prob.sum(), *pair(2, 2)), "one value per rollout"),
    (lambda: markov_kl(MarkovLM(2, 5), MarkovLM(3, 5)), "`policy` has 2 tokens"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_the_judge_imports_nothing_of_ours():
    "A check that shares code with what it checks shares its faults."
    tree = ast.parse(Path(klrb.exact.__file__).read_text())
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert all(name.split(".")[0] in sys.stdlib_module_names | {"torch"} for name in names), names
