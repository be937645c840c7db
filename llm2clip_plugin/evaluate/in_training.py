"""What a training run measures: its held-out split, retrieval suites, zero-shot classification.

Shapes: C classes, D projection dimension.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llm2clip_plugin.contracts import ScoreFile, TeacherIdentity
from llm2clip_plugin.data.cache import (
    EmbeddingCache,
    cache_digest,
    differences,
    short_digest,
    source_digest,
)
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.sources import Source
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.evaluate.config import RetrievalConfig, SuitesConfig
from llm2clip_plugin.evaluate.features import embed_pairs
from llm2clip_plugin.evaluate.grids import Picture, draw_retrievals
from llm2clip_plugin.evaluate.labeled_images import (
    LabeledImages,
    image_features,
    open_labeled_images,
)
from llm2clip_plugin.evaluate.retrieval import check_measurable, evaluate_retrieval
from llm2clip_plugin.evaluate.suites import Suite, select_suites
from llm2clip_plugin.evaluate.zeroshot import (
    class_vectors,
    classification_scores,
    prompt_source,
    read_class_names,
    read_templates,
)
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.embed import embed_source, suite_cache_folder
from llm2clip_plugin.text.encoder import TextEncoder
from llm2clip_plugin.text.teacher import encoder_config, open_encoder
from llm2clip_plugin.train.distributed import on_first_rank
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.parts import eval_mode


class MeasuredSuite(NamedTuple):
    """``measure(dual, cache of the texts, images=, batch=, workers=)``: by every rank, which all
    get the scores. Zero-shot classification is one too."""

    name: str
    texts: Source  # whose captions the teacher embeds
    measure: Callable[..., ScoreFile]
    cache: EmbeddingCache | None = None  # of the texts, once they are embedded


def open_suites(config: SuitesConfig) -> list[MeasuredSuite]:
    """The suites by name. Raises FileNotFoundError with a line for each missing file, ValueError
    for others."""
    root = Path(config.root)
    selected = select_suites(",".join(config.suites))
    missing: list[str] = []
    for suite in selected:
        missing += suite.missing(root)
    if missing:
        raise FileNotFoundError("\n".join(missing))
    suites: list[MeasuredSuite] = []
    for suite in selected:
        source = suite.open(root)
        suites.append(MeasuredSuite(suite.name, source, partial(_suite, suite, source)))
    if config.zeroshot:
        suites.append(_open_zeroshot(config.zeroshot))
    return suites


def _open_zeroshot(data: str) -> MeasuredSuite:
    labeled = open_labeled_images(data)
    names = read_class_names("", data, labeled.classes)
    prompts = prompt_source(names, read_templates("", data), data)
    return MeasuredSuite(
        "zeroshot", prompts, partial(_zeroshot, labeled, names, prompts)
    )


def _suite(
    suite: Suite, source: Source, dual: DualEncoder, cache: EmbeddingCache, **how: Any
) -> ScoreFile:
    config = RetrievalConfig(batch=how["batch"], workers=how["workers"])
    pairs = embed_pairs(
        dual, source, cache, how["images"], config, all_ranks=True, quiet=True
    )
    return suite.measure(
        pairs, config, all_ranks=True, device=next(dual.parameters()).device
    )


def _zeroshot(
    labeled: LabeledImages,
    names: list[str],
    prompts: Any,
    dual: DualEncoder,
    cache: EmbeddingCache,
    *,
    images: ImageConfig,
    batch: int,
    workers: int,
) -> ScoreFile:
    with eval_mode(dual) as encoders, torch.no_grad():
        class_CD = class_vectors(encoders, prompts, cache, all_ranks=True)
        features = image_features(
            encoders.encode_image,
            labeled,
            images,
            next(dual.parameters()).device,
            batch=batch,
            workers=workers,
            all_ranks=True,
            quiet=True,
        )
    return classification_scores(features, class_CD, names)


def embed_suites(
    suites: Sequence[MeasuredSuite], teacher: TeacherIdentity
) -> list[MeasuredSuite]:
    """The suites with the caches of their texts; every rank must call this, rank 0 embeds what no
    cache has. Raises FileNotFoundError, ValueError or ContractError if the teacher is not where the
    training's cache says."""

    def opened(suite: MeasuredSuite) -> MeasuredSuite:
        folder = suite_cache_folder(suite.texts.path, teacher)
        cache = EmbeddingCache.open(folder, expect_fingerprint=teacher.fingerprint)
        cache.check(suite.texts)
        return suite._replace(cache=cache)

    def embed() -> None:
        encoder = None
        for suite in suites:
            try:
                opened(suite)
            except (FileNotFoundError, ContractError):  # not there, or not complete
                print(
                    f"embedding the texts of {suite.name} once, with {teacher.llm}",
                    flush=True,
                )
                if encoder is None:
                    encoder = _same_teacher(teacher)
                folder = suite_cache_folder(suite.texts.path, teacher)
                embed_source(suite.texts, encoder, folder)

    on_first_rank(embed)
    return [opened(suite) for suite in suites]


def _same_teacher(teacher: TeacherIdentity) -> TextEncoder:
    """The teacher of a training's cache, opened where the cache says; ContractError if it is
    another by now."""
    encoder = open_encoder(encoder_config(teacher, EncoderConfig()))
    identity = encoder.identity()
    if not teacher.agrees_with(identity):
        changed = f"{differences(vars(teacher), identity)}; restore it there"
        raise ContractError(
            f"{teacher.llm} is not the LLM of the training's cache: {changed}"
        ) from None
    return encoder


@dataclass
class Evaluation:
    """Recall on the held-out split, and each suite's scores as NAME/SCORE, at each call by all
    ranks together."""

    config: RetrievalConfig
    held_out: tuple[Source, EmbeddingCache] | None
    suites: Sequence[MeasuredSuite]

    def check(self, trained: Iterable[tuple[Source, EmbeddingCache]]) -> None:
        """ValueError for a held-out split that cannot be measured so; warn if it has shards that
        are ``trained``."""
        if self.held_out is None:
            return
        check_measurable(self.held_out[0], self.config, option="--evaluation.")
        validation = _shard_hashes(*self.held_out)
        training: set[str] = set()
        for source, cache in trained:
            training |= _shard_hashes(source, cache)
        if validation & training:
            problem = (
                f"--validation {self.held_out[0].path} has shards of the training data, "
                "so its scores say nothing about new images"
            )
            advice = "hold some out with `llm2clip data split`"
            print(f"warning: {problem}; {advice}", file=sys.stderr)

    def embed(self, teacher: TeacherIdentity) -> None:
        self.suites = embed_suites(self.suites, teacher)

    @property
    def measured(self) -> str:
        """A digest of what is measured, and how: scores of equal ones can be compared."""
        how = dataclasses.replace(self.config, batch=0, workers=0)
        held_out: list[str] = []
        if self.held_out is not None:
            source, cache = self.held_out
            for shard in source.shards:
                held_out.append(cache.manifest.shards[shard.name]["rows_sha256"])
        texts = [[suite.name, source_digest(suite.texts)] for suite in self.suites]
        return short_digest([dataclasses.asdict(how), held_out, texts])

    @property
    def digests(self) -> dict[str, str]:
        """What is compared between ranks."""
        digests = {
            f"of {suite.name}": source_digest(suite.texts) for suite in self.suites
        }
        if self.held_out is not None:
            source, cache = self.held_out
            digests["validation"] = source_digest(source)
            digests["validation, its cache"] = cache_digest(cache)
        return digests

    def __call__(
        self,
        dual: DualEncoder,
        images: ImageConfig,
        show: Callable[[dict[str, Picture]], object] | None = None,
    ) -> dict[str, float]:
        """``show``: of a rank that shows pictures of what the held-out captions find."""
        scores: dict[str, float] = {}
        how = {
            "images": images,
            "batch": self.config.batch,
            "workers": self.config.workers or 0,
        }
        # a graph for each suite's last batch would exhaust what torch.compile makes, and training
        # would get none
        with torch.compiler.set_stance("eager_on_recompile"):
            if self.held_out is not None:
                options = {"all_ranks": True, "quiet": True}
                report = evaluate_retrieval(
                    dual, *self.held_out, images, self.config, **options
                )
                if show is not None:
                    show(draw_retrievals(report, self.held_out[0]))
                scores |= report.metrics()
            for suite in self.suites:
                metrics = suite.measure(dual, suite.cache, **how).metrics
                for name, value in metrics.items():
                    if "/" not in name:
                        scores[f"{suite.name}/{name}"] = value
        return scores


def _shard_hashes(source: Source, cache: EmbeddingCache) -> set[str]:
    """Of the rows of each shard, which are equal for equal data."""
    return {cache.manifest.shards[shard.name]["rows_sha256"] for shard in source.shards}
