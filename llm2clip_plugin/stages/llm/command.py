"""The command lines of stage 1: ``llm2clip finetune-llm`` and ``llm2clip pretrain-llm``."""

from pathlib import Path

from llm2clip_plugin.commands import command
from llm2clip_plugin.options.command import Command
from llm2clip_plugin.run_files import started_by
from llm2clip_plugin.stages.command_line import plan_or_train, read_settings
from llm2clip_plugin.stages.llm.config import FinetuneConfig
from llm2clip_plugin.stages.llm.options import FINETUNE, PRETRAIN
from llm2clip_plugin.stages.llm.plan import llm_plan, pretraining_plan
from llm2clip_plugin.stages.llm.recipes import llm_recipe
from llm2clip_plugin.stages.llm.run import ADAPTER, finetune_llm, pretrain_llm
from llm2clip_plugin.stages.llm.unused import PRETRAINING_UNUSED, UNUSED


def parse(argv: list[str], command: Command[FinetuneConfig] = FINETUNE) -> FinetuneConfig:
    """The configuration of a command line: a recipe's or the default, with the fields that options set."""

    def default(extras: dict[str, str]) -> FinetuneConfig:
        name = extras.get("recipe", "")
        return llm_recipe(name) if name else FinetuneConfig()

    return read_settings(command, argv, default, PRETRAINING_UNUSED if command is PRETRAIN else UNUSED)


def main(argv: list[str]) -> int:
    """``llm2clip finetune-llm DATA [DATA ...] --llm PATH_OR_HUB_ID [options]``."""
    config = parse(argv)
    return plan_or_train(
        config.dry_run,
        lambda: llm_plan(config),
        lambda: finetune_llm(config, started_by("finetune-llm", argv)),
        "adapter: {}",
    )


def main_pretrain(argv: list[str]) -> int:
    """``llm2clip pretrain-llm DATA [DATA ...] --llm PATH_OR_HUB_ID [options]``."""
    config = parse(argv, PRETRAIN)
    adapter = Path(config.output_dir) / ADAPTER
    merge = command("export-llm", "--llm", config.encoder.llm, "--adapter", adapter, "--output", "MERGED_LLM")
    result = "adapter: {}; merge it, then fine-tune the merged LLM: " + merge.replace("{", "{{").replace("}", "}}")
    return plan_or_train(
        config.dry_run,
        lambda: pretraining_plan(config),
        lambda: pretrain_llm(config, started_by("pretrain-llm", argv)),
        result,
    )
