"""Versions of libraries with which LLaVA 1.5 was run: a word about those never tried, an error for those that can't."""

import os
import sys
from functools import cache
from importlib.util import find_spec
from inspect import signature

from llava_integration.compat.completion import installed_version
from llm2clip_plugin.console import quiet_peft

TRIED = {"transformers": ("5.24",), "deepspeed": ("0.19.8",)}  # beginnings of versions, beside LLaVA's own pins
ADVICE = "pip install transformers==5.24.0 deepspeed==0.19.8 runs LLaVA 1.5"

TRAINER = "llava.train.llava_trainer"
# module -> library, versions with which it cannot run, why and what works
REFUSED = {
    TRAINER: (
        "transformers",
        ">4.46.3,<5",
        "its trainer has neither the names of 4.37 nor those of 5; install transformers==4.37.2 (LLaVA's own) or "
        "transformers==5.24.0",
    ),
    "llava.train.llama_xformers_attn_monkey_patch": (
        "transformers",
        ">=5",
        "it replaces the attention of transformers 4; train with train.py or train_mem.py, or install "
        "transformers==4.37.2",
    ),
}


@cache
def problems() -> dict[str, str]:
    """module of LLaVA -> why the installed libraries cannot run it, and what can."""
    from packaging.specifiers import SpecifierSet

    found = {}
    for module, (library, versions, reason) in REFUSED.items():
        installed = installed_version(library)
        if installed and SpecifierSet(versions).contains(installed, prereleases=True):
            found[module] = f"{module} cannot run with {library} {installed}: {reason}"
    return found


def refused() -> set[str]:
    """The modules of LLaVA that the installed libraries cannot run."""
    return set(problems())


def refuse(module: str) -> None:
    """Raise ImportError, with versions that work, if the installed libraries cannot run the module."""
    if module in problems():
        raise ImportError(problems()[module])


def untried() -> list[str]:
    """The installed libraries whose version was never tried with LLaVA, with the versions that were."""
    found = []
    for library, known in TRIED.items():
        installed = installed_version(library)
        if installed and not any(installed == version or installed.startswith(f"{version}.") for version in known):
            found.append(f"{library} {installed} (tried: {', '.join(known)})")
    return found


@cache
def warn_if_untried() -> None:
    """One line on stderr, once and on the first rank alone, about versions never tried."""
    if untried() and os.environ.get("RANK", "0") == "0":
        print(f"llm2clip: LLaVA 1.5 is untested with {' and '.join(untried())}; {ADVICE}", file=sys.stderr)


@cache
def adapters_stay_fp32() -> bool:
    """Whether this environment's peft keeps the adapter of an fp16 model in fp32, and so rounds the sum alone.

    peft 0.10, which LLaVA's environment has, rounds the halves and their product too. True without peft.
    """
    if find_spec("peft") is None:
        return True
    quiet_peft()
    from peft import PeftModel

    return "autocast_adapter_dtype" in signature(PeftModel.from_pretrained).parameters
