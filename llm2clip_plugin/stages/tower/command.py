"""The command line of stage 2: ``llm2clip train-tower``; under a launcher, scripts/train_tower.py.

A recipe or a file gives the full configuration, options override fields. Options of Hugging Face's Trainer and of
LLaVA's scripts keep their names.
"""

import json
from pathlib import Path

from llm2clip_plugin.run_files import started_by
from llm2clip_plugin.stages.command_line import plan_or_train, rank_and_world, read_settings
from llm2clip_plugin.stages.settings import from_plain
from llm2clip_plugin.stages.tower.config import RunConfig
from llm2clip_plugin.stages.tower.options import COMMAND
from llm2clip_plugin.stages.tower.plan import tower_plan
from llm2clip_plugin.stages.tower.recipes import DEFAULT, recipe
from llm2clip_plugin.stages.tower.run import train_tower


def main(argv: list[str]) -> int:
    """Print the plan or train; exit status 0."""
    config = read_command(argv)
    config.validate(needs_data=not config.dry_run)
    if rank_and_world()[0] == 0 and not any(word.startswith(("--recipe", "--config")) for word in argv):
        print(f"recipe: {DEFAULT} (the paper's settings for any data and tower; --recipe NAME chooses another)")
    return plan_or_train(
        config.dry_run,
        lambda: tower_plan(config),
        lambda: train_tower(config, command=started_by("train-tower", argv)),
        "tower",
    )


def read_command(argv: list[str]) -> RunConfig:
    """The configuration of a command line. Raises ValueError; prints --help and exits with status 0."""
    return read_settings(COMMAND, argv, starting_point)


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
