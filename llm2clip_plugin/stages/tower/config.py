"""RunConfig: everything that decides a tower's training. The sections are declared where they are read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from llm2clip_plugin.contracts import canonical_json, sha256_text
from llm2clip_plugin.data.augment_config import AugmentConfig
from llm2clip_plugin.data.caption_choice import parse_weights
from llm2clip_plugin.data.sources.base import ReadConfig, SourceConfig
from llm2clip_plugin.evaluate.config import RetrievalConfig
from llm2clip_plugin.stages.plan_config import PlanConfig
from llm2clip_plugin.stages.settings import TrainingConfig, flat_essentials
from llm2clip_plugin.train.config import DistillConfig, HeadsConfig, OptimConfig, TowerConfig, TrainConfig
from llm2clip_plugin.train.loss_config import LossConfig
from llm2clip_plugin.vision.dual_config import DualConfig

EXAMPLE = (
    "llm2clip train-tower /data/photos --tower facebook/dinov2-base --validation /data/held-out --output runs/photos"
)
MAX_CAPTIONS = 64  # of an image in a step


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Captioned images, the teacher's embeddings of their captions, and a held-out split."""

    path: tuple[str, ...] = ()  # training data: folders of tars, .tar, .jsonl, LLaVA's .json, or URLs of these
    cache: tuple[str, ...] = ()  # embedding cache of each path; empty: the one embeddings-* folder next to the data
    weight: tuple[float, ...] = ()  # how often a sample of each path is drawn, relative to weight 1; empty: 1 each
    # how often each kind of caption is drawn, KIND=WEIGHT; other kinds are not drawn; empty: evenly over all captions
    caption_weights: tuple[str, ...] = ()
    one_source_per_batch: bool = False  # draw each global batch from one path, so that negatives are of the same source
    captions_per_image: int = 1  # captions of an image in a step; above 1 for loss.terms multi_positive or cosine
    validation: str = ""  # held-out split for recall during training; "": none
    validation_cache: str = ""  # its embedding cache; "": the one embeddings-* folder next to it
    read: ReadConfig = field(default_factory=ReadConfig)  # how all of them are read
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        for name, values in (("cache", self.cache), ("weight", self.weight)):
            if values and len(values) != len(self.path):
                raise ValueError(
                    f"data.{name} has {len(values)} values for {len(self.path)} paths; pass one per path, or none"
                )
        if not 1 <= self.captions_per_image <= MAX_CAPTIONS:
            raise ValueError(f"data.captions_per_image {self.captions_per_image} must be between 1 and {MAX_CAPTIONS}")
        weights, kinds = self.kind_weights, self.read.kinds
        if weights and kinds and set(weights) != set(kinds):
            raise ValueError(
                f"data.caption_weights {' '.join(self.caption_weights)} and data.read.kinds {' '.join(kinds)} name "
                "different kinds; give each of these kinds a weight, or leave data.read.kinds empty"
            )

    @property
    def kind_weights(self) -> dict[str, float]:
        """How often each kind of caption is drawn; {}: evenly over all captions."""
        return parse_weights(self.caption_weights)

    @property
    def sources(self) -> list[SourceConfig]:
        """One source for each path."""
        weights = self.weight or (1.0,) * len(self.path)
        pairs = zip(self.path, weights, strict=True)
        read = {**vars(self.read), "kinds": self.read.kinds or tuple(self.kind_weights)}
        return [SourceConfig(path=path, weight=weight, **read) for path, weight in pairs]

    @property
    def held_out(self) -> SourceConfig | None:
        """The validation split with all its captions; ``evaluation`` selects the ones that are scored."""
        if not self.validation:
            return None
        return SourceConfig(path=self.validation, **{**vars(self.read), "kinds": (), "languages": ()})


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainingConfig):
    """One training run of a tower (stage 2)."""

    output_dir: str = "runs/tower"  # checkpoints, metrics.jsonl, run.json and, at the end, tower/
    data: DataConfig = field(default_factory=DataConfig)
    tower: TowerConfig = field(default_factory=TowerConfig)
    dual: DualConfig = field(default_factory=DualConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: RetrievalConfig = field(default_factory=RetrievalConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)

    @property
    def hash(self) -> str:
        """SHA-256 over the fields that decide what is learned."""
        return sha256_text(canonical_json(flat_essentials(dataclasses.asdict(self))))

    @property
    def trains_at_lr(self) -> bool:
        """Whether anything is trained with ``optim.lr``; heads alone are with ``optim.head_lr``, where it is set."""
        return not (self.tower.freeze and self.optim.head_lr)

    def validate(self, *, needs_data: bool = True) -> RunConfig:
        """Check what no single section can check; returns itself. Raises ValueError."""
        if needs_data and (missing := self._missing()):
            raise ValueError(f"{' and '.join(missing)}. For example: {EXAMPLE}")
        if not self.train.has_steps and not self.heads.steps:
            raise ValueError("train.num_train_epochs, train.max_steps and heads.steps are all 0: nothing to train")
        self.loss.check(self.dual)
        if self.tower.freeze and self.dual.projection == "none" and self.dual.adapter == "none":
            raise ValueError(
                "tower.freeze with dual.projection none and dual.adapter none leaves nothing to train; change one"
            )
        return self

    def _missing(self) -> list[str]:
        """What every run needs and no recipe can know, as the parts of an error."""
        missing = [] if self.data.path else ["no training data: add DATA"]
        if not self.tower.path and not self.tower.from_scratch:
            made = f" ({self.tower.architecture}, as llm2clip import writes it)" if self.tower.architecture else ""
            missing.append(f"no tower to train{made}: add --tower with a directory or Hub id")
        return missing
