"""The options of ``llm2clip import``, and the formats of ``llm2clip export``; read without torch."""

from llm2clip_plugin.options import Parser

FORMATS = {
    "clip": "transformers' CLIPVisionModelWithProjection",
    "onnx": "image encoder for ONNX Runtime",
    "openclip": "OpenCLIP's tensor names (CLIP, SigLIP) or EVA-CLIP's (EVA02) with the LLM's adapter, for their image "
    "towers and `llm2clip import`; OpenCLIP's create_model needs a text tower and does not load it",
}


def parser() -> Parser:
    """The command line."""
    made = Parser(
        "import",
        "llm2clip import openai/clip-vit-large-patch14-336 --output towers/clip-l14-336",
        "Convert a vision checkpoint into a tower directory.",
    )
    made.add_argument(
        "source", metavar="SOURCE", help="directory, Hub id, timm:NAME, or file (.safetensors, .pt, .pth, .bin)"
    )
    made.add_argument("--output", metavar="DIR", required=True, help="tower directory to write")
    made.add_argument(
        "--config", metavar="FILE", help="config.json for a source without one; its fields override an existing one's"
    )
    made.add_argument("--image-size", type=int, help="interpolate the positions to this size in pixels")
    made.add_argument("--overwrite", action="store_true", help="replace an existing directory")
    return made
