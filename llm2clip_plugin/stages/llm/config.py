"""FinetuneConfig: everything that decides an LLM's training. The sections are declared where they are read."""

import dataclasses
from dataclasses import dataclass, field

from llm2clip_plugin.contracts import canonical_json, sha256_text
from llm2clip_plugin.evaluate.config import CaptionSetConfig
from llm2clip_plugin.stages.plan_config import PlanConfig
from llm2clip_plugin.stages.settings import TrainingConfig
from llm2clip_plugin.text.config import ContrastConfig, LoraSettings, PairsConfig
from llm2clip_plugin.text.settings import EncoderConfig
from llm2clip_plugin.train.config import OptimConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class LlmPlanConfig:
    """What --dry-run assumes where there is no data yet."""

    assumed_pairs: int = PlanConfig.images  # pairs of texts; default: one per image of the paper's smaller tower data
    gpu_gib: float = PlanConfig.gpu_gib  # a GPU's memory in GiB: the plan proposes micro-batches that fit

    def __post_init__(self) -> None:
        if self.assumed_pairs < 1 or self.gpu_gib <= 0:
            raise ValueError(f"assumed_pairs {self.assumed_pairs} and gpu_gib {self.gpu_gib} must both be above 0")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """One training run of an LLM's adapter (stage 1)."""

    output_dir: str = "runs/llm"  # checkpoints, metrics.jsonl, run.json and, at the end, adapter/
    pairs: PairsConfig = field(default_factory=PairsConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    # LoRA adapters (folders or Hub ids) that are merged into the LLM, in this order, before the new one is added
    start_adapters: tuple[str, ...] = ()
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=2e-4, weight_decay=0.0, layer_decay=1.0, betas=(0.9, 0.999), max_grad_norm=1.0, warmup_steps=300
        )
    )
    train: TrainConfig = field(default_factory=lambda: TrainConfig(global_batch=512, num_train_epochs=1.0))
    evaluation: CaptionSetConfig = field(default_factory=CaptionSetConfig)
    plan: LlmPlanConfig = field(default_factory=LlmPlanConfig)

    def __post_init__(self) -> None:
        if self.encoder.post_file:
            raise ValueError(f"post_file {self.encoder.post_file} has no effect in stage 1; set it in `llm2clip embed`")

    @property
    def hash(self) -> str:
        """SHA-256 over all fields."""
        return sha256_text(canonical_json(dataclasses.asdict(self)))
