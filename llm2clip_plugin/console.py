"""What a process shows and how it is ended: the phase that a rank is in, progress bars, silenced
libraries, signals, pages.

Libraries are silenced by name and reason, where it applies, and never their errors: none is
imported for its silence.
"""

from __future__ import annotations

import base64
import io
import itertools
import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from llm2clip_plugin.processes import child_environment

if TYPE_CHECKING:
    from tqdm import tqdm


# What this rank is doing: the phase that messages name when it is late. Standard library only.

Value = TypeVar("Value")
CHECKPOINT = "checkpoint"  # the phase in which a rank that is to end gets more time


class Phase(NamedTuple):
    """What a rank does since when."""

    name: str
    step: int  # optimizer step, counted from 1; 0 before training
    # of phases begun: ranks that wait for each other are in phases of about the same number
    number: int
    since: float  # time.monotonic() of its begin, or of its last progress


_counter = itertools.count()
_now = Phase("start", 0, next(_counter), time.monotonic())


def current() -> Phase:
    """The phase that this process is in."""
    return _now


@contextmanager
def phase(name: str, *, step: int | None = None) -> Iterator[None]:
    """Name what the block, or the decorated function, does; every rank must begin the same phases
    in the same order. An exception leaves the phase as it is: messages say where it was raised."""
    global _now
    before = _now
    _now = Phase(name, before.step if step is None else step, next(_counter), time.monotonic())
    yield
    _now = Phase(before.name, _now.step, next(_counter), time.monotonic())


def each_in_phase(name: str, items: Iterator[Value], *, first_step: int) -> Iterator[Value]:
    """The items, one a step; waiting for each is a phase."""
    for step in itertools.count(first_step):
        with phase(name, step=step):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


# Progress bars: tqdm on stderr with rate and time left; where stderr is not a terminal, a line
# every ten seconds.

LINE_EVERY = 10.0  # seconds between lines where stderr is not a terminal
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
LINE = "{desc}: {n_fmt}/{total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left{postfix}"


class _Lines:
    """A file for tqdm that turns every redrawn bar into a line of stderr."""

    def write(self, text: str) -> None:
        if text := text.strip():  # tqdm starts a redraw with \r, and pads it with spaces
            print(text, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(
    *,
    total: int | None,
    label: str,
    unit: str,
    initial: int = 0,
    show: bool = True,
    delay: float = LINE_EVERY,
) -> tqdm:
    """A tqdm bar to be moved by ``update(count)`` and closed; it is a context manager. An update is
    a sign of progress.

    total: units of the whole job, None if unknown. initial: units done before. show: False for a
    silent bar, as on every rank but one. delay: seconds before the first line where stderr is not a
    terminal; a job that ends earlier prints none. With 0 the first and the last state are always
    printed.
    """
    from tqdm import tqdm

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            global _now
            _now = _now._replace(since=time.monotonic())
            return super().update(n)

    terminal = sys.stderr.isatty()
    return Bar(
        total=total,
        desc=label,
        unit=f" {unit}",
        initial=initial,
        disable=not show,
        bar_format=BAR if terminal else LINE,
        file=sys.stderr if terminal else _Lines(),
        mininterval=0.1 if terminal else LINE_EVERY,
        miniters=1,
        delay=0 if terminal else delay,
        dynamic_ncols=terminal,
    )


def track(
    iterable: Iterable[Value], *, total: int | None, label: str, unit: str, show: bool = True
) -> Iterator[Value]:
    """Yield from ``iterable`` under a bar that counts each item as one ``unit``; arguments as of
    ``progress_bar``."""
    with progress_bar(total=total, label=label, unit=unit, show=show) as bar:
        for item in iterable:
            yield item
            bar.update()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' bars ("Loading weights", "Writing model shards") and warnings. For
    loading and saving: we compare what was loaded with the file ourselves, and the bars last
    milliseconds."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def quiet_peft() -> None:
    """Silence peft about an attribute that transformers renamed."""
    warnings.filterwarnings(
        "ignore", message=r".*is_gradient_checkpointing.*", category=FutureWarning
    )


def quiet_deepspeed() -> None:
    """Silence DeepSpeed's informational log and the renamed functions of torch.distributed that it
    calls."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def _mute(logger: str, pattern: str) -> None:
    """Silence a logger's records whose message has the pattern."""
    logging.getLogger(logger).addFilter(lambda record: not re.search(pattern, record.getMessage()))


def quiet_libraries() -> None:
    """Silence what nobody can act on: DeepSpeed about a machine without a GPU, bitsandbytes about a
    kernel of the Hub, torch's DataLoader about more ``--workers`` than cores."""
    _mute("DeepSpeed", "Setting accelerator to CPU")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)


def quiet_llava_loading() -> None:
    """Silence transformers about a LLaVA checkpoint's copy of its tower, which LLaVA reads from the
    tower's own folder. Other weights that are not used, or not there, are still warned of. Bars are
    for terminals."""
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_utils").addFilter(_is_not_about_the_tower)


def _is_not_about_the_tower(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    # of transformers 5: a row per name, or per pattern of names, below a head
    if "LOAD REPORT" in text:
        return bool(
            re.search(
                r"^(?!Key |model\.vision_tower\.[^|]*\| UNEXPECTED)[^|\n]+\|", text, re.MULTILINE
            )
        )
    if "were not used when initializing Llava" not in text:
        return True
    names = re.findall(r"'([^']+)'", text.partition("\n")[0].partition("[")[2])
    return not all(name.startswith("model.vision_tower.") for name in names)


def quiet_llava() -> None:
    """Silence what LLaVA's training makes other libraries warn about: old names, memory that a
    machine without a GPU cannot pin, the LLM's type, a config without vocabulary for saved LoRA
    weights, DeepSpeed's own accumulation."""
    quiet_deepspeed()
    warnings.filterwarnings(
        "ignore", r".*gradient_checkpointing(_enable)?` is deprecated", FutureWarning
    )
    _mute("accelerate.accelerator", "Gradient accumulation steps mismatch")
    warnings.filterwarnings(
        "ignore", r"Passing the following arguments to `Accelerator` is deprecated", FutureWarning
    )
    warnings.filterwarnings(
        "ignore", r"'pin_memory' argument is set as true but no accelerator is found", UserWarning
    )
    warnings.filterwarnings(
        "ignore", r"Could not find a config file in .* vocabulary was not modified", UserWarning
    )
    _mute("transformers.configuration_utils", "to instantiate a model of type `?llava")


# A signal while a run loads ends it at once, as there is nothing to save. Standard library only.

ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
_loading = False
_waiting: threading.Thread | None = None


class Interrupted(KeyboardInterrupt):
    """SIGTERM, SIGHUP or Ctrl-C."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.status = 128 + number  # as a shell says it

    def __str__(self) -> str:
        name = signal.Signals(self.status - 128).name
        return (
            "interrupted"
            if name == "SIGINT"
            else f"{name}: ended before there was anything to save"
        )


@contextmanager
def interrupts_end_loading() -> Iterator[None]:
    """A signal of ENDING ends this process, until `loaded` is called or the block is left."""
    global _waiting, _loading
    _loading = True
    if _waiting is None and os.environ.get("WORLD_SIZE", "1") != "1":
        _waiting = threading.Thread(target=_wait, daemon=True)
        # threads that start from here on block them, too
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        _waiting.start()
    try:
        yield
    finally:
        loaded()


def is_loading() -> bool:
    """Whether there is nothing to save yet."""
    return _loading


def loaded() -> None:
    """From now on a signal is left to the handlers of Python: there is something to save. Called by
    the main thread."""
    global _waiting, _loading
    _loading = False
    thread = _waiting
    _waiting = None
    if thread is not None and thread.ident is not None:
        signal.pthread_kill(thread.ident, signal.SIGINT)
        thread.join()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def attend(words: list[str]) -> int:
    """Run a program, with the signals that this process gets; its exit status, 128 + N after signal
    N."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number != signal.SIGINT:  # Ctrl-C reaches the whole group
            process.send_signal(number)

    process = subprocess.Popen(words, env=child_environment())
    before = {number: signal.signal(number, forward) for number in ENDING}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + received[0] if received else status


def end_children() -> None:
    """Kill the processes that this one has started with multiprocessing; those of a loader ignore
    SIGTERM."""
    if "multiprocessing" in sys.modules:
        import multiprocessing

        if threading.current_thread() is threading.main_thread():
            # torch's handler raises an error for a loader that is killed
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in multiprocessing.active_children():
            child.kill()


def _wait() -> None:
    number = signal.sigwait(ENDING)
    if _waiting is threading.current_thread():
        ended = Interrupted(number)
        if os.environ.get("RANK", "0") == "0":
            line = "\n" if os.isatty(2) else ""
            os.write(2, f"{line}{ended}\n".encode())
        end_children()
        os._exit(ended.status)


# What ends a run early. Exit statuses: 0 done; 1 failed, a rerun may succeed; 2 wrong input; 3 a
# non-finite loss or gradient; 75 saved and stopped before the end, to be started again; 129, 130,
# 143 a signal before there was anything to save.


class SameOnAllRanksError(RuntimeError):
    """Raised on every rank with the same message, which rank 0 prints."""

    status = 1  # exit status
    label = "error: "  # before the message


class DisagreementError(SameOnAllRanksError):
    """The ranks differ in what they must have in common; the message names the values, hosts and
    ranks."""

    status = 2


class RankFailedError(SameOnAllRanksError):
    """Another rank has failed, and prints its error."""


class StoppedError(SameOnAllRanksError):
    """The run has saved and stopped before its end, as a signal requested; the same command resumes
    it."""

    # EX_TEMPFAIL: no error, try again; not 0, or `train-tower && export` would export a part of a
    # run
    status = 75
    label = ""


class NonFiniteLossError(SameOnAllRanksError):
    """The loss or the gradient of a batch is not a number, and the weights were not updated; raised
    on all ranks."""

    status = 3  # a rerun would meet the same batch

    def __init__(self, what: str, advice: str) -> None:
        """what: names the batch's samples."""
        super().__init__(
            f"{what}. The weights were not updated and the last checkpoint is unchanged; {advice}"
        )
        self.what = what


# of errors that a rerun would meet again
FINAL_STATUSES = (DisagreementError.status, NonFiniteLossError.status)


class FirstRankError(ValueError):
    """Raised on the other ranks when rank 0 has an error that a user can correct, and prints it."""


def lost_rank(error: RuntimeError) -> str:
    """The message for a collective that failed because another rank is gone; "" for any other
    error."""
    # torch raises a DistError for NCCL and the store, a plain RuntimeError for gloo
    if "gloo/" not in str(error) and not any(
        kind.__name__ == "DistError" for kind in type(error).__mro__
    ):
        return ""
    if "EADDRINUSE" in str(error):
        return (
            f"port {os.environ.get('MASTER_PORT')} is in use by another process; choose another "
            "with --master_port"
        )
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return (
        f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()} lost the connection to "
        f"another rank: {reason}. Look for the first error of the others, and rerun the same "
        "command: it resumes, on any number of ranks"
    )


# SIGHUP: the terminal or connection is gone; SIGUSR1: Slurm's warning before the time limit
STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """True once this rank has been requested to stop: by a signal, or as the `deepspeed` command
    that started it has ended. (On one node a SIGTERM ends that command without its ranks, which
    would train on in the background.)"""

    def __init__(self) -> None:
        import psutil  # of accelerate's

        self._gone = psutil.NoSuchProcess
        self.signals: list[int] = []
        # set by deepspeed.launcher.launch, whose parent is that command
        self._launcher = psutil.Process().parent() if "LOCAL_SIZE" in os.environ else None
        self._command = self._launcher.ppid() if self._launcher is not None else 0

    def __bool__(self) -> bool:
        return bool(self.signals) or self._launcher_ended()

    def _launcher_ended(self) -> bool:
        try:  # once a step; finding the launcher anew takes five times as long
            return self._launcher is not None and self._launcher.ppid() != self._command
        except self._gone:
            return True

    @property
    def reason(self) -> str:
        """The signal's name or another cause, for messages."""
        if self.signals:
            return signal.Signals(self.signals[0]).name
        return "the launcher ended" if self._launcher_ended() else "a signal on another rank"


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Record the signals of STOPPING and print a notice of the first instead of exiting; a second
    SIGINT raises KeyboardInterrupt. While the run is loading there is nothing to save, and a signal
    raises Interrupted."""
    request = StopRequest()
    owner = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        if is_loading() and os.getpid() == owner and number != signal.SIGUSR1:
            raise Interrupted(number)
        if number == signal.SIGINT and number in request.signals:
            raise KeyboardInterrupt
        request.signals.append(number)
        # loader processes are forked with this handler, and Slurm signals all processes of a step
        if (
            os.environ.get("RANK", "0") == "0"
            and os.getpid() == owner
            and len(request.signals) == 1
        ):
            # below the bar
            name = signal.Signals(number).name
            line = "\n" if os.isatty(2) else ""
            advice = "press Ctrl-C twice to stop now"
            os.write(2, f"{line}{name}: saving and stopping after this step; {advice}\n".encode())

    handled = [
        number
        for number in STOPPING
        if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP
    ]
    previous = {number: signal.signal(number, note) for number in handled}  # nohup ignores SIGHUP
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# Limits, versions, pages.


def raise_open_files() -> int:
    """Raise the soft limit of open files to the hard one; processes started from here inherit it.
    Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):  # macOS has a lower limit of its own
            return soft
    return hard if hard != resource.RLIM_INFINITY else sys.maxsize


def numbers(text: str) -> tuple[int, ...]:
    """``'2.13.0+cpu'`` -> (2, 13, 0), for comparison."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


# HTML pages from jinja2 templates. jinja2 comes with torch; it is imported for a page. Pictures are
# small JPEGs as data URIs, so that the page is one file and fetches nothing.

# pixels of the longer side; of the JPEG
SIDE = 256
QUALITY = 70


def page_style() -> str:
    """The CSS that every page of ours starts with: colors, also for dark screens, widths and
    headings."""
    return Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def render(template: Path, **values: object) -> str:
    """The text of a template file: every value is escaped (``markupsafe.Markup`` is not), an
    unknown name is an error. The template can include and extend the files in its folder."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(values)


def thumbnail(raw: bytes | None) -> str | None:
    """An image file's bytes as the data URI of a small JPEG; None if they are no picture."""
    if not raw:
        return None
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(raw)) as opened:
            opened.draft("RGB", (SIDE, SIDE))
            picture = opened.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return None
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
