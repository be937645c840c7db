"""The options of ``llm2clip finetune-llm``."""

from collections.abc import Mapping

from llm2clip_plugin.options.command import Command
from llm2clip_plugin.stages.llm.config import FinetuneConfig
from llm2clip_plugin.stages.llm.recipes import LLM_RECIPES, PAPERS, llm_recipe
from llm2clip_plugin.stages.settings import NEEDS, REPLACES


def starting_point(extras: Mapping[str, str]) -> FinetuneConfig:
    """The configuration of --recipe, or the default, which the other options override."""
    return llm_recipe(extras["recipe"]) if extras.get("recipe") else FinetuneConfig()


FINETUNE = Command(
    name="finetune-llm",
    example="llm2clip finetune-llm /data/cc3m --llm meta-llama/Llama-3.2-1B-Instruct --output runs/llm",
    about="Stage 1: fine-tune an LLM contrastively on captions, two of an image for each pair. Rerun the same command "
    "to resume.",
    settings=FinetuneConfig,
    default=starting_point,
    arguments="pairs.data",
    everyday="recipe llm pair-kinds fields output global-batch micro-batch lr num-train-epochs max-steps load-in-4bit "
    "deepspeed dry-run",
    shown={
        "pairs.weights": "data-weights",
        "evaluation": "evaluation.",
        "evaluation.captions": "validation",
        "lora": "lora-",
        "lora.r": "lora-rank",
        "plan.assumed_pairs": "assumed-samples",
    },
    also={"plan.images": "plan.assumed_pairs"},  # train-tower's name
    extras={
        "recipe": f"the authors' settings: {', '.join(PAPERS)}; ours on the paper's LLMs: "
        f"{', '.join(name for name in LLM_RECIPES if name not in PAPERS)}"
    },
    # the first is read by the tower's training alone, as are the others; an adapter has one learning rate
    hidden="pairs.read.shuffle_window train.max_broken train.torch_compile train.dataloader_prefetch_mb "
    "optim.layer_decay optim.full_lr optim.head_lr",
    replaces=REPLACES,
    needs={
        **NEEDS,
        "train.eval_steps": "evaluation.captions",
        "evaluation": "evaluation.captions",
        "lora.r": "not encoder.adapter",
        "lora.alpha": "not encoder.adapter",
        "lora.targets": "not encoder.adapter",
    },
)
