"""Tiny random models of every type that transformers maps to a causal language model."""

import re

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 97
# Value by the name of a field, first match counts; None as the value of a field stays None
RULES = [
    (r"(^|_)vocab_size$|^n_vocab$|vocab_size_per_layer_input", VOCAB),
    (r"hidden_size_per_layer_input|index_head_dim|block_size$", 8),
    (
        r"^(hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|word_embed_proj_dim|"
        r"emb_dim|attention_hidden_size|lru_width|input_embedding_size)$",
        32,
    ),
    (
        r"intermediate_size|ffn_dim|^d_ff$|^n_inner$|^dff$|ffn_hidden_size|^dim_ff$|"
        r"feed_forward_size|mlp_dim",
        48,
    ),
    (
        r"^(num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers|"
        r"num_decoder_layers|num_encoder_layers)$",
        2,
    ),
    (r"key_value_heads|num_kv_heads|n_head_kv|kv_n_heads|multi_query_group_num", 2),
    (r"(num_|n_|decoder_|encoder_).*heads?$|^(n_heads?|num_heads)$", 4),
    (
        r"^(head_dim|attention_head_dim|global_head_dim|v_head_dim|qk_nope_head_dim|d_head|"
        r"d_kv|dim_head|kv_channels|attention_key_size)$",
        8,
    ),
    (r"rope_head_dim|rotary_dim", 8),
    (r"kv_lora_rank|q_lora_rank|o_lora_rank|lora_rank", 16),
    (r"(num|n)_.*experts_per_tok|moe_topk|^top_k$|^moe_k$|experts_top_k|num_selected_experts", 2),
    (
        r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts|"
        r"zero_expert_num)$",
        4,
    ),
    (r"n_shared_experts|num_shared_expert|n_group$|topk_group|first_k_dense|moe_num_shared", 1),
    (
        r"max_position_embeddings|n_positions|max_seq_len|seq_length|n_ctx|"
        r"max_target_positions|max_source_positions|context_length|max_sequence_length",
        128,
    ),
    (
        r"sliding_window$|attention_window_size|local_attention$|window_size$|attention_chunk_size",
        6,
    ),
    (r"(state_size|d_state|ssm_state_size)$", 8),
    (r"pad_token_id", 0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r"eos_token_id|sep_token_id", 2),
    (r"type_vocab_size", 2),
]
FIXED = {"head_dim", "layer_types", "mlp_layer_types", "sliding_window_pattern"}


def shrunk(config) -> dict:
    "The fields of a configuration with small values."
    fields = {}
    for name, value in config.to_dict().items():
        if name in ("model_type", "transformers_version", "architectures", "dtype", "torch_dtype"):
            continue
        if name in ("layer_types", "mlp_layer_types", "layers_block_type", "block_types"):
            continue  # made from the number of layers
        sub = vars(config).get(name)  # some fields may not be asked for, they differ by layer
        if hasattr(sub, "to_dict"):
            fields[name] = shrunk(sub)
        elif isinstance(value, bool):
            fields[name] = value
        elif isinstance(value, int):
            fields[name] = next((new for pattern, new in RULES if re.search(pattern, name)), value)
    return fields


def tiny_config(kind: str, **fields):
    "A tiny configuration of a model type."
    config = CONFIG_MAPPING[kind]
    return config(**{**shrunk(config()), **OVERRIDES.get(kind, {}), **fields})


LATENT = dict(
    num_key_value_heads=4
)  # attention with a latent: as many heads for keys as for queries
MAMBA = dict(
    mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_chunk_size=4, num_hidden_layers=4
)
LINEAR = dict(num_hidden_layers=4)  # the fourth layer is one of attention
DECODER = dict(is_decoder=True)
OVERRIDES = {  # what the rules do not get right
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "minicpm3",
            "youtu",
        ),
        LATENT,
    ),
    **dict.fromkeys(
        ("kimi_linear", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text", "lfm3"),
        LINEAR,
    ),
    **dict.fromkeys(
        (
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
        ),
        DECODER,
    ),
    "bailing_hybrid": LATENT
    | dict(num_hidden_layers=4, layer_group_size=2, n_group=2, topk_group=1),
    "kimi_linear": LATENT
    | dict(num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2),
    "bamba": MAMBA | dict(attn_layer_indices=[1]),
    "bloom": dict(n_layer=2),
    "deepseek_v2": LATENT | dict(num_experts_per_tok=2),
    "doge": dict(keep_window_size=64),
    "falcon_h1": MAMBA | dict(mamba_d_ssm=64),
    "gemma3n_text": dict(
        num_kv_shared_layers=0,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        laurel_rank=4,
        activation_sparsity_pattern=None,
        altup_num_inputs=2,
    ),
    **dict.fromkeys(
        ("gemma4_text", "gemma4_unified_text"),
        dict(num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"]),
    ),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": MAMBA
    | dict(
        layer_types=["mamba", "attention", "mamba", "attention"],
        num_key_value_heads=2,
        shared_intermediate_size=48,
    ),
    "hunyuan_v1_dense": dict(head_dim=8),
    "hunyuan_v1_moe": dict(head_dim=8),
    "jamba": dict(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "longcat_flash": LATENT | dict(qk_head_dim=16, head_dim=8),
    "mamba2": dict(num_heads=4, head_dim=16, n_groups=1, chunk_size=4),
    "ministral": dict(head_dim=8),
    "nemotron": dict(num_key_value_heads=2),
    "nemotron_h": dict(
        layers_block_type=["mamba", "attention", "moe", "attention"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        chunk_size=4,
        moe_latent_size=None,
    ),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "reformer": dict(
        is_decoder=True,
        attn_layers=["local", "lsh"],
        axial_pos_shape=[8, 16],
        axial_pos_embds_dim=[16, 16],
        local_attn_chunk_length=8,
        lsh_attn_chunk_length=8,
        feed_forward_size=48,
    ),
    "xmod": DECODER | dict(default_language="en_XX"),
    "zamba": dict(
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        layer_types=["mamba", "hybrid", "mamba", "hybrid"],
        n_mamba_heads=2,
        mamba_dt_rank=4,
        attention_hidden_size=64,
        attention_head_dim=16,
        intermediate_size=48,
    ),
    "zamba2": dict(
        num_hidden_layers=4,
        layer_types=["mamba", "hybrid", "mamba", "hybrid"],
        n_mamba_heads=4,
        mamba_headdim=16,
        attention_hidden_size=64,
        attention_head_dim=16,
        mamba_ngroups=1,
        chunk_size=4,
        num_mem_blocks=1,
    ),
    "zaya": dict(num_experts_per_tok=1),
}


def tiny(kind: str, seed: int = 0, **fields):
    "A tiny random model of a type, with next tokens far from uniform."
    torch.manual_seed(seed)
    config = tiny_config(kind, **fields)
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    import transformers

    model = getattr(transformers, name)(config).eval()
    spread(model, seed)
    return model


def spread(model, seed):
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) and weight is not None:
                weight.normal_(
                    0.0,
                    1.5 * weight.shape[-1] ** -0.5 if isinstance(module, torch.nn.Linear) else 0.5,
                    generator=gen,
                )


KINDS = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
