"""What ranks send each other besides tensors: values as JSON and the tensors in them as
safetensors.

Never pickle: reading a pickle runs the code in it, and whoever reaches the port of a process group
can write to it.
"""

import json
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

TEXT = "json"  # the name of the JSON text among the tensors


def pack(value: Any) -> bytes:
    """None, numbers, strings, tensors, and lists and dictionaries of these as bytes. Raises
    TypeError for others.

    A tuple becomes a list.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(value, tensors)).encode()
    tensors[TEXT] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return safetensors.torch.save(tensors)


def unpack(data: bytes) -> Any:
    """The inverse of ``pack``; the tensors are on the CPU."""
    tensors = safetensors.torch.load(data)
    text = tensors.pop(TEXT).numpy().tobytes()
    return _decode(json.loads(text), tensors)


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON in which every object is {"dict": ...} or {"tensor": its name}, so that no dictionary
    looks like a tensor.

    The tensors are added to ``tensors``.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_encode(item, tensors) for item in value]
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # a copy: tensors that share memory are refused by safetensors
        tensors[name] = (
            value.detach().cpu().clone(memory_format=torch.contiguous_format)
        )
        return {"tensor": name}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encode(item, tensors) for key, item in value.items()}}
    raise TypeError(
        f"ranks exchange JSON and tensors, not {type(value).__name__}: {value!r:.80}"
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    return {key: _decode(item, tensors) for key, item in value["dict"].items()}
