"""The result of a comparison: one row per benchmark and pair of sides."""

from dataclasses import asdict, dataclass
from typing import Any

from llava_integration.compare.statistics import Difference


@dataclass(frozen=True, kw_only=True)
class Row:
    """New against base on one benchmark."""

    benchmark: str
    title: str
    unit: str
    base: str  # name of the base side
    new: str
    result: Difference
    p_holm: float  # adjusted over the benchmarks of this pair of sides
    wins: int  # questions with a higher score in new
    losses: int
    ties: int
    questions: int
    images: int
    runs: tuple[int, int]
    categories: dict[str, tuple[float, float, int]]  # mean score of base and of new, number of questions
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """'better', 'worse' or 'no difference shown', at 5 % over all benchmarks."""
        if self.p_holm >= 0.05:
            return "no difference shown"
        return "better" if self.result.difference > 0 else "worse"

    def power_line(self) -> str:
        """The difference that this many questions can detect."""
        size, detectable = abs(self.result.difference), self.result.detectable
        start = f"{self.questions} questions on {self.images} images"
        if not detectable:
            return f"{start}; both sides have the same score on each"
        unit = "points" if self.unit == "%" else self.unit
        line = f"{start}: a difference of {detectable:.2f} {unit} is detectable with 80 % power"
        times = (detectable / size) ** 2 if size else 0.0
        return f"{line}; detecting {size:.2f} needs {times:.1f} times the questions" if 1 < times < 100 else line


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All rows, the headline numbers of every side, and the settings."""

    names: tuple[str, ...]  # sides, base first
    rows: tuple[Row, ...]
    scores: dict[str, dict[str, float]]  # benchmark -> side -> headline number
    titles: dict[str, str]
    units: dict[str, str]
    references: dict[str, dict[str, float]]  # model -> benchmark -> published number
    settings: dict[str, Any]
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()  # what makes numbers meaningless; before everything else in every report

    def pairs(self) -> list[tuple[str, list[Row]]]:
        """Rows by the side that is compared with the base."""
        return [(name, [row for row in self.rows if row.new == name]) for name in self.names[1:]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the verdicts and power lines."""
        return {**asdict(self), "rows": [_row_dict(row) for row in self.rows]}


def _row_dict(row: Row) -> dict[str, Any]:
    body = asdict(row)
    result = body.pop("result")
    return {
        **body,
        "base_score": result.pop("base"),
        "new_score": result.pop("new"),
        **result,
        "interval": [row.result.low, row.result.high],
        "verdict": row.verdict,
        "power": row.power_line(),
    }
