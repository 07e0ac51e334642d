"""The self-check at loading: what it decides, that this gives right numbers, and leaves no trace.

Oracle throughout: the model itself in float64, given the token ids of one sequence alone.
"""

import time

import pytest
import torch
from test_architectures import disagreement, tokenizer
from tiny_models import VOCAB, tiny
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import klrb.selfcheck
from klrb.measure import measure_kl
from klrb.models import context_length
from klrb.selfcheck import check_scoring, rotary_switch
from klrb.compare.text import measure_text

LONGROPE = dict(
    rope_type="longrope",
    rope_theta=1e4,
    short_factor=[1.0] * 4,
    long_factor=[6.0] * 4,
    original_max_position_embeddings=12,
)


def longrope(seed=0):
    "Phi-3 with a switch of its rotary factors at 12 positions."
    return tiny("phi3", seed, rope_parameters=LONGROPE, original_max_position_embeddings=12)


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(klrb.selfcheck, "_FOUND", {})


def texts(*lengths):
    gen = torch.Generator().manual_seed(5)
    return [
        " ".join(f"w{i}" for i in torch.randint(3, VOCAB, (n,), generator=gen).tolist())
        for n in lengths
    ]


# What the check decides


@pytest.mark.parametrize(
    "kind, fields, equal_lengths, bare",
    [
        ("llama", {}, False, False),
        ("gpt2", {}, False, False),
        ("bloom", {}, False, False),
        ("qwen3_moe", {}, False, False),
        ("mamba", {}, False, False),
        ("bart", {}, True, False),
        ("recurrent_gemma", {}, True, False),
        ("roberta", {}, True, True),
        ("rwkv", {}, True, True),
    ],
)
def test_how_a_model_must_be_run(kind, fields, equal_lengths, bare):
    found = check_scoring(tiny(kind, **fields))
    assert (found.equal_lengths, found.bare, found.switch) == (equal_lengths, bare, None)
    assert found.deviation < 1e-4  # of the way that was taken; the tolerance is 3.5e-4


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "xlnet", "cpmant"])
def test_a_model_that_sees_what_comes_later_is_refused(kind):
    fields = dict(is_decoder=False) if kind in ("bert", "roberta", "electra") else {}
    with pytest.raises(ValueError, match="not a causal language model") as caught:
        check_scoring(tiny(kind, **fields))
    assert "\n" not in str(caught.value)


def test_a_folder_of_a_masked_model_or_an_encoder_decoder_is_refused_before_a_token_is_sampled(
    tmp_path, monkeypatch
):
    sizes = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    BertForMaskedLM(
        BertConfig(
            **sizes,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
        )
    ).save_pretrained(tmp_path / "bert")
    whole = BartForConditionalGeneration(
        BartConfig(
            **sizes,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            decoder_start_token_id=2,
        )
    )
    whole.save_pretrained(tmp_path / "bart")
    monkeypatch.setattr(
        "klrb.compare.rollouts.sample_completions", lambda *o: pytest.fail("a token was sampled")
    )
    for name, why in (
        ("bert", "not a causal language model"),
        ("bart", "lacks 2 weights.*causal language model"),
    ):
        tokenizer().save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=why):
            measure_kl(str(tmp_path / name), str(tmp_path / name), ["w5 w6"], samples=2)
    with pytest.raises(ValueError, match="encoder-decoder, which is not a causal language model"):
        check_scoring(whole)
    decoder = tiny("bart")
    decoder.config.architectures = [
        "BartModel"
    ]  # as `AutoModelForCausalLM` leaves it for facebook/bart-base
    with pytest.raises(ValueError, match="encoder-decoder, which is not a causal language model"):
        check_scoring(decoder)


@pytest.mark.parametrize("scale, equal", [(1e-9, False), (0.5, True)])
def test_the_size_of_a_leak_decides(scale, equal):
    "A layer that adds the mean over all positions, padding too: rounding passes, a leak does not."
    model = tiny("llama")

    def leak(module, args, output):
        return output + scale * output.cumsum(1) / output.shape[1]

    model.model.layers[0].mlp.register_forward_hook(leak)
    assert check_leak(model) == equal


def check_leak(model):
    try:
        return check_scoring(model).equal_lengths
    except ValueError as error:
        return "cannot be measured" in str(error) or "not a causal" in str(error)


# The cases with values


@pytest.mark.parametrize("kind", ["bart", "roberta", "recurrent_gemma", "rwkv"])
def test_no_prompt_is_worse_beside_others(kind):
    worst, z = disagreement(tiny(kind, 0), tiny(kind, 1))
    assert worst < 1e-4 and abs(z) < 5


def test_one_prompt_alone_where_positions_are_the_models_own():
    "RoBERTa's positions start at its padding id + 1."
    worst, z = disagreement(tiny("roberta", 0), tiny("roberta", 1), texts(5))
    assert worst < 1e-4 and abs(z) < 5


def test_sides_that_need_different_batches():
    "The policy may be padded, the reference may not; and the other way round."
    for kinds in (("llama", "recurrent_gemma"), ("recurrent_gemma", "llama")):
        worst, z = disagreement(*(tiny(kind, seed) for seed, kind in enumerate(kinds)))
        assert worst < 1e-4 and abs(z) < 5


@pytest.mark.parametrize("lengths", [(5, 24), (1, 24, 5, 13), (5, 6)])
def test_a_batch_does_not_straddle_the_switch_of_rotary_factors(lengths):
    worst, z = disagreement(longrope(0), longrope(1), texts(*lengths))
    assert worst < 1e-4 and abs(z) < 5


def test_the_two_sides_of_the_switch_differ():
    "So that the test above has something to find."
    ids = torch.randint(3, VOCAB, (1, 13), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        short, long = longrope()(ids[:, :12]).logits[0, 11], longrope()(ids).logits[0, 11]
    assert (short - long).abs().max() > 0.1


def test_a_rollout_that_would_cross_the_switch_is_refused():
    with pytest.raises(ValueError, match="crosses 12 positions.*Give at most 4 new tokens"):
        measure_kl(
            longrope(0),
            longrope(1),
            texts(5, 8),
            tokenizer=tokenizer(),
            samples=2,
            max_new_tokens=5,
        )
    assert rotary_switch(tiny("llama").config) is None and rotary_switch(longrope().config) == 12


def test_text_on_both_sides_of_the_switch():
    documents = texts(5, 24, 11)
    policy, reference = longrope(0), longrope(1)
    found = measure_text(policy, reference, documents, tokenizer=tokenizer()).tokens
    for number, document in enumerate(documents):
        ids = torch.tensor([[1, *tokenizer()(document).input_ids]])[
            :, :-1
        ]  # each document alone, after the beginning of text
        with torch.no_grad():
            p, q = (o.double()(ids).logits[0].log_softmax(-1) for o in (policy, reference))
        policy.float(), reference.float()
        exact = (p.exp() * (p - q)).sum(-1)
        assert found[found.document == number].step.to_numpy() == pytest.approx(
            exact.numpy(), abs=1e-4
        )


# It leaves no trace, and is quick


def test_a_model_comes_out_as_it_went_in():
    model = tiny("gpt2")
    model.train()
    model.transformer.h[1].eval()
    model.generation_config.repetition_penalty = 1.7
    before = [o.training for o in model.modules()], model.generation_config, torch.get_rng_state()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    check_scoring(model)
    assert (
        before[0] == [o.training for o in model.modules()] and model.generation_config is before[1]
    )
    assert (
        torch.equal(torch.get_rng_state(), before[2])
        and model.generation_config.repetition_penalty == 1.7
    )
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(o.requires_grad and o.grad is None for o in model.parameters())


def test_a_model_is_checked_once(monkeypatch):
    ran = []
    run = klrb.selfcheck._run_check
    monkeypatch.setattr(klrb.selfcheck, "_run_check", lambda model: ran.append(1) or run(model))
    for _ in range(2):
        check_scoring(tiny("llama"))
    assert len(ran) == 1
    check_scoring(tiny("llama", seed=1))
    check_scoring(tiny("llama").double())
    assert len(ran) == 3


@pytest.mark.slow
def test_two_seconds_for_135_million_parameters():
    "Processor time of this process, on one core."
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    ).eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        began = time.process_time()
        found = check_scoring(model)
        assert time.process_time() - began < 2
    finally:
        torch.set_num_threads(threads)
    assert not found.equal_lengths and found.deviation < 1e-4
    for dtype in (torch.bfloat16, torch.float16):
        assert not check_scoring(model.to(dtype)).equal_lengths


# Context and ids


@pytest.mark.parametrize(
    "config, expected",
    [
        (tiny("llama").config, 128),
        (tiny("gpt2").config, 128),
        (tiny("gemma3").config, 128),
        (tiny("xlnet").config, None),
        (tiny("mamba").config, None),
        (tiny("roberta").config, 127),
        (tiny("whisper").config, 128),
        (tiny("mpt").config, 128),
        (tiny("bart").config, 128),
    ],
)
def test_context_by_any_name(config, expected):
    assert context_length(config) == expected


def test_the_whole_of_a_context_can_be_read_and_no_more():
    "RoBERTa loses the positions up to its padding id."
    model = tiny("roberta", pad_token_id=3)
    last = context_length(model.config)
    with torch.no_grad():
        model(torch.full((1, last), 5))
    with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
        model(torch.full((1, last + 1), 5))
    with pytest.raises(ValueError, match=f"context has {last} positions"):
        measure_kl(model, model, texts(120), tokenizer=tokenizer(), samples=1, max_new_tokens=5)


def test_ids_that_the_model_does_not_have():
    policy = tiny("llama")
    with pytest.raises(ValueError, match="token id 97, but .* knows ids from 0 to 96"):
        measure_text(policy, policy, [[5, 6, 97]], tokenizer=tokenizer())
    with pytest.raises(ValueError, match="holds the token id -1, which is no token id"):
        measure_text(policy, policy, [[5, -1, 7]], tokenizer=tokenizer())
