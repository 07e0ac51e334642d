"""GGUF files: written from small models as llama.cpp writes them, read back, and compared with the model itself in float64."""
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig,
                          LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig,
                          Qwen2MoeForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, StableLmConfig,
                          StableLmForCausalLM, Starcoder2Config, Starcoder2ForCausalLM)

from klrb.errors import InputError
from klrb.gguf_files import load_gguf
from klrb.measure import measure_kl
from klrb.sources import load_pair

gguf = pytest.importorskip("gguf")
V = 40
IDS = torch.tensor([[1, 5, 3, 23, 7, 2, 39, 11, 4, 30, 8, 9]])
COMMON = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2,
              max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0)
GQA = COMMON | dict(num_key_value_heads=2)
THETA = dict(rope_theta=500.)
MAKE = {
    "llama": (LlamaForCausalLM, lambda **o: LlamaConfig(**GQA | dict(rope_parameters=dict(rope_type="default") | THETA, rms_norm_eps=1e-3) | o)),
    "qwen2": (Qwen2ForCausalLM, lambda **o: Qwen2Config(**GQA | dict(rope_parameters=dict(rope_type="default") | THETA) | o)),
    "qwen3": (Qwen3ForCausalLM, lambda **o: Qwen3Config(**GQA | dict(head_dim=16, rope_parameters=dict(rope_type="default") | THETA) | o)),
    "gemma2": (Gemma2ForCausalLM, lambda **o: Gemma2Config(**GQA | dict(
        head_dim=16, query_pre_attn_scalar=16, sliding_window=4, attn_logit_softcapping=5., final_logit_softcapping=3.) | o)),
    "gemma3": (Gemma3ForCausalLM, lambda **o: Gemma3TextConfig(**GQA | dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=4,
                                                                       num_hidden_layers=6) | o)),
    "phi3": (Phi3ForCausalLM, lambda **o: Phi3Config(**GQA | dict(sliding_window=None, rope_parameters=dict(
        rope_type="default", partial_rotary_factor=0.5) | THETA) | o)),
    "stablelm": (StableLmForCausalLM, lambda **o: StableLmConfig(**GQA | dict(use_qkv_bias=True, rope_parameters=dict(
        rope_type="default", partial_rotary_factor=0.5) | THETA) | o)),
    "starcoder2": (Starcoder2ForCausalLM, lambda **o: Starcoder2Config(**GQA | dict(use_bias=True, rope_parameters=dict(rope_type="default") | THETA) | o)),
    "gpt2": (GPT2LMHeadModel, lambda **o: GPT2Config(**dict(vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2,
                                                           bos_token_id=0, eos_token_id=0) | o)),
    "qwen2moe": (Qwen2MoeForCausalLM, lambda **o: Qwen2MoeConfig(**GQA | dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40, norm_topk_prob=False,
        rope_parameters=dict(rope_type="default") | THETA) | o)),
    "qwen3moe": (Qwen3MoeForCausalLM, lambda **o: Qwen3MoeConfig(**GQA | dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True, head_dim=16,
        rope_parameters=dict(rope_type="default") | THETA) | o)),
}


def model_of(arch, **settings):
    torch.manual_seed(0)
    kind, config = MAKE[arch]
    model = kind(config(**settings)).eval()
    for name, parameter in model.named_parameters():  # norms and biases too
        if parameter.dim() == 1: parameter.data += 0.3*torch.randn(parameter.shape)
    return model


def keys_of(model, arch):
    "What llama.cpp's converter writes for these architectures."
    c = model.config
    heads, kv = c.num_attention_heads, getattr(c, "num_key_value_heads", c.num_attention_heads)
    width = getattr(c, "head_dim", None) or c.hidden_size//heads
    keys = {"context_length": c.max_position_embeddings, "embedding_length": c.hidden_size, "block_count": c.num_hidden_layers,
            "feed_forward_length": getattr(c, "intermediate_size", None) or 4*c.hidden_size, "attention.head_count": heads}
    if arch == "gpt2": return keys | {"attention.layer_norm_epsilon": c.layer_norm_epsilon}
    keys |= {"attention.head_count_kv": kv, "vocab_size": c.vocab_size}
    eps = next(getattr(c, o) for o in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon") if hasattr(c, o))
    keys[f"attention.layer_norm_{'rms_' if hasattr(c, 'rms_norm_eps') else ''}epsilon"] = eps
    rope = c.rope_parameters.get("full_attention", c.rope_parameters)
    keys |= {"rope.freq_base": rope["rope_theta"], "rope.dimension_count": int(width*rope.get("partial_rotary_factor", 1))}
    if width != c.hidden_size//heads or arch in ("llama", "qwen3"): keys |= {"attention.key_length": width, "attention.value_length": width}
    if arch.startswith("gemma"): keys["attention.sliding_window"] = c.sliding_window
    if arch == "gemma2": keys |= {"attn_logit_softcapping": c.attn_logit_softcapping, "final_logit_softcapping": c.final_logit_softcapping}
    if arch == "stablelm": keys["use_parallel_residual"] = c.use_parallel_residual
    if arch.endswith("moe"):
        keys |= {"expert_count": c.num_experts, "expert_used_count": c.num_experts_per_tok, "expert_feed_forward_length": c.moe_intermediate_size}
    if arch == "qwen2moe": keys["expert_shared_feed_forward_length"] = c.shared_expert_intermediate_size
    return keys


def tensors_of(model, arch):
    "Names by gguf's own table, values as llama.cpp's converter changes them."
    c, table = model.config, gguf.get_tensor_name_map(next(k for k, o in gguf.MODEL_ARCH_NAMES.items() if o == arch), model.config.num_hidden_layers)
    tensors = {}
    for name, value in model.state_dict().items():
        value = value.float().numpy()
        if name == "lm_head.weight" and c.tie_word_embeddings or name.endswith(("masked_bias", "attn.bias")) and value.ndim > 1: continue
        if "experts.gate_up_proj" in name:
            layer = name.split(".")[2]
            tensors[f"blk.{layer}.ffn_gate_exps.weight"], tensors[f"blk.{layer}.ffn_up_exps.weight"] = np.split(value, 2, axis=1)
            continue
        if "experts.down_proj" in name:
            tensors[f"blk.{name.split('.')[2]}.ffn_down_exps.weight"] = value
            continue
        stem, _, suffix = name.rpartition(".")
        new = f"{table.get_name(stem)}.{suffix}"
        assert not new.startswith("None"), name
        if arch == "llama" and (".attn_q." in new or ".attn_k." in new):
            heads = c.num_attention_heads if ".attn_q." in new else c.num_key_value_heads
            value = value.reshape(heads, 2, len(value)//heads//2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if arch.startswith("gemma") and "norm" in new: value = value + 1
        if arch == "gpt2" and suffix == "weight" and any(o in new for o in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")): value = value.T
        if "ffn_gate_inp_shexp" in new: value = value.reshape(-1)
        tensors[new] = np.ascontiguousarray(value)
    return tensors


def write(model, path, arch, keys=(), drop=(), tensors=(), quantised=()):
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (keys_of(model, arch) | dict(keys)).items():
        if key in drop or value is None: continue
        key = key if key.startswith(("tokenizer.", "general.", "other.")) else f"{arch}.{key}"
        kind = {bool: "bool", int: "uint32", float: "float32", str: "string"}.get(type(value), "array")
        getattr(writer, f"add_{kind}")(key, value)
    writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre("default")
    writer.add_token_list(["<end>", *(chr(ord("A") + i) for i in range(V - 1))]), writer.add_token_types([3] + [1]*(V - 1)), writer.add_token_merges(["A B"])
    for name in ("bos", "eos", "pad"): getattr(writer, f"add_{name}_token_id")(0)
    for name, value in (tensors_of(model, arch) | dict(tensors)).items():
        if name in drop: continue
        writer.add_tensor(name, value)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return path


@torch.no_grad()
def kl(model, other):
    "KL of all next tokens of a sequence, in float64."
    kind = torch.float32 if hasattr(model.config, "num_experts") else torch.float64  # experts are not computed in float64
    logp, logq = (o.to(kind)(input_ids=IDS).logits.double().log_softmax(-1) for o in (model, other))
    return float((logp.exp()*(logp - logq)).sum())


def check(model, path):
    "The weights are the same numbers, so that only their order of computation is left; KL is quadratic in it."
    found, info = load_gguf(path)
    assert not info["missing_keys"]
    assert abs(kl(model, found)) < 1e-9


# Files that say what transformers reads, and what it does not

@pytest.mark.parametrize("arch, tied", [(arch, tied) for arch in MAKE for tied in (False, True) if tied or not arch.startswith("gemma")])
def test_a_file_is_the_model_it_was_made_from(arch, tied, tmp_path):
    model = model_of(arch, tie_word_embeddings=tied)
    check(model, write(model, tmp_path/"m.gguf", arch))
