"""What a dry run assumes; read without torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What --dry-run assumes while there is no data."""

    images: int = 15_000_000  # captioned images; the size of the paper's smaller set
    captions: int = 2  # captions of an image: a short and a long one
    images_per_second: float = 250.0  # of a GPU, for the rate at which a run reads; L/14-336 on an H100
    gpu_gib: float = 80.0  # a GPU's memory in GiB: the plan proposes micro-batches that fit

    def __post_init__(self) -> None:
        if self.images < 1 or self.captions < 1 or self.gpu_gib <= 0 or self.images_per_second <= 0:
            raise ValueError(
                f"plan.images {self.images}, captions {self.captions}, gpu_gib {self.gpu_gib}, images_per_second "
                f"{self.images_per_second} must all be above 0"
            )
