"""An unfrozen tower is read while LLaVA's model is made, which transformers 5 does on the meta device.

Nothing may be read there, and what is no weight of the checkpoint (the numbers of the positions) is emptied once the
model is made. And a checkpoint's names of its weights may be those of either version of transformers: see `saving`.
"""

import contextlib
import functools
from typing import Any

from llava_integration.compat.completion import Completion
from llava_integration.compat.saving import PREFIX


def complete(module: Any) -> None:
    """Read towers on the CPU, keep their buffers, and let them take either names."""
    from transformers import PreTrainedModel

    models: Any = PreTrainedModel
    build, read = module.build_vision_tower, models.from_pretrained.__func__

    @functools.wraps(build)
    def build_vision_tower(*arguments: Any, **options: Any) -> Any:
        with on_cpu():
            tower = build(*arguments, **options)
            tower.buffers_as_read = {name: buffer.clone() for name, buffer in tower.named_buffers()}
        tower._register_load_state_dict_pre_hook(accept_either_names)
        return tower

    def from_pretrained(cls: Any, *arguments: Any, **options: Any) -> Any:
        made = read(cls, *arguments, **options)
        restore_buffers(made[0] if isinstance(made, tuple) else made)
        return made

    module.build_vision_tower = build_vision_tower
    models.from_pretrained = classmethod(from_pretrained)


def restore_buffers(model: Any) -> None:
    """Give the towers in a model that was read the buffers that they were read with."""
    for tower in [module for module in model.modules() if "buffers_as_read" in vars(module)]:
        for name, buffer in tower.named_buffers():
            buffer.copy_(tower.buffers_as_read.get(name, buffer))
        del tower.buffers_as_read


def on_cpu() -> contextlib.AbstractContextManager[Any]:
    """Leaves the meta device, if it is the default."""
    import torch

    meta = torch.get_default_device().type == "meta"
    return torch.device("cpu") if meta else contextlib.nullcontext()


def accept_either_names(state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename ``vision_tower.vision_model.*``, which transformers 5 calls ``vision_tower.*``."""
    old = f"{prefix}vision_tower.{PREFIX}"
    for name in [name for name in state if name.startswith(old)]:
        state[f"{prefix}vision_tower.{name.removeprefix(old)}"] = state.pop(name)


COMPLETION = Completion(
    module="llava.model.llava_arch", when="after", libraries={"transformers": ">=5"}, complete=complete
)
