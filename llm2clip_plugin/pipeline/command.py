"""``llm2clip run DATA --llm LLM --tower TOWER --output DIR``: every stage in order, resumed by the same command."""

from __future__ import annotations

import itertools
import json
import shlex
import sys
import time
from pathlib import Path

from llm2clip_plugin.commands import command
from llm2clip_plugin.contracts import atomic_file
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.interrupt import attend
from llm2clip_plugin.pipeline.estimate import survey
from llm2clip_plugin.pipeline.options import COMMAND
from llm2clip_plugin.pipeline.page import write_page
from llm2clip_plugin.pipeline.stages import Stage, plan

RECORD = "pipeline.json"  # in the output: stage -> its words and seconds, of those that are complete


def main(argv: list[str]) -> int:
    """Run what is not complete yet; the exit status of the stage that failed, 128 + N after signal N, else 0."""
    config = COMMAND.parse(argv)
    source, out = open_source(config), Path(config.output)
    found = survey(source)
    stages = plan(config, source, found)
    record = complete(stages, out / RECORD)
    print(f"{config.path}: {found.samples:,} images, {found.captions:.3g} captions each")
    if found.note and config.stage1 and not config.adapter:
        print(f"note: {found.note}")
    for number, stage in enumerate(stages, 1):
        state = "complete" if stage.name in record else ""
        print(f"{number:3} {state:>8}  {stage.name}: {shlex.join(stage.words)}")
    todo = [stage for stage in stages if stage.name not in record]
    print(f"{len(todo)} of {len(stages)} stages to run")
    if config.dry_run:
        return 0
    for stage in todo:
        print(f"\n[{stages.index(stage) + 1}/{len(stages)}] {stage.name}: {shlex.join(stage.words)}", flush=True)
        begin = time.monotonic()
        status = attend(stage.argv)
        if status or not stage.result.exists():
            print(f"stopped in {stage.name!r}; rerun the same command to resume", file=sys.stderr)
            return status or 1
        record[stage.name] = {"words": list(stage.words), "seconds": round(time.monotonic() - begin, 1)}
        with atomic_file(out / RECORD) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    page = write_page(config, source, stages, {name: saved["seconds"] for name, saved in record.items()})
    print(f"\n{page}: scores, queries won and lost, with pictures")
    print(f"tower: {out / 'tower'}; in LLaVA: {command('use', out / 'tower', '--name', out.name)}")
    return 0


def complete(stages: list[Stage], path: Path) -> dict[str, dict]:
    """The record of the stages that are complete: all before it are, its words are the same, its result exists."""
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def is_complete(stage: Stage) -> bool:
        return saved.get(stage.name, {}).get("words") == list(stage.words) and stage.result.exists()

    return {stage.name: saved[stage.name] for stage in itertools.takewhile(is_complete, stages)}
