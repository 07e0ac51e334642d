"""The KL that the trainer logs, for many types of models: right, or the model is refused before it
writes a token."""

import copy

import pytest
import torch
import transformers
from datasets import Dataset
from trl import RLOOConfig, RLOOTrainer

from klrb.errors import InputError
from klrb.models import load_tokenizer
from trainers import make_trainer, rollout_rows

VOCAB = 4096  # of the pocket model's tokenizer
PROMPTS = [
    "Never",
    "The film",
    "I saw this film with my sister and",
    "It was a bit of a mess, but the cast was good",
]
ROWS = rollout_rows(PROMPTS, 2)
SMALL = dict(vocab_size=VOCAB, pad_token_id=1, bos_token_id=0, eos_token_id=0)
LLAMA = SMALL | dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
HEADS = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
EXPERTS = LLAMA | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
LOCAL = LLAMA | dict(num_local_experts=4, num_experts_per_tok=2)
GPT = SMALL | dict(n_embd=32, n_layer=2, n_head=4, n_positions=128)
LATENT = LLAMA | dict(
    num_key_value_heads=4,
    q_lora_rank=None,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    v_head_dim=8,
    qk_nope_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    n_shared_experts=1,
)

DENSE = {  # type -> class, fields of its configuration
    "gpt2": ("GPT2", GPT),  # with the dropout of 0.1 that its configuration brings
    "gpt_neo": (
        "GPTNeo",
        SMALL
        | dict(
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            max_position_embeddings=128,
            attention_types=[[["global", "local"], 1]],
            window_size=6,
        ),
    ),
    "gptj": ("GPTJ", GPT | dict(rotary_dim=4)),
    "gpt_bigcode": ("GPTBigCode", GPT),
    "gpt_neox": ("GPTNeoX", HEADS),
    "codegen": ("CodeGen", GPT | dict(rotary_dim=4, n_ctx=128)),
    "opt": (
        "OPT",
        SMALL
        | dict(
            hidden_size=32,
            num_hidden_layers=2,
            ffn_dim=48,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
        ),
    ),
    "bloom": ("Bloom", SMALL | dict(hidden_size=32, n_layer=2, n_head=4)),
    "mpt": ("Mpt", SMALL | dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=128)),
    "falcon": ("Falcon", SMALL | dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)),
    "llama": ("Llama", LLAMA),
    "mistral": ("Mistral", LLAMA | dict(sliding_window=6)),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", LLAMA | dict(head_dim=8)),
    "phi": ("Phi", LLAMA | dict(partial_rotary_factor=0.5)),
    "phi3": ("Phi3", LLAMA),
    "gemma": ("Gemma", LLAMA | dict(head_dim=8)),
    "gemma2": ("Gemma2", LLAMA | dict(head_dim=8, sliding_window=6, query_pre_attn_scalar=8)),
    "gemma3_text": ("Gemma3", LLAMA | dict(head_dim=8, sliding_window=6, query_pre_attn_scalar=8)),
    "stablelm": ("StableLm", LLAMA),
    "starcoder2": ("Starcoder2", LLAMA | dict(sliding_window=6)),
    "cohere": ("Cohere", LLAMA),
    "granite": ("Granite", LLAMA | dict(logits_scaling=2.0, residual_multiplier=0.5)),
    "olmo2": ("Olmo2", LLAMA),
    "smollm3": ("SmolLM3", LLAMA),
    "glm": ("Glm", LLAMA | dict(head_dim=8)),
    "biogpt": ("BioGpt", HEADS),
    "mamba": ("Mamba", SMALL | dict(hidden_size=32, num_hidden_layers=2, state_size=8)),
    "recurrent_gemma": (
        "RecurrentGemma",
        SMALL
        | dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            lru_width=32,
            attention_window_size=6,
            head_dim=8,
        ),
    ),
}
MIXED = {
    "mixtral": ("Mixtral", LOCAL),
    "qwen2_moe": ("Qwen2Moe", EXPERTS | dict(shared_expert_intermediate_size=24)),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | dict(head_dim=8)),
    "olmoe": ("Olmoe", EXPERTS),
    "phimoe": ("Phimoe", LOCAL),  # samples its routes and jitters them in training mode
    "granitemoe": ("GraniteMoe", LOCAL),
    "jetmoe": (
        "JetMoe",
        SMALL
        | dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            kv_channels=8,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=128,
        ),
    ),
    "gpt_oss": ("GptOss", LOCAL | dict(head_dim=8, sliding_window=6)),
    "deepseek_v2": ("DeepseekV2", LATENT),
    "deepseek_v3": ("DeepseekV3", LATENT),
}
TYPES = DENSE | MIXED
QUICK = ["gpt2", "opt", "gemma3_text", "mixtral", "phimoe"]  # the rest is slow


def build(kind, seed, **fields):
    "A random model whose next tokens are far from uniform."
    name, settings = TYPES[kind]
    config = getattr(
        transformers, f"{name}TextConfig" if kind == "gemma3_text" else f"{name}Config"
    )
    torch.manual_seed(seed)
    made = "GPT2LMHeadModel" if kind == "gpt2" else f"{name}ForCausalLM"
    model = getattr(transformers, made)(config(**settings | fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(
                module, torch.nn.Linear | torch.nn.Embedding | transformers.pytorch_utils.Conv1D
            ):
                weight = module.weight
                scale = (
                    0.5
                    if isinstance(module, torch.nn.Embedding)
                    else 1.5 * min(weight.shape) ** -0.5
                )
                weight.normal_(0.0, scale, generator=generator)
    return model


def trainer(folder, policy, reference, **settings):
    defaults = dict(max_completion_length=5, temperature=1.0, seed=42)
    return make_trainer(
        folder,
        policy,
        reference,
        reward=lambda completions, **kwargs: [float(len(c)) for c in completions],
        prompts=Dataset.from_list(ROWS),
        **defaults | settings,
    )


def sequences(batch):
    "Prompt and completion of every rollout, without padding."
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    for prompt, prompt_mask, completion, mask in zip(*(batch[name] for name in names)):
        yield prompt[prompt_mask.bool()], completion[mask.bool()]


@torch.no_grad()
def logprobs(model, prompt, completion, temperature=1.0):
    "Log-probabilities of all tokens at the completion's steps, (T, V): one bare pass in float64."
    logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0]
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def exact_kl(policy, reference, batch):
    "Means over rollouts of the summed step KL and of the summed log-ratio."
    policy, reference = (copy.deepcopy(o).double().eval() for o in (policy, reference))
    for model in (policy, reference):
        model.config._experts_implementation = "eager"  # the grouped product has no float64
    exact, log_ratio = [], []
    for prompt, completion in sequences(batch):
        logp, logq = (logprobs(o, prompt, completion) for o in (policy, reference))
        exact.append((logp.exp() * (logp - logq)).sum())
        chosen = completion[:, None]
        log_ratio.append((logp.gather(1, chosen) - logq.gather(1, chosen)).sum())
    return torch.stack(exact).mean().item(), torch.stack(log_ratio).mean().item()


def one_step(folder, kind, **settings):
    """Exact and logged KLs of one generation batch, and the loss, after which every parameter has
    its gradient."""
    policy, reference = build(kind, 1), build(kind, 0)
    kept = [copy.deepcopy(o) for o in (policy, reference)]
    made = trainer(folder, policy, reference, **settings)
    torch.manual_seed(2)
    batch = made._generate_and_score_completions(ROWS)
    loss = made._compute_loss(made.model, batch)
    loss.backward()
    logged = [made._metrics["train"][name][0] for name in ("kl_sequence_rb", "kl_sequence_mc")]
    return exact_kl(*kept, batch), logged, loss


@pytest.mark.parametrize(
    "kind",
    [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in TYPES],
)
def test_the_logged_kl_is_right_or_the_model_is_refused(tmp_path, kind):
    try:
        exact, logged, loss = one_step(tmp_path, kind)
    except InputError as refused:
        assert kind not in QUICK and "\n" not in str(refused)
        return
    assert exact[0] > 0.03 and loss.isfinite()
    assert logged == pytest.approx(exact, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    "kind",
    [
        "mixtral",
        "phimoe",
        pytest.param("olmoe", marks=pytest.mark.slow),
        pytest.param("granitemoe", marks=pytest.mark.slow),
    ],
)
def test_the_auxiliary_loss_of_experts_is_the_models_own(tmp_path, kind):
    """Oracle: the model's forward with logits, routers and the attention mask of the whole batch,
    padding included."""
    policy = build(kind, 1)
    policy.config._experts_implementation = "eager"
    made = trainer(tmp_path, copy.deepcopy(policy), build(kind, 0), router_aux_loss_coef=0.5)
    batch = made._generate_and_score_completions(ROWS)
    loss = made._compute_loss(made.model, batch)
    loss.backward()
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    with torch.no_grad():
        own = policy.eval()(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            output_router_logits=True,
        ).aux_loss
    assert made._metrics["train"]["aux_loss"] == [pytest.approx(own.item(), rel=1e-5)]
    made.router_aux_loss_coef = 0.0
    assert loss.item() - made._compute_loss(made.model, batch).item() == pytest.approx(
        0.5 * own.item(), rel=1e-3
    )
    assert all(
        p.grad is not None for name, p in made.model.named_parameters() if "gate.weight" in name
    )


def test_the_auxiliary_loss_is_that_of_stock_rloo(tmp_path):
    """On prompts of one length, where TRL's missing position ids do no harm."""
    rows = [
        dict(prompt=p) for p in ["The film", "The cast", "The plot", "The end"] for _ in range(2)
    ]
    policy = build("mixtral", 1)
    made = trainer(tmp_path, copy.deepcopy(policy), build("mixtral", 0))
    stock = RLOOTrainer(
        policy,
        lambda completions, **kwargs: [0.0] * len(completions),
        args=RLOOConfig(
            str(tmp_path),
            beta=0.0,
            per_device_train_batch_size=8,
            num_generations=2,
            bf16=False,
            report_to=[],
            gradient_checkpointing=False,
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer("tiny-random"),
    )
    batch = made._generate_and_score_completions(rows)
    made._compute_loss(made.model, batch)
    stock._compute_loss(stock.model.train(), batch | dict(old_logps=torch.zeros(8)))
    assert made._metrics["train"]["aux_loss"] == [
        pytest.approx(stock._metrics["train"]["aux_loss"][0], rel=1e-5)
    ]


def test_a_nested_configuration_is_read(tmp_path):
    """Gemma 3 keeps the sizes of its language model one level down, beside those of its vision
    tower."""
    text = transformers.Gemma3TextConfig(**TYPES["gemma3_text"][1])
    vision = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = transformers.Gemma3Config(
        text_config=text.to_dict(),
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=7,
        boi_token_index=8,
        eoi_token_index=9,
    )
    models = []
    for seed in (1, 0):
        torch.manual_seed(seed)
        models.append(transformers.Gemma3ForConditionalGeneration(config))
        for module in models[-1].modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=0.2)
    kept = copy.deepcopy(models)
    made = trainer(tmp_path, *models)
    batch = made._generate_and_score_completions(ROWS)
    made._compute_loss(made.model, batch).backward()
    logged = [made._metrics["train"][name][0] for name in ("kl_sequence_rb", "kl_sequence_mc")]
    assert logged == pytest.approx(exact_kl(*kept, batch), rel=1e-4, abs=1e-4)


def test_a_switch_of_the_rotary_factors_inside_the_lengths_is_refused(tmp_path):
    factors = dict(
        rope_type="longrope",
        short_factor=[1.0] * 4,
        long_factor=[8.0] * 4,
        rope_theta=1e4,
        original_max_position_embeddings=12,
    )
    models = [
        build("phi3", seed, rope_parameters=factors, original_max_position_embeddings=12)
        for seed in (1, 0)
    ]
    with pytest.raises(
        InputError, match="change at 12 tokens, and prompts have .* Stay on one side"
    ):
        trainer(tmp_path, *models)
