"""The checkpoints of a run folder, seen without torch: sizes, and whether their files are there and whole."""

import json
from dataclasses import dataclass
from pathlib import Path

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.outside.safetensors_header import read_header
from llm2clip_plugin.run_files import CHECKPOINTS

STATE = "state.json"  # train.checkpoint.TrainState


@dataclass(frozen=True, kw_only=True)
class CheckpointStatus:
    """One checkpoint."""

    name: str
    bytes: int
    problem: str  # "": complete; hashes are compared by a resume, not here


def list_checkpoints(run: Path) -> list[CheckpointStatus]:
    """The checkpoints of a run, oldest first."""
    return [
        CheckpointStatus(name=path.name, bytes=folder_bytes(path), problem=_problem(path))
        for path in sorted((run / CHECKPOINTS).glob("step-*"))
    ]


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder; those that vanish meanwhile count 0."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if not path.is_dir() else 0
        except OSError:
            continue
    return total


def _problem(path: Path) -> str:
    try:
        files = json.loads((path / STATE).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"no {STATE}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{STATE} is damaged"
    names = list(files) if isinstance(files, dict) and files else ["model.safetensors", "optimizer.safetensors"]
    for name in names:
        try:
            read_header(path / name)
        except FileNotFoundError:
            return f"no {name}"
        except (OSError, ContractError) as error:
            return f"{name} is damaged: {error}"
    return ""
