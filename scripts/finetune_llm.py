#!/usr/bin/env python3
"""Stage 1 under a launcher. ``--help`` lists every field, the same command resumes.

    deepspeed --num_gpus 8 scripts/finetune_llm.py /data/cc3m --llm meta-llama/Llama-3.2-1B \\
        --deepspeed scripts/zero2.json --output runs/llm
"""

import sys

from llm2clip_plugin.cli import leave, run

if __name__ == "__main__":
    leave(run("finetune-llm", sys.argv[1:]))
