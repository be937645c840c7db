"""What ``llm2clip doctor`` asks in LLaVA's environment: LLaVA, the start-up hook, the chosen tower."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from llava_integration import boot
from llava_integration.towers import commands, names
from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.finding import Finding, numbers

OLDEST, NEWEST = (4, 36, 2), (4, 37, 99)  # transformers in which LLaVA 1.5 both trains and generates


def check_llava() -> Iterator[Finding]:
    """LLaVA is there with a transformers that it works with, knows our tower, and has one to load."""
    yield check_wheel()
    yield check_transformers()
    yield check_hook()
    yield check_tower()


def check_wheel() -> Finding:
    """LLaVA can be found; it is not imported, which takes seconds."""
    if find_spec("llava") is None:
        mend = "pip install --no-deps llava-torch==1.2.2.post1 (or pip install --no-deps -e LLAVA_CHECKOUT)"
        return Finding(subject="llava", state="fail", found="missing", mend=mend)
    for distribution in ("llava-torch", "llava"):
        try:
            return Finding(subject="llava", state="ok", found=f"{distribution} {version(distribution)}")
        except PackageNotFoundError:
            continue
    return Finding(subject="llava", state="ok", found="on the path, not installed")


def check_transformers() -> Finding:
    """LLaVA 1.5 fails to generate from 4.38 on, and to train after 4.46."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        return Finding(
            subject="transformers for LLaVA", state="fail", found="missing", mend="pip install transformers==4.37.2"
        )
    fits = OLDEST <= numbers(found) <= NEWEST
    mend = "" if fits else "pip install transformers==4.37.2 (LLaVA 1.5 fails to generate with others)"
    return Finding(subject="transformers for LLaVA", state="ok" if fits else "warn", found=found, mend=mend)


def check_hook() -> Finding:
    """Every process of this environment knows ``--vision_tower llm2clip``."""
    if boot.watching():
        return Finding(subject="start-up hook", state="ok", found="watching")
    if os.environ.get("LLM2CLIP_LLAVA_HOOK") == "0":
        return Finding(subject="start-up hook", state="warn", found="LLM2CLIP_LLAVA_HOOK=0", mend="unset it")
    return Finding(
        subject="start-up hook",
        state="fail",
        found="its .pth file was not read",
        mend="pip install llm2clip-plugin (not --target), or start LLaVA by `python -m llava_integration.launch ...`",
    )


def check_tower() -> Finding:
    """What ``--vision_tower llm2clip`` means here."""
    try:
        place = names.locate_chosen()
    except (FileNotFoundError, ContractError) as error:
        mend = "llm2clip use PATH_OR_HUB_ID (needed for the bare name alone)"
        return Finding(subject="--vision_tower llm2clip", state="warn", found=str(error), mend=mend)
    return Finding(subject="--vision_tower llm2clip", state="ok", found=f"{place.how}: {commands.describe(place)}")
