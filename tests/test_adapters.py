"""Adapters: on is what PEFT's forward pass gives, off is the base alone, or the pair is refused.

Oracles are bare float64 passes of models that are built apart: the base from its folder, and
`PeftModel.from_pretrained`.
"""

import inspect
import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from klrb.adapters import KINDS, check_adapters, split_name
from klrb.errors import InputError
from klrb.measure import measure_kl
from klrb.models import one_line
from klrb.compare.sides import load_pair

peft = pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
WORDS = [f"w{i}" for i in range(24)]
IDS = torch.tensor([[1, 5, 3, 23, 7, 2]])


def tokenizer():
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w1"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="w0", eos_token="w0", pad_token="w0", padding_side="left"
    )


def llama(seed=0, vocab_size=len(WORDS), tied=False):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=tied,
        )
    ).eval()


def gpt2(seed=0):  # it has biases
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(WORDS),
            n_positions=32,
            n_embd=16,
            n_layer=2,
            n_head=2,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()


BASES = dict(llama=llama, tied=lambda: llama(tied=True), gpt2=gpt2)


def write(base, folder):
    base.save_pretrained(folder), tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    where = tmp_path_factory.mktemp("bases")
    return {name: write(make(), where / name) for name, make in BASES.items()}


def train(model, size=0.2, seed=1):
    "A few steps of training, as far as the numbers are concerned: every trainable weight moves."
    noise = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=noise)
    return model


def save(base, folder, config, seed=1):
    torch.manual_seed(seed)
    train(get_peft_model(base, config), seed=seed).save_pretrained(folder)
    return folder


def adapter(bases, folder, base="llama", seed=1, **settings):
    settings = (
        dict(
            r=4,
            target_modules=["c_attn", "c_proj"] if base == "gpt2" else ["q_proj", "o_proj"],
            fan_in_fan_out=base == "gpt2",
        )
        | settings
    )
    return save(loaded(bases[base]), folder, LoraConfig(**settings), seed)


@torch.no_grad()
def truth(base, folder=None, ids=IDS):
    model = base if folder is None else PeftModel.from_pretrained(base, folder)
    if "ADAMSS" in str(getattr(model, "peft_config", "")):
        return model.eval()(ids).logits.double()  # it computes in float32 only
    return model.eval().double()(ids).logits


def loaded(folder):
    "A fresh model, as if loaded from its folder."
    model = BASES[folder.name]()
    model.config.name_or_path = model.name_or_path = str(folder)
    return model


@torch.no_grad()
def logits(side, ids=IDS):
    with side.active() as model:
        return model(input_ids=ids).logits.double()


def check(side, expected):
    "float32 against float64: two layers of sums of 64 terms, each rounded."
    found = logits(side)
    torch.testing.assert_close(
        found,
        expected,
        rtol=0,
        atol=1000 * torch.finfo(torch.float32).eps * float(expected.abs().max()),
    )


# On and off

LORAS = {
    "plain": {},
    "DoRA": dict(use_dora=True),
    "rsLoRA": dict(use_rslora=True),
    "gaussian": dict(init_lora_weights="gaussian"),
    "orthogonal": dict(init_lora_weights="orthogonal"),
    "PiSSA": dict(init_lora_weights="pissa"),
    "OLoRA": dict(init_lora_weights="olora"),
    "all biases": dict(base="gpt2", bias="all"),
    "its own biases": dict(base="gpt2", bias="lora_only"),
    "PiSSA and biases": dict(base="gpt2", bias="all", init_lora_weights="pissa"),
    "trained head": dict(modules_to_save=["lm_head"]),
    "trained embeddings": dict(modules_to_save=["embed_tokens"]),
    "on the head": dict(target_modules=["q_proj", "lm_head"]),
    "on the embeddings": dict(target_modules=["q_proj", "embed_tokens"]),
    "tied, on the head": dict(base="tied", target_modules=["q_proj", "lm_head"]),
    "tied, on the embeddings": dict(base="tied", target_modules=["q_proj", "embed_tokens"]),
    "tied, trained embeddings": dict(base="tied", modules_to_save=["embed_tokens"]),
    "trained tokens": dict(trainable_token_indices=[3, 5]),
    "tied, trained tokens": dict(base="tied", trainable_token_indices=[3, 5]),
    "layers repeated": dict(layer_replication=[(0, 2), (1, 2)]),
    "ranks by layer": dict(rank_pattern={"q_proj": 2}, alpha_pattern={"o_proj": 32}),
}


@pytest.mark.parametrize("name", LORAS)
def test_adapter_on_and_off_are_the_models_loaded_alone(name, bases, tmp_path):
    settings = dict(LORAS[name])
    base = settings.pop("base", "llama")
    folder = adapter(bases, tmp_path / "a", base, **settings)
    on, off = truth(loaded(bases[base]), folder), truth(loaded(bases[base]))
    assert on.shape == off.shape and (on - off).abs().max() > 0.01
    for ours, theirs, expected in (
        (f"{bases[base]}+{folder}", bases[base], (on, off)),
        (bases[base], f"{bases[base]}+{folder}", (off, on)),
    ):
        for side, logits_ in zip(load_pair(ours, theirs), expected):
            check(side, logits_)


def test_an_adapter_that_changes_its_base_gets_a_base_of_its_own_and_others_share(bases, tmp_path):
    for name, shared in (("plain", True), ("DoRA", True), ("PiSSA", False)):
        folder = adapter(bases, tmp_path / name, **LORAS[name])
        policy, reference = load_pair(f"{bases['llama']}+{folder}", bases["llama"])
        assert (policy.model is reference.model) == shared


def test_embeddings_saved_beside_the_adapter_go_with_it_and_not_into_the_base(bases, tmp_path):
    model = get_peft_model(loaded(bases["llama"]), LoraConfig(r=4, target_modules=["q_proj"]))
    train(model)
    model.get_input_embeddings().weight.data += 0.3
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    policy, reference = load_pair(f"{bases['llama']}+{tmp_path / 'a'}", bases["llama"])
    (
        check(policy, truth(loaded(bases["llama"]), tmp_path / "a")),
        check(reference, truth(loaded(bases["llama"]))),
    )


@pytest.mark.parametrize("init", ["pissa", True])
def test_the_measured_divergence_is_that_of_the_models_loaded_alone(init, bases, tmp_path):
    """One new token, so that the exact divergence is one sum."""
    folder = adapter(bases, tmp_path / "a", init_lora_weights=init)
    start = torch.tensor([[0]])
    logp, logq = (
        o[0, -1].log_softmax(-1)
        for o in (
            truth(loaded(bases["llama"]), folder, start),
            truth(loaded(bases["llama"]), None, start),
        )
    )
    found = measure_kl(f"{bases['llama']}+{folder}", bases["llama"], max_new_tokens=1, samples=4)
    assert found.kl.mean == pytest.approx(float((logp.exp() * (logp - logq)).sum()), rel=1e-4)


# Two adapters

PAIRS = {
    "two": ({}, {}),
    "two that change": (dict(init_lora_weights="pissa"), dict(init_lora_weights="olora")),
    "one changes": ({}, dict(init_lora_weights="pissa")),
    "the other changes": (dict(init_lora_weights="pissa"), {}),
    "two heads": (dict(modules_to_save=["lm_head"]), dict(modules_to_save=["lm_head"])),
    "two sets of tokens": (dict(trainable_token_indices=[3]), dict(trainable_token_indices=[3, 5])),
    "two ranks, one with DoRA": (dict(r=2), dict(r=8, use_dora=True)),
    "biases twice": (dict(base="gpt2", bias="all"), dict(base="gpt2", bias="all")),
}


@pytest.mark.parametrize("name", PAIRS)
def test_two_adapters_are_both_what_they_are_alone(name, bases, tmp_path):
    sides = []
    for seed, settings in enumerate(PAIRS[name], 1):
        base = settings.get("base", "llama")
        sides.append(adapter(bases, tmp_path / str(seed), seed=seed, **settings))
    policy, reference = load_pair(*(f"{bases[base]}+{o}" for o in sides))
    for _ in range(2):
        for side, folder in ((policy, sides[0]), (reference, sides[1])):
            check(side, truth(loaded(bases[base]), folder))


def test_two_kinds_of_adapters(bases, tmp_path):
    lora = adapter(bases, tmp_path / "lora")
    other = save(
        loaded(bases["llama"]),
        tmp_path / "ia3",
        peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    )
    for side, folder in zip(
        load_pair(f"{bases['llama']}+{lora}", f"{bases['llama']}+{other}"), (lora, other)
    ):
        check(side, truth(loaded(bases["llama"]), folder))


def test_one_adapter_on_both_sides_is_one_model(bases, tmp_path):
    name = f"{bases['llama']}+{adapter(bases, tmp_path / 'a')}"
    policy, reference = load_pair(name, name)
    assert (
        torch.equal(logits(policy), logits(reference))
        and policy.fingerprint() == reference.fingerprint()
    )


def test_fingerprints_do_not_depend_on_the_way_of_loading(bases, tmp_path):
    folder = adapter(bases, tmp_path / "a", modules_to_save=["lm_head"])
    policy, reference = load_pair(f"{bases['llama']}+{folder}", bases["llama"])
    _, alone = load_pair(f"{bases['gpt2']}", bases["llama"], tokenizer())
    assert policy.fingerprint() != reference.fingerprint() == alone.fingerprint()


# Kinds

OWN = {
    "ADALORA": dict(total_step=10),
    "TRAINABLE_TOKENS": dict(token_indices=[1, 2], target_modules=["embed_tokens"]),
    "FOURIERFT": dict(n_frequency=50),
    "WAVEFT": dict(n_frequency=50),
    "VBLORA": dict(num_vectors=16, vector_length=8),
    "C3A": dict(block_size=8),
    "BOFT": dict(boft_block_size=4),
    "OFT": dict(oft_block_size=4),
    "ROAD": dict(group_size=4),
    "SHIRA": dict(r=4),
    "LN_TUNING": dict(target_modules=["input_layernorm"]),
    "IA3": dict(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def config_of(kind):
    make = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    settings = dict(target_modules=["q_proj", "o_proj"], r=4, task_type="CAUSAL_LM")
    if kind in ("OFT", "BOFT"):
        del settings["r"]
    return make(
        **{
            k: v
            for k, v in (settings | OWN.get(kind, {})).items()
            if k in inspect.signature(make).parameters
        }
    )


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_kind_that_is_allowed_is_right(kind, bases, tmp_path):
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        pytest.skip("not in this PEFT")
    folder = save(loaded(bases["llama"]), tmp_path / "a", config_of(kind))
    on, off = truth(loaded(bases["llama"]), folder), truth(loaded(bases["llama"]))
    assert (on - off).abs().max() > 0.01
    policy, reference = load_pair(f"{bases['llama']}+{folder}", bases["llama"])
    check(policy, on), check(reference, off)


REFUSED = {
    "PREFIX_TUNING": dict(num_virtual_tokens=2),
    "PROMPT_TUNING": dict(num_virtual_tokens=2),
    "P_TUNING": dict(num_virtual_tokens=2),
    "ADAPTION_PROMPT": dict(adapter_len=4, adapter_layers=1),
    "POLY": dict(target_modules=["q_proj"], r=2),
    "SHADOW": {},
    "LILY": dict(target_modules=["q_proj", "o_proj"], r=4),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_each_other_kind_is_refused_by_name(kind, bases, tmp_path):
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        pytest.skip("not in this PEFT")
    model = get_peft_model(
        loaded(bases["llama"]),
        PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **REFUSED[kind]),
    )
    model.save_pretrained(tmp_path / "a")
    for refused in (
        lambda: load_pair(f"{bases['llama']}+{tmp_path / 'a'}", bases["llama"]),
        lambda: load_pair(model, bases["llama"], tokenizer()),
        lambda: check_adapters(model),
    ):
        with pytest.raises(InputError, match=f"of type {kind}") as error:
            refused()
        assert "\n" not in str(error.value)


def test_a_start_that_is_drawn_anew_on_loading_is_refused(bases, tmp_path):
    folder = adapter(bases, tmp_path / "a", init_lora_weights="pissa_niter_4")
    outcomes = []
    for seed in (5, 6):
        base = loaded(bases["llama"])
        torch.manual_seed(seed)
        outcomes.append(truth(base, folder))
    first, again = outcomes
    assert (first - again).abs().max() > 0.01  # PEFT itself
    with pytest.raises(InputError, match="'pissa_niter_4', whose start PEFT draws anew"):
        load_pair(f"{bases['llama']}+{folder}", bases["llama"])


def test_a_start_that_only_the_trained_base_lacks_is_said(bases, tmp_path):
    folder = adapter(bases, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | dict(init_lora_weights="lora_ga"))
    )
    with pytest.warns(UserWarning, match="right only on the base that was saved with it"):
        load_pair(f"{bases['llama']}+{folder}", bases["llama"])


def test_an_activated_lora_is_refused(bases, tmp_path):
    folder = adapter(bases, tmp_path / "a", alora_invocation_tokens=[5, 3])
    with pytest.raises(InputError, match="`alora_invocation_tokens`: it is an activated LoRA"):
        load_pair(f"{bases['llama']}+{folder}", bases["llama"])


# All of it


def rename(folder, how, binary=False):
    weights = load_file(folder / "adapter_model.safetensors")
    weights = {
        name: o for i, (key, o) in enumerate(weights.items()) if (name := how(i, key)) is not None
    }
    (folder / "adapter_model.safetensors").unlink()
    if binary:
        torch.save(weights, folder / "adapter_model.bin")
    else:
        save_file(weights, folder / "adapter_model.safetensors")


DAMAGES = {
    "all elsewhere": lambda i, key: key.replace("model.layers", "model.language_model.layers"),
    "half of them elsewhere": lambda i, key: key.replace("layers.1", "language_model.layers.1"),
    "one elsewhere": lambda i, key: key.replace(
        "layers.1.self_attn.o_proj.lora_A", "layers.1.self_attn.wo.lora_A"
    ),
    "of more layers": lambda i, key: key.replace("layers.1.", "layers.7."),
    "half of them gone": lambda i, key: key if "layers.0" in key else None,
    "one gone": lambda i, key: key if i else None,
    "all gone": lambda i, key: None,
    "without PEFT's prefix": lambda i, key: key.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("name", DAMAGES)
def test_weights_without_a_module_and_modules_without_weights_are_refused(
    name, binary, bases, tmp_path
):
    folder = adapter(bases, tmp_path / "a")
    rename(folder, DAMAGES[name], binary)
    with pytest.raises(InputError, match="belong to no module|file lacks") as error:
        load_pair(f"{bases['llama']}+{folder}", bases["llama"])
    assert "first: base_model" in str(error.value) or "first: model" in str(error.value)
    assert "\n" not in str(error.value)
    good = adapter(bases, tmp_path / "good")
    with pytest.raises(InputError, match="belong to no module|file lacks"):
        load_pair(f"{bases['llama']}+{good}", f"{bases['llama']}+{folder}")


def test_an_adapter_in_a_bin_file_is_read(bases, tmp_path):
    folder = adapter(bases, tmp_path / "a")
    expected = truth(loaded(bases["llama"]), folder)
    rename(folder, lambda i, key: key, binary=True)
    check(load_pair(f"{bases['llama']}+{folder}", bases["llama"])[0], expected)


def test_a_module_of_the_configuration_without_weights_is_refused(bases, tmp_path):
    folder = adapter(bases, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | dict(target_modules=[*config["target_modules"], "down_proj"]))
    )
    with pytest.raises(InputError, match="file lacks 4 of the weights .*down_proj"):
        load_pair(f"{bases['llama']}+{folder}", bases["llama"])


def test_an_added_token_is_refused_with_both_sizes(bases, tmp_path):
    larger = loaded(bases["llama"])
    larger.resize_token_embeddings(len(WORDS) + 1)
    get_peft_model(
        larger,
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    ).save_pretrained(tmp_path / "a")
    with pytest.raises(InputError, match=r"size mismatch for .*\[25, 32\].*\[24, 32\]") as error:
        load_pair(f"{bases['llama']}+{tmp_path / 'a'}", bases["llama"])
    assert "\n" not in str(error.value)


def test_another_size_of_base_is_refused_with_both_sizes(bases, tmp_path):
    folder = adapter(bases, tmp_path / "a", target_modules=["down_proj"])
    small = llama()
    small.config.intermediate_size = 48
    write(LlamaForCausalLM(small.config), tmp_path / "small")
    with pytest.raises(InputError, match=r"\[4, 64\].*\[4, 48\]"):
        load_pair(f"{tmp_path / 'small'}+{folder}", tmp_path / "small")


def test_another_name_of_the_base_is_said(bases, tmp_path):
    folder = adapter(bases, tmp_path / "a")
    shutil.copytree(bases["llama"], tmp_path / "other")
    with pytest.warns(UserWarning, match="was trained on .*llama.* and is put onto .*other"):
        load_pair(f"{tmp_path / 'other'}+{folder}", tmp_path / "other")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_pair(f"{bases['llama']}+{folder}", bases["llama"])


def test_a_folder_with_an_adapter_inside_it_is_refused(bases, tmp_path):
    """transformers would load the adapter's base and the adapter, and say nothing."""
    both = write(llama(), tmp_path / "both")
    shutil.copytree(adapter(bases, tmp_path / "a"), both, dirs_exist_ok=True)
    with pytest.raises(InputError, match="write BASE\\+ADAPTER"):
        load_pair(both, bases["llama"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_in_half_precision(dtype, bases, tmp_path):
    folder = adapter(bases, tmp_path / "a")
    weights = {
        key: o.bfloat16() for key, o in load_file(folder / "adapter_model.safetensors").items()
    }
    save_file(weights, folder / "adapter_model.safetensors")
    policy, _ = load_pair(f"{bases['llama']}+{folder}", bases["llama"], dtype=dtype)
    with torch.no_grad():
        model = PeftModel.from_pretrained(
            LlamaForCausalLM.from_pretrained(bases["llama"], dtype=getattr(torch, dtype)), folder
        ).eval()
        assert torch.equal(logits(policy), model(IDS).logits.double())


# Names


@pytest.mark.parametrize(
    "base, name",
    [("base", "A+v2"), ("base", "A+v2+x"), ("b+1", "A"), ("b+1", "A+v2"), ("b", "1+A")],
)
def test_plus_signs_in_names(base, name, bases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bases["llama"], tmp_path / base), adapter(bases, tmp_path / name)
    for before, after in (("", ""), ("./", "./"), (f"{tmp_path}/", f"{tmp_path}/")):
        assert split_name(f"{before}{base}+{after}{name}") == (before + base, after + name)
    check(
        load_pair(f"./{base}+./{name}", f"./{base}")[0],
        truth(loaded(bases["llama"]), tmp_path / name),
    )


def test_an_adapter_on_an_adapter_is_refused(bases, tmp_path):
    first, second = adapter(bases, tmp_path / "one"), adapter(bases, tmp_path / "two")
    with pytest.raises(InputError, match="one adapter can be on a base"):
        load_pair(f"{bases['llama']}+{first}+{second}", bases["llama"])


# Models in memory


def in_memory(bases, base="llama", **settings):
    settings = (
        dict(
            r=4,
            target_modules=["c_attn"] if base == "gpt2" else ["q_proj", "o_proj"],
            fan_in_fan_out=base == "gpt2",
        )
        | settings
    )
    torch.manual_seed(3)
    return train(get_peft_model(loaded(bases[base]), LoraConfig(**settings))).eval()


MEMORY = {
    "plain": {},
    "DoRA": dict(use_dora=True),
    "head": dict(modules_to_save=["lm_head"]),
    "tokens": dict(trainable_token_indices=[3]),
}


@pytest.mark.parametrize("name", MEMORY)
def test_a_loaded_peft_model_and_its_own_base(name, bases):
    model = in_memory(bases, **MEMORY[name])
    with torch.no_grad():
        on = model(IDS).logits.double()
    for ours, theirs, expected in (
        (model, model.get_base_model(), (on, truth(loaded(bases["llama"])))),
        (model.get_base_model(), model, (truth(loaded(bases["llama"])), on)),
    ):
        for side, logits_ in zip(load_pair(ours, theirs, tokenizer()), expected):
            check(side, logits_)


CHANGED = {
    "biases": dict(base="gpt2", bias="all"),
    "own biases": dict(base="gpt2", bias="lora_only"),
    "PiSSA": dict(init_lora_weights="pissa"),
    "OLoRA": dict(init_lora_weights="olora"),
    "fast PiSSA": dict(init_lora_weights="pissa_niter_2"),
    "repeated": dict(layer_replication=[(0, 2), (1, 2)]),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_loaded_peft_model_that_changed_its_base_is_no_reference_of_its_own(name, bases):
    base = CHANGED[name].get("base", "llama")
    model = in_memory(bases, **CHANGED[name])
    with torch.no_grad():
        on = model(IDS).logits.double()
    for refused in (
        lambda: load_pair(model, model.get_base_model(), tokenizer()),
        lambda: check_adapters(model),
    ):
        with pytest.raises(InputError, match="not the base"):
            refused()
    policy, reference = load_pair(model, bases[base], tokenizer())
    check(policy, on), check(reference, truth(loaded(bases[base])))


def test_a_reference_that_moves_with_the_policy_is_refused(bases):
    model = in_memory(bases)
    check_adapters(model.train())
    assert model.training and all(
        o.requires_grad == (".lora_" in name) for name, o in model.named_parameters()
    )
    model.get_base_model().model.layers[1].mlp.up_proj.weight.requires_grad_()
    with pytest.raises(InputError, match="mlp.up_proj.weight"):
        check_adapters(model)
    watched = in_memory(bases)
    watched.enable_input_require_grads()  # of gradient checkpointing; no parameter is reached
    check_adapters(watched)


def test_merged_disabled_and_doubled_adapters_are_as_given(bases, tmp_path):
    off = truth(loaded(bases["llama"]))
    disabled = in_memory(bases)
    disabled.base_model.disable_adapter_layers()
    check(load_pair(disabled, bases["llama"], tokenizer())[0], off)
    double = in_memory(bases)
    double.load_adapter(adapter(bases, tmp_path / "a"), "second")
    double.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        on = double(IDS).logits.double()
    for side, expected in zip(load_pair(double, double.get_base_model(), tokenizer()), (on, off)):
        check(side, expected)
    check(load_pair(double, bases["llama"], tokenizer())[0], on)
    merged = in_memory(bases)
    with torch.no_grad():
        on = merged(IDS).logits.double()
    merged.merge_adapter()
    check(load_pair(merged, bases["llama"], tokenizer())[0], on)
    with pytest.raises(InputError, match="merged into its base"):
        load_pair(merged, merged.get_base_model(), tokenizer())
    check(load_pair(in_memory(bases).merge_and_unload(), bases["llama"], tokenizer())[0], on)


def test_weights_shared_with_an_adapted_model_are_refused(bases):
    model = in_memory(bases)
    with pytest.raises(InputError, match="share weights that an adapter"):
        load_pair(model, model.base_model, tokenizer())
    base = loaded(bases["llama"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = (
            get_peft_model(base, LoraConfig(r=2, target_modules=[o])) for o in ("q_proj", "v_proj")
        )
        with pytest.raises(InputError, match="two PeftModels around one base|share weights"):
            load_pair(first, second, tokenizer())


# Text of errors


def test_errors_of_many_lines_become_one_and_keep_what_counts():
    assert one_line(ValueError("a:\n\tb\n\n  c")) == "a: b c" and one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("word " * 1000))) <= 502
