"""Program: several of LLaVA's trainings in one process, which costs one start instead of one each.

``python train_rows.py ROWS.json`` trains each row (``options`` of LLaVA, ``environment``, ``call``:
arguments of ``train``), and writes what went wrong, a traceback or "", by the row's name to
ROWS.told.json.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

import torch


def train(row: dict) -> str:
    """One training; returns its traceback if it fails."""
    os.environ.update(row["environment"])
    sys.argv = ["train.py", *row["options"]]
    # LLaVA makes its projector and LoRA weights before it sets a seed
    torch.manual_seed(0)
    try:
        importlib.import_module("llava.train.train").train(**row["call"])
        return ""
    except Exception:
        return traceback.format_exc()
    finally:
        for name in row["environment"]:
            del os.environ[name]


if __name__ == "__main__":
    rows = Path(sys.argv[1])
    outputs = {name: train(row) for name, row in json.loads(rows.read_text()).items()}
    rows.with_suffix(".told.json").write_text(json.dumps(outputs))
