"""What retrieval needs of its data, checked on samples before a tower is loaded or a run begins.

Images are not embedded and not every sample is read: a field that one sample in a thousand lacks is found later.
"""

from collections.abc import Sequence

from llm2clip_plugin.data.decode import BrokenImage, open_header
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.records import BrokenSample, Sample, select_captions
from llm2clip_plugin.evaluate.config import RetrievalConfig

LOOKED_AT = 2048  # samples whose JSON is read, evenly spaced
IMAGES = 8  # of these, whose headers are read until one can be opened


def check_measurable(source: Source, config: RetrievalConfig, *, option: str = "--") -> list[str]:
    """Raise ValueError if retrieval on ``source`` cannot work with these settings; lines about what is unusual.

    That is for a field that a sample lacks, kinds and languages that select no caption, images that cannot be opened.
    option: the prefix of the settings' options.
    """
    images = min(config.limit or len(source), len(source))
    samples, broken = _look_at(source, images)
    if not samples:
        raise ValueError(f"{source.path} contains no usable images: {broken[0] if broken else 'it is empty'}")
    absent = _check_captions(samples, source, config, option)
    used = [sample for sample in samples if select_captions(sample.captions, config.kinds, config.languages)]
    _check_fields(used, source, config, option)
    _check_images(samples, source)
    return [line for line in (_too_large_k(source, config, option), *absent) if line]


def _too_large_k(source: Source, config: RetrievalConfig, option: str) -> str:
    """A line about a recall@k over fewer than k images, which is 1 whatever the tower; "" if there is none."""
    images, k = min(config.limit or len(source), len(source)), max(config.ks)
    if k <= images:
        return ""
    return (
        f"{option}ks {' '.join(map(str, config.ks))}: {source.path} has {images} images, so recall@{k} is 1 for any "
        f"tower; set {option}ks to numbers up to {images}"
    )


def _look_at(source: Source, images: int) -> tuple[list[Sample], list[BrokenSample]]:
    """Up to LOOKED_AT evenly spaced samples of the first ``images``, and those that cannot be read."""
    samples, broken = [], []
    for number in range(0, images, max(1, images // LOOKED_AT)):
        try:
            samples.append(source[number])
        except BrokenSample as error:
            broken.append(error)
    return samples, broken


def _check_fields(samples: Sequence[Sample], source: Source, config: RetrievalConfig, option: str) -> None:
    for setting, field in (("group", config.group), ("cluster", config.cluster)):
        lacking = next((sample for sample in samples if field and field not in sample.meta), None)
        if lacking is not None:
            known = ", ".join(sorted(lacking.meta)) or "none"
            raise ValueError(
                f"{option}{setting} {field}: sample {lacking.key!r} of {source.path} has no field {field!r} in its "
                f"JSON; known: {known}. Choose one of these, or none with {option}{setting} ''"
            )


def _check_captions(samples: Sequence[Sample], source: Source, config: RetrievalConfig, option: str) -> list[str]:
    """Lines about kinds and languages of which none of the samples has a caption; ValueError if nothing is selected."""
    captions = [caption for sample in samples for caption in sample.captions]
    kinds, languages = {caption.kind for caption in captions}, {caption.language for caption in captions}
    lines = []
    for setting, wanted, present in (("kinds", config.kinds, kinds), ("languages", config.languages, languages)):
        if absent := [name for name in wanted if name not in present]:
            lines.append(
                f"{option}{setting} {' '.join(wanted)}: no caption of {source.path} has {setting} {', '.join(absent)}; "
                f"known: {', '.join(sorted(present)) or 'none'}"
            )
    if not select_captions(captions, config.kinds, config.languages):
        known = ", ".join(sorted({f"{caption.kind}:{caption.language}" for caption in captions})) or "none"
        raise ValueError(
            lines[0]
            if lines
            else f"no caption of {source.path} has both the kinds {' '.join(config.kinds) or 'of any'} "
            f"and the languages {' '.join(config.languages) or 'of any'}; known: {known}"
        )
    return lines


def _check_images(samples: Sequence[Sample], source: Source) -> None:
    reason: Exception | None = None
    for sample in samples[:: max(1, len(samples) // IMAGES)][:IMAGES]:
        try:
            open_header(sample.read_image())
            return
        except (BrokenSample, BrokenImage) as error:
            reason = error if isinstance(error, BrokenSample) else ValueError(f"sample {sample.key!r}: {error}")
    raise ValueError(f"{source.path} contains no usable images: {reason}")
