#!/usr/bin/env python3
"""Stage 2 under the DeepSpeed launcher (or torchrun):

    deepspeed --num_gpus 2 scripts/train_tower.py --recipe openai_l14_336 --deepspeed scripts/zero1.json \\
        --data.path /data/cc3m --output_dir runs/l14 --optim.lr 1e-5

``--help`` lists every field; the same command again goes on from the newest checkpoint.
"""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1") if os.environ.get("WORLD_SIZE", "1") != "1" else None
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # ranks that share cores: spinning threads halve the speed

from llm2clip_plugin.cli import run  # noqa: E402

if __name__ == "__main__":
    sys.exit(run("train-tower", sys.argv[1:]))
