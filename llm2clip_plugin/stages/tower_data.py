"""What a run of stage 2 reads: captioned images with the caches of their embeddings, and what it
evaluates."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

import torch

from llm2clip_plugin.contracts import PROJECTED, TeacherIdentity
from llm2clip_plugin.data.cache import (
    EmbeddingCache,
    cache_digest,
    short_digest,
    source_digest,
)
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.loader import PairLoader
from llm2clip_plugin.data.pairs import PairDataset
from llm2clip_plugin.data.remote import is_url, shuffle_window
from llm2clip_plugin.data.sampler import epoch_draws
from llm2clip_plugin.data.samples import (
    lacks_shared_memory,
    plan_evaluation,
    plan_loading,
    row_bytes,
)
from llm2clip_plugin.data.sources import Source, check_fields, check_kinds, open_source
from llm2clip_plugin.evaluate.config import RetrievalConfig, SuitesConfig
from llm2clip_plugin.outside import without_queries
from llm2clip_plugin.stages.caches import open_caches
from llm2clip_plugin.stages.tower_config import DataConfig
from llm2clip_plugin.train.config import (
    HeadsConfig,
    TrainConfig,
    local_world_size,
)
from llm2clip_plugin.train.distributed import rank, world_size
from llm2clip_plugin.train.frozen_features import BLOCK_IMAGES

if TYPE_CHECKING:
    from llm2clip_plugin.evaluate.in_training import Evaluation


@dataclass(frozen=True)
class TowerData:
    """Opened sources with their caches, checked against each other."""

    config: DataConfig
    sources: list[Source]
    caches: list[EmbeddingCache]
    # with heads.target clip_text: a CLIP's text features of each source's captions
    clip_caches: list[EmbeddingCache]

    @property
    def samples(self) -> int:
        """Training samples of one epoch over all sources: the sum of weight x size."""
        sizes = [len(source) for source in self.sources]
        weights = [source.config.weight for source in self.sources]
        return sum(epoch_draws(sizes, weights))

    @property
    def teacher(self) -> TeacherIdentity:
        """The LLM of the embeddings, the same for all sources."""
        return self.caches[0].teacher

    @property
    def width(self) -> int:
        """Of an embedding."""
        return self.caches[0].width

    @property
    def learned_from(self) -> dict[str, str | int]:
        """What a checkpoint records of the data, in addition to the configuration."""
        captions: list[str] = []  # digests of the shards' keys and captions
        for source, cache in zip(self.sources, self.caches, strict=True):
            for shard in source.shards:
                captions.append(cache.manifest.shards[shard.name]["rows_sha256"])
        facts: dict[str, str | int] = {
            "teacher": self.caches[0].manifest.lasting_fingerprint,
            "samples": self.samples,
            "captions": short_digest(captions),
        }
        if self.clip_caches:
            facts["clip"] = self.clip_caches[0].manifest.lasting_fingerprint
        return facts

    @property
    def pictures(self) -> dict[str, dict[str, str]]:
        """Digests of each source's pictures, which a checkpoint records, too."""
        digests: dict[str, dict[str, str]] = {}
        for number, source in enumerate(self.sources, 1):
            digests[str(number)] = source.picture_digests()
        return digests

    @property
    def digests(self) -> dict[str, str]:
        """What is compared between ranks."""
        digests: dict[str, str] = {}
        for number, source in enumerate(self.sources, 1):
            digests[str(number)] = source_digest(source)
        for number, cache in enumerate(self.caches, 1):
            digests[f"{number}, its cache"] = cache_digest(cache)
        for number, cache in enumerate(self.clip_caches, 1):
            digests[f"{number}, its CLIP cache"] = cache_digest(cache)
        return digests


def open_data(config: DataConfig, *, clip_width: int | None = None) -> TowerData:
    """Open every source and cache; ContractError if caches have different teachers, or one doesn't
    fit its data. ``clip_width``: of the CLIP's text features of the captions, None without them."""
    refuse_urls_without_cache(config)
    sources = [open_source(source) for source in config.sources]
    check_fields(*sources)
    caches = open_caches(sources, config.cache)
    clip_caches: list[EmbeddingCache] = []
    if clip_width is not None:
        clip_caches = open_caches(sources, config.clip_cache, of_clip=True)
    for cache in clip_caches:
        if cache.teacher.pooling != PROJECTED or cache.width != clip_width:
            raise ValueError(
                f"--clip-cache {cache.directory} has features of {cache.teacher.llm}, "
                f"{cache.width} wide; expected the text features of the tower's own CLIP, "
                f"dual.projection_dim {clip_width} wide"
            )
    return TowerData(config, sources, caches, clip_caches)


def refuse_urls_without_cache(config: DataConfig) -> None:
    """Raise ValueError before anything is downloaded."""
    caches = (*(config.cache or ("",) * len(config.path)), config.validation_cache)
    for path, cache in zip((*config.path, config.validation), caches, strict=True):
        if is_url(path) and not cache:
            raise ValueError(
                f"{path} is not a local folder; "
                "set --cache DIR (--validation-cache DIR for --validation)"
            )


def open_evaluation(
    evaluated: RetrievalConfig | None,
    config: DataConfig,
    benchmarks: SuitesConfig,
    teacher: TeacherIdentity,
) -> Evaluation | None:
    """The held-out split, with a cache of the same teacher, and the benchmarks; None for a run that
    evaluates nothing."""
    if evaluated is None:
        return None
    # evaluation, with the LLM that embeds its texts, is imported by such runs alone
    from llm2clip_plugin.evaluate.in_training import Evaluation, open_suites

    split = None
    if config.held_out is not None:
        held_out = open_source(config.held_out)
        (cache,) = open_caches([held_out], (config.validation_cache,), teacher)
        split = (held_out, cache)
    return Evaluation(evaluated, split, open_suites(benchmarks))


def check_data(
    data: TowerData,
    evaluation: Evaluation | None,
    *,
    global_batch: int,
    mask_same_image: bool,
) -> None:
    """Raise ValueError for data on which training or the run's evaluation would fail; warn about
    what is unusual."""
    samples = sum(map(len, data.sources))
    if global_batch > samples:
        paths = ", ".join(data.config.path)
        problem = f"--global-batch {global_batch} is more than the {samples} samples of {paths}"
        if not mask_same_image:
            raise ValueError(
                f"{problem}: samples would be their own negatives, as loss.mask_same_image is off"
            )
        print(
            f"warning: {without_queries(problem)}: a sample comes several times in a batch",
            file=sys.stderr,
        )
    small = [
        f"{source.path} ({len(source)} samples)"
        for source in data.sources
        if len(source) < global_batch
    ]
    if data.config.one_source_per_batch and len(data.sources) > 1 and small:
        problem = f"--global-batch {global_batch} is larger than {', '.join(small)}"
        raise ValueError(
            f"{problem}; lower --global-batch, or mix the sources with --no-one-source-per-batch"
        )
    check_kinds(data.sources, data.config.kind_weights)
    if evaluation is not None:
        evaluation.check(zip(data.sources, data.caches, strict=True))


def with_windows(data: TowerData, *, global_batch: int) -> TowerData:
    """The data in the order of reading that its size decides, which a checkpoint records."""
    shard_sizes = [shard.size for source in data.sources for shard in source.shards]
    batch_shards = global_batch / mean(shard_sizes)
    read = data.config.read
    window = shuffle_window(read.shuffle_window, data.config.path, batch_shards)
    read = dataclasses.replace(read, shuffle_window=window)
    config = dataclasses.replace(data.config, read=read)
    for source, decided in zip(data.sources, config.sources, strict=True):
        source.config = decided
    return dataclasses.replace(data, config=config)


def make_batches(
    data: TowerData, train: TrainConfig, images: ImageConfig, position: int
) -> PairLoader:
    """This rank's rows of the global batches, from sample number ``position`` of the run on."""
    local_batch, micro_batch, _ = train.rows(world_size())
    one_source_batch = 0
    if data.config.one_source_per_batch:
        one_source_batch = train.global_batch
    dataset = PairDataset(
        data.sources,
        data.caches,
        images,
        data.config.augment,
        seed=train.seed,
        caption_weights=data.config.kind_weights,
        captions_per_image=data.config.captions_per_image,
        one_source_batch=one_source_batch,
    )
    return PairLoader(
        dataset,
        local_batch=local_batch,
        micro_batch=micro_batch,
        position=position,
        rank=rank(),
        world=world_size(),
        nodes=max(1, world_size() // local_world_size()),
        workers=train.dataloader_num_workers,
        prefetch_mb=train.dataloader_prefetch_mb,
        max_broken=train.max_broken,
        pin_memory=torch.cuda.is_available(),
    )


def check_loaders(
    data: TowerData,
    images: ImageConfig,
    train: TrainConfig,
    heads: HeadsConfig,
    evaluated: RetrievalConfig | None,
) -> None:
    """Raise ValueError for loader processes that do not fit this machine's shared memory: one that
    writes beyond its end dies of SIGBUS in the middle of the run."""
    problem = lacks_loader_memory(
        train,
        heads,
        evaluated,
        captions_per_image=data.config.captions_per_image,
        side=images.size,
        width=data.width,
        world=world_size(),
    )
    if problem:
        raise ValueError(problem)


def lacks_loader_memory(
    train: TrainConfig,
    heads: HeadsConfig,
    evaluated: RetrievalConfig | None,
    *,
    captions_per_image: int,
    side: int,
    width: int,
    world: int,
) -> str:
    """Why the loader processes of training, and of the evaluation or the heads' fit if the run has
    them, do not fit this machine's shared memory; "" if they do.

    evaluated: None for a run that does not evaluate. side: pixels of an image; width: of an
    embedding; world: ranks.
    """
    rows, micro_batch, _ = train.rows(world)
    training = plan_loading(
        rows=rows,
        micro_batch=micro_batch,
        workers=train.dataloader_num_workers,
        row_bytes=row_bytes(side, width * captions_per_image),
        prefetch_mb=train.dataloader_prefetch_mb,
    )
    plans = [training]
    if evaluated is not None or heads.steps:
        reads = evaluated or RetrievalConfig(workers=train.dataloader_num_workers)
        workers = reads.workers or 0
        if heads.steps:
            workers = max(workers, training.workers)
        plans.append(
            plan_evaluation(max(reads.batch, BLOCK_IMAGES), workers, side, width)
        )
    return lacks_shared_memory(plans, local_world_size())
