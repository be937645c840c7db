"""Stage 1's named runs, ``llm2clip finetune-llm --recipe NAME``: the paper's LLMs with its settings.

Published settings (LLM2CLIP's own training configurations, arXiv 2411.04997): LoRA r 16, alpha 32, dropout 0.05 on
every linear layer, lr 2e-4 after 300 steps of warm-up, one epoch, batch 512 = 8 x 64, scale 50, 512 tokens, an
instruction before the queries only, which is left out of the pooling. For the paper's ZeRO-2 add --deepspeed
scripts/zero2.json.
"""

from collections.abc import Callable

from llm2clip_plugin.options.names import unknown
from llm2clip_plugin.stages.llm.config import FinetuneConfig
from llm2clip_plugin.stages.paper import TEACHERS
from llm2clip_plugin.text.config import ContrastConfig, LoraSettings
from llm2clip_plugin.text.settings import EncoderConfig
from llm2clip_plugin.train.config import OptimConfig, TrainConfig

INSTRUCTION = "Given a caption of an image, find another caption of the same image: "


def llama_1b() -> FinetuneConfig:
    """Llama 3.2 1B Instruct: embeddings 2048 wide."""
    return _paper("llama-1b", gradient_checkpointing=False)


def llama_8b() -> FinetuneConfig:
    """Llama 3 8B Instruct: embeddings 4096 wide."""
    return _paper("llama-8b", gradient_checkpointing=True)


def _paper(teacher: str, *, gradient_checkpointing: bool) -> FinetuneConfig:
    """The published stage-1 settings over an LLM; captions (the paper's: LLM_MIXTURE) are the user's."""
    known = TEACHERS[teacher]
    return FinetuneConfig(
        output_dir=f"runs/{teacher}",
        encoder=EncoderConfig(
            llm=known.base,
            preset=known.preset,
            query_prompt=INSTRUCTION,
            max_tokens=512,
            compute_dtype="bfloat16",
        ),
        lora=LoraSettings(r=16, alpha=32, dropout=0.05),
        contrast=ContrastConfig(scale=50.0),
        optim=OptimConfig(
            lr=2e-4, weight_decay=0.0, layer_decay=1.0, betas=(0.9, 0.999), max_grad_norm=1.0, warmup_steps=300
        ),
        train=TrainConfig(
            global_batch=512,
            num_train_epochs=1.0,
            gradient_checkpointing=gradient_checkpointing,
            save_steps=500,
            dataloader_num_workers=2,
        ),
    )


LLM_RECIPES: dict[str, Callable[[], FinetuneConfig]] = {"llama-1b": llama_1b, "llama-8b": llama_8b}


def llm_recipe(name: str) -> FinetuneConfig:
    """The recipe of that name; ValueError lists the known ones."""
    if name not in LLM_RECIPES:
        raise ValueError(unknown("recipe", name, LLM_RECIPES))
    return LLM_RECIPES[name]()
