"""What a plan of stage 2 says: the tower, the heads' fit, memory."""

from llm2clip_plugin.plan.describe import describe_memory
from llm2clip_plugin.plan.memory import StepMemory, tower_memory
from llm2clip_plugin.train.config import (
    HeadsConfig,
    OptimConfig,
    TowerConfig,
    TrainConfig,
)
from llm2clip_plugin.train.losses.base import ChosenTerms
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder


def describe_tower(model: DualEncoder, config: TowerConfig) -> str:
    """The tower's shape, and the widths of image features and LLM embeddings."""
    tower = model.tower.config
    parameters = sum(p.numel() for p in model.tower.parameters())
    return (
        f"tower: {config.path or config.architecture}, {tower.image_size} px, "
        f"{tower.num_hidden_layers} blocks x {tower.hidden_size}, {parameters:,} parameters; "
        f"projection_dim {model.config.projection_dim}, "
        f"LLM embeddings {model.config.llm_width} wide"
    )


def describe_heads(config: HeadsConfig) -> str:
    """The fit of the heads before step 1."""
    return (
        f"heads first: {config.steps} steps of {config.batch} pairs ({config.target})"
    )


def describe_tower_memory(
    tower: TowerConfig,
    dual: DualConfig,
    terms: ChosenTerms,
    optim: OptimConfig,
    train: TrainConfig,
    *,
    captions_per_image: int,
    gpu_gib: float,
) -> str:
    """The table of memory; with gradient checkpointing "auto", where it is on."""

    def memory(checkpointing: bool) -> StepMemory:
        return tower_memory(
            tower,
            dual,
            terms,
            optim,
            train,
            captions_per_image=captions_per_image,
            checkpointing=checkpointing,
        )

    set_or_auto = bool(train.gradient_checkpointing)
    without = memory(False) if train.gradient_checkpointing == "auto" else None
    return describe_memory(memory(set_or_auto), train, gpu_gib, kept=without)
