"""The settings and options of all that measures: retrieval, captions, classification, forecast;
read without torch."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import llm2clip_plugin
from llm2clip_plugin.data.sources import ReadConfig, SourceConfig
from llm2clip_plugin.options import Command, section, setting
from llm2clip_plugin.text.config import EncoderConfig

KS = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """How retrieval is measured."""

    kinds: tuple[str, ...] = setting(
        (), help="only captions of these kinds; empty: all"
    )
    languages: tuple[str, ...] = setting(
        (), help="only captions of these languages; empty: all"
    )
    group: str = setting(
        "",
        help='JSON field of the samples: images with the same value share their captions; "": no '
        "groups",
    )
    cluster: str = setting(
        "",
        help='JSON field of the samples: resampled together in the bootstrap; "": the group, or '
        "the image",
    )
    ks: tuple[int, ...] = setting(
        KS, help="k of recall@k: a hit is a correct item in the top k"
    )
    limit: int = setting(0, help="use the first images, at most this many; 0: all")
    batch: int = setting(
        64, help="images in one call of the tower", option="batch-size"
    )
    workers: int | None = setting(
        None,
        help="processes that decode images; unset: none, during training as many as it has",
    )

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise ValueError(
                f"ks {' '.join(map(str, self.ks)) or 'is empty'}: recall@k needs numbers above 0"
            )


@dataclass(frozen=True, kw_only=True)
class SuitesConfig:
    """Benchmarks that are measured at every evaluation of a training run."""

    suites: tuple[str, ...] = setting(
        (),
        help="retrieval suites by name (flickr30k, coco, sugarcrepe ...), paper, or all",
        option="evaluate-suites",
    )
    root: str = setting(
        "",
        help="folder of the suites' folders",
        option="suites-root",
        per_host=True,
        needs="suites",
    )
    zeroshot: str = setting(
        "",
        help="labeled images to classify by class names: a folder per class, or tars with .cls "
        "members",
        option="evaluate-zeroshot",
        per_host=True,
    )

    def __post_init__(self) -> None:
        if self.suites and not self.root:
            raise ValueError(
                "--evaluate-suites needs the folder that has the suites' folders: set "
                "--suites-root DIR"
            )


@dataclass(frozen=True, kw_only=True)
class CaptionSetConfig:
    """Which captions retrieve which."""

    captions: str = setting("", help="captioned images; only the captions are read")
    retrieve: tuple[str, ...] = setting(
        ("short:long",),
        help="FIRST:SECOND, kinds of captions: the first retrieves the second",
    )
    home: str = setting(
        "en",
        help="language of these captions, and the target of cross-lingual retrieval",
    )
    across: bool = setting(
        True,
        help="also retrieve from every other language into the home language",
    )
    across_kind: str = setting(
        "short", help="kind of caption for cross-lingual retrieval"
    )
    limit: int = setting(5000, help="use the first images, at most this many")

    def __post_init__(self) -> None:
        for text in self.retrieve:
            if text.count(":") != 1 or not all(text.split(":")):
                raise ValueError(
                    f"--retrieve expects FIRST:SECOND, such as short:long; got {text!r}"
                )


# Jiang et al. 2024, arXiv 2307.16645
PROMPT_EOL = 'This sentence: "{caption}" means in one word: "'


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """What `evaluate captions --search` tries, besides both attentions, both poolings and every
    hidden state."""

    fit_on: str = setting(
        "",
        help="training captions, 2,000 at most, which centering and components are fitted on",
    )
    folder: str = setting(
        "",
        help="folder to write the best to: a card, and its post-processing; for `llm2clip run "
        "--reading`",
    )
    templates: tuple[str, ...] = setting(
        ("", PROMPT_EOL), help="chat templates; empty: none"
    )
    components: tuple[int, ...] = setting(
        (0, 1, 2, 3, 5, 10),
        help="largest principal components that are removed; 0: centering",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateCaptionsConfig:
    """Caption retrieval accuracy of an LLM."""

    measure: CaptionSetConfig = section(
        CaptionSetConfig(), options={"captions": "data"}
    )
    # how the captions are read
    read: ReadConfig = section(
        ReadConfig(), hidden=("kinds", "languages", "shuffle_window")
    )
    encoder: EncoderConfig = section(EncoderConfig())
    search: bool = setting(
        False,
        help="try prompts, attention, layers and pooling on DATA, validation captions, and print "
        "the best",
    )
    reading: ReadingConfig = section(ReadingConfig())
    json: str = setting(
        "",
        help="file to write: the metrics and every caption's hit, for llm2clip compare",
        option="output",
    )


EVALUATE_CAPTIONS = Command(
    name="evaluate captions",
    example=(
        "llm2clip evaluate captions /data/coco --llm meta-llama/Llama-3.2-1B --retrieve short:short"
    ),
    about=(
        "Measure the caption retrieval accuracy of an LLM, fine-tuned or not: one caption of an "
        "image retrieves another, within and across languages. Images are not read."
    ),
    settings=EvaluateCaptionsConfig,
    arguments="measure.captions",
    everyday=(
        "llm adapter preset fields retrieve home across across-kind limit search fit-on folder "
        "output"
    ),
)


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """How images are encoded."""

    batch: int = setting(
        64, help="images in one call of the tower", option="batch-size"
    )
    workers: int = setting(0, help="processes that decode images")
    device: str = setting(
        "", help='cpu, cuda, cuda:1 ...; "": the accelerator, if there is one'
    )


DRAWINGS = (
    Path(llm2clip_plugin.__file__).parent / "data" / "emoji" / "validation-noto.tar"
)


@dataclass(frozen=True, kw_only=True)
class ForecastConfig(MeasureConfig):
    """How well towers are likely to serve an LLM in LLaVA."""

    towers: tuple[str, ...] = setting(
        help="tower directories, Hugging Face directories or Hub ids; differences are to the first",
    )
    data: SourceConfig = section(
        SourceConfig(path=str(DRAWINGS)), hidden=("weight", "shuffle_window")
    )
    # as LLaVA runs it; the state of <s> would drown the captions
    encoder: EncoderConfig = section(
        EncoderConfig(attention="causal", layer=-2, include_bos=False)
    )
    cache: str = setting(
        "",
        help="folder of the captions' embeddings; \"\": forecast-<fingerprint> in the data's "
        "folder",
    )
    cluster: str = setting(
        "",
        help="field of the samples' JSON; images with the same value are resampled and held out "
        "together",
    )
    select_layer: int = setting(
        -2,
        help="hidden state of the tower whose patches are read, LLaVA's mm_vision_select_layer",
    )
    limit: int = setting(1000, help="images, evenly spaced, at most")
    json: str = setting(
        "",
        help="write each tower's measures and every image's values here (score files, for llm2clip "
        "compare)",
        option="output",
    )

    def __post_init__(self) -> None:
        if not (self.towers and self.encoder.llm):
            raise ValueError(
                f"no {'LLM' if self.towers else 'tower'} given; for example: {EXAMPLE}"
            )


EXAMPLE = (
    "llm2clip forecast towers/clip-l14 runs/l14/tower --llm lmsys/vicuna-7b-v1.5 --data "
    "/data/lcs-558k.json"
)

FORECAST = Command(
    name="forecast",
    example=EXAMPLE,
    about=(
        "Before any LLaVA is trained: how well do a tower's patches agree with what an LLM makes "
        "of the images' captions? Mutual neighbors (RAVEL), CKA and a linear probe, with "
        "intervals; of two or more towers the paired differences to the first. Without --data: the "
        "package's 200 validation drawings."
    ),
    settings=ForecastConfig,
    arguments="towers",
    everyday="llm data image-folder kinds languages cache cluster select-layer limit output device",
)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(MeasureConfig):
    """kNN and linear probe on a tower's features."""

    tower: str = setting(help="tower directory, Hugging Face directory or Hub id")
    train: str = setting(help="labeled images that the probes are fitted on")
    test: str = setting(help="labeled images to classify")
    label: str = setting(
        "",
        help="field of the samples' JSON that is the class, for captioned data",
    )
    cluster: str = setting(
        "",
        help="field of the samples' JSON; images with the same value are resampled and held out "
        "together",
    )
    pool: Literal["pooled", "cls", "mean", "cls_mean"] = setting(
        "pooled",
        help="feature: the tower's own pooling, the CLS token, the mean of the patches, or the "
        "last two concatenated",
    )
    k: int = setting(20, help="neighbors that vote")
    linear: bool = setting(True, help="also fit the linear probe")
    json: str = setting(
        "",
        help="write the metrics and every test image's hits here (a score file)",
        option="output",
    )

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"--k {self.k}: expected at least one neighbor")


EVALUATE_PROBE = Command(
    name="evaluate probe",
    example="llm2clip evaluate probe towers/l14-336 /data/imagenet/train /data/imagenet/val",
    about=(
        "Measure the features of a tower, or of the one it was trained from, by kNN and a linear "
        "probe. TRAIN and TEST have one folder per class, or tars with .cls members; with --label "
        "they are captioned data."
    ),
    settings=ProbeConfig,
    arguments="tower train test",
)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Retrieval recall of a tower."""

    tower: str = setting(help="tower directory or Hub id, with a text adapter")
    data: SourceConfig = section(
        hidden=("weight", "shuffle_window", "kinds", "languages")
    )
    cache: str = setting(
        "",
        help='the teacher\'s embeddings of the captions; "": embeddings-<fingerprint> in the '
        "data's folder",
        needs="not suite",
    )
    retrieval: RetrievalConfig = section(RetrievalConfig())
    device: str = setting(
        "", help='cpu, cuda, cuda:1 ...; "": the accelerator, if there is one'
    )
    json: str = setting(
        "",
        help="file to write: the metrics and every query's hits, for llm2clip compare; with "
        '--suite a folder with one file a suite, "": scores-<hash of the tower> in DATA',
        option="output",
    )
    suite: str = setting(
        "",
        help="benchmarks by name, separated by commas, each in a folder of DATA; paper: those that "
        "the paper reports; all",
    )
    # the tower's LLM, for captions not cached yet
    teacher: EncoderConfig = section(EncoderConfig())
    overwrite: bool = setting(
        False,
        help="with --suite: measure again even where a score file exists",
        needs="suite",
    )


EVALUATE = Command(
    name="evaluate",
    example=(
        "llm2clip evaluate runs/l14-336/tower /data/flickr30k.jsonl --image-folder "
        "/data/flickr30k-images"
    ),
    about=(
        "Measure a tower's image-text retrieval recall on captioned data; captions that are not "
        "cached are embedded once. Under torchrun or the deepspeed launcher the ranks split the "
        "work. With --suite paper, or names (flickr30k, coco, sugarcrepe ...): benchmarks. Of "
        "those without files a line says where to get them."
    ),
    settings=EvaluateConfig,
    arguments="tower data.path",
    everyday="suite cache image-folder fields kinds languages group limit batch-size output device",
)


@dataclass(frozen=True, kw_only=True)
class SearchConfig(MeasureConfig):
    """Images by text."""

    tower: str = setting(help="tower directory or Hub id, with a text adapter")
    # images, with or without captions; also a folder of image files
    data: SourceConfig = section(
        hidden=("weight", "shuffle_window", "kinds", "languages")
    )
    text: tuple[str, ...] = setting((), help="texts to search for, in any language")
    top_k: int = setting(10, help="images of each text")
    output: str = setting("search.html", help='the page to write; "": none')
    cache: str = setting(
        "",
        help='folder of the embedded images; "": `search` in LLM2CLIP_CACHE, else '
        "~/.cache/llm2clip/search",
    )
    # the LLM, if not where the card says
    teacher: EncoderConfig = section(EncoderConfig())

    def __post_init__(self) -> None:
        problem = ""
        if self.top_k < 1:
            problem = f"top-k is {self.top_k}"
        elif not self.text or not all(map(str.strip, self.text)):
            problem = "no text to search for, or a blank one"
        if problem:
            raise ValueError(
                f'{problem}; usage: llm2clip search TOWER DATA "a bird on a wire" --top-k 10'
            )
        if os.path.isdir(self.output):
            raise ValueError(
                f"--output {self.output} is a folder; choose a file to write, such as search.html"
            )


SEARCH = Command(
    name="search",
    example=(
        'llm2clip search towers/l14-336 /data/photos "a bird on a wire" "ein Vogel" '
        "--output birds.html"
    ),
    about=(
        "Find the images that are nearest to each text, with the tower's teacher. DATA is "
        "captioned data of any format, or a folder of image files. Images are embedded once; rerun "
        "the same command to resume."
    ),
    settings=SearchConfig,
    arguments="tower data.path text",
    everyday="top-k output cache image-folder llm adapter batch-size workers device",
)


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig(MeasureConfig):
    """Zero-shot classification."""

    tower: str = setting(help="tower directory or Hub id, with a text adapter")
    data: str = setting(
        help="labeled images: a folder per class, tars with .cls members, or captioned data with "
        "--label",
    )
    label: str = setting(
        "",
        help="field of the samples' JSON that is the class, for captioned data",
    )
    classes: str = setting(
        "",
        help='file of class names, one per line, or CLASS<TAB>NAME; "": classnames.txt, or the '
        "folders",
    )
    templates: str = setting(
        "",
        help='file of prompts, one per line, {c} for the class; "": the data\'s, or "a photo of a '
        '{c}."',
    )
    cache: str = setting(
        "",
        help="folder of the prompts' embeddings; \"\": embeddings-<fingerprint> in the data's "
        "folder",
    )
    # the tower's LLM, for prompts not cached yet
    teacher: EncoderConfig = section(EncoderConfig())
    json: str = setting(
        "",
        help="write the metrics and every image's hit here (a score file)",
        option="output",
    )


EVALUATE_ZEROSHOT = Command(
    name="evaluate zeroshot",
    example="llm2clip evaluate zeroshot towers/l14-336 /data/imagenet/val --classes classnames.txt",
    about=(
        "Measure a tower's zero-shot classification. DATA has one folder per class, or tars with "
        ".cls members (CLIP_benchmark's, with its classnames.txt and templates), or it is "
        "captioned data, with --label."
    ),
    settings=ZeroShotConfig,
    arguments="tower data",
    everyday="label classes templates cache llm adapter batch-size workers output device",
)
