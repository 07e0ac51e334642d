"""The doctor: its data against the libraries' sources, and configs of every kind.

Where a library is installed, its defaults are compared; the method of a config is that of the table
of libraries, and its bias that of an enumeration.
"""

import dataclasses
import json
import re

import pytest
from test_measure import check_error
from typer.testing import CliRunner

from klrb.cli import app
from klrb.doctor import (
    FACTS,
    NAMES,
    diagnose,
    holds,
    plain_value,
    read_words,
    rules,
    toy_bias,
    trainers,
)
from klrb.exact import TabularLM, enumerate_rollouts, exact_kl_gradient
from klrb.gradients import GRADIENTS
from klrb.libraries import library_rows
from klrb.steps import k3

A, R, DL = (
    "actor_rollout_ref.actor.",
    "actor_rollout_ref.rollout.",
    "distillation.distillation_loss.",
)
REWARD = ["algorithm.use_kl_in_reward=True"]
LOSS = [f"{A}use_kl_loss=True"]
ON = [f"{A}ppo_mini_batch_size=1024"]  # one update per batch
DISTILL = ["distillation.enabled=True"]
OPEN = ["--rollout.batch_size", "128"]  # one update per batch

# trainer, words, place, method, on-policy, parts of problems
CONFIGS = {
    # TRL
    "RLOO's default": ("rloo", [], "reward", "mc", True, []),
    "RLOO without KL": ("rloo", ["--beta", "0"], "none", "none", True, []),
    "RLOO, normalised": (
        "rloo",
        ["--normalize_advantages"],
        "reward",
        "mc",
        True,
        ["standard deviation"],
    ),
    "RLOO, two updates": ("rloo", ["--num_iterations", "2"], "reward", "mc", False, []),
    "RLOO, stale": ("rloo", ["--steps_per_generation=4"], "reward", "mc", False, []),
    "RLOO, accumulating": (
        "rloo",
        ["--steps_per_generation=4", "--gradient_accumulation_steps=4"],
        "reward",
        "mc",
        True,
        [],
    ),
    "RLOO, open": ("rloo", ["--generation_batch_size", "64"], "reward", "mc", None, []),
    "RLOO, top_p": ("rloo", ["--top_p", "0.95"], "reward", "mc", True, ["`top_p` = 0.95"]),
    "RLOO, top_k": ("rloo", ["--top_k", "50"], "reward", "mc", True, ["50 likeliest"]),
    "RLOO, min_p": ("rloo", ["--min_p", "0.1"], "reward", "mc", True, ["`min_p` = 0.1"]),
    "RLOO, penalty": (
        "rloo",
        ["--repetition_penalty", "1.1"],
        "reward",
        "mc",
        True,
        ["repetition penalty"],
    ),
    "RLOO, hidden penalty": (
        "rloo",
        ["generation_kwargs.presence_penalty=0.5"],
        "reward",
        "mc",
        True,
        ["presence_penalty = 0.5"],
    ),
    "RLOO, one side's temperature": (
        "rloo",
        ["generation_kwargs.temperature=0.7"],
        "reward",
        "mc",
        True,
        ["on one side"],
    ),
    "RLOO, vLLM": ("rloo", ["--use_vllm"], "reward", "mc", True, ["differ a little"]),
    "RLOO, truncated": (
        "rloo",
        ["--mask_truncated_completions"],
        "reward",
        "mc",
        True,
        ["cost nothing"],
    ),
    "GRPO's default": ("grpo", [], "none", "none", True, []),
    "GRPO with KL": ("grpo", ["--beta", "0.04"], "loss", "k2_loss", True, []),
    "GRPO, old form": (
        "grpo",
        ["--beta", "0.04", "--use_bias_correction_kl", "false"],
        "loss",
        "k3_loss",
        True,
        [],
    ),
    "GRPO, sequence ratio": (
        "grpo",
        ["--beta=0.04", "--importance_sampling_level=sequence"],
        "loss",
        "other",
        True,
        [],
    ),
    "GRPO, vLLM": ("grpo", ["--beta=0.04", "--use_vllm"], "loss", "k2_loss", True, ["not the KL"]),
    "GRPO, several updates": (
        "grpo",
        ["--beta=0.04", "--num_iterations=4"],
        "loss",
        "k2_loss",
        False,
        [],
    ),
    "distillation's default": ("distillation", [], "distillation", "step_loss", True, []),
    "distillation, forward": (
        "distillation",
        ["--beta", "0"],
        "distillation",
        "other",
        True,
        [],
    ),
    "distillation, JSD": ("distillation", ["--beta", "0.5"], "distillation", "other", True, []),
    # verl
    "verl's default": ("verl", [], "none", "none", False, []),
    "verl, PPO with KL in the reward": (
        "verl",
        REWARD + ON,
        "reward",
        "mc_to_go",
        True,
        ["whitened"],
    ),
    "verl, RLOO": (
        "verl",
        REWARD + ON + ["algorithm.adv_estimator=rloo", f"{R}n=8"],
        "reward",
        "mc",
        True,
        [],
    ),
    "verl, GRPO in the reward": (
        "verl",
        REWARD + ON + ["algorithm.adv_estimator=grpo", f"{R}n=8"],
        "reward",
        "mc",
        True,
        ["standard deviation"],
    ),
    "verl, Dr. GRPO in the reward": (
        "verl",
        REWARD
        + ON
        + [
            "algorithm.adv_estimator=grpo",
            f"{R}n=8",
            "algorithm.norm_adv_by_std_in_grpo=False",
        ],
        "reward",
        "mc",
        True,
        [],
    ),
    "verl, REINFORCE++": (
        "verl",
        REWARD + ON + ["algorithm.adv_estimator=reinforce_plus_plus"],
        "reward",
        "mc_to_go",
        True,
        ["whitened"],
    ),
    "verl, k3 in the reward": (
        "verl",
        REWARD + ON + ["algorithm.kl_penalty=low_var_kl", "algorithm.adv_estimator=remax"],
        "reward",
        "k3_reward",
        True,
        [],
    ),
    "verl, k2 in the reward": (
        "verl",
        REWARD + ON + ["algorithm.kl_penalty=mse", "algorithm.adv_estimator=remax"],
        "reward",
        "other",
        True,
        [],
    ),
    "verl, full": (
        "verl",
        REWARD + ON + ["algorithm.kl_penalty=full", "algorithm.adv_estimator=remax"],
        "none",
        "none",
        True,
        [],
    ),
    "verl, discounted": (
        "verl",
        REWARD + ON + ["algorithm.gamma=0.99", "algorithm.adv_estimator=remax"],
        "reward",
        "mc_to_go",
        True,
        ["discounted"],
    ),
    "verl, GRPO example": (
        "verl",
        LOSS + ["algorithm.adv_estimator=grpo", f"{R}n=5"],
        "loss",
        "k3_loss",
        False,
        [],
    ),
    "verl, k3+": ("verl", LOSS + ON + [f"{A}kl_loss_type=k3+"], "loss", "k2_loss", True, []),
    "verl, k2": ("verl", LOSS + ON + [f"{A}kl_loss_type=mse"], "loss", "k2_loss", True, []),
    "verl, k1 in the loss": (
        "verl",
        LOSS + ON + [f"{A}kl_loss_type=kl"],
        "loss",
        "k1_loss",
        True,
        [],
    ),
    "verl, abs": ("verl", LOSS + ON + [f"{A}kl_loss_type=abs"], "loss", "other", True, []),
    "verl, no weight": ("verl", LOSS + ON + [f"{A}kl_loss_coef=0"], "none", "none", True, []),
    "verl, twice": (
        "verl",
        REWARD + LOSS + ON + ["algorithm.adv_estimator=remax"],
        "reward",
        "mc_to_go",
        True,
        ["counts twice"],
    ),
    "verl, top_p": ("verl", LOSS + ON + [f"{R}top_p=0.9"], "loss", "k3_loss", True, ["0.9"]),
    "verl, lonely GRPO": (
        "verl",
        LOSS + ON + ["algorithm.adv_estimator=grpo"],
        "loss",
        "k3_loss",
        True,
        ["no group"],
    ),
    "verl, distillation": ("verl", DISTILL + ON, "distillation", "k3_loss", True, []),
    "verl, distillation by policy gradient": (
        "verl",
        DISTILL + ON + [f"{DL}use_policy_gradient=True", f"{DL}loss_mode=k1"],
        "distillation",
        "k2_loss",
        True,
        [],
    ),
    "verl, a cooler teacher": (
        "verl",
        DISTILL + ON + ["distillation.teacher_models.teacher_model.inference.temperature=0.7"],
        "distillation",
        "k3_loss",
        True,
        ["on one side"],
    ),
    "verl, both cooler": (
        "verl",
        DISTILL + ON + [f"{R}temperature=0.7"],
        "distillation",
        "k3_loss",
        True,
        [],
    ),
    # OpenRLHF
    "OpenRLHF's default": (
        "openrlhf",
        [],
        "reward",
        "mc_to_go",
        False,
        ["standard deviation"],
    ),
    "OpenRLHF, healthy": (
        "openrlhf",
        OPEN + ["--algo.advantage.no_std_norm"],
        "reward",
        "mc_to_go",
        True,
        [],
    ),
    "OpenRLHF, k3 in the reward": (
        "openrlhf",
        OPEN + ["--algo.kl.estimator", "k3", "--algo.advantage.no_std_norm"],
        "reward",
        "k3_reward",
        True,
        [],
    ),
    "OpenRLHF, k2 in the reward": (
        "openrlhf",
        OPEN + ["--algo.kl.estimator", "k2", "--algo.advantage.no_std_norm"],
        "reward",
        "other",
        True,
        [],
    ),
    "OpenRLHF, k3 in the loss": (
        "openrlhf",
        OPEN + ["--algo.kl.use_loss", "--algo.kl.estimator", "k3"],
        "loss",
        "k3_loss",
        True,
        [],
    ),
    "OpenRLHF, k1 in the loss": (
        "openrlhf",
        OPEN + ["--algo.kl.use_loss"],
        "loss",
        "k1_loss",
        True,
        [],
    ),
    "OpenRLHF, unbiased_gradient": (
        "openrlhf",
        OPEN + ["--algo.kl.use_loss", "--algo.kl.unbiased_gradient"],
        "loss",
        "k2_loss",
        True,
        [],
    ),
    "OpenRLHF, unbiased_gradient for nothing": (
        "openrlhf",
        OPEN + ["--algo.kl.unbiased_gradient", "--algo.advantage.no_std_norm"],
        "reward",
        "mc_to_go",
        True,
        ["does nothing here"],
    ),
    "OpenRLHF, no KL": (
        "openrlhf",
        OPEN + ["--algo.kl.init_coef", "0"],
        "none",
        "none",
        True,
        [],
    ),
    "OpenRLHF, asynchronous": (
        "openrlhf",
        OPEN + ["--train.async_enable", "--algo.advantage.no_std_norm"],
        "reward",
        "mc_to_go",
        False,
        [],
    ),
    "OpenRLHF, GRPO": (
        "openrlhf",
        [
            *("--algo.advantage.estimator", "group_norm", "--rollout.n_samples_per_prompt", "8"),
            *("--rollout.batch_size", "16", "--rollout.top_p", "0.9"),
        ],
        "reward",
        "mc_to_go",
        True,
        ["`top_p` = 0.9"],
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case):
    name, words, place, method, on_policy, problems = CONFIGS[case]
    found = diagnose(name, words)
    assert (found.place, found.method) == (place, method)
    start = {True: "on-policy", False: "off-policy", None: "open"}[on_policy]
    assert found.sampling.text.startswith(start) and bool(found.sampling.fix) == (not on_policy)
    texts = [o.text for o in found.problems]
    assert len(texts) == len(problems) and all(a in b for a, b in zip(problems, texts)), texts
    known = method in GRADIENTS
    assert found.bias == (toy_bias(method) if known else None)
    unbiased = None if method == "none" else known and GRADIENTS[method].unbiased
    assert found.unbiased is unbiased and not found.unknown
    assert found.healthy == (unbiased is True and on_policy is True and not problems)
    everything = [found.kl, found.baseline, found.sampling]
    everything += [*found.problems, *found.notes, *found.fine]
    assert all(o.source for o in everything)
    assert not re.search(r"\{[a-z]", repr(found))  # every name has been replaced
    assert json.loads(json.dumps(found.to_json()))["method"] == method


def test_there_is_every_default_and_enough():
    assert len(CONFIGS) >= 30
    assert {name for name, words, *_ in CONFIGS.values() if not words} == set(NAMES)


def test_the_bias_is_that_of_an_enumeration():
    "k3 differentiated over all strings by hand, against what the doctor says"
    policy, reference = TabularLM(2, 3, seed=0), TabularLM(2, 3, seed=1)
    r = enumerate_rollouts(policy, reference)
    weight = (r.policy_logprobs * r.mask).sum(-1).exp().detach()
    policy.zero_grad()
    loss = (weight * (k3(r.policy_logprobs, r.ref_logprobs) * r.mask).sum(-1)).sum()
    loss.backward()
    wrong, right = policy.table.grad, exact_kl_gradient(policy, reference)
    right = right if hasattr(right, "norm") else right[0]
    assert toy_bias("k3_loss") == pytest.approx(
        ((wrong - right).norm() / right.norm()).item(), rel=1e-9
    )


# ---- the data ----


def test_rules_speak_of_settings_that_exist():
    for rule in rules():
        keys = trainers()[rule.trainer].keys | FACTS
        for condition in filter(None, rule.when.split("; ")):
            left = re.split(r"<=|>=|!=|=|<|>", condition, maxsplit=1)[0]
            assert all(o in keys for o in left.split(" * ")), condition
        for name in re.findall(r"\{([\w.]+)\}", rule.text + rule.fix):
            assert name in keys, (rule.text, name)
        assert rule.source and rule.kind in (
            "kl",
            "baseline",
            "sampling",
            "problem",
            "note",
            "fine",
        )
        if rule.kind == "kl":
            assert rule.method in {*GRADIENTS, "other", "none"}
            assert rule.place in ("reward", "loss", "distillation", "none")


@pytest.mark.parametrize("name", ["RLOO", "GRPO", "Distillation"])
def test_settings_are_those_of_the_installed_trl(name):
    trl = pytest.importorskip("trl")
    config, known = getattr(trl, f"{name}Config"), trainers()[f"{name}Trainer"]
    if trl.__version__ != known.version:
        pytest.skip(f"TRL {trl.__version__} is installed, {known.version} was read")
    for o in dataclasses.fields(config):
        assert o.name in known.keys, o.name
        if isinstance(o.default, (str, int, float)):
            assert known.keys[o.name] == o.default, o.name


def as_words(row):
    "A configuration that meets the conditions of a row of the table of libraries"
    owner = dict(TRL=row.trainer, verl="verl", OpenRLHF="OpenRLHF")[row.library]
    given = {}
    for name, sign, values in row.conditions:
        full = next(o for o in trainers()[owner].keys if o == name or o.endswith(f".{name}"))
        given[full] = "0.05" if sign == "!=" else values[0]
    if row.place == "distillation" and row.library == "verl":
        given["distillation.enabled"] = "True"
    if "algorithm.kl_penalty" in given:
        given["algorithm.use_kl_in_reward"] = "True"
    return owner, [f"{k}={v}" for k, v in given.items()]


ROWS = [
    o
    for o in library_rows()
    if (o.library, o.version) in {("TRL", "1.16.0"), ("verl", "0.9.1"), ("OpenRLHF", "0.11.2")}
    and o.trainer not in ("OnlineDPOTrainer", "IWOPDTrainer")
]


@pytest.mark.parametrize("row", ROWS, ids=[f"{o.library}, {o.setting}" for o in ROWS])
def test_methods_are_those_of_the_table_of_libraries(row):
    owner, words = as_words(row)
    found = diagnose(next(k for k, o in NAMES.items() if o == owner), words)
    assert (found.method, found.place) == (row.method, row.place)


def test_conditions():
    settings = dict(p=0.9, b=True, n=None, s="K3", k=4, m=8)
    true = ("p<1", "b=true", "n=null", "s=k1|k3", "k * k>m", "k<m", "n!=0", "k!=m", "m>=8", "k<=4")
    false = ("p>1", "b=1", "n=0", "n<1", "n>0", "s!=k3", "k * n>m", "s<3", "b<2", "k=5|6")
    assert all(holds(o, settings) for o in true)
    assert not any(holds(o, settings) for o in false)


@pytest.mark.parametrize(
    "text, value",
    [
        *(("True", True), ("false", False), ("null", None), ("None", None), ("", None)),
        *(("1e-6", 1e-6), ("3", 3), ("'k3'", "k3"), ("0.10", 0.1), ("k3+", "k3+")),
    ],
)
def test_words_are_values(text, value):
    found = plain_value(text)
    assert found == value and type(found) is type(value)


def test_command_lines():
    words = ["--beta", "-0.5", "--flag", "--x=1", "--list", "1", "2", "--on", "a.b=3"]
    found = read_words(words)
    assert found.pop("on") == "a.b=3"  # a flag takes the word behind it, as argparse has it
    assert found == dict(beta=-0.5, flag=True, x=1, list=[1, 2])
    assert read_words(["--beta", "1", "a.b=3"]) == {"beta": 1, "a.b": 3}
    assert read_words(["a.b=k3", "++c=2", "d="]) == {"a.b": "k3", "c": 2, "d": None}


# ---- files ----

VERL = """
algorithm:
  adv_estimator: rloo
  use_kl_in_reward: true
data:
  train_batch_size: 256
actor_rollout_ref:
  rollout:
    n: 8
    engine_kwargs:
      vllm:
        swap_space: 4
"""
SCRIPT = """#!/bin/bash
set -x
KL=low_var_kl
python3 -m verl.trainer.main_ppo \\
    algorithm.adv_estimator=grpo \\
    data.train_files=$HOME/data/train.parquet \\
    actor_rollout_ref.actor.use_kl_loss=True \\
    actor_rollout_ref.actor.kl_loss_type=$KL \\
    actor_rollout_ref.rollout.n=5 $@
"""


def test_files(tmp_path):
    (tmp_path / "verl.yaml").write_text(VERL)
    found = diagnose(tmp_path / "verl.yaml")
    assert found.method == "mc" and found.healthy
    (tmp_path / "trl.json").write_text(json.dumps(dict(beta=0.04, use_bias_correction_kl=False)))
    assert diagnose(tmp_path / "trl.json").method == "k3_loss"
    (tmp_path / "trl.yaml").write_text("beta: 1e-2\nnum_generations: 4\n")
    found = diagnose(tmp_path / "trl.yaml", trainer="rloo")
    assert found.method == "mc" and "`beta` = 0.01" in found.kl.text
    (tmp_path / "run.sh").write_text(SCRIPT)
    found = diagnose(tmp_path / "run.sh")
    assert found.trainer.name == "verl" and found.method == "k3_loss" and not found.unknown
    (tmp_path / "open.sh").write_text(
        "ray job submit -- python3 -m openrlhf.cli.train_ppo_ray --algo.kl.use_loss "
        "--algo.kl.estimator k2 --train.batch_size 1024 # a comment\n"
    )
    assert diagnose(tmp_path / "open.sh").method == "k2_loss"
    (tmp_path / "trl.sh").write_text("trl grpo --beta 0.1 --model_name_or_path m --top_p 0.9\n")
    found = diagnose(tmp_path / "trl.sh")
    assert found.method == "k2_loss" and len(found.problems) == 1


def test_config_objects(tmp_path):
    trl = pytest.importorskip("trl")
    where = dict(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True)
    found = diagnose(trl.RLOOConfig(**where))
    assert found.method == "mc" and found.healthy
    config = trl.RLOOConfig(generation_kwargs=dict(top_k=9), steps_per_generation=8, **where)
    found = diagnose(config)
    assert "top_k = 9" in found.problems[0].text and found.sampling.text.startswith("off-policy")
    assert diagnose(trl.GRPOConfig(beta=0.1, **where)).method == "k2_loss"
    with pytest.raises(TypeError, match="is a DPOConfig"):
        diagnose(trl.DPOConfig(**where))


def test_unknown_settings_are_named_and_not_read():
    found = diagnose("openrlhf", ["--algo.kl.estimater", "k3", "--init_kl_coef", "0"])
    assert found.method == "mc_to_go"  # the default, since neither is a setting
    assert found.unknown == {"algo.kl.estimater": "algo.kl.estimator", "init_kl_coef": ""}
    found = diagnose("rloo", ["generation_kwargs.typical_p=0.9"])
    assert list(found.unknown) == ["generation_kwargs.typical_p"] and not found.healthy
    assert not diagnose("verl", [f"{R}engine_kwargs.vllm.swap_space=4"]).unknown
    assert "unknown   init_kl_coef" in repr(diagnose("openrlhf", ["--init_kl_coef", "0"]))


def test_padding_that_is_the_end_token_is_looked_at():
    for name in ("rloo", "grpo", "verl", "openrlhf"):
        assert any(
            "padding is the end token" in o.text for o in diagnose(name, pad_is_eos=True).fine
        )
        assert not any("padding" in o.text for o in diagnose(name, pad_is_eos=False).fine)


BAD = {
    "nothing there": (["nowhere.yaml"], "which is no file"),
    "another kind of file": (["notes.txt"], "must be a .yaml, .json or .sh file"),
    "broken YAML": (["broken.yaml"], "which is no yaml"),
    "broken JSON": (["broken.json"], "which is no json"),
    "a list": (["list.json"], "holds no settings by name"),
    "an empty file": (["empty.yaml"], "holds no settings by name"),
    "settings of nobody": (["nobody.yaml"], "no setting that"),
    "settings of several": (["several.yaml"], "say which with `trainer`"),
    "another trainer": (["several.yaml", "--trainer", "ppo"], "must be one of rloo, grpo"),
    "a script of something else": (["other.sh"], "no command in it starts"),
    "a broken script": (["broken.sh"], "which is no shell script"),
    "a word": (["grpo", "beta"], "the word 'beta', which is no setting"),
    "set elsewhere": (["elsewhere.sh"], "`algorithm.adv_estimator` is '$ADV', which is set else"),
    "no tokenizer": (["grpo", "--tokenizer", "./nowhere"], "no such file or folder"),
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "notes.txt": "beta: 1",
        "broken.yaml": "a: [1",
        "broken.json": "{",
        "list.json": "[1]",
        "empty.yaml": "",
        "nobody.yaml": "colour: red",
        "several.yaml": "beta: 0.1",
        "other.sh": "python train.py --beta 1",
        "broken.sh": "echo 'x",
        "elsewhere.sh": "python -m verl.trainer.main_ppo algorithm.adv_estimator=$ADV",
    }.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(files, case):
    words, message = BAD[case]
    check_error(CliRunner().invoke(app, ["doctor", *words]), message)


def test_the_command(files):
    healthy = CliRunner().invoke(app, ["doctor", "rloo"])
    assert healthy.exit_code == 0 and "gradient mc" in healthy.stdout
    assert CliRunner().invoke(app, ["doctor", "grpo"]).exit_code == 0  # no KL, nothing wrong
    ill = CliRunner().invoke(app, ["doctor", "grpo", "--beta", "0.04", "--json"])
    assert ill.exit_code == 1 and json.loads(ill.stdout)["method"] == "k2_loss"
    given = CliRunner().invoke(app, ["doctor", "several.yaml", "--trainer", "rloo", "--top_p=0.5"])
    assert given.exit_code == 1 and "`top_p` = 0.5" in given.stdout
    padding = CliRunner().invoke(app, ["doctor", "rloo", "--tokenizer", "pocket"])
    assert padding.exit_code == 0
    set_here = CliRunner().invoke(app, ["doctor", "elsewhere.sh", "algorithm.adv_estimator=rloo"])
    assert "rollout.n=8" in set_here.stdout
