"""The command line of stage 2: ``llm2clip train-tower`` in one process, scripts/train_tower.py under a launcher.

A recipe or a file gives the whole configuration, options override fields. Options that Hugging Face's Trainer
and LLaVA's scripts know keep their names. tyro reads them; where it is not installed (LLaVA's environment) a plain
reader takes the same ``--section.field value``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from llm2clip_plugin.stages.tower.config import RunConfig, from_plain
from llm2clip_plugin.stages.tower.recipes import RECIPES, recipe

ALIASES = {  # as in LLaVA's scripts -> here
    "vision_tower": "tower.path",
    "data_path": "data.path",
    "image_folder": "data.read.images",
    "learning_rate": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "warmup_ratio": "optim.warmup_ratio",
    "warmup_steps": "optim.warmup_steps",
    "max_grad_norm": "optim.max_grad_norm",
    "lr_scheduler_type": "optim.schedule",
    "per_device_train_batch_size": "train.micro_batch",
    "num_train_epochs": "train.num_train_epochs",
    "max_steps": "train.max_steps",
    "save_steps": "train.save_steps",
    "save_total_limit": "train.save_total_limit",
    "eval_steps": "train.eval_steps",
    "logging_steps": "train.logging_steps",
    "report_to": "train.report_to",
    "seed": "train.seed",
    "dataloader_num_workers": "train.dataloader_num_workers",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "torch_compile": "train.torch_compile",
    "resume_from_checkpoint": "resume",
    "dual.joint_width": "dual.projection_dim",  # its name in version 0.1
}
TRUTH = {"true": True, "false": False}


def main(argv: list[str]) -> int:
    """Read the command line, train; exit status 0, also after a SIGTERM that saved."""
    from llm2clip_plugin.stages.tower.run import train_tower

    tower = train_tower(read_command(argv), argv)
    if tower is not None and os.environ.get("RANK", "0") == "0":
        print(f"tower: {tower}")
    return 0


def read_command(argv: list[str]) -> RunConfig:
    """The configuration of a command line. Raises ValueError or exits with status 2 for a misspelt option."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="")
    first.add_argument("--config", default="")
    first.add_argument("--local_rank", "--local-rank", default="")  # the DeepSpeed launcher's; LOCAL_RANK says it too
    chosen, rest = first.parse_known_args(argv)
    if chosen.recipe and chosen.config:
        raise ValueError(f"--recipe {chosen.recipe} and --config {chosen.config}: give one of them")
    default = from_file(Path(chosen.config)) if chosen.config else recipe(chosen.recipe or "quickstart")
    return override(default, translate(rest))


def from_file(path: Path) -> RunConfig:
    """A configuration file, or the run.json of an earlier run."""
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return from_plain(RunConfig, body.get("config", body) if isinstance(body, dict) else body, where=str(path))


def translate(argv: list[str]) -> list[str]:
    """Trainer's names in the place of ours; ``--bf16 True`` becomes the precision, ``--flag True`` the flag."""
    out: list[str] = []
    words = [part for word in argv for part in _split(word)]
    i = 0
    while i < len(words):
        name = words[i].removeprefix("--").replace("-", "_") if words[i].startswith("--") else ""
        following = words[i + 1] if i + 1 < len(words) else ""
        truth = TRUTH.get(following.lower())
        if name in ("bf16", "fp16"):
            out += ["--train.precision", name] if truth is not False else []
        elif name == "report_to" and following.lower() == "none":
            out.append("--train.report_to")  # an empty list
            truth = False
        elif name and truth is not None:
            place = ALIASES.get(name, name)
            section, _, leaf = place.rpartition(".")
            out.append(f"--{section}{'.' if section else ''}{'' if truth else 'no-'}{leaf}")
        else:
            out.append(f"--{ALIASES[name]}" if name in ALIASES else words[i])
            truth = None
        i += 1 if truth is None else 2
    return out


def _split(word: str) -> list[str]:
    """``--name=value`` as two words."""
    return word.split("=", 1) if word.startswith("--") and "=" in word else [word]


def override(default: RunConfig, argv: list[str]) -> RunConfig:
    """``default`` with the fields of the command line."""
    if importlib.util.find_spec("tyro") is None:
        return _override_plainly(default, argv)
    import tyro

    about = (
        f"Train a vision tower against an LLM teacher. --recipe NAME ({', '.join(RECIPES)}) or --config FILE (JSON) "
        "gives the fields that the options below override."
    )
    return tyro.cli(RunConfig, args=argv, default=default, prog="llm2clip train-tower", description=about)


def _override_plainly(default: RunConfig, argv: list[str]) -> RunConfig:
    """``--section.field value ...`` without tyro: values are JSON where they can be, words else."""
    if "-h" in argv or "--help" in argv:
        print(json.dumps(dataclasses.asdict(default), indent=2))
        sys.exit(0)
    body = json.loads(json.dumps(dataclasses.asdict(default)))
    i = 0
    while i < len(argv):
        if not argv[i].startswith("--"):
            raise ValueError(f"expected an option, found {argv[i]!r}")
        path = argv[i].removeprefix("--").replace("-", "_").split(".")
        values: list[Any] = []
        i += 1
        while i < len(argv) and not argv[i].startswith("--"):
            values.append(_parsed(argv[i]))
            i += 1
        _place(body, path, values)
    return from_plain(RunConfig, body, where="the command line")


def _parsed(word: str) -> Any:
    """JSON if it is some, else the word."""
    try:
        return json.loads(word)
    except ValueError:
        return word


def _place(body: Any, path: list[str], values: list[Any]) -> None:
    """Put values where a dotted path points; an unknown name is left for from_plain to refuse."""
    for name in path[:-1]:
        body = body[int(name)] if isinstance(body, list) else body.setdefault(name, {})
    name = path[-1]
    if not values and isinstance(body.get(name), list):
        body[name] = []
    elif not values:
        body[name.removeprefix("no_")] = not name.startswith("no_")
    else:
        body[name] = values if isinstance(body.get(name), list) else values[0]
