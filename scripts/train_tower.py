#!/usr/bin/env python3
"""Stage 2 under the DeepSpeed launcher (or torchrun); ``--help`` lists every field, the same command resumes.

    deepspeed --num_gpus 2 scripts/train_tower.py /data/cc3m --recipe openai_l14_336 --deepspeed scripts/zero1.json \\
        --output runs/l14 --lr 1e-5
"""

import sys

from llm2clip_plugin.cli import leave, run

if __name__ == "__main__":
    leave(run("train-tower", sys.argv[1:]))
