"""A map of the teachers' embeddings for the quickstart's page: names of the same emoji in 12 languages.

Principal components of all test names, the mean subtracted; the two that vary most are drawn. How close names really
are is also counted, in all dimensions.

Shapes: N names, W width of an embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scores import Rows
from shards import in_random_order
from torch import Tensor

SIDE, MARGIN = 300, 8  # of the drawing, in its own units
DOTS = 60  # concepts with a dot for each language


@dataclass(frozen=True, kw_only=True)
class Map:
    """One teacher's names."""

    teacher: str
    dots: list[tuple[float, float, int]]  # x, y, number of the language
    variance: float  # share of the variance that the two axes show
    same_language: float  # share of names whose nearest name is of their language
    same_concept: float  # share whose nearest is the same emoji's in another language


@dataclass(frozen=True, kw_only=True)
class Maps:
    """The same names with each teacher."""

    languages: list[str]  # by number
    maps: list[Map]


def draw_maps(teachers: Mapping[str, Rows], names: Mapping[str, str]) -> Maps | None:
    """A map for each teacher of ``names`` (cache -> title), of the concepts named in every language.

    None with fewer than two languages or concepts.
    """
    rows = {title: teachers[cache] for cache, title in names.items() if cache in teachers}
    languages = sorted({language for one in rows.values() for kind, language in one if kind == "short"})
    shared = set.intersection(*(set(one["short", tag]) for one in rows.values() for tag in languages))
    if len(languages) < 2 or len(shared) < 2:
        return None
    concepts = in_random_order(shared, "map")
    maps = [draw_map(title, one, languages, concepts) for title, one in rows.items()]
    return Maps(languages=languages, maps=maps)


def draw_map(teacher: str, rows: Rows, languages: Sequence[str], concepts: Sequence[str]) -> Map:
    """The map of the names of ``concepts``; the first ``DOTS`` are drawn."""
    name_NW = F.normalize(
        torch.stack([rows["short", tag][one].float() for one in concepts for tag in languages]), dim=1
    )
    place_N2, variance = principal_components(name_NW)
    low, high = place_N2.quantile(0.005, 0), place_N2.quantile(0.995, 0)  # single names far away don't shrink the rest
    centered_N2 = (place_N2 - (low + high) / 2) / (high - low).max()  # one scale for both axes
    place_N2 = MARGIN + (SIDE - 2 * MARGIN) * (0.5 + centered_N2).clamp(0, 1)
    drawn = enumerate(place_N2[: DOTS * len(languages)].tolist())
    same_language, same_concept = nearest(name_NW, len(languages))
    return Map(
        teacher=teacher,
        dots=[(round(x, 1), round(y, 1), number % len(languages)) for number, (x, y) in drawn],
        variance=variance,
        same_language=same_language,
        same_concept=same_concept,
    )


def principal_components(rows_NW: Tensor) -> tuple[Tensor, float]:
    """(N, 2) coordinates along the two directions of most variance, and their share of it."""
    centered_NW = rows_NW.double() - rows_NW.double().mean(0)
    variance_W, direction_WW = torch.linalg.eigh(centered_NW.T @ centered_NW)  # ascending
    return (centered_NW @ direction_WW[:, [-1, -2]]).float(), float(variance_W[-2:].sum() / variance_W.sum())


def nearest(rows_NW: Tensor, languages: int) -> tuple[float, float]:
    """Shares of rows whose nearest other row is of the same language, and of the same concept; rows in that order."""
    similarity_NN = (rows_NW @ rows_NW.T).fill_diagonal_(-torch.inf)
    nearest_N, own_N = similarity_NN.argmax(1), torch.arange(len(rows_NW))
    same_language_N, same_concept_N = (
        nearest_N % languages == own_N % languages,
        nearest_N // languages == own_N // languages,
    )
    return float(same_language_N.float().mean()), float(same_concept_N.float().mean())
