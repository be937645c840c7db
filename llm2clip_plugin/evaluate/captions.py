"""``llm2clip evaluate captions``: caption retrieval accuracy of an LLM's embeddings, within and across languages.

Caption retrieval accuracy (CRA, the paper's measure): N images with two captions each; every first caption ranks the N
second ones by cosine similarity, and the top one must be of the same image. Images are not read. Ties count half.

Shapes: N pairs of captions, W width of an embedding.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.data.sources.records import Caption, select_captions
from llm2clip_plugin.evaluate.config import CaptionSetConfig
from llm2clip_plugin.evaluate.rank_counting import rank_both
from llm2clip_plugin.evaluate.retrieval_ranks import QueryRanks
from llm2clip_plugin.text.encoder import CaptionEncoder

LANGUAGES = "languages"  # name of the row that is the mean over all languages but the home one


@dataclass(frozen=True)
class CaptionScore:
    """One row of the table; accuracies are fractions."""

    name: str  # short->long, de->en ..., or languages
    cra: float  # first retrieves second, top-1
    reverse: float  # second retrieves first
    centred: float  # as cra, after subtracting each set's mean
    pairs: int  # N; chance is 1 / N
    hits: tuple[float, ...] = ()  # of each first caption, 0 to 1
    keys: tuple[str, ...] = ()  # their sample keys


def measure_captions(encoder: CaptionEncoder, config: CaptionSetConfig) -> list[CaptionScore]:
    """One row per ``retrieve``, per further language, and their mean. Raises ValueError as ``caption_sets``."""
    rows = {name: score_pairs(encoder, name, pairs) for name, pairs in caption_sets(config).items()}
    retrieve = [text.replace(":", "->") for text in config.retrieve]
    foreign = [row for name, row in rows.items() if name not in retrieve]
    return [*rows.values(), *([mean_row(foreign)] if foreign else [])]


Pairs = list[tuple[str, str, str]]  # key, first caption, second caption


def caption_sets(config: CaptionSetConfig) -> dict[str, Pairs]:
    """What is retrieved: pairs of captions by row name; reads captions, needs no encoder.

    Raises ValueError if no image has both kinds of captions.
    """
    source = open_source(SourceConfig(path=config.captions))
    captions = [source.captions(number) for number in range(min(len(source), config.limit))]
    sets = {
        f"{first}->{second}": find_pairs(captions, (first, config.home), (second, config.home))
        for first, second in (text.split(":") for text in config.retrieve)
    }
    if empty := [name for name, pairs in sets.items() if not pairs]:
        kinds = ", ".join(sorted({caption.kind for _, of_sample in captions for caption in of_sample})) or "none"
        raise ValueError(
            f"{config.captions}: no image has captions of both kinds for {', '.join(empty)}; available kinds: {kinds}"
        )
    if config.across:
        kind = config.across_kind
        languages = {c.language for _, of_sample in captions for c in of_sample if c.kind == kind} - {config.home}
        for language in sorted(languages):
            sets[f"{language}->{config.home}"] = find_pairs(captions, (kind, language), (kind, config.home))
    return sets


def find_pairs(
    captions: Sequence[tuple[str, Sequence[Caption]]], first: tuple[str, str], second: tuple[str, str]
) -> Pairs:
    """Distinct pairs of different captions; ``first`` and ``second`` are (kind, language), the first of each counts."""
    pairs: dict[tuple[str, str], str] = {}
    for key, of_sample in captions:
        left = next((c.text for c in select_captions(of_sample, first[:1], first[1:])), None)
        right = next((c.text for c in select_captions(of_sample, second[:1], second[1:]) if c.text != left), None)
        if left and right:
            pairs.setdefault((left, right), key)
    return [(key, left, right) for (left, right), key in pairs.items()]


def score_pairs(encoder: CaptionEncoder, name: str, pairs: Pairs) -> CaptionScore:
    """Embed both captions of each pair (the first as queries) and rank in both directions."""
    if not pairs:
        return CaptionScore(name, 0.0, 0.0, 0.0, 0)
    first_NW = encoder.encode([left for _, left, _ in pairs], query=True)
    return rank_pairs(name, pairs, first_NW, encoder.encode([right for _, _, right in pairs]))


def rank_pairs(name: str, pairs: Pairs, first_NW: Tensor, second_NW: Tensor) -> CaptionScore:
    """Rank the embeddings of the pairs' captions in both directions."""
    texts = {text: number for number, text in enumerate(dict.fromkeys(right for _, _, right in pairs))}
    group_N = torch.tensor([texts[right] for _, _, right in pairs])  # equal texts are equally correct
    forward, backward = caption_ranks(first_NW, second_NW, group_N=group_N)
    centred, _ = caption_ranks(first_NW, second_NW, group_N=group_N, center=True)
    hits = forward.hits(1)
    return CaptionScore(
        name=name,
        cra=float(hits.mean()),
        reverse=float(backward.hits(1).mean()),
        centred=float(centred.hits(1).mean()),
        pairs=len(pairs),
        hits=tuple(hits.tolist()),
        keys=tuple(key for key, _, _ in pairs),
    )


def mean_row(rows: Sequence[CaptionScore]) -> CaptionScore:
    """The mean over languages."""
    means = [sum(vars(row)[name] for row in rows) / len(rows) for name in ("cra", "reverse", "centred", "pairs")]
    return CaptionScore(LANGUAGES, *means[:3], pairs=round(means[3]))


def caption_ranks(
    first_NW: Tensor, second_NW: Tensor, *, center: bool = False, group_N: Tensor | None = None
) -> tuple[QueryRanks, QueryRanks]:
    """Ranks of first -> second and second -> first, for hits item by item.

    ``center``: subtract each set's mean before normalizing. A raw LLM's embeddings share one large common direction;
    subtracting it closes much of the gap to a fine-tuned LLM, so report both.
    ``group_N``: int, pairs with the same label are also correct for each other (several items of one concept).
    """
    label_N = torch.arange(len(first_NW), device=first_NW.device) if group_N is None else group_N
    first_NW, second_NW = first_NW.float(), second_NW.float()
    if center:
        first_NW, second_NW = first_NW - first_NW.mean(0, keepdim=True), second_NW - second_NW.mean(0, keepdim=True)
    return rank_both(F.normalize(first_NW, dim=1), F.normalize(second_NW, dim=1), label_N, label_N)


def table(scores: Sequence[CaptionScore]) -> str:
    """The rows as text, top-1 accuracy as fractions: first to second, second to first, the former after centering."""
    width = max(len(row.name) for row in scores)
    lines = [
        "top-1 accuracy; forward: the first caption finds the second, reverse: the second the first, "
        "centered: forward after subtracting each set's mean",
        f"{'':<{width}}  {'forward':>7} {'reverse':>7} {'centered':>8} {'pairs':>6} {'chance':>6}",
    ]
    for row in scores:
        numbers = f"{row.cra:7.3f} {row.reverse:7.3f} {row.centred:8.3f} {row.pairs:6d} {1 / row.pairs:6.3f}"
        lines.append(f"{row.name:<{width}}  {numbers}")
    return "\n".join(lines)


def score_file(scores: Sequence[CaptionScore], encoder: CaptionEncoder, captions: str) -> ScoreFile:
    """The record that `llm2clip compare` reads: one item per caption."""
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
