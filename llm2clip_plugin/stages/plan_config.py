"""What a dry run assumes; read without torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What --dry-run assumes while there is no data."""

    images: int = 15_000_000  # captioned images; the size of the paper's smaller set
    gpu_gib: float = 80.0  # a GPU's memory in GiB: the plan has the largest micro-batches that fit

    def __post_init__(self) -> None:
        if self.images < 1 or self.gpu_gib <= 0:
            raise ValueError(f"plan.images {self.images} and gpu_gib {self.gpu_gib} must both be above 0")
