"""The settings of augmentation; read without torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of training images."""

    scale: tuple[float, float] = (
        0.9,
        1.0,
    )  # smallest and largest area of the crop, a fraction of the image's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # smallest and largest width / height of the crop
    flip: bool = False  # mirror half of the images; text in them is mirrored too
    rotate: float = 0.0  # degrees; the angle is uniform in -rotate .. rotate
    decode_margin: float = 1.0  # a JPEG is decoded to at least this many times the pixels a side that the crop needs

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"crop scale is {self.scale}, expected two numbers within 0 .. 1, the smaller first")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"crop ratio is {self.ratio}, expected two numbers above 0, the smaller first")
        if not 0 <= self.rotate <= 180:
            raise ValueError(f"rotate is {self.rotate}, expected degrees within 0 .. 180")
