"""``llm2clip doctor``: check this environment, and print how to fix what is missing or too old.

Works in the training environment and in LLaVA's, which can be one, also if torch is not installed.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from llm2clip_plugin.console import Finding, numbers, raise_open_files
from llm2clip_plugin.options import Command

OPEN_FILES = 1024  # of a rank: 64 tars, some of libraries, a few for each batch that a loader process has sent
MIN_COMPILER = 10  # of g++ and clang: the first with -std=c++20, which current torch builds with


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What to check."""

    # environment to check: llava if LLaVA is installed with the libraries that it pins, else train
    environment: Literal["train", "llava"] = field(default_factory=lambda: default_environment())
    json: bool = False  # print the report as JSON


COMMAND = Command(
    name="doctor",
    example="llm2clip doctor",
    about="Check this environment, and print how to fix what is missing or too old.",
    settings=DoctorConfig,
)


def finding(subject: str, found: str, fix: str = "", *, state: str = "warn") -> Finding:
    """A line of the report; ``state`` is that of a subject with a ``fix``, one without is ok."""
    return Finding(subject=subject, state=state if fix else "ok", found=found, fix=fix)


def check_packages(extra: str) -> Iterator[Finding]:
    """Every requirement of the package, and of ``extra`` unless it is empty."""
    try:
        lines = requires("llm2clip-plugin") or []
    except PackageNotFoundError:
        yield finding("llm2clip-plugin", "not installed", 'pip install -e ".[train]"', state="fail")
        return
    needed: dict[str, SpecifierSet] = {}
    for wanted in map(Requirement, lines):
        if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
            needed[wanted.name] = needed.get(wanted.name, SpecifierSet()) & wanted.specifier
    for name, versions in needed.items():
        found = installed(name)
        enough = found and versions.contains(found, prereleases=True)
        yield finding(name, found or "missing", "" if enough else f'pip install "{name}{versions}"', state="fail")


def check_compiler() -> Iterator[Finding]:
    """A C++ compiler: DeepSpeed builds extensions at first use, and torch.compile builds CPU kernels."""
    words = shlex.split(os.environ.get("CXX", "g++"))
    if not words or shutil.which(words[0]) is None:
        words = ["c++"]
    if shutil.which(words[0]) is None:
        yield finding("C++ compiler", "none", "apt-get install g++ (or set CXX)", state="fail")
        return
    done = subprocess.run([*words, "--version"], capture_output=True, text=True, check=False)
    first = done.stdout.strip().split("\n")[0]
    # g++ (Debian 12.2.0-14) 12.2.0: after the packager's
    match = re.search(r"clang version (\d+)", first) or re.search(r"\) (\d+)\.\d+", first)
    enough = match and int(match.group(1)) >= MIN_COMPILER
    fix = "" if enough else f"set CXX to g++ or clang >= {MIN_COMPILER}, for C++20"
    yield finding("C++ compiler", first or "unknown version", fix)


def check_launcher() -> Iterator[Finding]:
    """The ``deepspeed`` launcher is on PATH and belongs to this Python."""
    launcher = shutil.which("deepspeed")
    folder = os.path.dirname(sys.executable)
    expected = os.path.join(folder, "deepspeed")
    if launcher is None and not os.path.exists(expected):
        yield finding("deepspeed launcher", "not on PATH", "pip install deepspeed", state="fail")
    else:
        own = launcher is not None and os.path.realpath(launcher) == os.path.realpath(expected)
        fix = "" if own else f"activate this environment first: source {folder}/activate"
        yield finding("deepspeed launcher", launcher or expected, fix)


def check_accelerator() -> Iterator[Finding]:
    """GPUs that torch sees, and whether they support bf16."""
    try:
        import torch
    except ImportError:
        yield finding("accelerator", "torch is not installed", "pip install torch", state="fail")
        return
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        found = f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, bf16 {torch.cuda.is_bf16_supported()}"
        yield finding("accelerator", found)
    else:
        found = f"none; everything runs on the CPU ({torch.get_num_threads()} threads)"
        yield finding("accelerator", found, "for a GPU, install the torch build of your CUDA or ROCm version")


def report(options: DoctorConfig) -> Iterator[Finding]:
    """The lines of an environment's report, in order."""
    training = options.environment == "train"
    old = "" if sys.version_info >= (3, 10) else "install Python 3.10 or newer"
    yield finding("python", ".".join(map(str, sys.version_info[:3])), old, state="fail")
    yield from check_packages("train" if training else "")
    if training:
        yield from check_compiler()
        yield from check_launcher()
    yield from check_accelerator()
    limit = raise_open_files()
    how = f"raise the hard limit to {OPEN_FILES} (ulimit -Hn, limits.conf, docker run --ulimit nofile)"
    yield finding("open files", f"at most {limit} per process", "" if limit >= OPEN_FILES else how)
    if training and not llava_installed():
        fix = "pip install --no-deps llava-torch==1.2.2.post1 to train LLaVA in this environment"
        yield finding("llava", f"not installed (optional); {fix}")
    else:
        from llava_integration.preflight import check_llava

        yield from check_llava()


def installed(name: str) -> str:
    """Version of an installed package; "" if there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def llava_installed() -> bool:
    """Whether this environment has LLaVA, from its wheel or from a checkout."""
    return bool(installed("llava-torch") or installed("llava"))


def default_environment() -> Literal["train", "llava"]:
    """``llava`` where LLaVA is installed with the libraries that it pins, else ``train``."""
    return "llava" if llava_installed() and numbers(installed("transformers")) < (5,) else "train"


def main(argv: list[str]) -> int:
    """``llm2clip doctor``: 0 if nothing fails, 1 otherwise."""
    options = COMMAND.parse(argv)
    findings = list(report(options))
    failed = [one.subject for one in findings if one.state == "fail"]
    if options.json:
        print(json.dumps([asdict(one) for one in findings], indent=2))
    else:
        for one in findings:
            print(f"[{one.state:>4}] {one.subject}: {one.found}")
            if one.fix:
                print(f"       -> {one.fix}")
        print(f"{len(failed)} to fix: {', '.join(failed)}" if failed else "no problems found")
    return 1 if failed else 0
