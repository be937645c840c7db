"""Runs the completions of a module of LLaVA, and names the file whose completion fails."""

import os
import sys
from functools import cache
from types import ModuleType
from typing import Any, Literal

from llava_integration.compat import versions
from llava_integration.compat.completion import Completion, installed_version
from llm2clip_plugin.files import discover

done: set[str] = set()  # names of completions that have run


class CompletionError(ImportError):
    """A completion failed, or the installed version of a library cannot run the module at all."""


def enabled() -> bool:
    """Whether completions run in this process."""
    return os.environ.get("LLM2CLIP_LLAVA_COMPAT") != "0"


@cache
def needed() -> dict[str, Completion]:
    """The completions that the installed versions need, by name."""
    try:
        members: dict[str, Completion] = discover("llava_integration.compat", "COMPLETION")
    except Exception as error:
        raise CompletionError(f"a file of llava_integration/compat cannot be imported: {error!r}") from error
    return {name: member for name, member in members.items() if member.needed}


def watched() -> set[str]:
    """The modules of LLaVA that something is to be done for."""
    return {member.module for member in needed().values()} | versions.refused() if enabled() else set()


def run(module: ModuleType, when: Literal["before", "after"], name: str = "") -> None:
    """Run the completions of ``module`` for that moment; each runs once in a process.

    ``name``: the module's name, where it runs as ``__main__``. Raises CompletionError, which names the file, its module
    and the versions of the libraries.
    """
    if not enabled():
        return
    try:
        if when == "before":
            versions.refuse(module.__name__)
        for key, member in needed().items():
            if (member.module, member.when) != (name or module.__name__, when) or key in done:
                continue
            versions.warn_if_untried()
            try:
                member.complete(module)
            except Exception as error:
                raise CompletionError(explain(member, error)) from error
            done.add(key)
    except ImportError as error:
        if module.__name__.startswith("llava.model."):
            tell_importers(sys.modules.get("llava.model"), error)
        raise


def explain(member: Completion, error: Exception) -> str:
    """The message of a completion that failed."""
    found = ", ".join(f"{library} {installed_version(library)}" for library in member.libraries)
    return (
        f"llava_integration/compat/{member.name}.py could not complete {member.module} for {found}: {error!r}; "
        f"{versions.ADVICE}, or set LLM2CLIP_LLAVA_COMPAT=0 to run LLaVA without completions"
    )


def tell_importers(package: ModuleType | None, error: ImportError) -> None:
    """Raise ``error`` where a name of ``llava.model`` is imported: the package swallows the errors of its modules."""

    def missing(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise error

    if package is not None:
        package.__getattr__ = missing
