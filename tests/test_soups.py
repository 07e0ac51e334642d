"""Soups: the mean in float64 is the oracle, and what cannot be averaged is refused in a line."""

import json

import pytest
import torch
from test_measure import POLICY, REFERENCE, TOKENIZER, check_error, measure, small_model
from test_measure import small_tokenizer
from torch.testing import assert_close
from typer.testing import CliRunner

from klrb.cli import app
from klrb.measure import measure_kl
from klrb.models import load_model, load_tokenizer
from klrb.soups import average_models, parse_soup

PARTS = (POLICY, REFERENCE, small_model(7))
SETTINGS = dict(prompts=["a b"], samples=4, max_new_tokens=3)


def mean(weights, models=PARTS):
    "By hand, in float64"
    states = [o.state_dict() for o in models]
    return {
        k: sum(w * o[k].double() for w, o in zip(weights, states)) if v.is_floating_point() else v
        for k, v in states[0].items()
    }


def check(model, weights, rounding=3 * 2**-23):
    "Three products and two sums, each rounded, of numbers below 4"
    for key, wanted in mean(weights).items():
        found = model.state_dict()[key].double()
        assert_close(found, wanted.double(), rtol=rounding, atol=4 * rounding)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("soups")
    for name, model in zip("abc", PARTS):
        model.save_pretrained(where / name), TOKENIZER.save_pretrained(where / name)
    small_model(8, vocab_size=4).save_pretrained(where / "narrow")
    TOKENIZER.save_pretrained(where / "narrow")
    other = small_tokenizer()
    other.add_tokens(["f"])
    POLICY.save_pretrained(where / "other"), other.save_pretrained(where / "other")
    POLICY.save_pretrained(where / "epsilon"), TOKENIZER.save_pretrained(where / "epsilon")
    config = json.loads((where / "a" / "config.json").read_text())
    config["layer_norm_epsilon"] = 0.1
    (where / "epsilon" / "config.json").write_text(json.dumps(config))
    return where


def test_loaded_models():
    check(average_models(PARTS), [1 / 3] * 3)
    check(average_models(PARTS, [0.2, 0.5, 0.3]), [0.2, 0.5, 0.3])
    before = POLICY.state_dict()["transformer.wte.weight"].clone()
    twice = average_models([POLICY, POLICY])
    for key, tensor in POLICY.state_dict().items():
        assert torch.equal(twice.state_dict()[key], tensor)
    assert torch.equal(POLICY.state_dict()["transformer.wte.weight"], before)
    for weights in ([0.5], [0.5, 0.6], [1.0, 0.1]):
        with pytest.raises(ValueError, match="one per model, adding up to 1"):
            average_models([POLICY, REFERENCE], weights)


def test_by_name(folder, monkeypatch):
    monkeypatch.chdir(folder)
    check(load_model("soup:a,b,c"), [1 / 3] * 3)
    check(load_model("soup: 0.2*a , 0.5*b, 0.3*./c"), [0.2, 0.5, 0.3])
    half = load_model("soup:a,b,c", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    check(half, [1 / 3] * 3, rounding=2**-8)
    assert load_tokenizer("soup:a,b").get_vocab() == TOKENIZER.get_vocab()


def test_measure_takes_a_soup_on_either_side(folder, monkeypatch):
    monkeypatch.chdir(folder)
    by_name = measure_kl("a", "soup:0.25*a,0.75*b", **SETTINGS)
    soup = average_models([POLICY, REFERENCE], [0.25, 0.75])
    loaded = measure(POLICY, soup, **SETTINGS)
    assert by_name.kl.mean == pytest.approx(loaded.kl.mean, rel=1e-5) and by_name.kl.mean > 0
    assert by_name.about["models"]["reference"]["name"] == "soup:0.25*a,0.75*b"
    assert measure_kl("soup:1*a,0*b", "a", **SETTINGS).kl.mean == 0


@pytest.mark.parametrize(
    "name, message",
    [
        ("soup:", "at least two models"),
        ("soup:a", "at least two models"),
        ("soup:a,", "at least two models"),
        ("soup:0.5*a,b", "every model of a soup a weight, or none"),
        ("soup:x*a,0.5*b", "a weight that is no number"),
        ("soup:0.5*a,0.6*b", "add up to 1.1"),
        ("soup:1.5*a,-0.5*b", "must be from 0 to 1"),
        ("soup:nan*a,0.5*b", "add up to nan"),
        ("soup:a,./nowhere", "no such file or folder"),
        ("soup:a,narrow", "checkpoints of one architecture"),
        ("soup:a,pocket", "tokenizers differ"),
        ("soup:a,epsilon", "differ in `layer_norm_epsilon`"),
        ("soup:a,other", "tokenizers differ"),
        ("soup:a+./adapter,b", "merged and saved first"),
    ],
)
def test_what_is_no_soup_is_refused(folder, monkeypatch, name, message):
    monkeypatch.chdir(folder)
    check_error(CliRunner().invoke(app, ["measure", "a", name, "--samples", "2"]), message)


def test_names():
    assert parse_soup("soup:org/a@v1.0,org/b") == [("org/a@v1.0", 0.5), ("org/b", 0.5)]
    assert parse_soup("soup:1e-1*a,0.9*b") == [("a", 0.1), ("b", 0.9)]
