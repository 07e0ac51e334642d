"""python site/prefixes.py PREPARED: site/prefix_explorer.json, the interactive page's data.

PREPARED is the preparation of the pocket study: outputs/runs/pocket/prepare after `make study`.
"""

import argparse
import hashlib
import json
import string
from pathlib import Path

TARGET = Path(__file__).resolve().parent / "prefix_explorer.json"
COMMAND = "python site/prefixes.py outputs/runs/pocket/prepare"
# Of the prompts that the study evaluates on, the twelve that read best; the page says so.
PREFIXES = (
    "This movie is",
    "The movie",
    "This movie is horrible,",
    "This movie is so bad it's",
    "Watching this stinker",
    "A great film requiring an",
    "This is one of the",
    "What happens to",
    "I love",
    "I saw",
    "You probably heard this phr",
    "Hello",
)
SCALE = 4096  # roots of probabilities are stored in units of 1/SCALE
DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"


def packed(numbers: list) -> str:
    "Integers from 0 on, five bits a digit, low bits first; a digit of 32 or more is not the last."
    out = []
    for number in numbers:
        while number > 31:
            out.append(DIGITS[32 + number % 32])
            number //= 32
        out.append(DIGITS[number])
    return "".join(out)


def unpacked(text: str) -> list:
    numbers, number, shift = [], 0, 0
    for digit in map(DIGITS.index, text):
        number += digit % 32 << shift
        shift += 5
        if digit < 32:
            numbers.append(number)
            number = shift = 0
    return numbers


def roots(probabilities) -> list:
    """The square root of each probability, rounded, and 1 at least: the support stays.

    Rounded roots keep the KL best for their size: its error is the same for common and rare tokens.
    """
    return (probabilities.sqrt() * SCALE).round().clamp(min=1).long().tolist()


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def collect(prepared: Path) -> dict:
    "Both models' next-token distributions after each prefix, from float64 forward passes."
    import pandas as pd
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from klrb.models import pocket_folder

    pocket, dpo = pocket_folder(), prepared / "dpo_policy"
    tokenizer = AutoTokenizer.from_pretrained(pocket)
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(o, dtype="float64").eval() for o in (dpo, pocket)
    )

    @torch.no_grad()
    def step(prefix):
        ids = tokenizer(prefix, return_tensors="pt").input_ids
        logp, logq = (o(ids).logits[0, -1].log_softmax(-1) for o in (policy, reference))
        return logp.exp(), logq.exp(), (logp.exp() * (logp - logq)).sum().item()

    prompts = list(pd.read_parquet(prepared / "evaluation_prompts.parquet").prompt.unique())
    assert set(PREFIXES) <= set(prompts)
    rows = []
    for prefix in PREFIXES:
        p, q, kl = step(prefix)
        row = dict(text=prefix, kl=kl, policy=packed(roots(p)), reference=packed(roots(q)))
        rows.append(row)
    return dict(
        made_by=COMMAND,
        policy_sha256=digest(dpo),
        reference_sha256=digest(pocket),
        scale=SCALE,
        prompts=len(prompts),
        mean_kl=sum(step(o)[2] for o in prompts) / len(prompts),
        tokens=[tokenizer.decode([o]) for o in range(len(tokenizer))],
        prefixes=rows,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prepared", type=Path)
    data = collect(parser.parse_args().prepared)
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    TARGET.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
