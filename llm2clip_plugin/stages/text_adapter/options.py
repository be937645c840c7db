"""The options of ``llm2clip train-text-adapter``."""

from llm2clip_plugin.options import READ_NAMES, TRAINING_NAMES, Command, in_section
from llm2clip_plugin.stages.text_adapter.config import EXAMPLE, AdapterConfig

COMMAND = Command(
    name="train-text-adapter",
    example=EXAMPLE,
    about="Before stage 2: from captions alone, the text adapter learns to give the text features of the tower's own "
    "CLIP for an LLM's embeddings. Cache both first: `llm2clip embed DATA --llm LLM` and --llm CLIP. Stage 2 then "
    "starts from OUTPUT/tower with --keep-heads. Rerun the same command to resume.",
    settings=AdapterConfig,
    arguments=("data.path",),
    everyday=(
        "start",
        "data.cache",
        "data.clip_cache",
        "data.validation",
        "output_dir",
        "train.global_batch",
        "train.micro_batch",
        "optim.lr",
        "train.num_train_epochs",
        "train.max_steps",
        "train.precision",
        "deepspeed",
        "dry_run",
    ),
    shown={
        **TRAINING_NAMES,
        "start": "tower",
        "data.path": "data",
        "data.cache": "cache",
        "data.weight": "data-weights",
        **in_section("data.read", READ_NAMES),
        "optim.lr": "lr",
        "optim.weight_decay": "weight-decay",
        "loss": "loss.",
        "plan.samples": "assumed-samples",
        "adapter": "adapter.",
    },
    also={"tower.path": "start"},
    hidden=(
        "optim.head_lr",
        "optim.layer_decay",
        "optim.full_lr",
        "loss.mask_same_caption",
        "loss.mask_same_image",
        "train.ema_decay",
        "train.gradient_checkpointing",
        "train.torch_compile",
    ),
)
