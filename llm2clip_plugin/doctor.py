"""``llm2clip doctor``: check this environment, and print how to fix what is missing or too old.

Works in the training environment and in LLaVA's, which can be one, also if torch is not installed.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Literal

from llm2clip_plugin.console import Finding, numbers, raise_open_files, remedy_open_files
from llm2clip_plugin.data.workers import PREFETCH_MB, SHARED_MEMORY, free_shared_memory, remedy
from llm2clip_plugin.options import Command

GIB = 1024**3
# first version with C++17, which DeepSpeed's extensions need, and with -std=c++20, which current torch builds with
MIN_COMPILERS = {"g++": (9, 10), "clang": (10, 10)}


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What to check."""

    # environment to check: llava if LLaVA is installed with the libraries that it pins, else train
    environment: Literal["train", "llava"] = field(default_factory=lambda: default_environment())
    cache: str = "."  # folder that will hold the embedding cache
    captions: int = 1_000_000  # number of captions to cache
    width: int = 4096  # width of the LLM's embeddings
    port: int = 29500  # port of the launcher
    ranks: int = 0  # ranks on this machine; 0: one per GPU, 2 on a CPU
    json: bool = False  # print the report as JSON

    def __post_init__(self) -> None:
        for name, least in (("captions", 1), ("width", 1), ("port", 1), ("ranks", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"--{name} {value} must be at least {least}")


COMMAND = Command(
    name="doctor",
    example="llm2clip doctor --cache /data --captions 6000000",
    about="Check this environment, and print how to fix what is missing or too old.",
    settings=DoctorConfig,
)


def check_python() -> Iterator[Finding]:
    """Python 3.10 or newer."""
    found = ".".join(map(str, sys.version_info[:3]))
    state = "ok" if sys.version_info >= (3, 10) else "fail"
    yield Finding(
        subject="python", state=state, found=found, fix="" if state == "ok" else "install Python 3.10 or newer"
    )


def requirement_parts(line: str) -> tuple[str, str, str]:
    """Split a metadata line: ``'torch>=2.6; extra == "train"'`` -> ('torch', '2.6', 'train')."""
    match = re.match(r"^([A-Za-z0-9_.-]+)(?:\[[^]]*\])?\s*\(?(?:>=\s*([0-9.]+))?", line)
    extra = re.search(r"extra\s*==\s*['\"](\w+)['\"]", line)
    if match is None:
        raise ValueError(f"cannot read the requirement {line!r}")
    return match.group(1), match.group(2) or "", extra.group(1) if extra else ""


def check_packages(extra: str) -> Iterator[Finding]:
    """Every requirement of the package, and of ``extra`` unless it is empty."""
    try:
        lines = requires("llm2clip-plugin") or []
    except PackageNotFoundError:
        yield Finding(subject="llm2clip-plugin", state="fail", found="not installed", fix='pip install -e ".[train]"')
        return
    needed: dict[str, str] = {}  # name -> minimum version for the package or the extra
    for name, minimum, needed_by in map(requirement_parts, lines):
        if needed_by in ("", extra):
            needed[name] = max(needed.get(name, ""), minimum, key=numbers)
    for name, minimum in needed.items():
        fix = f'pip install "{name}>={minimum}"' if minimum else f"pip install {name}"
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding(subject=name, state="fail", found="missing", fix=fix)
            continue
        state = "ok" if not minimum or numbers(found) >= numbers(minimum) else "fail"
        yield Finding(subject=name, state=state, found=found, fix="" if state == "ok" else fix)


def check_compiler() -> Iterator[Finding]:
    """A C++ compiler: DeepSpeed builds extensions at first use, and torch.compile builds CPU kernels."""
    words = shlex.split(os.environ.get("CXX", "g++"))
    if not words or shutil.which(words[0]) is None:
        words = ["c++"]
    if shutil.which(words[0]) is None:
        yield Finding(subject="C++ compiler", state="fail", found="none", fix="apt-get install g++ (or set CXX)")
        return
    done = subprocess.run([*words, "--version"], capture_output=True, text=True, check=False)
    yield judge_compiler(done.stdout)


def judge_compiler(output: str) -> Finding:
    """Compare the output of a compiler's ``--version`` with MIN_COMPILERS."""
    first = output.strip().split("\n")[0]
    clang = re.search(r"clang version (\d+)", first)
    match = clang or re.search(r"\) (\d+)\.\d+", first)  # g++ (Debian 12.2.0-14) 12.2.0: after the packager's
    if match is None:
        known = " or ".join(f"{name} >= {recommended}" for name, (_, recommended) in MIN_COMPILERS.items())
        return Finding(
            subject="C++ compiler", state="warn", found=first or "unknown version", fix=f"set CXX to {known}"
        )
    name, version_ = "clang" if clang else "g++", int(match.group(1))
    minimum, recommended = MIN_COMPILERS[name]
    state = "fail" if version_ < minimum else "warn" if version_ < recommended else "ok"
    lacks = "C++17" if state == "fail" else "C++20, which current torch builds with"
    fix = "" if state == "ok" else f"{name} {version_} lacks {lacks}: install {name} >= {recommended} and set CXX to it"
    return Finding(subject="C++ compiler", state=state, found=first, fix=fix)


def check_launcher() -> Iterator[Finding]:
    """The ``deepspeed`` launcher is on PATH and belongs to this Python."""
    launcher = shutil.which("deepspeed")
    expected = os.path.join(os.path.dirname(sys.executable), "deepspeed")
    if launcher is None and not os.path.exists(expected):
        yield Finding(subject="deepspeed launcher", state="fail", found="not on PATH", fix="pip install deepspeed")
    elif launcher is None or os.path.realpath(launcher) != os.path.realpath(expected):
        yield Finding(
            subject="deepspeed launcher",
            state="warn",
            found=launcher or expected,
            fix=f"activate this environment first: source {os.path.dirname(sys.executable)}/activate",
        )
    else:
        yield Finding(subject="deepspeed launcher", state="ok", found=launcher)


def check_accelerator() -> Iterator[Finding]:
    """GPUs that torch sees, and whether they support bf16."""
    try:
        import torch
    except ImportError:
        yield Finding(subject="accelerator", state="fail", found="torch is not installed", fix="pip install torch")
        return
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        found = f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, bf16 {torch.cuda.is_bf16_supported()}"
        yield Finding(subject="accelerator", state="ok", found=found)
    else:
        yield Finding(
            subject="accelerator",
            state="warn",
            found=f"none; everything runs on the CPU ({torch.get_num_threads()} threads)",
            fix="for a GPU, install the torch build of your CUDA or ROCm version",
        )


def check_threads(ranks: int) -> Iterator[Finding]:
    """Together the ranks use no more threads than there are cores, and wait passively."""
    cores = _cores()
    ranks = ranks or _default_ranks(cores)
    threads, policy = os.environ.get("OMP_NUM_THREADS", "unset"), os.environ.get("OMP_WAIT_POLICY", "unset")
    found = f"{cores} cores for {ranks} ranks, OMP_NUM_THREADS {threads}, OMP_WAIT_POLICY {policy}"
    per_rank = max(1, cores // ranks)
    fix = ""
    if threads == "unset" and ranks > 1:
        fix = f"export OMP_NUM_THREADS={per_rank} OMP_WAIT_POLICY=PASSIVE; if unset, each rank uses 1 thread"
    elif threads.isdigit() and ranks * int(threads) > max(cores, ranks):
        fix = f"export OMP_NUM_THREADS={per_rank} (cores / ranks) OMP_WAIT_POLICY=PASSIVE"
    yield Finding(subject="threads", state="warn" if fix else "ok", found=found, fix=fix)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _default_ranks(cores: int) -> int:
    """One rank per GPU; without GPUs two, as in the quickstart, if there are two cores."""
    try:
        import torch
    except ImportError:
        return min(2, cores)
    return torch.cuda.device_count() or min(2, cores)


def check_port(port: int) -> Iterator[Finding]:
    """The launcher's default port is free."""
    with socket.socket() as probe:
        in_use = probe.connect_ex(("127.0.0.1", port)) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    fix = f"pass --master_port {free} to the deepspeed launcher" if in_use else ""
    yield Finding(
        subject=f"port {port}", state="warn" if in_use else "ok", found="in use" if in_use else "free", fix=fix
    )


def check_shared_memory(ranks: int, folder: str = SHARED_MEMORY) -> Iterator[Finding]:
    """Space in /dev/shm for what the loader processes of all ranks prepare ahead, with the default settings."""
    free = free_shared_memory(folder)
    if free is None:
        return
    ranks = ranks or _default_ranks(_cores())
    need = ranks * PREFETCH_MB * 10**6
    found = f"{free / 1e6:,.0f} MB free in {folder}; {ranks} ranks with loader processes need {need / 1e6:,.0f} MB"
    fix = "" if need <= free else f"{remedy(need)}, or lower --dataloader-prefetch-mb ({PREFETCH_MB})"
    yield Finding(subject="shared memory", state="warn" if fix else "ok", found=found, fix=fix)


def check_open_files() -> Iterator[Finding]:
    """The hard limit of open files, which every command raises its own to."""
    limit = raise_open_files()
    fix = remedy_open_files(limit)
    found = "unlimited" if limit == sys.maxsize else f"at most {limit} per process"
    yield Finding(subject="open files", state="warn" if fix else "ok", found=found, fix=fix)


def check_disk(folder: str, captions: int, width: int) -> Iterator[Finding]:
    """Space for an fp16 embedding cache of ``captions`` rows of ``width``."""
    need = captions * width * 2  # fp16
    existing = os.path.abspath(folder)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    free = shutil.disk_usage(existing).free
    found = (
        f"{free / GIB:.1f} GiB free at {existing}; {captions:,} captions x {width} need {need / GIB:.1f} GiB in fp16"
    )
    fix = ""
    if not os.access(existing, os.W_OK):
        fix = f"{existing} is not writable; set another --cache"
    elif free <= need:
        fix = f"free disk space, set another --cache, or use --dtype int8 ({need / 2 / GIB:.1f} GiB)"
    state = "fail" if fix else "ok"
    yield Finding(subject="disk for the cache", state=state, found=found, fix=fix)


def checks(options: DoctorConfig) -> list[Callable[[], Iterator[Finding]]]:
    """The checks of an environment, in the order of the report."""
    training = options.environment == "train"
    listed: list[Callable[[], Iterator[Finding]]] = [check_python, lambda: check_packages("train" if training else "")]
    if training:
        listed += [check_compiler, check_launcher]
    listed += [check_accelerator, lambda: check_threads(options.ranks), lambda: check_port(options.port)]
    if training:
        listed.append(lambda: check_shared_memory(options.ranks))
    listed.append(check_open_files)
    listed.append(lambda: check_disk(options.cache, options.captions, options.width))
    if training and not llava_installed():
        listed.append(suggest_llava)
    else:
        from llava_integration.preflight import check_llava

        listed.append(check_llava)
    return listed


def suggest_llava() -> Iterator[Finding]:
    """LLaVA is optional in the training environment."""
    fix = "pip install --no-deps llava-torch==1.2.2.post1 to train LLaVA in this environment"
    yield Finding(subject="llava", state="ok", found=f"not installed (optional); {fix}")


def llava_installed() -> bool:
    """Whether this environment has LLaVA, from its wheel or from a checkout."""
    return _installed("llava-torch") or _installed("llava")


def default_environment() -> Literal["train", "llava"]:
    """``llava`` where LLaVA is installed with the libraries that it pins, else ``train``."""
    return "llava" if llava_installed() and not _installed("transformers", (5,)) else "train"


def main(argv: list[str]) -> int:
    """``llm2clip doctor``: 0 if nothing fails, 1 otherwise."""
    options = COMMAND.parse(argv)
    findings = [finding for check in checks(options) for finding in check()]
    if options.json:
        print(json.dumps([finding.as_json() for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"[{finding.state:>4}] {finding.subject}: {finding.found}")
            if finding.fix:
                print(f"       -> {finding.fix}")
        failed = [finding.subject for finding in findings if finding.state == "fail"]
        print(f"{len(failed)} to fix: {', '.join(failed)}" if failed else "no problems found")
    return 1 if any(finding.state == "fail" for finding in findings) else 0


def _installed(name: str, minimum: tuple[int, ...] = ()) -> bool:
    try:
        return numbers(version(name)) >= minimum
    except PackageNotFoundError:
        return False
