"""What the commands of ``llm2clip evaluate`` share: options, the tower, the ranks, provenance and the output."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO, TypeVar

import torch
from rich.console import Console

from llm2clip_plugin import __version__
from llm2clip_plugin.bootstrap import bootstrap_mean
from llm2clip_plugin.contracts import ScoreFile, TowerCard
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.phases import phase
from llm2clip_plugin.text.teacher import load_dual_encoder
from llm2clip_plugin.train.distributed import choose_device
from llm2clip_plugin.train.watchdog import watched_group
from llm2clip_plugin.vision.directory import fetch_directory
from llm2clip_plugin.vision.dual import LoadedDualEncoder
from llm2clip_plugin.vision.preprocessor import preprocessor_config

Result = TypeVar("Result")

NOTES_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class OpenedTower:
    """A dual encoder on its device, and how its images are preprocessed."""

    dual: LoadedDualEncoder
    images: ImageConfig
    device: torch.device


def open_tower(tower: str, device: str) -> OpenedTower:
    """Load a tower directory or Hub id that has a text adapter; ``device`` "" is the accelerator, if there is one.

    Raises ValueError with the command for a baseline if it has none.
    """
    directory, chosen = fetch_directory(tower), choose_device(device)
    is_card = (directory / TowerCard.FILE).is_file()
    if is_card and not TowerCard.read(directory / TowerCard.FILE).projection_dim:
        raise ValueError(
            f"{tower} has no projection and text adapter to compare images with captions; fit them on it, frozen: "
            f"llm2clip train-tower DATA --tower {shlex.quote(tower)} --num-train-epochs 0 --output runs/baseline"
        )
    images = ImageConfig.from_preprocessor(preprocessor_config(directory))
    return OpenedTower(dual=load_dual_encoder(directory).to(chosen), images=images, device=chosen)


def on_all_ranks(measure: Callable[[bool], Result], report: Callable[[Result], None]) -> int:
    """``measure(all_ranks)`` on every rank of the launcher, then ``report`` on rank 0; the exit status."""
    with watched_group() as (rank, world), phase("evaluation"):
        result = measure(world > 1)
        if rank == 0:
            report(result)
    return 0


def provenance(**values: Any) -> dict[str, Any]:
    """``values`` and the versions of what measured."""
    return values | {"versions": {"llm2clip-plugin": __version__, "torch": torch.__version__}}


def tower_provenance(dual: LoadedDualEncoder, **values: Any) -> dict[str, Any]:
    """`provenance` with the hashes of a dual encoder's weights."""
    card = dual.card
    precision = {"precision": card.training["precision"]} if "precision" in card.training else {}
    return provenance(weights_sha256=card.weights_sha256, adapter_sha256=card.adapter_sha256, **precision, **values)


def dataset_name(path: str) -> str:
    """The last part of a path or URL."""
    return path.rstrip("/").rpartition("/")[2]


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


def write_scores(scores: ScoreFile, path: str, *, file: TextIO | None = None) -> None:
    """Write a score file and print its path to ``file`` (stdout by default); nothing for path ""."""
    if path:
        print(f"wrote {scores.write(path)}", file=file)


def wide_console() -> Console:
    """Standard output; in a log or a pipe with lines that are long enough for any table."""
    return Console(width=None if sys.stdout.isatty() else 200)
