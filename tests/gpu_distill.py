"""The distillation study of the pocket model on one device: `klrb.rlhf.many_distill`.

    python tests/gpu_distill.py --prepared FOLDER --out FOLDER [--seconds SECONDS] [--plan JSON]

Needs torch, tokenizers, safetensors and pandas with pyarrow; neither TRL nor the network.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from klrb.rlhf.many_distill import main  # noqa: E402

if __name__ == "__main__":
    main()
