"""The options of ``llm2clip evaluate drift``."""

from dataclasses import dataclass, field

from llm2clip_plugin.options.command import Command
from llm2clip_plugin.text.settings import EncoderConfig


@dataclass(frozen=True, kw_only=True)
class DriftConfig:
    """What a tower kept, lost and gained."""

    before: str  # tower directory, Hugging Face directory or Hub id
    after: str  # the same tower after training
    data: str = ""  # labeled images: a folder per class, tars with .cls members, or captioned data with --label
    label: str = ""  # field of the samples' JSON that is the class, for captioned data
    cluster: str = ""  # field of the samples' JSON; images with the same value are resampled together
    classes: str = ""  # file of class names, as for evaluate zeroshot
    templates: str = ""  # file of prompts, as for evaluate zeroshot
    cache: str = ""  # folder for the prompts' embeddings, one folder a teacher in it; "": the data's folder
    train: str = ""  # labeled images of the same classes that kNN and linear probe are fitted on; "": no probes
    linear: bool = False  # also fit the linear probe
    captions: str = ""  # captioned images for retrieval, whose captions are cached; "": no retrieval
    captions_images: str = ""  # image folder of captions, for .jsonl and LLaVA's .json
    group: str = ""  # field of the captioned samples' JSON: images with the same value share their captions
    clip: str = ""  # CLIP whose own text tower reads for a tower without text adapter; "": the Hub id that it came from
    teacher: EncoderConfig = field(default_factory=EncoderConfig)  # LLM of a tower with adapter, if not where it says
    cka_images: int = 2000  # images, evenly spaced, whose features are compared block by block; 0: none
    pictures: int = 48  # images that changed sides, shown in the page
    output: str = "drift.html"  # the page; the numbers are written next to it as .json
    resamples: int = 2000  # bootstrap resamples of the intervals
    batch: int = 64  # images in one call of a tower
    workers: int = 0  # processes that decode images
    device: str = ""  # cpu, cuda, cuda:1 ...; "": the accelerator, if there is one

    def __post_init__(self) -> None:
        if not self.data and not self.captions:
            raise ValueError(
                "nothing to measure: add --data LABELED_IMAGES, --captions CAPTIONED_IMAGES, or both. For example: "
                f"{EXAMPLE}"
            )
        if self.train and not self.data:
            raise ValueError(f"--train {self.train} has no effect without --data, the images that are classified")
        if self.linear and not self.train:
            raise ValueError("--linear has no effect without --train, the images that the probe is fitted on")
        if not self.output.endswith(".html"):
            raise ValueError(f"--output {self.output} is not a name of a page; expected one that ends in .html")
        if 0 < self.cka_images < 4 or min(self.cka_images, self.pictures) < 0 or min(self.batch, self.resamples) < 1:
            raise ValueError(
                f"cka-images is {self.cka_images} (expected 0 or at least 4), pictures {self.pictures} (at least 0), "
                f"batch-size {self.batch} and resamples {self.resamples} (at least 1)"
            )


EXAMPLE = "llm2clip evaluate drift towers/clip-l14 runs/l14/tower --data /data/imagenet/val --captions /data/flickr30k"

COMMAND = Command(
    name="evaluate drift",
    example=EXAMPLE,
    about="What did a tower keep, lose and gain? Zero-shot accuracy, probes and retrieval of BEFORE and AFTER on the "
    "same images, with paired intervals; accuracy kept and lost a class; the similarity of their features by block; a "
    "page with pictures of what changed sides, and the numbers as JSON next to it. A tower without text adapter is "
    "read with the text tower of the CLIP that it was imported from.",
    settings=DriftConfig,
    arguments=("before", "after"),
    everyday=(
        "data",
        "label",
        "classes",
        "templates",
        "train",
        "captions",
        "group",
        "clip",
        "teacher.llm",
        "teacher.adapter",
        "output",
        "device",
    ),
    shown={"batch": "batch-size"},
)
