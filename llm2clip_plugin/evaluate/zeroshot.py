"""``llm2clip evaluate zeroshot``: classification by class names, each embedded as the mean of several prompts.

Shapes: N images, C classes, D projection dimension.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.contracts import ScoreFile, atomic_file
from llm2clip_plugin.evaluate.class_prompts import class_vectors, prompt_source, read_class_names, read_templates
from llm2clip_plugin.evaluate.command_line import (
    dataset_name,
    on_all_ranks,
    open_tower,
    print_scores,
    tower_provenance,
    write_scores,
)
from llm2clip_plugin.evaluate.image_features import ImageFeatures, image_features
from llm2clip_plugin.evaluate.labeled_images import open_labeled_images
from llm2clip_plugin.evaluate.options.zeroshot import COMMAND, ZeroShotConfig
from llm2clip_plugin.evaluate.rank_counting import rank_both
from llm2clip_plugin.evaluate.teacher import Teacher


def main(argv: list[str]) -> int:
    """``llm2clip evaluate zeroshot TOWER DATA``."""
    config = COMMAND.parse(argv)
    return on_all_ranks(lambda all_ranks: measure(config, all_ranks=all_ranks), lambda scores: report(config, scores))


def measure(config: ZeroShotConfig, *, all_ranks: bool = False) -> ScoreFile:
    """Embed the prompts and the images, and classify each image as the nearest class."""
    labeled = open_labeled_images(config.data, config.label)
    names = read_class_names(config.classes, config.data, labeled.classes)
    prompts = prompt_source(names, read_templates(config.templates, config.data), config.data)
    tower = open_tower(config.tower, config.device)
    teacher = Teacher(tower.dual.card, config.teacher, tower.device)
    cache = teacher.cache(prompts, Path(config.cache) if config.cache else None, all_ranks=all_ranks)
    class_CD = class_vectors(tower.dual, prompts, cache, all_ranks=all_ranks)
    options = {"batch": config.batch, "workers": config.workers, "all_ranks": all_ranks}
    features = image_features(tower.dual.encode_image, labeled, tower.images, tower.device, **options)
    return dataclasses.replace(
        classification_scores(features, class_CD, names),
        benchmark=f"zeroshot:{dataset_name(config.data)}",
        model=config.tower,
        provenance=tower_provenance(tower.dual, teacher=cache.fingerprint, prompts=prompts.name),
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


def clip_benchmark_json(config: ZeroShotConfig, scores: ScoreFile) -> str:
    """The scores in CLIP_benchmark's file format, for its tables."""
    body = {
        "dataset": scores.benchmark.partition(":")[2],
        "model": "llm2clip",
        "pretrained": config.tower,
        "task": "zeroshot_classification",
        "metrics": {name: scores.metrics.get(name) for name in ("acc1", "acc5", "mean_per_class_recall")},
        "language": "en",
    }
    return json.dumps(body) + "\n"


def report(config: ZeroShotConfig, scores: ScoreFile) -> None:
    """Print the metrics with the interval of acc1, and write the files that were requested."""
    print(f"{config.tower} on {config.data}: {scores.counts['images']} images, {scores.counts['classes']} classes")
    print_scores(scores, {"acc1": "score"})
    write_scores(scores, config.json)
    if config.clip_benchmark:
        with atomic_file(config.clip_benchmark) as temporary:
            temporary.write_text(clip_benchmark_json(config, scores), encoding="utf-8")
        print(f"wrote {config.clip_benchmark}")
