"""The checks of ``llm2clip doctor`` for LLaVA: its wheel, its imports, transformers, the start-up hook, the tower."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

from llava_integration import boot, towers
from llava_integration.compat import runner
from llava_integration.compat.runner import installed_version
from llm2clip_plugin.console import Finding, numbers
from llm2clip_plugin.files import ContractError

OLDEST, NEWEST = (4, 36, 2), (4, 37, 99)  # transformers versions with which LLaVA 1.5 runs as it is
INSTALL = "pip install --no-deps llava-torch==1.2.2.post1 (or pip install --no-deps -e LLAVA_CHECKOUT)"
# What LLaVA imports that neither it (installed with --no-deps) nor our requirements bring
IMPORTED = ("torchvision", "sentencepiece", "shortuuid", "requests", "fastapi", "uvicorn")


def check_llava() -> Iterator[Finding]:
    """Every check of LLaVA, in its own environment or in the training environment; nothing of it is imported."""
    found = installed_version("llava-torch") or installed_version("llava") or "on sys.path, not installed"
    missing = find_spec("llava") is None
    yield _finding("llava", fail=missing, found="missing" if missing else found, fix=INSTALL)
    for name in IMPORTED:
        if find_spec(name) is None:
            yield _finding(name, warn=True, found="missing; LLaVA imports it", fix=f"pip install {name}")
    yield check_transformers()
    off = os.environ.get("LLM2CLIP_LLAVA_HOOK") == "0"
    fix = "pip install llm2clip-plugin (without --target), or start LLaVA with `python -m llava_integration.launch ...`"
    if off:
        yield _finding("start-up hook", warn=True, found="disabled", fix="unset LLM2CLIP_LLAVA_HOOK")
    else:
        active = boot.watching()
        yield _finding("start-up hook", fail=not active, found="active" if active else "not active", fix=fix)
    try:
        location = towers.locate_default()
        yield _finding("--vision_tower llm2clip", found=f"{location.how}: {location.describe()}")
    except (FileNotFoundError, ContractError) as error:
        fix = "llm2clip use PATH_OR_HUB_ID (only needed for the bare name)"
        yield _finding("--vision_tower llm2clip", warn=True, found=str(error), fix=fix)


def check_transformers() -> Finding:
    """LLaVA 1.5 runs with its pins as it is, and with versions from 5 on through ``compat``."""
    subject, installed = "transformers for LLaVA", installed_version("transformers")
    pinned = "pip install transformers==4.37.2"
    if not installed:
        return _finding(subject, fail=True, found="missing", fix=pinned)
    if OLDEST <= numbers(installed) <= NEWEST:
        return _finding(subject, found=f"{installed}, which LLaVA pins")
    if problem := runner.problems().get(runner.TRAINER):
        return _finding(subject, fail=True, found=installed, fix=problem)
    if numbers(installed) < (5,):
        return _finding(subject, warn=True, found=installed, fix=f"{pinned} (LLaVA fails to generate with this one)")
    if not runner.enabled():
        return _finding(subject, fail=True, found=installed, fix="unset LLM2CLIP_LLAVA_COMPAT")
    if untried := runner.untried():
        return _finding(subject, warn=True, found=f"untested: {' and '.join(untried)}", fix=runner.ADVICE)
    return _finding(subject, found=f"{installed}, with {len(runner.needed())} completions of LLaVA's code")


def _finding(subject: str, *, found: str, fix: str = "", fail: bool = False, warn: bool = False) -> Finding:
    state = "fail" if fail else "warn" if warn else "ok"
    return Finding(subject=subject, state=state, found=found, fix="" if state == "ok" else fix)
