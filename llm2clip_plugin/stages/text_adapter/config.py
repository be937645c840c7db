"""AdapterConfig: everything that decides how a text adapter inherits a CLIP's text space."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from llm2clip_plugin.contracts import canonical_json, sha256_text
from llm2clip_plugin.data.sources.base import ReadConfig, SourceConfig
from llm2clip_plugin.stages.settings import PlanConfig, TrainingConfig, flat_essentials
from llm2clip_plugin.train.config import INHERIT, LossConfig, OptimConfig, TrainConfig

EXAMPLE = "llm2clip train-text-adapter /data/photos --tower towers/clip-l14 --output runs/clip-l14-text"


@dataclass(frozen=True, kw_only=True)
class CaptionDataConfig:
    """Captions, with an LLM's embeddings and a CLIP's text features of them."""

    path: tuple[str, ...] = ()  # captioned data, as for train-tower; images are not read
    cache: tuple[str, ...] = ()  # the LLM's cache of each path; empty: the one of an LLM next to it
    clip_cache: tuple[str, ...] = ()  # the CLIP's cache of each path; empty: the one of a CLIP next to it
    weight: tuple[float, ...] = ()  # how often a sample of each path is drawn, relative to weight 1; empty: 1 each
    validation: str = ""  # held-out split for scores during training; "": none
    validation_cache: str = ""  # the LLM's cache of it; "": found like the others
    validation_clip_cache: str = ""  # the CLIP's cache of it; "": found like the others
    read: ReadConfig = field(default_factory=ReadConfig)  # how all of them are read

    def __post_init__(self) -> None:
        for name in ("cache", "clip_cache", "weight"):
            if (values := getattr(self, name)) and len(values) != len(self.path):
                raise ValueError(
                    f"data.{name} has {len(values)} values for {len(self.path)} paths; pass one per path, or none"
                )

    @property
    def sources(self) -> list[SourceConfig]:
        """One source for each path."""
        weights = self.weight or (1.0,) * len(self.path)
        return [SourceConfig(path=p, weight=w, **vars(self.read)) for p, w in zip(self.path, weights, strict=True)]


@dataclass(frozen=True, kw_only=True)
class AdapterShape:
    """The text adapter; its input is an LLM embedding, its output has the width of the CLIP's features."""

    kind: str = "mlp"  # mlp (the paper's) | linear
    blocks: int = 4  # residual MLP blocks
    expansion: int = 2  # hidden width of a block, in multiples of the embedding's width
    input_scale: str = "unit"  # unit | sqrt_width: factor on the normalized embedding


@dataclass(frozen=True, kw_only=True)
class AdapterPlanConfig:
    """What --dry-run assumes while there is no data, no cache or no tower."""

    samples: int = 30_000_000  # captioned images; the published run had CC3M, CC12M and YFCC15M
    llm_width: int = 4096  # of an LLM's embedding: 4096 for 8B models, 2048 for 1B
    clip_width: int = 768  # of a CLIP's features: 768 for L/14, 512 for B/16
    gpu_gib: float = PlanConfig.gpu_gib  # a GPU's memory in GiB: the plan proposes micro-batches that fit

    def __post_init__(self) -> None:
        if min(self.samples, self.llm_width, self.clip_width) < 1 or self.gpu_gib <= 0:
            raise ValueError(
                f"plan.samples {self.samples}, llm_width {self.llm_width}, clip_width {self.clip_width} and gpu_gib "
                f"{self.gpu_gib} must all be above 0"
            )


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(TrainingConfig):
    """One training run of a text adapter in a CLIP's text space.

    The defaults are the published settings of ProCLIP's first stage (arXiv 2510.18795), with its code's sums over the
    128 captions of a rank as the ratio of structure and distance, 127 / 2.
    """

    output_dir: str = "runs/text-adapter"  # checkpoints, metrics.jsonl, run.json and, at the end, tower/
    start: str = ""  # tower directory that llm2clip import made of the CLIP, with its projection
    data: CaptionDataConfig = field(default_factory=CaptionDataConfig)
    adapter: AdapterShape = field(default_factory=AdapterShape)
    loss: LossConfig = field(default_factory=lambda: LossConfig(terms=INHERIT[0], args=INHERIT[1]))
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-5, eps=1e-6, weight_decay=0.05, layer_decay=1.0, max_grad_norm=5.0)
    )
    train: TrainConfig = field(default_factory=lambda: TrainConfig(global_batch=1024, eval_steps=1000))
    plan: AdapterPlanConfig = field(default_factory=AdapterPlanConfig)

    @property
    def hash(self) -> str:
        """SHA-256 over the fields that decide what is learned."""
        return sha256_text(canonical_json(flat_essentials(dataclasses.asdict(self))))

    def validate(self, *, needs_data: bool = True) -> AdapterConfig:
        """Check what no single section can check; returns itself. Raises ValueError."""
        missing = [] if self.data.path else ["no captions: add DATA"]
        missing += [] if self.start else ["no CLIP: add --tower with a tower directory (llm2clip import CLIP)"]
        if needs_data and missing:
            raise ValueError(f"{' and '.join(missing)}. For example: {EXAMPLE}")
        if not self.train.has_steps:
            raise ValueError("train.num_train_epochs and train.max_steps are both 0: nothing to train")
        from llm2clip_plugin.train.losses.base import chosen_terms  # torch

        terms = [term for _, term in chosen_terms(self.loss)]
        if any(term.uses_bias for term in terms):
            raise ValueError(f"loss.terms {' '.join(self.loss.terms)}: no bias is learned here; use distill or infonce")
        if any(term.reads for term in terms):
            raise ValueError(f"loss.terms {' '.join(self.loss.terms)}: no images here; use distill or infonce")
        return self
