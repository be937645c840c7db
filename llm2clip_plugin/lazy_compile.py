"""Libraries whose functions are decorated with ``torch.compile``, imported without its compiler.

Decorating imports TorchInductor, over a second of processor time on every rank, for functions that most runs never
call. Imported here, they are compiled at their first call. Without effect on a DeepSpeed that decorates while it is
imported itself (0.19.1 does, 0.19.8 does not).
"""

import contextlib
import functools
import importlib
import inspect
import sys
import threading
from collections.abc import Callable
from typing import Any

MUON = "deepspeed.runtime.zero.muon.muon_optimizer"  # imported by ZeRO, which compares the optimizer's type with it
BITSANDBYTES = "bitsandbytes"  # imported by PEFT

_one_at_a_time = threading.Lock()


def import_without_compiler(module: str) -> None:
    """Import a module; one that cannot be imported is left to those who need it."""
    import torch

    with _one_at_a_time:
        if module in sys.modules:
            return
        original = torch.compile
        torch.compile = functools.partial(compile_when_called, original)  # type: ignore[assignment]
        try:
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
        finally:
            torch.compile = original


def compile_when_called(compiler: Callable[..., Any], model: Any = None, **options: Any) -> Any:
    """What ``compiler(model, **options)`` returns, made at its first call; a decorator without ``model``."""
    if model is None:
        return functools.partial(compile_when_called, compiler, **options)
    if not inspect.isfunction(model):
        return compiler(model, **options)
    compiled = functools.cache(lambda: compiler(model, **options))

    @functools.wraps(model)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call
