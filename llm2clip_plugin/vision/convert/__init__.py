"""Vision checkpoints become tower directories, and towers other formats; here the options of ``llm2clip import``."""

from dataclasses import dataclass

from llm2clip_plugin.options import Command

FORMATS = {  # of llm2clip export
    "clip": "transformers' CLIPVisionModelWithProjection",
    "onnx": "image encoder for ONNX Runtime",
}


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """A vision checkpoint to import."""

    source: str  # directory, Hub id, timm:NAME, or file (.safetensors, .pt, .pth, .bin)
    output: str  # tower directory to write
    config: str | None = None  # config.json for a source without one; its fields override an existing one's
    image_size: int | None = None  # interpolate the positions to this size in pixels
    overwrite: bool = False  # replace an existing directory


IMPORT = Command(
    name="import",
    example="llm2clip import openai/clip-vit-large-patch14-336 --output towers/clip-l14-336",
    about="Convert a vision checkpoint into a tower directory.",
    settings=ImportConfig,
    arguments="source",
)
