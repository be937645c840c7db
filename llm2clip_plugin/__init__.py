"""LLM2CLIP for LLaVA 1.5: an LLM teaches a CLIP vision tower, and the tower plugs into LLaVA.

>>> from llm2clip_plugin import load_tower, load_dual_encoder
>>> tower = load_tower("path/or/hub-id")          # a Hugging Face vision model
>>> dual = load_dual_encoder("path/or/hub-id")    # encode_image(pixels), encode_text(["a bird"])

Nothing heavy is imported until one of the names below is used.
"""

from importlib import import_module

# type checkers know the name; importing typing would be a quarter of the time of `--help`
TYPE_CHECKING = False
if TYPE_CHECKING:
    from llm2clip_plugin.text.teacher import load_dual_encoder
    from llm2clip_plugin.vision.towers import load_tower

__version__ = "0.3.0"
__all__ = ["__version__", "load_dual_encoder", "load_tower"]

_HOMES = {
    "load_tower": "llm2clip_plugin.vision.towers",
    "load_dual_encoder": "llm2clip_plugin.text.teacher",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        import_module("llm2clip_plugin.installation").require(
            "tower", f"llm2clip_plugin.{name}"
        )
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
