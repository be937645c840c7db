"""``llm2clip run``: all stages of one training in order, resumed by the same command, and a page
about it."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from llm2clip_plugin.data.sources import Source, open_source
from llm2clip_plugin.options import command
from llm2clip_plugin.outside import without_queries
from llm2clip_plugin.run_folder import started_by
from llm2clip_plugin.signals import attend
from llm2clip_plugin.stages.pipeline_config import RUN, PipelineConfig
from llm2clip_plugin.stages.rerun import RunFolder, Stage
from llm2clip_plugin.stages.run_checks import check_given, check_places, check_split
from llm2clip_plugin.stages.run_page import PAGE, write_page
from llm2clip_plugin.stages.run_plan import SEVERAL, SPLIT_STAGE, movable, plan, survey
from llm2clip_plugin.text.reading import read_reading, summary
from llm2clip_plugin.train.guard import locked


def main(argv: list[str]) -> int:
    """Run what is not complete yet; the exit status of the stage that failed, 128 + N after signal
    N, else 0."""
    config = RUN.parse(argv)
    check_given(config)
    source = open_source(config)
    pairs = pairs_of_stage_1(config, source)
    stages = plan(config, source, pairs)
    check_places(config, stages)
    folder = RunFolder(Path(config.output), movable(config, source))
    folder.refuse_foreign(stages)
    stale = folder.stale(stages)
    if SPLIT_STAGE in stale:
        check_split(config, source)
    print(f"{without_queries(config.path)}: {len(source):,} images")
    show_reading(config, fine_tuned=bool(pairs))
    show(stages, stale)
    if config.dry_run:
        return 0
    with locked(Path(config.output)):
        folder.clean()
        for number, stage in enumerate(stages, 1):
            status = run_stage(folder, stage, f"[{number}/{len(stages)}]", stages, argv)
            if status:
                return status
        seconds = {
            name: saved["seconds"] for name, saved in folder.record.stages.items()
        }
        page = write_page(config, source, stages, seconds)
        for stage, why in folder.stale(
            stages
        ).items():  # it changed while later stages ran
            print(
                f"warning: {stage!r} is out of date: {why}; rerun the same command",
                file=sys.stderr,
            )
    print(f"\n{page}: scores, queries won and lost, with pictures")
    tower = Path(config.output) / "tower"
    print(
        f"tower: {tower}; in LLaVA: {command('use', tower, '--name', Path(config.output).name)}"
    )
    return 0


def show_reading(config: PipelineConfig, *, fine_tuned: bool) -> None:
    """Print how the LLM is read, if --reading says so. ``fine_tuned``: by stage 1."""
    if config.reading:
        card = read_reading(config.reading, config.llm)
        print(f"{config.reading}: {summary(card, fine_tuned=fine_tuned)}")


def pairs_of_stage_1(config: PipelineConfig, source: Source) -> str:
    """How stage 1 pairs captions; "" if it is left out, which is said unless it was asked for.
    ValueError for --stage1 on images without several captions."""
    pairs, why_not = survey(source)
    if config.adapter or config.stage1 is False:
        return ""
    if config.stage1 is True and not pairs:
        raise ValueError(
            f"--stage1: {SEVERAL}; name more caption fields with --fields, or omit --stage1"
        )
    if config.preset:
        why_not = "--preset is for an LLM that is fine-tuned already"
    if config.stage1 is True or not why_not:
        return pairs
    advice = "name more caption fields with --fields"
    if pairs:
        advice = "--stage1 runs it all the same"
    print(
        f"note: stage 1 is left out: {why_not}; {advice}, --no-stage1 omits this note"
    )
    return ""


def show(stages: Sequence[Stage], stale: Mapping[str, str]) -> None:
    """Print all stages, and why the first ones of those that were complete run again."""
    for number, stage in enumerate(stages, 1):
        state = "" if stage.name in stale else "complete"
        print(f"{number:3} {state:>8}  {stage.name}: {shlex.join(stage.words)}")
    said = {""}
    for name, why in stale.items():
        if why not in said:  # one change may touch several stages
            said.add(why)
            print(f"stage {name!r} runs again: {why}")
    print(f"{len(stale)} of {len(stages)} stages to run")


def run_stage(
    folder: RunFolder,
    stage: Stage,
    position: str,
    stages: Sequence[Stage],
    argv: list[str],
) -> int:
    """Run a stage unless it is complete; its exit status, 1 if it made nothing."""
    if folder.why(stage) is None:
        return 0
    more = folder.begin(
        stage, [other.name for other in stages], started_by("run", argv)
    )
    (folder.out / PAGE).unlink(missing_ok=True)  # of the results before
    print(f"\n{position} {stage.name}: {shlex.join([*stage.words, *more])}", flush=True)
    begin = time.monotonic()
    status = attend(stage.argv(more))
    if status or not all(artifact.files() for artifact in stage.makes):
        print(
            f"stopped in {stage.name!r}; rerun the same command to resume",
            file=sys.stderr,
        )
        return status or 1
    folder.end(stage, time.monotonic() - begin)
    return 0
