"""What a training run measures: its held-out split, and benchmarks; and the pictures that W&B and TensorBoard show.

Shapes: M captions, Q queries.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageOps

from llm2clip_plugin.contracts import ScoreFile, TeacherIdentity
from llm2clip_plugin.data.cache import EmbeddingCache, cache_digest, differences, source_digest
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.samples import BrokenImage, BrokenSample, load, open_header
from llm2clip_plugin.data.sources import Source
from llm2clip_plugin.evaluate import classification as classes
from llm2clip_plugin.evaluate.config import BenchmarksConfig, RetrievalConfig
from llm2clip_plugin.evaluate.opening import ALL, check_measurable
from llm2clip_plugin.evaluate.retrieval import RetrievalReport, embed_pairs, evaluate_retrieval
from llm2clip_plugin.evaluate.suites import Suite, select_suites
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.embed import benchmark_cache_folder, embed_source
from llm2clip_plugin.text.teacher import encoder_config, open_encoder
from llm2clip_plugin.train.distributed import on_first_rank
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.towers import eval_mode

SHOWN = 4  # images of a grid
SIDE, LINE, LINES = 224, 36, 6  # pixels of an image in a grid; letters of a line below it, lines of a caption

Picture = tuple[Image.Image, str]  # and its text


class Benchmark(NamedTuple):
    """``measure(dual, cache of the texts, images=, batch=, workers=)``: by every rank, which all get the scores."""

    name: str
    texts: Source  # whose captions the teacher embeds
    measure: Callable[..., ScoreFile]
    cache: EmbeddingCache | None = None  # of the texts, once they are embedded


def open_benchmarks(config: BenchmarksConfig) -> list[Benchmark]:
    """The benchmarks by name. Raises FileNotFoundError with a line for each missing file, ValueError for others."""
    root, suites = Path(config.root), select_suites(",".join(config.suites))
    if missing := [line for suite in suites for line in suite.missing(root)]:
        raise FileNotFoundError("\n".join(missing))
    found = [Benchmark(s.name, source, partial(_suite, s, source)) for s in suites for source in [s.open(root)]]
    if data := config.zeroshot:
        labeled = classes.open_labeled_images(data)
        names = classes.read_class_names("", data, labeled.classes)
        prompts = classes.prompt_source(names, classes.read_templates("", data), data)
        found.append(Benchmark("zeroshot", prompts, partial(_zeroshot, labeled, names, prompts)))
    return found


def _suite(suite: Suite, source: Source, dual: DualEncoder, cache: EmbeddingCache, **how: Any) -> ScoreFile:
    config = RetrievalConfig(batch=how["batch"], workers=how["workers"])
    pairs = embed_pairs(dual, source, cache, how["images"], config, all_ranks=True, quiet=True)
    return suite.measure(pairs, config, all_ranks=True, device=next(dual.parameters()).device)


def _zeroshot(
    labeled: classes.LabeledImages, names: list[str], prompts: Any, dual: DualEncoder, cache: EmbeddingCache, **how: Any
) -> ScoreFile:
    how |= {"config": how.pop("images"), "device": next(dual.parameters()).device, "all_ranks": True, "quiet": True}
    with eval_mode(dual) as encoders, torch.no_grad():
        class_CD = classes.class_vectors(encoders, prompts, cache, all_ranks=True)
        features = classes.image_features(encoders.encode_image, labeled, **how)
    return classes.classification_scores(features, class_CD, names)


def embed_benchmarks(benchmarks: Sequence[Benchmark], teacher: TeacherIdentity) -> list[Benchmark]:
    """The benchmarks with the caches of their texts; every rank must call this, rank 0 embeds what no cache has. Raises
    FileNotFoundError, ValueError or ContractError if the teacher is not where the training's cache says."""

    def opened(benchmark: Benchmark) -> Benchmark:
        folder = benchmark_cache_folder(benchmark.texts.path, teacher.fingerprint)
        cache = EmbeddingCache.open(folder, expect_fingerprint=teacher.fingerprint)
        cache.check(benchmark.texts)
        return benchmark._replace(cache=cache)

    def embed() -> None:
        encoder = None
        for benchmark in benchmarks:
            try:
                opened(benchmark)
            except (FileNotFoundError, ContractError):  # not there, or not complete
                print(f"embedding the texts of {benchmark.name} once, with {teacher.llm}", flush=True)
                encoder = encoder or open_encoder(encoder_config(teacher, EncoderConfig()))
                if (now := encoder.identity()).fingerprint != teacher.fingerprint:
                    changed = f"{differences(vars(teacher), now)}; restore it there"
                    raise ContractError(f"{teacher.llm} is not the LLM of the training's cache: {changed}") from None
                embed_source(benchmark.texts, encoder, benchmark_cache_folder(benchmark.texts.path, now.fingerprint))

    on_first_rank(embed)
    return list(map(opened, benchmarks))


@dataclass
class Evaluation:
    """Recall on the held-out split, and each benchmark's scores as NAME/SCORE, at each call by all ranks together."""

    config: RetrievalConfig
    held_out: tuple[Source, EmbeddingCache] | None
    benchmarks: Sequence[Benchmark]
    show: Callable[[dict[str, Picture]], None] | None = None  # of a rank that shows pictures

    def check(self, trained: Iterable[tuple[Source, EmbeddingCache]]) -> None:
        """ValueError for a held-out split that cannot be measured so; warn if it has shards that are ``trained``."""
        if self.held_out is None:
            return
        check_measurable(self.held_out[0], self.config, option="--evaluation.")
        own, *others = (
            {cache.manifest.shards[shard.name]["rows_sha256"] for shard in source.shards}
            for source, cache in (self.held_out, *trained)
        )
        if own & set().union(*others):
            seen = f"--validation {self.held_out[0].path} has shards of the training data"
            fix = "its scores say nothing about new images; hold some out with `llm2clip data split`"
            print(f"warning: {seen}, so {fix}", file=sys.stderr)

    def embed(self, teacher: TeacherIdentity) -> None:
        self.benchmarks = embed_benchmarks(self.benchmarks, teacher)

    @property
    def digests(self) -> dict[str, str]:
        """What is compared between ranks."""
        own = {f"of {benchmark.name}": source_digest(benchmark.texts) for benchmark in self.benchmarks}
        if self.held_out is not None:
            source, cache = self.held_out
            own |= {"validation": source_digest(source), "validation, its cache": cache_digest(cache)}
        return own

    def __call__(self, dual: DualEncoder, images: ImageConfig) -> dict[str, float]:
        scores: dict[str, float] = {}
        how = {"images": images, "batch": self.config.batch, "workers": self.config.workers or 0}
        # a graph for each suite's last batch would exhaust what torch.compile makes, and training would get none
        with torch.compiler.set_stance("eager_on_recompile"):
            if self.held_out is not None:
                options = {"all_ranks": True, "quiet": True}
                report = evaluate_retrieval(dual, *self.held_out, images, self.config, **options)
                if self.show is not None:
                    self.show(draw_retrievals(report, self.held_out[0]))
                scores |= report.metrics()
            for benchmark in self.benchmarks:
                metrics = benchmark.measure(dual, benchmark.cache, **how).metrics
                scores |= {f"{benchmark.name}/{name}": value for name, value in metrics.items() if "/" not in name}
        return scores


def draw_retrievals(report: RetrievalReport, source: Source) -> dict[str, Picture]:
    """``eval/best`` and ``eval/worst``: grids of the images whose caption is ranked first, or last, each with its first
    caption and the nearest of all; images of equal rank by the cosine of the two."""
    pairs, (ranks, index_Q) = report.pairs, report.parts[ALL].sides["i2t"]
    own_Q = torch.searchsorted(pairs.owner_M, index_Q)
    cosine_Q = (pairs.image_ND[index_Q] * pairs.text_MD[own_Q]).sum(1)
    columns = (ranks.higher_Q, -cosine_Q, index_Q, own_Q)
    order = sorted(zip(*(column.tolist() for column in columns), strict=True))
    grids = {}
    for name, some in (("best", order[:SHOWN]), ("worst", order[: SHOWN - 1 : -1][:SHOWN])):
        grid, texts = Image.new("RGB", (SIDE * len(some), 2 * SIDE), "white"), []
        for left, (higher, _, image, own) in zip(range(0, grid.width, SIDE), some, strict=True):
            first = pairs.captions[int((pairs.text_MD @ pairs.image_ND[image]).argmax())].text
            texts.append(f"place {higher + 1}: {pairs.captions[own].text}\nfirst: {first}")
            with suppress(BrokenSample, BrokenImage):
                picture = load(open_header(source[pairs.numbers[image]].read_image()))
                grid.paste(ImageOps.contain(picture, (SIDE, SIDE)), (left, 0))
            lines = [line for part in texts[-1].split("\n") for line in textwrap.wrap(part, LINE)[:LINES]]
            ImageDraw.Draw(grid).multiline_text((left + 4, SIDE + 4), "\n".join(lines), "black")
        if some:
            grids[f"eval/{name}"] = grid, "\n".join(texts)
    return grids
