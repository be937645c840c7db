"""How a function completes a module of LLaVA: what ``patches`` says of its functions, and
``runner`` reads."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

When = Literal["before", "after"]
TRAINER = "llava.train.llava_trainer"


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
    original = (
        getattr(owner, name).__func__ if is_class_method else getattr(owner, name)
    )

    def decorate(function: Callable[..., Any]) -> None:
        @functools.wraps(original)
        def replacement(*arguments: Any, **options: Any) -> Any:
            return function(original, *arguments, **options)

        setattr(
            owner, name, classmethod(replacement) if is_class_method else replacement
        )

    return decorate
