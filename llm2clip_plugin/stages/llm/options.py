"""The options of ``llm2clip finetune-llm``."""

from llm2clip_plugin.options.command import Command
from llm2clip_plugin.options.declared import Extra
from llm2clip_plugin.options.shared import READ_NAMES, TRAINING_NAMES, in_section
from llm2clip_plugin.stages.llm.config import FinetuneConfig
from llm2clip_plugin.stages.llm.recipes import LLM_RECIPES, PAPERS

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
FINETUNE = Command(
    name="finetune-llm",
    example="llm2clip finetune-llm /data/cc3m --llm meta-llama/Llama-3.2-1B-Instruct --output runs/llm",
    about="Stage 1: fine-tune an LLM contrastively on captions, two of an image for each pair. Rerun the same command "
    "to resume.",
    settings=FinetuneConfig,
    arguments=("pairs.data",),
    everyday=(
        "recipe",
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
    ),
    shown=NAMES,
    also={"plan.images": "plan.assumed_pairs"},  # train-tower's name
    extras={
        "recipe": Extra(
            metavar="NAME",
            help=f"the authors' settings: {', '.join(PAPERS)}; ours on the paper's LLMs: "
            f"{', '.join(name for name in LLM_RECIPES if name not in PAPERS)}",
        )
    },
    hidden=("pairs.read.shuffle_window",),  # only the tower's training reads it
)
