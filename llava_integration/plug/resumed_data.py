"""What a checkpoint of LLaVA was made from: its data, and the model that the training started from.

LLaVA resumes from any ``checkpoint-*`` in its output, also one of other data or another model. Each
checkpoint gets a file with both, and others are refused. A LoRA's config.json gets the base model.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_integration.plug.checkpoints import config_of, model_sample
from llm2clip_plugin.atomic import write_text
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.hashes import sha256_file

RECORD = "llm2clip_data.json"
BASE = "llm2clip_base"  # in a LoRA's config.json
MODEL = "model_name_or_path"
SAMPLE = "model_sample_sha256"


def data_record(data: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint records of LLaVA's JSON; {} if it is no file."""
    if not os.path.isfile(data):
        return {}
    return {"data_path": str(data), "sha256": sha256_file(data)}


def model_record(model: str) -> dict[str, Any]:
    """What a checkpoint records of the model that its training started from; {} if its weights are
    not on this machine."""
    sample = model_sample(model)
    return {MODEL: model, SAMPLE: sample} if sample else {}


def record_data(folder: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Write both records into a checkpoint's folder, which transformers 4.37 calls tmp-checkpoint-*
    at first; not into that of the finished model."""
    if record and "checkpoint-" in Path(folder).name:
        write_text(Path(folder) / RECORD, json.dumps(record, indent=2) + "\n")


def recorded_in(output: str, field: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The checkpoints of an output whose record has a field, and that record; of one without a
    record nothing is known."""
    for folder in sorted(Path(output).glob("checkpoint-*")):
        record = config_of(folder, RECORD)
        if field in record:
            yield folder, record


def refuse_other_data(output: str, data: str | os.PathLike[str]) -> None:
    """Raise ContractError if LLaVA would resume in ``output`` what was trained on other data."""
    sha256 = ""
    for folder, record in recorded_in(output, "sha256"):
        sha256 = sha256 or str(data_record(data).get("sha256"))
        if record["sha256"] != sha256:
            raise ContractError(
                f"{folder} was trained on {record.get('data_path')} "
                f"(sha256 {record['sha256'][:12]}), and LLaVA would resume from it; "
                f"--data_path {data} has sha256 {sha256[:12]}: pass that data, choose another "
                f"--output_dir, or delete the checkpoint-* folders"
            )


def refuse_other_model(output: str, model: str) -> None:
    """Raise ContractError if LLaVA would resume in ``output`` a training that started from other
    weights. Those of a Hub id that is not downloaded are not compared."""
    sample = ""
    for folder, record in recorded_in(output, SAMPLE):
        sample = sample or model_sample(model)
        if sample and record[SAMPLE] != sample:
            raise ContractError(
                f"{folder} was trained from {record.get(MODEL)} "
                f"(sampled sha256 {record[SAMPLE][:12]}), and LLaVA would resume from it; "
                f"--model_name_or_path {model} has {sample[:12]}: pass that model, choose another "
                f"--output_dir, or delete the checkpoint-* folders"
            )


def refuse_other_base(
    config: dict[str, Any], base: str | os.PathLike[str], where: str | Path
) -> None:
    """Raise ContractError if a LoRA would be merged into other weights than those that it was
    trained on. ``config``: its config.json, in the folder ``where``."""
    record = config.get(BASE)
    if not record:
        return
    sample = model_sample(str(base))
    if sample and record[SAMPLE] != sample:
        raise ContractError(
            f"{where} is a LoRA that was trained on {record[MODEL]} with other weights (sampled "
            f"sha256 {record[SAMPLE][:12]}) than {base} has now ({sample[:12]}); pass the base "
            f"model that it was trained on as --model-base. If the weights are the same in other "
            f"files, delete {BASE!r} from its config.json"
        )
