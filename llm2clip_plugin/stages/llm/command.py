"""The command lines of stage 1: ``llm2clip finetune-llm`` and ``llm2clip pretrain-llm``."""

from typing import Any

from llm2clip_plugin.stages.command_line import override, plan_or_train, split_options
from llm2clip_plugin.stages.llm.config import FinetuneConfig
from llm2clip_plugin.stages.llm.plan import llm_plan, pretraining_plan
from llm2clip_plugin.stages.llm.recipes import LLM_RECIPES, llm_recipe
from llm2clip_plugin.stages.llm.run import finetune_llm, pretrain_llm
from llm2clip_plugin.stages.llm.unused import PRETRAINING_UNUSED, UNUSED

ABOUT = {
    "finetune-llm": f"""\
llm2clip finetune-llm /data/cc3m --llm meta-llama/Llama-3.2-1B-Instruct --pair-kinds short:long --output-dir runs/llm

Fine-tune an LLM contrastively on captions: DATA [DATA ...] and --llm PATH_OR_HUB_ID, or --recipe NAME
({", ".join(LLM_RECIPES)}) for the paper's LLMs and settings. Rerun the same command to resume.""",
    "pretrain-llm": """\
llm2clip pretrain-llm /data/cc3m --llm meta-llama/Llama-3.2-1B-Instruct --output-dir runs/mntp

Warm an LLM up for fine-tuning: masked next-token prediction (MNTP) on captions. Rerun the same command to resume.""",
}
PLAN_OPTIONS = {  # train-tower's spelling -> ours
    "--plan.images": "--assumed-pairs",
    "--plan.gpu-gib": "--gpu-gib",
    "--plan.gpu_gib": "--gpu-gib",
}


def parse(argv: list[str], command: str = "finetune-llm") -> FinetuneConfig:
    """The configuration of a command line; data sets may come first, without ``--data``.

    ``--recipe NAME`` gives the full configuration, the other options override single fields.
    """
    first, words = split_options(argv, "recipe")
    words = [PLAN_OPTIONS.get(name, name) + equals + value for name, equals, value in (w.partition("=") for w in words)]
    if words and not words[0].startswith("-"):
        words.insert(0, "--data")
    default = llm_recipe(first["recipe"]) if first["recipe"] else FinetuneConfig()
    unused = PRETRAINING_UNUSED if command == "pretrain-llm" else UNUSED
    options: dict[str, Any] = {"default": default, "sections": False, "unused": unused}
    return override(FinetuneConfig, words, command=command, about=ABOUT[command], **options)


def main(argv: list[str]) -> int:
    """``llm2clip finetune-llm DATA [DATA ...] --llm PATH_OR_HUB_ID [options]``."""
    config = parse(argv)
    return plan_or_train(config.dry_run, lambda: llm_plan(config, argv), lambda: finetune_llm(config), "adapter: {}")


def main_pretrain(argv: list[str]) -> int:
    """``llm2clip pretrain-llm DATA [DATA ...] --llm PATH_OR_HUB_ID [options]``."""
    config = parse(argv, "pretrain-llm")
    result = "adapter: {}; merge it with llm2clip export-llm, then fine-tune the merged LLM"
    return plan_or_train(config.dry_run, lambda: pretraining_plan(config), lambda: pretrain_llm(config), result)
