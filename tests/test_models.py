"""Hidden states and heads of model families give the models' own logits."""

import pytest
import torch
from torch.nn.functional import linear
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
)

from klrb.fused import linear_step_kl
from klrb.models import check_lm_head, completion_hidden, completion_logits, lm_head

SIZES = dict(
    vocab_size=97,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
)
FAMILIES = {  # name: configuration, and the factor, cap and bias that its head should have
    "gpt2": (
        GPT2Config(
            vocab_size=97, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5
        ),
        1.0,
        None,
        False,
    ),
    "llama": (LlamaConfig(**SIZES), 1.0, None, False),
    "llama, tied": (LlamaConfig(**SIZES, tie_word_embeddings=True), 1.0, None, False),
    "gemma 2": (Gemma2Config(**SIZES, final_logit_softcapping=0.7), 1.0, 0.7, False),
    "cohere": (CohereConfig(**SIZES, logit_scale=0.25), 0.25, None, False),
    "granite": (GraniteConfig(**SIZES, logits_scaling=8.0), 1 / 8, None, False),
    "phi": (PhiConfig(**SIZES), 1.0, None, True),
}


def model(name):
    torch.manual_seed(0)
    m = AutoModelForCausalLM.from_config(FAMILIES[name][0]).double().eval()
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(3.0)  # far from a uniform next token
        if (bias := lm_head(m).bias) is not None:
            bias.normal_()
    return m


def rollouts(name, size=4, prompt=5, steps=7):
    gen = torch.Generator().manual_seed(1)
    prompt_mask, completion_mask = (
        torch.ones(size, prompt, dtype=torch.long),
        torch.ones(size, steps, dtype=torch.long),
    )
    completion_mask[1, 4:] = 0  # padded on the right
    if name != "gemma 2":
        prompt_mask[0, :3] = 0  # and on the left; Gemma's float32 overflows at float64's padding

    def ids(length):
        return torch.randint(97, (size, length), generator=gen)

    return ids(prompt), prompt_mask, ids(steps), completion_mask


@pytest.mark.parametrize("name", FAMILIES)
def test_head_of_the_hidden_state_is_the_models_logits(name):
    """Oracle: the model's own forward pass, without `logits_to_keep`."""
    m, (prompt_ids, prompt_mask, completion_ids, completion_mask) = model(name), rollouts(name)
    check_lm_head(m)
    head = lm_head(m)
    _, scale, softcap, bias = FAMILIES[name]
    assert (head.logit_scale, head.softcap, head.bias is not None) == (scale, softcap, bias)
    assert (
        head.weight.data_ptr() == m.get_output_embeddings().weight.data_ptr()
    )  # shared: gradients reach the model
    with torch.no_grad():
        mask = torch.cat([prompt_mask, completion_mask], 1)
        expected = m(
            torch.cat([prompt_ids, completion_ids], 1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        ).logits[:, 4:-1]  # (B, T, V)
        hidden = completion_hidden(
            m, prompt_ids, prompt_mask, completion_ids, completion_mask
        )  # (B, T, H)
        logits = linear(hidden, head.weight, head.bias) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        valid = completion_mask.bool()
        assert_close(logits[valid], expected[valid], rtol=1e-9, atol=1e-9)
        assert_close(
            completion_logits(m, prompt_ids, prompt_mask, completion_ids, completion_mask, 0.5)[
                valid
            ],
            2 * expected[valid],
            rtol=1e-9,
            atol=1e-9,
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_kl_from_hidden_states_is_the_textbook_sum_over_logits(name):
    "Oracle: softmax of float64 logits at a temperature, between a model and its copy with noise."
    policy, reference, fields = model(name), model(name), rollouts(name)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
        scores = linear_step_kl(
            completion_hidden(policy, *fields),
            lm_head(policy),
            completion_hidden(reference, *fields),
            lm_head(reference),
            fields[2],
            0.7,
            fields[3],
        )
        logp, logq = (
            completion_logits(m, *fields, 0.7).log_softmax(-1) for m in (policy, reference)
        )
    valid = fields[3].bool()
    assert_close(
        scores.step_kl[valid], (logp.exp() * (logp - logq)).sum(-1)[valid], rtol=1e-7, atol=1e-9
    )
    assert scores.step_kl[valid].max() > 1e-3
    for ours, exact in ((scores.policy_logprobs, logp), (scores.ref_logprobs, logq)):
        assert_close(
            ours[valid],
            exact.gather(-1, fields[2][..., None]).squeeze(-1)[valid],
            rtol=1e-9,
            atol=1e-9,
        )
    assert_close(scores.entropy[valid], -(logp.exp() * logp).sum(-1)[valid], rtol=1e-9, atol=1e-9)


def test_a_head_that_does_more_is_refused():
    torch.manual_seed(0)
    unknown = AutoModelForCausalLM.from_config(
        FalconH1Config(
            **SIZES,
            lm_head_multiplier=0.1,
            mamba_d_ssm=32,
            mamba_n_heads=4,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_n_groups=1,
        )
    ).eval()
    with pytest.raises(ValueError, match="does more to the logits than `lm_head` knows"):
        check_lm_head(unknown)


def test_an_adapter_on_the_head_is_refused_and_a_head_trained_in_full_is_read():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        model("llama"), peft.LoraConfig(target_modules=["q_proj", "lm_head"])
    )
    with pytest.raises(ValueError, match="adapter on its head"):
        lm_head(adapted)
    full = peft.get_peft_model(
        model("llama"), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    check_lm_head(full)
    assert lm_head(full).weight.requires_grad
    with full.disable_adapter():
        assert not lm_head(full).weight.requires_grad  # the reference's, frozen
