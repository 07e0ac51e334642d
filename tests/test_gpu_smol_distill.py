"The distillation of tests/gpu_smol_distill.py: the student, the scores, each arm's gradient."

import json

import gpu_smol
import gpu_smol_distill as study
import pandas as pd
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from klrb.models import pocket_folder
from klrb.rlhf.many import Arm

EOS = 0  # of the pocket tokenizer
PROMPTS = ["this movie is", "i saw", "what a", "it was the"]
PLAN = study.Plan(
    rates=(1e-3, 1e-2),
    seeds=(0,),
    updates=2,
    tune_updates=2,
    prompts=2,
    num_generations=2,
    length=4,
    evaluate_at=(0, 2),
    eval_prompts=3,
    eval_chunk=4,
    trace_batches=4,
    trace_chunk=2,
    trace_at=(0, 2),
    first_updates=2,
    first_batch=2,
    text_tokens=8,
    test_texts=4,
    sample_prompts=2,
)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=EOS,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def folders(teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "model")
    prepared = tmp_path / "prepared"
    AutoTokenizer.from_pretrained(pocket_folder()).save_pretrained(prepared)
    for name in ("rloo", "evaluation"):
        pd.DataFrame(dict(prompt=PROMPTS)).to_parquet(prepared / f"{name}_prompts.parquet")
    for name in ("lm_train", "lm_test"):
        texts = pd.DataFrame(dict(text=[f"{o} and more of it" for o in PROMPTS]))
        texts.to_parquet(prepared / f"{name}.parquet")
    return tmp_path


def options(folders, *more):
    given = "train", "--model", folders / "model", "--prepared", folders / "prepared"
    given += "--out", folders / "out", "--device", "cpu", *more
    return study.parser().parse_args([str(o) for o in given])


def loaded(folders):
    args = options(folders)
    args.out.mkdir()
    return study.load(args, PLAN)


def pruned(teacher):
    "The same student by transformers."
    config = LlamaConfig(**teacher.config.to_dict() | dict(num_hidden_layers=2))
    student = LlamaForCausalLM(config).eval()
    student.load_state_dict(teacher.state_dict(), strict=False)
    student.model.layers[1].load_state_dict(teacher.model.layers[2].state_dict())
    return student


def test_the_student_is_every_second_layer(teacher, folders):
    given, student = loaded(folders), pruned(teacher)
    ids = torch.randint(1, 4096, (2, 6))
    mask = torch.ones_like(ids, dtype=torch.bool)
    found = study.text_log_probs(given.student, given.start, ids[None], mask[None])[0]
    theirs = student(input_ids=ids).logits[:, :-1].log_softmax(-1)
    assert_close(found, theirs, rtol=1e-4, atol=1e-4)


def test_each_arm_gets_the_gradient_of_its_own_method(teacher, folders):
    "Written out for one prompt group after the other, by transformers."
    given, student = loaded(folders), pruned(teacher)
    methods = ["mc", "step_loss", "rb"]
    runs = study.Runs(given, [Arm(o, 1.0, 0, 1e-3, "linear") for o in methods], "final")
    seen = {}

    def step(arms, gradients, factor, update):
        seen.update(gradients)
        return torch.zeros(len(methods))

    runs.optimizer.step = step
    index = torch.tensor(runs.orders[0][:2]).repeat_interleave(2)[None]
    ids, mask = given.train.ids[index], given.train.mask[index]
    drawn = PLAN.length, EOS, [torch.Generator().manual_seed(1000)], torch.zeros(1).long()
    one = {name: o[:1] for name, o in runs.weights.items()}
    completions, kept = (o[0] for o in gpu_smol.sample(given.student, one, ids, mask, *drawn))
    runs.update()
    rows = []
    for i in range(4):
        prompt = ids[0, i][mask[0, i]]
        length = int(kept[i].sum())
        whole = torch.cat([prompt, completions[i, :length]])[None]
        logp, logq = (
            o(input_ids=whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            for o in (student, teacher)
        )
        token = completions[i, :length, None]
        ratio = (logp - logq.detach()).gather(-1, token)[:, 0]
        kl = (logp.exp() * (logp - logq.detach())).sum(-1)
        rows.append((logp.gather(-1, token)[:, 0], ratio.detach(), kl))
    for arm, method in enumerate(methods):
        total = 0.0
        for i, (logp, ratio, kl) in enumerate(rows):
            other_logp, other_ratio, other_kl = rows[i ^ 1]  # the same prompt's other completion
            if method == "mc":
                weight = ratio.sum() - other_ratio.sum()
                total = total + (weight * logp).sum()
            else:
                total = total + kl.sum()
            if method == "rb":
                for n in range(len(kl)):
                    weight = kl[n + 1 :].sum() - other_kl[n + 1 :].sum()
                    total = total + weight.detach() * logp[n]
        expected = torch.autograd.grad(total / 4, list(student.parameters()), retain_graph=True)
        for (name, _), want in zip(student.named_parameters(), expected):
            assert_close(seen[name][arm], want, rtol=2e-3, atol=2e-4)


def test_a_small_study_writes_its_tables(folders):
    args = options(folders)
    study.train(args, PLAN)
    table = pd.read_csv(args.out / "evaluation.csv")
    assert set(table.gradient) == set(PLAN.methods)
    begin = table.query("phase == 'final' and update == 0")
    assert begin.kl_rb.nunique() == 1 and (begin.kl_rb > 0).all()  # one start, one noise
    assert (table.kl_stderr > 0).all()
    assert len(pd.read_csv(args.out / "perplexity.csv")) == len(PLAN.methods)
    assert set(pd.read_csv(args.out / "samples.csv").model) == {"start", "teacher", *PLAN.methods}
    noise = pd.read_csv(args.out / "noise.csv")
    assert sorted(set(noise["update"])) == [0, 2]
    assert (noise.query("gradient == 'rb'").to_rb == 1).all()
    result = json.loads((args.out / "result.json").read_text())
    assert result["updates"] == 2
    assert set(result["perplexity"]) == {"teacher", "half", "start"}


def test_what_is_there_when_the_time_is_up(folders):
    args = options(folders, "--seconds", 0)
    study.train(args, PLAN)
    table = pd.read_csv(args.out / "evaluation.csv")
    assert set(table["update"]) == {0} and set(table.phase) == {"tune", "final"}


def test_off_policy_training_lowers_its_loss(folders):
    given = loaded(folders)
    plan = study.replace(PLAN, first_updates=30, first_rate=3e-3, first_batch=4)
    texts = study.Texts(given.tokenizer, PROMPTS, 8, "cpu")
    args = given.student, given.start, given.teacher, given.teacher_weights, texts, plan
    losses = study.first_stage(*args)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_texts_that_cannot_end(folders):
    "No end is drawn, and the KL has none: by transformers, with that logit far below."
    args = options(folders)
    plan = study.replace(PLAN, ends=False, rates=(1e-3,), trace_at=())
    study.train(args, plan)
    table = pd.read_csv(args.out / "evaluation.csv")
    assert (table.length == plan.length).all() and set(table.phase) == {"final"}
    given = study.load(args, plan)
    ids, mask = (o[:1].expand(1, 2, -1) for o in (given.train.ids, given.train.mask))
    completions = torch.randint(1, 4096, (1, 2, 3))
    rollouts = ids, mask, completions, torch.ones_like(completions, dtype=torch.bool)
    found = given.scores(given.start, rollouts)
    teacher = LlamaForCausalLM.from_pretrained(folders / "model").eval()
    for row in range(2):
        prompt = ids[0, row][mask[0, row]]
        whole = torch.cat([prompt, completions[0, row]])[None]
        logits = [
            o(input_ids=whole).logits[0, len(prompt) - 1 : -1] for o in (pruned(teacher), teacher)
        ]
        logp, logq = (o.index_fill(-1, torch.tensor(EOS), -1e30).log_softmax(-1) for o in logits)
        kl = (logp.exp() * (logp - logq)).sum(-1)
        assert_close(found.step_kl[0, row], kl, rtol=1e-3, atol=1e-4)
