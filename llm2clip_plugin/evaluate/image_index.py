"""The embeddings of a data set's images on disk, and the images that are nearest to a text.

One safetensors file holds a part of the images: ``image_ND`` (float16, normalized) and ``number_N`` (in the source). A
rerun skips the parts that exist; the folder's name has a hash of the tower, the data and the preprocessing.

Shapes: N images of a part, Q texts, D projection dimension.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm2clip_plugin.contracts import ContractError, atomic_file, canonical_json, sha256_text
from llm2clip_plugin.data.digest import source_digest
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.records import BrokenSample
from llm2clip_plugin.evaluate.command_line import OpenedTower
from llm2clip_plugin.evaluate.image_features import encode_images
from llm2clip_plugin.evaluate.in_memory_source import InMemorySource, Row, image_files
from llm2clip_plugin.progress import progress_bar
from llm2clip_plugin.train.distributed import barrier, gather_objects, group_of, rank, world_size

FORMAT = 2  # of a part
PART = 4096  # images of a file, and what a stopped command embeds again at most


@dataclass(frozen=True)
class Hit:
    """An image that was found."""

    number: int  # in the source
    score: float  # cosine


def index_folder(tower: OpenedTower, source: Source, parent: Path) -> Path:
    """The folder below ``parent`` of a source's images, embedded by this tower."""
    card, stamps = tower.dual.card, [str(stamp) for stamp in source.stamps]
    data = [source_digest(source), source.config.images, source.config.image_field, stamps]
    images = dataclasses.asdict(tower.images)
    digest = sha256_text(canonical_json([card.weights_sha256, card.adapter_sha256, data, images, PART, FORMAT]))
    return parent / f"{source.name}-{digest[:12]}"


def embed_images(
    tower: OpenedTower, source: Source, folder: Path, *, batch: int, workers: int, all_ranks: bool = False
) -> tuple[list[Path], list[BrokenSample]]:
    """Embed the images of ``source`` whose part is not yet in ``folder``; all parts, and the images left out now.

    ``all_ranks``: every rank of the default process group calls this and embeds some of the parts.
    """
    group = group_of(all_ranks)
    starts = range(0, len(source), PART)
    parts = [folder / f"{part:05d}.safetensors" for part in range(len(starts))]
    missing = [(path, start) for path, start in zip(parts, starts, strict=True) if not path.is_file()]
    own = missing[rank(group) :: world_size(group)]
    total = sum(min(PART, len(source) - start) for _, start in own)
    broken: list[BrokenSample] = []
    with progress_bar(total=total, label="images", unit="images", show=rank(group) == 0) as bar:
        for path, start in own:
            found = encode_images(
                tower.dual.encode_image,
                source,
                range(start, min(start + PART, len(source))),
                tower.images,
                tower.device,
                batch=batch,
                workers=workers,
                bar=bar,
            )
            broken += found.broken
            vectors = [torch.empty(0, tower.dual.card.projection_dim), *found.vectors]
            with atomic_file(path) as temporary:
                tensors = {"image_ND": torch.cat(vectors).half(), "number_N": torch.tensor(found.numbers).long()}
                save_file(tensors, str(temporary))
    if all_ranks:
        barrier()
    return parts, [error for of_rank in gather_objects(broken, group) for error in of_rank]


def nearest(parts: Sequence[Path], text_QD: Tensor, count: int) -> list[list[Hit]]:
    """For each text the ``count`` nearest images, best first; a part at a time is in memory.

    Raises ContractError for a damaged part, ValueError if no image is readable.
    """
    score_Qk, number_Qk = torch.empty(len(text_QD), 0), torch.empty(len(text_QD), 0, dtype=torch.int64)
    for path in parts:
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ContractError(f"{path} is damaged ({error}); delete it and rerun the same command") from error
        scores = torch.cat((score_Qk, text_QD.float().cpu() @ tensors["image_ND"].float().T), dim=1)
        numbers = torch.cat((number_Qk, tensors["number_N"].expand(len(text_QD), -1)), dim=1)
        score_Qk, chosen = scores.topk(min(count, scores.shape[1]), dim=1)
        number_Qk = numbers.gather(1, chosen)
    if not score_Qk.shape[1]:
        raise ValueError("the data has no readable images")
    return [
        [Hit(number, score) for number, score in zip(numbers, scores, strict=True)]
        for numbers, scores in zip(number_Qk.tolist(), score_Qk.tolist(), strict=True)
    ]


def folder_of_images(path: str) -> InMemorySource | None:
    """A folder of image files, at any depth, as a source without captions; None if ``path`` is not one."""
    root = Path(path)
    if not root.is_dir() or any(root.glob("*.tar")) or not (files := image_files(root)):
        return None
    stamps = [(str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    name = f"{root.resolve().name}-{sha256_text(canonical_json(stamps))[:12]}"
    return InMemorySource(name, root, [Row(stamp[0], file) for stamp, file in zip(stamps, files, strict=True)])
