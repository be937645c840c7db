"""Options of ``finetune-llm`` that have no effect in some configurations."""

from llm2clip_plugin.data.sources.urls import is_url
from llm2clip_plugin.stages.explicit import Unused
from llm2clip_plugin.stages.llm.config import FinetuneConfig


def _adapter(config: FinetuneConfig) -> str:
    adapter = config.encoder.adapter
    return f"training continues from the adapter {adapter}, which has its own" if adapter else ""


def _no_pair_files(config: FinetuneConfig) -> str:
    files = any(path.endswith(".jsonl") for path in config.pairs.data) or config.pairs.pair_format == "pairs"
    return "" if files or not config.pairs.data else "no data set is a .jsonl file of text pairs"


def _no_caption_sets(config: FinetuneConfig) -> str:
    kind, paths = config.pairs.pair_format, config.pairs.data
    if kind in ("pairs", "text"):
        return f"pair_format is {kind}: no data set has captions"
    texts = bool(paths) and all(path.endswith(".txt") for path in paths)
    return "" if kind == "captions" or not texts else "every data set is a .txt file, whose texts have no kinds"


def _no_urls(config: FinetuneConfig) -> str:
    paths = config.pairs.data
    return "every data set is local, nothing is downloaded" if paths and not any(map(is_url, paths)) else ""


UNUSED: list[Unused[FinetuneConfig]] = [
    Unused(
        ("optim.layer_decay", "optim.full_lr", "optim.head_lr"),
        lambda c: "an adapter has one learning rate, lr",
        off=1.0,
    ),
    Unused(
        ("train.max_broken", "train.torch_compile", "train.dataloader_prefetch_mb"),
        lambda c: "it belongs to the training of towers",
    ),
    Unused(
        ("train.eval_steps", "train.eval_on_start", "evaluation"),
        lambda c: "" if c.evaluation.captions else "validation is not set, so nothing is evaluated",
    ),
    Unused(("lora",), _adapter, except_for=("lora.dropout",)),
    Unused(
        ("pairs.query_field", "pairs.positive_field", "pairs.negative_field", "pairs.instruction_field"), _no_pair_files
    ),
    Unused(
        (
            "pairs.pair_kinds",
            "pairs.mix_kinds",
            "pairs.instructions",
            "pairs.random_negatives",
            "pairs.lists",
            "pairs.group",
        ),
        _no_caption_sets,
    ),
    Unused(("pairs.read.cache_gb",), _no_urls),
]
