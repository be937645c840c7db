#!/usr/bin/env python3
"""Stage 2 under a launcher: deepspeed --num_gpus 8 scripts/train_tower.py /data/cc3m --recipe
openai_l14_336 --output runs/l14. ``--help`` lists every field, the same command resumes."""

import sys

from llm2clip_plugin.cli import leave, run

if __name__ == "__main__":
    leave(run("train-tower", sys.argv[1:]))
