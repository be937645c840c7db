"""``llm2clip evaluate``: retrieval recall of a tower directory on a data set whose captions are cached."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro

from llm2clip_plugin import __version__
from llm2clip_plugin.contracts import ContractError, ScoreFile, TeacherIdentity, TowerCard
from llm2clip_plugin.data.cache.reader import EmbeddingCache, differences
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.sources.open import SourceConfig, open_source
from llm2clip_plugin.data.sources.shards import data_folder
from llm2clip_plugin.evaluate.measure import RetrievalConfig, RetrievalReport, evaluate_retrieval
from llm2clip_plugin.evaluate.tables import print_retrieval
from llm2clip_plugin.train.distributed import choose_device, process_group
from llm2clip_plugin.vision.directory import fetch_directory
from llm2clip_plugin.vision.dual import load_dual_encoder
from llm2clip_plugin.vision.preprocessor import preprocessor_config


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Retrieval recall of a tower. Usage: llm2clip evaluate TOWER_DIR --data PATH [--cache DIR] [options].

    Under torchrun or the deepspeed launcher all ranks share the work. Benchmarks by name (flickr30k, coco, docci,
    sugarcrepe ...): llm2clip evaluate TOWER_DIR --suite paper --root DIR; see llm2clip evaluate --suite all --help.
    """

    tower: str  # tower directory or Hub id, with a text adapter
    data: SourceConfig  # captioned images
    cache: str = ""  # the teacher's embeddings of the captions; "": embeddings-<fingerprint> in the data's folder
    retrieval: Annotated[RetrievalConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=RetrievalConfig)
    any_teacher: bool = False  # allow the cache of another teacher than the tower was trained against
    device: str = ""  # cpu, cuda, cuda:1 ...; "": the accelerator, if there is one
    resamples: int = 2000  # bootstrap resamples of the intervals; 0: no intervals
    json: str = ""  # write the metrics and every query's hits here (a score file)


def main(argv: list[str]) -> int:
    """Parse, measure, print; rank 0 alone prints and writes."""
    if any(word == "--suite" or word.startswith("--suite=") for word in argv):
        from llm2clip_plugin.evaluate.suite_command import main as suites

        return suites(argv)
    config = parse(argv)
    with process_group() as (rank, world):
        report = evaluate_directory(config, all_ranks=world > 1)
        if rank == 0:
            intervals = report.intervals(config.resamples) if config.resamples else {}
            print_retrieval(report, intervals, title=f"{config.tower} on {config.data.path}")
            if config.json:
                print(f"wrote {score_file(config, report).write(config.json)}")
    return 0


def parse(argv: list[str]) -> EvaluateConfig:
    """The configuration; the tower may stand first, and ``--data`` stands for ``--data.path``."""
    words = ["--data.path" if word == "--data" else word.replace("--data=", "--data.path=", 1) for word in argv]
    if words and not words[0].startswith("-"):
        words.insert(0, "--tower")
    return tyro.cli(EvaluateConfig, args=words, prog="llm2clip evaluate")


def evaluate_directory(config: EvaluateConfig, *, all_ranks: bool = False) -> RetrievalReport:
    """Load the tower and the cache, hold them against each other and the data, measure.

    Raises FileNotFoundError, ContractError (another teacher, another data set) or ValueError.
    """
    directory = fetch_directory(config.tower)
    dual = load_dual_encoder(directory).to(choose_device(config.device))
    source = open_source(config.data)
    cache = open_cache(dual.card, config.cache, source.path, any_teacher=config.any_teacher)
    cache.check(source)
    images = ImageConfig.from_preprocessor(preprocessor_config(directory))
    return evaluate_retrieval(dual, source, cache, images, config.retrieval, all_ranks=all_ranks)


def open_cache(card: TowerCard, directory: str, data_path: str, *, any_teacher: bool = False) -> EmbeddingCache:
    """The cache of the tower's own teacher, of the width that its adapter takes.

    Raises ContractError for another teacher (unless ``any_teacher``) or width, FileNotFoundError without a cache.
    """
    teacher = TeacherIdentity(**card.teacher) if card.teacher else None
    if not directory:
        if teacher is None:
            raise ValueError("the tower's card names no teacher, so there is no default cache; say --cache DIR")
        directory = str(data_folder(data_path) / f"embeddings-{teacher.fingerprint[:12]}")
    if not (Path(directory) / "manifest.json").is_file():
        llm = teacher.llm if teacher else "LLM"
        raise FileNotFoundError(f"no embedding cache at {directory}; make it: llm2clip embed {data_path} --llm {llm}")
    cache = EmbeddingCache.open(directory, expect_width=int(card.dual.get("llm_width", 0)) or None)
    if teacher is not None and cache.fingerprint != teacher.fingerprint and not any_teacher:
        raise ContractError(
            f"{directory} is the cache of another teacher than the tower's: "
            f"{differences(cache.manifest.teacher, teacher)} (fingerprints {cache.fingerprint[:12]} and "
            f"{teacher.fingerprint[:12]}); embed with the tower's teacher, "
            "or pass --any-teacher to measure it all the same"
        )
    return cache


def score_file(config: EvaluateConfig, report: RetrievalReport) -> ScoreFile:
    """The report as a record that `llm2clip compare` reads."""
    card = TowerCard.read(fetch_directory(config.tower) / TowerCard.FILE)
    return ScoreFile(
        benchmark=f"retrieval:{config.data.path.rstrip('/').rpartition('/')[2]}",
        metrics=report.metrics(),
        items=report.items(),
        counts=report.counts,
        model=config.tower,
        provenance={
            "weights_sha256": card.weights_sha256,
            "adapter_sha256": card.adapter_sha256,
            "teacher": card.teacher,
            "data": config.data.path,
            "ties": config.retrieval.ties,
            "group": config.retrieval.group,
            "versions": {"llm2clip-plugin": __version__, "torch": torch.__version__},
        },
        notes=[f"left out: {error}" for error in report.pairs.broken],
    )
