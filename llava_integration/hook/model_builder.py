"""``llava.model.builder``: ``load_pretrained_model`` lets a tower bundled in the checkpoint be found."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from llava_integration.hook.wrapping import wrap_function
from llava_integration.towers import provenance


def complete(module: ModuleType) -> None:
    """Wrap ``load_pretrained_model``."""
    wrap_function(module, "load_pretrained_model", remembering_checkpoint)


def remembering_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """``load_pretrained_model`` that makes its path known to ``provenance`` while it runs."""

    def load_pretrained_model(model_path: str, *arguments: Any, **options: Any) -> Any:
        with provenance.loading(model_path):
            return original(model_path, *arguments, **options)

    return load_pretrained_model
