"""GGUF files in llama.cpp: through a stand-in that has its interface and the dequantised weights.

So the numbers must be those of the same file read through transformers, on either side and in both
modes.
"""

import gc
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import gguf
import numpy as np
import pytest
import torch
from test_gguf import model_of, write
from test_measure import check_error
from typer.testing import CliRunner

import klrb.llama_cpp
from klrb.cli import app
from klrb.compare.text import measure_text
from klrb.measure import measure_kl
from klrb.models import load_model, load_tokenizer
from klrb.steps import step_kl


class Llama:
    "What is used of llama-cpp-python 0.3's class; `noise` stands for other kernels."

    noise = 0.0

    closed = 0  # how often one was

    def __init__(
        self, model_path, n_ctx, logits_all, n_gpu_layers, verbose, n_threads, n_threads_batch
    ):
        assert logits_all and not verbose and n_gpu_layers in (0, -1)
        assert n_threads == n_threads_batch == torch.get_num_threads()
        self.model, self.room = load_model(model_path), n_ctx
        self.n_tokens, self.input_ids = 0, []
        self.scores = np.full((n_ctx, self.n_vocab()), np.nan, dtype=np.float32)

    def n_vocab(self):
        return self.model.config.vocab_size

    def n_ctx(self):
        return self.room

    def close(self):
        Llama.closed += 1

    def reset(self):
        self.n_tokens = 0

    @torch.no_grad()
    def eval(self, tokens):
        before = self.n_tokens
        self.input_ids = self.input_ids[:before] + list(tokens)
        assert len(self.input_ids) <= self.room and tokens
        logits = self.model(torch.tensor([self.input_ids])).logits[0].numpy()
        self.scores[before : len(self.input_ids)] = logits[before:] * (1 + self.noise)
        self.scores[len(self.input_ids) :] = np.nan  # whoever reads on is told so
        self.n_tokens = len(self.input_ids)


@pytest.fixture
def files(tmp_path, monkeypatch):
    module = ModuleType("llama_cpp")
    module.Llama, module.__spec__ = Llama, ModuleSpec("llama_cpp", None)
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.chdir(tmp_path)
    model, gen = model_of("llama").float(), torch.Generator().manual_seed(0)
    for name in "ab":
        write(model, tmp_path / f"{name}.gguf", "llama")
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.2 * weight.std() * torch.randn(weight.shape, generator=gen)
    (tmp_path / "junk.gguf").write_text("junk")
    return tmp_path


SETTINGS = dict(prompts=["A B", "C"], samples=6, max_new_tokens=4)


def test_the_same_weights_give_the_same_numbers(files):
    "The same draws as reference; draws of its own as policy, since rows are batched otherwise"
    wanted = measure_kl("./a.gguf", "./b.gguf", **SETTINGS)
    mixed = measure_kl("./a.gguf", "llama:./b.gguf", **SETTINGS)
    assert wanted.kl.mean > 0.1 and mixed.kl.mean == pytest.approx(wanted.kl.mean, rel=1e-4)
    many = dict(prompts=["A B"], samples=80, max_new_tokens=2)
    one, other = (measure_kl(o, "./b.gguf", **many).kl for o in ("./a.gguf", "llama:./a.gguf"))
    assert abs(one.mean - other.mean) < 4 * np.hypot(one.stderr, other.stderr)
    about = mixed.about["models"]
    assert about["reference"]["name"] == "llama:./b.gguf"
    assert about["policy"]["fingerprint"] != about["reference"]["fingerprint"]


def test_text_mode(files):
    texts = ["A B C D", "B A", "D D A C B"]
    wanted = measure_text("./a.gguf", "./b.gguf", texts).statistics
    found = measure_text("llama:./a.gguf", "llama:./b.gguf", texts).statistics
    np.testing.assert_allclose(found.value, wanted.value, rtol=1e-4)


def test_other_kernels_are_seen(files, monkeypatch):
    assert measure_kl("llama:a.gguf", "./a.gguf", **SETTINGS).kl.mean == pytest.approx(0, abs=1e-6)
    monkeypatch.setattr(Llama, "noise", 0.2)
    assert measure_kl("llama:a.gguf", "./a.gguf", **SETTINGS).kl.mean > 1e-4


def test_what_it_is_told_to_a_reader(files):
    model = load_model("llama:a.gguf")
    assert model.config.vocab_size == load_model("./a.gguf").config.vocab_size
    assert load_tokenizer("llama:./a.gguf").get_vocab() == load_tokenizer("./a.gguf").get_vocab()
    assert model.device.type == "cpu" and model.dtype == torch.float32


def test_it_is_closed_with_the_model(files):
    before, model = Llama.closed, load_model("llama:a.gguf")
    del model
    gc.collect()
    assert Llama.closed == before + 1


@pytest.mark.parametrize("kind", ["_is_recurrent", "_is_hybrid"])
def test_a_recurrent_state_is_not_cut_back(files, monkeypatch, kind):
    "It has seen what was read, and reads every row from its beginning"
    model, read = load_model("llama:a.gguf"), []
    evaluate = Llama.eval
    monkeypatch.setattr(Llama, "eval", lambda o, ids: (read.append(o.n_tokens), evaluate(o, ids)))
    monkeypatch.setattr(Llama, kind, True, raising=False)
    for row in ([1, 2], [1, 2, 3], [1, 2, 3], [1, 3]):
        model(torch.tensor([row]))
    assert read == [0, 0, 0, 0]


BAD = {
    "not there": (["llama:nowhere.gguf"], "is no GGUF file"),
    "no GGUF": (["llama:a.bin"], "write llama:FILE.gguf"),
    "no file": (["llama:"], "is no GGUF file"),
    "junk": (["llama:junk.gguf"], "loading it into llama.cpp failed"),
    "another format": (["llama:a.gguf", "--dtype", "bfloat16"], "llama.cpp's own formats"),
    "too long": (["llama:a.gguf", "--max-new-tokens", "4000"], "context"),
    "in a soup": (["soup:llama:a.gguf,llama:b.gguf"], "no weights that could be averaged"),
    "with an adapter": (["llama:a.gguf+./adapter"], "merge the adapter into it"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(files, case):
    (name, *options), message = BAD[case]
    given = ["measure", "./a.gguf", name, "--samples", "2", "--max-new-tokens", "2", *options]
    check_error(CliRunner().invoke(app, given), message)


def test_without_the_package_it_says_what_to_install(files, monkeypatch):
    monkeypatch.setattr(klrb.llama_cpp, "find_spec", lambda name: None)
    answer = CliRunner().invoke(app, ["measure", "llama:a.gguf", "./a.gguf"])
    check_error(answer, "pip install 'klrb[llama]'")


REAL = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs klrb[llama]")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    "Files that llama.cpp itself reads: the weights as they are, and in 8 bits."
    folder, model = tmp_path_factory.mktemp("llama"), model_of("llama").float()
    write(model, folder / "a.gguf", "llama")
    write(model, folder / "q.gguf", "llama", quantise=gguf.GGMLQuantizationType.Q8_0)
    return folder


@REAL
@pytest.mark.slow
@torch.no_grad()
def test_logits_of_llama_cpp_itself(real):
    "Up to its cache of keys and values in float16, and whatever was read before"
    run, weights = load_model(f"llama:{real}/a.gguf"), load_model(f"{real}/a.gguf")
    for row in ([1, 2], [1, 2, 3, 2, 1, 4], [1, 2, 3], [1, 3, 3, 4], [2], [1, 3, 3, 4]):
        ids = torch.tensor([row])
        found, wanted = run(ids).logits, weights(input_ids=ids).logits
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() < 8 * 2**-11 * wanted.abs().max()
        kl = step_kl(found.double(), wanted.double())
        assert kl.max() < (8 * 2**-11 * wanted.abs().max()) ** 2


@REAL
@pytest.mark.slow
@pytest.mark.parametrize("name", ["a", "q"])
def test_llama_cpp_itself_on_either_side(real, name):
    "Sampling and text: next to nothing against its own weights"
    run, weights = f"llama:{real}/{name}.gguf", f"{real}/{name}.gguf"
    for pair in ((run, weights), (weights, run), (run, run)):
        assert abs(measure_kl(*pair, **SETTINGS).kl.mean) < 1e-3
        text = measure_text(*pair, ["A B C D", "B A", "D D A C B"]).statistics
        assert abs(text.value[0]) < 1e-3


@REAL
@pytest.mark.slow
def test_llama_cpp_itself_says_nothing_at_the_end(real):
    "A process that has used it ends without a traceback"
    code = f"from klrb.models import load_model; model = load_model('llama:{real}/a.gguf')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
