"""The command line of ``llm2clip train-text-adapter``; under a launcher, scripts/train_text_adapter.py."""

from llm2clip_plugin.run_files import started_by
from llm2clip_plugin.stages.command_line import rank_and_world, read_settings
from llm2clip_plugin.stages.text_adapter.config import AdapterConfig
from llm2clip_plugin.stages.text_adapter.options import COMMAND
from llm2clip_plugin.stages.text_adapter.run import train_text_adapter


def main(argv: list[str]) -> int:
    """Train; exit status 0, also after a SIGTERM that saved."""
    config = read_command(argv)
    path = train_text_adapter(config.validate(), command=started_by("train-text-adapter", argv))
    if path is not None and rank_and_world()[0] == 0:
        print(f"tower: {path}\nstage 2: llm2clip train-tower ... --tower {path} --keep-heads")
    return 0


def read_command(argv: list[str]) -> AdapterConfig:
    """The configuration of a command line. Raises ValueError; prints --help and exits with status 0."""
    return read_settings(COMMAND, argv, lambda extras: AdapterConfig(), [])
