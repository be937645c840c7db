"""``llm2clip evaluate``: retrieval recall of a tower on data whose captions are cached, or on
benchmarks by name.

And what the commands that measure share: the tower and its teacher, ranks, output.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from llm2clip_plugin import __version__
from llm2clip_plugin.bootstrap import Interval, interval_of_hits
from llm2clip_plugin.contracts import CacheManifest, ScoreFile
from llm2clip_plugin.data.cache import EmbeddingCache, differences, stored_teacher
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.remote import public_name
from llm2clip_plugin.data.sources import Source, check_fields, open_source
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.evaluate.config import EVALUATE, EvaluateConfig
from llm2clip_plugin.evaluate.features import embed_pairs
from llm2clip_plugin.evaluate.retrieval import (
    ALL,
    RetrievalReport,
    check_measurable,
    evaluate_retrieval,
)
from llm2clip_plugin.evaluate.suites import Suite, select_suites, suites
from llm2clip_plugin.hashes import canonical_json, sha256_text
from llm2clip_plugin.outside import printable, without_queries
from llm2clip_plugin.progress import phase
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.embed import embed_source, suite_cache_folder
from llm2clip_plugin.text.teacher import TeacherLLM, load_dual_encoder
from llm2clip_plugin.text.verify import renew_cache
from llm2clip_plugin.train.distributed import (
    choose_device,
    gather_objects,
    group_of,
    on_first_rank,
    rank,
    world_size,
)
from llm2clip_plugin.train.guard import watched_group
from llm2clip_plugin.vision.directory import fetch_directory
from llm2clip_plugin.vision.dual import LoadedDualEncoder
from llm2clip_plugin.vision.towers import preprocessor_config

FIRST = "i2t_r1", "t2i_r1"  # what the paper reports


def main(argv: list[str]) -> int:
    """``llm2clip evaluate TOWER DATA``; with ``--suite`` the benchmarks by name."""
    config = EVALUATE.parse(argv)
    if config.suite:
        return main_suites(config)

    def measure(all_ranks: bool) -> ScoreFile:
        tower, report = measure_pairs(config, all_ranks=all_ranks)
        facts = {
            "teacher": tower.dual.card.teacher,
            "data": without_queries(config.data.path),
            "data_sha256": report.data_sha256(),
            "group": config.retrieval.group or "none",
        }
        return dataclasses.replace(
            report.scores(),
            benchmark=f"retrieval:{public_name(config.data.path)}",
            model=config.tower,
            provenance=provenance(tower.dual, **facts),
        )

    def report(scores: ScoreFile) -> None:
        clusters = len({item["cluster"] for item in scores.items})
        caption = f"i2t: image to text; ties count half; [95 % interval] over {clusters} clusters"
        title = f"{config.tower} on {without_queries(config.data.path)}"
        print_scores(title, scores, intervals(scores), caption)
        write_scores(scores, config.json)

    return on_all_ranks(measure, report)


def measure_pairs(
    config: EvaluateConfig, *, all_ranks: bool = False
) -> tuple[OpenedTower, RetrievalReport]:
    """Open the tower, the data and the cache, embed captions that it lacks, and measure."""
    source = open_source(config.data)
    check_fields(source)
    on_first_rank(lambda: check_measurable(source, config.retrieval))
    tower = open_tower(config.tower, config.device, config.teacher)
    cache = tower.cache(source, config.cache, all_ranks=all_ranks)
    return tower, evaluate_retrieval(
        tower.dual, source, cache, tower.images, config.retrieval, all_ranks=all_ranks
    )


def intervals(scores: ScoreFile) -> dict[str, Interval]:
    """Of recall at the first k in every part and direction, by the metric's name."""
    queries: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for item in scores.items:
        recalls = [key for key in item if key.startswith("r")]
        metric = f"{item['side']}_{recalls[0]}"
        if item["part"] != ALL:
            metric = f"{item['part']}/{metric}"
        queries[metric].append(item)
    by_metric: dict[str, Interval] = {}
    for name, items in queries.items():
        hits = [item["score"] for item in items]
        clusters = [item["cluster"] for item in items]
        by_metric[name] = interval_of_hits(hits, clusters)
    return by_metric


def main_suites(config: EvaluateConfig) -> int:
    """Measure the suites whose files exist; 0 unless there is none."""
    selected = select_suites(config.suite)
    root = Path(config.data.path)
    missing = [line for suite in selected for line in suite.missing(root)]
    ready = [suite for suite in selected if not suite.missing(root)]
    if not ready:
        raise FileNotFoundError("\n".join(missing))

    def report(results: dict[str, ScoreFile]) -> None:
        all_suites = suites().values()
        for title in dict.fromkeys(suite.table for suite in all_suites if suite.table):
            columns = [suite for suite in all_suites if suite.table == title]
            if any(suite.name in results for suite in columns):
                print_paper_table(title, columns, config.tower, results)
        for name, scores in results.items():
            print_scores(name, scores, {})
        for line in missing:
            print(f"skipped {line}", file=sys.stderr)

    return on_all_ranks(partial(measure_suites, config, ready), report)


def measure_suites(
    config: EvaluateConfig, ready: list[Suite], all_ranks: bool
) -> dict[str, ScoreFile]:
    """The score file of each suite: read if its provenance is the same, else measured and written
    by rank 0."""
    tower = open_tower(config.tower, config.device, config.teacher)
    root = Path(config.data.path)
    output = root / f"scores-{tower.dual.card.weights_sha256[:12]}"
    if config.json:
        output = Path(config.json)
    settings = dataclasses.asdict(config.retrieval) | {"batch": 0, "workers": 0}
    settings = json.loads(json.dumps(settings))  # tuples are lists in the file
    preprocessing = json.loads(json.dumps(dataclasses.asdict(tower.images)))
    results = {}
    for suite in ready:
        source = suite.open(root)
        cache = tower.cache(source, all_ranks=all_ranks)
        captions = cache.manifest.shards[suite.name]["rows_sha256"]
        stamps = on_first_rank(source.file_stamps)
        facts = {
            "teacher": cache.fingerprint,
            "captions_sha256": captions,
            # sizes and times
            "image_files_sha256": sha256_text(canonical_json(stamps)),
            "preprocessing": preprocessing,
            "settings": settings,
        }
        # everything that decides the scores
        origin = provenance(tower.dual, **facts)
        path = output / f"{suite.name}.scores.json"
        if not config.overwrite and path.is_file():
            existing = ScoreFile.read(path)
            if existing.provenance == origin:
                results[suite.name] = existing
                continue
        chosen = config.retrieval
        if not suite.choose:
            chosen = dataclasses.replace(chosen, kinds=(), languages=())
        pairs = embed_pairs(
            tower.dual, source, cache, tower.images, chosen, all_ranks=all_ranks
        )
        scores = suite.measure(pairs, chosen, all_ranks=all_ranks, device=tower.device)
        notes = list(scores.notes)
        if suite.images and scores.counts["images"] != suite.images:
            notes.append(
                f"{scores.counts['images']} images, the published test set has {suite.images}"
            )
        results[suite.name] = dataclasses.replace(
            scores,
            benchmark=f"retrieval:{suite.name}",
            model=config.tower,
            provenance=origin,
            notes=notes,
        )
        if rank(group_of(all_ranks)) == 0:
            results[suite.name].write(path)
    return results


def print_paper_table(
    title: str, columns: Sequence[Suite], model: str, results: Mapping[str, ScoreFile]
) -> None:
    """R@1 image->text / text->image in percent: the paper's rows, then ours with the half-widths of
    its intervals."""
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for suite in columns:
        for tower, scores in suite.paper.items():
            rows[f"{tower} (paper, {suite.paper_source})"][suite.name] = _pair(*scores)
    ours = rows[f"{public_name(model)} (measured)"]
    half = rows["95 % interval, ±"]
    for suite in columns:
        if (scores := results.get(suite.name)) is None:
            ours[suite.name] = "not measured"
            continue
        percent = [100 * scores.metrics[name] for name in FIRST]
        ours[suite.name] = _pair(*percent)
        if f"{ALL}/{FIRST[0]}" not in scores.metrics:  # a mean over languages has none
            interval_of = intervals(scores)
            widths = [interval_of[name].high - interval_of[name].low for name in FIRST]
            half_widths = [50 * width for width in widths]  # percent
            half[suite.name] = _pair(*half_widths)
    caption = "R@1 image->text / text->image, percent; the paper's rows are single runs"
    print_table(title, rows, caption)


def _pair(i2t: float, t2i: float) -> str:
    return f"{i2t:.1f} / {t2i:.1f}"


# What the commands that measure share.

Result = TypeVar("Result")

NOTES_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class OpenedTower:
    """A dual encoder on its device, how its images are preprocessed, and the LLM that its card
    names."""

    dual: LoadedDualEncoder
    images: ImageConfig
    device: torch.device
    teacher: TeacherLLM

    def cache(
        self, source: Source, directory: str | Path = "", *, all_ranks: bool = False
    ) -> EmbeddingCache:
        """The cache of ``source``: opened if it is complete, otherwise embedded now, by all ranks
        together.

        ``directory``: by default ``embeddings-<fingerprint>`` in the source's folder. A complete
        one is taken as it is if the card names no teacher. Raises ContractError if the LLM is not
        the tower's teacher or the directory belongs to another one; FileNotFoundError without the
        LLM.
        """
        teacher = self.teacher
        on_first_rank(teacher.check_given)
        identity = teacher.identity or (
            None if directory and not teacher.config.llm else teacher.encoder.identity()
        )
        folder = Path(
            directory or suite_cache_folder(source.path, teacher.known_identity)
        )
        if identity is not None and (folder / CacheManifest.FILE).is_file():
            theirs = stored_teacher(folder / CacheManifest.FILE)
            if not theirs.agrees_with(identity):
                problem = f"the cache {folder} was not created with the tower's teacher"
                raise ContractError(
                    f"{problem}: {differences(vars(theirs), identity)}; choose another --cache"
                )
            if theirs.is_earlier and not identity.is_earlier:
                on_first_rank(lambda: renew_cache(source, teacher.encoder, folder))

        def opened() -> EmbeddingCache:
            cache = EmbeddingCache.open(folder, expect_width=teacher.llm_width or None)
            cache.check(source)
            return cache

        def is_complete() -> bool:
            with suppress(
                FileNotFoundError, ContractError
            ):  # embedding redoes what is incomplete
                return opened() is not None
            return False

        if not on_first_rank(is_complete):
            number = rank(group_of(all_ranks))
            ranks = world_size(group_of(all_ranks))
            embed_source(
                source,
                teacher.encoder,
                folder,
                rank=number,
                world=ranks,
                quiet=number != 0,
            )
            gather_objects(None, group_of(all_ranks))  # all have embedded
        return opened()


def open_tower(tower: str, device: str, llm: EncoderConfig) -> OpenedTower:
    """Load a tower directory or Hub id that has a text adapter; ``device`` "" is the accelerator,
    if there is one.

    ``llm``: the teacher, if it is not where the card says. Raises ValueError for a tower alone.
    """
    directory = fetch_directory(tower)
    chosen = choose_device(device)
    images = ImageConfig.from_preprocessor(preprocessor_config(directory))
    dual = load_dual_encoder(directory)
    return OpenedTower(
        dual=dual.to(chosen),
        images=images,
        device=chosen,
        teacher=TeacherLLM(dual.card, llm, chosen),
    )


def on_all_ranks(
    measure: Callable[[bool], Result], report: Callable[[Result], None]
) -> int:
    """``measure(all_ranks)`` on every rank of the launcher, then ``report`` on rank 0; the exit
    status."""
    with watched_group() as (rank, world), phase("evaluation"):
        result = measure(world > 1)
        if rank == 0:
            report(result)
    return 0


def provenance(dual: LoadedDualEncoder | None = None, **values: Any) -> dict[str, Any]:
    """``values``, the hashes of a dual encoder's weights, and the versions of what measured."""
    if dual is not None:
        card = dual.card
        training = dual.card.training
        precision = (
            {"precision": training["precision"]} if "precision" in training else {}
        )
        values = (
            {
                "weights_sha256": card.weights_sha256,
                "adapter_sha256": card.adapter_sha256,
            }
            | precision
            | values
        )
    return values | {
        "versions": {"llm2clip-plugin": __version__, "torch": torch.__version__}
    }


def write_scores(scores: ScoreFile, path: str) -> None:
    """Write a score file and print its path; nothing for path ""."""
    if path:
        print(f"wrote {scores.write(path)}")


def print_table(
    title: str, rows: Mapping[str, Mapping[str, str]], caption: str
) -> None:
    """Named rows, and one column for each key of theirs."""
    columns: list[str] = []
    for row in rows.values():
        columns += [column for column in row if column not in columns]
    lines = [["", *columns]]
    for name, row in rows.items():
        cells = [row.get(column, "") for column in columns]
        lines.append([name, *cells])
    widths: list[int] = []
    for column in zip(*lines, strict=True):
        widths.append(max(len(cell) for cell in column))
    print(f"\n{title}")
    for name, *cells in lines:
        aligned = [name.ljust(widths[0])]
        for cell, width in zip(cells, widths[1:], strict=True):
            aligned.append(cell.rjust(width))
        print("  ".join(aligned).rstrip())
    print(caption)


def print_scores(
    title: str, scores: ScoreFile, intervals: Mapping[str, Interval], caption: str = ""
) -> None:
    """Every metric in percent, with its interval if it has one: one row per part, one column per
    metric; and notes."""
    rows: dict[str, dict[str, str]] = {}
    for name, value in scores.metrics.items():
        part, _, metric = name.rpartition("/")
        cell = f"{100 * value:.1f}"
        if interval := intervals.get(name):
            low = 100 * interval.low
            high = 100 * interval.high
            cell += f" [{low:.1f}, {high:.1f}]"
        row = rows.setdefault(part, {})
        row[metric] = cell
    first = "headline" if ALL in rows else ALL
    named_rows = {part or first: row for part, row in rows.items()}
    counts = [f"{number} {name}" for name, number in scores.counts.items()]
    notes = ["percent", ", ".join(counts), caption]
    print_table(title, named_rows, "; ".join(note for note in notes if note))
    for note in scores.notes[:NOTES_SHOWN]:
        print(printable(note))
