"""The options of ``llm2clip evaluate zeroshot``."""

from dataclasses import dataclass, field

from llm2clip_plugin.options.command import Command
from llm2clip_plugin.text.settings import EncoderConfig


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig:
    """Zero-shot classification."""

    tower: str  # tower directory or Hub id, with a text adapter
    data: str  # labeled images: a folder per class, tars with .cls members, or captioned data with --label
    label: str = ""  # field of the samples' JSON that is the class, for captioned data
    classes: str = ""  # file of class names: one per line, CLASS<TAB>NAME, or JSON; "": classnames.txt, or the folders
    templates: str = ""  # file of prompts, one per line, {c} for the class; "": the data's, or "a photo of a {c}."
    cache: str = ""  # folder of the prompts' embeddings; "": embeddings-<fingerprint> in the data's folder
    teacher: EncoderConfig = field(default_factory=EncoderConfig)  # the tower's LLM, for prompts not cached yet
    batch: int = 64  # images in one call of the tower
    workers: int = 0  # processes that decode images
    device: str = ""  # cpu, cuda, cuda:1 ...; "": the accelerator, if there is one
    json: str = ""  # write the metrics and every image's hit here (a score file)
    clip_benchmark: str = ""  # write the metrics here in CLIP_benchmark's format


COMMAND = Command(
    name="evaluate zeroshot",
    example="llm2clip evaluate zeroshot towers/l14-336 /data/imagenet/val --classes classnames.txt",
    about="Measure a tower's zero-shot classification. DATA has one folder per class (ImageNet), or WebDataset tars "
    "with .cls members (CLIP_benchmark, whose classnames.txt and zeroshot_classification_templates.txt are used); or "
    "it is captioned data, with --label.",
    settings=ZeroShotConfig,
    arguments="tower data",
    everyday="label classes templates cache llm adapter batch-size workers output device",
    shown={"json": "output"},
)
