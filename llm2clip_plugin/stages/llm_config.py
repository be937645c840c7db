"""FinetuneConfig: everything that decides the training of an LLM's adapter. The sections are
declared where they are read, without torch."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from llm2clip_plugin.evaluate.config import CaptionSetConfig
from llm2clip_plugin.options import Command, section, setting, unknown
from llm2clip_plugin.stages.settings import TEACHERS, PlanConfig, TrainingConfig
from llm2clip_plugin.text.config import (
    ContrastConfig,
    EncoderConfig,
    LoraSettings,
    PairsConfig,
)
from llm2clip_plugin.train.config import OptimConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """One training run of an LLM's adapter (stage 1)."""

    output_dir: str = setting(
        "runs/llm",
        help="checkpoints, metrics.jsonl, run.json and, at the end, adapter/",
        option="output",
        learned=False,
        per_host=True,
    )
    pairs: PairsConfig = section(PairsConfig())
    encoder: EncoderConfig = section(EncoderConfig())
    lora: LoraSettings = section(
        LoraSettings(),
        prefix="lora-",
        needs_of=dict.fromkeys(("r", "alpha", "targets"), "not encoder.adapter"),
    )
    start_adapters: tuple[str, ...] = setting(
        (),
        help="LoRA adapters (folders or Hub ids) that are merged into the LLM, in this order, "
        "before the new one is added",
        learned=True,
        per_host=True,
    )
    contrast: ContrastConfig = section(ContrastConfig())
    # betas, clipping and no weight decay are defaults of Hugging Face's Trainer
    optim: OptimConfig = section(
        OptimConfig(
            lr=2e-4,
            weight_decay=0.0,
            layer_decay=1.0,
            betas=(0.9, 0.999),
            max_grad_norm=1.0,
            warmup_steps=300,
        ),
        hidden=("layer_decay", "full_lr", "head_lr"),
    )
    train: TrainConfig = section(
        TrainConfig(global_batch=512, num_train_epochs=1.0),
        hidden=("max_broken", "dataloader_prefetch_mb", "ema_decay"),
        needs_of={"eval_steps": "evaluation.captions"},
    )
    evaluation: CaptionSetConfig = section(
        CaptionSetConfig(),
        prefix="evaluation.",
        options={"captions": "validation"},
        learned=False,
        needs="evaluation.captions",
    )
    plan: PlanConfig = section(
        PlanConfig(), learned=False, per_host=True, needs="dry_run"
    )

    def __post_init__(self) -> None:
        if self.encoder.post_file:
            raise ValueError(
                f"post_file {self.encoder.post_file} has no effect in stage 1; "
                "set it in `llm2clip embed`"
            )
        if self.train.gradient_checkpointing == "auto":
            raise ValueError(
                "--gradient-checkpointing auto is for train-tower; "
                "set true or false for finetune-llm"
            )


INSTRUCTION = "Given a caption of an image, find another caption of the same image: "
# E5_cc3m.py:31-34, joined to the query with "; " as in its line 131
OF_SHORT = "Given a sentence, retrieve a detailed relevant sentence; "
OF_LONG = "Given a detailed sentence, retrieve a short relevant sentence; "
# The authors merge a third one, of their own masked next-token prediction on captions, which they
# did not publish.
LLM2VEC_8B = (
    "McGill-NLP/LLM2Vec-Meta-Llama-3-8B-Instruct-mntp",
    "McGill-NLP/LLM2Vec-Meta-Llama-3-8B-Instruct-mntp-supervised",
)


def _llama(teacher: str, query_prompt: str) -> EncoderConfig:
    return EncoderConfig(
        llm=TEACHERS[teacher].base, preset="llm2clip-llama3", query_prompt=query_prompt
    )


def _paper(
    name: str, encoder: EncoderConfig, start_adapters: tuple[str, ...] = ()
) -> FinetuneConfig:
    """The authors' settings; captions are the user's."""
    common = _common(name, encoder, gradient_checkpointing=True)
    return dataclasses.replace(
        common,
        start_adapters=start_adapters,
        pairs=PairsConfig(
            pair_kinds=("short:long", "long:short"),
            mix_kinds=True,  # E5_cc3m.py:72-81, a coin for each pair
            instructions=(f"short={OF_SHORT}", f"long={OF_LONG}"),
            random_negatives=True,  # E5_cc3m.py:83-88
            cut_queries=True,  # their tokenizer truncates
        ),
        # HardNegativeNLLLoss of llm2vec: queries retrieve positives, and nothing is masked
        contrast=ContrastConfig(scale=50.0, symmetric=False, mask_same=False),
        optim=dataclasses.replace(common.optim, schedule="linear"),  # Trainer's default
    )


def _common(
    name: str, encoder: EncoderConfig, *, gradient_checkpointing: bool
) -> FinetuneConfig:
    """What both sides share, apart from the default optimizer, LoRA, scale, batch, length."""
    default = FinetuneConfig()
    return dataclasses.replace(
        default,
        output_dir=f"runs/{name}",
        encoder=dataclasses.replace(encoder, max_tokens=512, compute_dtype="bfloat16"),
        train=dataclasses.replace(
            default.train,
            gradient_checkpointing=gradient_checkpointing,
            save_steps=500,
            dataloader_num_workers=2,
        ),
    )


LLM_RECIPES: dict[str, Callable[[], FinetuneConfig]] = {
    # any instruct LLM (set --llm); a text is one user turn of its chat template
    "paper": partial(
        _paper,
        "paper",
        EncoderConfig(chat_template="user", include_bos=False, query_prompt=OF_SHORT),
    ),
    "paper-llama-8b": partial(
        _paper, "paper-llama-8b", _llama("llama-8b", OF_SHORT), LLM2VEC_8B
    ),
    # LLM2Vec has no adapters for it
    "paper-llama-1b": partial(_paper, "paper-llama-1b", _llama("llama-1b", OF_SHORT)),
    "llama-8b": partial(
        _common,
        "llama-8b",
        _llama("llama-8b", INSTRUCTION),
        gradient_checkpointing=True,
    ),
    "llama-1b": partial(
        _common,
        "llama-1b",
        _llama("llama-1b", INSTRUCTION),
        gradient_checkpointing=False,
    ),
}


def llm_recipe(name: str) -> FinetuneConfig:
    """The recipe of that name, "" for the default; ValueError lists the known ones."""
    if not name:
        return FinetuneConfig()
    if name not in LLM_RECIPES:
        raise ValueError(unknown("recipe", name, LLM_RECIPES))
    return LLM_RECIPES[name]()


FINETUNE_LLM = Command(
    name="finetune-llm",
    example="llm2clip finetune-llm /data/cc3m --llm meta-llama/Llama-3.2-1B-Instruct "
    "--output runs/llm",
    about="Stage 1: fine-tune an LLM contrastively on captions, two of an image for each pair. "
    "Rerun the same command to resume.",
    settings=FinetuneConfig,
    default=lambda extras: llm_recipe(extras.get("recipe", "")),
    arguments="pairs.data",
    everyday="recipe llm pair-kinds fields output global-batch micro-batch lr num-train-epochs "
    "max-steps load-in-4bit deepspeed dry-run",
    extras={
        "recipe": "the authors' settings: paper, paper-llama-8b; applied to an LLM of 1B: "
        "paper-llama-1b; ours on the paper's LLMs: llama-8b, llama-1b"
    },
)
