"""Classification: zero-shot by class names (``llm2clip evaluate zeroshot``), and kNN and a linear probe on a tower's
features without any text (``llm2clip evaluate probe``).

Shapes: N training images, M test images, C classes, P prompts of a class, D width of a feature, W of an embedding.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.bootstrap import bootstrap_mean
from llm2clip_plugin.contracts import ScoreFile, TowerCard, atomic_file, canonical_json, sha256_text, sha256_weights
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.samples import BrokenSample, Caption
from llm2clip_plugin.data.sources import Source, SourceConfig, open_source
from llm2clip_plugin.data.sources.tars import scan_tar, split_name
from llm2clip_plugin.evaluate.config import EVALUATE_PROBE, EVALUATE_ZEROSHOT, ProbeConfig, ZeroShotConfig
from llm2clip_plugin.evaluate.opening import (
    IMAGE_ENDINGS,
    NOTES_SHOWN,
    InMemorySource,
    Row,
    dataset_name,
    encode_images,
    image_files,
    json_field,
    on_all_ranks,
    open_tower,
    provenance,
    write_scores,
)
from llm2clip_plugin.evaluate.retrieval import Dual, encode_texts, rank_both
from llm2clip_plugin.train.distributed import choose_device
from llm2clip_plugin.vision import DualConfig
from llm2clip_plugin.vision.directory import WEIGHTS_FILE, fetch_directory, has_card
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.families import family_of
from llm2clip_plugin.vision.towers import load_tower, preprocessor_config

CLASS = "class"  # field of an image's JSON where the data has none
NAME_FILES = ("classnames.txt", "classes.txt")
TEMPLATE_FILES = ("zeroshot_classification_templates.txt", "templates.txt")
PENALTIES = tuple(10.0**power for power in range(-6, 3))  # candidates for the linear probe
HELD_OUT = 5  # one in five clusters of the training images is held out to choose the penalty
QUERY_BLOCK = 1024  # test images compared at once
NOT_A_CLASS = (".", "embeddings-")  # prefixes of other folders: hidden ones, the prompts' cache


@dataclass(frozen=True)
class LabeledImages:
    """Images whose JSON names their class."""

    source: Source
    classes: list[str]  # the data's own names: folders, values of the field, or the numbers in .cls members
    field: str  # of the JSON: the class
    cluster: str  # of the JSON: images with the same value are resampled and held out together; "": each by itself


def open_labeled_images(path: str, field: str = "", cluster: str = "") -> LabeledImages:
    """The labeled images at ``path``: with ``field`` a captioned data source, else tars with .cls or class folders.

    ``field`` and ``cluster`` are fields of each sample's JSON. Raises FileNotFoundError, or ValueError for another
    layout.
    """
    if not field:
        root = Path(path)
        rows, classes = (_of_tars if root.is_file() or any(root.rglob("*.tar")) else _of_folders)(root)
        return LabeledImages(InMemorySource(path, root, rows), classes, CLASS, "")
    source = open_source(SourceConfig(path=path))
    records, found = map(source.record, range(len(source))), set()
    for record in records:  # before the work: every sample has the fields
        values = [json_field(record.meta, name, record.key, before=f"{path}: ") for name in (field, cluster) if name]
        found.add(str(values[0]))
    return LabeledImages(source, sorted(found), field, cluster)


def _of_folders(path: Path) -> tuple[list[Row], list[str]]:
    """``CLASS/**/IMAGE.jpg``: the rows, and all classes in alphabetical order."""
    names = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    if not names:
        raise ValueError(
            f"{path} has no class folders and no tars with .cls members; captioned data need --label FIELD"
        )
    classes = [name for name in names if not name.startswith(NOT_A_CLASS)]
    images = [(name, file) for name in classes for file in image_files(path / name)]
    return [Row(str(file.relative_to(path)), file, meta={CLASS: name}) for name, file in images], classes


def _of_tars(path: Path) -> tuple[list[Row], list[str]]:
    """Tars of ``KEY.jpg`` (png, webp) with ``KEY.cls``, the class index: the rows, and all classes."""
    rows, count = [], 0
    for tar in [path] if path.is_file() else sorted(path.rglob("*.tar")):
        parts: dict[str, dict[str, Callable[[], bytes]]] = {}
        for member in scan_tar(tar):
            key, ending = split_name(member.name)
            part = "image" if ending in IMAGE_ENDINGS else ending
            parts.setdefault(key, {})[part] = partial(_read, tar, member.offset_data, member.size)
        for key, of_key in parts.items():
            if "image" not in of_key:
                continue
            text = of_key["cls"]().decode("utf-8", "replace").strip() if "cls" in of_key else ""
            if not text.isdecimal():
                raise ValueError(f"{tar}: {key}.cls contains {text!r}, expected a class index (0, 1, ...)")
            rows.append(Row(f"{tar.stem}/{key}", of_key["image"], meta={CLASS: int(text)}))
            count = max(count, int(text) + 1)
    return rows, list(map(str, range(count)))


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

    def mean_per_class(self, hit_N: Tensor) -> float:
        """The unweighted mean over the classes of their mean hits."""
        return float(torch.stack([hit_N[self.label_N == label].mean() for label in torch.unique(self.label_N)]).mean())

    def items(self, classes: Sequence[str], hit_N: Tensor) -> list[dict[str, Any]]:
        """One item of a score file for each image; ``part`` is the name of its class."""
        parts = [classes[label] for label in self.label_N.tolist()]
        rows = zip(self.keys, hit_N.tolist(), self.clusters, parts, strict=True)
        return [dict(zip(("id", "score", "cluster", "part"), row, strict=True)) for row in rows]


def image_features(
    encode: Callable[[Tensor], Tensor],
    images: LabeledImages,
    config: ImageConfig,
    device: torch.device,
    **options: Any,
) -> ImageFeatures:
    """Labeled images through ``encode``, with ``options`` of `encode_images`. ValueError if no image is readable."""
    found = encode_images(encode, images.source, config, device, **options)
    if not found.numbers:
        raise ValueError(f"{images.source.path} contains no readable images: {found.broken[0]}")
    number_of = {name: number for number, name in enumerate(images.classes)}
    return ImageFeatures(
        feature_ND=torch.cat(found.vectors),
        label_N=torch.tensor([number_of[str(meta[images.field])] for meta in found.meta]),
        keys=found.keys,
        clusters=[str(meta.get(images.cluster, key)) for key, meta in zip(found.keys, found.meta, strict=True)],
        broken=found.broken,
    )


def main_zeroshot(argv: list[str]) -> int:
    """``llm2clip evaluate zeroshot TOWER DATA``."""
    config = EVALUATE_ZEROSHOT.parse(argv)

    def report(scores: ScoreFile) -> None:
        print(f"{config.tower} on {config.data}: {scores.counts['images']} images, {scores.counts['classes']} classes")
        print_scores(scores, {"acc1": "score"})
        write_scores(scores, config.json)
        if config.clip_benchmark:
            body = {"dataset": dataset_name(config.data), "model": "llm2clip", "pretrained": config.tower}
            body |= {"task": "zeroshot_classification", "language": "en"}
            metrics = {name: scores.metrics.get(name) for name in ("acc1", "acc5", "mean_per_class_recall")}
            with atomic_file(config.clip_benchmark) as temporary:
                temporary.write_text(json.dumps({**body, "metrics": metrics}) + "\n", encoding="utf-8")
            print(f"wrote {config.clip_benchmark}")

    return on_all_ranks(partial(measure_zeroshot, config), report)


def measure_zeroshot(config: ZeroShotConfig, all_ranks: bool) -> ScoreFile:
    """Embed the prompts and the images, and classify each image as the nearest class."""
    labeled = open_labeled_images(config.data, config.label)
    names = read_class_names(config.classes, config.data, labeled.classes)
    prompts = prompt_source(names, read_templates(config.templates, config.data), config.data)
    tower = open_tower(config.tower, config.device, config.teacher)
    cache = tower.cache(prompts, config.cache, all_ranks=all_ranks)
    class_CD = class_vectors(tower.dual, prompts, cache, all_ranks=all_ranks)
    options: dict[str, Any] = {"batch": config.batch, "workers": config.workers, "all_ranks": all_ranks}
    features = image_features(tower.dual.encode_image, labeled, tower.images, tower.device, **options)
    return dataclasses.replace(
        classification_scores(features, class_CD, names),
        benchmark=f"zeroshot:{dataset_name(config.data)}",
        model=config.tower,
        provenance=provenance(tower.dual, teacher=cache.fingerprint, prompts=prompts.name),
    )


def classification_scores(features: ImageFeatures, class_CD: Tensor, names: Sequence[str]) -> ScoreFile:
    """acc1, acc5 (with five classes or more) and mean_per_class_recall; classes of equal score split the credit."""
    image_ND = F.normalize(features.feature_ND, dim=1)
    ranks, _ = rank_both(image_ND, class_CD, features.label_N, torch.arange(len(class_CD)))
    top1_N = ranks.hits(1)
    metrics = {"acc1": float(top1_N.mean())}
    if len(class_CD) >= 5:
        metrics["acc5"] = float(ranks.hits(5).mean())
    metrics["mean_per_class_recall"] = features.mean_per_class(top1_N)
    items = features.items(names, top1_N)
    counts = {"images": len(items), "classes": len(class_CD), "left_out": len(features.broken)}
    notes = [f"left out: {error}" for error in features.broken]
    return ScoreFile(benchmark="", metrics=metrics, items=items, counts=counts, notes=notes)


def print_scores(scores: ScoreFile, intervals: dict[str, str]) -> None:
    """Each metric in percent, with the interval of those in ``intervals`` (metric -> field of the items)."""
    clusters = [item["cluster"] for item in scores.items]
    for name, value in scores.metrics.items():
        shown = ""
        if name in intervals:
            interval = bootstrap_mean([item[intervals[name]] for item in scores.items], clusters)
            shown = f"  [{100 * interval.low:.2f}, {100 * interval.high:.2f}]"
        print(f"{name:22} {100 * value:6.2f} %{shown}")
    for note in scores.notes[:NOTES_SHOWN]:
        print(note)


def read_class_names(path: str, data: str, classes: list[str]) -> list[str]:
    """A name for each class: from ``path``, else ``classnames.txt`` next to or above the data, else ``classes``.

    A text file has one name per line in the order of the classes, or ``CLASS<TAB>NAME``; JSON a list or a mapping.
    Raises FileNotFoundError without the file ``path``, ValueError if a class has no name or the numbers differ.
    """
    file = _find_file(path, data, NAME_FILES)
    if file is None:
        return [name.replace("_", " ") for name in classes]
    names = _read_lines(file)
    if isinstance(names, list) and all("\t" in name for name in names):
        names = dict(name.split("\t", 1) for name in names)
    if isinstance(names, dict):
        if missing := [name for name in classes if name not in names]:
            raise ValueError(f"{file} has no name for class {missing[0]!r} ({len(missing)} of {len(classes)} missing)")
        return [str(names[name]) for name in classes]
    numbered = classes == [str(number) for number in range(len(classes))]
    if len(names) != len(classes) and not (numbered and len(names) > len(classes)):  # a split may be missing classes
        raise ValueError(f"{file} has {len(names)} class names, but the data has {len(classes)} classes")
    return [str(name) for name in names]


def read_templates(path: str, data: str) -> list[str]:
    """Prompt templates: from ``path``, else a file next to or above the data, else one plain template.

    ``{c}`` or ``{}`` in a template stands for the class. Raises FileNotFoundError or ValueError.
    """
    file = _find_file(path, data, TEMPLATE_FILES)
    lines = ["a photo of a {c}."] if file is None else _read_lines(file)
    if invalid := [line for line in lines if "{c}" not in line and "{}" not in line]:
        raise ValueError(f"{file}: template {invalid[0]!r} does not contain {{c}}, the placeholder for the class name")
    if not lines:
        raise ValueError(f"{file} contains no templates")
    return lines


def _find_file(path: str, data: str, names: tuple[str, ...]) -> Path | None:
    """``path``, else the first of ``names`` that exists in the data's folder or its parent."""
    if path:
        return Path(path)
    folder = _data_folder(data)
    candidates = (parent / name for parent in (folder, folder.parent) for name in names)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _data_folder(data: str) -> Path:
    return Path(data) if Path(data).is_dir() else Path(data).parent


def _read_lines(file: Path) -> Any:
    """The contents of a JSON file, or the lines of a text file that are not blank."""
    text = file.read_text("utf-8")
    return json.loads(text) if file.suffix == ".json" else [line.strip() for line in text.splitlines() if line.strip()]


def prompt_source(names: Sequence[str], templates: Sequence[str], data: str) -> InMemorySource:
    """A data source without images: a class is a sample, its prompts are the captions; named by the prompts' hash."""
    prompts = [[template.replace("{c}", name).replace("{}", name) for template in templates] for name in names]
    rows = [
        Row(f"{number:05d}", None, tuple(Caption(text, "prompt") for text in texts))
        for number, texts in enumerate(prompts)
    ]
    return InMemorySource(f"prompts-{sha256_text(canonical_json(prompts))[:12]}", _data_folder(data), rows)


@torch.no_grad()
def class_vectors(dual: Dual, prompts: InMemorySource, cache: EmbeddingCache, *, all_ranks: bool = False) -> Tensor:
    """(C, D): the mean of each class's normalized prompts, normalized again (Radford et al. 2021, section 3.1.4)."""
    rows = [cache.rows(prompts.name, number, row.captions, key=row.key) for number, row in enumerate(prompts.rows)]
    text_CPD = encode_texts(dual, torch.cat(rows), all_ranks).unflatten(0, (len(rows), -1))
    return F.normalize(text_CPD.mean(1), dim=1)


def main_probe(argv: list[str]) -> int:
    """``llm2clip evaluate probe TOWER TRAIN TEST``."""
    config = EVALUATE_PROBE.parse(argv)

    def report(scores: ScoreFile) -> None:
        count = scores.counts["images"]
        print(f"{config.tower}: {count} images of {config.test}, classified with probes fitted on {config.train}")
        print_scores(scores, {name: name for name in scores.metrics if not name.endswith("_mean_per_class")})
        write_scores(scores, config.json)

    return on_all_ranks(partial(measure_probe, config), report)


def measure_probe(config: ProbeConfig, all_ranks: bool) -> ScoreFile:
    """Encode the training and the test images, run the probes."""
    directory, device = fetch_directory(config.tower), choose_device(config.device)
    tower: Any = load_tower(directory)
    width = tower.config.hidden_size * (2 if config.pool == "cls_mean" else 1)
    pooling = DualConfig(projection="none", projection_dim=width, pool=config.pool)
    encoder = DualEncoder(tower, pooling).to(device).eval()
    images = ImageConfig.from_preprocessor(preprocessor_config(directory))
    sides = [open_labeled_images(path, config.label, config.cluster) for path in (config.train, config.test)]
    options: dict[str, Any] = {"batch": config.batch, "workers": config.workers, "all_ranks": all_ranks}
    train, test = (image_features(encoder.pool, side, images, device, **options) for side in sides)
    class_number, test_classes = {name: number for number, name in enumerate(sides[0].classes)}, sides[1].classes
    unseen = [name for name in test_classes if name not in class_number]
    test_label_N = torch.tensor([class_number.get(name, -1) for name in test_classes])[test.label_N]
    hits = {"knn": knn(train, test.feature_ND, config.k, config.temperature) == test_label_N}
    if config.linear:
        hits["linear"] = linear_probe(train, test.feature_ND) == test_label_N
    return dataclasses.replace(
        probe_scores(hits, test, test_classes, unseen),
        model=config.tower,
        provenance=provenance(
            weights_sha256=weights_hash(directory),
            family=family_of(tower).name,
            train=sha256_text("\n".join(train.keys)),
            settings={"pool": config.pool, "k": config.k, "temperature": config.temperature, "label": config.label},
        ),
    )


def weights_hash(directory: Path) -> str:
    """SHA-256 of a loaded tower's weights: the card's, which loading has compared; "" for another format's weights."""
    if has_card(directory):
        return TowerCard.read(directory / TowerCard.FILE).weights_sha256
    weights = directory / WEIGHTS_FILE
    return sha256_weights(weights) if weights.is_file() else ""


def knn(train: ImageFeatures, test_MD: Tensor, k: int, temperature: float) -> Tensor:
    """(M,) predicted classes: the k nearest training images vote with exp(cosine similarity / temperature).

    Source: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination (2018), section 3.4.
    """
    if k < 1 or temperature <= 0:
        raise ValueError(f"k {k} must be at least 1 and temperature {temperature} above 0")
    train_ND, label_N = F.normalize(train.feature_ND, dim=1), train.label_N
    classes, predicted = int(label_N.max()) + 1, []
    for block_bD in F.normalize(test_MD, dim=1).split(QUERY_BLOCK):
        near_bk, index_bk = (block_bD @ train_ND.T).topk(min(k, len(train_ND)), dim=1)
        vote_bk = ((near_bk - near_bk[:, :1]) / temperature).exp()  # relative to the nearest: no overflow
        predicted.append(torch.zeros(len(block_bD), classes).scatter_add_(1, label_N[index_bk], vote_bk).argmax(1))
    return torch.cat(predicted)


def linear_probe(train: ImageFeatures, test_MD: Tensor, penalties: Sequence[float] = PENALTIES) -> Tensor:
    """(M,) predicted classes of multinomial logistic regression on standardized features.

    The L2 penalty is the best one on a fifth of the training clusters; then all of them are fitted.
    """
    mean_D, std_D = train.feature_ND.mean(0), train.feature_ND.std(0, correction=0).clamp(min=1e-6)
    feature_ND, test_MD = (train.feature_ND - mean_D) / std_D, (test_MD - mean_D) / std_D
    held_N = torch.tensor([int(sha256_text(cluster)[:8], 16) % HELD_OUT == 0 for cluster in train.clusters])
    classes, best = int(train.label_N.max()) + 1, penalties[0]
    if len(penalties) > 1 and 0 < int(held_N.sum()) < len(held_N):
        accuracies = []
        for penalty in penalties:
            fitted = fit_logistic(feature_ND[~held_N], train.label_N[~held_N], classes, penalty)
            accuracies.append(float((predict(fitted, feature_ND[held_N]) == train.label_N[held_N]).float().mean()))
        ties = [index for index, accuracy in enumerate(accuracies) if accuracy == max(accuracies)]
        best = penalties[ties[len(ties) // 2]]
    return predict(fit_logistic(feature_ND, train.label_N, classes, best), test_MD)


def fit_logistic(feature_ND: Tensor, label_N: Tensor, classes: int, penalty: float) -> Tensor:
    """(D + 1, C) weights and, last, the bias: cross-entropy + penalty / 2 * |weights|^2, by L-BFGS from zero."""
    padded = F.pad(feature_ND, (0, 1), value=1.0)
    weight = torch.zeros(padded.shape[1], classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(padded @ weight, label_N) + penalty / 2 * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def predict(weight: Tensor, feature_ND: Tensor) -> Tensor:
    """(N,) most likely classes under the weights of `fit_logistic`."""
    return (F.pad(feature_ND, (0, 1), value=1.0) @ weight).argmax(1)


def probe_scores(hits: dict[str, Tensor], test: ImageFeatures, classes: Sequence[str], unseen: list[str]) -> ScoreFile:
    """Accuracy and mean per-class recall of each probe; an item's score is the hit of the first probe."""
    hits = {name: hit_M.double() for name, hit_M in hits.items()}
    metrics: dict[str, float] = {}
    for name, hit_M in hits.items():
        metrics |= {name: float(hit_M.mean()), f"{name}_mean_per_class": test.mean_per_class(hit_M)}
    items = [
        item | {name: float(hit_M[row]) for name, hit_M in hits.items()}
        for row, item in enumerate(test.items(classes, next(iter(hits.values()))))
    ]
    counts = {"images": len(items), "left_out": len(test.broken), "unseen_classes": len(unseen)}
    notes = [f"left out: {error}" for error in test.broken]
    if unseen:
        notes.append(f"classes without training images (their test images count as wrong): {', '.join(unseen[:10])}")
    return ScoreFile(benchmark="probe", metrics=metrics, items=items, counts=counts, notes=notes)
