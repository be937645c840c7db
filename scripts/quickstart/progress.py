"""The line that the quickstart shows while it works: the stage, its steps and their rate, and the
time left. progress.sh starts it, with any Python, because the first stage makes the environment.

    progress.py --folder LOGS --stage 2 --log LOGS/03-stage-1.log [--repeat] ...

LOGS/plan.tsv has a line for each stage: its name, the seconds that do not depend on the speed of
matrix products, the seconds of the rest at 100 GFLOPS, how many progress bars its log has, and how
often each of their units comes again at no cost. LOGS/took.tsv has the finished stages of this run
with their seconds.

The time left starts from the speed of matrix products, which this machine measures in its first
minute (models.json). Every step that is done corrects it, of this stage and of later ones.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

GFLOPS = 100  # of the seconds in the plan
UNMEASURED = 200.0  # GFLOPS until they are measured: of two cores
LINE_EVERY = 30  # seconds, where stderr is not a terminal
BAR = 20  # characters
# a line of a progress bar (llm2clip_plugin/progress.py), or of miniature.sh
STEPS = re.compile(r"(train|embed|LLaVA \w+): +(\d+)/(\d+) (\w+)")
SKIPPED = (
    0.2  # a stage that takes less of its expected time was finished by an earlier run
)


class Stage(NamedTuple):
    """A stage of the plan."""

    name: str
    fixed: float  # seconds that do not depend on the speed of matrix products
    work: float  # seconds of the rest at 100 GFLOPS
    bars: int  # progress bars in its log, which move at the same time; 0: none
    repeats: int  # only the first of so many units cost time, as styles with the same captions

    def seconds(self, gflops: float, fraction: float = 1.0) -> float:
        """How long a fraction of the stage should take; the fixed part comes first."""
        return self.fixed + fraction * self.work * GFLOPS / gflops


class Steps(NamedTuple):
    """How far the progress bars of a stage are."""

    done: int
    total: int
    unit: str
    fraction: float


def read_plan(folder: Path) -> list[Stage]:
    """The stages of plan.tsv."""
    stages = []
    for line in (folder / "plan.tsv").read_text(encoding="utf-8").splitlines():
        name, fixed, work, bars, repeats = line.split("\t")
        stages.append(Stage(name, float(fixed), float(work), int(bars), int(repeats)))
    return stages


def read_took(folder: Path) -> dict[int, float]:
    """Number of a finished stage -> its seconds in this run."""
    took = {}
    for line in (folder / "took.tsv").read_text(encoding="utf-8").splitlines():
        number, seconds = line.split("\t")
        took[int(number)] = float(seconds)
    return took


def read_steps(text: str, stage: Stage) -> Steps | None:
    """The last state of each progress bar in a log; None before the first one. Bars are told apart
    by their label and their total; one that has not begun counts as 0."""
    bars: dict[tuple[str, int], int] = {}
    found = STEPS.findall(text)
    for label, done, total, _ in found:
        bars[label, int(total)] = int(done)
    if not bars or not stage.bars:
        return None
    *_, unit = found[-1]
    done_units = 0
    all_units = 0
    fractions = 0.0
    for (_, total), done in bars.items():
        needed = -(-total // stage.repeats)
        done_units += min(done, needed)
        all_units += needed
        fractions += min(done, needed) / needed
    return Steps(done_units, all_units, unit, fractions / max(stage.bars, len(bars)))


def measured_gflops(record: Path) -> float:
    """What this machine measured for the precision that is used; a guess before that."""
    if record.is_file():
        return float(json.loads(record.read_text(encoding="utf-8"))["gflops"])
    return UNMEASURED


def seconds_left(
    plan: Sequence[Stage],
    took: Mapping[int, float],
    number: int,
    elapsed: float,
    fraction: float,
    gflops: float,
) -> float:
    """Seconds until the run ends. ``elapsed``: seconds of the stage ``number``, of which
    ``fraction`` of the steps are done. Stages without matrix products say nothing about the speed
    of the others."""
    stage = plan[number]
    expected = 0.0
    measured = 0.0
    for finished, seconds in took.items():
        of_plan = plan[finished].seconds(gflops)
        if plan[finished].work and seconds > SKIPPED * of_plan:
            expected += of_plan
            measured += seconds
    own = 1.0
    if fraction:
        of_plan = stage.seconds(gflops, fraction)
        own = elapsed / of_plan
        expected += of_plan
        measured += elapsed
    speed = measured / expected if expected else 1.0
    later = sum(one.seconds(gflops) for one in plan[number + 1 :])
    if fraction:
        # the more of its steps are done, the more they say
        mixed = fraction * own + (1 - fraction) * speed
        here = (1 - fraction) * stage.work * GFLOPS / gflops * mixed
    else:
        here = stage.seconds(gflops) * speed - elapsed
    return max(here, 0.0) + later * speed


def in_words(seconds: float) -> str:
    """The time left, in steps of ten seconds below three minutes."""
    if seconds >= 175:
        return f"about {round(seconds / 60)} min left"
    return f"about {max(10, 10 * round(seconds / 10))} s left"


def bar_of(steps: Steps | None, rate: float) -> str:
    """A bar with its steps, and their rate in steps a second, 0 if unknown."""
    if not steps:
        return ""
    full = int(steps.fraction * BAR)
    text = f"[{'#' * full}{'-' * (BAR - full)}] {steps.done}/{steps.total} {steps.unit}"
    if rate >= 1:
        text += f", {rate:.1f} a second"
    elif rate:
        text += f", {1 / rate:.1f} s each"
    return text + "  "


class Display:
    """One stage's line. Between two states of its bars, the time left counts down."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.plan = read_plan(options.folder)
        self.took = read_took(options.folder)
        self._steps: Steps | None = None
        self._first: tuple[float, int] | None = None  # when, and steps done
        self._rate = 0.0
        self._left = 0.0
        self._changed_at = -1.0

    def line(self, now: float) -> str:
        """``now``: time.time()."""
        stage = self.plan[self.options.stage]
        steps = read_steps(self._log(), stage)
        if steps != self._steps or self._changed_at < 0 or not steps:
            self._see(steps, now)
        left = self._left - (now - self._changed_at)
        elapsed = now - self.options.run_began
        return (
            f"[{self.options.stage + 1}/{len(self.plan)}] {stage.name:<50} "
            f"{bar_of(steps, self._rate)}"
            f"{int(elapsed / 60)}:{int(elapsed % 60):02} elapsed, {in_words(left)}"
        )

    def _see(self, steps: Steps | None, now: float) -> None:
        """Take a new state of the bars into account."""
        self._steps = steps
        self._changed_at = now
        if steps:
            if self._first is None:
                self._first = (now, steps.done)
            began, done = self._first
            if steps.done > done:
                self._rate = (steps.done - done) / (now - began)
        self._left = seconds_left(
            self.plan,
            self.took,
            self.options.stage,
            now - self.options.began,
            steps.fraction if steps else 0.0,
            measured_gflops(self.options.speed),
        )

    def _log(self) -> str:
        printed = self.options.log.read_bytes()[self.options.log_start :]
        return printed.decode(errors="replace")


def repeat(display: Display, running: Path, shell: int) -> None:
    """Show the line while there is the file ``running`` and the shell lives: on a terminal every
    second in place, else every 30 seconds."""
    terminal = sys.stderr.isatty()
    shown = time.time()
    while True:
        time.sleep(1)
        if not running.exists():
            return
        try:
            os.kill(shell, 0)
        except ProcessLookupError:
            return
        line = display.line(time.time())
        if terminal:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        elif time.time() - shown >= LINE_EVERY:
            shown += LINE_EVERY
            print(line, file=sys.stderr, flush=True)


def parse_options() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="LOGS")
    parser.add_argument("--stage", type=int, required=True, help="its number, from 0")
    parser.add_argument("--log", type=Path, required=True, help="what the stage prints")
    parser.add_argument(
        "--log-start", type=int, default=0, help="bytes of earlier runs"
    )
    parser.add_argument("--speed", type=Path, required=True, help="models.json")
    parser.add_argument(
        "--began", type=float, required=True, help="time of the stage's begin"
    )
    parser.add_argument(
        "--run-began", type=float, required=True, help="time of the run's begin"
    )
    parser.add_argument(
        "--running", type=Path, help="file that the stage's end deletes"
    )
    parser.add_argument("--shell", type=int, default=0, help="process of the script")
    return parser.parse_args()


if __name__ == "__main__":
    options = parse_options()
    display = Display(options)
    if options.running:
        repeat(display, options.running, options.shell)
    else:
        print(display.line(time.time()))
