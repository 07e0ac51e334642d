"""GGUF files: written from small models as llama.cpp does, read back, and compared in float64."""

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from klrb.errors import InputError
from klrb.gguf_files import load_gguf
from klrb.measure import measure_kl
from klrb.compare.sides import load_pair

gguf = pytest.importorskip("gguf")
V = 40
IDS = torch.tensor([[1, 5, 3, 23, 7, 2, 39, 11, 4, 30, 8, 9]])
COMMON = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.2,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
GQA = COMMON | dict(num_key_value_heads=2)
THETA = dict(rope_theta=500.0)
MAKE = {
    "llama": (
        LlamaForCausalLM,
        lambda **o: LlamaConfig(
            **GQA | dict(rope_parameters=dict(rope_type="default") | THETA, rms_norm_eps=1e-3) | o
        ),
    ),
    "qwen2": (
        Qwen2ForCausalLM,
        lambda **o: Qwen2Config(
            **GQA | dict(rope_parameters=dict(rope_type="default") | THETA) | o
        ),
    ),
    "qwen3": (
        Qwen3ForCausalLM,
        lambda **o: Qwen3Config(
            **GQA | dict(head_dim=16, rope_parameters=dict(rope_type="default") | THETA) | o
        ),
    ),
    "gemma2": (
        Gemma2ForCausalLM,
        lambda **o: Gemma2Config(
            **GQA
            | dict(
                head_dim=16,
                query_pre_attn_scalar=16,
                sliding_window=4,
                attn_logit_softcapping=5.0,
                final_logit_softcapping=3.0,
            )
            | o
        ),
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        lambda **o: Gemma3TextConfig(
            **GQA
            | dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=4, num_hidden_layers=6)
            | o
        ),
    ),
    "phi3": (
        Phi3ForCausalLM,
        lambda **o: Phi3Config(
            **GQA
            | dict(
                sliding_window=None,
                rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5) | THETA,
            )
            | o
        ),
    ),
    "stablelm": (
        StableLmForCausalLM,
        lambda **o: StableLmConfig(
            **GQA
            | dict(
                use_qkv_bias=True,
                rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5) | THETA,
            )
            | o
        ),
    ),
    "starcoder2": (
        Starcoder2ForCausalLM,
        lambda **o: Starcoder2Config(
            **GQA | dict(use_bias=True, rope_parameters=dict(rope_type="default") | THETA) | o
        ),
    ),
    "gpt2": (
        GPT2LMHeadModel,
        lambda **o: GPT2Config(
            **dict(
                vocab_size=V,
                n_positions=64,
                n_embd=32,
                n_layer=2,
                n_head=4,
                initializer_range=0.2,
                bos_token_id=0,
                eos_token_id=0,
            )
            | o
        ),
    ),
    "qwen2moe": (
        Qwen2MoeForCausalLM,
        lambda **o: Qwen2MoeConfig(
            **GQA
            | dict(
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=24,
                shared_expert_intermediate_size=40,
                norm_topk_prob=False,
                rope_parameters=dict(rope_type="default") | THETA,
            )
            | o
        ),
    ),
    "qwen3moe": (
        Qwen3MoeForCausalLM,
        lambda **o: Qwen3MoeConfig(
            **GQA
            | dict(
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=24,
                norm_topk_prob=True,
                head_dim=16,
                rope_parameters=dict(rope_type="default") | THETA,
            )
            | o
        ),
    ),
}


def model_of(arch, **settings):
    torch.manual_seed(0)
    kind, config = MAKE[arch]
    model = kind(config(**settings)).eval()
    for name, parameter in model.named_parameters():  # norms and biases too
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return model


def keys_of(model, arch):
    "What llama.cpp's converter writes for these architectures."
    c = model.config
    heads, kv = c.num_attention_heads, getattr(c, "num_key_value_heads", c.num_attention_heads)
    width = getattr(c, "head_dim", None) or c.hidden_size // heads
    keys = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": getattr(c, "intermediate_size", None) or 4 * c.hidden_size,
        "attention.head_count": heads,
    }
    if arch == "gpt2":
        return keys | {"attention.layer_norm_epsilon": c.layer_norm_epsilon}
    keys |= {"attention.head_count_kv": kv, "vocab_size": c.vocab_size}
    eps = next(
        getattr(c, o) for o in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon") if hasattr(c, o)
    )
    keys[f"attention.layer_norm_{'rms_' if hasattr(c, 'rms_norm_eps') else ''}epsilon"] = eps
    rope = c.rope_parameters.get("full_attention", c.rope_parameters)
    keys |= {
        "rope.freq_base": rope["rope_theta"],
        "rope.dimension_count": int(width * rope.get("partial_rotary_factor", 1)),
    }
    if width != c.hidden_size // heads or arch in ("llama", "qwen3"):
        keys |= {"attention.key_length": width, "attention.value_length": width}
    if arch.startswith("gemma"):
        keys["attention.sliding_window"] = c.sliding_window
    if arch == "gemma2":
        keys |= {
            "attn_logit_softcapping": c.attn_logit_softcapping,
            "final_logit_softcapping": c.final_logit_softcapping,
        }
    if arch == "stablelm":
        keys["use_parallel_residual"] = c.use_parallel_residual
    if arch.endswith("moe"):
        keys |= {
            "expert_count": c.num_experts,
            "expert_used_count": c.num_experts_per_tok,
            "expert_feed_forward_length": c.moe_intermediate_size,
        }
    if arch == "qwen2moe":
        keys["expert_shared_feed_forward_length"] = c.shared_expert_intermediate_size
    return keys


def tensors_of(model, arch):
    "Names by gguf's own table, values as llama.cpp's converter changes them."
    c, table = (
        model.config,
        gguf.get_tensor_name_map(
            next(k for k, o in gguf.MODEL_ARCH_NAMES.items() if o == arch),
            model.config.num_hidden_layers,
        ),
    )
    tensors = {}
    for name, value in model.state_dict().items():
        value = value.float().numpy()
        if (
            name == "lm_head.weight"
            and c.tie_word_embeddings
            or name.endswith(("masked_bias", "attn.bias"))
            and value.ndim > 1
        ):
            continue
        if "experts.gate_up_proj" in name:
            layer = name.split(".")[2]
            (
                tensors[f"blk.{layer}.ffn_gate_exps.weight"],
                tensors[f"blk.{layer}.ffn_up_exps.weight"],
            ) = np.split(value, 2, axis=1)
            continue
        if "experts.down_proj" in name:
            tensors[f"blk.{name.split('.')[2]}.ffn_down_exps.weight"] = value
            continue
        stem, _, suffix = name.rpartition(".")
        new = f"{table.get_name(stem)}.{suffix}"
        assert not new.startswith("None"), name
        if arch == "llama" and (".attn_q." in new or ".attn_k." in new):
            heads = c.num_attention_heads if ".attn_q." in new else c.num_key_value_heads
            value = (
                value.reshape(heads, 2, len(value) // heads // 2, *value.shape[1:])
                .swapaxes(1, 2)
                .reshape(value.shape)
            )
        if arch.startswith("gemma") and "norm" in new:
            value = value + 1
        if (
            arch == "gpt2"
            and suffix == "weight"
            and any(o in new for o in ("attn_qkv", "attn_output", "ffn_up", "ffn_down"))
        ):
            value = value.T
        if "ffn_gate_inp_shexp" in new:
            value = value.reshape(-1)
        tensors[new] = np.ascontiguousarray(value)
    return tensors


def write(model, path, arch, keys=(), drop=(), tensors=(), quantise=None):
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (keys_of(model, arch) | dict(keys)).items():
        if key in drop or value is None:
            continue
        key = key if key.startswith(("tokenizer.", "general.", "other.")) else f"{arch}.{key}"
        kind = {bool: "bool", int: "uint32", float: "float32", str: "string"}.get(
            type(value), "array"
        )
        getattr(writer, f"add_{kind}")(key, value)
    writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre("default")
    (
        writer.add_token_list(["<|endoftext|>", *(chr(ord("A") + i) for i in range(V - 2)), "AB"]),
        writer.add_token_types([3] + [1] * (V - 1)),
        writer.add_token_merges(["A B"]),
    )
    for name in ("bos", "eos", "pad", "unk"):
        getattr(writer, f"add_{name}_token_id")(0)
    for name, value in (tensors_of(model, arch) | dict(tensors)).items():
        if name in drop:
            continue
        if quantise is None or value.ndim < 2:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quantize(value, quantise), raw_dtype=quantise)
    (
        writer.write_header_to_file(),
        writer.write_kv_data_to_file(),
        writer.write_tensors_to_file(),
        writer.close(),
    )
    return path


@torch.no_grad()
def kl(model, other):
    "KL of all next tokens of a sequence, in float64."
    kind = (
        torch.float32 if hasattr(model.config, "num_experts") else torch.float64
    )  # experts are not computed in float64
    logp, logq = (o.to(kind)(input_ids=IDS).logits.double().log_softmax(-1) for o in (model, other))
    return float((logp.exp() * (logp - logq)).sum())


def check(model, path):
    "The weights are the same: only the order of computation is left, and KL is quadratic in it."
    found, info = load_gguf(path)
    assert not info["missing_keys"]
    assert abs(kl(model, found)) < 1e-9


# Files that say what transformers reads, and what it does not


@pytest.mark.parametrize(
    "arch, tied",
    [
        (arch, tied)
        for arch in MAKE
        for tied in (False, True)
        if tied or not arch.startswith("gemma")
    ],
)
def test_a_file_is_the_model_it_was_made_from(arch, tied, tmp_path):
    model = model_of(arch, tie_word_embeddings=tied)
    check(model, write(model, tmp_path / "m.gguf", arch))


FACTORS = [1.0, 1.3, 2.0, 8.0]  # of pairs, rising, as Llama 3.1's
BASE = dict(rope_type="default") | THETA
ROPES = {  # what the model has, what llama.cpp writes of it
    "factors of frequencies": (
        dict(
            rope_type="longrope",
            short_factor=FACTORS,
            long_factor=FACTORS,
            factor=1.0,
            attention_factor=1.0,
            original_max_position_embeddings=64,
        ),
        {},
        FACTORS,
    ),
    "linear": (
        dict(rope_type="linear", factor=4.0),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        None,
    ),
    "linear by default": (dict(rope_type="linear", factor=4.0), {"rope.scaling.factor": 4.0}, None),
    "linear, the old key": (dict(rope_type="linear", factor=4.0), {"rope.scale_linear": 4.0}, None),
    "none": (
        dict(rope_type="default"),
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        None,
    ),
    "linear and factors": (
        dict(
            rope_type="longrope",
            short_factor=[2 * o for o in FACTORS],
            long_factor=[2 * o for o in FACTORS],
            factor=1.0,
            attention_factor=1.0,
            original_max_position_embeddings=64,
        ),
        {"rope.scaling.factor": 2.0},
        FACTORS,
    ),
    "YaRN": (
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.finetuned": True,
        },
        None,
    ),
}


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ROPES)
def test_scaled_positions_are_applied(name, arch, tmp_path):
    rope, keys, factors = ROPES[name]
    model, plain = model_of(arch, rope_parameters=rope | THETA), model_of(arch)
    if name != "none":
        assert kl(model, plain) > 1e-3
    tensors = {} if factors is None else {"rope_freqs.weight": np.array(factors, dtype=np.float32)}
    check(model, write(model.float(), tmp_path / "m.gguf", arch, keys, tensors=tensors))


def test_llama_3_1_itself(tmp_path):
    """Its own parameters, scaled to a context of 64, and llama.cpp's own formula for the tensor.

    It is `generate_extra_tensors` of convert_hf_to_gguf.py.
    """
    rope = dict(
        rope_type="llama3",
        rope_theta=500.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    )
    model, factors = model_of("llama", rope_parameters=rope), []
    for i in range(4):
        freq = 500.0 ** (-2 * i / 8)
        length = 2 * math.pi / freq
        if length < 32 / 4:
            factors.append(1.0)
        elif length > 32 / 1:
            factors.append(8.0)
        else:
            smooth = (32 / length - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    assert len(set(factors)) == 3
    path = write(
        model,
        tmp_path / "m.gguf",
        "llama",
        tensors={"rope_freqs.weight": np.array(factors, dtype=np.float32)},
    )
    check(model, path)
    check(
        model,
        write(
            model.float(),
            tmp_path / "n.gguf",
            "llama",
            tensors={"rope_freqs.weight": np.array(factors, dtype=np.float32)},
        ),
    )


def test_the_measured_divergence_is_zero(tmp_path):
    rope, keys, factors = ROPES["factors of frequencies"]
    model = model_of("llama", rope_parameters=rope | THETA)
    path = write(
        model,
        tmp_path / "m.gguf",
        "llama",
        keys,
        tensors={"rope_freqs.weight": np.array(factors, dtype=np.float32)},
    )
    inner = Tokenizer(
        models.WordLevel(
            {
                o: i
                for i, o in enumerate(
                    ["<|endoftext|>", *(chr(ord("A") + i) for i in range(V - 2)), "AB"]
                )
            },
            unk_token="A",
        )
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )
    policy, _ = load_pair(path, model, words)
    found = measure_kl(policy.model, model, samples=16, max_new_tokens=8, tokenizer=words)
    assert abs(found.kl.mean) < 1e-6


def test_a_scaled_model_survives_the_cache(tmp_path, monkeypatch):
    from klrb.models import cached_model
    from transformers import AutoModelForCausalLM

    rope, keys, factors = ROPES["linear and factors"]
    model = model_of("llama", rope_parameters=rope | THETA)
    path = write(
        model,
        tmp_path / "m.gguf",
        "llama",
        keys,
        tensors={"rope_freqs.weight": np.array(factors, dtype=np.float32)},
    )
    assert (
        abs(kl(model, AutoModelForCausalLM.from_pretrained(cached_model(path, tmp_path / "cache"))))
        < 1e-9
    )


def test_defaults_are_those_of_llama_cpp_and_not_of_transformers(tmp_path):
    for arch in ("llama", "qwen3", "starcoder2", "gemma2"):
        model = model_of(
            arch,
            **(
                {}
                if arch == "gemma2"
                else dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0))
            ),
        )
        check(
            model,
            write(
                model,
                tmp_path / f"{arch}.gguf",
                arch,
                drop=("rope.freq_base", "rope.dimension_count", "vocab_size"),
            ),
        )


def test_biases_are_read_where_the_file_has_them(tmp_path):
    model = model_of("llama", attention_bias=True, mlp_bias=True)
    check(model, write(model, tmp_path / "m.gguf", "llama"))


@pytest.mark.parametrize(
    "settings",
    [
        dict(query_pre_attn_scalar=16, attn_logit_softcapping=7.0),
        dict(final_logit_softcapping=1.0),
        dict(sliding_window=2),
        pytest.param(dict(num_hidden_layers=46, query_pre_attn_scalar=8), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gemma_2_is_read_with_its_caps_windows_and_scales(settings, tmp_path):
    model = model_of("gemma2", **settings)
    check(model, write(model, tmp_path / "m.gguf", "gemma2"))


def test_gemma_3_scales_its_global_layers_only(tmp_path):
    near = dict(rope_type="default", rope_theta=100.0)
    model = model_of(
        "gemma3",
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=4.0, rope_theta=900.0),
            sliding_attention=near,
        ),
    )
    keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.freq_base_swa": 100.0}
    check(model, write(model, tmp_path / "m.gguf", "gemma3", keys))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_quantised_tensors_are_what_gguf_makes_of_them(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    model = model_of("qwen2", hidden_size=64, num_attention_heads=4)
    path = write(model, tmp_path / "m.gguf", "qwen2", quantise=kind)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.tensor(
                gguf.dequantize(gguf.quantize(parameter.detach().numpy(), kind), kind)
            )
    check(model, path)


# Files that say what nobody would do

NORM = np.ones(8, dtype=np.float32)
REFUSED = {  # what is added to the file, and the name in the message
    "an unknown key": ("llama", {"attention.brand_new": 1.5}, {}, "sets llama.attention.brand_new"),
    "an unknown family of keys": ("llama", {"other.key": 1}, {}, "has the key other.key"),
    "an unknown tensor": (
        "llama",
        {},
        {"blk.0.attn_gate.weight": NORM},
        r"1 tensors without a place .*blk.0.attn_gate.weight",
    ),
    "norms of queries": (
        "llama",
        {},
        {"blk.0.attn_q_norm.weight": NORM},
        "blk.0.attn_q_norm.weight",
    ),
    "norms of queries, Qwen 2": (
        "qwen2",
        {},
        {"blk.1.attn_q_norm.weight": NORM},
        "blk.1.attn_q_norm.weight",
    ),
    "another layer": (
        "llama",
        {},
        {"blk.2.attn_norm.weight": np.ones(32, dtype=np.float32)},
        "blk.2.attn_norm.weight",
    ),
    "experts": (
        "llama",
        {"expert_count": 4, "expert_used_count": 2},
        {},
        "sets llama.expert_count to 4",
    ),
    "a scale of logits": ("llama", {"logit_scale": 0.5}, {}, "sets llama.logit_scale to 0.5"),
    "a scale of embeddings": (
        "llama",
        {"embedding_scale": 12.0},
        {},
        "sets llama.embedding_scale to 12.0",
    ),
    "a scale of residuals": ("llama", {"residual_scale": 0.25}, {}, "sets llama.residual_scale"),
    "a scale of attention": ("llama", {"attention.scale": 0.25}, {}, "sets llama.attention.scale"),
    "a soft cap": (
        "llama",
        {"final_logit_softcapping": 5.0},
        {},
        "sets llama.final_logit_softcapping",
    ),
    "a window": (
        "llama",
        {"attention.sliding_window": 4},
        {},
        "sets llama.attention.sliding_window to 4",
    ),
    "clamped queries": (
        "llama",
        {"attention.clamp_kqv": 8.0},
        {},
        "sets llama.attention.clamp_kqv",
    ),
    "ALiBi": (
        "qwen2",
        {"attention.max_alibi_bias": 8.0},
        {},
        "sets qwen2.attention.max_alibi_bias",
    ),
    "no causal mask": ("qwen2", {"attention.causal": False}, {}, "sets qwen2.attention.causal"),
    "narrow values": (
        "llama",
        {"attention.value_length": 4},
        {},
        "sets llama.attention.value_length",
    ),
    "half of the head turned": (
        "llama",
        {"rope.dimension_count": 4},
        {},
        "sets llama.rope.dimension_count to 4 of 8",
    ),
    "heads by layer": (
        "llama",
        {"attention.head_count_kv": [2, 1]},
        {},
        "sets llama.attention.head_count_kv layer by layer",
    ),
    "long and short factors": (
        "phi3",
        {"rope.scaling.type": "longrope"},
        {},
        "sets phi3.rope.scaling.type to longrope",
    ),
    "factors for long texts": (
        "phi3",
        {},
        {"rope_factors_long.weight": np.ones(2, dtype=np.float32)},
        "rope_factors_long.weight",
    ),
    "a factor of attention": (
        "phi3",
        {"rope.scaling.attn_factor": 1.19},
        {},
        "sets phi3.rope.scaling.attn_factor",
    ),
    "a knob of YaRN": (
        "llama",
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 2.0,
            "rope.scaling.yarn_log_multiplier": 0.1,
        },
        {},
        "sets llama.rope.scaling.yarn_log_multiplier",
    ),
    "factors of another width": (
        "llama",
        {},
        {"rope_freqs.weight": np.ones(8, dtype=np.float32)},
        "has 8 rope_freqs.weight for 4 pairs",
    ),
    "another architecture": ("mpt", {}, {}, "of the architecture mpt"),
    "a pattern of windows": (
        "gemma3",
        {"attention.sliding_window_pattern": 2},
        {},
        "sets gemma3.attention.sliding_window_pattern",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_left_out_is_refused_by_name(name, tmp_path):
    arch, keys, tensors, message = REFUSED[name]
    path, model = tmp_path / "m.gguf", model_of("llama" if arch == "mpt" else arch)
    if arch == "mpt":
        writer = gguf.GGUFWriter(path, arch)
        writer.add_tensor("token_embd.weight", np.ones((V, 32), dtype=np.float32))
        (
            writer.write_header_to_file(),
            writer.write_kv_data_to_file(),
            writer.write_tensors_to_file(),
            writer.close(),
        )
    else:
        write(model, path, arch, keys, tensors=tensors)
    with pytest.raises(InputError, match=message) as error:
        load_pair(str(path), str(path))
    assert "\n" not in str(error.value)


def test_a_value_that_changes_nothing_passes(tmp_path):
    model = model_of("llama")
    neutral = {
        "logit_scale": 1.0,
        "attention.clamp_kqv": 0.0,
        "expert_count": 0,
        "attention.causal": True,
        "attention.sliding_window": 64,
        "general.name": "a name",
        "general.quantized_by": "somebody",
        "tensor_data_layout": "Meta AI original pth",
    }
    check(model, write(model, tmp_path / "m.gguf", "llama", neutral))


@pytest.mark.parametrize(
    "name", ["blk.1.ffn_down.weight", "blk.0.attn_norm.weight", "token_embd.weight"]
)
def test_a_missing_tensor_is_refused(name, tmp_path):
    path = write(model_of("llama"), tmp_path / "m.gguf", "llama", drop=(name,))
    with pytest.raises(InputError, match="lacks 1 weights|loading it failed"):
        load_pair(str(path), str(path))


def test_a_broken_file_is_one_line(tmp_path):
    path = write(model_of("llama"), tmp_path / "m.gguf", "llama")
    for name, data in {"cut": path.read_bytes()[:1000], "empty": b"", "text": b"no GGUF"}.items():
        (tmp_path / f"{name}.gguf").write_bytes(data)
        with pytest.raises(InputError, match="loading it failed") as error:
            load_pair(str(tmp_path / f"{name}.gguf"), "pocket")
        assert "\n" not in str(error.value)
