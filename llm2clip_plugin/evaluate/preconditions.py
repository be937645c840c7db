"""What retrieval needs of its data, checked on samples before a tower is loaded or a run begins."""

from contextlib import suppress

from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.records import BrokenSample, Sample, select_captions
from llm2clip_plugin.evaluate.config import RetrievalConfig

LOOKED_AT = 2048  # samples whose JSON is read, evenly spaced: what fewer lack is found later


def check_measurable(source: Source, config: RetrievalConfig, *, option: str = "--") -> None:
    """Raise ValueError for kinds and languages that select no caption, and for a field that a sample lacks.

    option: the prefix of the settings' options.
    """
    images = min(config.limit or len(source), len(source))
    samples: list[Sample] = []
    for number in range(0, images, max(1, images // LOOKED_AT)):
        with suppress(BrokenSample):
            samples.append(source[number])
    captions = [caption for sample in samples for caption in sample.captions]
    if not select_captions(captions, config.kinds, config.languages):
        known = ", ".join(sorted({f"{caption.kind}:{caption.language}" for caption in captions})) or "none"
        raise ValueError(
            f"no caption of {source.path} has {option}kinds {' '.join(config.kinds) or '(any)'} and {option}languages "
            f"{' '.join(config.languages) or '(any)'}; known: {known}"
        )
    for setting, field in (("group", config.group), ("cluster", config.cluster)):
        for sample in samples if field else ():
            if field not in sample.meta:
                raise ValueError(
                    f"{option}{setting} {field}: sample {sample.key!r} of {source.path} has no field {field!r} in its "
                    f"JSON; known: {', '.join(sorted(sample.meta)) or 'none'}"
                )
