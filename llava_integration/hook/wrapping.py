"""Replace a function of LLaVA by a wrapper of it, wherever it is bound."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def wrap_function(owner: Any, name: str, wrap: Wrap) -> None:
    """Set ``owner.name`` to ``wrap(owner.name)``, in loaded ``llava*`` modules that imported the function, too.

    ``owner`` is a module or a class. A second call with the same ``wrap`` does nothing.
    """
    original = getattr(owner, name)
    if original.__module__ == wrap.__module__:
        return
    wrapper = wrap(original)
    functools.update_wrapper(wrapper, original, assigned=("__name__", "__qualname__", "__doc__"))
    setattr(owner, name, wrapper)
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] == "llava" and getattr(module, name, None) is original:
            setattr(module, name, wrapper)
