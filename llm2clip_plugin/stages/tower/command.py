"""The command line of stage 2: ``llm2clip train-tower``; under a launcher, scripts/train_tower.py.

A recipe or a file gives the full configuration, options override fields. Options of Hugging Face's Trainer and of
LLaVA's scripts keep their names.
"""

from llm2clip_plugin.run_files import started_by
from llm2clip_plugin.stages.command_line import plan_or_train, rank_and_world
from llm2clip_plugin.stages.tower.options import COMMAND
from llm2clip_plugin.stages.tower.plan import tower_plan
from llm2clip_plugin.stages.tower.recipes import DEFAULT
from llm2clip_plugin.stages.tower.run import train_tower


def main(argv: list[str]) -> int:
    """Print the plan or train; exit status 0."""
    config = COMMAND.parse(argv)
    config.validate(needs_data=not config.dry_run)
    if rank_and_world()[0] == 0 and not any(word.startswith(("--recipe", "--config")) for word in argv):
        print(f"recipe: {DEFAULT} (the paper's settings for any data and tower; --recipe NAME chooses another)")
    return plan_or_train(
        config.dry_run,
        lambda: tower_plan(config),
        lambda: train_tower(config, command=started_by("train-tower", argv)),
        "tower: {}",
    )
