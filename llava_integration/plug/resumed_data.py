"""LLaVA resumes from any ``checkpoint-*`` in its output, also one that learned from other data.
Each checkpoint gets a file that says which data it was, and another data set is refused."""

import json
import os
from pathlib import Path
from typing import Any

from llava_integration.plug.checkpoints import config_of
from llm2clip_plugin.atomic import write_text
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.hashes import sha256_file

RECORD = "llm2clip_data.json"


def data_record(data: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint records of LLaVA's JSON; {} if it is no file."""
    if not os.path.isfile(data):
        return {}
    return {"data_path": str(data), "sha256": sha256_file(data)}


def record_data(folder: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Write it into a checkpoint's folder, which transformers 4.37 calls tmp-checkpoint-* at
    first; not into that of the finished model."""
    if record and "checkpoint-" in Path(folder).name:
        write_text(Path(folder) / RECORD, json.dumps(record, indent=2) + "\n")


def refuse_other_data(output: str, data: str | os.PathLike[str]) -> None:
    """Raise ContractError if LLaVA would resume in ``output`` what was trained on other data. Of a
    checkpoint without a record nothing is known."""
    sha256 = ""
    for folder in sorted(Path(output).glob("checkpoint-*")):
        record = config_of(folder, RECORD)
        if "sha256" not in record:
            continue
        sha256 = sha256 or str(data_record(data).get("sha256"))
        if record["sha256"] != sha256:
            raise ContractError(
                f"{folder} was trained on {record.get('data_path')} "
                f"(sha256 {record['sha256'][:12]}), and LLaVA would resume from it; "
                f"--data_path {data} has sha256 {sha256[:12]}: pass that data, choose another "
                f"--output_dir, or delete the checkpoint-* folders"
            )
