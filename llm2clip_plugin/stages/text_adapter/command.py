"""The command line of ``llm2clip train-text-adapter``; under a launcher, scripts/train_text_adapter.py."""

from llm2clip_plugin.files import started_by
from llm2clip_plugin.stages.settings import plan_or_train
from llm2clip_plugin.stages.text_adapter.options import COMMAND
from llm2clip_plugin.stages.text_adapter.plan import adapter_plan
from llm2clip_plugin.stages.text_adapter.run import train_text_adapter


def main(argv: list[str]) -> int:
    """Print the plan or train; exit status 0."""
    config = COMMAND.parse(argv)
    config.validate(needs_data=not config.dry_run)
    return plan_or_train(
        config.dry_run,
        lambda: adapter_plan(config),
        lambda: train_text_adapter(config, command=started_by("train-text-adapter", argv)),
        "tower: {0}\nstage 2: llm2clip train-tower ... --tower {0} --keep-heads",
    )
