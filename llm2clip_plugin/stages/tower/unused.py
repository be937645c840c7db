"""Options of ``train-tower`` that have no effect in some configurations."""

from llm2clip_plugin.data.sources.urls import is_url
from llm2clip_plugin.stages.explicit import Unused
from llm2clip_plugin.stages.tower.config import RunConfig

ROW_FILES = (".jsonl", ".json")


def _frozen(config: RunConfig) -> str:
    return "tower.freeze trains the heads alone" if config.tower.freeze else ""


def _lr_of_heads_alone(config: RunConfig) -> str:
    head_lr = config.optim.head_lr
    return f"tower.freeze trains the heads alone, at optim.head_lr {head_lr}" if config.tower.freeze and head_lr else ""


def _paths(config: RunConfig) -> tuple[str, ...]:
    return (*config.data.path, *([config.data.validation] if config.data.validation else []))


def _no_row_files(config: RunConfig) -> str:
    rows = config.data.read.format != "auto" or any(path.endswith(ROW_FILES) for path in _paths(config))
    return "" if rows or not _paths(config) else "data.path names no .jsonl or .json file"


def _no_urls(config: RunConfig) -> str:
    return (
        "data.path is local, nothing is downloaded" if _paths(config) and not any(map(is_url, _paths(config))) else ""
    )


def _first_caption_alone(config: RunConfig) -> str:
    from llm2clip_plugin.train.losses.config import chosen_terms  # torch

    several = config.data.captions_per_image > 1 and any(
        term.uses_all_captions for _, term in chosen_terms(config.loss)
    )
    return "" if several else f"loss.terms {' '.join(config.loss.terms)} uses one caption of an image"


def _no_reference(config: RunConfig) -> str:
    from llm2clip_plugin.train.losses.config import needs_reference  # torch

    return (
        "" if needs_reference(config.loss) else f"loss.terms {' '.join(config.loss.terms)} compares with no reference"
    )


UNUSED: list[Unused[RunConfig]] = [
    Unused(("data.captions_per_image",), _first_caption_alone, off=1),
    Unused(
        ("distill",),
        _no_reference,
    ),
    Unused(("distill.decay",), lambda c: "" if c.distill.reference == "ema" else "distill.reference is not ema"),
    Unused(("heads",), lambda c: "" if c.heads.steps else "heads.steps is 0, so the heads are not fitted first"),
    Unused(
        ("train.eval_steps", "train.eval_on_start", "evaluation", "data.validation_cache"),
        lambda c: "" if c.data.validation else "data.validation is not set, so nothing is evaluated",
    ),
    Unused(("tower.lora_alpha",), lambda c: "" if c.tower.lora_rank else "tower.lora_rank is 0, so there is no LoRA"),
    Unused(
        ("tower.architecture",),
        lambda c: f"tower.path is {c.tower.path!r}, which has an architecture" if c.tower.path else "",
    ),
    Unused(("optim.layer_decay",), _frozen, off=1.0),
    Unused(("optim.full_lr",), lambda c: "optim.layer_decay is 1" if c.optim.layer_decay == 1 else _frozen(c)),
    Unused(("train.gradient_checkpointing",), _frozen),
    Unused(
        ("train.dataloader_prefetch_mb",),
        lambda c: "" if c.train.dataloader_num_workers else "train.dataloader_num_workers is 0",
    ),
    Unused(("optim.lr",), _lr_of_heads_alone),
    Unused(
        ("dual.adapter_blocks", "dual.adapter_expansion"),
        lambda c: f"dual.adapter is {c.dual.adapter}, which has no blocks" if c.dual.adapter != "mlp" else "",
    ),
    Unused(
        ("dual.projection_dim",),
        lambda c: "dual.adapter is none: images go to the LLM's own space" if c.dual.adapter == "none" else "",
    ),
    Unused(
        ("dual.projection_bias", "dual.projection_init_std"),
        lambda c: "" if c.dual.projection == "linear" else f"dual.projection is {c.dual.projection}",
    ),
    Unused(
        ("dual.logit_scale_init", "dual.logit_bias_init", "dual.projection_init_std"),
        lambda c: "tower.keep_heads starts from the tower directory's" if c.tower.keep_heads else "",
    ),
    Unused(("data.read.images", "data.read.image_field", "data.read.key_field"), _no_row_files),
    Unused(("data.read.cache_gb",), _no_urls),
]
