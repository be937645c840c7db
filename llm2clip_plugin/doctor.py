"""``llm2clip doctor``: what is installed of this package, what that lacks, and the commands that
fix it or add more."""

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

from packaging.requirements import Requirement

from llava_integration import boot
from llava_integration.plug import towers
from llava_integration.plug.compat import runner
from llava_integration.plug.compat.runner import has_version
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.installation import (
    ADDS,
    NAME,
    install_command,
    installed_version,
    is_importable,
    is_llavas_own,
    requirements,
)
from llm2clip_plugin.options import Command, NoOptions
from llm2clip_plugin.processes import raise_open_files

# of a rank: 64 tars, some of libraries, a few for each batch that a loader process has sent
OPEN_FILES = 1024


COMMAND = Command(
    name="doctor",
    example="llm2clip doctor",
    about=(
        "Say what is installed of this package, and print how to fix what is missing or too old "
        "and how to add more."
    ),
    settings=NoOptions,
)


class Finding(NamedTuple):
    """A line of the report."""

    subject: str
    state: str  # ok, warn or fail
    value: str  # version, path or state of the subject
    advice: str  # command or step that fixes it; "" when ok


def finding(
    subject: str, value: str, advice: str = "", *, state: str = "warn"
) -> Finding:
    """``state`` is that of a subject with a ``fix``, one without is ok."""
    return Finding(subject, state if advice else "ok", value, advice)


def check_installation(extra: str) -> Iterator[Finding]:
    """Which part of this package is installed, and the command that adds each of the others."""
    version = installed_version(NAME)
    if not version:
        yield finding(NAME, "not installed", install_command("train"), state="fail")
        return
    parts = ["base", *(name for name in ADDS if extra in (name, "train"))]
    yield finding(NAME, f"{version}, installed: {', '.join(parts)}")
    for name, purpose in ADDS.items():
        if name in parts:
            continue
        if name == "train" and is_llavas_own():
            status = (
                f"not installed (for {purpose}); it would move what LLaVA pins, so install it in a "
                "new environment"
            )
        else:
            lacks = [
                f"{package}{versions}"
                for package, versions in requirements(name).items()
            ]
            missing = [
                requirement for requirement in lacks if not is_satisfied(requirement)
            ]
            status = f"not installed (for {purpose}); missing: {', '.join(missing) or 'nothing'}"
        yield finding(f"extra [{name}]", status, install_command(name), state="ok")


def is_satisfied(requirement: str) -> bool:
    """Whether a package is installed in one of the versions asked for."""
    wanted = Requirement(requirement)
    version = installed_version(wanted.name)
    return bool(version) and wanted.specifier.contains(version, prereleases=True)


def check_packages(extra: str) -> Iterator[Finding]:
    """Every requirement of the package, and of ``extra`` unless it is empty."""
    for name, versions in requirements(extra).items():
        version = installed_version(name)
        wanted = f"{name}{versions}"
        advice = "" if is_satisfied(wanted) else f'pip install "{wanted}"'
        yield finding(name, version or "missing", advice, state="fail")


def check_programs() -> Iterator[Finding]:
    """A C++ compiler, with which DeepSpeed builds extensions and torch.compile kernels, and
    DeepSpeed's launcher."""
    chosen = (os.environ.get("CXX") or "g++").split()[0]
    compiler = shutil.which(chosen) or shutil.which("c++")
    advice = ""
    if not compiler:
        advice = "apt-get install g++ (10 or newer, for C++20), or set CXX"
    yield finding("C++ compiler", compiler or "none", advice, state="fail")
    launcher = shutil.which("deepspeed") or "not on PATH"
    programs = os.path.dirname(sys.executable)  # of this environment
    is_ours = os.path.realpath(os.path.dirname(launcher)) == os.path.realpath(programs)
    advice = "" if is_ours else f"activate this environment: source {programs}/activate"
    yield finding("deepspeed launcher", launcher, advice)


def check_accelerator() -> Iterator[Finding]:
    """GPUs that torch sees, and whether they support bf16."""
    try:
        import torch
    except ImportError:
        yield finding(
            "accelerator", "torch is not installed", "pip install torch", state="fail"
        )
        return
    if torch.cuda.is_available():
        from llm2clip_plugin.precision import gpu_precision

        count = torch.cuda.device_count()
        names = {torch.cuda.get_device_name(number) for number in range(count)}
        has_bf16 = gpu_precision() == "bf16"
        status = f"{count} x {', '.join(sorted(names))}, bf16 {has_bf16}"
        yield finding("accelerator", status)
    else:
        status = f"none; everything runs on the CPU ({torch.get_num_threads()} threads)"
        yield finding(
            "accelerator",
            status,
            "for a GPU, install the torch build of your CUDA or ROCm version",
        )


def check_precision() -> Iterator[Finding]:
    """How fast this CPU computes in fp32 and bf16, and which of both is used on it; nothing where
    torch is missing."""
    if find_spec("torch") is None:
        return
    import torch

    from llm2clip_plugin.precision import cpu_speeds, fastest_precision, gflops

    speeds = cpu_speeds(torch.float32, torch.bfloat16)
    fp32 = gflops(speeds[torch.float32])
    bf16 = gflops(speeds[torch.bfloat16])
    chosen = fastest_precision(torch.device("cpu"))
    status = f"fp32 {fp32}, bf16 {bf16} GFLOPS per thread; {chosen} is used unless you set another"
    yield finding("CPU precision", status)


# LLaVA: its wheel, its imports, transformers, the start-up hook, the tower.

PINNED = ">=4.36.2,<4.38"  # transformers versions with which LLaVA 1.5 runs as it is
INSTALL = (
    "pip install --no-deps llava-torch==1.2.2.post1 (or pip "
    "install --no-deps -e LLAVA_CHECKOUT)"
)
# What LLaVA imports that neither it (installed with --no-deps) nor our requirements bring
IMPORTED = (
    "torchvision",
    "sentencepiece",
    "shortuuid",
    "requests",
    "fastapi",
    "uvicorn",
)


def check_llava() -> Iterator[Finding]:
    """Every check of LLaVA, in its own environment or in the training environment; nothing of it is
    imported."""
    if find_spec("llava") is None:
        yield finding("llava", "missing", INSTALL, state="fail")
    else:
        status = (
            installed_version("llava-torch")
            or installed_version("llava")
            or "on sys.path, not installed"
        )
        yield finding("llava", status)
    for name in IMPORTED:
        if find_spec(name) is None:
            yield finding(name, "missing; LLaVA imports it", f"pip install {name}")
    yield check_transformers()
    if os.environ.get("LLM2CLIP_LLAVA_HOOK") == "0":
        yield finding("start-up hook", "disabled", "unset LLM2CLIP_LLAVA_HOOK")
    elif boot.watching():
        yield finding("start-up hook", "active")
    else:
        start = "`python -m llava_integration.boot ...`"
        advice = f"{install_command('tower')} (without --target), or {start}"
        yield finding("start-up hook", "not active", advice, state="fail")
    try:
        location = towers.locate(towers.NAME)
        yield finding(
            "--vision_tower llm2clip", f"{location.how}: {location.describe()}"
        )
    except (FileNotFoundError, ContractError) as error:
        yield finding(
            "--vision_tower llm2clip",
            str(error).removeprefix(f"--vision_tower {towers.NAME}: "),
            "llm2clip use PATH_OR_HUB_ID, for the bare name",
        )


def check_transformers() -> Finding:
    """LLaVA 1.5 runs with its pins as it is, and with versions from 5 on through ``compat``."""
    status = installed_version("transformers")
    pinned = "pip install transformers==4.37.2"
    state = "fail"
    advice = "" if runner.enabled() else "unset LLM2CLIP_LLAVA_COMPAT"
    if not status:
        status = "missing"
        advice = pinned
    elif has_version("transformers", PINNED):
        status = f"{status}, which LLaVA pins"
        advice = ""
    elif problem := runner.problem():
        advice = problem
    elif has_version("transformers", "<5"):
        advice = f"{pinned} (LLaVA fails to generate with this one)"
        state = "warn"
    elif not advice and (untried := runner.untried()):
        status = f"untested: {' and '.join(untried)}"
        advice = runner.advice()
        state = "warn"
    elif not advice:
        status = f"{status}, with {len(runner.needed())} patches of LLaVA's code"
    return finding("transformers for LLaVA", status, advice, state=state)


def report() -> Iterator[Finding]:
    """The lines of the report, in order; of LLaVA's environment where LLaVA is installed with what
    it pins."""
    extra = checked_extra()
    old = "" if sys.version_info >= (3, 10) else "install Python 3.10 or newer"
    yield finding("python", ".".join(map(str, sys.version_info[:3])), old, state="fail")
    yield from check_installation(extra)
    yield from check_packages(extra)
    if extra == "train":
        yield from check_programs()
    if extra:
        yield from check_accelerator()
        yield from check_precision()
    limit = raise_open_files()
    advice = ""
    if limit < OPEN_FILES:
        where = "ulimit -Hn, limits.conf, docker run --ulimit nofile"
        advice = f"raise the hard limit to {OPEN_FILES} ({where})"
    yield finding("open files", f"at most {limit} per process", advice)
    if llava_installed():
        yield from check_llava()
    elif extra == "train":
        advice = "pip install --no-deps llava-torch==1.2.2.post1 to train LLaVA in this environment"
        yield finding("llava", f"not installed (optional); {advice}")


def checked_extra() -> str:
    """The extra whose packages must all be there: "tower" in LLaVA's own environment, "train" where
    DeepSpeed is installed, else "tower" if it is complete, or "" for the base install."""
    if is_llavas_own():
        return "tower"
    if is_importable("deepspeed"):
        return "train"
    packages = requirements("tower")
    is_complete = bool(packages) and all(map(installed_version, packages))
    return "tower" if is_complete else ""


def llava_installed() -> bool:
    """Whether this environment has LLaVA, from its wheel or from a checkout."""
    return bool(installed_version("llava-torch") or installed_version("llava"))


def main(argv: list[str]) -> int:
    """``llm2clip doctor``: 0 if nothing fails, 1 otherwise."""
    COMMAND.parse(argv)
    findings = list(report())
    failed = [line.subject for line in findings if line.state == "fail"]
    for line in findings:
        print(f"[{line.state:>4}] {line.subject}: {line.value}")
        if line.advice:
            print(f"       -> {line.advice}")
    print(
        f"{len(failed)} to fix: {', '.join(failed)}" if failed else "no problems found"
    )
    return 1 if failed else 0
