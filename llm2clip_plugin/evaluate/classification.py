"""Classification: zero-shot by class names (``llm2clip evaluate zeroshot``), and kNN and a linear probe on a tower's
features without any text (``llm2clip evaluate probe``).

Shapes: N training images, M test images, C classes, P prompts of a class, D width of a feature, W of an embedding.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.bootstrap import bootstrap_mean
from llm2clip_plugin.contracts import ScoreFile, TowerCard, canonical_json, sha256_text, sha256_weights
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.samples import BrokenSample, Caption
from llm2clip_plugin.data.sources import Source, SourceConfig, open_source
from llm2clip_plugin.data.sources.tars import scan_tar, split_name
from llm2clip_plugin.evaluate import opening
from llm2clip_plugin.evaluate.config import EVALUATE_PROBE, EVALUATE_ZEROSHOT, ProbeConfig, ZeroShotConfig
from llm2clip_plugin.evaluate.retrieval import Dual, encode_texts, rank_both
from llm2clip_plugin.files import errors_about
from llm2clip_plugin.train.distributed import choose_device
from llm2clip_plugin.vision.directory import WEIGHTS_FILE, DualConfig, fetch_directory, has_card
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.families import family_of
from llm2clip_plugin.vision.towers import load_tower, preprocessor_config

CLASS = "class"  # field of an image's JSON where the data has none
NAME_FILE, TEMPLATE_FILE = "classnames.txt", "zeroshot_classification_templates.txt"
PENALTIES = tuple(10.0**power for power in range(-6, 3))  # candidates for the linear probe
HELD_OUT = 5  # one in five clusters of the training images is held out to choose the penalty
QUERY_BLOCK = 1024  # test images compared at once
CLASSES = 100  # embedded at once: with 80 prompts 4096 wide 131 MB
TEMPERATURE = 0.07  # of a neighbor's vote
NOT_A_CLASS = (".", "embeddings-")  # prefixes of other folders: hidden ones, the prompts' cache


@dataclass(frozen=True)
class LabeledImages:
    """Images whose JSON names their class."""

    source: Source
    classes: list[str]  # the data's own names: folders, values of the field, or the numbers in .cls members
    field: str = CLASS  # of the JSON: the class
    cluster: str = ""  # of the JSON: images with the same value are resampled and held out together; "": each by itself


def open_labeled_images(path: str, field: str = "", cluster: str = "") -> LabeledImages:
    """The labeled images at ``path``: with ``field`` a captioned data source, else tars with .cls or class folders.

    ``field`` and ``cluster`` are fields of each sample's JSON. FileNotFoundError, or ValueError for another layout.
    """
    if not field:
        root = Path(path)
        return (_of_tars if root.is_file() or any(root.rglob("*.tar")) else _of_folders)(root)
    source, found = open_source(SourceConfig(path=path)), set()
    for record in map(source.record, range(len(source))):  # before the work: every sample has the fields
        of_fields = [opening.json_field(record.meta, name, record.key) for name in (field, cluster) if name]
        found.add(str(of_fields[0]))
    return LabeledImages(source, sorted(found), field, cluster)


def _of_folders(path: Path) -> LabeledImages:
    """``CLASS/**/IMAGE.jpg``: classes in alphabetical order."""
    folders = [entry for entry in sorted(path.iterdir()) if entry.is_dir() and not entry.name.startswith(NOT_A_CLASS)]
    if not folders:
        raise ValueError(f"{path} has no class folders and no tars with .cls; captioned data need --label FIELD")
    rows = [
        opening.Row(str(file.relative_to(path)), file, meta={CLASS: folder.name})
        for folder in folders
        for file in opening.image_files(folder)
    ]
    return LabeledImages(opening.InMemorySource(str(path), path, rows), [folder.name for folder in folders])


def _of_tars(path: Path) -> LabeledImages:
    """Tars of ``KEY.jpg`` (png, webp) with ``KEY.cls``, the class index."""
    rows = []
    for tar in [path] if path.is_file() else sorted(path.rglob("*.tar")):
        parts: dict[str, dict[str, Callable[[], bytes]]] = {}
        for member in scan_tar(tar):
            key, ending = split_name(member.name)
            part = "image" if ending in opening.IMAGE_ENDINGS else ending
            parts.setdefault(key, {})[part] = partial(_read, tar, member.offset_data, member.size)
        for key, of_key in parts.items():
            if "image" in of_key:
                with errors_about(f"{tar}: {key}.cls", fix="expected a class index (0, 1, ...)"):
                    rows.append(opening.Row(f"{tar.stem}/{key}", of_key["image"], meta={CLASS: int(of_key["cls"]())}))
    count = 1 + max((row.meta[CLASS] for row in rows), default=0)
    return LabeledImages(opening.InMemorySource(str(path), path, rows), list(map(str, range(count))))


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

    def scores(self, hits: dict[str, Tensor], names: Sequence[str], means: dict[str, str], **counts: int) -> ScoreFile:
        """The mean of each of ``hits``, and the mean over classes of those in ``means`` (hits -> name of the metric).

        An item's score is its first hit, and its ``part`` the name of its class.
        """
        hits = {name: hit_N.double() for name, hit_N in hits.items()}
        metrics, labels = {name: float(hit_N.mean()) for name, hit_N in hits.items()}, torch.unique(self.label_N)
        for name, metric in means.items():
            metrics[metric] = float(torch.stack([hits[name][self.label_N == label].mean() for label in labels]).mean())
        labeled = zip(self.keys, self.clusters, self.label_N.tolist(), strict=True)
        items: list[dict[str, Any]] = [{"id": key, "cluster": cluster, "part": names[n]} for key, cluster, n in labeled]
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
    encode: Callable[..., Tensor], images: LabeledImages, config: ImageConfig, device: torch.device, **options: Any
) -> ImageFeatures:
    """Labeled images through ``encode``, with ``options`` of `encode_images`. ValueError if no image is readable."""
    found = opening.encode_images(encode, images.source, config, device, **options)
    number_of = {name: number for number, name in enumerate(images.classes)}
    return ImageFeatures(
        feature_ND=found.joined(),
        label_N=torch.tensor([number_of[str(meta[images.field])] for meta in found.meta]),
        keys=found.keys,
        clusters=[str(meta.get(images.cluster, key)) for key, meta in zip(found.keys, found.meta, strict=True)],
        broken=found.broken,
    )


def report(title: str, path: str, scores: ScoreFile) -> None:
    """Print the scores, with the intervals of those that the items have, and write them to ``path``."""
    clusters = [item["cluster"] for item in scores.items]
    hits = {name: [item[name] for item in scores.items] for name in scores.metrics if name in scores.items[0]}
    opening.print_scores(title, scores, {name: bootstrap_mean(of_items, clusters) for name, of_items in hits.items()})
    opening.write_scores(scores, path)


def main_zeroshot(argv: list[str]) -> int:
    """``llm2clip evaluate zeroshot TOWER DATA``."""
    config = EVALUATE_ZEROSHOT.parse(argv)
    title = f"{config.tower} on {config.data}"
    return opening.on_all_ranks(partial(measure_zeroshot, config), partial(report, title, config.json))


def measure_zeroshot(config: ZeroShotConfig, all_ranks: bool) -> ScoreFile:
    """Embed the prompts and the images, and classify each image as the nearest class."""
    labeled = open_labeled_images(config.data, config.label)
    names = read_class_names(config.classes, config.data, labeled.classes)
    prompts = prompt_source(names, read_templates(config.templates, config.data), config.data)
    tower = opening.open_tower(config.tower, config.device, config.teacher)
    cache = tower.cache(prompts, config.cache, all_ranks=all_ranks)
    class_CD = class_vectors(tower.dual, prompts, cache, all_ranks=all_ranks)
    options: dict[str, Any] = {"batch": config.batch, "workers": config.workers, "all_ranks": all_ranks}
    features = image_features(tower.dual.encode_image, labeled, tower.images, tower.device, **options)
    return dataclasses.replace(
        classification_scores(features, class_CD, names),
        benchmark=f"zeroshot:{opening.dataset_name(config.data)}",
        model=config.tower,
        provenance=opening.provenance(tower.dual, teacher=cache.fingerprint, prompts=prompts.name),
    )


def classification_scores(features: ImageFeatures, class_CD: Tensor, names: Sequence[str]) -> ScoreFile:
    """acc1, acc5 (with five classes or more) and mean_per_class_recall; classes of equal score split the credit."""
    image_ND = F.normalize(features.feature_ND, dim=1)
    ranks, _ = rank_both(image_ND, class_CD, features.label_N, torch.arange(len(class_CD)))
    hits = {f"acc{k}": ranks.hits(k) for k in (1, 5) if k <= len(class_CD)}
    return features.scores(hits, names, {"acc1": "mean_per_class_recall"}, classes=len(class_CD))


def read_class_names(path: str, data: str, classes: list[str]) -> list[str]:
    """A name for each class: from ``path``, else ``classnames.txt`` next to or above the data, else ``classes``.

    The file has one name per line in the order of the classes, or ``CLASS<TAB>NAME``. Raises FileNotFoundError without
    the file ``path``, ValueError if a class has no name or the numbers differ.
    """
    file, names = _read_lines(path, data, NAME_FILE)
    if names is None:
        return [name.replace("_", " ") for name in classes]
    if all("\t" in name for name in names):
        name_of = dict(name.split("\t", 1) for name in names)
        if missing := [name for name in classes if name not in name_of]:
            raise ValueError(f"{file} has no name for class {missing[0]!r} ({len(missing)} of {len(classes)} missing)")
        return [name_of[name] for name in classes]
    numbered = classes == [str(number) for number in range(len(classes))]
    if len(names) != len(classes) and not (numbered and len(names) > len(classes)):  # a split may be missing classes
        raise ValueError(f"{file} has {len(names)} class names, but the data has {len(classes)} classes")
    return names


def read_templates(path: str, data: str) -> list[str]:
    """Prompt templates: from ``path``, else TEMPLATE_FILE next to or above the data, else one plain template.

    ``{c}`` or ``{}`` in a template stands for the class. Raises FileNotFoundError or ValueError.
    """
    file, lines = _read_lines(path, data, TEMPLATE_FILE)
    if invalid := [line for line in lines or () if "{c}" not in line and "{}" not in line]:
        raise ValueError(f"{file}: template {invalid[0]!r} does not contain {{c}}, the placeholder for the class name")
    return lines or ["a photo of a {c}."]


def _read_lines(path: str, data: str, name: str) -> tuple[Path, list[str] | None]:
    """The file ``path``, else ``name`` in the data's folder or its parent, and its lines that are not blank."""
    folder = _data_folder(data)
    file = Path(path) if path else next(filter(Path.is_file, (folder / name, folder.parent / name)), None)
    if file is None:
        return folder, None
    return file, [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]


def _data_folder(data: str) -> Path:
    return Path(data) if Path(data).is_dir() else Path(data).parent


def prompt_source(names: Sequence[str], templates: Sequence[str], data: str) -> opening.InMemorySource:
    """A data source without images: a class is a sample, its prompts are the captions; named by the prompts' hash."""
    prompts = [[template.replace("{c}", name).replace("{}", name) for template in templates] for name in names]
    rows = [
        opening.Row(f"{number:05d}", None, tuple(Caption(text, "prompt") for text in texts))
        for number, texts in enumerate(prompts)
    ]
    return opening.InMemorySource(f"prompts-{sha256_text(canonical_json(prompts))[:12]}", _data_folder(data), rows)


@torch.no_grad()
def class_vectors(
    dual: Dual, prompts: opening.InMemorySource, cache: EmbeddingCache, all_ranks: bool = False
) -> Tensor:
    """(C, D): the mean of each class's normalized prompts, normalized again (Radford et al. 2021, section 3.1.4)."""
    means = []
    for start in range(0, len(prompts.rows), CLASSES):
        some = list(enumerate(prompts.rows))[start : start + CLASSES]
        rows = [cache.rows(prompts.name, number, row.captions, key=row.key) for number, row in some]
        text_CPD = encode_texts(dual, torch.cat(rows), all_ranks).unflatten(0, (len(rows), -1))
        means.append(text_CPD.mean(1))
    return F.normalize(torch.cat(means), dim=1)


def main_probe(argv: list[str]) -> int:
    """``llm2clip evaluate probe TOWER TRAIN TEST``."""
    config = EVALUATE_PROBE.parse(argv)
    title = f"{config.tower} on {config.test}, probes fitted on {config.train}"
    return opening.on_all_ranks(partial(measure_probe, config), partial(report, title, config.json))


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
    hits = {"knn": knn(train, test.feature_ND, config.k) == test_label_N}
    if config.linear:
        hits["linear"] = linear_probe(train, test.feature_ND) == test_label_N
    means = {name: f"{name}_mean_per_class" for name in hits}
    scores = test.scores(hits, test_classes, means, unseen_classes=len(unseen))
    lost = f"classes without training images (their test images count as wrong): {', '.join(unseen[:10])}"
    return dataclasses.replace(
        scores,
        notes=[*([lost] if unseen else []), *scores.notes],
        benchmark="probe",
        model=config.tower,
        provenance=opening.provenance(
            weights_sha256=weights_hash(directory),
            family=family_of(tower).name,
            train=sha256_text("\n".join(train.keys)),
            settings={"pool": config.pool, "k": config.k, "temperature": TEMPERATURE, "label": config.label},
        ),
    )


def weights_hash(directory: Path) -> str:
    """SHA-256 of a loaded tower's weights: the card's, which loading has compared; "" for another format's weights."""
    if has_card(directory):
        return TowerCard.read(directory / TowerCard.FILE).weights_sha256
    weights = directory / WEIGHTS_FILE
    return sha256_weights(weights) if weights.is_file() else ""


def knn(train: ImageFeatures, test_MD: Tensor, k: int) -> Tensor:
    """(M,) predicted classes: the k nearest training images vote with exp(cosine similarity / TEMPERATURE).

    Source: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination (2018), section 3.4.
    """
    train_ND, label_N = F.normalize(train.feature_ND, dim=1), train.label_N
    classes, predicted = int(label_N.max()) + 1, []
    for block_bD in F.normalize(test_MD, dim=1).split(QUERY_BLOCK):
        near_bk, index_bk = (block_bD @ train_ND.T).topk(min(k, len(train_ND)), dim=1)
        vote_bk = ((near_bk - near_bk[:, :1]) / TEMPERATURE).exp()  # relative to the nearest: no overflow
        predicted.append(torch.zeros(len(block_bD), classes).scatter_add_(1, label_N[index_bk], vote_bk).argmax(1))
    return torch.cat(predicted)


def linear_probe(train: ImageFeatures, test_MD: Tensor) -> Tensor:
    """(M,) predicted classes of multinomial logistic regression on standardized features.

    The L2 penalty is the best one on a fifth of the training clusters; then all of them are fitted.
    """
    mean_D, std_D = train.feature_ND.mean(0), train.feature_ND.std(0, correction=0).clamp(min=1e-6)
    feature_ND, test_MD = (train.feature_ND - mean_D) / std_D, (test_MD - mean_D) / std_D
    held_N = torch.tensor([int(sha256_text(cluster)[:8], 16) % HELD_OUT == 0 for cluster in train.clusters])
    classes, best = int(train.label_N.max()) + 1, PENALTIES[0]
    if 0 < int(held_N.sum()) < len(held_N):
        fits = [fit_logistic(feature_ND[~held_N], train.label_N[~held_N], classes, penalty) for penalty in PENALTIES]
        right = [int((predict(fit, feature_ND[held_N]) == train.label_N[held_N]).sum()) for fit in fits]
        ties = [index for index, count in enumerate(right) if count == max(right)]
        best = PENALTIES[ties[len(ties) // 2]]
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
