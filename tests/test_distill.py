"""The distillation trainer: what it computes, under every gradient, teacher and way of training."""

import copy
import dataclasses
import json
import shutil
import socket
import sys
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import papermill
import pytest
import torch
from datasets import Dataset
from torch.multiprocessing import spawn
from torch.testing import assert_close
from transformers import TrainerCallback
from trl import DistillationConfig
from typer.testing import CliRunner

from klrb import distill
from klrb.cli import app
from klrb.distill import METHODS, RBDistillationConfig, RBDistillationTrainer
from klrb.errors import InputError, NotFiniteError
from klrb.models import load_model, load_tokenizer
from klrb.rlhf import many_distill
from klrb.rlhf.many import Scores
from klrb.rlhf.profiles import get_profile
from klrb.rlhf.reviews import load_reviews, make_prompts, split_reviews
from klrb.rlhf.reward import save_tfidf_reward, train_tfidf_reward
from klrb.sweeps.parameters import read_grid, read_template
from trainers import be_one_of_two

CPU = dict(
    report_to=[], gradient_checkpointing=False, disable_tqdm=True, use_cpu=True, save_strategy="no"
)
TEXTS = ["The film", "I saw this film with", "Never", "It was a bit of a"]
PROMPTS = Dataset.from_dict(dict(prompt=TEXTS))
ROWS = [dict(prompt=p) for p in TEXTS for _ in range(2)]
TOKENIZER = load_tokenizer("tiny-random")
ROOT = Path(__file__).resolve().parents[1]


def make(folder, student=None, teacher="given", data=PROMPTS, **settings):
    options = {o: settings.pop(o) for o in ("peft_config", "teacher_adapter") if o in settings}
    settings = (
        dict(
            per_device_train_batch_size=8,
            num_generations=2,
            max_completion_length=6,
            temperature=0.8,
            seed=1,
            bf16=False,
        )
        | CPU
        | settings
    )
    t = RBDistillationTrainer(
        student or load_model("tiny-random", seed=1),
        load_model("tiny-random", seed=0) if teacher == "given" else teacher,
        RBDistillationConfig(str(folder), **settings),
        data,
        TOKENIZER,
        **options,
    )
    t.model.train()
    return t


def generate(t, rows=ROWS, seed=3):
    torch.manual_seed(seed)
    return t._generate_and_score_completions(rows)


def gradients(t, batch):
    t.model.zero_grad()
    t._compute_loss(t.model, batch, None)[0].backward()
    return {name: p.grad for name, p in t.model.named_parameters() if p.grad is not None}


def relative(ours, theirs):
    "Distance of two gradients over the size of the second."
    assert ours.keys() == theirs.keys()
    distance = torch.stack([(ours[o].double() - theirs[o].double()).norm() for o in ours]).norm()
    return (distance / torch.stack([o.double().norm() for o in theirs.values()]).norm()).item()


FIELDS = "prompt_ids", "prompt_mask", "completion_ids", "completion_mask"


def bare_logits(model, batch, temperature, rows=None):
    "Float64 logits of every rollout alone, without padding; 0 beyond its end, (B, T, V)."
    model, found = model.double(), []
    for ids, mask, chosen, kept in zip(*(batch[name] for name in FIELDS)):
        prompt, completion = ids[mask.bool()], chosen[kept.bool()]
        logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        found.append(torch.nn.functional.pad(logits, (0, 0, 0, len(chosen) - len(completion))))
    return torch.stack(found)[..., :rows] / temperature


def by_hand(gradient, logp, logq, batch, k):
    "The scalar whose gradient is followed, mean over rollouts; two completions per prompt."
    mask, ids = batch["completion_mask"].double(), batch["completion_ids"][..., None]
    logq = logq.detach()
    chosen = logp.gather(-1, ids)[..., 0] * mask
    k1 = (chosen - logq.gather(-1, ids)[..., 0] * mask).detach()
    terms = logp.exp() * (logp - logq)
    kl = terms.sum(-1) * mask

    def score(weights):
        others = weights.view(-1, 2, weights.shape[1]).flip(1).view_as(weights)
        return chosen * (weights - others * mask)

    def to_go(o):
        return o.flip(1).cumsum(1).flip(1)

    exact = kl.detach()
    if gradient == "rb_topk":
        top = logp.topk(k).indices
        tail = mask * (top != ids).all(-1)
        head = (terms.gather(-1, top).sum(-1) - logp.exp().gather(-1, top).sum(-1)) * mask
        value = (terms.gather(-1, top).sum(-1) * mask + tail * k1).detach()
        return (head + score(to_go(value) - value + tail * k1)).sum(1).mean()
    return (
        {
            "rb": kl + score(to_go(exact) - exact),
            "mc": score(k1.sum(1, True).expand_as(k1)),
            "mc_to_go": score(to_go(k1)),
            "step": kl,
            "vopd": chosen * (k1 - exact),
            "k1": chosen * k1,
        }[gradient]
        .sum(1)
        .mean()
    )


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    "A trainer with two temperatures, and a batch with left padding and an end of text."
    t = make(tmp_path_factory.mktemp("fixed"), teacher_temperature=1.3, topk=40)
    batch = generate(t)
    batch["completion_ids"][1, 2] = TOKENIZER.eos_token_id
    batch["completion_mask"][1, 3:] = 0
    assert (batch["prompt_mask"] == 0).any()
    return t, batch


@pytest.fixture(scope="module")
def exact(fixed):
    "Both models in float64, one rollout at a time: the student, log-probabilities of both."
    student, teacher = (load_model("tiny-random", seed=seed) for seed in (1, 0))
    logp = bare_logits(student, fixed[1], 0.8).log_softmax(-1)
    return student, logp, bare_logits(teacher, fixed[1], 1.3).log_softmax(-1)


@pytest.mark.parametrize("gradient", METHODS)
def test_the_gradient_is_that_of_plain_float64(fixed, exact, gradient):
    "Each rollout alone, in torch's own operations, from logits; the end of text counts."
    (t, batch), (student, logp, logq) = fixed, exact
    t.gradient, t.method = gradient, METHODS[gradient]
    ours = gradients(t, batch)
    student.zero_grad()
    by_hand(gradient, logp, logq, batch, 40).backward(retain_graph=True)
    assert relative(ours, {name: p.grad for name, p in student.named_parameters()}) < 1e-5
    if gradient == "rb_topk":  # both kinds of steps occur
        tail = (logp.topk(40).indices != batch["completion_ids"][..., None]).all(-1)
        assert 0 < (tail & batch["completion_mask"].bool()).sum() < batch["completion_mask"].sum()


def test_tokens_or_sequences_are_averaged(fixed):
    t, batch = fixed
    t.gradient, t.method = "rb", "rb"
    by_sequence = gradients(t, batch)
    t.args.reduction = "token"
    by_token = gradients(t, batch)
    t.args.reduction = "sequence"
    ratio = 8 / batch["completion_mask"].sum()
    assert relative(by_token, {name: g * ratio for name, g in by_sequence.items()}) < 1e-6


# No logits, and one reading of the teacher


def test_no_logits_are_built_and_the_teacher_reads_once(tmp_path):
    t = make(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=2)
    read, allowed, generate = [], [], t.model.generate

    def guarded(*args, **kwargs):
        allowed.append(True)
        try:
            return generate(*args, **kwargs)
        finally:
            allowed.pop()

    def refuse(module, args):
        assert allowed, "logits were built"

    t.model.generate = guarded
    for model in (t.model, t.teacher_model):
        model.get_output_embeddings().register_forward_pre_hook(refuse)
    t.teacher_model.transformer.register_forward_hook(lambda m, a, o: read.append(a or 1))
    t.train()
    assert len(read) == 4  # two updates of two halves
    with pytest.raises(AssertionError, match="logits were built"):
        t.model(torch.zeros(1, 1, dtype=torch.long))


# What is logged


def test_the_log_has_the_kl_of_all_completions_since_the_last_one(tmp_path):
    t = make(tmp_path)
    for seed in (3, 4):
        gradients(t, generate(t, seed=seed))
    kept = torch.cat(t._rollouts["train"]).double()
    t.log({})
    logged = t.state.log_history[-1]
    prompts = kept[:, 0].view(8, 2).mean(1)
    assert logged["kl_sequence_rb"] == pytest.approx(kept[:, 0].mean().item())
    assert logged["kl_sequence_mc"] == pytest.approx(kept[:, 1].mean().item())
    assert logged["kl_sequence_rb_stderr"] == pytest.approx((prompts.std() / 8**0.5).item())
    assert logged["kl_step"] == pytest.approx((kept[:, 0].sum() / kept[:, 3].sum()).item())
    assert logged["kl_step"] > 0.01 and not t._rollouts["train"]


def test_an_evaluation_logs_the_same(tmp_path):
    t = make(tmp_path)
    t.eval_dataset = PROMPTS
    logged = t.evaluate()
    assert logged["eval_kl_sequence_rb"] > 0.1 and logged["eval_kl_sequence_rb_stderr"] > 0
    assert logged["eval_kl_step"] < logged["eval_kl_sequence_rb"]


# Teachers


@pytest.mark.parametrize("how", ["prefix", "column"])
def test_the_teacher_sees_what_the_student_does_not(tmp_path, how):
    texts = [f"A good review. {o}" for o in TEXTS]
    data = PROMPTS if how == "prefix" else PROMPTS.add_column("teacher_prompt", texts)
    settings = dict(teacher_prefix="A good review. ") if how == "prefix" else {}
    t = make(tmp_path, data=data, **settings)
    batch = generate(t, [row for row in data for _ in range(2)])
    for i, (ids, kept) in enumerate(zip(batch["completion_ids"], batch["completion_mask"].bool())):
        prompt = torch.tensor(TOKENIZER(texts[i // 2]).input_ids)
        body = load_model("tiny-random", seed=0).double().transformer
        hidden = body(torch.cat([prompt, ids[kept]])[None]).last_hidden_state[0]
        expected = hidden[len(prompt) - 1 : -1]
        assert_close(batch["teacher_hidden"][i][kept].double(), expected, rtol=1e-4, atol=1e-4)


def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, r=4
    )


def moved(model, adapter):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if f"lora_B.{adapter}" in name:
                p.normal_(generator=torch.Generator().manual_seed(sum(map(ord, name))), std=0.3)


@pytest.mark.parametrize("teacher_adapter", [None, "teacher"])
def test_the_student_with_other_adapters_is_the_teacher(tmp_path, teacher_adapter):
    "Oracle: PEFT's own forward pass with the other adapter, in float64."
    peft = pytest.importorskip("peft")
    student = peft.get_peft_model(load_model("tiny-random", seed=0), lora())
    if teacher_adapter:
        student.add_adapter("teacher", lora())
    for name in ("default", "teacher"):
        moved(student, name)
    t = make(tmp_path, student, None, teacher_adapter=teacher_adapter)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    batch = generate(t)
    assert {name for name, p in student.named_parameters() if p.requires_grad} == trained
    ours = gradients(t, batch)
    assert ours.keys() == trained and all("default" in name for name in ours)
    if teacher_adapter:
        student.set_adapter("teacher")
    with nullcontext() if teacher_adapter else student.disable_adapter():
        logq = bare_logits(student, batch, 0.8).log_softmax(-1).detach()
    student.set_adapter("default")
    logp = bare_logits(student, batch, 0.8).log_softmax(-1)
    student.zero_grad()
    by_hand("rb", logp, logq, batch, 0).backward()
    theirs = {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
    assert relative(ours, theirs) < 1e-5
    assert t._rollouts["train"][0][:, 0].mean() > 0.1


@pytest.fixture
def adapted(tmp_path):
    "Folders of a base and of its adapter, and both as one model."
    peft = pytest.importorskip("peft")
    load_model("tiny-random", seed=5).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(load_model("tiny-random", seed=5), lora())
    moved(model, "default")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", model


@pytest.mark.parametrize("given", ["name", "trainable model", "merged model", "adapted student"])
def test_a_base_with_an_adapter_is_the_teacher(tmp_path, adapted, given):
    "Oracle: the adapter's product added to the base's weights, in float64."
    base, adapter, model = adapted
    merged = copy.deepcopy(model).double().merge_and_unload()
    teacher = f"{base}+{adapter}" if given == "name" else model
    if given == "merged model":
        teacher = copy.deepcopy(model).merge_and_unload()
    student = load_model("tiny-random", seed=1)
    if given == "adapted student":  # the same name of an adapter on either side
        student = pytest.importorskip("peft").get_peft_model(student, lora())
        moved(student, "default")
    t = make(tmp_path / "run", student, teacher)
    assert not any(p.requires_grad for p in t.teacher_model.parameters())
    batch = generate(t)
    ours = gradients(t, batch)
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert list(ours) == trained
    logq = bare_logits(merged, batch, 0.8).log_softmax(-1).detach()
    logp = bare_logits(student, batch, 0.8).log_softmax(-1)
    student.zero_grad()
    by_hand("rb", logp, logq, batch, 0).backward()
    theirs = {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
    assert relative(ours, theirs) < 1e-5
    plain = bare_logits(load_model(str(base)), batch, 0.8).log_softmax(-1)
    assert (plain - logq).abs().max() > 0.1  # the adapter matters


def test_a_base_with_an_adapter_trains(tmp_path, adapted):
    base, adapter, _ = adapted
    t = make(tmp_path / "run", teacher=Path(f"{base}+{adapter}"), max_steps=1)
    before = {name: p.clone() for name, p in t.teacher_model.named_parameters()}
    t.train()
    for name, p in t.teacher_model.named_parameters():
        assert torch.equal(p, before[name])


@pytest.mark.parametrize(
    "form, message",
    [
        ("{base}+", "is .*base.'; write BASE.ADAPTER"),
        ("+{adapter}", "is .*adapter'; write BASE.ADAPTER"),
        ("{adapter}", "which is an adapter: write BASE.ADAPTER"),
        ("{base}+{base}", "has no adapter_config.json"),
        ("{base}+{base}/nowhere", "nowhere"),
        ("{base}+{adapter}+{adapter}", "one adapter can be on a base"),
        ("{base}+{other}", "`teacher`"),  # of a model with other layers
    ],
)
def test_a_base_with_no_adapter_that_fits_is_no_teacher(tmp_path, adapted, form, message):
    base, adapter, _ = adapted
    shutil.copytree(adapter, other := tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj"]
    (other / "adapter_config.json").write_text(json.dumps(config))
    name = form.format(base=base, adapter=adapter, other=other)
    with pytest.raises(InputError, match=message) as found:
        make(tmp_path / "run", teacher=name)
    assert "`model`" not in str(found.value), "names the student"


def test_heads_of_different_heights_share_the_tokenizers_rows(tmp_path):
    student, teacher = (load_model("tiny-random", seed=seed) for seed in (1, 0))
    for model, rows in ((student, 9), (teacher, 17)):  # rows beyond, of large logits
        height = len(TOKENIZER) + rows
        with torch.no_grad():
            old = model.get_output_embeddings().weight.clone()
            model.resize_token_embeddings(height, mean_resizing=False)
            model.get_output_embeddings().weight[len(old) :] = 4 * old[:rows]
    t = make(tmp_path, student, teacher)
    batch = generate(t)
    assert batch["completion_ids"].max() < len(TOKENIZER)
    ours = gradients(t, batch)
    student.zero_grad()
    logp, logq = (
        bare_logits(o, batch, 0.8, rows=len(TOKENIZER)).log_softmax(-1) for o in (student, teacher)
    )
    by_hand("rb", logp, logq, batch, 0).backward()
    assert relative(ours, {name: p.grad for name, p in student.named_parameters()}) < 1e-5


def test_a_folder_may_be_the_teacher_and_must_have_the_students_tokenizer(tmp_path):
    load_model("tiny-random", seed=5).save_pretrained(tmp_path / "teacher")
    TOKENIZER.save_pretrained(tmp_path / "teacher")
    t = make(tmp_path / "run", teacher=tmp_path / "teacher")
    assert torch.equal(
        t.teacher_model.transformer.wte.weight,
        load_model("tiny-random", seed=5).transformer.wte.weight,
    )
    other = load_tokenizer("tiny-random")
    other.add_tokens(["<new>"])
    other.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="tokenizers differ in 1 entries"):
        make(tmp_path / "run", teacher=tmp_path / "teacher")


def test_a_teacher_that_excludes_a_token_is_named(tmp_path):
    teacher = load_model("tiny-random", seed=0)
    head = torch.nn.Linear(32, len(teacher.lm_head.weight))
    with torch.no_grad():
        head.weight.copy_(teacher.lm_head.weight)
        head.bias.zero_()
    teacher.lm_head = head
    t = make(tmp_path, teacher=teacher)
    batch = generate(t)
    with torch.no_grad():
        head.bias[batch["completion_ids"][0, 0]] = -torch.inf
    with pytest.raises(NotFiniteError, match="`ref_logprobs` is -inf at update 1.*teacher that"):
        gradients(t, batch)


# Ways of training


class Kept(TrainerCallback):
    "Keeps the gradient of every update, after accumulation and synchronisation."

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = {o.removeprefix("module."): p.grad for o, p in model.named_parameters()}
        self.gradients.append({o: g.clone() for o, g in found.items() if g is not None})


def fixed_completions(self, prompt_ids, images, fields):
    "In place of sampling: tokens and a length that depend on prompt and the completion's number."

    def draw(ids, i):
        generator = torch.Generator().manual_seed(sum(ids) + i)
        return torch.randint(2, 4096, (2 + (sum(ids) + i) % 5,), generator=generator)

    return [draw(ids, i % 2).tolist() for i, ids in enumerate(prompt_ids)]


ARMS = {
    "rb": dict(gradient="rb"),
    "step, by token": dict(gradient="step", reduction="token"),
    "adapters": dict(gradient="mc_to_go", teacher=None, adapters=True),
}


def train_fixed(folder, name, processes, parts):
    "Two updates of 8 rollouts, each in `parts` micro-batches of a process."
    settings, kept = dict(ARMS[name]), Kept()
    if settings.pop("adapters", False):
        settings["peft_config"] = lora()
    t = make(
        folder,
        max_steps=2,
        optim="sgd",
        learning_rate=1e-3,
        logging_steps=1,
        max_grad_norm=1e9,
        per_device_train_batch_size=8 // processes // parts,
        gradient_accumulation_steps=parts,
        **settings,
    )
    if "peft_config" in settings:
        moved(t.model, "default")
    t._generate_single_turn = fixed_completions.__get__(t)
    t.add_callback(kept)
    t.train()
    names = [o for o in t.state.log_history[0] if o.startswith("kl")]
    names += ["loss", "grad_norm", "entropy"]
    logs = [{o: log[o] for o in names} for log in t.state.log_history if "loss" in log]
    weights = {o: p.detach() for o, p in t.model.named_parameters()}
    return logs, kept.gradients, weights


def check_equal(ours, theirs):
    for one, other in zip(ours[0], theirs[0], strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=2e-5) and "kl_sequence_rb_stderr" in one
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert relative(other, one) < 1e-4
    assert_close(theirs[2], ours[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ARMS)
def test_accumulation_changes_nothing(tmp_path, name):
    check_equal(train_fixed(tmp_path, name, 1, 1), train_fixed(tmp_path, name, 1, 4))


def one_of_two(rank, folder, port):
    be_one_of_two(rank, port)
    torch.save({name: train_fixed(folder, name, 2, 2) for name in ARMS}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    "gloo, on the CPU: each process sees two of four prompts, one at a time."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(one_of_two, (tmp_path, port), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name in ARMS:
        ours = train_fixed(tmp_path, name, 1, 1)
        for theirs in found:
            check_equal(ours, theirs[name])


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    "Ten updates of two prompts of four: the checkpoint is in the third epoch."

    def run(checkpoint=None, **settings):
        t = make(
            tmp_path,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=10,
            learning_rate=1e-2,
            logging_steps=1,
            **settings,
        )
        t.train(resume_from_checkpoint=checkpoint)
        curve = [log["kl_sequence_rb"] for log in t.state.log_history if "loss" in log]
        return curve, t.model.state_dict()

    curve, weights = run(save_steps=5, **dict(CPU, save_strategy="steps"))
    again, resumed = run(str(tmp_path / "checkpoint-5"))
    assert again == curve and len(set(curve)) == 10
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())


def test_gradient_checkpointing_changes_nothing(tmp_path, fixed):
    plain, batch = fixed
    plain.gradient, plain.method = "rb", "rb"
    t = make(tmp_path, gradient_checkpointing=True, teacher_temperature=1.3)
    t.model.gradient_checkpointing_enable()
    assert t.model.is_gradient_checkpointing
    assert relative(gradients(t, batch), gradients(plain, batch)) < 1e-6


def test_autocast_keeps_the_kl_of_equal_weights_at_zero(tmp_path):
    t = make(tmp_path, load_model("tiny-random", seed=0), bf16=True)
    gradients(t, generate(t))
    assert t._rollouts["train"][0][:, 0].tolist() == [0.0] * 8


# Bad settings


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(gradient="k2"), "`gradient` is 'k2'; it must be one of rb, rb_topk"),
        (dict(reduction="mean"), "`reduction` is 'mean'; it must be one of sequence, token"),
        (dict(num_generations=1), "gradient 'rb' needs at least 2; its baseline"),
        (dict(num_generations=0, gradient="step"), "gradient 'step' needs at least 1"),
        (dict(num_generations=3), "not a multiple of `num_generations`"),
        (dict(beta=0.0), "`beta` is 0.0: the divergence would be another"),
        (dict(temperature=0.0), "`temperature` is 0.0; it must be positive"),
        (dict(teacher_temperature=-1.0), "`teacher_temperature` is -1.0; it must be positive"),
        (dict(topk=0), "`topk` is 0; give the number of tokens"),
        (dict(max_completion_length=0), "number of tokens at which a completion is cut"),
        (dict(top_p=0.9), "`top_p` is 0.9: completions would be sampled from another"),
        (dict(min_p=0.1), "`min_p` is 0.1: completions would be sampled from another"),
        (dict(use_vllm=True), "`use_vllm` is True: completions would be sampled from another"),
        (dict(fsdp="full_shard"), "`fsdp` is"),
        (dict(teacher_model_revision="x"), "`teacher` may end with @REVISION"),
        (dict(generation_kwargs=dict(num_beams=2)), "`generation_kwargs` sets `num_beams` to 2"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        RBDistillationConfig(
            str(tmp_path), **dict(dict(per_device_train_batch_size=8), **settings), **CPU
        )


def test_every_setting_of_trl_is_known():
    known = distill._FREE | set(distill._FIXED) | {"generation_kwargs"}
    assert {o.name for o in dataclasses.fields(DistillationConfig)} <= known


def test_models_that_cannot_work_are_refused(tmp_path):
    student = load_model("tiny-random", seed=1)
    with pytest.raises(ValueError, match="`teacher` is None, but `model` has no adapters"):
        make(tmp_path, teacher=None)
    with pytest.raises(ValueError, match="`teacher` shares weights with `model`"):
        make(tmp_path, student, student)
    with pytest.raises(TypeError, match="`teacher` is a Linear"):
        make(tmp_path, teacher=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="give no `teacher` with it"):
        make(tmp_path, teacher_adapter="other")
    with pytest.raises(TypeError, match="does not know `tools`"):
        RBDistillationTrainer(
            student,
            student,
            RBDistillationConfig(str(tmp_path), **CPU),
            PROMPTS,
            TOKENIZER,
            tools=[],
        )
    with pytest.raises(ValueError, match="prompt 4 has .* but the teacher.s context has 64"):
        make(tmp_path, teacher_prefix="word " * 80)
    with pytest.raises(ValueError, match="column `image`"):
        make(tmp_path, data=PROMPTS.add_column("image", TEXTS))


def test_an_adapter_that_is_trained_is_no_teacher(tmp_path):
    peft = pytest.importorskip("peft")
    student = peft.get_peft_model(load_model("tiny-random", seed=0), lora())
    with pytest.raises(ValueError, match="it must be an adapter of `model` that is not trained"):
        make(tmp_path, student, None, teacher_adapter="default")


def test_a_setting_of_the_sampler_that_came_later_is_refused(tmp_path):
    t = make(tmp_path)
    t.generation_config.top_k = 3
    with pytest.raises(ValueError, match="`generation_config` of the trainer sets `top_k` to 3"):
        generate(t)


# The run, from a shell, and as a notebook of a sweep


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    "What a run reads of a preparation at smoke size."
    folder, settings = tmp_path_factory.mktemp("prepared"), get_profile("smoke")
    splits = split_reviews(load_reviews("synthetic"))
    save_tfidf_reward(train_tfidf_reward(splits["reward_train"]), folder / "reward")
    for name in ("rloo", "evaluation"):
        given = splits[name], TOKENIZER, settings.eval_prompts, settings.prompt_tokens
        make_prompts(*given).to_parquet(folder / f"{name}_prompts.parquet")
    load_model("tiny-random", seed=3).save_pretrained(folder / "dpo_policy")
    TOKENIZER.save_pretrained(folder / "dpo_policy")
    return folder


def test_a_run_from_a_shell_goes_on_where_it_was_killed(tmp_path, prepared, monkeypatch):
    def shell(name):
        command = f"distill --profile smoke --prepare-dir {prepared} --out {tmp_path / name}"
        return CliRunner().invoke(
            app, [*command.split(), *"--gradient vopd --updates 4 --save-every 2".split()]
        )

    assert "kl_rb" in shell("whole").output
    kernel, calls = distill.linear_step_kl, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return kernel(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(distill, "linear_step_kl", dies)
        assert shell("killed").exit_code == 130
    assert (tmp_path / "killed/trainer/checkpoint-2").is_dir()
    assert shell("killed").exit_code == 0
    whole, again = (pd.read_csv(tmp_path / o / "metrics.csv") for o in ("whole", "killed"))
    assert (whole.metric == again.metric).all() and {"kl_step"} < set(whole.metric)
    timed = whole.metric == "seconds"
    assert (whole.value == again.value)[~timed].all() and whole.step.max() == 4
    results = [json.loads((tmp_path / o / "result.json").read_text()) for o in ("whole", "killed")]
    assert results[0]["kl_rb"] == results[1]["kl_rb"] > 0


def test_the_notebook_is_an_experiment_of_the_sweep(tmp_path, prepared):
    template = read_template(ROOT / "nbs/experiments/distill.ipynb")
    cells = read_grid(template, dict(gradient=["rb", "k1"], teacher=["dpo"]), 2)
    assert len(cells) == 4
    given = cells[-1] | dict(prepare_dir=str(prepared), out_dir=str(tmp_path / "run"), updates=2)
    notebook = str(ROOT / "nbs/experiments/distill.ipynb")
    papermill.execute_notebook(notebook, None, parameters=given, progress_bar=False)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["gradient"] == "k1" and result["seed"] == 1 and result["kl_rb"] > 0


# The study


@pytest.mark.parametrize("method", many_distill.METHODS)
def test_the_studys_loss_is_the_one_by_hand(fixed, exact, method):
    (_, batch), (student, logp, logq) = fixed, exact
    gradient = {name: o for o, name in METHODS.items()}[method]
    mask, ids = batch["completion_mask"], batch["completion_ids"][..., None]
    picked = (o.gather(-1, ids)[..., 0] * mask for o in (logp, logq.detach()))
    step_kl = (logp.exp() * (logp - logq.detach())).sum(-1) * mask
    scores = Scores(*(o[None] for o in (*picked, mask, step_kl)))
    leaves = list(student.parameters())
    ours, theirs = (
        torch.autograd.grad(o, leaves, retain_graph=True)
        for o in (
            many_distill.surrogate(method, scores, 2),
            by_hand(gradient, logp, logq, batch, 0),
        )
    )
    assert relative(dict(enumerate(ours)), dict(enumerate(theirs))) < 1e-10


def test_the_best_rate_ends_lowest_and_is_no_rate_that_diverged():
    rows = [("rb", 1e-3, 0, 2.0), ("rb", 1e-3, 1, 1.0), ("rb", 1e-2, 0, 0.1)]
    rows += [("rb", 1e-2, 1, float("nan")), ("mc", 1e-3, 0, 3.0), ("mc", 1e-2, 0, 2.5)]
    frame = pd.DataFrame(rows, columns=["gradient", "learning_rate", "seed", "kl_rb"])
    frame = frame.assign(pair="dpo", phase="tune", update=150)
    final = frame.assign(phase="final", kl_rb=0.0, learning_rate=1.0)
    early = frame.assign(update=10, kl_rb=0.0, learning_rate=2.0)
    frame = pd.concat([frame, final, early, frame.assign(pair="half", kl_rb=0.0)])
    assert many_distill.best_rates(frame, "dpo", 150) == dict(rb=1e-3, mc=1e-2)


@pytest.fixture
def small(tmp_path, prepared, monkeypatch):
    "Run the small study on the tiny model, with other settings."
    reference = tmp_path / "reference"
    load_model("tiny-random", seed=0).save_pretrained(reference)
    TOKENIZER.save_pretrained(reference)
    tiny = dict(seeds=2, updates=2, prompts=2, max_completion_length=4, eval_prompts=3)
    tiny |= dict(evaluate_at=[0, 2], trace_at=[], methods=["rb", "mc_to_go"])
    tiny |= dict(chosen=str(ROOT / many_distill.SMALL.chosen))

    def run(**plan):
        command = f"study --small --device cpu --prepared {prepared} --out {tmp_path / 'out'}"
        command = [*command.split(), "--reference", str(reference), "--plan"]
        monkeypatch.setattr(sys, "argv", [*command, json.dumps(tiny | plan)])
        many_distill.main()

    return run


def test_the_small_study_prints_the_kl_that_it_wrote(small, tmp_path, capsys):
    small()
    *_, rb, mc, result = capsys.readouterr().out.splitlines()
    rows = pd.read_csv(tmp_path / "out/evaluation.csv").query("update == 2")
    for line, gradient in ((rb, "rb"), (mc, "mc_to_go")):
        pair, update, name, kl, seeds = line.split()
        assert (pair, update, name, seeds) == ("dpo", "2", gradient, "2")
        assert float(kl) == pytest.approx(rows[rows.gradient == gradient].kl_rb.mean(), abs=1e-5)
    assert json.loads(result)["finished"] == ["dpo"]


@pytest.mark.parametrize("plan", [dict(pairs=["dpo", "rloo"]), dict(methods=["rb", "step_kl"])])
def test_a_rate_that_was_never_chosen_is_missed_before_anything_is_run(small, tmp_path, plan):
    rates = pd.read_csv(ROOT / many_distill.SMALL.chosen).query("pair == 'dpo'")
    rates.to_csv(tmp_path / "rates.csv", index=False)
    plan |= dict(chosen=str(tmp_path / "rates.csv"))
    with pytest.raises(InputError, match="has no rate of '(rb|step_kl)' for the pair '(rloo|dpo)'"):
        small(**plan)
    assert not (tmp_path / "out/evaluation.csv").exists()


@pytest.mark.parametrize(
    "plan, said",
    [
        (dict(pairs=["dpo", "dop"]), "`pairs` has 'dop'; it must be of dpo, norms, half"),
        (dict(methods=["mc", "step_loss"]), "`methods` is mc, step_loss; it must hold rb"),
    ],
)
def test_a_plan_that_cannot_be_read_is_refused(small, plan, said):
    with pytest.raises(InputError, match=said):
        small(**plan)
