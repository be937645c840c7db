"""The command line of stage 2: ``llm2clip train-tower``; under a launcher, scripts/train_tower.py.

A recipe or a file gives the full configuration, options override fields. Options of Hugging Face's Trainer and of
LLaVA's scripts keep their names.
"""

import json
from pathlib import Path

from llm2clip_plugin.options.command import Command
from llm2clip_plugin.options.declared import Extra
from llm2clip_plugin.options.shared import READ_NAMES, TRAINING_NAMES, in_section
from llm2clip_plugin.run_files import started_by
from llm2clip_plugin.stages.command_line import plan_or_train, rank_and_world, read_settings
from llm2clip_plugin.stages.settings import RENAMED, from_plain
from llm2clip_plugin.stages.tower.config import RunConfig
from llm2clip_plugin.stages.tower.plan import tower_plan
from llm2clip_plugin.stages.tower.recipes import DEFAULT, RECIPES, recipe
from llm2clip_plugin.stages.tower.run import train_tower
from llm2clip_plugin.stages.tower.unused import UNUSED

COMMAND = Command(
    name="train-tower",
    example="llm2clip train-tower /data/photos --tower facebook/dinov2-base --output runs/photos",
    about="Stage 2: train a vision tower against the cached embeddings of an LLM. A recipe or a file gives the full "
    "configuration, options override single settings. Rerun the same command to resume.",
    settings=RunConfig,
    arguments=("data.path",),
    everyday=(
        "recipe",
        "tower.path",
        "data.cache",
        "data.read.images",
        "data.validation",
        "output_dir",
        "train.global_batch",
        "train.micro_batch",
        "optim.lr",
        "train.num_train_epochs",
        "train.max_steps",
        "train.precision",
        "deepspeed",
        "dry_run",
    ),
    shown={
        **TRAINING_NAMES,
        "data.path": "data",
        "data.cache": "cache",
        "data.weight": "data-weights",
        **in_section("data.read", READ_NAMES),
        "tower.path": "tower",
        "optim.lr": "lr",
        "optim.weight_decay": "weight-decay",
        "heads.batch": "heads.batch-size",
        "heads": "heads.",
        "loss": "loss.",
        "dual": "dual.",
        "data.augment": "augment.",
        "plan.images": "assumed-samples",
        "plan.captions": "assumed-captions",
    },
    also=RENAMED,
    extras={
        "recipe": Extra(
            metavar="NAME",
            help=f"{DEFAULT} (the default): any data and tower; quickstart: the built-in emoji alone; the paper's: "
            f"{', '.join(name for name in RECIPES if name not in (DEFAULT, 'quickstart'))}; "
            "NAME/TEACHER for caches of one of the paper's LLMs",
        ),
        "config": Extra(metavar="FILE", help="a configuration in JSON, for example the run.json of an earlier run"),
    },
)


def main(argv: list[str]) -> int:
    """Print the plan or train; exit status 0, also after a SIGTERM that saved."""
    config = read_command(argv)
    config.validate(needs_data=not config.dry_run)
    if rank_and_world()[0] == 0 and not any(word.startswith(("--recipe", "--config")) for word in argv):
        print(f"recipe: {DEFAULT} (the paper's settings for any data and tower; --recipe NAME chooses another)")
    return plan_or_train(
        config.dry_run,
        lambda: tower_plan(config, argv),
        lambda: train_tower(config, command=started_by("train-tower", argv)),
        "tower: {}",
    )


def read_command(argv: list[str]) -> RunConfig:
    """The configuration of a command line. Raises ValueError; prints --help and exits with status 0."""
    return read_settings(COMMAND, argv, starting_point, UNUSED)


def starting_point(extras: dict[str, str]) -> RunConfig:
    """The configuration of --config or --recipe, which the other options override."""
    name, file = extras.get("recipe", ""), extras.get("config", "")
    if name and file:
        raise ValueError(f"--recipe {name} and --config {file} are mutually exclusive; pass one")
    return from_file(Path(file)) if file else recipe(name or DEFAULT)


def from_file(path: Path) -> RunConfig:
    """A configuration file, or the run.json of an earlier run."""
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return from_plain(RunConfig, body.get("config", body) if isinstance(body, dict) else body, where=str(path))
