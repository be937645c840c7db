"""Benchmarks, and what a training run measures: its held-out split, suites, zero-shot
classification; and the pictures that W&B and TensorBoard show.

Shapes: N images, M captions, Q queries, C classes, P prompts of a class, D width of a feature.
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
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from llm2clip_plugin.contracts import ScoreFile, TeacherIdentity
from llm2clip_plugin.data.cache import EmbeddingCache, cache_digest, differences, source_digest
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.samples import BrokenImage, BrokenSample, Caption, load, open_header
from llm2clip_plugin.data.sources import Source, SourceConfig, open_source, scan_tar, split_name
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.evaluate.config import BenchmarksConfig, RetrievalConfig
from llm2clip_plugin.evaluate.retrieval import (
    ALL,
    Dual,
    EmbeddedPairs,
    RetrievalReport,
    check_measurable,
    embed_pairs,
    encode_images,
    encode_texts,
    evaluate_retrieval,
    json_field,
    rank_both,
)
from llm2clip_plugin.evaluate.suites import (
    IMAGE_ENDINGS,
    InMemorySource,
    Row,
    Suite,
    image_files,
    select_suites,
)
from llm2clip_plugin.hashes import canonical_json, sha256_text
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.teacher import (
    benchmark_cache_folder,
    embed_source,
    encoder_config,
    open_encoder,
)
from llm2clip_plugin.train.distributed import on_first_rank
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.towers import eval_mode

SHOWN = 4  # images of a grid
# pixels of an image in a grid; letters of a line below it, lines of a caption
SIDE = 224
LINE = 36
LINES = 6

Picture = tuple[Image.Image, str]  # and its text


class Benchmark(NamedTuple):
    """``measure(dual, cache of the texts, images=, batch=, workers=)``: by every rank, which all
    get the scores."""

    name: str
    texts: Source  # whose captions the teacher embeds
    measure: Callable[..., ScoreFile]
    cache: EmbeddingCache | None = None  # of the texts, once they are embedded


def open_benchmarks(config: BenchmarksConfig) -> list[Benchmark]:
    """The benchmarks by name. Raises FileNotFoundError with a line for each missing file,
    ValueError for others."""
    root = Path(config.root)
    suites = select_suites(",".join(config.suites))
    if missing := [line for suite in suites for line in suite.missing(root)]:
        raise FileNotFoundError("\n".join(missing))
    benchmarks: list[Benchmark] = []
    for suite in suites:
        source = suite.open(root)
        benchmarks.append(Benchmark(suite.name, source, partial(_suite, suite, source)))
    if data := config.zeroshot:
        labeled = open_labeled_images(data)
        names = read_class_names("", data, labeled.classes)
        prompts = prompt_source(names, read_templates("", data), data)
        measure = partial(_zeroshot, labeled, names, prompts)
        benchmarks.append(Benchmark("zeroshot", prompts, measure))
    return benchmarks


def _suite(
    suite: Suite, source: Source, dual: DualEncoder, cache: EmbeddingCache, **how: Any
) -> ScoreFile:
    config = RetrievalConfig(batch=how["batch"], workers=how["workers"])
    pairs = embed_pairs(dual, source, cache, how["images"], config, all_ranks=True, quiet=True)
    return suite.measure(pairs, config, all_ranks=True, device=next(dual.parameters()).device)


def _zeroshot(
    labeled: LabeledImages,
    names: list[str],
    prompts: Any,
    dual: DualEncoder,
    cache: EmbeddingCache,
    **how: Any,
) -> ScoreFile:
    how |= {
        "config": how.pop("images"),
        "device": next(dual.parameters()).device,
        "all_ranks": True,
        "quiet": True,
    }
    with eval_mode(dual) as encoders, torch.no_grad():
        class_CD = class_vectors(encoders, prompts, cache, all_ranks=True)
        features = image_features(encoders.encode_image, labeled, **how)
    return classification_scores(features, class_CD, names)


def embed_benchmarks(benchmarks: Sequence[Benchmark], teacher: TeacherIdentity) -> list[Benchmark]:
    """The benchmarks with the caches of their texts; every rank must call this, rank 0 embeds what
    no cache has. Raises FileNotFoundError, ValueError or ContractError if the teacher is not where
    the training's cache says."""

    def opened(benchmark: Benchmark) -> Benchmark:
        folder = benchmark_cache_folder(benchmark.texts.path, teacher)
        cache = EmbeddingCache.open(folder, expect_fingerprint=teacher.fingerprint)
        cache.check(benchmark.texts)
        return benchmark._replace(cache=cache)

    def embed() -> None:
        encoder = None
        for benchmark in benchmarks:
            try:
                opened(benchmark)
            except (FileNotFoundError, ContractError):  # not there, or not complete
                print(
                    f"embedding the texts of {benchmark.name} once, with {teacher.llm}", flush=True
                )
                encoder = encoder or open_encoder(encoder_config(teacher, EncoderConfig()))
                if not teacher.agrees_with(now := encoder.identity()):
                    changed = f"{differences(vars(teacher), now)}; restore it there"
                    raise ContractError(
                        f"{teacher.llm} is not the LLM of the training's cache: {changed}"
                    ) from None
                embed_source(
                    benchmark.texts, encoder, benchmark_cache_folder(benchmark.texts.path, teacher)
                )

    on_first_rank(embed)
    return list(map(opened, benchmarks))


@dataclass
class Evaluation:
    """Recall on the held-out split, and each benchmark's scores as NAME/SCORE, at each call by all
    ranks together."""

    config: RetrievalConfig
    held_out: tuple[Source, EmbeddingCache] | None
    benchmarks: Sequence[Benchmark]

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
        self.benchmarks = embed_benchmarks(self.benchmarks, teacher)

    @property
    def digests(self) -> dict[str, str]:
        """What is compared between ranks."""
        digests = {
            f"of {benchmark.name}": source_digest(benchmark.texts) for benchmark in self.benchmarks
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
        how = {"images": images, "batch": self.config.batch, "workers": self.config.workers or 0}
        # a graph for each suite's last batch would exhaust what torch.compile makes, and training
        # would get none
        with torch.compiler.set_stance("eager_on_recompile"):
            if self.held_out is not None:
                options = {"all_ranks": True, "quiet": True}
                report = evaluate_retrieval(dual, *self.held_out, images, self.config, **options)
                if show is not None:
                    show(draw_retrievals(report, self.held_out[0]))
                scores |= report.metrics()
            for benchmark in self.benchmarks:
                metrics = benchmark.measure(dual, benchmark.cache, **how).metrics
                for name, value in metrics.items():
                    if "/" not in name:
                        scores[f"{benchmark.name}/{name}"] = value
        return scores


def draw_retrievals(report: RetrievalReport, source: Source) -> dict[str, Picture]:
    """``eval/best`` and ``eval/worst``: grids of the images whose caption is ranked first, or last,
    each with its first caption and the nearest of all; images of equal rank by the cosine of the
    two."""
    pairs = report.pairs
    ranks, image_Q = report.parts[ALL].sides["i2t"]
    caption_Q = torch.searchsorted(pairs.owner_M, image_Q)  # each image's first
    cosine_Q = (pairs.image_ND[image_Q] * pairs.text_MD[caption_Q]).sum(1)
    columns = (ranks.higher_Q, -cosine_Q, image_Q, caption_Q)
    queries = sorted(zip(*(column.tolist() for column in columns), strict=True))
    worst_first = queries[SHOWN:][::-1]
    grids: dict[str, Picture] = {}
    for name, selected in (("best", queries[:SHOWN]), ("worst", worst_first[:SHOWN])):
        if selected:
            places = [(image, caption, higher + 1) for higher, _, image, caption in selected]
            grids[f"eval/{name}"] = _draw_grid(report.pairs, source, places)
    return grids


def _draw_grid(
    pairs: EmbeddedPairs, source: Source, queries: Sequence[tuple[int, int, int]]
) -> Picture:
    """Images side by side, each above its text. A query: image, its caption, and that one's
    place."""
    grid = Image.new("RGB", (SIDE * len(queries), 2 * SIDE), "white")
    texts: list[str] = []
    for column, (image, caption, rank) in enumerate(queries):
        left = column * SIDE
        nearest = int((pairs.text_MD @ pairs.image_ND[image]).argmax())
        caption_line = f"place {rank}: {pairs.captions[caption].text}"
        texts.append(f"{caption_line}\nfirst: {pairs.captions[nearest].text}")
        with suppress(BrokenSample, BrokenImage):
            picture = load(open_header(source[pairs.numbers[image]].read_image()))
            grid.paste(ImageOps.contain(picture, (SIDE, SIDE)), (left, 0))
        lines: list[str] = []
        for part in texts[-1].split("\n"):
            lines += textwrap.wrap(part, LINE)[:LINES]
        ImageDraw.Draw(grid).multiline_text((left + 4, SIDE + 4), "\n".join(lines), "black")
    return grid, "\n".join(texts)


def _shard_hashes(source: Source, cache: EmbeddingCache) -> set[str]:
    """Of the rows of each shard, which are equal for equal data."""
    return {cache.manifest.shards[shard.name]["rows_sha256"] for shard in source.shards}


# Zero-shot classification: labeled images, and prompts by the names of their classes.

CLASS = "class"  # field of an image's JSON where the data has none
NAME_FILE = "classnames.txt"
TEMPLATE_FILE = "zeroshot_classification_templates.txt"
CLASSES = 100  # embedded at once: with 80 prompts 4096 wide 131 MB
NOT_A_CLASS = (".", "embeddings-", "forecast-")  # prefixes of other folders: hidden ones, caches


@dataclass(frozen=True)
class LabeledImages:
    """Images whose JSON names their class."""

    source: Source
    # the data's own names: folders, values of the field, or the numbers in .cls members
    classes: list[str]
    field: str = CLASS  # of the JSON: the class
    # of the JSON: images with the same value are resampled and held out together; "": each by
    # itself
    cluster: str = ""


def open_labeled_images(path: str, field: str = "", cluster: str = "") -> LabeledImages:
    """The labeled images at ``path``: with ``field`` a captioned data source, else tars with .cls
    or class folders.

    ``field`` and ``cluster`` are fields of each sample's JSON. FileNotFoundError, or ValueError for
    another layout.
    """
    if not field:
        root = Path(path)
        has_tars = root.is_file() or any(root.rglob("*.tar"))
        return _of_tars(root) if has_tars else _of_folders(root)
    source = open_source(SourceConfig(path=path))
    classes: set[str] = set()
    # before the work: every sample has the fields
    for record in map(source.record, range(len(source))):
        classes.add(str(json_field(record.meta, field, record.key)))
        if cluster:
            json_field(record.meta, cluster, record.key)
    return LabeledImages(source, sorted(classes), field, cluster)


def _of_folders(path: Path) -> LabeledImages:
    """``CLASS/**/IMAGE.jpg``: classes in alphabetical order."""
    folders = [
        entry
        for entry in sorted(path.iterdir())
        if entry.is_dir() and not entry.name.startswith(NOT_A_CLASS)
    ]
    if not folders:
        raise ValueError(
            f"{path} has no class folders and no tars with .cls; captioned data need --label FIELD"
        )
    rows = [
        Row(str(file.relative_to(path)), file, meta={CLASS: folder.name})
        for folder in folders
        for file in image_files(folder)
    ]
    return LabeledImages(InMemorySource(str(path), path, rows), [folder.name for folder in folders])


def _of_tars(path: Path) -> LabeledImages:
    """Tars of ``KEY.jpg`` (png, webp) with ``KEY.cls``, the class index."""
    rows = []
    for tar in [path] if path.is_file() else sorted(path.rglob("*.tar")):
        parts: dict[str, dict[str, Callable[[], bytes]]] = {}
        for member in scan_tar(tar):
            key, ending = split_name(member.name)
            part = "image" if ending in IMAGE_ENDINGS else ending
            parts.setdefault(key, {})[part] = partial(_read, tar, member.offset_data, member.size)
        for key, of_key in parts.items():
            if "image" in of_key:
                with errors_about(f"{tar}: {key}.cls", fix="expected a class index (0, 1, ...)"):
                    rows.append(
                        Row(
                            f"{tar.stem}/{key}", of_key["image"], meta={CLASS: int(of_key["cls"]())}
                        )
                    )
    count = 1 + max((row.meta[CLASS] for row in rows), default=0)
    return LabeledImages(InMemorySource(str(path), path, rows), list(map(str, range(count))))


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


@dataclass(frozen=True, kw_only=True)
class ImageFeatures:
    """Features of the readable images, in order."""

    feature_ND: Tensor  # float32, on the CPU
    label_N: Tensor  # int64
    keys: list[str]
    clusters: list[str]
    broken: list[BrokenSample]

    def scores(
        self, hits: dict[str, Tensor], names: Sequence[str], means: dict[str, str], **counts: int
    ) -> ScoreFile:
        """The mean of each of ``hits``, and the mean over classes of those in ``means`` (hits ->
        name of the metric).

        An item's score is its first hit, and its ``part`` the name of its class.
        """
        hits = {name: hit_N.double() for name, hit_N in hits.items()}
        metrics = {name: float(hit_N.mean()) for name, hit_N in hits.items()}
        labels = torch.unique(self.label_N)
        for name, metric in means.items():
            metrics[metric] = float(
                torch.stack([hits[name][self.label_N == label].mean() for label in labels]).mean()
            )
        labeled = zip(self.keys, self.clusters, self.label_N.tolist(), strict=True)
        items: list[dict[str, Any]] = [
            {"id": key, "cluster": cluster, "part": names[n]} for key, cluster, n in labeled
        ]
        for item, *of_item in zip(items, *(hit_N.tolist() for hit_N in hits.values()), strict=True):
            item |= {"score": of_item[0], **dict(zip(hits, of_item, strict=True))}
        return ScoreFile(
            benchmark="",
            metrics=metrics,
            items=items,
            counts={"images": len(items), "left_out": len(self.broken), **counts},
            notes=[f"left out: {error}" for error in self.broken],
        )


def image_features(
    encode: Callable[..., Tensor],
    images: LabeledImages,
    config: ImageConfig,
    device: torch.device,
    **options: Any,
) -> ImageFeatures:
    """Labeled images through ``encode``, with ``options`` of `encode_images`. ValueError if no
    image is readable."""
    encoded = encode_images(encode, images.source, config, device, **options)
    number_of = {name: number for number, name in enumerate(images.classes)}
    return ImageFeatures(
        feature_ND=encoded.joined(),
        label_N=torch.tensor([number_of[str(meta[images.field])] for meta in encoded.meta]),
        keys=encoded.keys,
        clusters=[
            str(meta.get(images.cluster, key))
            for key, meta in zip(encoded.keys, encoded.meta, strict=True)
        ],
        broken=encoded.broken,
    )


def classification_scores(
    features: ImageFeatures, class_CD: Tensor, names: Sequence[str]
) -> ScoreFile:
    """acc1, acc5 (with five classes or more) and mean_per_class_recall; classes of equal score
    split the credit."""
    image_ND = F.normalize(features.feature_ND, dim=1)
    ranks, _ = rank_both(image_ND, class_CD, features.label_N, torch.arange(len(class_CD)))
    hits = {f"acc{k}": ranks.hits(k) for k in (1, 5) if k <= len(class_CD)}
    return features.scores(hits, names, {"acc1": "mean_per_class_recall"}, classes=len(class_CD))


def read_class_names(path: str, data: str, classes: list[str]) -> list[str]:
    """A name for each class: from ``path``, else ``classnames.txt`` next to or above the data, else
    ``classes``.

    The file has one name per line in the order of the classes, or ``CLASS<TAB>NAME``. Raises
    FileNotFoundError without the file ``path``, ValueError if a class has no name or the numbers
    differ.
    """
    file, names = _read_lines(path, data, NAME_FILE)
    if names is None:
        return [name.replace("_", " ") for name in classes]
    if all("\t" in name for name in names):
        name_of = dict(name.split("\t", 1) for name in names)
        if missing := [name for name in classes if name not in name_of]:
            count = f"{len(missing)} of {len(classes)} missing"
            raise ValueError(f"{file} has no name for class {missing[0]!r} ({count})")
        return [name_of[name] for name in classes]
    numbered = classes == [str(number) for number in range(len(classes))]
    # a split may be missing classes
    if len(names) != len(classes) and not (numbered and len(names) > len(classes)):
        raise ValueError(
            f"{file} has {len(names)} class names, but the data has {len(classes)} classes"
        )
    return names


def read_templates(path: str, data: str) -> list[str]:
    """Prompt templates: from ``path``, else TEMPLATE_FILE next to or above the data, else one plain
    template.

    ``{c}`` or ``{}`` in a template stands for the class. Raises FileNotFoundError or ValueError.
    """
    file, lines = _read_lines(path, data, TEMPLATE_FILE)
    if invalid := [line for line in lines or () if "{c}" not in line and "{}" not in line]:
        raise ValueError(
            f"{file}: template {invalid[0]!r} does not contain {{c}}, "
            "the placeholder for the class name"
        )
    return lines or ["a photo of a {c}."]


def _read_lines(path: str, data: str, name: str) -> tuple[Path, list[str] | None]:
    """The file ``path``, else ``name`` in the data's folder or its parent, and its lines that are
    not blank."""
    folder = _data_folder(data)
    if path:
        file = Path(path)
    else:
        candidates = (folder / name, folder.parent / name)
        file = next(filter(Path.is_file, candidates), None)
        if file is None:
            return folder, None
    return file, [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]


def _data_folder(data: str) -> Path:
    return Path(data) if Path(data).is_dir() else Path(data).parent


def prompt_source(names: Sequence[str], templates: Sequence[str], data: str) -> InMemorySource:
    """A data source without images: a class is a sample, its prompts are the captions; named by the
    prompts' hash."""
    prompts: list[list[str]] = []
    rows: list[Row] = []
    for number, name in enumerate(names):
        texts = [template.replace("{c}", name).replace("{}", name) for template in templates]
        prompts.append(texts)
        captions = tuple(Caption(text, "prompt") for text in texts)
        rows.append(Row(f"{number:05d}", None, captions))
    digest = sha256_text(canonical_json(prompts))[:12]
    return InMemorySource(f"prompts-{digest}", _data_folder(data), rows)


@torch.no_grad()
def class_vectors(
    dual: Dual, prompts: InMemorySource, cache: EmbeddingCache, all_ranks: bool = False
) -> Tensor:
    """(C, D): the mean of each class's normalized prompts, normalized again (Radford et al. 2021,
    section 3.1.4)."""
    means = []
    for start in range(0, len(prompts.rows), CLASSES):
        some = list(enumerate(prompts.rows))[start : start + CLASSES]
        rows = [cache.rows(prompts.name, number, row.captions, key=row.key) for number, row in some]
        text_CPD = encode_texts(dual, torch.cat(rows), all_ranks).unflatten(0, (len(rows), -1))
        means.append(text_CPD.mean(1))
    return F.normalize(torch.cat(means), dim=1)
