"""Distributions that differ in a few tokens of a long flat vocabulary: the digits of a tiny KL.

δ is nearly constant there, but for the tokens that differ. Sums that refer to another constant lose
its square. The truth is eq. 5 of kernels/201_digits in float64, from the same float32 logits.
"""

import pytest
import torch

from klrb import fused, steps
from klrb.fused import linear_step_kl
from klrb.steps import step_kl

VOCABS = [50_000, 150_000]
LIMIT = 1e-4  # of the relative error, promised in kernels/201_digits


def moved(kind, vocab_size, rows=2, sigma=0.3):
    "Logits of policy and reference."
    ref = sigma * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0))
    policy, top = ref.clone(), ref.argmax(-1, keepdim=True)
    if kind == "top":
        policy.scatter_add_(-1, top, torch.full((rows, 1), 0.1))
    elif kind == "top of the reference":
        return moved("top", vocab_size, rows, sigma)[::-1]
    elif kind == "top, and a constant":  # 2, so that the differences stay exact to some 1e-7
        policy.scatter_add_(-1, top, torch.full((rows, 1), 0.1)).add_(2)
    elif kind == "one down":  # among the tokens that the offset is estimated from
        policy[:, 1] -= 0.5
    elif kind == "a block":
        policy[:, 700:800] += 0.1
    elif kind == "a third":
        policy[:, : vocab_size // 3] += 0.1
    elif kind == "uniform":
        ref, policy = torch.zeros_like(ref), torch.zeros_like(ref)
        policy[:, 7] = 0.05
    return policy, ref


KINDS = [
    "top",
    "top of the reference",
    "top, and a constant",
    "one down",
    "a block",
    "a third",
    "uniform",
]


def truth(policy, ref):
    "KL and its gradients in both logits."
    logp, logq = (o.double().log_softmax(-1) for o in (policy, ref))
    p, d = logp.exp(), logp - logq
    kl = (p * (torch.expm1(-d) + d)).sum(-1)
    return kl, p * (d - kl[:, None]), p * torch.expm1(-d)


def check(values, exact):
    "Each step's KL, and each step's gradients as vectors."
    kl, *grads = (o.detach().double() for o in values)
    assert ((kl - exact[0]).abs() / exact[0]).max() < LIMIT
    for found, wanted in zip(grads, exact[1:]):
        assert ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max() < LIMIT


COMPILED = pytest.param(True, id="compiled", marks=pytest.mark.slow)  # it compiles


@pytest.fixture(params=[pytest.param(False, id="eager"), COMPILED])
def code(request, monkeypatch):
    "Which code runs; the compiled code adds up in another order."
    size = 0 if request.param else 2**60
    for module in (steps, fused):
        monkeypatch.setattr(module, "COMPILE_FROM", size)


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("kind", KINDS)
def test_from_logits(code, kind, vocab_size):
    policy, ref = (o.requires_grad_() for o in moved(kind, vocab_size))
    kl = step_kl(policy, ref)
    check((kl, *torch.autograd.grad(kl.sum(), (policy, ref))), truth(policy.detach(), ref.detach()))


def from_weights(policy, ref):
    "The same logits as products: step i has hidden state e_i, column i of a weight its logits."
    weights = [o.T.contiguous().requires_grad_() for o in (policy, ref)]
    rows = len(policy)
    hidden, ids = torch.eye(rows)[None], torch.zeros(1, rows, dtype=torch.long)
    kl = linear_step_kl(hidden, weights[0], hidden, weights[1], ids).step_kl[0]
    return kl, *(o.T for o in torch.autograd.grad(kl.sum(), weights))


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("kind", KINDS)
def test_from_hidden_states(code, kind, vocab_size, monkeypatch):
    "Tiles of 7,000 columns: most hold no token that differs, and their offsets are 0."
    monkeypatch.setattr(fused, "TILE_SIZE", 2 * 7000)
    monkeypatch.setattr(fused, "KEEP_UP_TO", 0)
    policy, ref = moved(kind, vocab_size)
    check(from_weights(policy, ref), truth(policy, ref))


def test_a_token_that_holds_the_mass_beside_a_flat_tail():
    "The top token has nine tenths; the tail differs by a constant, or in one token only."
    policy, ref = moved("top", 50_000)
    for o in (policy, ref):
        o[:, 3] = 13.0
    policy[:, 10:] += 1e-3
    check(from_weights(policy, ref), truth(policy, ref))


def test_the_example_of_the_notebook_is_this_small():
    "So that the cases above stay what they are meant to be."
    kl = [truth(*moved("top", o))[0].mean() for o in VOCABS]
    assert 1e-7 < kl[0] < 1e-6 and 5e-8 < kl[1] < 5e-7
