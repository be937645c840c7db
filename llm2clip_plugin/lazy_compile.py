"""Libraries whose functions are decorated with ``torch.compile``, imported without its compiler.

Decorating imports TorchInductor: 1.5 of 9 CPU seconds of a short run of stage 2, on every rank, for functions that most
runs never call. Imported here, they are compiled at their first call.
"""

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

MUON = "deepspeed.runtime.zero.muon.muon_optimizer"  # ZeRO asks of each optimizer whether it is one
BITSANDBYTES = "bitsandbytes"  # PEFT asks of each layer whether it is of 4 or 8 bits


def import_without_compiler(module: str) -> None:
    """Import a module, unless it is not installed or has been imported."""
    import torch

    if module in sys.modules:
        return
    original = torch.compile
    torch.compile = functools.partial(compiled_when_called, original)  # type: ignore[assignment]
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    finally:
        torch.compile = original


def compiled_when_called(compiler: Callable[..., Any], function: Callable[..., Any] | None = None, **options: Any):
    """What ``compiler(function, **options)`` returns, made at its first call; a decorator without ``function``."""
    if function is None:
        return functools.partial(compiled_when_called, compiler, **options)
    compiled = functools.cache(lambda: compiler(function, **options))

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return compiled()(*arguments, **named)

    return call
