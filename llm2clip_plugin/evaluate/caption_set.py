"""``llm2clip evaluate captions``: how well an LLM's embeddings tell captions apart, in one language and across.

Caption retrieval accuracy (CRA, the paper's measure): two captions of each of N images; each first caption ranks all N
second ones by cosine similarity, and the best must be its own. Ties count half.

Shape letters: N pairs of captions, W embedding width.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.sources.base import Source, SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.data.sources.records import Caption
from llm2clip_plugin.evaluate.captions import caption_ranks
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.settings import EncoderConfig

LANGUAGES = "languages"  # the row that is the mean over all languages but the home one


@dataclass(frozen=True, kw_only=True)
class CaptionSetConfig:
    """Which captions retrieve which."""

    captions: str = ""  # captioned images; no image is read
    retrieve: tuple[str, ...] = ("short:long",)  # FIRST:SECOND kinds of captions: first retrieves second
    home: str = "en"  # language of those, and the one that others retrieve into
    across: bool = True  # names in other languages retrieve those in the home language, where there are any
    across_kind: str = "short"  # kind of caption that is there in several languages
    limit: int = 5000  # images at most, the first ones

    def __post_init__(self) -> None:
        for text in self.retrieve:
            if text.count(":") != 1 or not all(text.split(":")):
                raise ValueError(f"{text!r} is not FIRST:SECOND kinds of captions, as in short:long")


@dataclass(frozen=True)
class CaptionScore:
    """One row: accuracies are fractions."""

    name: str  # short->long, de->en ..., or languages for the mean over these
    cra: float  # first retrieves second, top-1
    reverse: float  # second retrieves first
    centred: float  # as cra, each set's own mean taken off before
    pairs: int  # also 1 / chance
    hits: tuple[float, ...] = ()  # of each first caption
    keys: tuple[str, ...] = ()  # their samples


def measure_captions(encoder: CaptionEncoder, config: CaptionSetConfig) -> list[CaptionScore]:
    """Every row of the configuration. Raises ValueError if a kind of caption is not there."""
    source = open_source(SourceConfig(path=config.captions))
    captions = [source.captions(number) for number in range(min(len(source), config.limit))]
    rows = [
        score_pairs(encoder, f"{first}->{second}", find_pairs(captions, (first, config.home), (second, config.home)))
        for first, second in (text.split(":") for text in config.retrieve)
    ]
    empty = [row.name for row in rows if not row.pairs]
    if empty:
        raise ValueError(
            f"{config.captions}: no image has two captions {', '.join(empty)}; there are {kinds_of(source)}"
        )
    if config.across:
        home = (config.across_kind, config.home)
        found = [
            score_pairs(
                encoder, f"{language}->{config.home}", find_pairs(captions, (config.across_kind, language), home)
            )
            for language in other_languages(captions, config)
        ]
        rows += [*found, *mean_row(found)]
    return rows


Pairs = list[tuple[str, str, str]]  # key, first caption, second caption


def find_pairs(
    captions: Sequence[tuple[str, Sequence[Caption]]], first: tuple[str, str], second: tuple[str, str]
) -> Pairs:
    """Distinct pairs of different captions, of a kind and language each; the first of each that a sample has."""
    pairs: dict[tuple[str, str], str] = {}
    for key, of_sample in captions:
        left = next((c.text for c in of_sample if (c.kind, c.language) == first), None)
        right = next((c.text for c in of_sample if (c.kind, c.language) == second and c.text != left), None)
        if left and right:
            pairs.setdefault((left, right), key)
    return [(key, left, right) for (left, right), key in pairs.items()]


def other_languages(captions: Sequence[tuple[str, Sequence[Caption]]], config: CaptionSetConfig) -> list[str]:
    """Languages besides home in which there are captions of the kind that is compared."""
    found = {c.language for _, of_sample in captions for c in of_sample if c.kind == config.across_kind}
    return sorted(found - {config.home})


def score_pairs(encoder: CaptionEncoder, name: str, pairs: Pairs) -> CaptionScore:
    """Embed both sides (the first as queries) and rank."""
    if not pairs:
        return CaptionScore(name, 0.0, 0.0, 0.0, 0)
    first_NW = encoder.encode([left for _, left, _ in pairs], query=True)
    second_NW = encoder.encode([right for _, _, right in pairs])
    texts = {text: number for number, text in enumerate(dict.fromkeys(right for _, _, right in pairs))}
    group_N = torch.tensor([texts[right] for _, _, right in pairs])  # the same text is as right as one's own
    there, back = caption_ranks(first_NW, second_NW, group_N=group_N)
    centred, _ = caption_ranks(first_NW, second_NW, group_N=group_N, centre=True)
    hits = there.hits(1)
    return CaptionScore(
        name=name,
        cra=float(hits.mean()),
        reverse=float(back.hits(1).mean()),
        centred=float(centred.hits(1).mean()),
        pairs=len(pairs),
        hits=tuple(hits.tolist()),
        keys=tuple(key for key, _, _ in pairs),
    )


def mean_row(rows: Sequence[CaptionScore]) -> Iterator[CaptionScore]:
    """The mean over languages, if there are any."""
    if rows:
        means = [sum(vars(row)[name] for row in rows) / len(rows) for name in ("cra", "reverse", "centred", "pairs")]
        yield CaptionScore(LANGUAGES, *means[:3], pairs=round(means[3]))


def kinds_of(source: Source) -> str:
    """The kinds of captions of a source's first samples."""
    found = {c.kind for number in range(min(len(source), 1000)) for c in source.captions(number)[1]}
    return ", ".join(sorted(found)) or "no captions"


@dataclass(frozen=True, kw_only=True)
class EvaluateCaptionsConfig:
    """Caption retrieval accuracy of an LLM. Usage: llm2clip evaluate captions DATA --llm PATH_OR_HUB_ID [options]."""

    measure: CaptionSetConfig = field(default_factory=CaptionSetConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    json: str = ""  # also write a score file, with a hit for each caption


def table(scores: Sequence[CaptionScore]) -> str:
    """The rows as text."""
    width = max(len(row.name) for row in scores)
    lines = [f"{'top-1':<{width}}  {'there':>6} {'back':>6} {'centred':>7} {'pairs':>6} {'chance':>6}"]
    for row in scores:
        numbers = f"{row.cra:6.3f} {row.reverse:6.3f} {row.centred:7.3f} {row.pairs:6d} {1 / row.pairs:6.3f}"
        lines.append(f"{row.name:<{width}}  {numbers}")
    return "\n".join(lines)


def score_file(scores: Sequence[CaptionScore], encoder: CaptionEncoder, captions: str) -> ScoreFile:
    """For paired comparison of two LLMs: one item a caption."""
    items = [
        {"id": f"{row.name}/{key}", "score": hit, "cluster": key}
        for row in scores
        for key, hit in zip(row.keys, row.hits, strict=True)
    ]
    metrics = {f"{row.name}/{name}": vars(row)[name] for row in scores for name in ("cra", "reverse", "centred")}
    return ScoreFile(
        benchmark=f"caption retrieval, {Path(captions).name}",
        metrics=metrics,
        items=items,
        counts={row.name: row.pairs for row in scores},
        model=encoder.config.adapter or encoder.config.llm,
        provenance={"teacher": dataclasses.asdict(encoder.identity())},
    )


def main(argv: list[str]) -> int:
    """``llm2clip evaluate captions DATA --llm PATH_OR_HUB_ID [--adapter DIR] [--retrieve short:long]``."""
    import tyro

    words = list(argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--captions")
    config = tyro.cli(tyro.conf.OmitArgPrefixes[EvaluateCaptionsConfig], args=words, prog="llm2clip evaluate captions")
    if not config.measure.captions:
        raise ValueError("no captions are named: llm2clip evaluate captions DATA --llm PATH_OR_HUB_ID")
    encoder = CaptionEncoder(config.encoder)
    scores = measure_captions(encoder, config.measure)
    print(table(scores))
    if encoder.count_truncated:
        print(f"{encoder.count_truncated} captions were longer than {encoder.config.max_tokens} tokens and were cut")
    if config.json:
        print(f"wrote {score_file(scores, encoder, config.measure.captions).write(config.json)}", file=sys.stderr)
    return 0
