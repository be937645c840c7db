#!/usr/bin/env python3
"""``llm2clip train-text-adapter`` under the DeepSpeed launcher (or torchrun):

    deepspeed --num_gpus 2 scripts/train_text_adapter.py /data/cc3m --tower towers/clip-l14 --output runs/clip-l14-text

``--help`` lists the options; rerun the same command to resume from the newest checkpoint.
"""

import sys

from llm2clip_plugin.cli import leave, run

if __name__ == "__main__":
    leave(run("train-text-adapter", sys.argv[1:]))
