"""Many runs at once: each arm against transformers, the written-out update, and itself alone."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from klrb.errors import InputError
from klrb.rlhf.many import (
    Arm,
    ArmRollouts,
    ManyRuns,
    PooledReward,
    PromptTable,
    QuickTfidf,
    SeededNoise,
    Settings,
    Stack,
    StackedAdamW,
    UpdateLoss,
    join_stacks,
    load_stack,
    log_probs,
    make_stack,
    prompt_order,
    sample,
    score,
)

EOS, PAD, V = 5, 1, 11
DOUBLE = torch.float64


def tiny(seed, width=8):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=V,
        n_positions=16,
        n_embd=width,
        n_layer=2,
        n_head=2,
        initializer_range=0.6,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config).double().eval()
    for name, o in model.named_parameters():  # biases and norms too
        o.data += 0.2 * torch.randn(o.shape, dtype=DOUBLE)
    return model


def stack_of(*models):
    return join_stacks([make_stack(o.config.to_dict(), o.state_dict(), DOUBLE) for o in models])


def rollouts(seed=0, arms=3, rows=4, steps=5):
    "Prompts of two lengths; completions of one to all steps."
    gen = torch.Generator().manual_seed(seed)
    prompt_ids = torch.randint(2, V, (arms, rows, 3), generator=gen)
    prompt_mask = torch.ones_like(prompt_ids)
    prompt_mask[:, rows // 2 :, 0] = 0
    ids = torch.randint(6, V, (arms, rows, steps), generator=gen)
    length = torch.randint(1, steps + 1, (arms, rows, 1), generator=gen)
    mask = (torch.arange(steps) < length).long()
    ids = torch.where(mask == 1, ids, PAD)
    index = torch.arange(rows).expand(arms, -1) // 2
    return ArmRollouts(index, prompt_ids, prompt_mask, ids, mask)


def bare_log_probs(model, r, arm, row):
    "Next-token distributions along one completion, read alone and without padding, (n, V)."
    prompt = r.prompt_ids[arm, row][r.prompt_mask[arm, row] == 1]
    kept = r.completion_ids[arm, row][r.completion_mask[arm, row] == 1]
    logits = model(torch.cat([prompt, kept])[None]).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1), kept


def test_a_stack_computes_what_transformers_does():
    models, r = [tiny(o) for o in range(3)], rollouts()
    logp = log_probs(stack_of(*models), r)
    for arm, model in enumerate(models):
        for row in range(4):
            expected, kept = bare_log_probs(model, r, arm, row)
            torch.testing.assert_close(logp[arm, row, : len(kept)], expected, atol=1e-11, rtol=0)


def test_a_shared_reference_reads_every_arm():
    model, r = tiny(3), rollouts()
    one = stack_of(model)
    torch.testing.assert_close(log_probs(one, r), log_probs(one.copies(3), r), atol=1e-12, rtol=0)


def test_weights_come_back_as_a_model(tmp_path):
    model = tiny(0)
    model.save_pretrained(tmp_path)
    stack = load_stack(tmp_path, DOUBLE)
    other = tiny(1)
    other.load_state_dict(stack.model_state(0))
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "setting",
    [
        dict(model_type="llama"),
        dict(activation_function="relu"),
        dict(scale_attn_by_inverse_layer_idx=True),
        dict(tie_word_embeddings=False),
    ],
)
def test_other_architectures_are_refused(setting):
    config = tiny(0).config.to_dict() | setting
    with pytest.raises(InputError, match="a stack computes"):
        make_stack(config, {})


def test_the_cache_changes_nothing():
    "Sampling step by step chooses by the logits of a full forward, with the noise given."
    policy, r = stack_of(tiny(0), tiny(1)), rollouts(arms=2)
    made = ArmRollouts(
        *r[:3], *sample(policy, *r[1:3], SeededNoise([0, 1], 0, "cpu", DOUBLE), 6, EOS, PAD)
    )
    logp, noise = log_probs(policy, made), SeededNoise([0, 1], 0, "cpu", DOUBLE)
    for t in range(6):
        chosen = (logp[:, :, t] - noise.draw(4, V)).argmax(-1)
        kept = made.completion_mask[:, :, t] == 1
        assert torch.equal(chosen[kept], made.completion_ids[:, :, t][kept])
        assert (made.completion_ids[:, :, t][~kept] == PAD).all()
    ends = (made.completion_ids == EOS) & (made.completion_mask == 1)
    assert ends.any() and not ends.all(-1).any()  # some end, some do not
    after = ends.cumsum(-1) - ends.long()
    assert torch.equal(made.completion_mask, (after == 0).long())


def test_samples_follow_the_policy():
    "Frequencies of all strings of two tokens against the bare model's, by chi-square."
    from scipy import stats

    model, rows, seeds = tiny(2), 4000, 4
    prompt = torch.tensor([2, 7, 3]).expand(seeds, rows, 3)
    given = prompt, torch.ones_like(prompt), SeededNoise(range(seeds), 0, "cpu", DOUBLE)
    ids, mask = sample(stack_of(model).copies(seeds), *given, 2, EOS, PAD)
    first = model(torch.tensor([[2, 7, 3]])).logits[0, -1].softmax(-1)
    second = torch.stack(
        [model(torch.tensor([[2, 7, 3, o]])).logits[0, -1].softmax(-1) for o in range(V)]
    )
    second[EOS] = torch.eye(V, dtype=DOUBLE)[PAD]
    expected = (first[:, None] * second).flatten().detach() * rows * seeds
    counts = torch.bincount((ids[..., 0] * V + ids[..., 1]).flatten(), minlength=V * V)
    common = expected > 5
    left = [o[~common].sum()[None] for o in (counts, expected)]
    observed, expected = (torch.cat([o[common], p]) for o, p in zip((counts, expected), left))
    assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-4
    assert (mask[..., 1] == (ids[..., 0] != EOS)).all()


def written_out(policy, reference, r, rewards, arm, beta, a, c, group):
    "Eq. 3 of the update's chapter by autograd, rollout by rollout, each read alone."
    found = []
    for row in range(len(rewards)):
        logp, kept = bare_log_probs(policy, r, arm, row)
        logq = bare_log_probs(reference, r, arm, row)[0].detach()
        kl = (logp.exp() * (logp - logq)).sum(-1)
        picked = [o[range(len(kept)), kept] for o in (logp, logq)]
        found.append((picked[0], kl, (picked[0] - picked[1]).detach().sum()))
    total = 0.0
    for row, (logp, kl, ratio) in enumerate(found):
        first = row // group * group
        others = [o for o in range(first, first + group) if o != row]
        whole = kl.detach().sum()
        for m in range(len(logp)):
            after = [found[o][1].detach()[m + 1 :].sum() for o in others]
            sums = [found[o][1].detach().sum() for o in others]
            ratios = [found[o][2] for o in others]
            mean = [torch.stack(o).mean() for o in (after, sums, ratios)]
            own = kl.detach()[m + 1 :].sum() - mean[0], whole - mean[1], ratio - mean[2]
            reward = rewards[row] - rewards[others].mean()
            weight = reward - (beta - a) * own[0] - (a - c) * own[1] - c * own[2]
            total = total - logp[m] * weight
        total = total + (beta - c) * kl.sum()
    return total / len(rewards)


METHODS = dict(rb=lambda o: (0.0, 0.0), rb_sequence=lambda o: (o, 0.0), mc=lambda o: (o, o))


def test_the_gradient_is_the_written_out_update():
    "Every method, at different beta in one stack; `fitted` with coefficients from a first batch."
    models, reference = [tiny(o) for o in range(4)], tiny(9)
    arms = [Arm(m, b) for m, b in zip(("mc", "rb_sequence", "rb", "fitted"), (0.2, 0.5, 1.0, 0.7))]
    loss, policy = UpdateLoss(arms), stack_of(*models)
    for seed in (0, 1):
        r = rollouts(seed, arms=4)
        rewards = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
        leaves = {k: o.clone().requires_grad_() for k, o in policy.weights.items()}
        scores = score(Stack(leaves, policy.shape), stack_of(reference), r)
        value = loss(scores, rewards, slice(0, 4), 2)
        gradients = torch.autograd.grad(value, list(leaves.values()))
        used = loss.logged["fit_past"].tolist(), loss.logged["fit_noise"].tolist()
    assert abs(used[0][3]) > 0.01 and abs(used[1][3]) > 0.01
    for i, (arm, model) in enumerate(zip(arms, models)):
        fitted = arm.method == "fitted"
        a, c = (used[0][i], used[1][i]) if fitted else METHODS[arm.method](arm.beta)
        given = model, reference, r, rewards[i], i, arm.beta, a, c, 2
        names = [o.removeprefix("transformer.") for o, _ in model.named_parameters()]
        expected = dict(
            zip(names, torch.autograd.grad(written_out(*given), list(model.parameters())))
        )
        tolerance = 1e-6 if fitted else 1e-11  # the log holds float32
        for name, found in zip(leaves, gradients):
            torch.testing.assert_close(found[i], expected[name], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("clip", [1e9, 0.5])
def test_the_optimiser_is_adamw_after_the_trainers_clipping(clip):
    "Three steps of two arms with rates of their own, the last two at half the rate."
    stack, rates = stack_of(tiny(0), tiny(1)), torch.tensor([1e-2, 3e-2], dtype=DOUBLE)
    alone = [
        {k: o[arm].clone().requires_grad_() for k, o in stack.weights.items()} for arm in (0, 1)
    ]
    theirs = [
        torch.optim.AdamW(o.values(), lr=r.item(), eps=1e-5, weight_decay=0.0)
        for o, r in zip(alone, rates)
    ]
    ours, gen = StackedAdamW(stack, rates, 1e-5, max_grad_norm=clip), torch.Generator()
    for update, factor in enumerate((1.0, 0.5, 0.5), 1):
        gradients = {
            k: torch.randn(o.shape, generator=gen, dtype=DOUBLE) for k, o in stack.weights.items()
        }
        norms = ours.step(slice(0, 2), gradients, torch.full((2,), factor, dtype=DOUBLE), update)
        for arm, optimizer in enumerate(theirs):
            for name, o in alone[arm].items():
                o.grad = gradients[name][arm].clone()
            norm = torch.nn.utils.clip_grad_norm_(alone[arm].values(), clip)
            torch.testing.assert_close(norms[arm], norm, atol=0, rtol=1e-12)
            optimizer.param_groups[0]["lr"] = rates[arm].item() * factor
            optimizer.step()
    for arm in (0, 1):
        for name, o in alone[arm].items():
            torch.testing.assert_close(stack.weights[name][arm], o.detach(), atol=1e-13, rtol=0)


class Length:
    "A reward that needs no text."

    def submit(self, prompts, rollouts):
        letters = torch.tensor([len(o) for o in prompts]).view(rollouts.prompt_index.shape)
        return lambda: (rollouts.completion_mask.sum(-1) * letters).double()


PROMPTS = PromptTable(
    ["a", "bb", "ccc", "dddd"],
    torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 2, 4]]),
    torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]]),
)
SETTINGS = dict(
    updates=3, prompts_per_update=2, num_generations=2, max_completion_length=4, eos_token_id=EOS
)


def runs_of(arms, trainable=None, **settings):
    start = stack_of(tiny(0))
    given = arms, start.copies(len(arms)), stack_of(tiny(9)), PROMPTS
    loss = UpdateLoss(arms)
    return ManyRuns(*given, Settings(**SETTINGS | settings), loss, Length(), trainable)


@pytest.mark.parametrize("arms_at_once", [1, 2, 128])
def test_an_arm_is_what_it_would_be_alone(arms_at_once):
    "Also in parts, beside another seed, another method, another rate and another schedule."
    arms = [
        Arm("mc", 0.3, 7, 1e-3),
        Arm("fitted", 0.5, 8, 2e-3, "linear"),
        Arm("fitted", 0.9, 7, 1e-3),
    ]
    together, alone = runs_of(arms, arms_at_once=arms_at_once), runs_of(arms[1:2])
    for _ in range(3):
        first, second = together.update(), alone.update()
        for name in second:
            torch.testing.assert_close(first[name][1:2], second[name], atol=1e-6, rtol=1e-6)
    judged, expected = (o.evaluate(PROMPTS, 3, rows_at_once=5)() for o in (together, alone))
    for name in expected:
        torch.testing.assert_close(judged[name][1:2], expected[name], atol=1e-6, rtol=1e-6)
    weights = [o.policies.weights["h.0.mlp.c_fc.weight"] for o in (together, alone)]
    torch.testing.assert_close(weights[0][1:2], weights[1], atol=1e-7, rtol=0)
    assert (weights[0][0] - weights[0][2]).abs().max() > 1e-4


def test_one_policy_has_no_kl_to_itself_and_its_reward_is_counted():
    runs = runs_of([Arm("rb", 0.5, 3)])
    runs.reference = stack_of(tiny(0))
    found = runs.evaluate(PROMPTS, 4)()
    assert found["kl_rb"].abs().max() < 1e-12 and found["kl_mc"].abs().max() < 1e-12
    assert 1 <= found["length"] <= 4 and found["reward"] > found["length"]


def test_a_rate_that_falls_to_zero_and_tensors_that_stay():
    runs = runs_of(
        [Arm("mc", 0.3, 0, 1e-2, "linear"), Arm("mc", 0.3, 0, 1e-2)], lambda o: "ln" in o
    )
    start = {k: o.clone() for k, o in runs.policies.weights.items()}
    for update in range(3):
        assert runs._factor(slice(0, 2)).tolist() == [1 - update / 3, 1.0]
        runs.update()
    for name, o in runs.policies.weights.items():
        assert torch.equal(o, start[name]) != ("ln" in name)


def test_prompts_come_round_in_an_order_of_the_seed():
    first, again, other = (prompt_order(o, 10, 3) for o in (1, 1, 2))
    rounds = [torch.cat([next(first) for _ in range(3)]).tolist() for _ in range(2)]
    assert len(set(rounds[0])) == 9 and rounds[0] != rounds[1]
    assert torch.cat([next(again) for _ in range(3)]).tolist() == rounds[0]
    assert torch.cat([next(other) for _ in range(3)]).tolist() != rounds[0]
    with pytest.raises(InputError, match="there are 10 prompts"):
        next(prompt_order(0, 10, 11))


def test_noise_of_a_seed_is_its_own():
    "Different for every seed and update; whatever seeds stand beside it."
    noise = SeededNoise([4, 9, 4], 6).draw(2, 50)
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert torch.equal(SeededNoise([9], 6).draw(2, 50)[0], noise[1])
    assert not torch.equal(SeededNoise([9], 7).draw(2, 50)[0], noise[1])


def test_the_quick_reward_is_the_linear_reward(tmp_path):
    "Also for a text without a known word, repeated words, capitals and letters of other scripts."
    from datasets import Dataset

    from klrb.rlhf.reward import save_tfidf_reward, train_tfidf_reward

    texts = ["A great, great film", "a dull film", "Größe was great fun", "dull dull plot it was"]
    reviews = Dataset.from_dict(dict(text=texts * 4, label=[1, 0, 1, 0] * 4))
    reward = train_tfidf_reward(reviews)
    save_tfidf_reward(reward, tmp_path)
    asked = [*texts, "", "x", "GREAT film film film", "größe I'd dull, plot"]
    found = QuickTfidf(tmp_path).score(asked)
    torch.testing.assert_close(
        torch.tensor(found, dtype=DOUBLE), torch.tensor(reward.score(asked)), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_rewards_read_prompt_and_completion(tmp_path, workers):
    "In order, in processes or not, without what follows the end."
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    from klrb.models import POCKET, load_tokenizer
    from klrb.rlhf.reward import TfidfReward, save_tfidf_reward

    tokenizer, texts = load_tokenizer("pocket"), ["good film", "bad film", "bad bad", "so so"]
    vectorizer = TfidfVectorizer(dtype=np.float64, sublinear_tf=True).fit(texts)
    reward = TfidfReward(vectorizer, np.arange(1.0, 1 + len(vectorizer.vocabulary_)), 0.25)
    save_tfidf_reward(reward, tmp_path)
    prompts, endings = ["a good", "the bad", "so", ""], [" film", " bad film", " so", "good bad"]
    rows = [tokenizer(o, add_special_tokens=False).input_ids for o in endings]
    ids, mask = torch.full((2, 2, 9), rows[1][0]), torch.zeros(2, 2, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        row = [*row, tokenizer.eos_token_id]
        ids[i // 2, i % 2, : len(row)] = torch.tensor(row)
        mask[i // 2, i % 2, : len(row)] = 1
    r = ArmRollouts(torch.zeros(2, 2), None, None, ids, mask)
    pooled = PooledReward(tmp_path, POCKET, workers)
    try:
        found = pooled.submit(prompts, r)()
    finally:
        pooled.close()
    expected = reward.score([a + b for a, b in zip(prompts, endings)]).reshape(2, 2)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-12, rtol=0)
