"""The command lines of stage 1: ``llm2clip finetune-llm`` and ``llm2clip pretrain-llm``."""

from pathlib import Path

from llm2clip_plugin.commands import command
from llm2clip_plugin.options.command import Command
from llm2clip_plugin.options.declared import Extra
from llm2clip_plugin.options.shared import READ_NAMES, TRAINING_NAMES, in_section
from llm2clip_plugin.run_files import started_by
from llm2clip_plugin.stages.command_line import plan_or_train, read_settings
from llm2clip_plugin.stages.llm.config import FinetuneConfig
from llm2clip_plugin.stages.llm.plan import llm_plan, pretraining_plan
from llm2clip_plugin.stages.llm.recipes import LLM_RECIPES, llm_recipe
from llm2clip_plugin.stages.llm.run import ADAPTER, finetune_llm, pretrain_llm
from llm2clip_plugin.stages.llm.unused import PRETRAINING_UNUSED, UNUSED

NAMES = {
    **TRAINING_NAMES,
    **in_section("pairs.read", READ_NAMES),
    "pairs.data": "data",
    "pairs.weights": "data-weights",
    "evaluation.captions": "validation",
    "lora": "lora-",
    "lora.r": "lora-rank",
    "plan.assumed_pairs": "assumed-samples",
}
EVERYDAY = (
    "encoder.llm",
    "pairs.pair_kinds",
    "pairs.read.fields",
    "output_dir",
    "train.global_batch",
    "train.micro_batch",
    "optim.lr",
    "train.num_train_epochs",
    "train.max_steps",
    "encoder.load_in_4bit",
    "deepspeed",
    "dry_run",
)
UNREAD = ("pairs.read.shuffle_window", "pairs.read.kinds", "pairs.read.languages")  # only the tower's training does
RECIPE = Extra(metavar="NAME", help=f"the paper's LLM and settings: {', '.join(LLM_RECIPES)}")
ALSO = {"plan.images": "plan.assumed_pairs"}  # train-tower's name
FINETUNE = Command(
    name="finetune-llm",
    example="llm2clip finetune-llm /data/cc3m --llm meta-llama/Llama-3.2-1B-Instruct --output runs/llm",
    about="Stage 1: fine-tune an LLM contrastively on captions, two of an image for each pair. Rerun the same command "
    "to resume.",
    settings=FinetuneConfig,
    arguments=("pairs.data",),
    everyday=("recipe", *EVERYDAY),
    shown=NAMES,
    also=ALSO,
    extras={"recipe": RECIPE},
    hidden=UNREAD,
)
PRETRAIN = Command(
    name="pretrain-llm",
    example="llm2clip pretrain-llm /data/cc3m --llm meta-llama/Llama-3.2-1B-Instruct --output runs/mntp",
    about="Optional, before fine-tuning: masked next-token prediction (MNTP) on captions. Rerun the same command to "
    "resume.",
    settings=FinetuneConfig,
    arguments=("pairs.data",),
    everyday=tuple(name for name in EVERYDAY if name != "pairs.pair_kinds"),
    shown=NAMES,
    also=ALSO,
    extras={"recipe": RECIPE},
    hidden=UNREAD,
)


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
        lambda: llm_plan(config, argv),
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
