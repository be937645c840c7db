#!/usr/bin/env python3
"""Do forecasts rank towers as the LLaVAs trained on them do? Spearman's correlation, with an interval over towers.

    scripts/quickstart/correlation.py forecast-1.json=llava-a0.json,llava-a1.json forecast-2.json=llava-b0.json ...

Each word is a tower: its score file of `llm2clip forecast`, and one or more of its LLaVAs, of which the first metric is
averaged. One interval per measure of the forecast; resamples in which all towers tie are left out.
"""

import sys
from collections.abc import Sequence

import numpy as np

from llm2clip_plugin.contracts import ScoreFile

LEAST = 4  # towers


def correlation(forecast_T: Sequence[float], llava_T: Sequence[float], resamples: int = 2000) -> tuple[float, ...]:
    """Spearman's correlation over T towers, and its 95 % percentile interval. Raises ValueError for fewer than four."""
    if len(forecast_T) < LEAST:
        raise ValueError(f"a rank correlation needs at least {LEAST} towers, got {len(forecast_T)}")
    pairs_T2 = np.column_stack([forecast_T, llava_T])
    drawn_RT = np.random.default_rng(0).integers(0, len(pairs_T2), (resamples, len(pairs_T2)))
    with np.errstate(invalid="ignore"):  # of towers that all tie
        low, high = np.nanquantile([spearman(pairs_T2[drawn_T]) for drawn_T in drawn_RT], [0.025, 0.975])
    return spearman(pairs_T2), float(low), float(high)


def spearman(pairs_T2: np.ndarray) -> float:
    """The correlation of the ranks in two columns, ties at their mean rank; nan if a column is constant."""
    higher_2TT, equal_2TT = (compare(pairs_T2.T[:, :, None], pairs_T2.T[:, None]) for compare in (np.greater, np.equal))
    return float(np.corrcoef(higher_2TT.sum(2) + equal_2TT.sum(2) / 2)[0, 1])


def main(words: Sequence[str]) -> int:
    """Print one line per measure of the forecast."""
    forecasts, llavas = [], []
    for word in words:
        forecast, equals, files = word.partition("=")
        if not equals:
            raise SystemExit(f"error: expected FORECAST.json=LLAVA.json[,LLAVA.json ...], got {word!r}")
        forecasts.append(ScoreFile.read(forecast).metrics)
        llavas.append(np.mean([next(iter(ScoreFile.read(file).metrics.values())) for file in files.split(",")]))
    for name in forecasts[0] if forecasts else []:
        value, low, high = correlation([metrics[name] for metrics in forecasts], llavas)
        print(f"{name:10} {value:+.2f} [{low:+.2f}, {high:+.2f}] over {len(words)} towers")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
