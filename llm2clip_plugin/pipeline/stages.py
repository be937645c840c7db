"""The stages of a run: what each is called with, what it must leave, and how long it may take."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from llm2clip_plugin.commands import changed_options
from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.records import words_of
from llm2clip_plugin.data.sources.rows import RowSource
from llm2clip_plugin.data.split.writing import outputs
from llm2clip_plugin.pipeline.options import PipelineConfig
from llm2clip_plugin.text.config import LoraSettings
from llm2clip_plugin.text.settings import EncoderConfig
from llm2clip_plugin.text.shape import llm_config, shape_llm
from llm2clip_plugin.train.flops import peak_of
from llm2clip_plugin.vision.meta_tower import meta_tower

SURVEYED = 1000  # samples that are read for the plan
TOKENS = 1.5  # of a word, with what the LLM's template adds
USED = 0.35  # fraction of a device's peak that training reaches
START = 12.0  # seconds until a program has imported its libraries and opened its models
BEFORE, AFTER = "before", "after"  # folders of the two towers' trainings
READ = ("format", "fields", "language", "image_field", "key_field", "cache_folder", "cache_gb")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command of a run."""

    name: str
    words: tuple[str, ...]  # after llm2clip
    result: Path  # exists when the stage is complete
    seconds: float = 0.0  # of work, estimated
    apart: bool = False  # in processes of its own, one a GPU


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What some samples say about all."""

    samples: int
    captions: float  # of a sample
    tokens: float  # of a caption
    pairs: str  # how stage 1 pairs captions, QUERY:POSITIVE; "": it can't
    note: str


def survey(source: Source) -> Survey:
    """Read up to SURVEYED samples, evenly spaced."""
    step = max(1, len(source) // SURVEYED)
    texts = [source.captions(number)[1] for number in range(0, len(source), step)]
    flat = [caption for captions in texts for caption in captions]
    if not flat:
        raise ValueError(f"no captions in {source.path}; llm2clip data check shows its fields")
    kinds = [{caption.kind for caption in captions} for captions in texts]
    several = [captions for captions in texts if len(captions) > 1]
    words = [[f" {words_of(caption.text)} " for caption in captions] for captions in several]
    nested = sum(any(one != other and one in other for one in each for other in each) for each in words)
    pairs = "short:long" if sum({"short", "long"} <= one for one in kinds) > len(texts) / 2 else "short:same"
    note = ""
    if len(several) <= len(texts) / 2:
        pairs, note = "", "stage 1 is left out: it needs images with several captions (--fields)"
    elif nested > len(several) / 2:
        pairs, note = "", "stage 1 is left out: most captions contain another one of their image, so it learns nothing"
    tokens = TOKENS * sum(len(caption.text.split()) for caption in flat) / len(flat)
    return Survey(samples=len(source), captions=len(flat) / len(texts), tokens=tokens, pairs=pairs, note=note)


def plan(config: PipelineConfig, source: Source, found: Survey) -> list[Stage]:
    """Every stage of the run, in order."""
    out, cost = Path(config.output), Cost(config, found)
    train = round(found.samples * (1 - config.validation))
    held_out = found.samples - train
    batch = config.global_batch or min(256, max(8, 1 << (train // 16).bit_length()))
    precision = config.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    data = {side: str(path) for side, path in outputs(source, out / "data").items()}
    read = changed_options(config, READ)
    images = ["--image-folder", source.images_folder] if isinstance(source, RowSource) else []
    given = [config.path, *changed_options(config, ("images", *READ))]
    tunes = config.stage1 and bool(found.pairs) and not config.adapter
    adapter = str(out / "llm" / "adapter") if tunes else config.adapter
    llm = ["--llm", config.llm, *(["--adapter", adapter] if adapter else [])]
    imported = not (Path(config.tower) / "config.json").is_file()
    start = str(out / "start") if imported else config.tower
    batches = ["--global-batch", str(batch), *changed_options(config, ("micro_batch",))]
    steps = max(1, train * (1 if train > 100 * batch else 4) // batch)
    tower = [data["train"], "--validation", data["validation"], *images, *read, "--tower", start, *batches]
    tower += ["--precision", precision, *shlex.split(config.tower_options)]
    fit = cost.tower(min(train, 20_000) + 2 * held_out)
    trained = cost.tower(4 * train * config.num_train_epochs)
    stages: list[Stage] = []

    def add(name: str, *words: str, result: Path, seconds: float = 0.0) -> None:
        apart = seconds > 0
        stages.append(Stage(name=name, words=words, result=result, seconds=seconds + START * apart, apart=apart))

    add("check the data", "data", "check", *given, result=Path())  # it writes nothing
    split = ["--output", str(out / "data"), "--validation", f"{config.validation:g}", *changed_options(config, ("by",))]
    add("hold out validation", "data", "split", *given, *split, result=out / "data" / "split.json")
    if imported:
        add("import the tower", "import", config.tower, "--output", start, result=Path(start))
    if tunes:
        words = [data["train"], *images, *read, *llm[:2], "--pair-kinds", found.pairs, *batches]
        words += ["--max-steps", str(steps), "--warmup-steps", str(min(300, steps // 10)), "--output", str(out / "llm")]
        add("stage 1", "finetune-llm", *words, result=Path(adapter), seconds=cost.llm(6 * steps * batch))
    for side, count in (("train", train), ("validation", held_out)):
        seconds = cost.llm(count * found.captions)
        add(f"embed {side}", "embed", data[side], *images, *read, *llm, result=Path(data[side]), seconds=seconds)
    for name, folder, epochs, seconds in (
        ("heads on the start tower", BEFORE, 0.0, fit),
        ("stage 2", AFTER, config.num_train_epochs, fit + trained),
    ):
        words = [*tower, "--num-train-epochs", f"{epochs:g}", "--output", str(out / folder)]
        add(name, "train-tower", *words, result=out / folder / "tower", seconds=seconds)
    scores = {folder: out / folder / "validation.scores.json" for folder in (BEFORE, AFTER)}
    for folder, path in scores.items():
        words = [str(out / folder / "tower"), data["validation"], *images, *read, "--output", str(path)]
        add(f"measure {folder}", "evaluate", *words, result=path)
    words = [*map(str, scores.values()), "--names", BEFORE, AFTER, "--output", str(out / "compare")]
    add("compare", "compare", *words, result=out / "compare" / "compare.json")
    words = [str(out / AFTER), "--output", str(out / "tower"), "--overwrite", *["--with-adapter"] * bool(adapter)]
    add("export", "export", *words, result=out / "tower" / TowerCard.FILE)
    return stages


class Cost:
    """Seconds of passes through the models, from their sizes and the device's speed."""

    def __init__(self, config: PipelineConfig, found: Survey) -> None:
        self.tokens, self.speed = found.tokens, flops_per_second() * config.num_gpus
        try:
            encoder = EncoderConfig(llm=config.llm)
            self.of_llm = linear_weights(shape_llm(llm_config(encoder), encoder, LoraSettings(), "fp32").llm)
        except (FileNotFoundError, ValueError):
            self.of_llm = 1.0e9
        try:
            tower = meta_tower(config.tower)
            self.of_image = linear_weights(tower) * (1 + (tower.config.image_size // tower.config.patch_size) ** 2)
        except (FileNotFoundError, ValueError):
            self.of_image = 86e6 * 197  # ViT-B/16 at 224 px

    def llm(self, captions: float) -> float:
        """Captions through the LLM; a backward pass is two."""
        return 2 * captions * self.tokens * self.of_llm / self.speed

    def tower(self, images: float) -> float:
        """Images through the tower; a training step is four with recomputation."""
        return 2 * images * self.of_image / self.speed


def linear_weights(model: torch.nn.Module) -> float:
    """Weights that every token is multiplied with."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))


def flops_per_second() -> float:
    """What training reaches on this machine's device: by its name, or measured."""
    cuda = torch.cuda.is_available()
    if cuda and (peak := peak_of(torch.cuda.get_device_name(), torch.bfloat16, tf32=True)):
        return USED * peak
    device, size = ("cuda", 4096) if cuda else ("cpu", 768)
    matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    begin, products = time.perf_counter(), 0
    while (seconds := time.perf_counter() - begin) < 0.3:
        float((matrix @ matrix)[0, 0])
        products += 1
    return USED * 2 * size**3 * products / seconds
