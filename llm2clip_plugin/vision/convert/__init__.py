"""Vision checkpoints become tower directories, and towers other formats. Here: the options of both
commands."""

from dataclasses import dataclass

from llm2clip_plugin.options import Command, setting, unknown

FORMATS = {  # of llm2clip export
    "clip": "transformers' CLIPVisionModelWithProjection",
    "onnx": "image encoder for ONNX Runtime",
    "sentence-transformers": "pictures and texts for SentenceTransformer(DIR)",
}


PART = "vision"  # of a vision-language model, for `llm2clip import --part`


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """A vision checkpoint to import."""

    source: str = setting(
        help="directory, Hub id, timm:NAME, or file (.safetensors, .pt, .pth, .bin)",
    )
    output: str = setting(help="tower directory to write")
    config: str | None = setting(
        None,
        help="config.json for a source without one; its fields override an existing one's",
    )
    image_size: int | None = setting(
        None, help="interpolate the positions to this size in pixels"
    )
    part: str = setting(
        "",
        help="vision: the tower of a vision-language model, whose other tensors are not read; "
        '"": the source is a vision or an image-text model',
    )
    overwrite: bool = setting(False, help="replace an existing directory")

    def __post_init__(self) -> None:
        if self.part not in ("", PART):
            raise ValueError(unknown("--part", self.part, (PART,)))


IMPORT = Command(
    name="import",
    example="llm2clip import openai/clip-vit-large-patch14-336 --output towers/clip-l14-336",
    about="Convert a vision checkpoint into a tower directory.",
    settings=ImportConfig,
    arguments="source",
)


@dataclass(frozen=True, kw_only=True)
class TowerExportConfig:
    """A run or a tower directory to export."""

    source: str = setting(help="folder of a training run, tower directory, or Hub id")
    output: str = setting(help="directory to write")
    format: str = setting("tower", help="tower: a tower directory; or another format")
    with_adapter: bool = setting(
        False,
        help="copy the teacher LLM's adapter, so that the directory embeds texts with the base LLM",
    )
    merge: bool = setting(
        False,
        help="with --format sentence-transformers: write the teacher LLM's weights, too, its "
        "adapter merged, so that the directory needs nothing else",
    )
    llm: str = setting(
        "",
        help='with --format sentence-transformers: folder or Hub id of the teacher LLM; "": where '
        "the tower's card says",
        per_host=True,
    )
    adapter: str = setting(
        "",
        help='with --format sentence-transformers: folder of the teacher LLM\'s adapter; "": where '
        "the tower's card says",
        per_host=True,
    )
    trust_remote_code: bool = setting(
        False,
        help="with --format sentence-transformers: run the Python code in the folder of a teacher "
        "LLM that transformers does not have, now and whenever the export is opened: read it first",
    )
    checkpoint: str = setting("", help='a run\'s checkpoint to export; "": the newest')
    ema: bool = setting(
        False, help="export a run's moving average instead of its weights"
    )
    push: str | None = setting(
        None, help="OWNER/NAME: also upload the tower directory to the Hub"
    )
    public: bool = setting(False, help="make the uploaded repository public")
    overwrite: bool = setting(False, help="replace an existing directory")

    def __post_init__(self) -> None:
        if self.format not in (formats := ("tower", *FORMATS)):
            raise ValueError(unknown("--format", self.format, formats))
        of_teacher = self.merge or self.llm or self.adapter or self.trust_remote_code
        if of_teacher and self.format != "sentence-transformers":
            raise ValueError(
                "--merge, --llm, --adapter and --trust-remote-code require "
                "--format sentence-transformers"
            )


_FORMATS = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
EXPORT = Command(
    name="export",
    example="llm2clip export runs/l14-336 --output towers/l14-336",
    about="Write a run as a tower directory, or a tower directory in another format: "
    f"{_FORMATS}.",
    settings=TowerExportConfig,
    arguments="source",
)
