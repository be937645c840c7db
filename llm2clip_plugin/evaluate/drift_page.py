"""The page of ``llm2clip evaluate drift``: one HTML file, no script, nothing fetched."""

from pathlib import Path

from llm2clip_plugin.data.sources.records import BrokenSample
from llm2clip_plugin.evaluate.command_line import dataset_name
from llm2clip_plugin.evaluate.drift_compare import ChangedImage, Drift
from llm2clip_plugin.evaluate.options.drift import DriftConfig
from llm2clip_plugin.templates import page_style, render
from llm2clip_plugin.thumbnails import thumbnail


def drift_page(config: DriftConfig, drift: Drift) -> str:
    """The page's HTML; every text is escaped."""
    lost = [one for one in drift.changed if not one.gained]
    gained = [one for one in drift.changed if one.gained]
    half = config.pictures // 2
    most_lost = max(half, config.pictures - len(gained))
    shown_lost = _spread(lost, most_lost)
    shown_gained = _spread(gained, config.pictures - len(shown_lost))
    pictures = _pictures(drift, [*shown_lost, *shown_gained])
    return render(
        Path(__file__).with_name("drift_page.html"),
        title=f"{dataset_name(config.before)} to {dataset_name(config.after)}: what was kept",
        config=config,
        drift=drift,
        groups=[("Lost", lost, shown_lost), ("Gained", gained, shown_gained)],
        pictures=pictures,
        style=page_style(),
    )


def _spread(values: list[ChangedImage], most: int) -> list[ChangedImage]:
    """At most so many, evenly spaced."""
    count = min(most, len(values))
    return [values[place * len(values) // count] for place in range(count)]


def _pictures(drift: Drift, images: list[ChangedImage]) -> dict[str, str | None]:
    """Data URIs by key; None for one that cannot be read any more."""
    if drift.labeled is None:
        return {}
    test = drift.labeled.test
    wanted = {image.key for image in images}
    pictures: dict[str, str | None] = {}
    for number, key in enumerate(test.keys):
        if key in wanted:
            try:
                pictures[key] = thumbnail(test.image(number))
            except BrokenSample:
                pictures[key] = None
    return pictures
