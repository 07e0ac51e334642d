"""The kernels against float64 automatic differentiation of the textbook form."""

import math
import warnings

import pytest
import torch
from rounding import FUNCTION, agree, assert_within, exact_step_kl, gamma, step_kl_error, unit
from torch.testing import assert_close

from klrb import fused, steps
from klrb.fused import LMHead, linear_step_kl
from klrb.steps import step_kl

INF = math.inf


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def textbook(policy_logits, ref_logits):
    "Step KL, log p and log q in float64; -inf logits allowed."
    logp, logq = policy_logits.double().log_softmax(-1), ref_logits.double().log_softmax(-1)
    return torch.where(logp > -INF, logp.exp() * (logp - logq), 0.0).sum(-1), logp, logq


def distant_pair(true_kl, rows=6, vocab_size=49152, seed=0):
    "float32 logits whose KL is near `true_kl`, by scaling the noise between them."
    ref = 2 * torch.randn(rows, vocab_size, generator=generator(seed))
    noise, scale = (
        torch.randn(rows, vocab_size, generator=generator(seed + 1)),
        (2 * true_kl) ** 0.5,
    )
    for _ in range(6):
        scale *= (true_kl / textbook(ref + scale * noise, ref)[0].mean().item()) ** 0.5
    return ref + scale * noise, ref


# ---- step_kl ----


@pytest.mark.parametrize(
    "true_kl,limit",
    [(1e-8, 1e-3), (1e-6, 1e-4), (1e-4, 1e-5), (1e-2, 1e-5), (0.3, 1e-5), (10.0, 1e-5)],
)
def test_float32_keeps_its_digits(true_kl, limit):
    """The float32 logits are exact: value and both gradients against float64 from the same logits.

    `limit` is what the notebook promises for a vocabulary of 49,152, 20 times what a CPU gave.
    """
    a, b = distant_pair(true_kl)
    within, errors = exact_step_kl(a, b), step_kl_error(a, b, torch.float32)
    truth, logp, logq = textbook(a, b)
    d, p = logp - logq, logp.exp()
    a, b = a.requires_grad_(), b.requires_grad_()
    value = step_kl(a, b)
    assert ((value.double() - truth).abs() / truth).max() < limit
    grads = torch.autograd.grad(value.sum(), (a, b))
    for ours, exact in zip(grads, (p * (d - truth[:, None]), p * torch.expm1(-d))):
        assert (ours.double() - exact).norm() / exact.norm() < 1e-5
    for ours, exact, error in zip((value, *grads), within, errors):
        assert_within(ours, exact, error)


@pytest.mark.parametrize("true_kl,limit", [(1e-6, 1e-3), (1e-2, 1e-5)])
def test_a_constant_between_the_models_is_removed(true_kl, limit):
    "Logits that differ by a constant are one distribution; float32 loses 2e-6 near 40, no more."
    a, b = distant_pair(true_kl)
    a = a + 40
    truth = textbook(a, b)[0]
    assert ((step_kl(a, b).double() - truth).abs() / truth).max() < limit
    assert_within(step_kl(a, b), truth, step_kl_error(a, b, torch.float32).kl)


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 100])
@pytest.mark.parametrize("one_sided", ["both", "policy", "reference"])
def test_step_kl_chunks_and_sides(monkeypatch, rows_per_chunk, one_sided):
    monkeypatch.setattr(steps, "chunk_rows", lambda *args: rows_per_chunk)
    a, b = 2 * torch.randn(2, 2, 4, 11, generator=generator(), dtype=torch.float64)
    a[0, 1, :3] = b[1, 2, 4:6] = -INF
    a[1, 2, 4:6] = -INF
    a.requires_grad_(one_sided != "reference")
    b.requires_grad_(one_sided != "policy")
    weights = torch.randn(2, 4, generator=generator(1), dtype=torch.float64)
    inputs = [o for o in (a, b) if o.requires_grad]
    truth, logp, logq = textbook(a.detach(), b.detach())
    value = step_kl(a, b)
    agree(value, truth)
    p, q = logp.exp(), logq.exp()
    exact = {id(a): p * (torch.where(p > 0, logp - logq, 0.0) - truth[..., None]), id(b): q - p}
    for ours, o in zip(torch.autograd.grad((weights * value).sum(), inputs), inputs):
        agree(ours, weights[..., None] * exact[id(o)])


def test_strides_do_not_matter():
    a, b = torch.randn(2, 3, 4, 10, generator=generator(), dtype=torch.float64)
    truth = textbook(a, b)[0]
    agree(step_kl(a.transpose(0, 1), b.transpose(0, 1)), truth.T)
    agree(step_kl(a[..., ::2], b[..., ::2]), textbook(a[..., ::2], b[..., ::2])[0])
    one = b[:1].clone().requires_grad_()
    value = step_kl(a, one.expand(3, 4, 10))
    agree(value, textbook(a, one.detach().expand(3, 4, 10))[0])
    value.sum().backward()  # the gradient of an expanded tensor is a sum
    agree(one.grad, (one.detach().softmax(-1) - a.softmax(-1)).sum(0, keepdim=True))


def test_a_step_without_a_finite_value_gives_no_gradient():
    a = torch.tensor(
        [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [math.nan, 0.0, 0.0], [0.0, 0.0, 1.0], [-INF] * 3],
        requires_grad=True,
    )
    b = torch.tensor(
        [[1.0, 0.0, 0.0], [0.0, 0.0, -INF], [0.0, 0.0, 0.0], [math.nan, 0.0, 0.0], [0.0] * 3],
        requires_grad=True,
    )
    value = step_kl(a, b)
    assert value[0].isfinite() and value[1] == INF and value[2:].isnan().all()
    value.sum().backward()
    for o in (a, b):
        assert o.grad[0].abs().sum() > 0 and (o.grad[1:] == 0).all()


@pytest.mark.parametrize("function", ["step_kl", "linear_step_kl"])
def test_second_derivatives_are_refused(function):
    x = torch.randn(1, 2, 5, generator=generator(), dtype=torch.float64, requires_grad=True)
    y, w = x.detach().flip(-1), torch.randn(7, 5, generator=generator(1), dtype=torch.float64)
    f = {
        "step_kl": lambda o: step_kl(o, y),
        "linear_step_kl": lambda o: linear_step_kl(o, w, y, w, torch.zeros(1, 2).long()).step_kl,
    }[function]
    assert torch.autograd.gradcheck(f, x)
    with pytest.raises(RuntimeError, match=f"`{function}` has no second derivative"):
        torch.autograd.gradgradcheck(f, x)
    with pytest.raises(
        RuntimeError, match="no second derivative"
    ):  # also where the rest of a sum has one
        torch.autograd.grad((f(x) + (x**3).sum()).sum(), x, create_graph=True)


# ---- linear_step_kl ----


def case(shape=(2, 3), hidden=(5, 4), vocab_size=13, seed=0, dtype=torch.float64, bias=True):
    "Hidden states, weight and bias of two models, and tokens."
    gen = generator(seed)

    def randn(*o):
        return torch.randn(*o, generator=gen, dtype=torch.float64).to(dtype)

    out = []
    for h in hidden:
        out += [randn(*shape, h), randn(vocab_size, h), randn(vocab_size) if bias else None]
    return out, torch.randint(vocab_size, shape, generator=gen)


def naive(inputs, ids, scales=((1.0, None), (1.0, None)), temperature=1.0, mask=None):
    "The four outputs from logits, by automatic differentiation in float64."
    logs = []
    for (h, w, c), (scale, cap) in zip((inputs[:3], inputs[3:]), scales):
        z = h.double() @ w.double().T
        z = (z if c is None else z + c.double()) * scale
        if cap:
            z = cap * torch.tanh(z / cap)
        logs.append((z / temperature).log_softmax(-1))
    logp, logq = logs
    p, finite = logp.exp(), logp > -INF

    def at(o):
        return o.gather(-1, ids.clamp(min=0)[..., None])[..., 0]

    def safe(o):
        return torch.where(finite, o, 0.0)

    out = [
        (p * (safe(logp) - torch.where(finite, logq, 0.0))).sum(-1),
        at(logp),
        at(logq),
        -(p * safe(logp)).sum(-1),
    ]
    return out if mask is None else [torch.where(mask, o, 0.0) for o in out]


def ours(inputs, ids, scales=((1.0, None), (1.0, None)), **kwargs):
    heads = [LMHead(w, c, *o) for (_, w, c), o in zip((inputs[:3], inputs[3:]), scales)]
    return list(linear_step_kl(inputs[0], heads[0], inputs[3], heads[1], ids, **kwargs))


def values_and_gradients(function, inputs, ids, **kwargs):
    "Four outputs, and what a random weighting of them passes to each input."
    tensors = [o.requires_grad_() for o in inputs if o is not None]
    weights = torch.randn(4, *ids.shape, generator=generator(9), dtype=torch.float64)
    values = function(inputs, ids, **kwargs)
    total = sum((w * o.double()).sum() for w, o in zip(weights, values))
    return [o.detach() for o in values], torch.autograd.grad(total, tensors), weights


def same_values_and_gradients(inputs, ids, completion_mask=None, **kwargs):
    "In float64. The logits stay below 20, so every sum is at most some 20 times its result or 1."
    mask = None if completion_mask is None else completion_mask.bool()
    values, grads, _ = values_and_gradients(
        ours, inputs, ids, completion_mask=completion_mask, **kwargs
    )
    exact, exact_grads, _ = values_and_gradients(naive, inputs, ids, mask=mask, **kwargs)
    agree(values, exact, size=20)
    for found, truth in zip(grads, exact_grads):
        agree(found, truth, size=20 * max(1, truth.abs().max().item()))


def rounding_of_heads(inputs, ids, weights):
    """What float32 sums may do to the outputs and the gradients of `inputs`, from products up.

    First the logits, then each output and its gradient in the logits, then the products.
    """
    inputs = [o if o is None else o.detach().double() for o in inputs]
    logits, logits_error = [], []
    for h, w, c in (inputs[:3], inputs[3:]):
        c = torch.zeros(len(w)).double() if c is None else c
        logits.append(h @ w.T + c)
        logits_error.append(gamma(h.shape[-1] + 1, torch.float32) * (h.abs() @ w.T.abs() + c.abs()))
    kl, kl_p, kl_q = step_kl_error(*logits, torch.float32, *logits_error)
    u, vocab_size = unit(torch.float32), logits[0].shape[-1]
    logp, logq = (o.log_softmax(-1) for o in logits)
    p, q, entropy = logp.exp(), logq.exp(), -(logp.exp() * logp).sum(-1, True)
    outputs, grads, grad_errors = [kl], [], []
    sums = gamma(vocab_size, torch.float32)
    relative = []  # errors of p and q, and so of their sums
    for z, error, prob in zip(logits, logits_error, (p, q)):
        element = error + u * ((z - z.amax(-1, True)).abs() + FUNCTION)
        relative.append(element + (prob * element).sum(-1, True) + sums + u * z.abs())
    for z, error, logs, rel in zip(logits, logits_error, (logp, logq), relative):

        def at(o):
            return o.gather(-1, ids[..., None])[..., 0]

        outputs.append(at(error + rel + u * (z.abs() + logs.abs())))
    surprise = (logp + entropy).abs()
    outputs.append(
        ((p * surprise * relative[0]).sum(-1, True) + (2 * sums + 4 * u) * (1 + entropy))[..., 0]
    )
    g_kl, g_p, g_q, g_h = weights[..., None].abs()
    exact = torch.zeros_like(p).scatter_(-1, ids[..., None], 1.0)
    d = logp - logq
    grads.append(
        g_kl * p * (d - (p * d).sum(-1, True)).abs() + g_p * (exact - p).abs() + g_h * p * surprise
    )
    grads.append(g_kl * (q - p).abs() + g_q * (exact - q).abs())
    grad_errors.append(
        g_kl * kl_p
        + g_p * p * relative[0]
        + g_h * p * (surprise * relative[0] + relative[0] + outputs[3][..., None])
    )
    grad_errors.append(g_kl * kl_q + g_q * q * relative[1])
    out = []
    for g, error, (h, w, c) in zip(grads, grad_errors, (inputs[:3], inputs[3:])):
        error = (error + 4 * u * g).flatten(0, 1)
        g, h = g.flatten(0, 1), h.flatten(0, 1)
        out.append(((error + sums * g) @ w.abs()).view(*ids.shape, -1))
        rows = gamma(len(h), torch.float32)
        out.append((error + rows * g).T @ h.abs())
        if c is not None:
            out.append((error + rows * g).sum(0))
    return outputs, out


@pytest.mark.parametrize(
    "tile_rows,tile_size", [(1024, 2**20), (4, 12), (1, 1), (2, 26)]
)  # one tile; tiles that divide 6 and 13 or do not
@pytest.mark.parametrize(
    "scales", [((1.0, None), (1.0, None)), ((0.3, None), (1.0, 2.0)), ((2.0, 3.0), (0.5, None))]
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("keep_up_to", [0, 2**22])
def test_grid_against_autograd(monkeypatch, tile_rows, tile_size, scales, temperature, keep_up_to):
    monkeypatch.setattr(fused, "KEEP_UP_TO", keep_up_to)
    monkeypatch.setattr(fused, "TILE_ROWS", tile_rows)
    monkeypatch.setattr(fused, "TILE_SIZE", tile_size)
    inputs, ids = case()
    same_values_and_gradients(inputs, ids, scales=scales, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(3))
def test_low_precision_inputs_are_summed_in_float32(monkeypatch, dtype, seed):
    "Only the inputs are rounded to `dtype`, and the gradients that go back to them."
    monkeypatch.setattr(fused, "TILE_SIZE", 600)
    inputs, ids = case((2, 5), (8, 8), 301, seed, dtype, bias=seed == 1)
    values, grads, weights = values_and_gradients(ours, inputs, ids)
    exact, _, _ = values_and_gradients(naive, inputs, ids)
    wide = [o if o is None else o.detach().double() for o in inputs]
    _, exact_grads, _ = values_and_gradients(naive, wide, ids)
    errors, grad_errors = rounding_of_heads(inputs, ids, weights)
    assert all(o.dtype == torch.float32 for o in values) and all(o.dtype == dtype for o in grads)
    for found, truth, error in zip(values, exact, errors):
        assert_within(found, truth, error)
    least = torch.finfo(dtype).smallest_normal
    for found, truth, error in zip(grads, exact_grads, grad_errors):
        assert_within(found, truth, error + unit(dtype) * (truth.abs() + error).clamp(min=least))


@pytest.mark.parametrize("tile_size,keep_up_to", [(2**20, 2**22), (12, 2**22), (12, 0)])
def test_excluded_tokens_and_masked_steps(monkeypatch, tile_size, keep_up_to):
    monkeypatch.setattr(fused, "KEEP_UP_TO", keep_up_to)
    monkeypatch.setattr(fused, "TILE_SIZE", tile_size)
    inputs, ids = case()
    inputs[2][3:6], inputs[5][4:6] = (
        -INF,
        -INF,
    )  # the policy excludes one more token; the first tile of the reference is whole
    inputs[2][0] = -INF
    ids = torch.where(torch.isin(ids, torch.tensor([0, 3, 4, 5])), 7, ids)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    ids = torch.where(mask.bool(), ids, -100)
    same_values_and_gradients(inputs, ids, completion_mask=mask)
    same_values_and_gradients(
        inputs, ids, completion_mask=torch.zeros_like(mask)
    )  # all masked: zeros, with a graph
    values = ours(inputs, ids, completion_mask=mask)
    garbage = [
        o
        if o is None or o.ndim != 3
        else o.detach().masked_fill(mask[..., None] == 0, math.nan).requires_grad_()
        for o in inputs
    ]
    agree(ours(garbage, ids, completion_mask=mask), values)
    sum(o.sum() for o in ours(garbage, ids, completion_mask=mask)).backward()
    assert all(
        o.grad.isfinite().all()
        for o in garbage
        if o is not None and o.is_leaf and o.grad is not None
    )
    inputs[5].data[7] = -INF  # a token that the policy allows and the reference does not
    infinite = ours(inputs, ids, completion_mask=mask)
    assert (
        (infinite[0][mask.bool()] == INF).all()
        and infinite[1].isfinite().all()
        and infinite[3].isfinite().all()
    )
    inputs[0].grad = None
    (
        infinite[0] + infinite[1]
    ).sum().backward()  # the KL passes nothing on, the log-probability does
    logprob = naive(inputs, ids, mask=mask.bool())[1]
    agree(inputs[0].grad, torch.autograd.grad(logprob.sum(), inputs[0])[0])


@pytest.mark.parametrize("needed", [(0,), (1,), (3,), (4, 5), (0, 1, 2)])
def test_gradients_only_where_they_are_wanted(needed):
    inputs, ids = case()
    for i in needed:
        inputs[i].requires_grad_()
    chosen = [inputs[i] for i in needed]

    def total(out):
        return sum((k + 1) * o.sum() for k, o in enumerate(out))

    agree(
        torch.autograd.grad(total(ours(inputs, ids)), chosen),
        torch.autograd.grad(total(naive(inputs, ids)), chosen),
    )
    if needed == (0,):
        ours(inputs, ids)[0].sum().backward()
        assert inputs[1].grad is None and inputs[3].grad is None


def test_one_tied_head_strides_and_an_empty_batch():
    inputs, ids = case(hidden=(5, 5))
    weight = inputs[1].clone().requires_grad_()
    tied = [
        inputs[0].transpose(0, 1).contiguous().transpose(0, 1),
        weight,
        None,
        inputs[3][:1].expand(2, 3, 5),
        weight,
        None,
    ]

    def total(out):
        return sum(o.sum() for o in out)

    agree(
        torch.autograd.grad(total(ours(tied, ids)), weight),
        torch.autograd.grad(total(naive(tied, ids)), weight),
    )
    wide = torch.randn(5, 13, generator=generator(3), dtype=torch.float64).T  # a transposed weight
    agree(
        ours([inputs[0], wide, None, inputs[3], wide, None], ids),
        naive([inputs[0], wide, None, inputs[3], wide, None], ids),
    )
    same = ours([inputs[0], wide, None, inputs[0], wide, None], ids)
    assert (same[0] == 0).all() and (same[1] == same[2]).all()
    empty = [o[:0].requires_grad_() if o is not None and o.ndim == 3 else o for o in tied]
    out = ours(empty, ids[:0])
    assert all(o.shape == (0, 3) for o in out)
    total(out).backward()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("vocab_size", [None, 10, 12])
def test_padded_heads_are_masked_or_refused(vocab_size):
    inputs, ids = case()
    inputs[4], inputs[5] = inputs[4][:12], inputs[5][:12]
    if vocab_size is None:
        with pytest.raises(ValueError, match="13 tokens and `ref_head` 12.*`vocab_size`"):
            ours(inputs, ids)
        return
    ids = ids % vocab_size
    masked = [o.clone() if o is not None else None for o in inputs]
    masked[2][vocab_size:] = -INF
    masked[4], masked[5] = (
        torch.cat([inputs[4], torch.zeros(1, 4)]),
        torch.cat([inputs[5], torch.zeros(1)]),
    )
    masked[5][vocab_size:] = -INF
    agree(ours(inputs, ids, vocab_size=vocab_size), naive(masked, ids))
    inputs[1].requires_grad_()
    assert (
        torch.autograd.grad(ours(inputs, ids, vocab_size=vocab_size)[0].sum(), inputs[1])[0][
            vocab_size:
        ]
        == 0
    ).all()


def test_autocast_does_not_round_the_logits():
    inputs, ids = case((2, 4), (32, 32), 50, dtype=torch.float32, bias=False)
    plain = ours(inputs, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(ours(inputs, ids), plain, rtol=0, atol=0)  # the same sums


def test_reference_close_to_the_policy():
    "The sum over tiles keeps the digits of a small KL; the logits are float64."
    h, w = (
        torch.randn(1, 4, 6, generator=generator(), dtype=torch.float64),
        torch.randn(500, 6, generator=generator(1), dtype=torch.float64),
    )
    near = h + 1e-7 * torch.randn(1, 4, 6, generator=generator(2), dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "TILE_SIZE", 4 * 33)
        value = linear_step_kl(h, w, near, w, torch.zeros(1, 4).long()).step_kl
    p, delta = (h @ w.T).softmax(-1), (h - near) @ w.T
    second_order = 0.5 * (
        (p * delta**2).sum(-1) - (p * delta).sum(-1) ** 2
    )  # the KL to relative order 1e-6
    product = gamma(6) * (h.abs() @ w.T.abs()).max()  # error of a logit
    small = (second_order.min() / 2) ** 0.5  # spread of the differences
    assert (
        (value - second_order).abs() / second_order
    ).max() < delta.abs().max() + 2 * product / small  # the next order, and the logits


@pytest.mark.parametrize("keep_up_to,numbers_per_element", [(2 * 3 * 13 - 1, 0), (2 * 3 * 13, 2)])
def test_logits_are_kept_only_where_they_are_few(monkeypatch, keep_up_to, numbers_per_element):
    "Counted where autograd saves; the recomputed and the kept logits are the same numbers."
    (*policy, _), ids = case()[0][:3], case()[1]
    h, w = (o.requires_grad_() for o in policy)
    h2, w2 = case(seed=1)[0][:2]

    def run():
        return linear_step_kl(h, LMHead(w, softcap=2.0), h2, w2, ids).step_kl.sum()

    expected, saved = torch.autograd.grad(run(), (h, w)), []
    monkeypatch.setattr(fused, "KEEP_UP_TO", keep_up_to)
    with torch.autograd.graph.saved_tensors_hooks(lambda o: saved.append(o) or o, lambda o: o):
        value = run()
    assert sum(o.numel() for o in saved if o.shape == (6, 13)) == numbers_per_element * 6 * 13
    assert_close(torch.autograd.grad(value, (h, w)), expected, rtol=0, atol=0)


# ---- compiled ----


@pytest.fixture
def compile_everything(monkeypatch):
    monkeypatch.setattr(steps, "COMPILE_FROM", 0)
    monkeypatch.setattr(fused, "COMPILE_FROM", 0)
    monkeypatch.setattr(steps.Compilable, "works", True)
    for o in (steps.compilable_sums, steps.compilable_policy_grad, steps.compilable_ref_grad):
        monkeypatch.setattr(o, "compiled", None)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_agrees_with_eager(compile_everything, monkeypatch):
    a, b = distant_pair(0.1, rows=5, vocab_size=1000)
    a[1, 3] = a[2, 5] = b[2, 5] = -INF
    a[3], b[4, 0] = math.nan, -INF
    results = []
    for compiled in (True, False):
        monkeypatch.setattr(steps.Compilable, "works", compiled)
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        value = step_kl(x, y)
        value.sum().backward()
        results.append((value.detach(), x.grad, y.grad))
        # Without vector instructions torch 2.13 may write C++ that does not compile;
        # then the eager code answers, and its values are checked below.
        plain = torch.backends.cpu.get_cpu_capability() == "DEFAULT"
        assert steps.Compilable.works is compiled or plain, "torch.compile failed"
    exact, error = exact_step_kl(a, b), step_kl_error(a, b, torch.float32)
    for result in results:
        for found, truth, tolerance in zip(result, exact, error):
            assert_within(found, truth, tolerance)
    monkeypatch.setattr(steps.Compilable, "works", True)
    whole = torch.compile(
        step_kl, fullgraph=True, backend="aot_eager"
    )  # a user's own compilation: one graph, no data-dependent branch
    x = a.clone().requires_grad_()
    whole(x, b).sum().backward()
    assert_within(x.grad, exact.policy_grad, error.policy_grad)


def test_without_a_compiler_the_eager_functions_run_silently(compile_everything):
    import torch._inductor.config as config

    a, b = distant_pair(0.1, rows=3, vocab_size=37)
    with (
        config.patch({"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error")
        value = step_kl(a, b)
        step_kl(a, b)
    assert not steps.Compilable.works
    assert_within(value, exact_step_kl(a, b).kl, step_kl_error(a, b, torch.float32).kl)


# ---- errors ----


def call(**changes):
    args = (
        dict(
            policy_hidden=torch.zeros(2, 3, 4),
            policy_head=torch.zeros(7, 4),
            ref_hidden=torch.zeros(2, 3, 5),
            ref_head=torch.zeros(7, 5),
            completion_ids=torch.zeros(2, 3, dtype=torch.long),
        )
        | changes
    )
    return linear_step_kl(**args)


meta = torch.device("meta")


@pytest.mark.parametrize(
    "error,changes,message",
    [
        (
            ValueError,
            dict(policy_hidden=torch.zeros(2, 3, 5)),
            r"`policy_hidden` has shape \(2, 3, 5\).*H = 4 from `policy_head`",
        ),
        (ValueError, dict(ref_hidden=torch.zeros(2, 4, 5)), "`ref_hidden` has shape"),
        (
            TypeError,
            dict(ref_hidden=torch.zeros(2, 3, 5).long()),
            "`ref_hidden` has dtype torch.int64",
        ),
        (
            TypeError,
            dict(policy_hidden=torch.zeros(2, 3, 4).to(torch.float8_e4m3fn)),
            "`policy_hidden` has dtype torch.float8_e4m3fn.*at least 16 bits",
        ),
        (ValueError, dict(policy_head=torch.zeros(4)), r"`weight` is torch.float32 \(4,\)"),
        (ValueError, dict(policy_head=torch.zeros(7, 4).long()), "`weight` is torch.int64"),
        (ValueError, dict(ref_head=torch.zeros(9, 5)), "`ref_head` 9.*`vocab_size`"),
        (ValueError, dict(vocab_size=8), "`vocab_size` is 8; it must be from 1 to 7"),
        (ValueError, dict(vocab_size=0), "`vocab_size` is 0"),
        (
            TypeError,
            dict(completion_ids=torch.zeros(2, 3)),
            "`completion_ids` has dtype torch.float32",
        ),
        (
            ValueError,
            dict(completion_ids=torch.zeros(6).long()),
            r"`completion_ids` has shape \(6,\)",
        ),
        (
            ValueError,
            dict(completion_ids=torch.full((2, 3), -100)),
            "`completion_ids` has tokens outside 0 to 6",
        ),
        (
            ValueError,
            dict(completion_ids=torch.full((2, 3), 5), vocab_size=5),
            "`completion_ids` has tokens outside 0 to 4",
        ),
        (
            ValueError,
            dict(completion_mask=torch.ones(2, 2)),
            r"`completion_mask` has shape \(2, 2\)",
        ),
        (ValueError, dict(temperature=0.0), "`temperature` is 0.0"),
        (ValueError, dict(ref_hidden=torch.zeros(2, 3, 5, device=meta)), "`ref_hidden` is on meta"),
        (ValueError, dict(policy_head=torch.zeros(7, 4, device=meta)), "`policy_head` is on meta"),
    ],
)
def test_bad_input(error, changes, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_bad_heads_and_devices():
    with pytest.raises(ValueError, match=r"`bias` has shape \(3,\)"):
        LMHead(torch.zeros(7, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="`softcap` is 0.0"):
        LMHead(torch.zeros(7, 4), softcap=0.0)
    with pytest.raises(ValueError, match="`ref_logits` is on meta"):
        step_kl(torch.zeros(2, 3), torch.zeros(2, 3, device=meta))


# ---- plans and products ----


@pytest.mark.parametrize("keep", [0, 40, 100, 10**6])
def test_the_first_tiles_are_kept(monkeypatch, keep):
    "As many as fit; the gradients are the same bit by bit."
    monkeypatch.setattr(fused, "TILE_ROWS", 2)
    monkeypatch.setattr(fused, "TILE_SIZE", 20)
    h, w = torch.randn(1, 5, 3, generator=generator()), torch.randn(31, 3, generator=generator(1))
    ids, made, sizes = torch.arange(5)[None], [], []
    for budget in (0, keep):
        monkeypatch.setattr(fused, "KEEP_UP_TO", budget)
        x, y = h.clone().requires_grad_(), w.clone().requires_grad_()
        out = linear_step_kl(x, y, h.flip(1), w.flip(1), ids)
        plan = out.step_kl.grad_fn
        while not hasattr(plan, "plan"):
            plan = plan.next_functions[0][0]
        sizes.append(sum(o.numel() for pair in [plan.saved_tensors[8:]] for o in pair))
        made.append(torch.autograd.grad(sum(o.sum() for o in out), (x, y)))
    assert sizes[0] == 0 and sizes[1] <= 2 * max(keep, 0)
    assert sizes[1] >= min(2 * keep, 2 * 5 * 31) - 2 * 20  # less than a tile is missing
    for a, b in zip(*made):
        assert torch.equal(a, b)


def test_a_plan_covers_everything_once_and_is_even():
    for rows, vocab in ((1, 1), (1025, 50_257), (3000, 151_936), (7, 130), (2048, 129)):
        for dtype in (torch.float32, torch.bfloat16):
            hidden = torch.empty(rows, 1, dtype=dtype)
            plan = fused._plan(rows, vocab, hidden, True)
            for cuts, whole in ((plan.rows, rows), (plan.columns, vocab)):
                assert [o.start for o in cuts] == [0, *(o.stop for o in cuts[:-1])]
                assert cuts[-1].stop == whole
            heights = [o.stop - o.start for o in plan.rows]
            width = plan.columns[0].stop
            assert max(heights) - min(heights) < len(heights) and max(heights) <= fused.TILE_ROWS
            assert width in (vocab,) or width % fused.ALIGNED == 0
            kept = plan.keep * heights[0] * width
            assert kept <= fused.KEEP_UP_TO * hidden.element_size() // 4 or len(plan.columns) == 1
            assert fused._plan(rows, vocab, hidden, False).keep == 0


@pytest.mark.parametrize("ref_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_products_of_a_cpu_that_has_them(monkeypatch, ref_dtype):
    "Factors of a bfloat16 model lose nothing; those of a float32 model are not rounded."
    low, seen = [], set()

    class Low:
        def __enter__(self):
            low.append(True)

        def __exit__(self, *fault):
            low.pop()

    def multiply(a, b, out, add=False):
        if low:  # as such a CPU does
            a, b = (o.bfloat16().float() for o in (a, b))
        seen.add(bool(low))
        product = a @ b
        out.copy_(out + product if add else product)

    monkeypatch.setattr(fused, "_bfloat16_products", lambda: True)
    monkeypatch.setattr(fused, "_bfloat16_factors", Low)
    monkeypatch.setattr(fused, "_multiply", multiply)
    monkeypatch.setattr(fused, "KEEP_UP_TO", 0)
    gen = generator()
    h, w = torch.randn(2, 3, 16, generator=gen), torch.randn(300, 16, generator=gen) / 3
    g, u = (h + 0.1).to(ref_dtype), (w * 1.05).to(ref_dtype)
    h, w = (o.bfloat16().requires_grad_() for o in (h, w))
    ids = torch.randint(300, (2, 3), generator=gen)
    out = linear_step_kl(h, w, g, u, ids)
    exact = [o.detach().double().requires_grad_() for o in (h, w)]
    truth = textbook(exact[0] @ exact[1].T, g.double() @ u.double().T)[0]
    assert_close(out.step_kl.double(), truth, rtol=1e-4, atol=1e-8)
    grads = torch.autograd.grad(out.step_kl.sum(), (h, w))
    wanted = torch.autograd.grad(truth.sum(), exact)
    for a, b in zip(grads, wanted):
        assert (a.double() - b).norm() < 3 * 2**-9 * b.norm()
    assert seen == ({True} if ref_dtype == torch.bfloat16 else {True, False})


def test_the_probe_of_bfloat16_products_leaves_the_setting_alone():
    before = torch.get_float32_matmul_precision()
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    name = getattr(setting, "fp32_precision", None)
    fused._bfloat16_products.cache_clear()
    assert fused._bfloat16_products() in (True, False)
    assert torch.get_float32_matmul_precision() == before
    assert getattr(setting, "fp32_precision", None) == name
