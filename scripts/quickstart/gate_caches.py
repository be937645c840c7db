#!/usr/bin/env python3
"""The teachers of gate.sh that the quickstart lacks: one whose embeddings belong to the wrong
concepts, one that knows how captions are spelled and nothing else, and LLaVA's own language model.

    gate_caches.py permuted DATA/all --cache DATA/cache/tuned-seed0 --seed 0 --output DIR
        [--splits train validation]
    gate_caches.py spelling DATA/all --cache DATA/cache/raw --seed 0 --output DIR
    gate_caches.py llm --output DIR
    gate_caches.py neutral DATA/all --llm DIR/llm --layer 28 --post-file FILE --output DIR

- permuted: the cache of a teacher, permuted over the concepts of a split. Norms, spectrum, and what
  the captions of one concept share stay as they are; only what a concept means is lost. So it is a
  stronger control than random embeddings.
- spelling: a caption is the sum of random vectors, one for each run of three to five letters within
  its words, the same wherever the run occurs. "cat face" and "tiger face" are alike, as they are
  for an LLM; "cat" and "kitten" are not. ``--cache`` is a teacher's, for the width.
- neutral: the captions as another LLM embeds them, the language model of the scaled-down LLaVA. As
  a teacher it is the oracle: its embeddings are what a projector must reach.
- llm: that language model, SmolLM2-135M-Instruct, in DIR/llm.

Caches hold the shards of training and validation, or of ``--splits``.

Shapes: C captions, W width of an embedding.
"""

import argparse
import functools
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from build_models import make_llava_llm
from torch import Tensor

from llm2clip_plugin.atomic import atomic_directory
from llm2clip_plugin.contracts import CacheManifest, TeacherIdentity
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.cache_file import caption_rows, shard_captions
from llm2clip_plugin.data.cache_writer import CacheWriter
from llm2clip_plugin.data.samples import Caption, Sample, caption_hash
from llm2clip_plugin.data.sources import Source, SourceConfig, open_source
from llm2clip_plugin.hashes import sha256_text

SPLITS = ("train", "validation")
WORD = re.compile(r"\w+")
# names of the controls' teachers
PERMUTED = "embeddings of other concepts"
SPELLING = "random vectors of letters"
LETTERS = range(3, 6)  # in a run; a word's borders count
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


def control_identity(
    teacher: Mapping[str, Any], name: str, source: str
) -> TeacherIdentity:
    """Of a control that has a teacher's width; ``source`` decides its embeddings."""
    return TeacherIdentity(
        **{
            **teacher,
            "llm": name,
            "weights_sha256": sha256_text(source),
            "adapter_sha256": "",
            "adapter": "",
            "post_file": "",  # texts are not embedded as the teacher's
        }
    )


def write_permuted(
    data: Path, cache: Path, output: Path, seed: int, splits: Sequence[str] = SPLITS
) -> None:
    """Write the cache in which each concept of a split has the embeddings of another; raises
    ValueError if that has no caption of a kind."""
    teacher_cache = EmbeddingCache.open(cache)
    manifest = teacher_cache.manifest
    source = f"{teacher_cache.fingerprint} {seed}"
    identity = control_identity(manifest.teacher, PERMUTED, source)
    with atomic_directory(output, replace=True) as temporary:
        writer = CacheWriter(temporary, identity, manifest.dtype)
        for split in splits:
            pictures = open_split(data, split)
            embed = of_others(caption_embeddings(pictures, teacher_cache), seed)
            write_split(writer, pictures, embed)
        writer.finish()


def write_spelling(data: Path, cache: Path, output: Path, seed: int) -> None:
    """Write the cache of the training and validation shards by how captions are spelled, without
    the mean of the training captions, as LLMs are read."""
    manifest = CacheManifest.read(cache / CacheManifest.FILE)
    width = manifest.teacher["width"]
    source = open_split(data, "train")
    texts = {
        caption.text
        for number in range(len(source))
        for caption in source[number].captions
    }
    vectors = [embed_letters(text, width, seed) for text in sorted(texts)]
    mean_W = torch.stack(vectors).mean(dim=0)

    def embed(text: str) -> Tensor:
        return embed_letters(text, width, seed) - mean_W

    name = f"{SPELLING} {seed}"
    identity = control_identity(manifest.teacher, SPELLING, name)
    write_texts(data, SPLITS, output, identity, manifest.dtype, embed)


def write_texts(
    data: Path,
    splits: Sequence[str],
    output: Path,
    identity: TeacherIdentity,
    dtype: str,
    embed: Callable[[str], Tensor],
) -> None:
    """Write the cache of a teacher that knows a caption's text alone; ``embed``: text -> (W,)."""
    with atomic_directory(output, replace=True) as temporary:
        writer = CacheWriter(temporary, identity, dtype)
        for split in splits:
            source = open_split(data, split)
            write_split(writer, source, lambda _, caption: embed(caption.text))
        writer.finish()


@functools.cache
def random_vector(text: str, width: int) -> Tensor:
    """(width,) decided by the text."""
    number = int(sha256_text(text)[:15], 16)
    return torch.randn(width, generator=torch.Generator().manual_seed(number))


def embed_letters(caption: str, width: int, seed: int) -> Tensor:
    """(width,) the sum of the vectors of all runs of letters in the caption's words; unit length.
    Runs as in fastText (arXiv 1607.04606)."""
    runs = [run for word in WORD.findall(caption.lower()) for run in letter_runs(word)]
    vectors = [random_vector(f"{seed} {run}", width) for run in runs]
    return F.normalize(torch.stack(vectors).sum(dim=0), dim=0)


def letter_runs(word: str) -> list[str]:
    """All runs of LETTERS in a word, whose borders are ``<`` and ``>``."""
    bordered = f"<{word}>"
    return [
        bordered[start : start + length]
        for length in LETTERS
        for start in range(len(bordered) - length + 1)
    ]


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
    permuted, spelling, neutral, llm = map(parts.add_parser, MAKERS)
    for part in (permuted, spelling, neutral, llm):
        part.add_argument("--output", type=Path, required=True, help="folder to write")
    for part in (permuted, spelling, neutral):
        part.add_argument("data", type=Path, help="folder of the shards")
    for part in (permuted, spelling):
        part.add_argument("--cache", type=Path, required=True, help="of a teacher")
        part.add_argument(
            "--seed", type=int, required=True, help="of what is random in it"
        )
    permuted.add_argument(
        "--splits",
        nargs="+",
        default=SPLITS,
        help="the shards' names begin with them; each is permuted within itself",
    )
    neutral.add_argument("--llm", type=Path, required=True, help="its directory")
    neutral.add_argument(
        "--layer", type=int, required=True, help="as of llm2clip embed"
    )
    neutral.add_argument("--post-file", type=Path, required=True)
    return vars(parser.parse_args())


MAKERS: Mapping[str, Callable[..., None]] = {
    "permuted": write_permuted,
    "spelling": write_spelling,
    "neutral": write_neutral,
    "llm": write_llm,
}

if __name__ == "__main__":
    options = parse_options()
    try:
        MAKERS[options.pop("part")](**options)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
