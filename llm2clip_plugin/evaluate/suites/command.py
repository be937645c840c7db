"""``llm2clip evaluate TOWER_DIR --suite NAMES --root DIR``: benchmarks by name, and the paper's tables beside ours."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from llm2clip_plugin import __version__
from llm2clip_plugin.contracts import ScoreFile, TowerCard
from llm2clip_plugin.data.cache.reader import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.evaluate.distributed import choose_device, process_group
from llm2clip_plugin.evaluate.measure import RetrievalConfig
from llm2clip_plugin.evaluate.suites.registry import Suite, chosen
from llm2clip_plugin.evaluate.suites.run import run_suite
from llm2clip_plugin.evaluate.suites.tables import print_suites
from llm2clip_plugin.evaluate.teacher import Teacher
from llm2clip_plugin.text.settings import EncoderConfig
from llm2clip_plugin.vision.dual import load_dual_encoder
from llm2clip_plugin.vision.towers import fetch_directory, preprocessor_config


@dataclass(frozen=True, kw_only=True)
class SuitesConfig:
    """Benchmarks by name. Usage: llm2clip evaluate TOWER_DIR --suite paper --root DIR [options].

    Suites: flickr30k, coco, sharegpt4v-1k, urban-1k, docci, flickr30k-cn, coco-cn, xm3600, sugarcrepe; `paper` stands
    for those of the paper's tables, `all` for all. Each has its folder below the root. What is missing is said, with
    where it is to be had; the others are measured. Captions are embedded once, into a cache in the suite's folder.
    """

    tower: str  # tower directory or Hub id, with a text adapter
    suite: str  # names, separated by commas
    root: str  # folder that holds a folder for each suite
    output: str = ""  # folder of the score files, one a suite; "": <root>/scores-<tower's hash>
    teacher: EncoderConfig = field(default_factory=EncoderConfig)  # the tower's LLM, for captions not cached yet
    retrieval: Annotated[RetrievalConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=RetrievalConfig)
    device: str = ""  # cpu, cuda, cuda:1 ...; "": the accelerator, if there is one
    resamples: int = 2000  # bootstrap resamples of the intervals; 0: no intervals
    overwrite: bool = False  # measure again what has a score file already


def main(argv: list[str]) -> int:
    """Parse, measure what is there, print; 0 unless nothing could be measured."""
    words = list(argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--tower")
    config = tyro.cli(SuitesConfig, args=words, prog="llm2clip evaluate")
    picked, root = chosen(config.suite), Path(config.root)
    missing = {suite.name: lines for suite in picked if (lines := suite.missing(root))}
    ready = [suite for suite in picked if suite.name not in missing]
    if not ready:
        raise FileNotFoundError("\n".join(line for lines in missing.values() for line in lines))
    with process_group() as (rank, world):
        results = measure(config, ready, all_ranks=world > 1, writes=rank == 0)
        if rank == 0:
            print_suites(config.tower, results, config.resamples)
            for line in (line for lines in missing.values() for line in lines):
                Console(stderr=True).print(f"left out: {line}", markup=False, soft_wrap=True)
    return 0


def measure(config: SuitesConfig, ready: list[Suite], *, all_ranks: bool, writes: bool) -> dict[str, ScoreFile]:
    """The score file of each suite: read if this very measurement was made before, else measured and written."""
    directory, device = fetch_directory(config.tower), choose_device(config.device)
    dual = load_dual_encoder(directory).to(device)
    teacher = Teacher(dual.card, config.teacher, device)
    images = ImageConfig.from_preprocessor(preprocessor_config(directory))
    output = Path(config.output) if config.output else Path(config.root) / f"scores-{dual.card.weights_sha256[:12]}"
    results = {}
    for suite in ready:
        source = suite.open(Path(config.root))
        cache = teacher.cache(source, all_ranks=all_ranks)
        provenance = provenance_of(config.retrieval, dual.card, cache, suite.name)
        path = output / f"{suite.name}.scores.json"
        if not config.overwrite and path.is_file() and (before := ScoreFile.read(path)).provenance == provenance:
            results[suite.name] = before
            continue
        scores = run_suite(suite, source, dual, cache, images, config.retrieval, all_ranks=all_ranks)
        results[suite.name] = dataclasses.replace(scores, model=config.tower, provenance=provenance)
        if writes:
            results[suite.name].write(path)
    return results


def provenance_of(config: RetrievalConfig, card: TowerCard, cache: EmbeddingCache, shard: str) -> dict[str, Any]:
    """Everything that decides the scores, but for the image files."""
    return {
        "weights_sha256": card.weights_sha256,
        "adapter_sha256": card.adapter_sha256,
        "teacher": cache.fingerprint,
        "captions_sha256": cache.manifest.shards[shard]["rows_sha256"],
        "settings": json.loads(json.dumps(dataclasses.asdict(config) | {"batch": 0, "workers": 0})),
        "versions": {"llm2clip-plugin": __version__, "torch": torch.__version__},
    }
