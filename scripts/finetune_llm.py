#!/usr/bin/env python3
"""Stage 1 under the DeepSpeed launcher (or torchrun):

    deepspeed --num_gpus 8 scripts/finetune_llm.py /data/cc3m --llm meta-llama/Llama-3.2-1B-Instruct \\
        --deepspeed scripts/zero2.json --pair-kinds short:long --output-dir runs/llama-1b-cc

``--help`` lists every field; the same command again goes on from the newest checkpoint.
"""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1") if os.environ.get("WORLD_SIZE", "1") != "1" else None
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # ranks that share cores: spinning threads halve the speed

from llm2clip_plugin.cli import run  # noqa: E402

if __name__ == "__main__":
    sys.exit(run("finetune-llm", sys.argv[1:]))
