"""The kernels of `klrb.gpu` on a CPU, as Triton's interpreter runs them; on a card: test_gpu.py.

Triton is no dependency of a CPU installation: where it is missing, these tests are skipped.
"""

import math
import os

import pytest
import test_gpu
import torch
from torch.testing import assert_close

if torch.cuda.is_available():
    pytest.skip("test_gpu.py runs them on the card", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
pytest.importorskip("triton", reason="Triton is not installed here")

from klrb import fused, gpu, steps  # noqa: E402
from klrb.steps import step_kl  # noqa: E402

INF = math.inf
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, on inf - inf


@pytest.fixture(autouse=True)
def through_triton(monkeypatch):
    "Small blocks, and the kernels wherever a card would get them; some call must reach them."
    calls = []

    def kernels(*logits):
        given = all(o.dtype in steps.ON_GPU and o.stride(-1) == 1 for o in logits)
        calls.append(given)
        return gpu if given else None

    for module in (steps, fused):
        monkeypatch.setattr(module, "gpu_kernels", kernels)
    monkeypatch.setattr(gpu, "SUMS_BLOCK", 128)
    monkeypatch.setattr(gpu, "GRADS_BLOCK", 128)
    yield
    assert any(calls)


@dtypes
@pytest.mark.parametrize("noise", [1.0, 1e-2])
def test_step_kl(dtype, noise):
    b = 2 * test_gpu.randn(2, 3, 500)
    a = b + noise * test_gpu.randn(2, 3, 500, seed=1)
    a[0, 0, 3] = a[1, 1, 5] = b[1, 1, 5] = -INF
    a[1, 2] += 40 * (noise == 1)  # float32 keeps few digits of a smaller difference near 40
    x, y = (o.to(dtype).requires_grad_() for o in (a, b))
    exact = [o.detach().double().requires_grad_() for o in (x, y)]
    weights = test_gpu.randn(2, 3, seed=2)
    value, truth = step_kl(x, y), test_gpu.from_logits(*exact)
    assert value.dtype == torch.float32
    assert_close(value.double(), truth, rtol=1e-5, atol=1e-9)
    grads = torch.autograd.grad((weights.float() * value).sum(), (x, y))
    wanted = torch.autograd.grad((weights * truth).sum(), exact)
    for g, w in zip(grads, wanted):
        assert g.dtype == dtype
        # three units: the interpreter cuts digits off where a card rounds
        assert test_gpu.error(g, w.nan_to_num()) < 3 * test_gpu.UNIT[dtype] + 2e-6


def test_limits_of_the_support():
    test_gpu.test_limits_of_the_support("cpu")
    a = torch.tensor([[0.0, INF, 0.0], [0.0, 0.0, 1.0], [0.0, -INF, 1.0]], requires_grad=True)
    b = torch.tensor([[0.0, 0.0, 0.0], [0.0, math.nan, 0.0], [0.5, 3.0, 1.0]], requires_grad=True)
    value = step_kl(a, b)
    assert value[:2].isnan().all()
    assert_close(
        value[2].double(), test_gpu.from_logits(a[2].double(), b[2].double()), rtol=1e-6, atol=0
    )
    value.sum().backward()
    for o in (a, b):
        assert (o.grad[:2] == 0).all() and o.grad[2].abs().sum() > 0


def test_a_probability_below_the_smallest_normal_number():
    "It counts, as in the plain code: the reference excludes it."
    a, b = torch.zeros(2, 1, 130)
    a[0, 7], b[0, 7] = -100.0, -INF
    assert step_kl(a, b) == INF
    a[0, 7] = -140.0  # 0, also in the units in which the kernel sums
    assert step_kl(a, b) < 1e-6


def test_equal_models_and_models_that_nearly_agree():
    a = test_gpu.randn(3, 300).float()
    assert (step_kl(a, a) == 0).all()
    b = 2 * test_gpu.randn(2, 5000).float()
    a = b + 1e-4 * test_gpu.randn(2, 5000, seed=1).float()
    truth = test_gpu.from_logits(a.double(), b.double())
    assert_close(step_kl(a, b).double(), truth, rtol=1e-3, atol=0)


def test_flat_logits_with_one_moved_token(monkeypatch):
    monkeypatch.setattr(gpu, "SUMS_BLOCK", 2048)
    b = 0.3 * test_gpu.randn(1, 50_000).float()
    a = b.clone()
    a[0, b.argmax()] += 0.1
    truth = test_gpu.from_logits(a.double(), b.double())
    assert_close(step_kl(a, b).double(), truth, rtol=1e-4, atol=0)


@dtypes
@pytest.mark.parametrize(
    "settings",
    [
        test_gpu.Settings(),
        test_gpu.Settings(0.5, 3.0, 0.7),
        test_gpu.Settings(vocab_size=290),
    ],
)
@pytest.mark.parametrize("tile_size,keep", [(2**20, 2**22), (320, 0)])
def test_linear_step_kl_and_all_gradients(dtype, settings, tile_size, keep, monkeypatch):
    test_gpu.small_tiles(monkeypatch, tile_size)
    monkeypatch.setattr(fused, "KEEP_UP_TO", keep)
    test_gpu.compare(test_gpu.case(), test_gpu.token_ids(290), "cpu", dtype, settings)


def test_masked_steps_and_excluded_tokens(monkeypatch):
    test_gpu.test_masked_steps_and_excluded_tokens("cpu", torch.float32, monkeypatch)


@pytest.mark.parametrize("wanted", range(4))
def test_one_output_alone_and_an_infinite_kl(wanted):
    "Gradients of one output; where the KL is infinite the log-probabilities keep theirs."
    o, ids = test_gpu.case(), test_gpu.token_ids(200)
    o.d[250] = -INF  # the reference excludes it, the policy does not
    grads = []
    for inputs in (test_gpu.Case(*(x.float() for x in o)), o):
        inputs = test_gpu.Case(*(x.clone().requires_grad_() for x in inputs))
        values = test_gpu.ours if inputs.h.dtype == torch.float32 else test_gpu.oracle
        value = values(inputs, ids)[wanted]
        assert (value == INF).all() == (wanted == 0)
        if wanted:
            g = torch.autograd.grad(value.sum(), inputs, allow_unused=True)
            grads.append([torch.zeros(()) if x is None else x.nan_to_num().double() for x in g])
    for got, want in zip(*grads):
        assert (got - want).norm() <= 1e-5 * want.norm()
