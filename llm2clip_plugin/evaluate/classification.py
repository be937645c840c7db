"""``llm2clip evaluate zeroshot``, and kNN and a linear probe on a tower's features without any text
(``probe``).

Shapes: N training images, M test images, D width of a feature.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.bootstrap import Interval, interval_of_hits
from llm2clip_plugin.contracts import ScoreFile, TowerCard
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.remote import public_name
from llm2clip_plugin.evaluate import commands
from llm2clip_plugin.evaluate.config import (
    EVALUATE_PROBE,
    EVALUATE_ZEROSHOT,
    ProbeConfig,
    ZeroShotConfig,
)
from llm2clip_plugin.evaluate.labeled_images import (
    ImageFeatures,
    LabeledImages,
    image_features,
    open_labeled_images,
)
from llm2clip_plugin.evaluate.zeroshot import (
    class_vectors,
    classification_scores,
    prompt_source,
    read_class_names,
    read_templates,
)
from llm2clip_plugin.hashes import sha256_text, sha256_weights
from llm2clip_plugin.train.distributed import choose_device
from llm2clip_plugin.vision.directory import (
    WEIGHTS_FILE,
    DualConfig,
    fetch_directory,
    has_card,
)
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.families import family_of
from llm2clip_plugin.vision.towers import load_tower, preprocessor_config

# candidates for the linear probe
PENALTIES = tuple(10.0**power for power in range(-6, 3))
# one in five clusters of the training images is held out to choose the penalty
HELD_OUT = 5
QUERY_BLOCK = 1024  # test images compared at once
TEMPERATURE = 0.07  # of a neighbor's vote


def report(title: str, path: str, scores: ScoreFile) -> None:
    """Print the scores, with the intervals of those that the items have, and write them to
    ``path``."""
    clusters = [item["cluster"] for item in scores.items]
    intervals: dict[str, Interval] = {}
    for name in scores.metrics:
        if name in scores.items[0]:
            hits = [item[name] for item in scores.items]
            intervals[name] = interval_of_hits(hits, clusters)
    commands.print_scores(title, scores, intervals)
    commands.write_scores(scores, path)


def main_zeroshot(argv: list[str]) -> int:
    """``llm2clip evaluate zeroshot TOWER DATA``."""
    config = EVALUATE_ZEROSHOT.parse(argv)
    title = f"{config.tower} on {config.data}"
    return commands.on_all_ranks(
        partial(measure_zeroshot, config), partial(report, title, config.json)
    )


def measure_zeroshot(config: ZeroShotConfig, all_ranks: bool) -> ScoreFile:
    """Embed the prompts and the images, and classify each image as the nearest class."""
    labeled = open_labeled_images(config.data, config.label)
    names = read_class_names(config.classes, config.data, labeled.classes)
    templates = read_templates(config.templates, config.data)
    prompts = prompt_source(names, templates, config.data)
    tower = commands.open_tower(config.tower, config.device, config.teacher)
    cache = tower.cache(prompts, config.cache, all_ranks=all_ranks)
    class_CD = class_vectors(tower.dual, prompts, cache, all_ranks=all_ranks)
    features = image_features(
        tower.dual.encode_image,
        labeled,
        tower.images,
        tower.device,
        batch=config.batch,
        workers=config.workers,
        all_ranks=all_ranks,
    )
    origin = commands.provenance(
        tower.dual,
        teacher=cache.fingerprint,
        prompts=prompts.name,
        data_sha256=features.data_sha256(names),
    )
    return dataclasses.replace(
        classification_scores(features, class_CD, names),
        benchmark=f"zeroshot:{public_name(config.data)}",
        model=config.tower,
        provenance=origin,
    )


def main_probe(argv: list[str]) -> int:
    """``llm2clip evaluate probe TOWER TRAIN TEST``."""
    config = EVALUATE_PROBE.parse(argv)
    title = f"{config.tower} on {config.test}, probes fitted on {config.train}"
    return commands.on_all_ranks(
        partial(measure_probe, config), partial(report, title, config.json)
    )


def measure_probe(config: ProbeConfig, all_ranks: bool) -> ScoreFile:
    """Encode the training and the test images, run the probes."""
    directory = fetch_directory(config.tower)
    device = choose_device(config.device)
    tower: Any = load_tower(directory)
    width = tower.config.hidden_size * (2 if config.pool == "cls_mean" else 1)
    pooling = DualConfig(projection="none", projection_dim=width, pool=config.pool)
    encoder = DualEncoder(tower, pooling).to(device).eval()
    images = ImageConfig.from_preprocessor(preprocessor_config(directory))

    def encode(labeled: LabeledImages) -> ImageFeatures:
        return image_features(
            encoder.pool,
            labeled,
            images,
            device,
            batch=config.batch,
            workers=config.workers,
            all_ranks=all_ranks,
        )

    train_images = open_labeled_images(config.train, config.label, config.cluster)
    test_images = open_labeled_images(config.test, config.label, config.cluster)
    train = encode(train_images)
    test = encode(test_images)
    class_number = {name: number for number, name in enumerate(train_images.classes)}
    test_classes = test_images.classes
    unseen = [name for name in test_classes if name not in class_number]
    number_C = torch.tensor([class_number.get(name, -1) for name in test_classes])
    test_label_N = number_C[test.label_N]
    hits = {"knn": knn(train, test.feature_ND, config.k) == test_label_N}
    if config.linear:
        hits["linear"] = linear_probe(train, test.feature_ND) == test_label_N
    means = {name: f"{name}_mean_per_class" for name in hits}
    scores = test.scores(hits, test_classes, means, unseen_classes=len(unseen))
    notes = list(scores.notes)
    if unseen:
        lost = "classes without training images (their test images count as wrong): "
        notes.insert(0, lost + ", ".join(unseen[:10]))
    settings = {
        "pool": config.pool,
        "k": config.k,
        "temperature": TEMPERATURE,
        "label": config.label,
    }
    origin = commands.provenance(
        weights_sha256=weights_hash(directory),
        family=family_of(tower).name,
        train=sha256_text("\n".join(train.keys)),
        data_sha256=test.data_sha256(test_classes),
        settings=settings,
    )
    return dataclasses.replace(
        scores, notes=notes, benchmark="probe", model=config.tower, provenance=origin
    )


def weights_hash(directory: Path) -> str:
    """SHA-256 of a loaded tower's weights: the card's, which loading has compared; "" for another
    format's weights."""
    if has_card(directory):
        return TowerCard.read(directory / TowerCard.FILE).weights_sha256
    weights = directory / WEIGHTS_FILE
    return sha256_weights(weights) if weights.is_file() else ""


def knn(train: ImageFeatures, test_MD: Tensor, k: int) -> Tensor:
    """(M,) predicted classes: the k nearest training images vote with exp(cosine similarity /
    TEMPERATURE).

    Source: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination
    (2018), section 3.4.
    """
    train_ND = F.normalize(train.feature_ND, dim=1)
    label_N = train.label_N
    classes = int(label_N.max()) + 1
    predicted = []
    for block_bD in F.normalize(test_MD, dim=1).split(QUERY_BLOCK):
        near_bk, index_bk = (block_bD @ train_ND.T).topk(min(k, len(train_ND)), dim=1)
        # relative to the nearest: no overflow
        vote_bk = ((near_bk - near_bk[:, :1]) / TEMPERATURE).exp()
        votes_bC = torch.zeros(len(block_bD), classes)
        votes_bC.scatter_add_(1, label_N[index_bk], vote_bk)
        predicted.append(votes_bC.argmax(1))
    return torch.cat(predicted)


def linear_probe(train: ImageFeatures, test_MD: Tensor) -> Tensor:
    """(M,) predicted classes of multinomial logistic regression on standardized features.

    The L2 penalty is the best one on a fifth of the training clusters; then all of them are fitted.
    """
    mean_D = train.feature_ND.mean(0)
    std_D = train.feature_ND.std(0, correction=0).clamp(min=1e-6)
    feature_ND = (train.feature_ND - mean_D) / std_D
    test_MD = (test_MD - mean_D) / std_D
    held_N = torch.tensor([_is_held_out(cluster) for cluster in train.clusters])
    classes = int(train.label_N.max()) + 1
    best = PENALTIES[0]
    if 0 < int(held_N.sum()) < len(held_N):
        fit_ND = feature_ND[~held_N]
        fit_label_N = train.label_N[~held_N]
        held_label_N = train.label_N[held_N]
        right: list[int] = []  # held-out images that each penalty gets right
        for penalty in PENALTIES:
            weight = fit_logistic(fit_ND, fit_label_N, classes, penalty)
            hit_N = predict(weight, feature_ND[held_N]) == held_label_N
            right.append(int(hit_N.sum()))
        ties = [index for index, count in enumerate(right) if count == max(right)]
        best = PENALTIES[ties[len(ties) // 2]]
    return predict(fit_logistic(feature_ND, train.label_N, classes, best), test_MD)


def _is_held_out(cluster: str) -> bool:
    """Whether a cluster of training images is held out to choose the penalty."""
    return int(sha256_text(cluster)[:8], 16) % HELD_OUT == 0


def fit_logistic(
    feature_ND: Tensor, label_N: Tensor, classes: int, penalty: float
) -> Tensor:
    """(D + 1, C) weights and, last, the bias: cross-entropy + penalty / 2 * |weights|^2, by L-BFGS
    from zero."""
    padded = F.pad(feature_ND, (0, 1), value=1.0)
    weight = torch.zeros(padded.shape[1], classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        entropy = F.cross_entropy(padded @ weight, label_N)
        loss = entropy + penalty / 2 * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def predict(weight: Tensor, feature_ND: Tensor) -> Tensor:
    """(N,) most likely classes under the weights of `fit_logistic`."""
    return (F.pad(feature_ND, (0, 1), value=1.0) @ weight).argmax(1)
