"""Runs the functions of ``patches``: each completes one module of LLaVA for the versions of
libraries that need it.

With LLaVA's own pins nothing is touched. ``LLM2CLIP_LLAVA_COMPAT=0`` disables all.
"""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

from llm2clip_plugin.console import quiet_peft
from llm2clip_plugin.installation import installed_version

When = Literal["before", "after"]
# beginnings of versions, beside LLaVA's own pins
TRIED = {"transformers": ("5.24",), "deepspeed": ("0.19.8",)}
ADVICE = "pip install transformers==5.24.0 deepspeed==0.19.8 runs LLaVA 1.5"
TRAINER = "llava.train.llava_trainer"
# versions of transformers whose trainer has neither the names of 4.37 nor those of 5
REFUSED = ">4.46.3,<5"


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One addition to a module of LLaVA, or to what it uses of a library."""

    module: str  # dotted name of LLaVA's module
    when: When  # of the execution of the module
    # distribution -> versions that need it, such as {"transformers": ">=5"}; any suffices
    libraries: Mapping[str, str]
    # takes the module, which is still empty if ``when`` is "before"
    complete: Callable[[ModuleType], None]


completions: list[Completion] = []  # in the order of the functions
done: list[Completion] = []  # those that have run


def completes(module: str, when: When, **libraries: str) -> Callable[[Any], Any]:
    """Decorator of a function that completes a module of LLaVA; its docstring says why."""

    def mark(function: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        completions.append(
            Completion(module=module, when=when, libraries=libraries, complete=function)
        )
        return function

    return mark


def replaces(owner: Any, name: str) -> Callable[[Callable[..., Any]], None]:
    """Decorator that sets ``owner.name`` to the function, whose first argument is the original."""
    is_class_method = isinstance(inspect.getattr_static(owner, name), classmethod)
    original = getattr(owner, name).__func__ if is_class_method else getattr(owner, name)

    def decorate(function: Callable[..., Any]) -> None:
        @functools.wraps(original)
        def replacement(*arguments: Any, **options: Any) -> Any:
            return function(original, *arguments, **options)

        setattr(owner, name, classmethod(replacement) if is_class_method else replacement)

    return decorate


def enabled() -> bool:
    """Whether completions run in this process."""
    return os.environ.get("LLM2CLIP_LLAVA_COMPAT") != "0"


@functools.cache
def needed() -> list[Completion]:
    """The completions that the installed versions need."""
    # adds its functions, which need this module
    importlib.import_module("llava_integration.compat.patches")
    return [
        one
        for one in completions
        if any(has_version(*library) for library in one.libraries.items())
    ]


def watched() -> set[str]:
    """The modules of LLaVA that something is to be done for."""
    if not enabled():
        return set()
    return {completion.module for completion in needed()} | ({TRAINER} if problem() else set())


def run(module: ModuleType, when: When) -> None:
    """Run the completions of ``module`` for that moment; each runs once in a process.
    Raises ImportError, which names the function, its module and the versions of the libraries."""
    if not enabled():
        return
    try:
        if module.__name__ == TRAINER and problem():
            raise ImportError(problem())
        for completion in needed():
            if (completion.module, completion.when) == (
                module.__name__,
                when,
            ) and completion not in done:
                warn_if_untried()
                try:
                    completion.complete(module)
                except Exception as error:
                    name = completion.complete.__name__
                    found = ", ".join(
                        f"{library} {installed_version(library)}"
                        for library in completion.libraries
                    )
                    told = f"compat/patches.py, {name} could not complete {module.__name__} for {found}: {error!r}"
                    fix = f"{ADVICE}, or set LLM2CLIP_LLAVA_COMPAT=0 to run without completions"
                    raise ImportError(f"llava_integration/{told}; {fix}") from error
                done.append(completion)
    except ImportError as error:
        if module.__name__.startswith("llava.model."):
            tell_importers(sys.modules.get("llava.model"), error)
        raise


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
    return bool(installed) and SpecifierSet(versions).contains(installed, prereleases=True)


@functools.cache
def problem() -> str:
    """Why LLaVA cannot train with the installed transformers, and what works; "" if it can."""
    if not has_version("transformers", REFUSED):
        return ""
    fix = "install transformers==4.37.2 (LLaVA's own) or transformers==5.24.0"
    return f"LLaVA cannot train with transformers {installed_version('transformers')}; {fix}"


def untried() -> list[str]:
    """The installed libraries whose version was never tried with LLaVA, with the versions that
    were."""
    found = []
    for library, known in TRIED.items():
        installed = installed_version(library)
        if installed and not any(f"{installed}.".startswith(f"{version}.") for version in known):
            found.append(f"{library} {installed} (tried: {', '.join(known)})")
    return found


@functools.cache
def warn_if_untried() -> None:
    """One line on stderr, once and on the first rank alone, about versions never tried."""
    if untried() and os.environ.get("RANK", "0") == "0":
        print(
            f"llm2clip: LLaVA 1.5 is untested with {' and '.join(untried())}; {ADVICE}",
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

    return "autocast_adapter_dtype" in inspect.signature(PeftModel.from_pretrained).parameters
