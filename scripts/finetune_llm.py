#!/usr/bin/env python3
"""Stage 1 under the DeepSpeed launcher (or torchrun); ``--help`` lists every field, the same command resumes.

    deepspeed --num_gpus 8 scripts/finetune_llm.py /data/cc3m --llm meta-llama/Llama-3.2-1B-Instruct \\
        --deepspeed scripts/zero2.json --pair-kinds short:long --output runs/llama-1b-cc
"""

import sys

from llm2clip_plugin.cli import leave, run

if __name__ == "__main__":
    leave(run("finetune-llm", sys.argv[1:]))
