"""Runs the functions of ``patches``: each completes one module of LLaVA for the versions of
libraries that need it.

With LLaVA's own pins nothing is touched. ``LLM2CLIP_LLAVA_COMPAT=0`` disables all.
"""

import functools
import inspect
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from llava_integration.plug.compat.completion import (
    TRAINER,
    Completion,
    When,
    completions,
)
from llm2clip_plugin.installation import installed_version
from llm2clip_plugin.quiet import quiet_peft

# library -> the versions with which the tests run LLaVA 1.5, in ascending order; scripts/lock.sh
# writes it
TRIED_FILE = Path(__file__).with_name("tried.json")

# versions of transformers whose trainer has neither the names of 4.37 nor those of 5
REFUSED = ">4.46.3,<5"


done: list[Completion] = []  # those that have run


def enabled() -> bool:
    """Whether completions run in this process."""
    return os.environ.get("LLM2CLIP_LLAVA_COMPAT") != "0"


@functools.cache
def needed() -> list[Completion]:
    """The completions that the installed versions need."""
    # its functions are added to ``completions``
    from llava_integration.plug.compat import patches  # noqa: F401

    return [completion for completion in completions if is_needed(completion)]


def is_needed(completion: Completion) -> bool:
    """Whether one of its libraries is installed in a version that needs it."""
    libraries = completion.libraries.items()
    return any(has_version(library, versions) for library, versions in libraries)


def watched() -> set[str]:
    """The modules of LLaVA that something is to be done for."""
    if not enabled():
        return set()
    modules = {completion.module for completion in needed()}
    if problem():
        modules.add(TRAINER)
    return modules


def run(module: ModuleType, when: When) -> None:
    """Run the completions of ``module`` for that moment; each runs once in a process.
    Raises ImportError, which names the function, its module and the versions of the libraries."""
    if not enabled():
        return
    try:
        if module.__name__ == TRAINER and problem():
            raise ImportError(problem())
        for completion in needed():
            is_now = completion.module == module.__name__ and completion.when == when
            if is_now and completion not in done:
                complete(completion, module)
                done.append(completion)
    except ImportError as error:
        if module.__name__.startswith("llava.model."):
            tell_importers(sys.modules.get("llava.model"), error)
        raise


def complete(completion: Completion, module: ModuleType) -> None:
    """Run one completion. ImportError, which names it, if it fails."""
    warn_if_untried()
    try:
        completion.complete(module)
    except Exception as error:
        name = completion.complete.__name__
        versions = ", ".join(
            f"{library} {installed_version(library)}"
            for library in completion.libraries
        )
        raise ImportError(
            f"llava_integration/plug/compat/patches.py, {name} could not patch "
            f"{module.__name__} for {versions}: {error!r}; {advice()}, "
            "or set LLM2CLIP_LLAVA_COMPAT=0 to run without patches"
        ) from error


def tell_importers(package: ModuleType | None, error: ImportError) -> None:
    """Raise ``error`` where a name of ``llava.model`` is imported: the package swallows the errors
    of its modules."""

    def missing(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise error

    if package is not None:
        package.__getattr__ = missing


# Versions of libraries


def has_version(library: str, versions: str) -> bool:
    """Whether a library is installed in one of the versions, such as ``>=5``."""
    from packaging.specifiers import SpecifierSet

    installed = installed_version(library)
    return bool(installed) and SpecifierSet(versions).contains(
        installed, prereleases=True
    )


@functools.cache
def tried_versions() -> dict[str, list[str]]:
    """Library -> the versions that were tried with LLaVA."""
    return json.loads(TRIED_FILE.read_text(encoding="utf-8"))


def advice() -> str:
    """What installs the newest versions that were tried."""
    newest = [
        f"{library}=={versions[-1]}" for library, versions in tried_versions().items()
    ]
    return f"pip install {' '.join(newest)} runs LLaVA 1.5"


@functools.cache
def problem() -> str:
    """Why LLaVA cannot train with the installed transformers, and what works; "" if it can."""
    if not has_version("transformers", REFUSED):
        return ""
    newest = tried_versions()["transformers"][-1]
    return (
        f"LLaVA cannot train with transformers {installed_version('transformers')}; install "
        f"transformers==4.37.2 (LLaVA's own) or transformers=={newest}"
    )


def untried() -> list[str]:
    """The installed libraries whose minor version was never tried with LLaVA, with those that
    were."""
    never_tried = []
    for library, versions in tried_versions().items():
        installed = installed_version(library)
        minors = [version.rpartition(".")[0] for version in versions]
        if installed and not any(
            f"{installed}.".startswith(f"{minor}.") for minor in minors
        ):
            never_tried.append(f"{library} {installed} (tried: {', '.join(minors)})")
    return never_tried


@functools.cache
def warn_if_untried() -> None:
    """One line on stderr, once and on the first rank alone, about versions never tried."""
    if untried() and os.environ.get("RANK", "0") == "0":
        print(
            f"llm2clip: LLaVA 1.5 is untested with {' and '.join(untried())}; {advice()}",
            file=sys.stderr,
        )


@functools.cache
def adapters_stay_fp32() -> bool:
    """Whether this environment's peft keeps the adapter of an fp16 model in fp32, and so rounds the
    sum alone. peft 0.10, which LLaVA's environment has, rounds the halves and their product too.
    True without peft."""
    if find_spec("peft") is None:
        return True
    quiet_peft()
    from peft import PeftModel

    return (
        "autocast_adapter_dtype"
        in inspect.signature(PeftModel.from_pretrained).parameters
    )
