"""The paper's retrieval numbers, as reference rows beside our own. Percent, R@1, image->text and text->image.

Source of each table: ``review``: a public review of the paper's versions 1 and 2; ``site``: the authors' project page.
These are one run each, without intervals.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """One row of a table of the paper."""

    name: str
    source: str
    scores: dict[str, tuple[float, float]]  # suite -> (i2t R@1, t2i R@1)


ENGLISH = ("flickr30k", "coco", "sharegpt4v-1k", "urban-1k", "docci")
CROSS_LINGUAL = ("flickr30k-cn", "coco-cn", "xm3600")


def _row(name: str, source: str, suites: tuple[str, ...], *scores: tuple[float, float]) -> PaperRow:
    return PaperRow(name, source, dict(zip(suites, scores, strict=True)))


TABLES: dict[str, tuple[tuple[str, ...], list[PaperRow]]] = {
    "Retrieval, English": (
        ENGLISH,
        [
            _row("CLIP-L-336", "review", ENGLISH, (87.7, 67.0), (58.0, 37.1), (86.2, 84.0), (72.8, 57.0), (67.4, 65.7)),
            _row(
                "+ LLM2CLIP (15 M)",
                "review",
                ENGLISH,
                (91.2, 82.1),
                (65.5, 53.6),
                (98.1, 98.4),
                (90.3, 93.2),
                (87.7, 89.0),
            ),
            _row(
                "EVA02-L-336", "review", ENGLISH, (89.6, 78.0), (64.2, 47.9), (91.5, 89.4), (76.6, 70.0), (74.7, 76.4)
            ),
            _row(
                "+ LLM2CLIP (15 M)",
                "review",
                ENGLISH,
                (93.9, 83.8),
                (68.7, 55.7),
                (98.8, 99.2),
                (89.5, 94.2),
                (89.2, 91.3),
            ),
            _row(
                "EVA02-L-224, LLM without CC",
                "review",
                ENGLISH,
                (87.9, 75.6),
                (56.7, 41.8),
                (55.1, 46.1),
                (37.2, 35.1),
                (39.3, 32.3),
            ),
        ],
    ),
    "Retrieval, cross-lingual (trained on English alone)": (
        CROSS_LINGUAL,
        [
            _row("EVA02-L-224", "site", CROSS_LINGUAL, (4.4, 0.9), (2.6, 1.0), (14.0, 8.0)),
            _row("+ LLM2CLIP", "site", CROSS_LINGUAL, (90.6, 75.6), (72.0, 70.1), (68.3, 56.0)),
        ],
    ),
}
