"""What a plan takes from the data and the models without running them: which captions there are, and seconds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer

from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.records import words_of
from llm2clip_plugin.pipeline.options import PipelineConfig
from llm2clip_plugin.text.config import LoraSettings
from llm2clip_plugin.text.settings import EncoderConfig
from llm2clip_plugin.text.shape import llm_config, shape_llm
from llm2clip_plugin.train.flops import peak_of
from llm2clip_plugin.vision.meta_tower import meta_tower

SURVEYED = 1000  # samples that are read
TOKENS = 1.5  # of a word, with what the LLM's template adds
USED = 0.35  # fraction of a device's peak that training reaches


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What some samples say about all."""

    samples: int
    captions: float  # of a sample
    tokens: float  # of a caption
    pairs: str  # how stage 1 pairs captions, QUERY:POSITIVE; "": it can't
    note: str  # why it can't


def survey(source: Source) -> Survey:
    """Read up to SURVEYED samples, evenly spaced."""
    step = max(1, len(source) // SURVEYED)
    texts = [source.captions(number)[1] for number in range(0, len(source), step)]
    flat = [caption for captions in texts for caption in captions]
    if not flat:
        raise ValueError(f"no captions in {source.path}; llm2clip data check shows its fields")
    kinds = [{caption.kind for caption in captions} for captions in texts]
    words = [[f" {words_of(caption.text)} " for caption in captions] for captions in texts if len(captions) > 1]
    nested = sum(any(one != other and one in other for one in each for other in each) for each in words)
    pairs = "short:long" if sum({"short", "long"} <= one for one in kinds) > len(texts) / 2 else "short:same"
    note = ""
    if len(words) <= len(texts) / 2:
        note = "stage 1 is left out: it needs images with several captions (--fields)"
    elif nested > len(words) / 2:
        note = "stage 1 is left out: most captions contain another one of their image, so it learns nothing"
    tokens = TOKENS * sum(len(caption.text.split()) for caption in flat) / len(flat)
    captions = len(flat) / len(texts)
    return Survey(samples=len(source), captions=captions, tokens=tokens, pairs="" if note else pairs, note=note)


class Cost:
    """Seconds of passes through the models, from their sizes and the device's speed."""

    def __init__(self, config: PipelineConfig, found: Survey) -> None:
        self.config, self.tokens, self.speed = config, found.tokens, flops_per_second() * config.num_gpus
        self.patches, self.of_image = 197, 86e6  # ViT-B/16 at 224 px
        try:
            tower = meta_tower(config.tower)
            self.patches = 1 + (tower.config.image_size // tower.config.patch_size) ** 2
            self.of_image = linear_weights(tower)
        except (FileNotFoundError, ValueError):
            pass  # it is not on this machine

    def llm(self, captions: float) -> float:
        """Captions through the LLM; a backward pass is two."""
        return 2 * captions * self.tokens * llm_weights(self.config.llm) / self.speed

    def tower(self, images: float) -> float:
        """Images through the tower; a training step is four with recomputation."""
        return 2 * images * self.patches * self.of_image / self.speed

    def llava(self, images: float) -> float:
        """Images with a caption through LLaVA's language model."""
        return 2 * images * (self.patches + self.tokens) * llm_weights(self.config.llava_llm) / self.speed


def llm_weights(llm: str) -> float:
    """Weights that every token is multiplied with; 1e9 for an LLM that is not on this machine."""
    try:
        encoder = EncoderConfig(llm=llm)
        return linear_weights(shape_llm(llm_config(encoder), encoder, LoraSettings(), "fp32").llm)
    except (FileNotFoundError, ValueError):
        return 1e9


def linear_weights(model: torch.nn.Module) -> float:
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))


def flops_per_second() -> float:
    """What training reaches on a device of this machine, whose peak is known by its name or measured."""
    cuda = torch.cuda.is_available()
    peak = peak_of(torch.cuda.get_device_name(), torch.bfloat16, tf32=True) if cuda else None
    if not peak:
        size, kind = (4096, {"device": "cuda", "dtype": torch.bfloat16}) if cuda else (768, {})
        product = Timer("a @ a", globals={"a": torch.ones(size, size, **kind)}, num_threads=torch.get_num_threads())
        peak = 2 * size**3 / product.blocked_autorange(min_run_time=0.3).median
    return USED * peak
