"""``llm2clip evaluate probe``: classification from a tower's features without any text: kNN and a linear probe.

Shapes: N training images, M test images, D width of a feature, C classes.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.contracts import ScoreFile, TowerCard, sha256_text, sha256_weights
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.evaluate.command_line import on_all_ranks, print_scores, provenance, write_scores
from llm2clip_plugin.evaluate.image_features import ImageFeatures, image_features
from llm2clip_plugin.evaluate.labeled_images import open_labeled_images
from llm2clip_plugin.evaluate.options.probe import COMMAND, ProbeConfig
from llm2clip_plugin.train.distributed import choose_device
from llm2clip_plugin.vision.directory import WEIGHTS_FILE, fetch_directory
from llm2clip_plugin.vision.dual import DualConfig, DualEncoder
from llm2clip_plugin.vision.families import family_of
from llm2clip_plugin.vision.intact import has_card
from llm2clip_plugin.vision.preprocessor import preprocessor_config
from llm2clip_plugin.vision.towers import load_tower

PENALTIES = tuple(10.0**power for power in range(-6, 3))  # candidates for the linear probe
HELD_OUT = 5  # one in five clusters of the training images is held out to choose the penalty
QUERY_BLOCK = 1024  # test images compared at once


def main(argv: list[str]) -> int:
    """``llm2clip evaluate probe TOWER TRAIN TEST``."""
    config = COMMAND.parse(argv)
    return on_all_ranks(lambda all_ranks: measure(config, all_ranks=all_ranks), lambda scores: report(config, scores))


def measure(config: ProbeConfig, *, all_ranks: bool = False) -> ScoreFile:
    """Encode the training and the test images, run the probes."""
    directory, device = fetch_directory(config.tower), choose_device(config.device)
    tower: Any = load_tower(directory)
    width = tower.config.hidden_size * (2 if config.pool == "cls_mean" else 1)
    pooling = DualConfig(projection="none", projection_dim=width, pool=config.pool)
    encoder = DualEncoder(tower, pooling).to(device).eval()
    images = ImageConfig.from_preprocessor(preprocessor_config(directory))
    sides = [open_labeled_images(path, config.label, config.cluster) for path in (config.train, config.test)]
    options = {"batch": config.batch, "workers": config.workers, "all_ranks": all_ranks}
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


def report(config: ProbeConfig, scores: ScoreFile) -> None:
    """Print each probe with its interval and write the score file."""
    count = scores.counts["images"]
    print(f"{config.tower}: {count} images of {config.test}, classified with probes fitted on {config.train}")
    print_scores(scores, {name: name for name in scores.metrics if not name.endswith("_mean_per_class")})
    write_scores(scores, config.json)
