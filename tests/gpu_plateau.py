"""The plateau study of the pocket model on one device: `klrb.rlhf.plateau`.

    python tests/gpu_plateau.py --prepared FOLDER --out FOLDER [--seconds SECONDS] [--plan JSON]

Needs torch, tokenizers, safetensors, pandas with pyarrow, and scipy; neither TRL nor the network.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # the processes of the reward read this file too
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from klrb.rlhf.plateau import main

    main()
