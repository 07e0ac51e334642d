"""KL from what was stored: hidden states with heads, and lists of likeliest tokens.

The oracles are float64 logits, enumeration and NumPy; bad files give one line each.
"""

import json
import time

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_measure import POLICY, REFERENCE, TOKENIZER, check_error, small_tokenizer
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import klrb.compare.stored
from klrb.cli import app
from klrb.compare.stored import (
    measure_hidden,
    read_head,
    save_head,
    save_hidden,
    standard_errors_from_zero,
)
from klrb.compare.topk import check_topk, measure_topk, topk_table, topk_values
from klrb.exact import TabularLM, enumerate_rollouts, exact_kl
from klrb.fused import linear_step_kl
from klrb.models import completion_logits, sample_rollouts

B, T, V = 6, 5, 50


def head_logits(hidden, head, temperature=1.0):
    "What a head does, in float64"
    weight = head["weight"].double()
    z = hidden.double() @ weight.T + head.get("bias", torch.zeros(len(weight))).double()
    z = z * head.get("logit_scale", 1.0)
    if "softcap" in head:
        z = head["softcap"] * torch.tanh(z / head["softcap"])
    return z / temperature


def naive(logits):
    "KL, and both log-probabilities of every token, in float64"
    logp, logq = (o.log_softmax(-1) for o in logits)
    return (logp.exp() * (logp - logq)).sum(-1), logp, logq


@pytest.fixture
def stored(tmp_path):
    "Random states of two sizes, heads with everything, padding that is NaN."
    gen = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (B, T), generator=gen)
    lengths = torch.tensor([5, 3, 1, 5, 4, 2])
    mask = torch.arange(T) < lengths[:, None]
    sides = []
    for name, width, extra in (("a", 8, dict(softcap=4.0)), ("b", 12, dict(logit_scale=0.5))):
        hidden = torch.randn(B, T, width, generator=gen)
        hidden[~mask] = torch.nan
        head = dict(weight=torch.randn(V, width, generator=gen), bias=torch.randn(V, generator=gen))
        tensors = dict(hidden_states=hidden, token_ids=ids, mask=mask.to(torch.uint8))
        tensors["document"] = torch.tensor([7, 7, 3, 3, 9, 9])
        save_file(tensors, tmp_path / f"{name}.safetensors")
        notes = {k: str(o) for k, o in extra.items()}
        save_file(head, tmp_path / f"{name}-head.safetensors", notes)
        sides.append((hidden, head | extra))
    files = [tmp_path / f"{o}.safetensors" for o in "ab"]
    heads = [tmp_path / f"{o}-head.safetensors" for o in "ab"]
    return tmp_path, files, heads, sides, ids, mask


@pytest.mark.parametrize("temperatures", [(1.0, None), (0.7, None), (1.3, 0.6)])
def test_hidden_states_against_logits_in_float64(stored, temperatures):
    _, files, heads, sides, ids, mask = stored
    one, other = temperatures
    found = measure_hidden(files, heads, temperature=one, reference_temperature=other)
    both = (one, one if other is None else other)
    step, logp, logq = naive([head_logits(*o, t) for o, t in zip(sides, both)])
    tokens = found.tokens
    np.testing.assert_allclose(tokens.step, step[mask], rtol=1e-5)
    for column, values in (("policy_logprob", logp), ("ref_logprob", logq)):
        own = values.gather(-1, ids[..., None])[..., 0][mask]
        np.testing.assert_allclose(tokens[column], own, rtol=1e-5)
    entropy = -(logp.exp() * logp).sum(-1)[mask]
    np.testing.assert_allclose(tokens.entropy, entropy, rtol=1e-5)
    row, place = mask.nonzero(as_tuple=True)
    assert (tokens.sequence == row.numpy()).all()
    assert (tokens.position == place.numpy()).all()


def test_intervals_are_over_documents(stored):
    _, files, heads, sides, _, mask = stored
    found = measure_hidden(files, heads)
    step = naive([head_logits(*o) for o in sides])[0].masked_fill(~mask, 0.0)
    sums, lengths = step.sum(1).view(3, 2).sum(1), mask.sum(1).view(3, 2).sum(1)
    mean = sums.sum() / lengths.sum()
    stderr = ((sums - mean * lengths) ** 2).sum().mul(3 / 2).sqrt() / lengths.sum()
    assert found.kl.mean == pytest.approx(mean.item(), rel=1e-5)
    assert found.kl.stderr == pytest.approx(stderr.item(), rel=1e-4)
    whole = found.interval(per="sequence")
    assert whole.mean == pytest.approx(step.sum().item() / B, rel=1e-5)
    assert whole.num_clusters == 3


@pytest.mark.parametrize("batch_tokens", [1, 11, 4096])
def test_rows_are_streamed(stored, monkeypatch, batch_tokens):
    _, files, heads, *_ = stored
    sizes, read = [], klrb.compare.stored.Shard.hidden
    whole = measure_hidden(files, heads).tokens

    def watched(shard, rows):
        sizes.append((rows.stop - rows.start) * T)
        return read(shard, rows)

    monkeypatch.setattr(klrb.compare.stored.Shard, "hidden", watched)
    found = measure_hidden(files, heads, batch_tokens=batch_tokens).tokens
    assert max(sizes) <= max(batch_tokens, T)
    pd.testing.assert_frame_equal(found, whole, rtol=1e-5)


def test_a_folder_is_its_files_in_order(stored):
    folder, files, heads, *_ = stored
    whole, parts = measure_hidden(files, heads).tokens, []
    for file in files:
        tensors, where = load_file(file), folder / file.stem
        where.mkdir()
        for number, rows in enumerate((slice(0, 4), slice(4, 6))):
            part = {k: o[rows].clone() for k, o in tensors.items()}
            save_file(part, where / f"{number}.safetensors")
        parts.append(where)
    pd.testing.assert_frame_equal(measure_hidden(parts, heads).tokens, whole, rtol=1e-5)


def test_infinite_and_equal(stored):
    folder, files, heads, *_ = stored
    same = measure_hidden(files[:1] * 2, heads[:1] * 2)
    assert (same.tokens.step == 0).all()
    head = load_file(heads[0])
    head["bias"] = head["bias"].clone()
    head["bias"][3] = -torch.inf
    save_file(head, folder / "excluding.safetensors")
    with pytest.raises(ValueError, match="NaN or infinity in `bias`"):
        measure_hidden(files[:1] * 2, [heads[0], folder / "excluding.safetensors"])


# ---- transformers, vLLM's files, checkpoints ----

KINDS = ("llama", "gemma2", "granite", "gpt2", "cohere", "gpt_neox", "opt")


def tiny(kind, seed=0, **fields):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(kind, **fields)).float().eval()


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_heads_are_read_alone(kind, tmp_path):
    model = tiny(kind)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20kB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    save_head(tmp_path / "head.safetensors", model)
    wanted = read_head(tmp_path / "head.safetensors").head
    for folder in ("whole", "sharded"):
        head = read_head(tmp_path / folder).head
        assert torch.equal(head.weight, wanted.weight)
        assert (head.bias is None) == (wanted.bias is None)
        assert (head.logit_scale, head.softcap) == (wanted.logit_scale, wanted.softcap)


def test_a_head_that_does_more_is_refused(tmp_path):
    tiny("falcon_h1", lm_head_multiplier=2.0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be read alone"):
        read_head(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_vllm_files_are_states_before_the_norm(kind, tmp_path):
    "A file per request, named anyhow; the last of the stored layers counts"
    models, gen = [tiny(kind, seed) for seed in (0, 1)], torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 90, (n,), generator=gen) for n in (4, 7, 2)]
    total, heads = [], []
    for side, (model, names) in enumerate(zip(models, ("xyz", "zxy"))):
        with torch.no_grad():  # a norm that is not the identity
            for name, weight in model.named_parameters():
                if "norm" in name or "ln_f" in name:
                    weight += 0.3 * torch.randn(weight.shape, generator=gen)
        save_head(tmp_path / f"head{side}.safetensors", model, norm=True)
        (tmp_path / str(side)).mkdir()
        for ids, name in zip(documents, names):
            kept = []
            base = model.base_model
            layers = base.h if kind == "gpt2" else base.layers
            hook = layers[-1].register_forward_hook(lambda m, i, o: kept.append(o))
            with torch.no_grad():
                total.append(model(ids[None]).logits[0, :-1].double())
            hook.remove()
            last = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
            states = torch.stack([torch.randn_like(last[0]), last[0]], 1)
            tensors = dict(hidden_states=states.contiguous(), token_ids=ids)
            save_file(tensors, tmp_path / str(side) / f"{name}.safetensors")
            (tmp_path / str(side) / f"{name}.safetensors.lock").touch()
    heads = [tmp_path / f"head{o}.safetensors" for o in (0, 1)]
    found = measure_hidden([tmp_path / "0", tmp_path / "1"], heads)
    wanted = torch.cat([naive(pair)[0] for pair in zip(total[:3], total[3:])])
    assert found.tokens.document.nunique() == 3
    assert sorted(found.tokens.step) == pytest.approx(sorted(wanted.tolist()), rel=1e-3)


def test_the_recipe_from_transformers(tmp_path):
    torch.manual_seed(0)
    rollouts = sample_rollouts(POLICY, TOKENIZER, ["a b", "c", "d e a"], 40, 4)
    args = (rollouts.prompt_ids, rollouts.prompt_mask)
    args += (rollouts.completion_ids, rollouts.completion_mask)
    for name, model in (("a", POLICY), ("b", REFERENCE)):
        save_hidden(tmp_path / f"{name}.safetensors", model, rollouts, TOKENIZER, batch_rows=7)
        save_head(tmp_path / f"{name}-head.safetensors", model, TOKENIZER)
    files = [tmp_path / f"{o}.safetensors" for o in "ab"]
    heads = [tmp_path / f"{o}-head.safetensors" for o in "ab"]
    found = measure_hidden(files, heads)
    with torch.no_grad():
        logits = [completion_logits(o, *args).double() for o in (POLICY, REFERENCE)]
    mask = rollouts.completion_mask.bool()
    np.testing.assert_allclose(found.tokens.step, naive(logits)[0][mask], rtol=1e-3, atol=1e-6)
    assert found.tokens.document.nunique() == 3 and not found.about["notes"]
    cold = sample_rollouts(POLICY, TOKENIZER, ["a b", "c", "d e a"], 200, 4, temperature=0.3)
    save_hidden(files[0], POLICY, cold, TOKENIZER)
    assert "no draws of the policy" in repr(measure_hidden(files[:1] * 2, heads[:1] * 2))


def test_padded_heads_and_other_vocabularies(stored, tmp_path):
    _, files, heads, sides, _, mask = stored
    taller = load_file(heads[1])
    padding = dict(weight=torch.full((3, 12), 9.0), bias=torch.full((3,), 9.0))
    taller = {k: torch.cat([o, padding[k]]) for k, o in taller.items()}
    tall = tmp_path / "tall.safetensors"
    save_file(taller, tall, dict(logit_scale="0.5"))
    with pytest.raises(ValueError, match="give its length as `vocab_size`"):
        measure_hidden(files, [heads[0], tall])
    wanted = naive([head_logits(*o) for o in sides])[0][mask]
    found = measure_hidden(files, [heads[0], tall], vocab_size=V)
    np.testing.assert_allclose(found.tokens.step, wanted, rtol=1e-5)
    notes = dict(vocabulary="x", vocab_size=str(V))
    for file, more in (*((o, {}) for o in files), (heads[0], dict(softcap="4.0"))):
        save_file(load_file(file), file, notes | more)
    save_file(taller, tall, notes | dict(logit_scale="0.5"))
    found = measure_hidden(files, [heads[0], tall])  # all four noted one vocabulary
    np.testing.assert_allclose(found.tokens.step, wanted, rtol=1e-5)
    save_file(taller, tall, notes | dict(vocabulary="y"))
    with pytest.raises(ValueError, match="different tokenizers"):
        measure_hidden(files, [heads[0], tall])


def test_other_tokenizers_are_told_apart(tmp_path):
    other = small_tokenizer()
    other.add_tokens(["f"])
    digests = {klrb.compare.stored.vocabulary_digest(o) for o in (TOKENIZER, other)}
    assert len(digests) == 2
    assert klrb.compare.stored.vocabulary_digest(small_tokenizer()) in digests


def test_an_interrupted_measurement_keeps_what_it_has(stored, monkeypatch):
    folder, files, heads, *_ = stored
    whole, calls = measure_hidden(files, heads).tokens, []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return linear_step_kl(*args, **kwargs)

    monkeypatch.setattr(klrb.compare.stored, "linear_step_kl", interrupted)
    found = measure_hidden(files, heads, batch_tokens=T, save=folder / "out")
    assert found.status == "interrupted" and "stopped: interrupted" in repr(found)
    pd.testing.assert_frame_equal(found.tokens, whole[: len(found.tokens)], rtol=1e-5)
    assert len(found.tokens) == 8
    saved = pd.read_parquet(folder / "out" / "tokens.parquet")
    assert len(saved) == 8
    record = json.loads((folder / "out" / "measurement.json").read_text())
    assert record["status"] == "interrupted" and record["results"]["tokens"] == 8


# ---- lists of likeliest tokens ----


def as_server(logits, ids, k):
    "Per step a mapping with the k likeliest tokens, and the one that stands there"
    logp = logits.log_softmax(-1)
    top = logp.topk(k, -1).indices.tolist()
    return [
        [{o: logp[i, t, o].item() for o in {*top[i][t], token}} for t, token in enumerate(row)]
        for i, row in enumerate(ids)
    ]


@pytest.mark.parametrize("k, other_k", [(1, 1), (2, 4), (3, 3), (5, 2), (6, 6)])
def test_top_k_value_is_unbiased_and_the_bucket_a_bound(k, other_k):
    "Expectation over all strings; each string's rows weighed by its probability"
    policy, reference = TabularLM(5, 3, seed=0), TabularLM(5, 3, seed=1)
    r = enumerate_rollouts(policy, reference)
    keep = r.mask.bool()
    ids = [row[m].tolist() for row, m in zip(r.completion_ids, keep)]
    tables = [
        check_topk(topk_table(ids, as_server(o.detach(), ids, size), size))
        for o, size in ((r.policy_logits, k), (r.ref_logits, other_k))
    ]
    values = topk_values(*tables)
    weight = (r.policy_logprobs * r.mask).sum(-1).exp().detach().numpy()
    weight = weight[tables[0].sequence]
    exact = exact_kl(policy, reference).item()
    assert (weight * values.step).sum() == pytest.approx(exact, rel=1e-9)
    assert (weight * values.log_ratio).sum() == pytest.approx(exact, rel=1e-9)
    assert (weight * (values.in_tail - values.outside)).sum() == pytest.approx(0, abs=1e-9)
    step = naive([r.policy_logits, r.ref_logits])[0][keep].detach().numpy()
    assert (values.bound <= step + 1e-6).all()
    if k == other_k == 6:
        np.testing.assert_allclose(values.step, step, rtol=1e-9)
        np.testing.assert_allclose(values.bound, step, rtol=1e-4, atol=1e-6)
    else:
        assert (weight * values.bound).sum() < 0.99 * exact


def topk_files(folder, n=300, k=4, temperature=1.0, seed=0):
    gen = torch.Generator().manual_seed(seed)
    logits = [torch.randn(n, 2, 12, generator=gen, dtype=torch.float64) for _ in range(2)]
    prob = (logits[0] / temperature).softmax(-1).view(-1, 12)
    ids = torch.multinomial(prob, 1, generator=gen).view(n, 2).tolist()
    files = []
    for name, o in zip("ab", logits):
        table = topk_table(ids, as_server(o, ids, k), k, [i // 10 for i in range(n)])
        files.append(folder / f"{name}.parquet")
        table.to_parquet(files[-1])
    return files, naive(logits)[0].reshape(-1).numpy()


def test_top_k_intervals_and_the_check_of_the_draws(tmp_path):
    files, step = topk_files(tmp_path)
    found = measure_topk(files)
    assert found.tokens.document.nunique() == 30 and found.kl.num_clusters == 30
    assert abs(standard_errors_from_zero(found.tokens.step - step, found.tokens)) < 4
    assert found.kl.stderr < found.interval("log_ratio").stderr
    assert "not its draws" not in repr(found) and "LOWER BOUND" in repr(found)
    files, _ = topk_files(tmp_path, temperature=0.4)
    assert "not its draws" in repr(measure_topk(files))


def test_top_k_support(tmp_path):
    row = dict(sequence=0, token_id=1, logprob=np.log(0.5), topk_ids=[1, 2])
    policy = pd.DataFrame([row | dict(topk_logprobs=[np.log(0.5), -np.inf])])
    ref = pd.DataFrame([row | dict(topk_logprobs=[np.log(0.5), -np.inf])])
    values = topk_values(check_topk(policy), check_topk(ref))
    assert values.step[0] == 0 and values.bound[0] == 0  # 0 log 0
    with_mass = pd.DataFrame([row | dict(topk_logprobs=[np.log(0.5), np.log(0.5)])])
    values = topk_values(check_topk(with_mass), check_topk(ref))
    assert values.step[0] == np.inf and values.bound[0] == np.inf


class Logprob:
    def __init__(self, value):
        self.logprob = value


def test_the_drawn_token_that_a_server_adds_is_taken_out():
    steps = [[{5: Logprob(-1.0), 2: Logprob(-2.0), 9: Logprob(-4.0)}, {5: -1.0, 2: -2.0}]]
    table = topk_table([[9, 2]], steps, k=2)
    assert table.topk_ids.tolist() == [[5, 2], [5, 2]] and table.logprob.tolist() == [-4.0, -2.0]
    for ids, k in (([[7, 2]], 2), ([[9, 2]], 3), ([[9, 2]], 1)):
        with pytest.raises(ValueError, match="must have k"):
            topk_table(ids, steps, k)


# ---- the command ----


def change(file, **tensors):
    "A file with some tensors changed by functions, or taken out by None"
    found = load_file(file)
    for name, function in tensors.items():
        new = None if function is None else function(found.pop(name, None))
        found.pop(name, None)
        if new is not None:
            found[name] = new.clone().contiguous()
    save_file(found, file)


def at(place, value):
    def function(tensor):
        tensor[place] = value
        return tensor

    return function


HIDDEN = {
    "no states": (dict(a=dict(hidden_states=None)), "no tensor `hidden_states`"),
    "no ids": (dict(a=dict(token_ids=None)), "no tensor `token_ids`"),
    "no mask": (dict(b=dict(mask=None)), "`hidden` of the reference, `b.safetensors`, has no"),
    "flat states": (dict(a=dict(hidden_states=lambda o: o[0])), "it must be (B, T, H)"),
    "fewer ids": (dict(a=dict(token_ids=lambda o: o[:, :4])), "B and T differ"),
    "three axes of ids": (dict(a=dict(token_ids=lambda o: o[None])), "it must be (B, T), or (N,)"),
    "ids that are no integers": (dict(a=dict(token_ids=lambda o: o.float())), "hold integers"),
    "mask of two": (dict(a=dict(mask=at((0, 0), 2))), "not 0 and 1"),
    "empty mask": (dict(a=dict(mask=lambda o: o * 0)), "0 everywhere"),
    "shorter mask": (dict(a=dict(mask=lambda o: o[:2])), "not 0 and 1 of shape"),
    "document of another length": (dict(a=dict(document=lambda o: o[:2])), "it must be (6,)"),
    "NaN state": (dict(a=dict(hidden_states=at((3, 2), torch.nan))), "states at row 3, step 2"),
    "infinite state": (
        dict(b=dict(hidden_states=at((4, 1), torch.inf))),
        "the reference's states at row 4, step 1",
    ),
    "other masks": (dict(b=dict(mask=at((1, 4), 1))), "differ in row 1, step 4"),
    "other tokens": (dict(b=dict(token_ids=lambda o: (o + 1) % V)), "differ in row 0, step 0"),
    "other rows": (
        {"b": {o: lambda t: t[:5] for o in ("hidden_states", "token_ids", "mask", "document")}},
        "steps of shape (6, 5) and (5, 5)",
    ),
    "other grouping": (dict(b=dict(document=at(0, 3))), "groups the rows differently"),
    "id beyond the heads": (
        {o: dict(token_ids=at((0, 0), V)) for o in "ab"},
        "the token id 50, but the heads have 50",
    ),
    "negative id": ({o: dict(token_ids=at((0, 0), -100)) for o in "ab"}, "the token id -100"),
    "no weight": ({"a-head": dict(weight=None)}, "no tensor `weight`"),
    "weight of integers": ({"a-head": dict(weight=lambda o: o.long())}, "floating-point numbers"),
    "vector as weight": ({"a-head": dict(weight=lambda o: o[0])}, "it must be (V, H)"),
    "NaN weight": ({"b-head": dict(weight=at((1, 1), torch.nan))}, "NaN or infinity in `weight`"),
    "endless": ({"b-head": dict(weight=at((1, 1), -torch.inf))}, "NaN or infinity in `weight`"),
    "bias of another length": ({"a-head": dict(bias=lambda o: o[:3])}, "is no head"),
    "head of another model": ({"a-head": dict(weight=lambda o: o[:, :5])}, "different models"),
    "lower head": (
        {"a-head": dict(weight=lambda o: o[:40], bias=lambda o: o[:40])},
        "40 and 50 tokens",
    ),
    "norm of another width": ({"a-head": dict(norm_weight=lambda o: torch.ones(3))}, "has a norm"),
}


def hidden_options(stored):
    _, files, heads, *_ = stored
    return [
        o for file, head in zip(files, heads) for o in ("--hidden", str(file), "--head", str(head))
    ]


@pytest.mark.parametrize("case", HIDDEN)
def test_bad_files_of_hidden_states_are_one_line(stored, case):
    changes, message = HIDDEN[case]
    for name, functions in changes.items():
        change(stored[0] / f"{name}.safetensors", **functions)
    check_error(CliRunner().invoke(app, ["measure", *hidden_options(stored)]), message)


OPTIONS = [
    (["--hidden", "a.safetensors"], "`hidden` was given 1 time; it must be given twice"),
    (["--hidden", "a.safetensors"] * 3, "given 3 times"),
    (["--hidden", "a.safetensors"] * 2, "`head` was given 0 times"),
    (["--head", "a-head.safetensors"] * 2, "means nothing without `hidden`"),
    (["--vocab-size", "9", "pocket", "pocket"], "means nothing without `hidden`"),
    (["FILES", "--vocab-size", "0"], "at least 1"),
    (["FILES", "--vocab-size", "51"], "from 1 to 50"),
    (["FILES", "--temperature", "0"], "must be positive"),
    (["FILES", "--reference-temperature", "-1"], "must be positive"),
    (["FILES", "--batch-tokens", "0"], "at least 1"),
    (["FILES", "--device", "abacus"], "not available"),
    (["FILES", "--samples", "3"], "together with `hidden`"),
    (["FILES", "--divergence", "js"], "together with `hidden`"),
    (["FILES", "--direction", "forward"], "together with `hidden`"),
    (["FILES", "--text", "x"], "together with `hidden`"),
    (["FILES", "--topk", "a", "b"], "together with `hidden`"),
    (["FILES", "pocket", "pocket"], "together with `hidden`"),
    (["FILES", "--save", "a.safetensors/out"], "cannot be written"),
    (["--hidden", "none", "--head", "x"] * 2, "no such file or folder"),
    (["--hidden", "empty", "--head", "x"] * 2, "no safetensors files"),
    (["--hidden", "junk.safetensors", "--head", "x"] * 2, "cannot be read as safetensors"),
    (["--hidden", "a.safetensors", "--head", "none"] * 2, "there is no such file"),
    (["--hidden", "a.safetensors", "--head", "empty"] * 2, "no config.json"),
    (["--hidden", "a.safetensors", "--head", "junk.safetensors"] * 2, "cannot be read as saf"),
    (["--topk", "none.parquet", "none.parquet"], "no such file"),
    (["--topk", "junk.parquet", "junk.parquet"], "cannot be read"),
    (["--topk", "junk.txt", "junk.txt"], "must be a .parquet or .jsonl file"),
    (["--topk", "junk.jsonl", "junk.jsonl"], "cannot be read"),
    (["--topk", "a.parquet", "b.parquet", "--seed", "3"], "together with `topk`"),
    ([], "`policy` is missing"),
    (["pocket"], "`reference` is missing"),
]


@pytest.mark.parametrize(
    "options, message", OPTIONS, ids=[o[1] + str(i) for i, o in enumerate(OPTIONS)]
)
def test_bad_options_are_one_line(stored, monkeypatch, options, message):
    monkeypatch.chdir(stored[0])
    (stored[0] / "empty").mkdir()
    for name in ("junk.safetensors", "junk.parquet", "junk.txt", "junk.jsonl"):
        (stored[0] / name).write_text("junk")
    given = [part for o in options for part in (hidden_options(stored) if o == "FILES" else [o])]
    check_error(CliRunner().invoke(app, ["measure", *given]), message)


def cell(row, column, value):
    "A table with one cell changed"

    def function(table):
        values = table[column].astype(object).copy()
        values[row] = value(values[row]) if callable(value) else value
        return table.assign(**{column: values})

    return function


def column(name, function):
    def changed(table):
        return table.assign(**{name: table[name].map(function)})

    return changed


TOPK = {
    "no log-probabilities": (lambda o: o.drop(columns="logprob"), "no column `logprob`"),
    "no lists": (lambda o: o.drop(columns="topk_ids"), "no column `topk_ids`"),
    "no sequence": (lambda o: o.drop(columns="sequence"), "no column `sequence`"),
    "no rows": (lambda o: o[:0], "has no rows"),
    "fewer rows": (lambda o: o[:-1], "tables of 600 and 599 rows"),
    "NaN": (cell(3, "logprob", np.nan), "row 3 has a `logprob` that is no number"),
    "positive": (cell(3, "logprob", 0.2), "row 3 has a `logprob` above 0"),
    "word": (cell(3, "token_id", "the"), "row 3 has a `token_id` that is no id"),
    "negative id": (cell(3, "token_id", -1), "row 3 has a `token_id` that is no id"),
    "missing sequence": (cell(3, "sequence", None), "row 3 has no `sequence`"),
    "sequence again": (cell(5, "sequence", 0), "row 5 goes back to an earlier `sequence`"),
    "document within a sequence": (cell(3, "document", 9), "of another `document`"),
    "no list": (cell(3, "topk_ids", None), "row 3 has a `topk_ids` that is no list"),
    "empty lists": (column("topk_ids", lambda o: []), "row 0 has an empty `topk_ids`"),
    "one more": (
        cell(3, "topk_ids", lambda o: [*o, 11]),
        "row 3 has another number of `topk_ids` than row 0, 4; a server adds",
    ),
    "shorter lists": (column("topk_ids", lambda o: o[:3]), "3 `topk_ids` a row, but 4"),
    "NaN in a list": (
        cell(3, "topk_logprobs", lambda o: [*o[:3], np.nan]),
        "row 3 has NaN in `topk_logprobs`",
    ),
    "twice": (cell(3, "topk_ids", lambda o: [*o[:3], o[0]]), "row 3 has a token twice"),
    "padding": (cell(3, "topk_ids", lambda o: [*o[:3], -1]), "row 3 has a `topk_ids` that is no"),
    "not descending": (
        cell(3, "topk_logprobs", lambda o: sorted(o)),
        "row 3 has `topk_logprobs` that do not descend",
    ),
    "more than 1": (
        cell(3, "topk_logprobs", lambda o: [-0.1] * 4),
        "row 3 has `topk_logprobs` of more than 1 in sum",
    ),
    "renormalised": (
        column("topk_logprobs", lambda o: o - np.log(np.exp(o).sum())),
        "has one `logprob` for its token and another in the list",
    ),
    "other tokens": (column("token_id", lambda o: 0), "has one `logprob`|has a token likelier"),
    "shuffled": (lambda o: o[::-1], "sequences part at row|tokens differ at row"),
}


@pytest.mark.parametrize("case", TOPK)
def test_bad_tables_are_one_line(tmp_path, case):
    function, message = TOPK[case]
    files, _ = topk_files(tmp_path)
    changed = function(pd.read_parquet(files[1]))
    if case == "word":
        changed = changed.assign(token_id=changed.token_id.astype(str))
    changed.to_parquet(files[1])
    answer = CliRunner().invoke(app, ["measure", "--topk", *map(str, files)])
    check_error(answer, next((o for o in message.split("|") if o in answer.stderr), message))


def test_a_policy_cannot_draw_what_it_excludes(tmp_path):
    files, _ = topk_files(tmp_path)
    table = pd.read_parquet(files[0])
    row = next(i for i, o in table.iterrows() if o.token_id not in o.topk_ids)
    table.loc[row, "logprob"] = -np.inf
    table.to_parquet(files[0])
    with pytest.raises(ValueError, match=f"-inf at row {row}: it cannot have drawn"):
        measure_topk(files)


def test_the_command_prints_saves_and_turns_into_json(stored, tmp_path):
    options = [*hidden_options(stored), "--save", str(tmp_path / "out"), "--json"]
    answer = CliRunner().invoke(app, ["measure", *options])
    found = json.loads(answer.stdout)
    assert answer.exit_code == 0 and found["tokens"] == 20 and found["documents"] == 3
    assert found["statistics"][0]["statistic"] == "step"
    assert len(pd.read_parquet(tmp_path / "out" / "tokens.parquet")) == 20
    files, _ = topk_files(tmp_path)
    answer = CliRunner().invoke(app, ["measure", "--topk", *map(str, files)])
    assert answer.exit_code == 0 and "common head + drawn token" in answer.stdout
    rows = [json.dumps(o) for o in json.loads(pd.read_parquet(files[0]).to_json(orient="records"))]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    again = CliRunner().invoke(app, ["measure", "--topk", str(tmp_path / "a.jsonl"), str(files[1])])
    assert again.stdout == answer.stdout


@pytest.mark.slow
def test_reading_costs_little_beside_the_kernel(tmp_path):
    "At least 0.9 of the kernel's speed; the best of three, since the machine is shared"
    gen, width, vocab, rows, steps = torch.Generator().manual_seed(0), 576, 16_384, 64, 64
    ids = torch.randint(0, vocab, (rows, steps), generator=gen)
    hidden = [torch.randn(rows, steps, width, generator=gen) for _ in range(2)]
    weights = [torch.randn(vocab, width, generator=gen) / 24 for _ in range(2)]
    for name, states, weight in zip("ab", hidden, weights):
        tensors = dict(hidden_states=states, token_ids=ids, mask=torch.ones_like(ids))
        save_file(tensors, tmp_path / f"{name}.safetensors")
        save_file(dict(weight=weight), tmp_path / f"{name}-head.safetensors")
    files = [tmp_path / f"{o}.safetensors" for o in "ab"]
    heads = [tmp_path / f"{o}-head.safetensors" for o in "ab"]
    shares = []
    for _ in range(3):
        began = time.process_time()
        linear_step_kl(hidden[0], weights[0], hidden[1], weights[1], ids)
        kernel = time.process_time() - began
        began = time.process_time()
        measure_hidden(files, heads, batch_tokens=1024)
        shares.append(kernel / (time.process_time() - began))
    assert max(shares) >= 0.9, shares
