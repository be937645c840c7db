"""Without a GPU, accelerate no longer lets several ranks find each other unless ``--use_cpu`` is set, with which it
ignores DeepSpeed: each rank believes to be the only one, and DeepSpeed refuses the batch size.
"""

import functools
import os
from types import ModuleType
from typing import Any

from llava_integration.compat.completion import Completion


def complete(module: ModuleType) -> None:
    """Make accelerate choose gloo on a machine without an accelerator, as its versions before 1 do."""
    import torch
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    if torch.accelerator.is_available():
        return
    original = PartialState._prepare_backend

    @functools.wraps(original)
    def _prepare_backend(self: Any, *arguments: Any, **options: Any) -> Any:
        backend, kind = original(self, *arguments, **options)
        if backend is None and int(os.environ.get("LOCAL_RANK", -1)) != -1:
            return "gloo", DistributedType.MULTI_CPU
        return backend, kind

    PartialState._prepare_backend = _prepare_backend


COMPLETION = Completion(
    module="llava.train.llava_trainer", when="before", libraries={"accelerate": ">=1"}, complete=complete
)
