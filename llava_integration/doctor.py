"""The checks of ``llm2clip doctor`` for LLaVA's environment: LLaVA, transformers, the start-up hook, the tower."""

import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from llava_integration import boot
from llava_integration.towers import names
from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.finding import Finding, numbers

OLDEST, NEWEST = (4, 36, 2), (4, 37, 99)  # transformers versions with which LLaVA 1.5 both trains and generates
PINNED = "pip install transformers==4.37.2"


def check_llava() -> Iterator[Finding]:
    """Every check of LLaVA's environment."""
    yield check_wheel()
    yield check_transformers()
    yield check_hook()
    yield check_tower()


def check_wheel() -> Finding:
    """LLaVA is installed; it is not imported here, because that takes seconds."""
    if find_spec("llava") is None:
        fix = "pip install --no-deps llava-torch==1.2.2.post1 (or pip install --no-deps -e LLAVA_CHECKOUT)"
        return Finding(subject="llava", state="fail", found="missing", fix=fix)
    for distribution in ("llava-torch", "llava"):
        try:
            return Finding(subject="llava", state="ok", found=f"{distribution} {version(distribution)}")
        except PackageNotFoundError:
            continue
    return Finding(subject="llava", state="ok", found="on sys.path, not installed")


def check_transformers() -> Finding:
    """LLaVA 1.5 cannot generate from transformers 4.38 on, nor train after 4.46."""
    subject = "transformers for LLaVA"
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        return Finding(subject=subject, state="fail", found="missing", fix=PINNED)
    if OLDEST <= numbers(installed) <= NEWEST:
        return Finding(subject=subject, state="ok", found=installed)
    fix = f"{PINNED} (LLaVA 1.5 fails to generate with other versions)"
    return Finding(subject=subject, state="warn", found=installed, fix=fix)


def check_hook() -> Finding:
    """``--vision_tower llm2clip`` works in every process of this environment."""
    subject = "start-up hook"
    if boot.watching():
        return Finding(subject=subject, state="ok", found="active")
    if os.environ.get("LLM2CLIP_LLAVA_HOOK") == "0":
        return Finding(subject=subject, state="warn", found="disabled", fix="unset LLM2CLIP_LLAVA_HOOK")
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
