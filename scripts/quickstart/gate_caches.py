#!/usr/bin/env python3
"""The teachers that gate.sh needs beside the quickstart's: one whose embeddings belong to the wrong
concepts, and LLaVA's own language model.

    gate_caches.py permuted DATA/all --cache DATA/cache/tuned-seed0 --seed 0 --output DIR
    gate_caches.py llm --output DIR
    gate_caches.py neutral DATA/all --llm DIR/llm --layer 28 --post-file FILE --output DIR

- permuted: the cache of a teacher, permuted over the concepts of a split. Norms, spectrum, and what
  the captions of one concept share stay as they are; only what a concept means is lost. So it is a
  stronger control than random embeddings.
- neutral: the captions as another LLM embeds them, the language model of the scaled-down LLaVA. As
  a teacher it is the oracle: its embeddings are what a projector must reach.
- llm: that language model, SmolLM2-135M-Instruct, in DIR/llm.

Caches hold the shards of training and validation. Shapes: C captions, W width of an embedding.
"""

import argparse
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from build_models import make_llava_llm
from torch import Tensor

from llm2clip_plugin.atomic import atomic_directory
from llm2clip_plugin.contracts import TeacherIdentity
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.cache_file import caption_rows, shard_captions
from llm2clip_plugin.data.cache_writer import CacheWriter
from llm2clip_plugin.data.samples import Caption, Sample, caption_hash
from llm2clip_plugin.data.sources import Source, SourceConfig, open_source
from llm2clip_plugin.hashes import sha256_text

SPLITS = ("train", "validation")
PERMUTED = "embeddings of other concepts"  # the name of that control's teacher
# PromptEOL (arXiv 2307.16645), as in parts.sh
READING: dict[str, Any] = {
    "attention": "causal",
    "pooling": "last",
    "chat_template": 'This sentence: "{caption}" means in one word: "',
}
# (kind, language) of a caption -> its text or embedding
Key = tuple[str, str]


def open_split(data: Path, split: str) -> Source:
    """The shards of a split, in every style."""
    return open_source(SourceConfig(path=str(data / f"{split}-*.tar")))


def exchanged(concepts: Sequence[str], seed: int) -> dict[str, str]:
    """Concept -> another one: a random cycle through all of them, so that none stays itself."""
    order = sorted(concepts)
    random.Random(seed).shuffle(order)
    return dict(zip(order, order[1:] + order[:1], strict=True))


def caption_embeddings(
    source: Source, cache: EmbeddingCache
) -> dict[str, dict[Key, Tensor]]:
    """Concept -> the embeddings (W,) of its captions, which are the same in every style."""
    of_concept: dict[str, dict[Key, Tensor]] = {}
    for number in range(len(source)):
        sample: Sample = source[number]
        concept = sample.meta["concept"]
        if concept in of_concept:
            continue
        rows = cache.rows(*source.locate(number), sample.captions, key=sample.key)
        of_concept[concept] = {
            (caption.kind, caption.language): row
            for caption, row in zip(sample.captions, rows, strict=True)
        }
    return of_concept


def write_permuted(data: Path, cache: Path, output: Path, seed: int) -> None:
    """Write the cache of the training and validation shards in which each concept has the
    embeddings of another; raises ValueError if that has no caption of a kind."""
    teacher_cache = EmbeddingCache.open(cache)
    teacher = {
        **teacher_cache.manifest.teacher,
        "llm": PERMUTED,
        "weights_sha256": sha256_text(f"{teacher_cache.fingerprint} {seed}"),
        "adapter_sha256": "",
        "adapter": "",
    }
    with atomic_directory(output, replace=True) as temporary:
        writer = CacheWriter(
            temporary, TeacherIdentity(**teacher), teacher_cache.manifest.dtype
        )
        for split in SPLITS:
            source = open_split(data, split)
            embed = of_others(caption_embeddings(source, teacher_cache), seed)
            write_split(writer, source, embed)
        writer.finish()


def of_others(
    embeddings: Mapping[str, Mapping[Key, Tensor]], seed: int
) -> Callable[[Sample, Caption], Tensor]:
    """A caption of a sample -> that of the same kind and language of another concept."""
    partner = exchanged(list(embeddings), seed)

    def embed(sample: Sample, caption: Caption) -> Tensor:
        other = partner[sample.meta["concept"]]
        key = (caption.kind, caption.language)
        if key not in embeddings[other]:
            raise ValueError(f"{other} has no caption {key}")
        return embeddings[other][key]

    return embed


def write_llm(output: Path) -> None:
    """Write SmolLM2-135M-Instruct to ``output``/llm."""
    output.mkdir(parents=True, exist_ok=True)
    make_llava_llm("smollm2", output)


def write_neutral(
    data: Path, llm: Path, layer: int, post_file: Path, output: Path
) -> None:
    """Write the cache of the training and validation shards as ``llm`` embeds them after block
    ``layer``, with a post-processing of `inputs.py components`; each text is embedded once."""
    from llm2clip_plugin.text.config import EncoderConfig
    from llm2clip_plugin.text.encoder import CaptionEncoder

    sources = {split: open_split(data, split) for split in SPLITS}
    texts: dict[int, str] = {}
    for source in sources.values():
        for number in range(len(source)):
            for caption in source[number].captions:
                texts[caption_hash(caption.text)] = caption.text
    config = EncoderConfig(
        llm=str(llm), layer=layer, post_file=str(post_file), **READING
    )
    encoder = CaptionEncoder(config)
    embeddings_CW = encoder.encode(list(texts.values()))
    row_of = dict(zip(texts, embeddings_CW, strict=True))

    def embed(_: Sample, caption: Caption) -> Tensor:
        return row_of[caption_hash(caption.text)]

    with atomic_directory(output, replace=True) as temporary:
        writer = CacheWriter(temporary, encoder.identity())
        for source in sources.values():
            write_split(writer, source, embed)
        writer.finish()


def write_split(
    writer: CacheWriter, source: Source, embed: Callable[[Sample, Caption], Tensor]
) -> None:
    """Write the shards of a split; ``embed``: a caption of a sample -> (W,)."""
    samples: dict[str, list[Sample]] = {}
    for number in range(len(source)):
        shard, _ = source.locate(number)
        samples.setdefault(shard, []).append(source[number])
    for shard in source.shards:
        keys, captions = shard_captions(source, shard)
        of_hash: dict[tuple[int, int], Caption] = {}
        for number, of_sample in enumerate(captions):
            for caption in of_sample:
                of_hash.setdefault((number, caption_hash(caption.text)), caption)
        rows = caption_rows(captions)
        embeddings = [embed(samples[shard.name][row[0]], of_hash[row]) for row in rows]
        writer.write_shard(shard.name, keys, rows, torch.stack(embeddings))


def parse_options() -> dict[str, Any]:
    """The teacher to make, and its options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    permuted, neutral, llm = map(parts.add_parser, MAKERS)
    for part in (permuted, neutral, llm):
        part.add_argument("--output", type=Path, required=True, help="folder to write")
    for part in (permuted, neutral):
        part.add_argument("data", type=Path, help="folder of the shards")
    permuted.add_argument("--cache", type=Path, required=True, help="of a teacher")
    permuted.add_argument("--seed", type=int, required=True, help="of the permutation")
    neutral.add_argument("--llm", type=Path, required=True, help="its directory")
    neutral.add_argument(
        "--layer", type=int, required=True, help="as of llm2clip embed"
    )
    neutral.add_argument("--post-file", type=Path, required=True)
    return vars(parser.parse_args())


MAKERS: Mapping[str, Callable[..., None]] = {
    "permuted": write_permuted,
    "neutral": write_neutral,
    "llm": write_llm,
}

if __name__ == "__main__":
    options = parse_options()
    try:
        MAKERS[options.pop("part")](**options)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
