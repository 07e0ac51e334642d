"""The measuring tool: enumerated answers, coverage, files after an interruption, and bad input."""

import dataclasses
import inspect
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import typer
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

import klrb
import klrb.compare.rollouts
import klrb.compare.scoring
import klrb.models
from klrb.cli import app
from klrb.exact import TabularLM, enumerate_rollouts, exact_kl
from klrb.measure import Settings, measure_kl
from klrb.compare.rollouts import PromptOrder, RolloutSampler, RolloutTable
from klrb.compare.scoring import Comparison, Party
from klrb.compare.figures import figures
from klrb.compare.results import estimates, prompt_means
from klrb.intervals import cluster_interval
from klrb.compare.stopping import Tolerance, next_size, parse_tolerance, sample_until
from klrb.compare.sides import load_pair
from klrb.steps import step_kl
from klrb.compare.text import measure_text, text_statistics

FIELDS = dataclasses.fields(Settings)
WORDS = ["<end>", "a", "b", "c", "d", "e"]  # the end token is also the padding and the beginning


def small_tokenizer():
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<end>",
        eos_token="<end>",
        pad_token="<end>",
        padding_side="left",
    )


def small_model(seed, vocab_size=len(WORDS), scale=0.6):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=16,
            n_embd=16,
            n_layer=1,
            n_head=2,
            initializer_range=scale,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()


TOKENIZER, POLICY, REFERENCE = small_tokenizer(), small_model(1), small_model(2)


@torch.no_grad()
def enumerated_kl(policy, reference, prompt, steps, temperatures=(1.0, 1.0), width=len(WORDS)):
    "KL of the strings of up to `steps` tokens, and their expected length: a sum over all prefixes."
    policy, reference = policy.double(), reference.double()
    total, length, reach = 0.0, 0.0, {(): 1.0}
    for _ in range(steps):
        longer = {}
        for prefix, chance in reach.items():
            ids = torch.tensor([prompt + list(prefix)])
            logp, logq = (
                m(ids).logits[0, -1, :width].div(t).log_softmax(-1)
                for m, t in zip((policy, reference), temperatures)
            )
            total, length = (
                total + chance * (logp.exp() * (logp - logq)).sum().item(),
                length + chance,
            )
            longer |= {(*prefix, v): chance * logp[v].exp().item() for v in range(1, width)}
        reach = longer
    policy.float(), reference.float()
    return total, length


def measure(policy=POLICY, reference=REFERENCE, prompts=None, **settings):
    return measure_kl(
        policy,
        reference,
        prompts,
        tokenizer=TOKENIZER,
        **dict(max_new_tokens=3, samples=200) | settings,
    )


# On-policy numbers, against enumeration


@pytest.mark.parametrize(
    "settings, way, temperatures",
    [
        (dict(), 1, (1.0, 1.0)),
        (dict(direction="forward"), -1, (1.0, 1.0)),
        (dict(temperature=0.7), 1, (0.7, 0.7)),
        (dict(temperature=1.5, reference_temperature=1.0), 1, (1.5, 1.0)),
        (dict(direction="forward", temperature=1.5, reference_temperature=1.0), -1, (1.0, 1.5)),
    ],
)
def test_all_estimates_against_enumeration(settings, way, temperatures):
    "z < 4 for each of six estimates; the end token's step counts, though it is also the padding."
    kl, length = enumerated_kl(*(POLICY, REFERENCE)[::way], [0], 3, temperatures)
    result = measure(samples=3000, **settings).headline
    for row in estimates(result).itertuples():
        exact = kl if row.unit == "nats per sequence" else kl / length
        assert abs(row.mean - exact) < 4 * row.stderr, row
        assert row.stderr < 0.2 * exact
    assert 1 < result.rollouts.length.mean() < 3


def test_jeffreys_is_both_directions_and_js_is_bounded():
    exact = sum(
        enumerated_kl(*pair, [0], 3)[0] for pair in ((POLICY, REFERENCE), (REFERENCE, POLICY))
    )
    both, sum_ = (
        measure(direction="both", samples=1500),
        measure(divergence="jeffreys", samples=1500),
    )
    assert list(both.results) == ["reverse", "forward"] and list(sum_.results) == ["jeffreys"]
    assert abs(sum_.kl.mean - exact) < 4 * sum_.kl.stderr
    assert sum_.kl.mean == pytest.approx(sum(o.interval().mean for o in both.results.values()))
    js = measure(divergence="js").headline
    assert (
        js.rollouts.rb <= js.rollouts.length * math.log(2)
    ).all() and "not a divergence of the sequences" in js.label
    with pytest.raises(ValueError, match="must be one of rb"):
        js.interval("mc")


def test_intervals_cover_the_enumerated_kl():
    "50 runs on tiny transformers; at 95 % fewer than 42 hits have a chance of 4e-4."
    exact, _ = enumerated_kl(POLICY, REFERENCE, [0], 3)
    runs = [measure(samples=150, seed=s).headline for s in range(50)]
    for estimator in ("rb", "mc"):
        intervals = [o.interval(estimator) for o in runs]
        assert sum(o.low <= exact <= o.high for o in intervals) >= 42
        assert np.mean([o.half_width for o in intervals]) < 0.6 * exact


def test_rb_is_not_wider_than_mc_and_identical_models_give_zero():
    for seed in range(5):
        result = measure(small_model(10 + seed), small_model(20 + seed), samples=500).headline
        assert result.interval("rb").half_width <= 1.05 * result.interval("mc").half_width
    same = measure(POLICY, POLICY, ["a b", "c"], samples=20)
    assert all(
        i.mean == i.low == i.high == 0 for i in map(same.headline.interval, ("rb", "mc", "k3"))
    )
    assert math.isnan(same.headline.variance_ratio)


def test_logits_of_different_widths():
    "The wider model likes its padding best of all; it must neither be sampled nor counted."
    wide = small_model(3, vocab_size=9)
    with torch.no_grad():
        wide.transformer.wte.weight[6:] *= 30
    exact, _ = enumerated_kl(wide, REFERENCE, [0], 3)
    found = measure(wide, REFERENCE, samples=3000)
    assert abs(found.kl.mean - exact) < 4 * found.kl.stderr


def test_prompts_of_unequal_length_and_prefixes():
    prompts = ["a b c d", "e", "b b"]
    ids = {p: TOKENIZER(p).input_ids for p in prompts}
    exact = np.mean([enumerated_kl(POLICY, REFERENCE, ids[p], 2)[0] for p in prompts])
    result = measure(prompts=prompts, samples=1500, max_new_tokens=2).headline
    table = prompt_means(result)
    assert table.rollouts.tolist() == [1500] * 3 and len(result.positions) == 2
    assert (
        abs(table["mean"].mean() - exact) < 4 * math.hypot(*(table.high - table.low) / 2 / 1.96) / 3
    )
    same = measure(POLICY, POLICY, prompts, samples=5, policy_prefix="a ", reference_prefix="a ")
    other = measure(POLICY, POLICY, prompts, samples=5, policy_prefix="a ", reference_prefix="d ")
    assert same.kl.mean == 0 < other.kl.mean


def test_a_tokenizer_with_neither_padding_nor_beginning():
    bare = small_tokenizer()
    bare.pad_token = bare.bos_token = None
    found = measure_kl(
        POLICY, REFERENCE, ["a b c", "d"], tokenizer=bare, samples=20, max_new_tokens=3
    )
    pd.testing.assert_frame_equal(
        found.headline.rollouts, measure(prompts=["a b c", "d"], samples=20).headline.rollouts
    )
    text = measure_text(
        POLICY, REFERENCE, ["a b c", "d"], tokenizer=bare
    )  # a first token without context is not scored
    assert text.tokens.position.tolist() == [1, 2]


def test_end_tokens_of_the_generation_settings_count(monkeypatch):
    monkeypatch.setattr(POLICY.generation_config, "eos_token_id", [0, 2])
    assert klrb.compare.scoring.end_tokens(*load_pair(POLICY, REFERENCE, TOKENIZER)) == [0, 2]
    found = measure(samples=300).headline.rollouts
    assert found.length.mean() < 2.7


def test_a_run_repeats_with_its_seed_and_not_with_another():
    first, again, other = (measure(seed=s, samples=40).headline.rollouts for s in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again)
    assert not first.equals(other)


def test_memory_is_bounded_by_batch_tokens(monkeypatch):
    sizes = []
    inner = klrb.compare.rollouts.sample_completions

    def watched(model, ids, *args):
        sizes.append(ids.shape)
        return inner(model, ids, *args)

    monkeypatch.setattr(klrb.compare.rollouts, "sample_completions", watched)
    measure(prompts=["a b c", "d"], samples=10, batch_tokens=20)
    assert (
        len(sizes) == 7 and max(rows * (width + 3) for rows, width in sizes) <= 20
    )  # 3 rows of 3 + 3 tokens


def test_rollouts_belong_to_their_prompts():
    "Rollout i belongs to prompt i mod P of the shuffled list, whatever the batches are."
    found = measure(prompts=["a b c", "d", "e"], samples=5, batch_tokens=20).headline.rollouts
    order = np.random.default_rng(0).permutation(3)
    assert found.prompt.tolist() == [order[i % 3] for i in range(15)]
    sampler = make_sampler(["a b c", "d", "e"])
    table = RolloutTable(sampler.order, 3)
    batches = list(sampler.batches(0, 6))
    with pytest.raises(AssertionError):
        table.append(next(sampler.batches(1, 4)))
    for batch in batches:
        table.append(batch)
    assert table.frame.prompt.tolist() == sampler.order.prompts(0, 6).tolist() and len(table) == 6


def make_sampler(prompts, **settings):
    policy, reference = load_pair(POLICY, REFERENCE, TOKENIZER)
    comparison = Comparison(Party("policy", policy), Party("reference", reference))
    encoded = [TOKENIZER(o).input_ids for o in prompts]
    order = PromptOrder.draw(len(prompts), 0)
    prompts_of = dict(policy=encoded, reference=encoded)
    return RolloutSampler(comparison, prompts_of, prompts, order, 3, **settings)


def test_a_sampler_keeps_nothing_and_starts_anywhere():
    "Batches are made of the seed and the number of their first rollout: none depends on another."
    sampler = make_sampler(["a b c", "d"], batch_tokens=20)
    whole, again = list(sampler.batches(0, 12)), list(sampler.batches(6, 12))
    assert [len(o) for o in whole] == [3, 3, 3, 3]
    for ours, theirs in zip(whole[2:], again):
        pd.testing.assert_frame_equal(ours.frame(), theirs.frame())
    swapped = sampler.comparison.swapped()
    assert swapped.first.role == "reference" and swapped.swapped() == sampler.comparison


def test_intervals_by_position_are_students(tmp_path):
    "Oracle: scipy on the saved steps of the completions that are that long."
    found = measure(samples=12, save=tmp_path / "out")
    steps = pd.read_parquet(tmp_path / "out" / "rollouts.parquet").step
    for row in found.headline.positions.itertuples():
        values = np.array([o[row.position - 1] for o in steps if len(o) >= row.position])
        low, high = scipy.stats.t.interval(
            0.95, len(values) - 1, values.mean(), scipy.stats.sem(values)
        )
        if np.ptp(values) < 1e-9:  # the first step is the same in every rollout
            low = high = values.mean()
        assert row.reached == len(values) / 12
        # The variance is a difference of sums of 12 terms in float64
        rounding = 12 * 2**-26 * values.mean()
        assert row.low == pytest.approx(max(low, 0), abs=rounding)
        assert row.high == pytest.approx(high, abs=rounding)


@pytest.mark.parametrize("name", ["smollm2-135m", "pocket", "tiny-random"])
def test_every_preset_is_found_by_name(name, folder, monkeypatch):
    "Without the Hub: one table of presets serves weights and tokenizers."
    monkeypatch.setitem(klrb.models.PRESETS, "smollm2-135m", lambda: folder / "good")
    found = measure_kl(name, name, ["a b"], samples=2, max_new_tokens=2)
    assert found.kl.mean == 0 and found.about["models"]["policy"]["name"] == name


def test_settings_are_checked_when_they_are_made():
    given = {o.name: inspect.signature(measure_kl).parameters[o.name].default for o in FIELDS}
    settings = Settings(**given | dict(divergence="forward_kl", tolerance="5%", temperature=0.7))
    assert (settings.divergence, settings.direction) == ("kl", "forward")
    assert settings.tolerance == Tolerance(0.05, True) and settings.reference_temperature == 0.7
    assert settings.directions == ("forward",) and settings.plain()["tolerance"] == "5 %"
    for wrong in (dict(seed=-1), dict(max_samples=1), dict(samples=True), dict(alpha=math.nan)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Settings(**given | wrong)


def test_adapter_on_and_off_is_one_set_of_weights(tmp_path):
    plain, ids = small_model(1), torch.tensor([[0, 3, 2]])
    tuned = get_peft_model(
        small_model(1),
        LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True),
    )
    with torch.no_grad():
        merged = tuned(ids).logits
    exact, _ = enumerated_kl(tuned.get_base_model(), plain, [0], 2)
    found = measure(tuned, tuned.get_base_model(), max_new_tokens=2, samples=1500)
    assert 0 < exact and abs(found.kl.mean - exact) < 4 * found.kl.stderr
    policy, reference = load_pair(tuned, tuned.get_base_model(), TOKENIZER)
    assert policy.model is reference.model
    with torch.no_grad():
        with policy.active() as model:
            assert torch.equal(model(ids).logits, merged)
        with reference.active() as model:
            assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-6)


def test_two_adapters_on_one_base(folder, tmp_path):
    for name, seed in (("x", 1), ("y", 2)):
        base = small_model(1)
        torch.manual_seed(seed)  # of the adapter
        get_peft_model(
            base,
            LoraConfig(
                r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True
            ),
        ).save_pretrained(tmp_path / name)
    policy, reference = load_pair(
        f"{folder / 'good'}+{tmp_path / 'x'}", f"{folder / 'good'}+{tmp_path / 'y'}"
    )
    alone = load_pair(f"{folder / 'good'}+{tmp_path / 'y'}", str(folder / "good"))
    ids = torch.tensor([[0, 3, 2]])

    def logits(side):
        with torch.no_grad(), side.active() as model:
            return model(ids).logits

    ours, theirs, again = logits(policy), logits(reference), logits(policy)
    assert (
        policy.model is reference.model
        and torch.equal(ours, again)
        and not torch.equal(ours, theirs)
    )
    assert torch.equal(theirs, logits(alone[0])) and torch.allclose(
        logits(alone[1]), POLICY(ids).logits, atol=1e-6
    )
    assert len({o.fingerprint() for o in (policy, reference, alone[1])}) == 3


# Tolerance


def test_tolerance_is_reached_or_the_reason_is_given():
    assert measure(samples=None, tolerance=0.05).kl.half_width <= 0.05
    found = measure(samples=None, tolerance="3%")
    assert found.headline.reason == "reached" and found.kl.half_width <= 0.03 * found.kl.mean
    assert measure(samples=None, tolerance=1e-4, max_samples=600).headline.reason == "max_samples"
    few = measure(prompts=["a", "b c", "d"], samples=None, tolerance=1e-4)
    assert few.headline.reason == "prompts" and "more prompts" in repr(few)
    assert (
        len(measure(POLICY, POLICY, samples=None, tolerance="1%").headline.rollouts) == 256
    )  # zero width at the first look


@pytest.mark.parametrize("num_prompts", [1, 5])
def test_next_size_of_known_variance(num_prompts):
    "Standard normal values: 1.96^2 / d^2 rollouts are needed, and a tenth more are planned."
    values = np.random.default_rng(0).standard_normal(2000)
    half = cluster_interval(
        values, clusters=np.arange(2000) % num_prompts if num_prompts > 1 else None
    ).half_width
    assert next_size(values, np.ones(2000), 1.01 * half, num_prompts) == 2000
    if num_prompts == 1:
        assert next_size(values, np.ones(2000), 0.8 * half) == pytest.approx(
            1.1 * 2000 / 0.64, rel=1e-3
        )
        assert next_size(values, np.ones(2000), 0.01 * half) == 8000  # at most four times as many
    shifted = values + 10 * (
        np.arange(2000) % 5
    )  # prompts that differ: no number of rollouts helps
    assert next_size(shifted, np.ones(2000), 1.0, 5) == math.inf


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "5%%", "inf", "nan", "1e999", "-5%", None])
def test_bad_tolerances(text):
    with pytest.raises(ValueError, match="must be a positive number"):
        parse_tolerance(text)


def strings(seed, vocab_size, max_length, scale):
    policy, reference = (
        TabularLM(vocab_size, max_length, seed=s, scale=scale) for s in (seed, seed + 1000)
    )
    with torch.no_grad():
        r = enumerate_rollouts(policy, reference)
        return (
            r.prob.numpy() / r.prob.sum().item(),
            (step_kl(r.policy_logits, r.ref_logits) * r.mask).sum(-1).numpy(),
            exact_kl(policy, reference).item(),
        )


def coverage(prob, values, exact, tolerance, repetitions=300, **settings):
    rng, hits = np.random.default_rng(0), 0
    for _ in range(repetitions):
        drawn = np.empty(0)

        def draw(n):
            nonlocal drawn
            drawn = np.concatenate([drawn, rng.choice(values, n - len(drawn), p=prob)])
            return drawn, np.ones(n)

        sample_until(draw, tolerance, **settings)
        i = cluster_interval(drawn)
        hits += i.low <= exact <= i.high
    return hits / repetitions


def test_coverage_of_the_stopping_rule(monkeypatch):
    """300 repetitions, standard error 1.3 %: within 4 % of 95 %. (The chapter repeats 2,000 times.)

    The second pair has a skewness of 6; without the first round's size and the skewness rule its
    coverage is far off.
    """
    ordinary, skewed = strings(0, 3, 4, 1.0), strings(2, 2, 5, 2.0)
    assert abs(coverage(*ordinary, Tolerance(0.05)) - 0.95) < 0.04
    assert abs(coverage(*skewed, Tolerance(0.1, True)) - 0.95) < 0.04
    monkeypatch.setattr("klrb.intervals.SKEWNESS_FACTOR", 0)
    assert coverage(*skewed, Tolerance(0.1, True), first=16) < 0.88


# Given text


def test_text_mode_agrees_with_sampling(tmp_path):
    "The policy's completions as documents: the mean step KL is the per-token estimate of them."
    found = measure(samples=300, save=tmp_path / "out")
    documents = [list(o) for o in pd.read_parquet(tmp_path / "out" / "rollouts.parquet").token_ids]
    text = measure_text(POLICY, REFERENCE, documents, tokenizer=TOKENIZER)
    rows = text.statistics.set_index("statistic")
    per_token = found.headline.interval("rb", "nats per token")
    assert rows.value["mean"] == pytest.approx(per_token.mean, rel=1e-5) and rows.low[
        "mean"
    ] == pytest.approx(per_token.low, rel=1e-4)
    mc = found.headline.interval("mc", "nats per token")
    assert rows.value["mean Δ log p"] == pytest.approx(mc.mean, rel=1e-4)
    swapped = measure_text(
        REFERENCE, POLICY, documents, tokenizer=TOKENIZER, direction="forward"
    ).statistics.set_index("statistic")
    assert swapped.value["mean"] == pytest.approx(rows.value["mean"], rel=1e-6) and swapped.value[
        "mean Δ log p"
    ] == pytest.approx(-rows.value["mean Δ log p"])


def test_bootstrap_over_documents_covers_the_median(monkeypatch):
    """40 documents of a population whose values differ by document, 80 repetitions.

    At 95 % fewer than 68 hits have a chance of 6e-4.
    """
    monkeypatch.setattr("klrb.compare.text.RESAMPLES", 200)
    rng, hits = np.random.default_rng(0), 0
    for _ in range(80):
        level = rng.standard_normal(40).repeat(10)
        step = level + rng.standard_normal(400)
        tokens = pd.DataFrame(
            dict(
                document=np.arange(40).repeat(10),
                step=step,
                policy_logprob=0.0,
                ref_logprob=0.0,
                same_top=1.0,
            )
        )
        row = text_statistics(tokens).set_index("statistic").loc["median"]
        hits += row.low <= 0 <= row.high  # the population is symmetric around 0
    assert hits >= 68


def test_one_document_has_no_interval():
    text = measure_text(POLICY, REFERENCE, ["a b c d e"], tokenizer=TOKENIZER)
    assert text.statistics.low.isna().all() and "no intervals" in repr(text)


# Files


def interrupt(monkeypatch, batch):
    "Press Ctrl-C in batch number `batch`."
    inner, calls = klrb.compare.rollouts._one_batch, itertools.count()

    def interrupted(*args):
        if next(calls) == batch:
            raise KeyboardInterrupt
        return inner(*args)

    monkeypatch.setattr(klrb.compare.rollouts, "_one_batch", interrupted)


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    interrupt(monkeypatch, 3)
    found = measure(
        prompts=["a", "b"], samples=50, batch_tokens=50, save=tmp_path / "out", direction="both"
    )
    assert (
        found.status == "interrupted"
        and list(found.results) == ["reverse"]
        and "interrupted" in repr(found)
    )
    saved = json.loads((tmp_path / "out" / "measurement.json").read_text())
    assert (
        saved["status"] == "interrupted"
        and saved["results"]["reverse"]["rollouts"] == len(found.headline.rollouts) > 0
    )
    assert len(pd.read_parquet(tmp_path / "out" / "rollouts.parquet")) == len(
        found.headline.rollouts
    )


def test_a_killed_run_leaves_a_readable_part(tmp_path, monkeypatch):
    inner, calls = klrb.compare.rollouts._one_batch, itertools.count()

    def killed(*args):
        if next(calls) == 3:
            raise SystemExit  # as if by a signal: nothing of ours runs after it
        return inner(*args)

    monkeypatch.setattr(klrb.compare.rollouts, "_one_batch", killed)
    monkeypatch.setattr("klrb.compare.results.FLUSH_SECONDS", 0.0)
    with pytest.raises(SystemExit):
        measure(prompts=["a", "b"], samples=50, batch_tokens=50, save=tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "measurement.json").read_text())
    rows = pd.read_parquet(tmp_path / "out" / "rollouts")
    assert (
        saved["status"] == "partial" and saved["results"]["reverse"]["rollouts"] == len(rows) == 36
    )  # 3 batches of 12
    assert not list((tmp_path / "out").glob("**/.*.part"))
    found = saved["results"]["reverse"]["estimates"][0]
    assert found["estimator"] == "rb" and found["mean"] == pytest.approx(rows.rb.mean())


def test_saved_files_have_all_that_repeats_a_run(tmp_path):
    found = measure(prompts=["a b", "c"], samples=4, save=tmp_path / "out")
    names = {
        o.relative_to(tmp_path / "out").as_posix()
        for o in (tmp_path / "out").glob("**/*")
        if o.is_file()
    }
    assert names >= {
        "measurement.json",
        "rollouts.parquet",
        "reverse-prompts.csv",
        "reverse-positions.csv",
        "heatmap.html",
        "figures/reverse-convergence.png",
    }
    saved = json.loads((tmp_path / "out" / "measurement.json").read_text())
    assert (
        saved["status"] == "complete"
        and saved["settings"]["seed"] == 0
        and saved["versions"]["torch"] == torch.__version__
    )
    prints = [saved["models"][o]["fingerprint"] for o in ("policy", "reference")]
    assert prints[0] != prints[1] and prints == [
        o.fingerprint() for o in load_pair(POLICY, REFERENCE, TOKENIZER)
    ]
    assert saved["results"]["reverse"]["estimates"][0]["mean"] == found.kl.mean
    rows = pd.read_parquet(tmp_path / "out" / "rollouts.parquet")
    np.testing.assert_allclose(rows.step.map(sum), rows.rb)
    assert json.dumps(found.to_json(), allow_nan=False) and set(figures(found.headline)) == {
        "positions",
        "convergence",
        "prompts",
    }


def test_little_of_what_the_models_read_of_a_text_is_padding(monkeypatch):
    "Windows of unequal lengths are scored with their like, and come back in order"
    inner, read = klrb.compare.scoring.completion_logits, []

    def counted(model, prompt_ids, prompt_mask, completion_ids, *others):
        read.append(len(prompt_ids) * (prompt_ids.shape[1] + completion_ids.shape[1] - 1))
        return inner(model, prompt_ids, prompt_mask, completion_ids, *others)

    monkeypatch.setattr(klrb.compare.scoring, "completion_logits", counted)
    gen = torch.Generator().manual_seed(0)
    lengths = [60, 6, 33] * 12
    documents = [torch.randint(2, 4096, (n,), generator=gen).tolist() for n in lengths]
    sides = [klrb.models.load_model("tiny-random", seed=o) for o in (1, 0)]
    settings = dict(tokenizer=klrb.models.load_tokenizer("pocket"), window=60)
    found = measure_text(*sides, documents, **settings).tokens
    assert sum(read) <= 1.3 * 2 * sum(lengths)
    assert found.token_id.tolist() == [o for ids in documents for o in ids]
    for number in (0, 1, 35):
        row = torch.tensor([[0, *documents[number]]])
        p, q = (o(row).logits[0, :-1].double().detach() for o in sides)
        ours = found.step[found.document == number].to_numpy()
        np.testing.assert_allclose(ours, step_kl(p, q).numpy(), rtol=1e-4, atol=1e-6)


# The command line


UNUSED = """
    matplotlib seaborn scipy.stats sklearn statsmodels datasets peft gguf trl papermill dask IPython
    klrb.compare.figures klrb.rlhf.training klrb.sweeps
""".split()  # torch._dynamo and scipy.optimize are loaded by transformers' own models


def test_the_command_imports_nothing_that_it_does_not_use(tmp_path):
    "In a fresh process: start-up is most of a small measurement's time"
    (tmp_path / "prompts.txt").write_text("The film\nI saw")
    asked = "measure pocket pocket --prompts prompts.txt --samples 1 --max-new-tokens 2".split()
    code = (
        f"import sys; from klrb.cli import app; app({asked}, standalone_mode=False); "
        f"print(*['unused', *(o for o in {UNUSED} if o in sys.modules)])"
    )
    env = os.environ | dict(PYTHONPATH=str(Path(klrb.__file__).parents[1]))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "unused"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Checkpoints and files, good and bad."
    where = tmp_path_factory.mktemp("inputs")
    tokenizer = TOKENIZER
    for name, model in (
        ("good", POLICY),
        ("nan", small_model(4)),
        ("narrow", small_model(5, vocab_size=4)),
    ):
        if name == "nan":
            with torch.no_grad():
                model.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.nan
        model.save_pretrained(where / name), tokenizer.save_pretrained(where / name)
    other = small_tokenizer()
    other.add_tokens(["f"])
    POLICY.save_pretrained(where / "other"), other.save_pretrained(where / "other")
    for name in ("truncated", "incomplete", "pickled", "unknown"):
        POLICY.save_pretrained(where / name), tokenizer.save_pretrained(where / name)
    weights = (where / "good" / "model.safetensors").read_bytes()
    (where / "truncated" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    config = json.loads((where / "good" / "config.json").read_text())
    (where / "incomplete" / "config.json").write_text(json.dumps(config | dict(n_layer=2)))
    (where / "unknown" / "config.json").write_text(
        json.dumps(config | dict(model_type="no_such_type"))
    )
    (where / "pickled" / "model.safetensors").unlink()
    torch.save(POLICY.state_dict(), where / "pickled" / "pytorch_model.bin")
    (where / "adapter").mkdir(), (where / "empty").mkdir(), (where / "full").mkdir()
    (where / "adapter" / "adapter_config.json").write_text("{}")
    (where / "full" / "something").write_text("x")
    for name, text in {
        "good.txt": "a b\nc",
        "blank.txt": "\n  \n",
        "bad.jsonl": '{"prompt": "a"}\n{"prompt"',
        "list.jsonl": "[1]",
        "field.jsonl": '{"question": "a"}',
        "chat.jsonl": '{"prompt": [{"role": "user", "content": "a"}]}',
        "number.jsonl": '{"prompt": 3}',
        "long.txt": "a b c d e a b c d e a b c d e",
        "junk.gguf": "not a GGUF file",
        "junk.parquet": "not a Parquet file",
    }.items():
        (where / name).write_text(text)
    (where / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    pd.DataFrame(dict(question=["a"])).to_parquet(where / "table.parquet")
    return where


GOOD = ["good", "good", "--prompts", "good.txt", "--max-new-tokens", "3", "--samples", "2"]
BAD = {
    "missing folder": (["./nowhere", "good"], "no such file or folder"),
    "Hub id without a network": (["no/such-model", "good"], "needs a network"),
    "folder without a model": (["./empty", "good"], "no config.json"),
    "adapter without its base": (["./adapter", "good"], "write BASE+ADAPTER"),
    "base without its adapter": (["good+", "good"], "on either side of the plus"),
    "adapter that is no adapter": (["good+./empty", "good"], "no adapter_config.json"),
    "adapter with an empty config": (["good+./adapter", "good"], "loading it onto"),
    "other tokenizer": (["good", "other"], "'f': absent and 6"),
    "truncated weights": (["truncated", "good"], "loading it failed"),
    "missing weights": (["incomplete", "good"], "would be random"),
    "pickled weights": (["pickled", "good"], "loading it failed"),
    "unknown architecture": (["unknown", "good"], "loading it failed"),
    "broken GGUF": (["./junk.gguf", "good"], "loading it failed"),
    "logits narrower than the tokenizer": (["narrow", "narrow"], "do not belong together"),
    "NaN weights": (["nan", "good"], "the policy gives NaN logits at prompt"),
    "NaN weights in the reference": (["good", "nan"], "the reference gives NaN logits at prompt"),
    "missing prompts": (["--prompts", "nowhere.txt"], "no such file"),
    "empty prompts": (["--prompts", "blank.txt"], "is empty"),
    "prompts that are not UTF-8": (["--prompts", "latin.txt"], "byte 1 is 0xe9"),
    "prompts in a folder": (["--prompts", "./empty"], "a folder"),
    "broken JSONL": (["--prompts", "bad.jsonl"], "line 2 is not JSON"),
    "JSONL of lists": (["--prompts", "list.jsonl"], "no JSON object"),
    "JSONL without the field": (["--prompts", "field.jsonl"], "it has question"),
    "JSONL with numbers": (["--prompts", "number.jsonl"], "must be a text"),
    "broken Parquet": (["--prompts", "junk.parquet"], "cannot be read"),
    "Parquet without the column": (
        ["--prompts", "table.parquet", "--column", "prompt"],
        "it has question",
    ),
    "data set without a network": (
        ["--prompts", "no/such-data"],
        "loading it as a data set failed",
    ),
    "messages without chat": (["--prompts", "chat.jsonl"], "set `chat`"),
    "chat without a template": (["--chat"], "no chat template"),
    "prompt longer than the context": (["--prompts", "long.txt"], "the policy's context has 16"),
    "unknown divergence": (["--divergence", "euclid"], "must be one of kl"),
    "unknown direction": (["--direction", "sideways"], "must be reverse, forward or both"),
    "zero samples": (["--samples", "0"], "at least 1"),
    "zero tokens": (["--max-new-tokens", "0"], "at least 1"),
    "negative tolerance": (["--tolerance", "-0.1"], "`samples` fixes"),
    "zero temperature": (["--temperature", "0"], "must be positive"),
    "negative reference temperature": (["--reference-temperature", "-1"], "must be positive"),
    "negative seed": (["--seed", "-1"], "at least 0"),
    "one sample at most": (["--max-samples", "1"], "at least 2"),
    "batch too small": (["--batch-tokens", "4"], "give at least that many"),
    "unknown dtype": (["--dtype", "int8"], "must be one of float32"),
    "unknown device": (["--device", "abacus"], "not available"),
    "order that is no number": (["--alpha", "nan"], "finite number"),
    "folder in use": (["--save", "full"], "not empty"),
    "folder that cannot be made": (["--save", "good.txt/out"], "cannot be written"),
    "window without text": (["--window", "16"], "without `text`"),
    "samples of a text": (["--text", "good.txt"], "together with `text`"),
}


def invoke(folder, monkeypatch, *options):
    monkeypatch.chdir(folder)
    return CliRunner().invoke(app, ["measure", *options])


def check_error(answer, message):
    lines = answer.stderr.strip().splitlines()
    assert (
        answer.exit_code == 2
        and len(lines) == 1
        and lines[0].startswith("klrb: ")
        and message in lines[0]
    ), answer.output


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(folder, monkeypatch, case):
    options, message = BAD[case]
    answer = invoke(
        folder,
        monkeypatch,
        *(options + GOOD[2:] if not options[0].startswith("--") else GOOD + options),
    )
    check_error(answer, message)
    assert answer.stdout == ""


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tolerance", "-0.1"], "must be a positive number"),
        (["--tolerance", "five"], "must be a positive number"),
        (["--text", "nowhere.txt"], "no such file"),
        (["--text", "blank.txt"], "is empty"),
        (["--text", "good.txt", "--direction", "both"], "one at a time"),
        (["--text", "good.txt", "--window", "0"], "at least 1"),
        (["--text", "good.txt", "--batch-tokens", "1"], "smaller `window`"),
        (["--text", "good.txt", "--tolerance", "0.1"], "together with `text`"),
    ],
)
def test_bad_input_of_the_other_modes(folder, monkeypatch, options, message):
    check_error(invoke(folder, monkeypatch, "good", "good", *options), message)


def test_gguf_without_its_package_names_the_extra(folder, monkeypatch):
    monkeypatch.setattr(klrb.models, "find_spec", lambda name: None)
    check_error(invoke(folder, monkeypatch, "junk.gguf", "good"), "pip install klrb[gguf]")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_suggests_the_option(folder, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(klrb.compare.rollouts, "sample_completions", fail)
    check_error(invoke(folder, monkeypatch, *GOOD), "`batch_tokens` = 4,096; give a smaller one")


def test_unreachable_tolerance_prints_the_table_and_fails(folder, monkeypatch):
    REFERENCE.save_pretrained(folder / "reference"), TOKENIZER.save_pretrained(folder / "reference")
    answer = invoke(
        folder,
        monkeypatch,
        "good",
        "reference",
        "--prompts",
        "good.txt",
        "--max-new-tokens",
        "3",
        "--tolerance",
        "0.0001",
    )
    check_error(answer, "more rollouts of these prompts cannot reach the tolerance")
    assert "nats per sequence" in answer.stdout


def test_defaults_of_the_command_are_those_of_the_functions():
    options = {o.name: o.default for o in typer.main.get_command(app).commands["measure"].params}
    for function in (measure_kl, measure_text):
        for name, parameter in inspect.signature(function).parameters.items():
            if name in options and parameter.default is not inspect.Parameter.empty:
                assert options[name] == parameter.default, name
    assert set(inspect.signature(measure_kl).parameters) - set(options) == {"tokenizer", "progress"}


def test_json_and_standard_input(folder, monkeypatch):
    monkeypatch.chdir(folder)
    answer = CliRunner().invoke(
        app,
        ["measure", *GOOD[:3], "-", *GOOD[4:], "--json", "--policy-prefix", "b "],
        input="a b\nc\n",
    )
    found = json.loads(answer.stdout)
    assert (
        answer.exit_code == 0
        and found["prompts"] == 2
        and found["results"]["reverse"]["rollouts"] == 4
    )
    assert found["models"]["policy"]["fingerprint"] == found["models"]["reference"]["fingerprint"]
    text = json.loads(
        CliRunner().invoke(app, ["measure", "good", "good", "--text", "good.txt", "--json"]).stdout
    )
    assert {o["statistic"]: o["value"] for o in text["statistics"]}["maximum"] == 0


def test_ctrl_c_prints_the_estimate_so_far(folder, monkeypatch):
    interrupt(monkeypatch, 2)
    answer = invoke(folder, monkeypatch, *GOOD[:-1], "50", "--batch-tokens", "50")
    assert (
        answer.exit_code == 130
        and "stopped: interrupted" in answer.stdout
        and "RB" in answer.stdout
    )
