"""The lines of `nbs/rlhf/510_own_loop.ipynb`: its cells by themselves, and in verl and OpenRLHF."""

import importlib
import importlib.metadata
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

NOTEBOOK = Path(__file__).parents[1] / "nbs" / "rlhf" / "510_own_loop.ipynb"
CELLS = ["".join(o["source"]) for o in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]]
VERSIONS = dict(verl="0.9.1", openrlhf="0.11.2")


def cell(text: str) -> str:
    "The code of the only cell that has `text`, without what is checked or drawn at its end"
    (found,) = [o for o in CELLS if text in o]
    return re.split(r"^found = |^kl_gradient = ", found, flags=re.M)[0]


def run_cells(*texts: str, **names) -> SimpleNamespace:
    "The names that these cells define, after those of the setup"
    scope = dict(__name__="own_loop")
    exec(cell("#| hide"), scope)
    scope |= names
    for text in texts:
        exec(cell(text), scope)
    return SimpleNamespace(**scope)


TOY = ("class Bigram", "def loop_loss", "class MicroBatch")
VERL = ("class FSDPEngineWithLMHead", "class ExactKL")


def by_hand(page, pair, temperature=1.0):
    "Exact KL of every prefix of a pair, in float64 from the two tables, (B, T)"
    inputs, _, mask = page.pair_inputs(pair)
    tables = page.policy.base + page.policy.adapter, page.policy.base
    logp, logq = ((o[inputs] / temperature).log_softmax(-1) for o in tables)
    return (logp.exp() * (logp - logq)).sum(-1) * mask


def engine_outputs(page, pair, temperature=1.0, padding=0):
    engine, data = page.ExactKL(page.policy), page.packed(pair)
    inputs, args = engine.prepare_model_inputs(data)
    args["temperature_rmpad"] = args["temperature_rmpad"] * temperature
    if padding:  # as Ulysses has it: more tokens at the end of the row
        more = torch.zeros(padding, dtype=torch.long)
        args["pad_size"] = padding
        args["temperature_rmpad"] = torch.cat([args["temperature_rmpad"], torch.ones(padding)])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more[None]], 1)
        engine.prepare_model_inputs = lambda micro_batch: (inputs, args)
        args["input_ids_rmpad_rolled"] = torch.cat([args["input_ids_rmpad_rolled"], more])
    output = page.policy(**inputs)
    if padding:  # what verl's own part does with its log-probabilities
        base = page.FSDPEngineWithLMHead
        base.prepare_model_outputs = lambda *_: dict(log_probs=None)
    return data, engine.prepare_model_outputs(output, args, data, None)


@pytest.mark.parametrize("pair", [(0, 0), (3, 14), (14, 6)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("padding", [0, 3])
def test_exact_kl_reaches_the_loss_at_its_own_step(pair, temperature, padding):
    page = run_cells(*TOY, *VERL)
    data, made = engine_outputs(page, pair, temperature, padding)
    found = page.no_padding_2_padding(made["step_kl"], data)
    wanted = by_hand(page, pair, temperature)[:, : found.shape[1]]
    assert_close(found * (wanted > 0), wanted, rtol=1e-6, atol=1e-9)  # 0.7 is a float32 there


def test_scoring_of_rollouts_has_no_second_pass():
    page = run_cells(*TOY, *VERL)
    with torch.no_grad():
        _, made = engine_outputs(page, (3, 5))
    assert "step_kl" not in made


def test_the_loss_of_verl_is_kept():
    page = run_cells(*TOY, *VERL, ppo_loss=None)
    scope = page.loss_with_exact_kl.__globals__
    config = SimpleNamespace(kl_loss_coef=0.0)
    scope["ppo_loss"] = lambda config, model_output, data, dp_group=None: (1.5, dict(mine=2))
    data, made = engine_outputs(page, (3, 5))
    loss, metrics = page.loss_with_exact_kl(config, made, data)
    assert loss.item() == 1.5 and metrics["mine"] == 2 and metrics["kl_sequence_rb"] >= 0


def test_steps_of_a_tool_do_not_count_in_openrlhf():
    page = run_cells(*TOY, "class Actor", "def exact_kl_loss")
    inputs, ids, mask = page.pair_inputs((14, 13))
    sequences = torch.cat([inputs[:, :1], ids], 1)
    mask = mask.clone()
    mask[:, 1] = 0
    actor, whole = page.Actor(page.policy), torch.ones_like(sequences)
    logprobs, output = actor(sequences, mask, whole, return_output=True)
    experience = SimpleNamespace(
        sequences=sequences,
        attention_mask=whole,
        action_mask=mask,
        action_log_probs=logprobs.detach(),
    )
    info = dict(dp_size=1, batch_num_tokens=2)  # so that the sum is over both sequences
    trainer = SimpleNamespace(actor=actor)
    loss = page.exact_kl_loss(trainer, experience, logprobs, output, info)
    assert_close(loss, (by_hand(page, (14, 13)) * mask).sum() / 2, rtol=1e-12, atol=0)
    output["logits"][:, 1] = torch.nan  # of the tool's step
    assert page.exact_kl_loss(trainer, experience, logprobs, output, info).isfinite()


def sources() -> list:
    scope = {}
    exec(cell("SOURCES = ").split("places = ")[0], dict(pd=None), scope)
    return scope["rows"]


def line_problem(text: str, lines: str, wanted: str) -> str:
    "Why the cited lines do not have the text; empty if they do"
    first, last = map(int, lines.split("-"))
    cited = text.splitlines()[first - 1 : last]
    return "" if any(wanted in line for line in cited) else f"{wanted!r} is not there"


@pytest.mark.parametrize("row", sources(), ids=lambda row: f"{row[1]}:{row[2]}")
def test_cited_lines_say_so(row):
    package, file, lines, wanted, _ = row
    try:
        found = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    if found.version != VERSIONS[package]:
        pytest.skip(f"{package} {found.version} is installed; {VERSIONS[package]} was read")
    assert not line_problem(found.locate_file(file).read_text("utf-8"), lines, wanted)


def test_check_of_lines_finds_a_wrong_number():
    assert line_problem("a\nb\nc", "1-2", "b") == ""
    assert line_problem("a\nb\nc", "3-3", "b")


def imported(package, *modules):
    try:
        version = importlib.metadata.version(package)
        found = [importlib.import_module(o) for o in modules]
    except ImportError as error:
        pytest.skip(f"{package} cannot be imported: {error}")
    if version != VERSIONS[package]:
        pytest.skip(f"{package} {version} is installed; {VERSIONS[package]} was read")
    return found


@pytest.mark.slow
def test_lines_within_verl(monkeypatch):
    "The engine's and the loss's own code around the lines; one process, no sharding"
    names = ("engine.fsdp.transformer_impl", "utils.losses", "utils.padding", "config")
    engines, losses, padding, configs = imported("verl", *(f"verl.workers.{o}" for o in names))
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    monkeypatch.setattr(engines, "get_device_id", lambda: "cpu")
    page = run_cells(
        *TOY,
        "class ExactKL",
        FSDPEngineWithLMHead=engines.FSDPEngineWithLMHead,
        no_padding_2_padding=padding.no_padding_2_padding,
        ppo_loss=losses.ppo_loss,
    )
    engine = object.__new__(page.ExactKL)
    engine.module, engine.use_ulysses_sp, engine.pad_to_length = page.policy, False, False
    engine.engine_config = SimpleNamespace(
        entropy_checkpointing=False, entropy_from_logits_with_chunking=False
    )
    engine.compute_entropy_from_logits = lambda logits: logits.logsumexp(-1)
    engine._autocast_dtype = torch.float32
    engine.get_data_parallel_group = lambda: None
    actor = configs.ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=2,
        ppo_mini_batch_size=2,
        kl_loss_coef=0.1,
    )

    def loss_of(pair):
        fields = dict(page.packed(pair))
        numbers = {o: fields.pop(o) for o in ("dp_size", "batch_num_tokens")}
        lengths = fields["input_ids"].offsets().diff()
        fields["position_ids"] = page.nested([torch.arange(n) for n in lengths])
        fields["advantages"] = page.nested([0 * o for o in fields["old_log_probs"].unbind()])
        data = TensorDict(fields, batch_size=[2])
        tu.assign_non_tensor(data, **numbers, temperature=1.0, global_batch_size=2)

        def loss_function(model_output, data, dp_group):
            return page.loss_with_exact_kl(actor, model_output, data, dp_group)

        return engine.forward_step(data, loss_function, forward_only=False)[0]

    wanted = 0.1 * 2 * 3 / 7 * page.gradient(-page.exact_objective(1.0, reward_weight=0.0))
    found = page.expected_gradient(loss_of, sampled_by_policy=False)
    assert_close(found, wanted, rtol=1e-5, atol=1e-7)  # temperatures are float32


@pytest.mark.slow
def test_lines_within_openrlhf():
    "The actor's own forward pass around the lines; no DeepSpeed engine"
    actors, losses = imported("openrlhf", "openrlhf.models.actor", "openrlhf.models.loss")
    page = run_cells(*TOY, "def exact_kl_loss", "class Actor")

    def make_actor(policy):
        class Engine(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.module = policy

            def forward(self, sequences, **inputs):
                return self.module(sequences)

        actor = actors.Actor(Engine())
        actor.packing_samples = False  # which it sets for a model that it loads itself
        return actor

    wanted = 2 * 3 / 7 * page.gradient(-page.exact_objective(1.0, reward_weight=0.0))
    found = page.expected_gradient(
        lambda pair: page.openrlhf_loss(pair, make_actor), sampled_by_policy=False
    )
    assert_close(found, wanted, rtol=1e-4, atol=1e-6)  # the actor's logits are float32
    steps, mask = by_hand(page, (3, 14)), page.pair_inputs((3, 14))[2]
    info = dict(dp_size=3, batch_num_tokens=7)
    theirs = losses.aggregate_loss(steps, mask, **info)
    assert_close(theirs, steps.sum() * 3 / 7)
