"""The checks of ``llm2clip doctor`` for LLaVA: its wheel, its imports, transformers, the start-up hook, the tower."""

import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from llava_integration import boot
from llava_integration import towers as names
from llava_integration.compat import runner, versions
from llava_integration.compat.completion import installed_version
from llm2clip_plugin.console import Finding, numbers
from llm2clip_plugin.files import ContractError

OLDEST, NEWEST = (4, 36, 2), (4, 37, 99)  # transformers versions with which LLaVA 1.5 runs as it is
PINNED = "pip install transformers==4.37.2"
INSTALL = "pip install --no-deps llava-torch==1.2.2.post1 (or pip install --no-deps -e LLAVA_CHECKOUT)"
# What LLaVA imports that neither it (installed with --no-deps) nor our requirements bring -> what needs it
IMPORTED = {
    "torchvision": "LLaVA's own vision towers",
    "sentencepiece": "LLaVA's tokenizers",
    "shortuuid": "llava.eval",
    "requests": "llava.serve and llava.eval",
    "fastapi": "llava.serve.controller and model_worker",
    "uvicorn": "llava.serve.controller and model_worker",
}


def check_llava() -> Iterator[Finding]:
    """Every check of LLaVA, in its own environment or in the training environment."""
    yield check_wheel()
    yield from check_imports()
    yield check_transformers()
    yield check_hook()
    yield check_tower()


def check_wheel() -> Finding:
    """LLaVA is installed; it is not imported here, because that takes seconds."""
    if find_spec("llava") is None:
        return Finding(subject="llava", state="fail", found="missing", fix=INSTALL)
    for distribution in ("llava-torch", "llava"):
        try:
            return Finding(subject="llava", state="ok", found=f"{distribution} {version(distribution)}")
        except PackageNotFoundError:
            continue
    return Finding(subject="llava", state="ok", found="on sys.path, not installed")


def check_imports() -> Iterator[Finding]:
    """What LLaVA imports and ``pip install --no-deps`` does not bring."""
    for name, user in IMPORTED.items():
        if find_spec(name) is None:
            yield Finding(subject=name, state="warn", found=f"missing; {user} needs it", fix=f"pip install {name}")


def check_transformers() -> Finding:
    """LLaVA 1.5 runs with its pins as it is, and with versions from 5 on through ``compat``."""
    subject = "transformers for LLaVA"
    installed = installed_version("transformers")
    if not installed:
        return Finding(subject=subject, state="fail", found="missing", fix=PINNED)
    if OLDEST <= numbers(installed) <= NEWEST:
        return Finding(subject=subject, state="ok", found=f"{installed}, which LLaVA pins")
    if problem := versions.problems().get(versions.TRAINER):
        return Finding(subject=subject, state="fail", found=installed, fix=problem)
    if numbers(installed) < (5,):
        fix = f"{PINNED} (LLaVA 1.5 fails to generate with this version)"
        return Finding(subject=subject, state="warn", found=installed, fix=fix)
    if not runner.enabled():
        return Finding(subject=subject, state="fail", found=installed, fix="unset LLM2CLIP_LLAVA_COMPAT")
    found = f"{installed}, with {len(runner.needed())} completions of LLaVA's code"
    if untried := versions.untried():
        return Finding(subject=subject, state="warn", found=f"untested: {' and '.join(untried)}", fix=versions.ADVICE)
    return Finding(subject=subject, state="ok", found=found)


def check_hook() -> Finding:
    """``--vision_tower llm2clip`` works in every process of this environment."""
    subject = "start-up hook"
    if os.environ.get("LLM2CLIP_LLAVA_HOOK") == "0":
        return Finding(subject=subject, state="warn", found="disabled", fix="unset LLM2CLIP_LLAVA_HOOK")
    if boot.watching():
        return Finding(subject=subject, state="ok", found="active")
    fix = "pip install llm2clip-plugin (without --target), or start LLaVA with `python -m llava_integration.launch ...`"
    return Finding(subject=subject, state="fail", found="not active: Python did not read llm2clip_llava.pth", fix=fix)


def check_tower() -> Finding:
    """The tower that ``--vision_tower llm2clip`` loads."""
    subject = "--vision_tower llm2clip"
    try:
        location = names.locate_default()
    except (FileNotFoundError, ContractError) as error:
        fix = "llm2clip use PATH_OR_HUB_ID (only needed for the bare name)"
        return Finding(subject=subject, state="warn", found=str(error), fix=fix)
    return Finding(subject=subject, state="ok", found=f"{location.how}: {location.describe()}")
