"The stacked Llama of tests/gpu_smol.py: the model, the sampler and the loss, each by itself."

import gpu_smol
import pandas as pd
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from klrb.models import pocket_folder

VOCABULARY, EOS = 4096, 0  # of the pocket tokenizer


def make(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=EOS,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def stacked():
    models = [make(seed) for seed in range(3)]
    weights = {name: torch.stack([o.state_dict()[name] for o in models]) for name in names()}
    return models, gpu_smol.Llama(models[0].config), weights


def names():
    return [name for name in make(0).state_dict() if name != "lm_head.weight"]


def batch(arms=3, rollouts=4, length=7):
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (arms, rollouts, length), generator=gen)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 1, :3] = False  # padded on the left
    return ids, mask


def test_the_stack_computes_what_transformers_does(stacked):
    models, llama, weights = stacked
    ids, mask = batch()
    seen = gpu_smol.readable(mask, ids.shape[-1], 0)
    hidden = llama.hidden(weights, ids, gpu_smol.places(mask), seen)
    for arm, model in enumerate(models):
        for row in range(len(ids[arm])):  # each sequence alone, without padding
            kept = ids[arm, row][mask[arm, row]]
            theirs = model(input_ids=kept[None]).logits[0]
            ours = hidden[arm, row][mask[arm, row]] @ llama.head(weights)[arm].T
            # both rotate and normalise in float32 on the way
            assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_tokens_are_drawn_from_what_is_scored(stacked):
    "Gumbel noise of a known generator gives the tokens back from the scores of a full pass."
    _, llama, weights = stacked
    ids, mask = batch()
    drawn = 6, EOS, [torch.Generator().manual_seed(s) for s in (5, 6)], torch.tensor([0, 1, 0])
    completions, kept = gpu_smol.sample(llama, weights, ids, mask, *drawn)
    hidden = gpu_smol.step_hidden(llama, weights, ids, mask, completions, kept)
    logits = torch.einsum("abth,avh->abtv", hidden, llama.head(weights)).float()
    generators = [torch.Generator().manual_seed(s) for s in (5, 6)]
    for t in range(6):
        noise = [torch.empty_like(logits[0, :, t]).exponential_(generator=o) for o in generators]
        expected = (logits[:, :, t] - torch.stack(noise).log()[drawn[-1]]).argmax(-1)
        alive = kept[:, :, t]
        assert (completions[:, :, t] == expected)[alive].all()
    ended = (completions == EOS).cumsum(-1) - (completions == EOS).long() > 0
    assert (kept == ~ended).all()


def test_each_arm_gets_the_gradient_of_its_own_update(stacked, tmp_path):
    "Written out: sum over rollouts of advantage times score, with the exact KL's own gradient."
    models, llama, weights = stacked
    prepare(models[0].float(), tmp_path)
    args = arguments(tmp_path, methods="mc,rb", betas="0.2,0.5", seeds=1, updates=1)
    arms = [dict(method=m, beta=b, seed=0) for b in (0.2, 0.5) for m in ("mc", "rb")]
    start = {name: o[0] for name, o in weights.items()}
    reference = {name: o[1:2] for name, o in weights.items()}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reference")
    prompts = gpu_smol.Prompts(tokenizer, ["this is", "i saw it"], "cpu")
    runs = gpu_smol.Runs(args, arms, tokenizer, llama, start, reference, prompts, prompts)
    seen = {}

    def reward(texts):
        return [float(text.count("e")) for text in texts]

    def loss(rewards, logp, logq, mask, kl, *rest):
        seen.update(rewards=rewards, logp=logp, logq=logq, mask=mask, kl=kl)
        return original(rewards, logp, logq, mask, kl, *rest)

    original, runs.loss = runs.loss, loss
    runs.optimizer.step = runs.schedule.step = lambda: None  # the gradient stays to be read
    before = {name: o.detach().clone() for name, o in runs.weights.items()}
    drawn = args.length, EOS, [torch.Generator().manual_seed(1000)], torch.zeros(1).long()
    index = torch.tensor(runs.orders[0][:2]).repeat_interleave(4)[None]
    single = {name: o[:1].clone().requires_grad_() for name, o in before.items()}
    rollouts = prompts.ids[index], prompts.mask[index]
    rollouts += gpu_smol.sample(llama, single, *rollouts, *drawn)
    runs.update(0, reward)
    logp, logq, kl = gpu_smol.score(llama, single, reference, *rollouts)
    mask = rollouts[3][0]
    rewards = seen["rewards"][:8].double()
    assert_close(
        seen["logp"][:8], logp, rtol=1e-5, atol=1e-5
    )  # one arm alone is the arm in a stack

    def centred(values):  # leave-one-out over the four completions of a prompt
        groups = values.view(2, 4, -1)
        return (groups - (groups.sum(1, keepdim=True) - groups) / 3).view(values.shape)

    logp, logq, kl = (o * mask for o in (logp, logq, kl))
    for arm, (method, beta) in enumerate((m, b) for b in (0.2, 0.5) for m in ("mc", "rb")):
        with torch.no_grad():
            if method == "mc":
                weight = centred(rewards - beta * (logp - logq).sum(-1))[:, None]
            else:
                after = kl.sum(-1, keepdim=True) - kl.cumsum(-1)
                weight = centred(rewards)[:, None] - beta * centred(after)
        objective = (weight * logp).sum() / 8
        if method == "rb":
            objective = objective - beta * kl.sum() / 8
        found = torch.autograd.grad(-objective, list(single.values()), retain_graph=True)
        for name, expected in zip(single, found):
            assert_close(runs.weights[name].grad[arm], expected[0], rtol=1e-4, atol=1e-5)


def prepare(model, folder):
    model.save_pretrained(folder / "reference")
    AutoTokenizer.from_pretrained(pocket_folder()).save_pretrained(folder / "reference")
    for name in ("rloo", "evaluation"):
        table = pd.DataFrame(dict(prompt=["this movie is", "i saw", "what a"]))
        table.to_parquet(folder / f"{name}_prompts.parquet")


def arguments(folder, **settings):
    settings = dict(prepared=folder, out=folder / "out", name="t", device="cpu") | settings
    words = [o for name, value in settings.items() for o in (f"--{name}", str(value))]
    return gpu_smol.parser().parse_args(words)


def test_a_small_study_writes_its_tables(tmp_path):
    prepare(make(0).float(), tmp_path)
    args = arguments(tmp_path, methods="mc,fitted", betas="0.2", seeds=2, updates=2, length=3)

    class Reward:
        def score(self, texts):
            return [len(text) for text in texts]

    gpu_smol.main(args, Reward())
    training = pd.read_csv(args.out / "t_training.csv")
    assert len(training) == 2 * 4  # updates times arms
    assert (training[training["update"] == 0].kl_rb.abs() < 1e-6).all()  # as they begin
    evaluations = pd.read_csv(args.out / "t_evaluations.csv")
    assert sorted(set(evaluations["update"])) == [0, 2]
    assert_close(
        torch.tensor(evaluations.objective),
        torch.tensor(evaluations.reward - 0.2 * evaluations.kl_rb),
        rtol=1e-4,
        atol=1e-4,
    )
