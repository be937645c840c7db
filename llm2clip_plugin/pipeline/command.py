"""``llm2clip run DATA --llm LLM --tower TOWER --output DIR``: every stage in order, resumed by the same command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from llm2clip_plugin import cli
from llm2clip_plugin.commands import command
from llm2clip_plugin.contracts import atomic_file
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.pipeline.options import COMMAND
from llm2clip_plugin.pipeline.page import write_page
from llm2clip_plugin.pipeline.stages import Stage, plan, survey

RECORD = "pipeline.json"  # in the output: stage -> its words and seconds, of those that are complete
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(argv: list[str]) -> int:
    """Run what is not complete yet; the exit status of the stage that failed, 128 + N after signal N, else 0."""
    config = COMMAND.parse(argv)
    source = open_source(config)
    found = survey(source)
    stages = plan(config, source, found)
    record = Record(Path(config.output) / RECORD, stages)
    todo = [stage for stage in stages if not record.has(stage)]
    print(f"{config.path}: {found.samples:,} images, {found.captions:.3g} captions each")
    if found.note and config.stage1 and not config.adapter:
        print(f"note: {found.note}")
    for number, stage in enumerate(stages, 1):
        state = duration(stage.seconds) if stage in todo else "complete"
        print(f"{number:3} {state:>9}  {stage.name}: {command(*stage.words)}")
    total = sum(stage.seconds for stage in todo)
    print(f"about {duration(total)} for {len(todo)} of {len(stages)} stages, estimated from the models' sizes")
    if config.dry_run:
        return 0
    for stage in todo:
        print(f"\n[{stages.index(stage) + 1}/{len(stages)}] {stage.name}: {command(*stage.words)}", flush=True)
        begin = time.monotonic()
        words = ["-m", "llm2clip_plugin.cli", *stage.words]
        if config.num_gpus > 1:
            words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={config.num_gpus}", *words]
        if status := perform(words) if stage.apart else cli.main(list(stage.words)):
            print(f"stopped in {stage.name!r}; rerun the same command to resume", file=sys.stderr)
            return status
        record.add(stage, time.monotonic() - begin)
    name = Path(config.output).name
    page = write_page(config, source, stages, record.seconds())
    print(f"\n{page}: curves, queries won and lost, with pictures")
    print(f"tower: {stages[-1].result.parent}; in LLaVA: {command('use', stages[-1].result.parent, '--name', name)}")
    return 0


class Record:
    """Which stages are complete, and with which words."""

    def __init__(self, path: Path, stages: list[Stage]) -> None:
        self.path = path
        body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self._done: dict[str, dict[str, Any]] = {}
        for stage in stages:  # a stage counts if all before it do
            saved = body.get(stage.name, {})
            if saved.get("words") != list(stage.words) or not stage.result.exists():
                break
            self._done[stage.name] = saved

    def has(self, stage: Stage) -> bool:
        """Whether the stage is complete."""
        return stage.name in self._done

    def add(self, stage: Stage, seconds: float) -> None:
        """Record a stage. Raises FileNotFoundError if it left no result."""
        if not stage.result.exists():
            raise FileNotFoundError(f"{stage.name!r} ended without {stage.result}; rerun the same command to resume")
        self._done[stage.name] = {"words": list(stage.words), "seconds": round(seconds, 1)}
        with atomic_file(self.path) as temporary:
            temporary.write_text(json.dumps(self._done, indent=2) + "\n", encoding="utf-8")

    def seconds(self) -> dict[str, float]:
        """How long each complete stage took."""
        return {name: saved["seconds"] for name, saved in self._done.items()}


def perform(words: list[str]) -> int:
    """``python WORDS`` to its end, with the signals that this process gets; its exit status, 128 + N after signal N."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number != signal.SIGINT:  # Ctrl-C reaches the whole group
            process.send_signal(number)

    sys.stdout.flush()
    process = subprocess.Popen([sys.executable, *words])
    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + received[0] if received else status


def duration(seconds: float) -> str:
    """``2:05 min``, ``1:04 h``."""
    if seconds < 1:
        return "seconds"
    hours, minutes = divmod(round(max(seconds, 60) / 60), 60)
    return f"{hours}:{minutes:02d} h" if hours else f"{tqdm.format_interval(seconds)} min"
