"""The command line of stage 1: ``llm2clip finetune-llm``."""

from llm2clip_plugin.run_files import started_by
from llm2clip_plugin.stages.command_line import plan_or_train
from llm2clip_plugin.stages.llm.options import FINETUNE
from llm2clip_plugin.stages.llm.plan import llm_plan
from llm2clip_plugin.stages.llm.run import finetune_llm


def main(argv: list[str]) -> int:
    """``llm2clip finetune-llm DATA [DATA ...] --llm PATH_OR_HUB_ID [options]``."""
    config = FINETUNE.parse(argv)
    return plan_or_train(
        config.dry_run,
        lambda: llm_plan(config),
        lambda: finetune_llm(config, started_by("finetune-llm", argv)),
        "adapter: {}",
    )
