"""What the trainer samples is what it scores, whatever model, settings and modes say."""

import copy
import dataclasses

import pytest
import torch
from datasets import Dataset
from test_trainer_models import PROMPTS, ROWS, build, exact_kl, trainer
from transformers import GenerationConfig, GPT2LMHeadModel
from trl import RLOOConfig

from klrb.errors import InputError, InputTypeError
from klrb.models import load_model, load_tokenizer
from klrb.rlhf.dpo import sample_pairs
from klrb.rlhf.judging import evaluate_policy
from klrb.rlhf.profiles import get_profile
from klrb.rlhf.training import train_rloo
from klrb.rlhf.sampling import FIXED, FREE, FREE_GENERATION
from klrb.rloo import RBRLOOConfig, RBRLOOTrainer

# What `GenerationConfig` has besides what cannot change a distribution, each at a value that would
# change something
BIASED = dict(
    min_length=30,
    min_new_tokens=5,
    early_stopping=True,
    max_time=1e-9,
    stop_strings=["e"],
    num_beams=2,
    use_mtp=True,
    cache_config=dict(nbits=2),
    top_k=2,
    top_p=0.5,
    min_p=0.3,
    top_h=0.3,
    typical_p=0.3,
    epsilon_cutoff=0.3,
    eta_cutoff=0.3,
    repetition_penalty=9.0,
    encoder_repetition_penalty=2.0,
    length_penalty=2.0,
    no_repeat_ngram_size=1,
    bad_words_ids=[[i] for i in range(9, 3000)],
    renormalize_logits=True,
    forced_bos_token_id=9,
    forced_eos_token_id=9,
    remove_invalid_values=True,
    exponential_decay_length_penalty=(1, 9.0),
    suppress_tokens=list(range(9, 3000)),
    begin_suppress_tokens=list(range(9, 3000)),
    sequence_bias=[[[9], 30.0]],
    token_healing=True,
    guidance_scale=3.0,
    watermarking_config=dict(greenlist_ratio=0.1, bias=9.0),
    num_return_sequences=2,
    return_dict_in_generate=True,
    encoder_no_repeat_ngram_size=1,
    decoder_start_token_id=9,
    is_assistant=True,
    num_assistant_tokens=3,
    num_assistant_tokens_schedule="heuristic",
    assistant_confidence_threshold=0.9,
    prompt_lookup_num_tokens=3,
    max_matching_ngram_size=2,
    assistant_early_exit=1,
    assistant_lookbehind=3,
    target_lookbehind=3,
    assistant_ensemble_weight=0.5,
    speculation_type="x",
    continuous_batching_config=dict(a=1),
    penalty_alpha=0.6,
    dola_layers="high",
    diversity_penalty=0.5,
    num_beam_groups=2,
    constraints=[1],
    force_words_ids=[[9]],
    temperature=3.0,
    do_sample=False,
    cache_implementation="quantized",
    eos_token_id=9,
)
LEAKS = [
    "min_new_tokens",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "temperature",
    "do_sample",
    "watermarking_config",
]


def tiny(folder, policy=None, reference=None, **settings):
    return trainer(
        folder,
        policy or load_model("tiny-random", seed=1),
        reference or load_model("tiny-random", seed=0),
        **settings,
    )


def sampled(made):
    torch.manual_seed(5)
    return made._generate_and_score_completions(ROWS)


def logged(made):
    return [made._metrics["train"][name][-1] for name in ("kl_sequence_rb", "kl_sequence_mc")]


# Settings


def test_every_setting_of_generate_and_of_trl_is_in_a_list():
    """A field that a new version brings fails here, and is refused at run time until somebody has
    looked at it."""
    assert (
        FREE_GENERATION.isdisjoint(BIASED)
        and FREE_GENERATION | BIASED.keys() == vars(GenerationConfig()).keys()
    )
    assert FREE.isdisjoint(FIXED)
    assert FREE | FIXED.keys() | {"generation_kwargs"} == {
        o.name for o in dataclasses.fields(RLOOConfig)
    }


def test_no_setting_of_the_policy_reaches_what_is_sampled(tmp_path):
    """One after the other on one policy: the completions are those of a policy without settings."""
    made = tiny(tmp_path)
    expected = sampled(made)["completion_ids"]
    for name in LEAKS:
        made.model.generation_config = own = GenerationConfig()
        setattr(own, name, BIASED[name])
        assert torch.equal(sampled(made)["completion_ids"], expected), name
        assert made.model.generation_config is own  # it is put aside, not lost


def test_the_logged_kl_is_exact_under_the_settings_of_a_checkpoint(tmp_path):
    policy, reference = load_model("tiny-random", seed=1), load_model("tiny-random", seed=0)
    policy.generation_config.update(
        sequence_bias=[[[9], 30.0]], min_new_tokens=4, bad_words_ids=[[11]]
    )
    made = tiny(tmp_path, policy, reference)
    assert logged_after(made) == pytest.approx(
        exact_kl(policy, reference, sampled(made)), rel=1e-4, abs=1e-4
    )


def logged_after(made):
    sampled(made)
    return logged(made)


@pytest.mark.parametrize("name", BIASED)
def test_settings_of_generate_that_bias_are_refused_by_name(tmp_path, name):
    with pytest.raises(InputError, match=f"`generation_kwargs` sets `{name}`.*biased"):
        RBRLOOConfig(
            str(tmp_path), generation_kwargs={name: BIASED[name]}, bf16=False, use_cpu=True
        )


def test_harmless_settings_of_generate_are_used(tmp_path):
    plain = sampled(tiny(tmp_path))["completion_ids"]
    settings = dict(use_cache=False, num_beams=1, top_p=1.0, output_scores=False)
    made = tiny(tmp_path, generation_kwargs=settings, cache_implementation="dynamic")
    assert made.generation_config.use_cache is False and torch.equal(
        sampled(made)["completion_ids"], plain
    )


@pytest.mark.parametrize(
    "name, value",
    [
        ("top_k", 2),
        ("top_k", None),
        ("top_p", 0.9),
        ("min_p", 0.1),
        ("repetition_penalty", 1.1),
        ("use_vllm", True),
        ("use_transformers_continuous_batching", True),
        ("cache_implementation", "quantized"),
        ("normalize_advantages", True),
        ("neftune_noise_alpha", 5.0),
        ("use_liger_kernel", True),
    ],
)
def test_settings_of_trl_that_bias_are_refused_by_name(tmp_path, name, value):
    with pytest.raises(InputError, match=f"`{name}` is .*the gradient would be biased"):
        RBRLOOConfig(str(tmp_path), **{name: value}, bf16=False, use_cpu=True)


def test_settings_changed_later_are_refused_too(tmp_path):
    made = tiny(tmp_path)
    made.generation_config.top_k = 2
    with pytest.raises(InputError, match="`generation_config` of the trainer sets `top_k` to 2"):
        sampled(made)
    args = RBRLOOConfig(str(tmp_path), bf16=False, use_cpu=True)
    args.top_p = 0.5
    with pytest.raises(InputError, match="`top_p` is 0.5"):
        RBRLOOTrainer(
            load_model("tiny-random"),
            load_model("tiny-random"),
            len,
            args,
            Dataset.from_list(ROWS),
            load_tokenizer("tiny-random"),
        )


def test_a_field_that_a_later_trl_brings_is_refused_when_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr("klrb.rloo.FREE", FREE - {"epsilon"})
    RBRLOOConfig(str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(InputError, match="`epsilon` is 0.3; klrb does not know"):
        RBRLOOConfig(str(tmp_path), epsilon=0.3, bf16=False, use_cpu=True)


def test_every_end_that_the_policy_names_ends_a_completion(tmp_path):
    policy = load_model("tiny-random", seed=1)
    ends = list(range(2, 2000))  # about one step in two ends
    policy.generation_config.eos_token_id = ends
    made = tiny(tmp_path, policy)
    batch = sampled(made)
    is_end = (
        torch.isin(batch["completion_ids"], torch.tensor([0, *ends]))
        & batch["completion_mask"].bool()
    )
    assert is_end.any() and (is_end.sum(1) <= 1).all()
    assert logged(made) == pytest.approx(
        exact_kl(policy, load_model("tiny-random", seed=0), batch), rel=1e-4, abs=1e-4
    )
    frame = evaluate_policy(
        policy,
        policy,
        load_tokenizer("tiny-random"),
        Dataset.from_dict(dict(prompt=PROMPTS, label=[0] * 4)),
        lambda completions, prompts: [0.0] * len(completions),
        get_profile("smoke"),
    )
    assert frame.length.mean() < 3  # as in training


# Modes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_off_in_both_models_and_equal_weights_have_no_kl(tmp_path, checkpointing):
    policy = build("gpt2", 0)  # dropout 0.1, and in training mode, as it is made
    reference = copy.deepcopy(policy).train()
    made = tiny(tmp_path, policy, reference, gradient_checkpointing=checkpointing)
    if checkpointing:
        made.model.gradient_checkpointing_enable()
    assert policy.training and not any(o.training for o in made.ref_model.modules())
    batch = sampled(made)
    assert logged(made) == [0.0, 0.0]
    made._compute_loss(made.model, batch).backward()
    layers = [
        o
        for o in made.model.modules()
        if getattr(o, "gradient_checkpointing", False) and o.training
    ]
    assert made.model.training and bool(layers) == checkpointing


def test_layers_that_recompute_and_drop_units_themselves_are_refused(tmp_path):
    policy, reference = build("opt", 1), build("opt", 0)
    with pytest.raises(
        InputError, match="`model` .OPTForCausalLM. computes something else in training mode"
    ):
        tiny(tmp_path, policy, reference, gradient_checkpointing=True)
    tiny(tmp_path, policy, reference)


def test_judging_leaves_the_modes_as_they_were():
    policy, reference = build("gpt2", 0).train(), build("gpt2", 0).train()
    frame = evaluate_policy(
        policy,
        reference,
        load_tokenizer("tiny-random"),
        Dataset.from_dict(dict(prompt=PROMPTS, label=[0] * 4)),
        lambda completions, prompts: [0.0] * len(completions),
        get_profile("smoke"),
    )
    assert (
        (frame.kl_rb == 0).all()
        and policy.training
        and all(o.training for o in reference.modules())
    )


class Deaf(GPT2LMHeadModel):
    "Reads the padding like words."

    def forward(self, *args, attention_mask=None, **kwargs):
        return super().forward(*args, **kwargs)


def no_reward(completions, prompts, **kwargs):
    return [float(len(o)) for o in completions]


@pytest.mark.parametrize("who", ["policy", "reference", "pairs", "trainer"])
def test_a_model_that_cannot_be_padded_is_refused_before_it_writes(tmp_path, who):
    sound, tokenizer, profile = (
        load_model("tiny-random"),
        load_tokenizer("tiny-random"),
        get_profile("smoke"),
    )
    deaf = Deaf(sound.config)
    deaf.load_state_dict(sound.state_dict())
    prompts = Dataset.from_dict(dict(prompt=PROMPTS, label=[0] * len(PROMPTS)))

    def judge(policy, reference):
        return evaluate_policy(policy, reference, tokenizer, prompts, no_reward, profile)

    calls = dict(
        policy=lambda: judge(deaf, sound),
        reference=lambda: judge(sound, deaf),
        pairs=lambda: sample_pairs(deaf, tokenizer, PROMPTS, no_reward, profile),
        trainer=lambda: trainer(tmp_path, deaf, sound),
    )
    with pytest.raises(InputError, match="(?s)Deaf.*right only in batches of one length"):
        calls[who]()


def test_pairs_are_written_in_evaluation_mode_and_end_at_all_ends():
    tokenizer, profile = load_tokenizer("tiny-random"), get_profile("smoke")
    ends, texts = list(range(100, 1100)), ["The film", "I saw"] * 4

    def pairs(mode, dropout):
        reference = load_model("tiny-random")
        for module in reference.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        reference.generation_config.eos_token_id = ends
        torch.manual_seed(0)
        found = sample_pairs(reference.train(mode), tokenizer, texts, no_reward, profile)
        assert reference.training == mode
        return found.to_list()

    quiet = pairs(False, 0.0)
    assert pairs(True, 0.9) == quiet
    completions = [o[key] for o in quiet for key in ("chosen_ids", "rejected_ids")]
    ends = {*ends, tokenizer.eos_token_id}
    assert not [ids for ids in completions if ends & set(ids[:-1])]
    assert [ids for ids in completions if ids[-1] in ends]


# The reference


def test_a_reference_that_moves_with_the_policy_is_refused(tmp_path):
    policy = load_model("tiny-random", seed=1)
    sharing = load_model("tiny-random", seed=0)
    sharing.transformer.h[1].mlp.c_fc.weight = policy.transformer.h[1].mlp.c_fc.weight
    for reference in (policy, sharing):
        with pytest.raises(InputError, match="`ref_model` shares weights with `model`"):
            tiny(tmp_path, policy, reference)
    assert all(p.requires_grad for p in policy.parameters())


@pytest.mark.parametrize("settings", [dict(bias="all"), dict(init_lora_weights="pissa")])
def test_adapters_that_leave_something_behind_are_refused(tmp_path, settings):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True, r=4, **settings
    )
    args = RBRLOOConfig(
        str(tmp_path), bf16=False, use_cpu=True, gradient_checkpointing=False, report_to=[]
    )
    with pytest.raises(InputError, match=next(iter(settings))):
        RBRLOOTrainer(
            load_model("tiny-random"),
            None,
            len,
            args,
            Dataset.from_list(ROWS),
            load_tokenizer("tiny-random"),
            peft_config=config,
        )


def test_a_reference_may_follow_between_generation_batches(tmp_path):
    """TR-DPO's mixture, by hand, after two updates; and the true reason where it cannot be."""
    made = tiny(
        tmp_path,
        sync_ref_model=True,
        ref_model_sync_steps=2,
        ref_model_mixup_alpha=0.25,
        max_steps=3,
        learning_rate=0.1,
        logging_steps=1,
    )
    before = copy.deepcopy(made.ref_model.state_dict())
    seen = []

    class Look(transformers_callback()):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(
                (copy.deepcopy(model.state_dict()), copy.deepcopy(made.ref_model.state_dict()))
            )

    made.add_callback(Look())
    made.train()
    name = "transformer.h.0.mlp.c_fc.weight"
    assert made.args.beta == 0.3 and torch.equal(seen[0][1][name], before[name])
    torch.testing.assert_close(seen[1][1][name], 0.75 * before[name] + 0.25 * seen[1][0][name])
    with pytest.raises(InputError, match="a generation batch lasts 2 updates"):
        tiny(tmp_path, sync_ref_model=True, ref_model_sync_steps=3, num_iterations=2)


def transformers_callback():
    from transformers import TrainerCallback

    return TrainerCallback


# Cut completions


def finishing(policy):
    "Add 7 to the logit of end of text, so that about one completion in two ends."
    with torch.no_grad():
        row = policy.transformer.wte.weight[0]
        policy.transformer.ln_f.bias += 7 * row / row.square().sum()
    return policy


@pytest.mark.filterwarnings("ignore:`mask_truncated_completions`")
def test_the_logged_kl_is_the_mean_over_completions_that_are_not_masked(tmp_path):
    policy, reference = (
        finishing(load_model("tiny-random", seed=1)),
        load_model("tiny-random", seed=0),
    )
    made = tiny(
        tmp_path, policy, reference, mask_truncated_completions=True, max_completion_length=8
    )
    batch = sampled(made)
    ended = batch["completion_mask"].any(1)
    assert 0 < ended.sum() < len(ended)
    kept = {
        name: value[ended]
        for name, value in batch.items()
        if name.startswith(("prompt", "completion"))
    }
    assert logged(made) == pytest.approx(exact_kl(policy, reference, kept), rel=1e-4, abs=1e-4)


@pytest.mark.filterwarnings("ignore:`mask_truncated_completions`")
@pytest.mark.parametrize("kl_estimator", ["mc", "rb"])
def test_a_batch_whose_completions_are_all_masked_does_not_end_the_run(tmp_path, kl_estimator):
    args = RBRLOOConfig(
        str(tmp_path / "out"),
        kl_estimator=kl_estimator,
        beta=0.3,
        mask_truncated_completions=True,
        max_completion_length=2,
        per_device_train_batch_size=8,
        max_steps=2,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=1e-2,
    )
    start = load_model("tiny-random", seed=1)
    trained = train_rloo(
        copy.deepcopy(start),
        load_model("tiny-random", seed=0),
        load_tokenizer("tiny-random"),
        Dataset.from_list(ROWS[::2]),
        lambda completions, **kwargs: [1.0] * len(completions),
        args,
        tmp_path / "metrics.csv",
    )
    text = (tmp_path / "metrics.csv").read_text()
    assert ",2,loss,0," in text and "kl_sequence" not in text and "nan" not in text
    assert all(torch.equal(p, q) for p, q in zip(trained.parameters(), start.parameters()))


def test_cutting_with_a_penalty_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="`mask_truncated_completions` leaves the KL .* biased"):
        tiny(tmp_path, mask_truncated_completions=True)


# What else is given


def test_what_the_trainer_does_not_know_is_refused(tmp_path):
    args = RBRLOOConfig(str(tmp_path), bf16=False, use_cpu=True)
    model, rows, tokenizer = (
        load_model("tiny-random"),
        Dataset.from_list(ROWS),
        load_tokenizer("tiny-random"),
    )
    appending = copy.deepcopy(tokenizer)
    from tokenizers.processors import TemplateProcessing

    appending._tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    for given, error, message in [
        (("gpt2", model, len, args, rows, tokenizer), InputTypeError, "`model` is a str"),
        (
            (
                model,
                model,
                len,
                RLOOConfig(str(tmp_path), bf16=False, use_cpu=True),
                rows,
                tokenizer,
            ),
            InputTypeError,
            "needs an `RBRLOOConfig`",
        ),
        (
            (model, copy.deepcopy(model), len, args, rows.add_column("image", [1] * 8), tokenizer),
            InputError,
            "has the column `image`",
        ),
        ((model, copy.deepcopy(model), len, args, rows, appending), InputError, "to every prompt"),
    ]:
        with pytest.raises(error, match=message):
            RBRLOOTrainer(*given)
    with pytest.raises(InputTypeError, match="do not know `rollout_func`"):
        RBRLOOTrainer(model, copy.deepcopy(model), len, args, rows, tokenizer, rollout_func=len)
