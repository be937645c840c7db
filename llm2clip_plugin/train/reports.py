"""What a run says about its steps: the bar, metrics.jsonl, DeepSpeed's monitors; time by phase, over ranks, MFU."""

import json
import math
import re
import resource
import socket
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from llm2clip_plugin.console import progress_bar
from llm2clip_plugin.contracts import atomic_file
from llm2clip_plugin.files import FAILED, HEADS, LEFT_OUT, METRICS, STOPPED
from llm2clip_plugin.train.checkpoint import Checkpoints, TrainState
from llm2clip_plugin.train.config import TrainConfig
from llm2clip_plugin.train.distributed import gather_objects, gather_rows, on_first_rank, rank, world_size
from llm2clip_plugin.train.engine import Engine
from llm2clip_plugin.train.timing import STEP, CudaClock, HostClock, StepTimer, compare_ranks

PROFILE = "profile"  # folder of a run for traces
COMPARE_EVERY = 10  # steps at least between comparisons of ranks, each a collective
WARM_UP = 5  # steps before the traced ones, if the run has as many
OPERATORS = 10  # rows of a profile's table
SLOW_RANK = 1.2  # a rank that computes so much longer than the fastest one is named

# Values of a step that are labeled time/ for DeepSpeed's monitors; the others are train/, scores are eval/.
TIME_VALUES = {"samples_per_second", "wait_share", "peak_gib", "mfu", "tflops", "slowest_rank"}
TIME_PARTS = ("_seconds", "loader_")

_aten = torch.ops.aten
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # torch's counter lacks attention on CPUs
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}

# Name of a device -> dense TFLOP/s with fp32 accumulation, without sparsity: (bf16 and fp16, TF32, fp32); 0: none.
# Sources: the makers' data sheets and architecture white papers of each product. The first match counts.
PEAKS: tuple[tuple[str, tuple[float, float, float]], ...] = (
    (r"\bMIG\b|Laptop|Max-Q|4090 D\b|H100 NVL", (0, 0, 0)),  # a part of a GPU, or one with other clocks: unknown
    (r"\bGB200\b", (2500, 1250, 80)),
    (r"\bB200\b", (2250, 1125, 75)),
    (r"\bH100 PCIe\b", (756, 378, 51)),
    (r"\b(H100|H200|H800|GH200)\b", (989, 494, 67)),
    (r"\b(A100|A800)\b", (312, 156, 19.5)),
    (r"\bA10G\b", (70, 35, 35)),
    (r"\bRTX A6000\b", (154.8, 77.4, 38.7)),
    (r"\bL40S\b", (362, 183, 91.6)),
    (r"\bL4\b", (121, 60, 30.3)),
    (r"\bRTX 5090\b", (209.5, 104.8, 104.8)),
    (r"\bRTX 4090\b", (165.2, 82.6, 82.6)),
    (r"\bRTX 3090\b(?! Ti)", (71, 35.6, 35.6)),
    (r"\bMI(300X|325X)\b", (1307, 653.7, 163.4)),
    (r"\bV100-SXM", (125, 0, 15.7)),
)


class Reports:
    """The progress bar, metrics.jsonl and DeepSpeed's monitors: rank 0's, silent on the others.

    None of them ends a run: what cannot be written is said once. Every rank calls ``step`` for the same steps.
    """

    def __init__(
        self,
        engine: Engine,
        run_folder: Path,
        state: TrainState,
        train: TrainConfig,
        *,
        total_steps: int,
    ) -> None:
        """state: where training starts."""
        self.engine, self.run_folder = engine, run_folder
        self.total_steps, self.global_batch, self.logging_steps = total_steps, train.global_batch, train.logging_steps
        self._step = state.step  # the last one that was reported
        self._file: MetricsFile | None = None  # of rank 0
        on_first_rank(lambda: self._open(state))
        self.progress = Progress(total_steps, start=state.step, show=rank() == 0)
        self.timer = StepTimer(CudaClock() if engine.device.type == "cuda" else HostClock())
        self._line = self._compared = self.timer.totals()  # as of the last line, and of the last comparison of ranks
        self._flops: Counter[torch.dtype] | None = None  # of a step on this rank; counted by rank 0 alone
        remaining, steps = total_steps - state.step, train.profile_steps
        self._profiler: StepProfiler | None = None
        if min(steps, remaining) > 0 and (train.profile_all_ranks or rank() == 0):
            self._profiler = StepProfiler(run_folder / PROFILE, steps, remaining=remaining, note=self.note)
        self._hosts = gather_objects(socket.gethostname())
        self._failed = False

    def _open(self, state: TrainState) -> None:
        new = state.step == 0 and not state.before and Checkpoints(self.run_folder, keep=0).latest() is None
        self._file = MetricsFile(self.run_folder / METRICS, from_step=-1 if new else state.step)

    def __enter__(self) -> "Reports":
        self.timer.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.timer.__exit__(*error)
        if self._profiler is not None:
            self._profiler.close()
        if self._file is not None:
            self._attempt(self._file.close)
        self.progress.close()

    @contextmanager
    def count_flops(self) -> Iterator[None]:
        """Count those of a step, on rank 0, the first time."""
        if self._flops is not None or rank() > 0:
            yield
            return
        with count_model_flops() as flops:
            yield
        self._flops = flops

    def step(self, state: TrainState, seconds: float, values: dict[str, float], *, always: bool) -> None:
        """A finished step of ``seconds``; ``always``: write a line of it."""
        self._step = state.step
        if always or state.step % self.logging_steps == 0:
            values = values | self._speed(last=always)
            self._values(state, values)
        self.progress.advance(self.global_batch, seconds, values)
        if self._profiler is not None:
            self._profiler.step()

    def left_out(self, state: TrainState, allowed: int) -> None:
        """The last batch had no update; ``allowed``: as many as the run may leave out."""
        bad = state.bad_batches[-1]
        self.event({**bad, "event": LEFT_OUT})
        self.note(f"warning: {len(state.bad_batches)} of at most {allowed} bad batches left out: {bad['reason']}")

    def scores(self, state: TrainState, scores: dict[str, float]) -> None:
        """An evaluation, in ``state``."""
        self.progress.show_values(scores)
        self._values(state, scores, phase="eval")

    def heads(self, curve: Iterable[dict[str, float]]) -> None:
        """The fit of the heads before step 1, on lines of its own; its ``samples`` are the monitors' x."""
        for line in curve:
            self.event({"step": 0, "samples": 0, "event": HEADS, **{f"heads_{name}": x for name, x in line.items()}})
            if self._file is not None:
                numbers = {label(name, "heads"): x for name, x in line.items() if name not in ("step", "samples")}
                self._attempt(self.engine.report_at, numbers, int(line["samples"]))

    def failed(self, error: BaseException) -> None:
        """The run ends by an error, after the last step that was reported."""
        self._ended(FAILED, self._step, str(error) or type(error).__name__)

    def stopped(self, state: TrainState, reason: str) -> None:
        """The run stops before its end."""
        self._ended(STOPPED, state.step, reason)
        self.note(f"{reason}: saved step {state.step} of {self.total_steps}; rerun the same command to resume")

    def _ended(self, event: str, step: int, reason: str) -> None:
        """A line of metrics.jsonl that says why no more follow."""
        self.event({"step": step, "event": event, "reason": reason, "time": time.strftime("%Y-%m-%d %H:%M:%S")})

    def event(self, values: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if self._file is not None:
            self._attempt(self._file.write, values)

    def note(self, text: str) -> None:
        """A line above the bar."""
        self.progress.note(text)

    def _speed(self, *, last: bool) -> dict[str, Any]:
        """Time by phase and MFU of the mean step since the last line, ranks compared."""
        now = self.timer.totals(wait=last)
        mean = now.mean_since(self._line)
        self._line = now
        values: dict[str, Any] = {f"{name}_seconds": value for name, value in mean.items()}
        if mean and self._flops:
            values["tflops"] = sum(self._flops.values()) / mean[STEP] / 1e12
            least = least_seconds(self._flops, self.engine.device)
            values |= {"mfu": least / mean[STEP]} if least else {}
        if world_size() > 1 and (last or now.steps - self._compared.steps >= COMPARE_EVERY):
            values |= self._compare()
        return values

    def _compare(self) -> dict[str, Any]:
        """Smallest and largest over ranks of the mean step since the last comparison."""
        now = self.timer.totals(wait=True)
        mean = now.mean_since(self._compared)
        self._compared = now
        own = torch.tensor([[mean.get(name, math.nan) for name in (STEP, "data", "communication")]])
        return compare_ranks(gather_rows(own.to(self.engine.device)).tolist(), self._hosts)

    def _values(self, state: TrainState, values: dict[str, Any], *, phase: str = "train") -> None:
        self.event({"step": state.step, "samples": state.samples, **values})
        if self._file is not None:
            numbers = {label(name, phase): value for name, value in values.items() if not isinstance(value, str)}
            self._attempt(self.engine.report, numbers, state.samples)

    def _attempt(self, write: Callable[..., object], *values: object) -> None:
        try:
            write(*values)
        except OSError as error:  # metrics.jsonl keeps its lines in memory until the disk has space again
            if not self._failed:
                self.note(f"warning: cannot log to {self.run_folder}: {error}; training continues")
            self._failed = True


def label(name: str, phase: str) -> str:
    """What monitors call a value of ``phase`` (train, eval, heads): train/loss, time/data_seconds, eval/i2t_r1."""
    is_time = phase == "train" and (name in TIME_VALUES or any(part in name for part in TIME_PARTS))
    return f"{'time' if is_time else phase}/{name}"


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line, written by one rank."""

    def __init__(self, path: Path, *, from_step: int) -> None:
        """Drops the lines of steps after ``from_step``, which a killed run made after its last checkpoint."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= from_step]
            with atomic_file(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """Append one line and flush it."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _step_of(line: str) -> float:
    """The step of a line; infinity for a line that was cut short by a kill."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def peak_memory(device: torch.device) -> float:
    """Peak memory so far in GiB: of the accelerator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


class Progress:
    """A bar on stderr: steps, time left, loss, samples/s, held-out recall, peak memory. Silent unless ``show``."""

    def __init__(self, total_steps: int, *, start: int, show: bool) -> None:
        self.show = show = show and total_steps > 0  # heads alone have no steps
        self.values: dict[str, Any] = {}
        self.samples_per_second = 0.0  # smoothed
        self._bar = progress_bar(total=total_steps, label="train", unit="steps", initial=start, show=show, delay=0.0)

    def close(self) -> None:
        """Leave the last state on the terminal."""
        self._bar.close()

    def advance(self, samples: int, seconds: float, values: dict[str, Any]) -> None:
        """Show a finished step of ``samples`` pairs."""
        rate = samples / max(seconds, 1e-9)
        self.samples_per_second = 0.9 * (self.samples_per_second or rate) + 0.1 * rate
        self.values |= values
        self._bar.set_postfix_str(self.description(), refresh=False)
        self._bar.update()

    def show_values(self, values: dict[str, Any]) -> None:
        """Show values that came after the step, such as an evaluation's; the last state of the bar has them, too."""
        self.values |= values
        self._bar.set_postfix_str(self.description())

    def description(self) -> str:
        """``loss 3.21  72 samples/s  MFU 41 %  R@1 image->text 0.123, text->image 0.141  1.9 GiB memory  save 0.4 s``.

        TFLOP/s where the peak is unknown. data: fraction of the step spent waiting for it, from 5 % on. save: how long
        training waited for the last checkpoint. slow: a rank that computes at least 1.2 times as long as the fastest.
        """
        values = self.values
        parts = [f"loss {values['loss']:.4g}"] if "loss" in values else []
        parts.append(f"{self.samples_per_second:.3g} samples/s")
        if "mfu" in values:
            parts.append(f"MFU {100 * values['mfu']:.3g} %")
        elif "tflops" in values:
            parts.append(f"{values['tflops']:.3g} TFLOP/s")
        if values.get("wait_share", 0) >= 0.05:
            parts.append(f"waiting for data {100 * values['wait_share']:.0f} %")
        if "i2t_r1" in values:
            parts.append(f"R@1 image->text {values['i2t_r1']:.3f}, text->image {values['t2i_r1']:.3f}")
        if "peak_gib" in values:
            parts.append(f"{values['peak_gib']:.2f} GiB memory")
        if "save_seconds" in values:
            parts.append(f"save {values['save_seconds']:.1f} s")
        if values.get("busy_seconds_max", 0) > SLOW_RANK * values.get("busy_seconds_min", math.inf):
            parts.append(f"slow: rank {values['slowest_rank']} ({values['slowest_host']})")
        return "  ".join(parts)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        if self.show:
            self._bar.write(text, file=sys.stderr)


class StepProfiler:
    """Traces ``steps`` steps of this rank after a warm-up and writes them to ``folder``.

    ``HOST-rankN.TIME.pt.trace.json``: for chrome://tracing, ui.perfetto.dev, and TensorBoard's profiler plugin with
    ``folder`` as its log directory. ``operators-rankN.txt``: the operators with the most time of their own.
    """

    def __init__(self, folder: Path, steps: int, *, remaining: int, note: Callable[[str], object]) -> None:
        """remaining: steps that the run still makes; the trace has no more. note: called with where it was written."""
        self.folder, self.note = folder, note
        steps = min(steps, remaining)
        skipped = min(WARM_UP, remaining - steps)
        self._left = skipped + steps  # until the trace is complete
        warm = min(skipped, 1)  # in which the profiler itself warms up
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a run that has no step for that
            schedule = torch.profiler.schedule(skip_first=skipped - warm, wait=0, warmup=warm, active=steps, repeat=1)
            self._profile: Any = torch.profiler.profile(schedule=schedule, on_trace_ready=self._write)
            self._profile.start()

    def step(self) -> None:
        """A step has ended."""
        if self._profile is not None:
            self._profile.step()
            self._left -= 1
            if not self._left:
                self.close()

    def close(self) -> None:
        """Stop; what was traced of a run that ends early is written."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, profile: Any) -> None:
        table = self.folder / f"operators-rank{rank()}.txt"
        order = f"self_{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.profiler.tensorboard_trace_handler(str(self.folder), f"{socket.gethostname()}-rank{rank()}")(profile)
            with atomic_file(table) as temporary:
                temporary.write_text(profile.key_averages().table(sort_by=order, row_limit=OPERATORS), encoding="utf-8")
        except (OSError, RuntimeError) as error:
            self.note(f"warning: cannot write the profile to {self.folder}: {error}; training continues")
            return
        self.note(f"profile: trace in {self.folder} (chrome://tracing, TensorBoard), {OPERATORS} operators in {table}")


class ModelFlops(TorchDispatchMode):
    """Counts the FLOPs of matrix products, convolutions and attention under it, by the dtype that they run in.

    They are those that the model needs, one forward and one backward pass over each sample (Chowdhery et al. 2022,
    PaLM, arXiv 2204.02311, appendix B): what is computed again (gradient checkpointing, the first pass of gradient
    caching) does not count.
    """

    supports_higher_order_operators = True  # passed through, not counted

    def __init__(self) -> None:
        super().__init__()
        self.by_dtype: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(getattr(func, "_overloadpacket", func))
        if formula is not None and not _repeated and not _recomputing():
            dtype = next((value.dtype for value in args if isinstance(value, Tensor)), torch.float32)
            self.by_dtype[dtype] += formula(*args, **(kwargs or {}), out_val=out)
        return out


_repeated = False


@contextmanager
def repeated() -> Iterator[None]:
    """What the block computes is computed again later, and counted then."""
    global _repeated
    _repeated = True
    try:
        yield
    finally:
        _repeated = False


def _recomputing() -> bool:
    """Whether gradient checkpointing is computing a block again, in the backward pass."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "unpack_hook" and frame.f_code.co_filename == checkpoint.__file__:
            return True
        frame = frame.f_back
    return False


def peak_of(name: str, dtype: torch.dtype, *, tf32: bool) -> float | None:
    """FLOP/s of a device at best, by its name; None if unknown. tf32: products of fp32 tensors may run in TF32."""
    half, tensor_float, single = next((peaks for pattern, peaks in PEAKS if re.search(pattern, name)), (0, 0, 0))
    peak = half if dtype in (torch.bfloat16, torch.float16) else (tensor_float if tf32 else 0) or single
    return peak * 1e12 or None


def least_seconds(flops: Counter[torch.dtype], device: torch.device) -> float | None:
    """Seconds that the device needs for them at its peak; None on a CPU or if the peak is unknown."""
    if device.type != "cuda" or not flops:
        return None
    name, tf32 = torch.cuda.get_device_name(device), torch.get_float32_matmul_precision() != "highest"
    peaks = {dtype: peak_of(name, dtype, tf32=tf32) for dtype in flops}
    seconds = [count / peak for dtype, count in flops.items() if (peak := peaks[dtype])]
    return sum(seconds) if len(seconds) == len(flops) else None


@contextmanager
def count_model_flops() -> Iterator[Counter[torch.dtype]]:
    """Count what the block computes. Slower by a little Python for each operation; compiled modules run eagerly."""
    dynamo = sys.modules.get("torch._dynamo")  # importing it takes seconds
    eager = torch.compiler.set_stance("force_eager") if dynamo is not None else None
    mode = ModelFlops()
    with mode:
        if eager is None:
            yield mode.by_dtype
        else:
            with eager:
                yield mode.by_dtype
