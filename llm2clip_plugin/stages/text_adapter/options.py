"""The options of ``llm2clip train-text-adapter``."""

from llm2clip_plugin.options import Command
from llm2clip_plugin.stages.settings import NEEDS, REPLACES
from llm2clip_plugin.stages.text_adapter.config import EXAMPLE, AdapterConfig

COMMAND = Command(
    name="train-text-adapter",
    example=EXAMPLE,
    about="Before stage 2: from captions alone, the text adapter learns to give the text features of the tower's own "
    "CLIP for an LLM's embeddings. Cache both first: `llm2clip embed DATA --llm LLM` and --llm CLIP. Stage 2 then "
    "starts from OUTPUT/tower with --keep-heads. Rerun the same command to resume.",
    settings=AdapterConfig,
    arguments="data.path",
    everyday="tower cache clip-cache validation output global-batch micro-batch lr num-train-epochs max-steps "
    "precision deepspeed dry-run",
    shown={
        "start": "tower",
        "data.weight": "data-weights",
        "loss": "loss.",
        "plan.samples": "assumed-samples",
        "adapter": "adapter.",
    },
    also={"tower.path": "start"},
    hidden="optim.head_lr optim.layer_decay optim.full_lr loss.mask_same_caption loss.mask_same_image train.ema_decay "
    "train.gradient_checkpointing train.torch_compile",
    replaces=REPLACES,
    needs={**NEEDS, "train.eval_steps": "data.validation"},
)
