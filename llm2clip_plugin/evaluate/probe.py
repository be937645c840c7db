"""``llm2clip evaluate probe``: what a tower's features know of classes, without any text: kNN and a linear probe.

Shapes: N images of a side, D width of a feature, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from llm2clip_plugin import __version__
from llm2clip_plugin.bootstrap import bootstrap_mean
from llm2clip_plugin.contracts import ScoreFile, sha256_text, sha256_weights
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.evaluate.classes import LabelledImages, open_labelled
from llm2clip_plugin.evaluate.features import ImageFeatures, image_features
from llm2clip_plugin.train.distributed import choose_device, process_group
from llm2clip_plugin.vision.directory import fetch_directory
from llm2clip_plugin.vision.dual import DualConfig, DualEncoder
from llm2clip_plugin.vision.families import family_of
from llm2clip_plugin.vision.preprocessor import preprocessor_config
from llm2clip_plugin.vision.towers import load_tower

PENALTIES = tuple(10.0**power for power in range(-6, 3))  # tried for the linear probe
HELD_OUT = 5  # one in five clusters of the training images chooses the penalty
QUERY_BLOCK = 1024  # test images whose similarities are held at once


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """kNN and linear probe on a tower's features. Usage: llm2clip evaluate probe TOWER --train DIR --test DIR.

    TOWER is anything that load_tower opens, so a tower can be held against the one that it was trained from. DIR
    holds a folder a class, or tars with .cls members; with --label FIELD it is captioned data and the field is the
    class.
    """

    tower: str  # tower directory, Hugging Face directory or Hub id
    train: str  # labelled images whose classes are known
    test: str  # labelled images to be told
    label: str = ""  # field of the samples' JSON that is the class, for captioned data
    cluster: str = ""  # field of the samples' JSON: drawn together in the bootstrap and held out together
    pool: Literal["pooled", "cls", "mean", "cls_mean"] = (
        "pooled"  # feature: the tower's own, CLS, mean of patches, both
    )
    k: int = 20  # neighbours that vote
    temperature: float = 0.07  # a neighbour's vote is exp(cosine similarity / temperature)
    linear: bool = True  # also the linear probe
    batch: int = 64  # images in one call of the tower
    workers: int = 0  # processes that decode images
    device: str = ""  # cpu, cuda, cuda:1 ...; "": the accelerator, if there is one
    json: str = ""  # write the metrics and every test image's hits here (a score file)


def main(argv: list[str]) -> int:
    """Parse, measure, print; rank 0 alone prints and writes."""
    words = list(argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--tower")
    config = tyro.cli(ProbeConfig, args=words, prog="llm2clip evaluate probe")
    with process_group() as (rank, world):
        scores = measure(config, all_ranks=world > 1)
        if rank == 0:
            show(config, scores)
    return 0


def measure(config: ProbeConfig, *, all_ranks: bool = False) -> ScoreFile:
    """Features of both sides, then both probes."""
    directory, device = fetch_directory(config.tower), choose_device(config.device)
    tower: Any = load_tower(directory)
    width = tower.config.hidden_size * (2 if config.pool == "cls_mean" else 1)
    encoder = (
        DualEncoder(tower, DualConfig(projection="none", projection_dim=width, pool=config.pool)).to(device).eval()
    )
    preparation = ImageConfig.from_preprocessor(preprocessor_config(directory))
    options = {"batch": config.batch, "workers": config.workers, "all_ranks": all_ranks}
    sides = [open_labelled(path, config.label, config.cluster) for path in (config.train, config.test)]
    train, test = (image_features(encoder.pool, side, preparation, device, **options) for side in sides)
    test_label_N, unseen = in_the_classes_of(sides[0], sides[1], test.label_N)
    hits = {"knn": knn(train, test.feature_ND, config.k, config.temperature) == test_label_N}
    if config.linear:
        hits["linear"] = linear_probe(train, test.feature_ND) == test_label_N
    scores = probe_scores(hits, test, sides[1].classes, unseen)
    provenance = {
        "weights_sha256": sha256_weights(weights) if (weights := directory / "model.safetensors").is_file() else "",
        "family": family_of(tower).name,
        "train": sha256_text("\n".join(train.keys)),
        "settings": {"pool": config.pool, "k": config.k, "temperature": config.temperature, "label": config.label},
        "versions": {"llm2clip-plugin": __version__, "torch": torch.__version__},
    }
    return ScoreFile(**{**vars(scores), "model": config.tower, "provenance": provenance})


def in_the_classes_of(train: LabelledImages, test: LabelledImages, label_N: Tensor) -> tuple[Tensor, list[str]]:
    """Test labels by the training side's numbers, -1 (never right) for a class that it lacks; and these classes."""
    number_of = {name: number for number, name in enumerate(train.classes)}
    renumbered_C = torch.tensor([number_of.get(name, -1) for name in test.classes])
    return renumbered_C[label_N], [name for name in test.classes if name not in number_of]


def knn(train: ImageFeatures, test_MD: Tensor, k: int, temperature: float) -> Tensor:
    """(M,) class of each test image: its k nearest training images vote exp(cosine / temperature).

    Source: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination (2018), section 3.4.
    """
    if k < 1 or temperature <= 0:
        raise ValueError(f"k {k} must be at least 1 and temperature {temperature} above 0")
    train_ND, label_N = F.normalize(train.feature_ND, dim=1), train.label_N
    classes, chosen = int(label_N.max()) + 1, []
    for block_bD in F.normalize(test_MD, dim=1).split(QUERY_BLOCK):
        near_bk, place_bk = (block_bD @ train_ND.T).topk(min(k, len(train_ND)), dim=1)
        vote_bk = ((near_bk - near_bk[:, :1]) / temperature).exp()  # relative to the nearest: no overflow
        chosen.append(torch.zeros(len(block_bD), classes).scatter_add_(1, label_N[place_bk], vote_bk).argmax(1))
    return torch.cat(chosen)


def linear_probe(train: ImageFeatures, test_MD: Tensor, penalties: Sequence[float] = PENALTIES) -> Tensor:
    """(M,) class of each test image by multinomial logistic regression on standardised features.

    The L2 penalty is the one that is best on one in five of the training clusters; then all of them are fitted.
    """
    mean_D, std_D = train.feature_ND.mean(0), train.feature_ND.std(0, correction=0).clamp(min=1e-6)
    feature_ND, test_MD = (train.feature_ND - mean_D) / std_D, (test_MD - mean_D) / std_D
    held_N = torch.tensor([int(sha256_text(cluster)[:8], 16) % HELD_OUT == 0 for cluster in train.clusters])
    classes, best = int(train.label_N.max()) + 1, penalties[0]
    if len(penalties) > 1 and 0 < int(held_N.sum()) < len(held_N):
        scored = []
        for penalty in penalties:
            fitted = fit_logistic(feature_ND[~held_N], train.label_N[~held_N], classes, penalty)
            scored.append(float((predict(fitted, feature_ND[held_N]) == train.label_N[held_N]).float().mean()))
        ties = [place for place, score in enumerate(scored) if score == max(scored)]
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
    """(N,) most likely class."""
    return (F.pad(feature_ND, (0, 1), value=1.0) @ weight).argmax(1)


def probe_scores(hits: dict[str, Tensor], test: ImageFeatures, classes: Sequence[str], unseen: list[str]) -> ScoreFile:
    """Accuracy and mean recall a class of each probe; an item a test image, its score the first probe's hit."""
    metrics: dict[str, float] = {}
    for name, hit_N in hits.items():
        metrics[name] = float(hit_N.double().mean())
        present = torch.unique(test.label_N)
        recalls = torch.stack([hit_N[test.label_N == label].double().mean() for label in present])
        metrics[f"{name}_mean_per_class"] = float(recalls.mean())
    first = next(iter(hits.values())).double().tolist()
    items = [
        {"id": key, "score": first[row], "cluster": test.clusters[row], "part": classes[int(test.label_N[row])]}
        | {name: float(hit_N[row]) for name, hit_N in hits.items()}
        for row, key in enumerate(test.keys)
    ]
    counts = {"images": len(items), "left_out": len(test.broken), "unseen_classes": len(unseen)}
    notes = [f"left out: {error}" for error in test.broken]
    if unseen:
        notes.append(
            f"no training image has these classes, so their test images count as wrong: {', '.join(unseen[:10])}"
        )
    return ScoreFile(benchmark="probe", metrics=metrics, items=items, counts=counts, notes=notes)


def show(config: ProbeConfig, scores: ScoreFile) -> None:
    """Print each probe with its interval, and write the score file if asked."""
    print(f"{config.tower}: {scores.counts['images']} images of {config.test}, told by those of {config.train}")
    clusters = [item["cluster"] for item in scores.items]
    for name, value in scores.metrics.items():
        extra = ""
        if not name.endswith("_mean_per_class"):
            interval = bootstrap_mean([item[name] for item in scores.items], clusters)
            extra = f"  [{100 * interval.low:.2f}, {100 * interval.high:.2f}]"
        print(f"{name:22} {100 * value:6.2f} %{extra}")
    for note in scores.notes[:10]:
        print(note)
    if config.json:
        print(f"wrote {scores.write(config.json)}")
