"""``llm2clip evaluate zeroshot``: classes told by their names alone, each the mean of several prompts.

Shapes: N images, C classes, P prompts of a class, D joint width, W width of a teacher embedding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor

from llm2clip_plugin import __version__
from llm2clip_plugin.bootstrap import bootstrap_mean
from llm2clip_plugin.contracts import ScoreFile, canonical_json, sha256_text, whole_file
from llm2clip_plugin.data.cache.reader import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.sources.records import Caption
from llm2clip_plugin.evaluate.classes import open_labelled, prompt, read_class_names, read_templates
from llm2clip_plugin.evaluate.embedding import Dual, encode_texts
from llm2clip_plugin.evaluate.features import ImageFeatures, image_features
from llm2clip_plugin.evaluate.in_memory_source import InMemorySource, Row
from llm2clip_plugin.evaluate.pairing import rank_both
from llm2clip_plugin.evaluate.teacher import Teacher
from llm2clip_plugin.text.settings import EncoderConfig
from llm2clip_plugin.train.distributed import choose_device, gather_objects, group_of, process_group
from llm2clip_plugin.vision.directory import fetch_directory
from llm2clip_plugin.vision.dual import load_dual_encoder
from llm2clip_plugin.vision.preprocessor import preprocessor_config


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig:
    """Zero-shot classification. Usage: llm2clip evaluate zeroshot TOWER_DIR --data DIR [--classes FILE] [options].

    DIR holds a folder a class (as ImageNet), or WebDataset tars with .cls members (as CLIP_benchmark, whose
    classnames.txt and zeroshot_classification_templates.txt are found by themselves); or captioned data with --label.
    """

    tower: str  # tower directory or Hub id, with a text adapter
    data: str  # labelled images
    label: str = ""  # field of the samples' JSON that is the class, for captioned data
    classes: str = ""  # file of names: one a line in the classes' order, CLASS<TAB>NAME, or JSON; "": found, or folders
    templates: str = ""  # file of prompts, one a line, {c} in the place of the class; "": "a photo of a {c}."
    cache: str = ""  # folder of the prompts' embeddings; "": embeddings-<fingerprint> in the data's folder
    teacher: EncoderConfig = field(default_factory=EncoderConfig)  # the tower's LLM, for prompts not cached yet
    batch: int = 64  # images in one call of the tower
    workers: int = 0  # processes that decode images
    device: str = ""  # cpu, cuda, cuda:1 ...; "": the accelerator, if there is one
    json: str = ""  # write the metrics and every image's hit here (a score file)
    clip_benchmark: str = ""  # write the metrics here as CLIP_benchmark does


def main(argv: list[str]) -> int:
    """Parse, measure, print; rank 0 alone prints and writes."""
    words = list(argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--tower")
    config = tyro.cli(ZeroShotConfig, args=words, prog="llm2clip evaluate zeroshot")
    with process_group() as (rank, world):
        scores = measure(config, all_ranks=world > 1)
        if rank == 0:
            show(config, scores)
    return 0


def measure(config: ZeroShotConfig, *, all_ranks: bool = False) -> ScoreFile:
    """Prompts through the teacher and the adapter, images through the tower, accuracy."""
    directory, device = fetch_directory(config.tower), choose_device(config.device)
    images = open_labelled(config.data, config.label)
    names = read_class_names(config.classes, config.data, images.classes)
    prompts = prompt_source(names, read_templates(config.templates, config.data), config.data)
    dual = load_dual_encoder(directory).to(device)
    teacher = Teacher(dual.card, config.teacher, device)
    cache = teacher.cache(prompts, Path(config.cache) if config.cache else None, all_ranks=all_ranks)
    class_CD = class_vectors(dual, prompts, cache, all_ranks=all_ranks)
    preparation = ImageConfig.from_preprocessor(preprocessor_config(directory))
    options = {"batch": config.batch, "workers": config.workers, "all_ranks": all_ranks}
    found = image_features(dual.encode_image, images, preparation, device, **options)
    scores = classification_scores(found, class_CD, names)
    provenance = {
        "weights_sha256": dual.card.weights_sha256,
        "adapter_sha256": dual.card.adapter_sha256,
        "teacher": cache.fingerprint,
        "prompts": prompts.name,
        "versions": {"llm2clip-plugin": __version__, "torch": torch.__version__},
    }
    name = config.data.rstrip("/").rpartition("/")[2]
    return ScoreFile(
        **{**vars(scores), "benchmark": f"zeroshot:{name}", "model": config.tower, "provenance": provenance}
    )


def prompt_source(names: Sequence[str], templates: Sequence[str], data: str) -> InMemorySource:
    """A data set without images: a class is a sample, its prompts are the captions; named by what they say."""
    prompts = [[prompt(template, name) for template in templates] for name in names]
    digest = sha256_text(canonical_json(prompts))[:12]
    rows = [
        Row(f"{number:05d}", None, tuple(Caption(text, "prompt") for text in texts))
        for number, texts in enumerate(prompts)
    ]
    folder = Path(data) if Path(data).is_dir() else Path(data).parent
    return InMemorySource(f"prompts-{digest}", folder, rows)


def class_vectors(dual: Dual, prompts: InMemorySource, cache: EmbeddingCache, *, all_ranks: bool = False) -> Tensor:
    """(C, D): the mean of each class's normalised prompts, normalised again (Radford et al. 2021, section 3.1.4)."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if all_ranks else (0, 1)
    mine: dict[int, Tensor] = {}
    with torch.no_grad():
        for number in range(rank, len(prompts), world):
            key, captions = prompts.captions(number)
            teacher_PW = cache.rows(*prompts.locate(number), captions, key=key)
            mine[number] = F.normalize(encode_texts(dual, teacher_PW).mean(0), dim=0)
    every = {number: row for part in gather_objects(mine, group_of(all_ranks)) for number, row in part.items()}
    return torch.stack([every[number] for number in range(len(prompts))])


def classification_scores(found: ImageFeatures, class_CD: Tensor, names: Sequence[str]) -> ScoreFile:
    """acc1, acc5 (from five classes on) and mean_per_class_recall; classes of equal score share the credit."""
    image_ND = F.normalize(found.feature_ND, dim=1)
    ranks, _ = rank_both(image_ND, class_CD, found.label_N, torch.arange(len(class_CD)))
    top1_N = ranks.hits(1)
    metrics = {"acc1": float(top1_N.mean())}
    if len(class_CD) >= 5:
        metrics["acc5"] = float(ranks.hits(5).mean())
    present = torch.unique(found.label_N)
    metrics["mean_per_class_recall"] = float(torch.stack([top1_N[found.label_N == c].mean() for c in present]).mean())
    items = [
        {"id": key, "score": hit, "cluster": cluster, "part": names[label]}
        for key, hit, cluster, label in zip(
            found.keys, top1_N.tolist(), found.clusters, found.label_N.tolist(), strict=True
        )
    ]
    counts = {"images": len(items), "classes": len(class_CD), "left_out": len(found.broken)}
    notes = [f"left out: {error}" for error in found.broken]
    return ScoreFile(benchmark="", metrics=metrics, items=items, counts=counts, notes=notes)


def clip_benchmark_json(config: ZeroShotConfig, scores: ScoreFile) -> str:
    """The result in the form of CLIP_benchmark's files, so that its tables read it."""
    metrics = {"acc1": scores.metrics["acc1"], "acc5": scores.metrics.get("acc5")}
    body = {
        "dataset": scores.benchmark.partition(":")[2],
        "model": "llm2clip",
        "pretrained": config.tower,
        "task": "zeroshot_classification",
        "metrics": metrics | {"mean_per_class_recall": scores.metrics["mean_per_class_recall"]},
        "language": "en",
    }
    return json.dumps(body) + "\n"


def show(config: ZeroShotConfig, scores: ScoreFile) -> None:
    """Print the metrics with the interval of acc1, and write what was asked for."""
    interval = bootstrap_mean([item["score"] for item in scores.items], [item["cluster"] for item in scores.items])
    print(f"{config.tower} on {config.data}: {scores.counts['images']} images, {scores.counts['classes']} classes")
    for name, value in scores.metrics.items():
        extra = f"  [{100 * interval.low:.2f}, {100 * interval.high:.2f}]" if name == "acc1" else ""
        print(f"{name:22} {100 * value:6.2f} %{extra}")
    for note in scores.notes[:10]:
        print(note)
    if config.json:
        print(f"wrote {scores.write(config.json)}")
    if config.clip_benchmark:
        with whole_file(config.clip_benchmark) as aside:
            aside.write_text(clip_benchmark_json(config, scores), encoding="utf-8")
        print(f"wrote {config.clip_benchmark}")
