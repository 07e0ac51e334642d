"""The KL that llama.cpp's own `--kl-divergence` reports, from the same windows by klrb.

    llama-perplexity -m BASE -f TEXT -c 512 --chunks 24 --kl-divergence-base FILE
    llama-perplexity -m OTHER -f TEXT -c 512 --chunks 24 --kl-divergence-base FILE --kl-divergence
    python tests/llama_cpp_kld.py FILE BASE OTHER runtime|weights

BASE and OTHER are GGUF files. Of each window the second half counts, as there. `runtime` runs both
files in llama.cpp (llama-cpp-python), `weights` through transformers. What was found is in
outputs/published/measure/llama_cpp.csv.
"""

import struct
import sys

import numpy as np
import torch

from klrb.models import load_model
from klrb.steps import step_kl


def windows(path):
    "Token ids of the windows, (chunks, length)."
    with open(path, "rb") as file:
        if file.read(8) != b"_logits_":
            sys.exit(f"{path} is not what llama-perplexity writes")
        length, _, chunks = struct.unpack("<Iii", file.read(12))
        return np.frombuffer(file.read(4 * length * chunks), "<i4").reshape(chunks, length)


def in_runtime(path, length):
    from llama_cpp import Llama

    model = Llama(path, n_ctx=length, n_batch=length, logits_all=True, verbose=False)

    def logits(ids):
        model.reset()
        model.eval(ids.tolist())
        return torch.tensor(np.array(model.scores[:length]))

    return logits


def of_weights(path, length):
    model = load_model(path)
    return lambda ids: model(input_ids=torch.tensor(ids.astype(int))[None]).logits[0]


@torch.no_grad()
def main():
    ids = windows(sys.argv[1])
    length = ids.shape[1]
    half = slice(length // 2, length - 1)
    read = dict(runtime=in_runtime, weights=of_weights)[sys.argv[4]]
    base, other = (read(o, length) for o in sys.argv[2:4])
    kl, same = [], []
    for row in ids:
        a, b = base(row)[half], other(row)[half]
        kl.append(step_kl(a, b).double())
        same.append(a.argmax(-1) == b.argmax(-1))
    kl, same = torch.cat(kl), torch.cat(same).double()
    print(
        f"{kl.mean():.6f} ± {kl.std() / len(kl) ** 0.5:.6f}, same top {same.mean():.6f}, {len(kl)}"
    )


if __name__ == "__main__":
    main()
