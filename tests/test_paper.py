"""The paper's profile without Hub and GPU: stand-ins of its models in the Hub's own format and
cache, profiles from files,
several processes, and what is said where something is missing.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import huggingface_hub
import pandas as pd
import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForSequenceClassification,
    BertTokenizer,
    DistilBertConfig,
    GPT2Config,
    GPT2LMHeadModel,
)
from typer.testing import CliRunner

import klrb.rlhf.training
from klrb.cli import app
from klrb.compare.prompts import read_prompts
from klrb.models import load_model, load_tokenizer
from klrb.sweeps.notebooks import make_runs, write_template
from klrb.sweeps.parameters import read_template
from klrb.rlhf.profiles import PROFILES, check_downloads, get_profile, to_toml
from klrb.rlhf.reviews import load_reviews, make_prompts, split_reviews
from klrb.rlhf.reward import SequenceClassifierReward
from klrb.rlhf.training import _batch_per_process, train_rloo
from klrb.rloo import RBRLOOConfig
from klrb.files import write_atomic
from klrb.sweeps.study import estimate_study
from klrb.sweeps.sweep import SweepFailed, retry, sweep
from test_study import no_kernel, write_notebook  # noqa: F401, a fixture
from trainers import CPU, PROMPTS, count_e

ROOT = Path(__file__).resolve().parents[1]
TINY = """base = "paper"
device = "cpu"
max_completion_length = 6
batch_size = 8
updates = 6
learning_rate = 1e-3
eval_prompts = 6
eval_completions = 2
dpo_prompts = 12
dpo_pairs = 32
dpo_batch_size = 8
dpo_learning_rate = 1e-2
variance_prompts = 4
variance_completions = 6
variance_sizes = [1, 2]
gradient_batches = 3
betas = [0.07]
seeds = 1
"""


# Stand-ins of the paper's repositories, laid out as the Hub's client caches them


def snapshot(cache, kind, name, revision):
    "Folder of a revision in a cache, empty"
    folder = cache / f"{kind}s--{name.replace('/', '--')}"
    commit = f"{abs(hash(name)):040x}"[-40:]
    (folder / "refs" / revision).parent.mkdir(parents=True)
    (folder / "refs" / revision).write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    return folder / "snapshots" / commit


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    cache = tmp_path_factory.mktemp("hub")
    gpt2 = snapshot(cache, "model", "lvwerra/gpt2-imdb", "refs/pr/1")
    known = json.loads(load_tokenizer("pocket").backend_tokenizer.to_str())[
        "model"
    ]  # GPT-2's own form: no padding token, two files
    (gpt2 / "vocab.json").write_text(json.dumps(known["vocab"] | {"<|endoftext|>": 0}))
    (gpt2 / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in known["merges"])
    )
    (gpt2 / "tokenizer_config.json").write_text('{"max_len": 1024}')
    end = "<|endoftext|>"
    (gpt2 / "special_tokens_map.json").write_text(
        json.dumps(dict(bos_token=end, eos_token=end, unk_token=end))
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=4096,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=2,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).save_pretrained(gpt2)
    bert = snapshot(cache, "model", "lvwerra/distilbert-imdb", "refs/pr/5")
    words = (
        "[PAD] [UNK] [CLS] [SEP] [MASK] the a e film movie was and great awful . , t h i s o n r"
    )
    words = [*words.split(), "##e", "##s", "##t", "##a", "##n"]
    (bert / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(bert / "vocab.txt")).save_pretrained(bert)
    config = DistilBertConfig(
        vocab_size=len(words),
        dim=16,
        hidden_dim=32,
        n_layers=1,
        n_heads=2,
        num_labels=2,
        initializer_range=1.0,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(bert)
    imdb = snapshot(cache, "dataset", "stanfordnlp/imdb", "main") / "plain_text"
    imdb.mkdir()
    reviews = load_reviews("synthetic").to_pandas()
    for split in ("train", "test", "unsupervised"):
        reviews.to_parquet(imdb / f"{split}-00000-of-00001.parquet", index=False)
    return cache


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    return tmp_path / "tiny.toml"


def offline(hub):
    return dict(
        os.environ,
        HF_HUB_CACHE=str(hub),
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_VERBOSITY="error",
        PYTHONPATH=str(ROOT),
        OMP_NUM_THREADS="1",
    )


@pytest.fixture
def prepared(hub, tmp_path):
    "What a run reads of a preparation, with the reference's own tokenizer"
    folder = tmp_path / "prepare"
    folder.mkdir()
    splits, tokenizer = (
        split_reviews(load_reviews("synthetic")),
        load_tokenizer(str(next(hub.glob("*gpt2-imdb/snapshots/*")))),
    )
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    for name in ("rloo", "evaluation"):
        make_prompts(splits[name], tokenizer, 6).to_parquet(folder / f"{name}_prompts.parquet")
    return folder


def test_two_processes_make_a_run_of_each_arm(hub, prepared, tiny, tmp_path):
    """`accelerate launch`, gloo on the CPU, models from a cache that the paper's ids and revisions
    find, four updates per batch."""
    script = tmp_path / "arms.py"
    script.write_text(
        "from klrb.cli import app\nfor arm in ('mc', 'rb'): app(['rloo', '--profile', "
        "'tiny.toml', '--prepare-dir', 'prepare', "
        "'--estimator', arm, '--out', arm], standalone_mode=False)"
    )
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    launch += " --mixed_precision no --dynamo_backend no"
    done = subprocess.run(
        [sys.executable, *launch.split(), "--main_process_port", "0", str(script)],
        env=offline(hub),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("kl_rb") == 2  # one process speaks
    for arm in ("mc", "rb"):
        files = {path.name for path in (tmp_path / arm).iterdir()}
        assert files == {
            "params.json",
            "environment.json",
            "metrics.csv",
            "evaluation.csv",
            "result.json",
        }
        assert json.loads((tmp_path / arm / "environment.json").read_text())["processes"] == 2
        metrics = pd.read_csv(tmp_path / arm / "metrics.csv")
        assert not metrics.duplicated(["step", "metric"]).any()  # written once
        metrics = metrics.pivot(index="step", columns="metric", values="value")
        per_update, per_batch = (
            ["loss", "grad_norm", "clip_ratio", "entropy", "seconds"],
            ["reward", "kl_sequence_rb", "kl_sequence_mc", "objective"],
        )
        assert (
            metrics.index.tolist() == [1, 2, 3, 4, 5, 6] and metrics[per_update].notna().all().all()
        )
        assert (
            metrics.index[metrics.reward.notna()].tolist() == [1, 5]
            and not metrics[per_batch].loc[[2, 3, 4, 6]].notna().any().any()
        )
        assert (
            metrics.kl_sequence_rb[1] == pytest.approx(0, abs=1e-5)
            and metrics.kl_sequence_rb[5] > 1e-4
        )
        assert_close(
            metrics.objective[5],
            metrics.reward[5] - 0.07 * metrics.kl_sequence_rb[5],
            rtol=1e-4,
            atol=1e-5,
        )
        result, frame = (
            json.loads((tmp_path / arm / "result.json").read_text()),
            pd.read_csv(tmp_path / arm / "evaluation.csv"),
        )
        assert (
            len(frame) == 6 * 2
            and result["kl_rb"] == pytest.approx(frame.kl_rb.mean(), rel=1e-4)
            and result["kl_estimator"] == arm
        )
        assert all(math.isfinite(value) for value in result.values() if not isinstance(value, str))


@pytest.mark.slow
def test_a_whole_study_of_stand_ins(hub, tiny, tmp_path):
    """`klrb study` from preparation to report, about a minute and a half."""
    command = [
        sys.executable,
        "-m",
        "klrb.cli",
        "study",
        "--profile",
        str(tiny),
        "--out",
        str(tmp_path / "out"),
        "--notebooks",
        str(ROOT / "nbs/experiments"),
    ]
    done = subprocess.run(command, env=offline(hub), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert done.stdout.startswith("study 'tiny', estimated time") and "2 of 2 runs" in done.stdout
    results = [
        json.loads(path.read_text()) for path in (tmp_path / "out" / "rloo").glob("*/result.json")
    ]
    assert {result["kl_estimator"] for result in results} == {"mc", "rb"} and all(
        result["profile"] == "tiny" for result in results
    )
    assert (tmp_path / "out" / "report" / "sweep.csv").is_file()
    again = subprocess.run(command, env=offline(hub), capture_output=True, text=True, timeout=900)
    assert "0 of 2 runs" in again.stdout and "3 of 3 runs are finished already" in again.stdout


def test_processes_share_the_batch(monkeypatch):
    paper = get_profile("paper")
    for processes, each in ((1, 32), (2, 16), (16, 2)):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        assert _batch_per_process(paper) == each
    for processes in (3, 32):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        with pytest.raises(ValueError, match="number of processes that divides 16"):
            _batch_per_process(paper)


# Devices


def test_everything_goes_to_the_device(prepared, monkeypatch):
    moved = []

    class Model:
        def __init__(self, name):
            self.name = name

        def to(self, device):
            moved.append((self.name, device))
            return self

    monkeypatch.setattr(klrb.rlhf.training, "load_model", Model)
    monkeypatch.setattr(klrb.rlhf.training, "load_tokenizer", lambda name: load_tokenizer("pocket"))
    monkeypatch.setattr(
        klrb.rlhf.training, "load_reward", lambda name, folder, device: moved.append((name, device))
    )
    paper, device = get_profile("paper"), torch.device("cuda", 1)
    klrb.rlhf.training._load(paper, prepared, "dpo", device)
    assert moved == [
        (str(prepared / "dpo_policy"), device),
        (paper.model, device),
        (paper.reward, "cuda:1"),
    ]


def test_mixed_precision_ends_with_the_training(tmp_path):
    policy, reference = load_model("tiny-random", seed=1), load_model("tiny-random", seed=0)
    config = RBRLOOConfig(
        str(tmp_path),
        beta=0.3,
        per_device_train_batch_size=8,
        num_generations=2,
        max_completion_length=6,
        max_steps=1,
        logging_steps=1,
        **CPU | dict(bf16=True),
    )
    trained = train_rloo(
        policy,
        reference,
        load_tokenizer("tiny-random"),
        PROMPTS,
        count_e,
        config,
        tmp_path / "metrics.csv",
    )
    ids, fresh = torch.arange(8)[None], load_model("tiny-random")
    fresh.load_state_dict(trained.state_dict())
    with torch.no_grad():
        assert_close(trained(input_ids=ids).logits, fresh(input_ids=ids).logits, rtol=0, atol=0)
        assert_close(
            reference(input_ids=ids).logits,
            load_model("tiny-random", seed=0)(input_ids=ids).logits,
            rtol=0,
            atol=0,
        )


def refused(*arguments):
    answer = CliRunner().invoke(app, [str(o) for o in arguments])
    assert answer.exit_code == 2, answer.output
    return " ".join(answer.output.split())


@pytest.mark.parametrize(
    "command",
    [
        ["study", "--notebooks", ROOT / "nbs/experiments"],
        ["sweep", ROOT / "nbs/experiments/rloo.ipynb"],
    ],
)
def test_without_a_gpu(command, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = refused(*command, "--profile", "paper", "--out", tmp_path / "out")
    assert (
        "an update would take about 15 s, a run 2.5 hours" in output
        and 'base = "paper" and device = "cpu"' in output
    )
    assert not (tmp_path / "out").exists()


# The Hub


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_offline_says_what_to_download(no_hub, tiny, tmp_path):
    output = refused(
        "study",
        "--profile",
        tiny,
        "--notebooks",
        ROOT / "nbs/experiments",
        "--out",
        tmp_path / "out",
    )
    assert output.index("estimated time") < output.index("klrb: ")  # the estimate comes first
    for wanted in (
        "hf download lvwerra/gpt2-imdb --revision refs/pr/1",
        "(about 550 MB)",
        "hf download lvwerra/distilbert-imdb --revision refs/pr/5",
        "(about 270 MB)",
        "hf download stanfordnlp/imdb --repo-type dataset",
        "(about 84 MB)",
        "HF_HUB_OFFLINE is set",
        'model = "/path/to/it"; reward = "/path/to/it"; reviews = "/path/to/it"',
        'base = "paper"',
    ):
        assert wanted in output
    assert not (tmp_path / "out").exists()


def test_offline_with_local_copies(no_hub, hub):
    local = {
        key: str(next(hub.glob(f"*{name}/snapshots/*")))
        for key, name in (("model", "gpt2-imdb"), ("reward", "distilbert-imdb"))
    }
    check_downloads(get_profile("paper", reviews="synthetic", **local))
    with pytest.raises(ValueError, match="gives no stanfordnlp/imdb "):
        check_downloads(get_profile("paper", **local))


@pytest.fixture
def requests(monkeypatch):
    """What is asked of the Hub, in a list whose first entry decides whether anybody answers.

    Nothing leaves this machine, and nobody waits before asking again.
    """
    asked = [False]
    http = import_module(type(huggingface_hub.get_session()).__module__.partition(".")[0])

    def answer(request):
        asked.append(str(request.url))
        if not asked[0]:
            raise http.ConnectError("no route")
        return http.Response(404)

    def wait(seconds):
        raise AssertionError("waits and tries again")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", wait)
    made = huggingface_hub.utils._http._GLOBAL_CLIENT_FACTORY

    def client():
        client = made()  # with the hook that keeps a client offline
        client._transport, client._mounts = http.MockTransport(answer), {}
        return client

    huggingface_hub.set_client_factory(client)
    yield asked
    huggingface_hub.set_client_factory(made)


def test_without_a_network_only_the_cache_is_asked_and_at_once(requests, hub, monkeypatch):
    "The Hub's clients would try for 23 seconds, a file at a time."
    for load in (load_model, load_tokenizer, SequenceClassifierReward):
        with pytest.raises(ValueError, match="no/such-model"):
            load("no/such-model")
    with pytest.raises(ValueError, match="no/such-data"):
        read_prompts("no/such-data")
    assert requests[1:] == ["https://huggingface.co"] * 4
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(hub))
    assert load_model("lvwerra/gpt2-imdb@refs/pr/1").config.n_embd == 32
    assert len(load_tokenizer("lvwerra/gpt2-imdb@refs/pr/1")) == 4096
    assert requests[1:] == ["https://huggingface.co"] * 6


def test_where_there_is_a_network_the_hub_is_asked_for_the_files(requests):
    requests[0] = True
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match="no/such-model"):
            load("no/such-model")
        assert any(o.endswith("no/such-model/resolve/main/config.json") for o in requests[1:])
        del requests[1:]
    with pytest.raises(ValueError, match="no/such-data"):
        read_prompts("no/such-data")
    assert any("datasets/no/such-data/" in o for o in requests[1:])


def test_a_checkpoint_without_safetensors(no_hub, tmp_path):
    folder = snapshot(tmp_path / "empty", "model", "somebody/pickled", "main")
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="gives no somebody/pickled"):
        check_downloads(get_profile("smoke", model="somebody/pickled"))


# Profiles from files

PARAMETERS = """seed: int = 0  # any
profile: str = "smoke"  # of klrb.rlhf.profiles
out_dir: str = "."  # folder"""
BODY = """import json
from pathlib import Path
from klrb.rlhf.profiles import get_profile
settings = get_profile(profile)
if not (Path(out_dir).parents[1]/"go").exists(): raise ValueError("not yet")
(Path(out_dir)/"result.json").write_text(json.dumps(dict(batch_size=settings.batch_size)))"""


def test_the_identity_follows_the_content_of_a_profile(tmp_path):
    template = read_template(write_notebook(tmp_path / "n.ipynb", PARAMETERS, BODY))

    def run(folder, text, root="out"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "mine.toml").write_text(text)
        settings = get_profile(str(tmp_path / folder / "mine.toml"))
        (made,) = make_runs(template, [{}], tmp_path / root, settings)
        write_template(template, [made], settings)
        assert (
            get_profile(made.folders["profile"]) == settings
            and made.parameters["profile"] == "mine"
        )
        return made

    first = run("a", 'base = "smoke"\nbatch_size = 4')
    assert (
        run("b", '# the same\nbase = "smoke"\nbatch_size = 4').identity
        == first.identity
        == run("a", 'base = "smoke"\nbatch_size = 4', "other").identity
    )
    assert (
        run("a", 'base = "smoke"\nbatch_size = 4\ncpu_update_seconds = 9').identity
        == first.identity
    )  # changes no result
    assert run("a", 'base = "smoke"\nbatch_size = 2').identity != first.identity
    (preset,) = make_runs(template, [{}], tmp_path / "out", get_profile("smoke"))
    assert preset.folders == {}


@pytest.mark.usefixtures("no_kernel")
def test_a_sweep_retries_and_reports_with_the_profile_it_was_given(tmp_path):
    notebook, file = write_notebook(tmp_path / "n.ipynb", PARAMETERS, BODY), tmp_path / "mine.toml"
    file.write_text('base = "smoke"\nbatch_size = 4')
    with pytest.raises(SweepFailed):
        sweep(notebook, str(file), seeds=2, out=tmp_path / "out")
    file.unlink()  # the sweep has its own copy
    (tmp_path / "out" / "go").touch()
    assert retry(tmp_path / "out")["done"] == 2
    assert [
        json.loads(path.read_text()) for path in (tmp_path / "out" / "n").glob("*/result.json")
    ] == [dict(batch_size=4)] * 2


def test_every_preset_survives_a_file(tmp_path):
    for name, profile in PROFILES.items():
        (tmp_path / f"{name}.toml").write_text(to_toml(profile))
        assert get_profile(str(tmp_path / f"{name}.toml")) == profile


# The estimate


def test_finished_runs_replace_the_expectation(tmp_path):
    settings = get_profile("pocket", seeds=1)
    cells = [
        dict(beta=beta, kl_estimator=name)
        for beta in settings.betas
        for name in settings.estimators
    ]
    text = estimate_study(settings, cells, tmp_path, 2)
    assert (
        "preparation and variance  5 minutes" in text
        and "6 of 6 runs               3 minutes" in text
        and "expected on two CPU cores" in text
    )
    runs = {
        f"rloo/{i}": dict(identity="", parameters=dict(cell, profile="pocket"))
        for i, cell in enumerate(cells)
    }
    write_atomic(
        tmp_path / "sweep.json",
        json.dumps(
            dict(request={}, runs=runs | {"variance/pocket": dict(identity="", parameters={})})
        ),
    )
    for key, seconds in (("rloo/0", 100.0), ("rloo/1", 140.0), ("variance/pocket", 60.0)):
        (tmp_path / key).mkdir(parents=True)
        write_atomic(
            tmp_path / key / "run.json",
            json.dumps(dict(state="done", attempts=[dict(seconds=seconds, reason="")])),
        )
    text = estimate_study(settings, cells, tmp_path, 2)
    assert (
        "preparation and variance  0 s" in text
        and "4 of 6 runs               4 minutes" in text
        and "as the 2 finished ones" in text
    )
    assert "6 of 6 runs" in estimate_study(
        replace(settings, name="other"), cells, tmp_path, 2
    )  # another profile's do not count


# One run from a shell


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "is not finished; run the prepare experiment first"),
        (["--start", "sft"], 'give "reference" or "dpo"'),
        (["--estimator", "k3"], "the unbiased methods are"),
        (["--beta", "-1"], "must be >= 0"),
        (["--profile", "none"], "known profiles are"),
    ],
)
def test_bad_options_of_a_run(prepared, tmp_path, options, message):
    folder = prepared if options else tmp_path / "absent"
    output = refused(
        "rloo", "--profile", "smoke", "--prepare-dir", folder, "--out", tmp_path / "out", *options
    )
    assert message in output and not (tmp_path / "out").exists()
