"""`parallel_step_kl` on 2 and 4 gloo processes against one process that has the whole heads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from klrb import fused
from klrb.fused import LMHead, linear_step_kl, parallel_step_kl

VOCAB, HEIGHT = 301, 320  # tokens; rows of the padded heads
CASES = {
    "float64": dict(dtype=torch.float64),
    "float32": dict(dtype=torch.float32),
    "bfloat16": dict(dtype=torch.bfloat16),
    "several tiles": dict(dtype=torch.float64, tile_size=60),
    "nothing kept": dict(dtype=torch.float64, tile_size=60, keep=0),
    "a token is excluded": dict(dtype=torch.float64, excluded=True),
    "a frozen reference": dict(dtype=torch.float64, frozen=True),
    "unequal parts": dict(dtype=torch.float64, cuts=[0, 290, 295, 296, 320]),
    "flat logits": dict(dtype=torch.float32, flat=True),
}


def inputs_of(dtype, excluded=False, flat=False, **_):
    "Hidden states, weights and biases of both models, tokens, mask and weights of the outputs."
    gen = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    h, w, c = randn(2, 5, 16), randn(HEIGHT, 16) / 4, randn(HEIGHT)
    g, u, d = randn(2, 5, 12), randn(HEIGHT, 12) / 4, randn(HEIGHT)
    if flat:
        w, u, d = 0 * w, 0 * u, 0.3 * d
        c = d.clone()
        c[7] += 0.01
    if excluded:
        c[11] = d[11] = c[300] = -torch.inf
    ids = torch.randint(VOCAB, (2, 5), generator=gen)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    ids[(ids == 11) | (ids == 300)] = 12
    return [o.to(dtype) for o in (h, w, c, g, u, d)], ids, mask, randn(4, 2, 5)


def run(inputs, ids, weights, call, frozen=False):
    "Values and gradients."
    inputs = [o.clone().requires_grad_(i < 3 or not frozen) for i, o in enumerate(inputs)]
    values = call(*inputs, ids)
    total = sum((x.to(v) * v).sum() for x, v in zip(weights, values))
    wanted = [o for o in inputs if o.requires_grad]
    return list(values), list(torch.autograd.grad(total, wanted))


def with_heads(call, softcap):
    "A function of six tensors and the tokens."
    return lambda h, w, c, g, u, d, ids: call(h, LMHead(w, c, 0.9, softcap), g, LMHead(u, d), ids)


def error(got, want):
    if not want.numel() or not want.norm():
        return got.double().norm().item()
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def errors_of(case, rank, number, group):
    "Largest error of values and of gradients of this process's part."
    fused.TILE_SIZE = case.get("tile_size", 2**19)
    fused.KEEP_UP_TO = case.get("keep", 2**22)
    inputs, ids, mask, weights = inputs_of(**case)
    frozen, softcap = case.get("frozen", False), None if case.get("excluded") else 20.0
    whole = with_heads(lambda *o: linear_step_kl(*o, 0.8, mask, VOCAB), softcap)
    values, grads = run(inputs, ids, weights, whole, frozen)
    cuts = case.get("cuts") if number == 4 else None
    cuts = cuts or [HEIGHT * i // number for i in range(number + 1)]
    rows = slice(cuts[rank], cuts[rank + 1])
    mine = [o if i in (0, 3) else o[rows] for i, o in enumerate(inputs)]

    where = cuts[rank], VOCAB, 0.8, mask, group
    part = with_heads(lambda *o: parallel_step_kl(*o, *where), softcap)
    got, got_grads = run(mine, ids, weights, part, frozen)
    grads = [o if i in (0, 3) else o[rows] for i, o in enumerate(grads)]
    worst = max(map(error, got, values)), max(map(error, got_grads, grads))
    return [o if o == o else 1.0 for o in worst]  # NaN is no agreement


def child(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=4)
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    found = {}
    for name, case in CASES.items():
        found[f"{name}, 4"] = errors_of(case, rank, 4, None)
        found[f"{name}, 2"] = errors_of(case, rank % 2, 2, halves[rank // 2])
    found["missing"] = refusal(lambda h, w, ids: parallel_step_kl(h, w, h, w, ids, 0, 9))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def refusal(call):
    try:
        call(torch.zeros(1, 2, 3), torch.zeros(2, 3), torch.zeros(1, 2, dtype=torch.long))
    except ValueError as fault:
        return str(fault)
    return ""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    "What each of four processes found."
    folder, here = tmp_path_factory.mktemp("gloo"), Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here)])
    env = os.environ | dict(PYTHONPATH=path, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    source = "import sys, test_parallel as t; t.child(int(sys.argv[1]), sys.argv[2])"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", source, str(rank), str(folder)],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    faults = [o.communicate(timeout=240)[1] for o in runs]
    assert not any(o.returncode for o in runs), "\n".join(o[-1500:] for o in faults)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


# Sums of 301 terms in another order, in each dtype; bfloat16's gradients are rounded once
VALUES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6}
GRADS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_each_process_has_what_one_would(name, number, found):
    dtype = CASES[name]["dtype"]
    for one in found:
        of_values, of_grads = one[f"{name}, {number}"]
        assert of_values < VALUES[dtype] and of_grads < GRADS[dtype]


def test_a_missing_part_is_an_error_in_every_process(found):
    assert all(
        "`vocab_size` is 9 but the heads of all processes have 8 rows" in o["missing"]
        for o in found
    )


class Alone:
    "One process."

    def maximum(self, values):
        return values

    total = maximum


@pytest.mark.parametrize("first,vocab", [(-1, 2), (1, 2), (0, 3), (0, 0)])
def test_parts_that_do_not_fit_are_refused(first, vocab):
    message = refusal(lambda h, w, i: parallel_step_kl(h, w, h, w, i, first, vocab, group=Alone()))
    assert "`first_token`" in message and "`vocab_size`" in message


def test_no_step_and_all_steps_masked():
    h, w = torch.randn(2, 3, 4), torch.randn(7, 4).requires_grad_()
    ids = torch.zeros(2, 3, dtype=torch.long)
    values = parallel_step_kl(
        h, w, h, w, ids, 0, 7, completion_mask=torch.zeros(2, 3), group=Alone()
    )
    sum(o.sum() for o in values).backward()
    assert all((o == 0).all() for o in values) and (w.grad == 0).all()
    assert parallel_step_kl(h[:0], w, h[:0], w, ids[:0], 0, 7, group=Alone()).step_kl.shape == (
        0,
        3,
    )
