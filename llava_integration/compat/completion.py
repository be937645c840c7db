"""What a file of this folder defines."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One addition to a module of LLaVA, or to what it uses of a library."""

    module: str  # dotted name of LLaVA's module
    when: Literal["before", "after"]  # of the execution of the module
    libraries: Mapping[str, str]  # distribution -> versions that need it, such as {"transformers": ">=5"}; any suffices
    complete: Callable[[ModuleType], None]  # takes the module, which is still empty if ``when`` is "before"

    @property
    def name(self) -> str:
        """The name of its file."""
        return self.complete.__module__.rpartition(".")[2]

    @property
    def needed(self) -> bool:
        """Whether an installed library has one of the versions."""
        from packaging.specifiers import SpecifierSet

        return any(
            SpecifierSet(versions).contains(installed, prereleases=True)
            for library, versions in self.libraries.items()
            if (installed := installed_version(library))
        )


def installed_version(library: str) -> str:
    """The version of an installed distribution, "" if it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
