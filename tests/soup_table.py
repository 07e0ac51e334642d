"""KL of the pocket model and of its DPO policy to averages of the two.

    python tests/soup_table.py PREPARED TABLE

PREPARED is the preparation of the pocket study: outputs/runs/pocket/prepare after `make study`.
What was found is in outputs/published/measure/soup.csv; the completions are the same for every
average, 64 prompts times 4.
"""

import sys
from pathlib import Path

import pandas as pd
import torch

from klrb.intervals import cluster_interval
from klrb.models import completion_logits, load_model, load_tokenizer, sample_rollouts
from klrb.rlhf.reviews import load_reviews, make_prompts, split_reviews
from klrb.soups import average_models
from klrb.steps import step_kl

SHARES = 0.0, 0.25, 0.5, 0.75, 1.0  # of the DPO policy


@torch.no_grad()
def rows(prepared):
    tokenizer = load_tokenizer("pocket")
    reviews = split_reviews(load_reviews())["evaluation"]
    prompts = make_prompts(reviews, tokenizer, 64)["prompt"]
    ends = dict(pocket=load_model("pocket"), tuned=load_model(str(prepared / "dpo_policy")))
    soups = [average_models(ends.values(), [1 - o, o]) for o in SHARES]
    for name, policy in ends.items():
        torch.manual_seed(0)
        drawn = sample_rollouts(policy, tokenizer, prompts, 4)
        given = drawn.prompt_ids, drawn.prompt_mask, drawn.completion_ids, drawn.completion_mask
        ours = completion_logits(policy, *given)
        for share, soup in zip(SHARES, soups):
            kl = (step_kl(ours, completion_logits(soup, *given)) * drawn.completion_mask).sum(1)
            values, clusters = (pd.Series(o.double().numpy()) for o in (kl, drawn.prompt_index))
            found = cluster_interval(values, clusters=clusters)
            yield dict(policy=name, share=share, kl=found.mean, low=found.low, high=found.high)


if __name__ == "__main__":
    pd.DataFrame(rows(Path(sys.argv[1]))).round(5).to_csv(sys.argv[2], index=False)
