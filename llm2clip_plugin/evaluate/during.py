"""What a training run measures: its held-out split, and benchmarks; and the pictures that W&B and TensorBoard show.

Shapes: M captions, Q queries.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from llm2clip_plugin.contracts import ScoreFile, TeacherIdentity
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.samples import BrokenSample
from llm2clip_plugin.data.sources import Source
from llm2clip_plugin.evaluate import classification
from llm2clip_plugin.evaluate.config import BenchmarksConfig, RetrievalConfig
from llm2clip_plugin.evaluate.opening import ALL
from llm2clip_plugin.evaluate.retrieval import RetrievalReport, embed_pairs, evaluate_retrieval
from llm2clip_plugin.evaluate.suites import Suite, select_suites
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.text.embed import default_cache_folder, embed_source
from llm2clip_plugin.text.teacher import TeacherLLM
from llm2clip_plugin.train.distributed import on_first_rank
from llm2clip_plugin.vision.dual import DualEncoder

SHOWN = 4  # images of a grid
SIDE, LINE, LINES = 224, 36, 6  # pixels of an image in a grid; letters of a line below it, lines of a caption

Measure = Callable[[DualEncoder, EmbeddingCache, ImageConfig, RetrievalConfig], ScoreFile]
Picture = tuple[Image.Image, str]  # a grid, and its text


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that is measured during training; ``measure`` is called by every rank, and gives all the scores."""

    name: str
    texts: Source  # whose captions the teacher embeds
    measure: Measure


def open_benchmarks(config: BenchmarksConfig) -> list[Benchmark]:
    """The benchmarks by name. Raises FileNotFoundError with a line for each missing file, ValueError for others."""
    root, suites = Path(config.root), select_suites(",".join(config.suites))
    if missing := [line for suite in suites for line in suite.missing(root)]:
        raise FileNotFoundError("\n".join(missing))
    opened = [(suite, suite.open(root)) for suite in suites]
    found = [Benchmark(suite.name, source, partial(_measure, suite, source)) for suite, source in opened]
    if config.zeroshot:
        images, names, prompts = classification.open_zeroshot(config.zeroshot)
        classify = partial(classification.classify, images, names, prompts, all_ranks=True, quiet=True)
        found.append(Benchmark("zeroshot", prompts, classify))
    return found


def _measure(
    suite: Suite, source: Source, dual: DualEncoder, cache: EmbeddingCache, images: ImageConfig, config: RetrievalConfig
) -> ScoreFile:
    pairs = embed_pairs(dual, source, cache, images, config, all_ranks=True, quiet=True)
    return suite.measure(pairs, config, all_ranks=True, device=next(dual.parameters()).device)


def embed_benchmarks(benchmarks: Sequence[Benchmark], teacher: TeacherIdentity) -> list[EmbeddingCache]:
    """The cache of each benchmark's texts, in its folder; rank 0 embeds what no cache has, with the teacher's LLM.

    Every rank must call this. Raises FileNotFoundError or ValueError if the LLM or its adapter is not where the
    training's cache says.
    """

    def cache_of(benchmark: Benchmark) -> EmbeddingCache:
        folder = default_cache_folder(benchmark.texts.path, teacher.fingerprint)
        cache = EmbeddingCache.open(folder, expect_fingerprint=teacher.fingerprint)
        cache.check(benchmark.texts)
        return cache

    def embed() -> None:
        lacking = list(benchmarks)
        for benchmark in benchmarks:
            with suppress(FileNotFoundError, ContractError):  # not there, or not complete
                cache_of(benchmark)
                lacking.remove(benchmark)
        if lacking:
            names = ", ".join(one.name for one in lacking)
            print(f"embedding the texts of {names} once, with {teacher.llm}", flush=True)
            encoder = TeacherLLM(teacher).encoder
            for one in lacking:
                embed_source(one.texts, encoder, default_cache_folder(one.texts.path, teacher.fingerprint))

    on_first_rank(embed)
    return [cache_of(benchmark) for benchmark in benchmarks]


@dataclass
class Evaluation:
    """One evaluation at each call, by all ranks together: recall on the held-out split, and each benchmark's scores.

    Of a benchmark NAME the scores ``NAME/i2t_r1`` ..., without those of its languages.
    """

    dual: DualEncoder
    images: ImageConfig
    config: RetrievalConfig
    held_out: tuple[Source, EmbeddingCache] | None
    benchmarks: Sequence[tuple[Benchmark, EmbeddingCache]]
    draw: bool = False  # whether this rank makes pictures
    pictures: dict[str, Picture] = field(default_factory=dict, init=False)  # of the last call

    def __call__(self) -> dict[str, float]:
        scores: dict[str, float] = {}
        if self.held_out is not None:
            report = evaluate_retrieval(self.dual, *self.held_out, self.images, self.config, all_ranks=True, quiet=True)
            self.pictures = draw_retrievals(report, self.held_out[0]) if self.draw else {}
            scores |= report.metrics()
        own = RetrievalConfig(batch=self.config.batch, workers=self.config.workers)
        for benchmark, cache in self.benchmarks:
            metrics = benchmark.measure(self.dual, cache, self.images, own).metrics
            scores |= {f"{benchmark.name}/{name}": value for name, value in metrics.items() if "/" not in name}
        return scores


def draw_retrievals(report: RetrievalReport, source: Source) -> dict[str, Picture]:
    """``best`` and ``worst``: grids of the images whose own caption is ranked first, or last, with that caption and the
    nearest of all; images of equal rank by the cosine to their own."""
    pairs, (ranks, index_Q), own = report.pairs, report.parts[ALL].sides["i2t"], dict[int, int]()
    cosine_M = (pairs.image_ND[pairs.owner_M] * pairs.text_MD).sum(1)
    for caption in cosine_M.argsort().tolist():
        own[int(pairs.owner_M[caption])] = caption  # the nearest one stays
    places = zip(ranks.higher_Q.tolist(), index_Q.tolist(), strict=True)
    order = sorted((higher, -float(cosine_M[own[image]]), image) for higher, image in places)
    grids = {}
    for name, some in (("best", order[:SHOWN]), ("worst", order[: SHOWN - 1 : -1][:SHOWN])):
        tiles = []
        for higher, _, image in some:
            first = pairs.captions[int((pairs.text_MD @ pairs.image_ND[image]).argmax())].text
            text = f"place {higher + 1}: {pairs.captions[own[image]].text}\nfirst: {first}"
            with suppress(BrokenSample):  # it was read a moment ago
                tiles.append((Image.open(BytesIO(source[pairs.numbers[image]].read_image())).convert("RGB"), text))
        if tiles:
            grids[name] = draw_grid(tiles), "\n".join(text for _, text in tiles)
    return grids


def draw_grid(tiles: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Pictures in a row, each with its text below."""
    grid, font = Image.new("RGB", (SIDE * len(tiles), 2 * SIDE), "white"), ImageFont.load_default()
    for number, (picture, text) in enumerate(tiles):
        grid.paste(ImageOps.contain(picture, (SIDE, SIDE)), (SIDE * number, 0))
        lines = [line for part in text.split("\n") for line in textwrap.wrap(part, LINE)[:LINES]]
        ImageDraw.Draw(grid).multiline_text((SIDE * number + 4, SIDE + 4), "\n".join(lines), "black", font)
    return grid
