#!/usr/bin/env python3
"""The strongest control of a fine-tuned LLM: a linear map on the frozen one, fitted to the captions
that stage 1 trains on.

    linear_map.py DATA/all --cache DATA/cache/raw --captions DATA/captions --seed 0
        --shard llm2clip_plugin/data/emoji/train-noto.tar --output DATA/cache/map-seed0

``--captions`` is a cache of the captions in ``--shard``, read as those of ``--cache``. First the
map whitens embeddings within concepts, in closed form: directions in which the captions of one
concept differ count less. Then it is trained contrastively on stage 1's pairs. The cache that it
writes holds the mapped embeddings of ``--cache``; stage 2 reads it like any other.

Shapes: C captions, N concepts, b pairs of a batch, W width of an embedding.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from llm2clip_plugin.atomic import atomic_directory
from llm2clip_plugin.contracts import TeacherIdentity
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.cache_file import caption_rows, rows_digest, shard_captions
from llm2clip_plugin.data.cache_writer import CacheWriter
from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.hashes import sha256_weights
from llm2clip_plugin.json_files import read_json_value
from llm2clip_plugin.text.pair_step import pair_loss
from llm2clip_plugin.vision.directory import write_json

MAP = "linear map on the frozen LLM"  # the name of this control's teacher
RECORD = "linear_map.json"  # what a map was fitted to, next to the cache that it made
WEIGHTS = "linear_map.safetensors"
KINDS = ("short", "long", "keywords")


@dataclass(frozen=True, kw_only=True)
class MapConfig:
    """How a map is fitted. Pairs, their batch and the scale are those of stage 1; the rest was
    chosen on validation captions."""

    # of the covariance within concepts to a multiple of the identity
    shrinkage: float = 0.3
    steps: int = 200  # contrastive steps after the whitening
    batch: int = 64  # pairs of a step
    learning_rate: float = 1e-4
    scale: float = 20.0  # of the cosines
    # second kind of a pair, whose first is a name -> how often it is drawn; as in stage 1
    pairs: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"long": 0.2, "keywords": 0.8}
    )


@dataclass(frozen=True)
class Concept:
    """The embeddings of a concept's English captions."""

    family: str  # concepts of one family are not negatives of each other
    rows: dict[str, Tensor]  # kind -> (W,)


@dataclass(frozen=True)
class LinearMap:
    """embedding -> (embedding - mean) weight."""

    mean: Tensor  # (W,)
    weight: Tensor  # (W, W)

    def __call__(self, embeddings_CW: Tensor) -> Tensor:
        """(C, W) -> (C, W)."""
        return (embeddings_CW - self.mean) @ self.weight


def read_concepts(shard: Path, cache: EmbeddingCache) -> list[Concept]:
    """The concepts of a shard that has each of them once."""
    source = open_source(SourceConfig(path=str(shard)))
    concepts = []
    for number in range(len(source)):
        sample = source[number]
        captions = [
            caption
            for caption in sample.captions
            if caption.language == "en" and caption.kind in KINDS
        ]
        embeddings = cache.rows(*source.locate(number), captions, key=sample.key)
        rows = {}
        for caption, row in zip(captions, embeddings, strict=True):
            rows.setdefault(caption.kind, row)
        concepts.append(Concept(family=sample.meta["family"], rows=rows))
    return concepts


def fit_map(concepts: Sequence[Concept], config: MapConfig, seed: int) -> LinearMap:
    """Whitening, then contrastive steps; ``seed`` decides the pairs of each step."""
    whitening = whiten_within(concepts, config.shrinkage)
    return train_map(whitening, concepts, config, seed)


def whiten_within(concepts: Sequence[Concept], shrinkage: float) -> LinearMap:
    """The map after which captions of one concept differ alike in all directions: the inverse root
    of their covariance, of which the part ``shrinkage`` is replaced by a multiple of the
    identity."""
    of_concept = [
        torch.stack(list(concept.rows.values())).double() for concept in concepts
    ]
    all_CW = torch.cat(of_concept)
    mean_W = all_CW.mean(dim=0)
    differences_CW = torch.cat(
        [rows_CW - rows_CW.mean(dim=0) for rows_CW in of_concept]
    )
    freedom = len(all_CW) - len(concepts)
    if freedom < 1:
        raise ValueError(
            "no concept has two captions, so nothing tells how they differ"
        )
    within_WW = differences_CW.T @ differences_CW / freedom
    identity_WW = torch.eye(len(mean_W), dtype=torch.float64)
    average = within_WW.trace() / len(mean_W)
    shrunk_WW = (1 - shrinkage) * within_WW + shrinkage * average * identity_WW
    variance_W, direction_WW = torch.linalg.eigh(shrunk_WW)
    root_WW = direction_WW @ torch.diag(variance_W.rsqrt()) @ direction_WW.T
    return LinearMap(mean_W.float(), root_WW.float())


def train_map(
    start: LinearMap, concepts: Sequence[Concept], config: MapConfig, seed: int
) -> LinearMap:
    """Contrastive steps from a map: a matrix behind it is trained, at first the identity."""
    generator = torch.Generator().manual_seed(seed)
    families = {concept.family: number for number, concept in enumerate(concepts)}
    queries: dict[str, torch.Tensor] = {}
    positives: dict[str, torch.Tensor] = {}
    ids: dict[str, torch.Tensor] = {}
    for kind in config.pairs:
        with_both = [
            concept for concept in concepts if {"short", kind} <= concept.rows.keys()
        ]
        queries[kind] = start(
            torch.stack([concept.rows["short"] for concept in with_both])
        )
        positives[kind] = start(
            torch.stack([concept.rows[kind] for concept in with_both])
        )
        ids[kind] = torch.tensor([families[concept.family] for concept in with_both])
    kinds = list(config.pairs)
    shares = torch.tensor(list(config.pairs.values()))
    scale = torch.tensor([config.scale])
    more_WW = torch.nn.Parameter(torch.eye(len(start.mean)))
    optimizer = torch.optim.Adam([more_WW], lr=config.learning_rate)
    for step in range(config.steps):
        kind = kinds[int(torch.multinomial(shares, 1, generator=generator))]
        chosen_b = torch.randperm(len(ids[kind]), generator=generator)[: config.batch]
        query_bW = F.normalize(queries[kind][chosen_b] @ more_WW, dim=1)
        positive_bW = F.normalize(positives[kind][chosen_b] @ more_WW, dim=1)
        none_nW = query_bW[:0]
        loss = pair_loss(
            query_bW, positive_bW, none_nW, scale, image_ids=ids[kind][chosen_b]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = config.learning_rate * (
            1 - step / config.steps
        )
        optimizer.step()
    return LinearMap(start.mean, start.weight @ more_WW.detach())


def write_mapped(
    data: Path, cache: EmbeddingCache, linear: LinearMap, output: Path
) -> str:
    """Write the mapped embeddings of ``cache``, which has the shards in ``data``, and the map;
    returns the map's hash."""
    source = open_source(SourceConfig(path=str(data / "*.tar")))
    weights = {"mean": linear.mean.contiguous(), "weight": linear.weight.contiguous()}
    save_file(weights, output / WEIGHTS)
    map_hash = sha256_weights(output / WEIGHTS)
    # the map takes the place of the raw LLM's post-processing
    changed = {"llm": MAP, "post": map_hash, "post_file": ""}
    teacher = {**cache.manifest.teacher, **changed}
    writer = CacheWriter(output, TeacherIdentity(**teacher), cache.manifest.dtype)
    for shard in source.shards:
        keys, captions = shard_captions(source, shard)
        rows = caption_rows(captions)
        file = cache.shard(shard.name)
        if file.meta["rows_sha256"] != rows_digest(keys, rows):
            raise ContractError(
                f"{file.path} has other captions than {data}; embed them again"
            )
        embeddings_CW = file.embeddings(range(len(rows)))
        writer.write_shard(shard.name, keys, rows, linear(embeddings_CW))
    writer.finish()
    return map_hash


def write_map(
    data: Path, *, cache: Path, captions: Path, shard: Path, output: Path, seed: int
) -> None:
    """Fit the map of a seed to the captions of ``shard``, and write the cache ``output``. Raises
    ContractError if ``cache`` and ``captions`` are of different teachers."""
    raw = EmbeddingCache.open(cache)
    fitted = EmbeddingCache.open(captions, expect_fingerprint=raw.fingerprint)
    concepts = read_concepts(shard, fitted)
    config = MapConfig()
    linear = fit_map(concepts, config, seed)
    # of another seed or setting; nothing else is replaced
    is_ours = (output / RECORD).is_file()
    with atomic_directory(
        output, replace=is_ours, fix="choose another --output"
    ) as temporary:
        map_hash = write_mapped(data, raw, linear, temporary)
        record = {
            "llm": raw.fingerprint,
            "captions": [shard.name],
            "seed": seed,
            "map_sha256": map_hash,
            **dataclasses.asdict(config),
        }
        write_json(temporary / RECORD, record)


def read_record(cache: EmbeddingCache) -> dict[str, Any]:
    """What the map of a cache was fitted to. Raises FileNotFoundError for a cache without a map,
    ContractError if the record is of another map."""
    record = read_json_value(cache.directory / RECORD)
    if record["map_sha256"] != cache.manifest.teacher["post"]:
        raise ContractError(
            f"{cache.directory / RECORD} is of the map {record['map_sha256']}, "
            f"the cache of {cache.manifest.teacher['post']}; delete the folder"
        )
    return record


def parse_options() -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of the shards of --cache")
    parser.add_argument(
        "--cache", type=Path, required=True, help="embeddings that are mapped"
    )
    parser.add_argument("--captions", type=Path, required=True, help="cache of --shard")
    parser.add_argument(
        "--shard", type=Path, required=True, help="captions to fit the map to"
    )
    parser.add_argument(
        "--seed", type=int, required=True, help="of the pairs of each step"
    )
    parser.add_argument("--output", type=Path, required=True, help="cache to write")
    return vars(parser.parse_args())


if __name__ == "__main__":
    try:
        write_map(**parse_options())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
