"""The stages of a run: the command of each, and what it must leave."""

from __future__ import annotations

import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from llm2clip_plugin.commands import changed_options
from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.data.sources.rows import RowSource
from llm2clip_plugin.data.split.writing import outputs
from llm2clip_plugin.pipeline.estimate import Survey
from llm2clip_plugin.pipeline.options import PRETRAIN, PipelineConfig

BEFORE, AFTER = SIDES = "before", "after"  # folders of the two towers' trainings
READ = ("format", "fields", "language", "image_field", "key_field", "cache_folder", "cache_gb")
LLAVA_STEPS = 300  # of the projector, at least; LLaVA 1.5's own are 2,180
ON_ALL_GPUS = ("finetune-llm", "embed", "train-tower")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command of a run."""

    name: str
    words: tuple[str, ...]
    result: Path  # exists when the stage is complete
    ranks: int = 1  # processes

    @property
    def argv(self) -> list[str]:
        """The program and its words, by this Python."""
        if self.words[0] != "llm2clip":
            return ["bash", *self.words]
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}", "-m"]
        return [sys.executable, "-m", *launcher * (self.ranks > 1), "llm2clip_plugin.cli", *self.words[1:]]


def stage(config: PipelineConfig, name: str, *words: object, result: Path) -> Stage:
    """A stage of ``llm2clip WORDS``, or of a script; what computes does so on all GPUs."""
    ranks = config.num_gpus if words[1] in ON_ALL_GPUS else 1
    return Stage(name=name, words=tuple(map(str, words)), result=result, ranks=ranks)


def plan(config: PipelineConfig, source: Source, found: Survey) -> list[Stage]:
    """Every stage of the run, in order."""
    out = Path(config.output)
    train = round(found.samples * (1 - config.validation))
    batch = config.global_batch or min(256, max(8, 1 << (train // 16).bit_length()))
    data = {side: str(path) for side, path in outputs(source, out / "data").items()}
    images = ["--image-folder", source.images_folder] if isinstance(source, RowSource) else []
    read = [*images, *changed_options(config, READ)]
    given = [config.path, *changed_options(config, ("images", *READ))]
    tunes = config.stage1 and bool(found.pairs) and not config.adapter
    adapter = str(out / "llm" / "adapter") if tunes else config.adapter
    imported = not (Path(config.tower) / "config.json").is_file()
    start = str(out / "start") if imported else config.tower
    batches = ["--global-batch", str(batch), *changed_options(config, ("micro_batch",))]
    stages: list[Stage] = []

    def add(name: str, *words: object, result: Path) -> None:
        stages.append(stage(config, name, "llm2clip", *words, result=result))

    add("check the data", "data", "check", *given, result=Path())  # it writes nothing
    split = ["--output", out / "data", "--validation", f"{config.validation:g}", *changed_options(config, ("by",))]
    add("hold out validation", "data", "split", *given, *split, result=out / "data" / "split.json")
    if imported:
        add("import the tower", "import", config.tower, "--output", start, result=Path(start))
    if tunes:
        steps = max(1, train * (1 if train > 100 * batch else 4) // batch)
        words = ["--pair-kinds", found.pairs, *batches, "--max-steps", steps, "--warmup-steps", min(300, steps // 10)]
        words = [data["train"], *read, "--llm", config.llm, *words, "--output", out / "llm"]
        add("stage 1", "finetune-llm", *words, result=Path(adapter))
    for side in ("train", "validation"):
        words = [data[side], *read, "--llm", config.llm, *(["--adapter", adapter] if adapter else [])]
        add(f"embed {side}", "embed", *words, result=Path(data[side]))
    precision = config.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    for name, side, epochs in (
        ("heads on the start tower", BEFORE, 0.0),
        ("stage 2", AFTER, config.num_train_epochs),
    ):
        words = [data["train"], "--validation", data["validation"], *read, "--tower", start, *batches]
        words += ["--precision", precision, *shlex.split(config.tower_options), "--num-train-epochs", f"{epochs:g}"]
        add(name, "train-tower", *words, "--output", out / side, result=out / side / "tower")
    scores = {side: out / side / "validation.scores.json" for side in SIDES}
    for side, path in scores.items():
        words = [out / side / "tower", data["validation"], *read, "--output", path]
        add(f"measure {side}", "evaluate", *words, result=path)
    words = [*scores.values(), "--names", BEFORE, AFTER, "--output", out / "compare"]
    add("compare", "compare", *words, result=out / "compare" / "compare.json")
    words = [out / AFTER, "--output", out / "tower", "--overwrite", *["--with-adapter"] * bool(adapter)]
    add("export", "export", *words, result=out / "tower" / TowerCard.FILE)
    if config.questions:
        stages += ask(config, [data["train"], *read], batch, train)
    return stages


def ask(config: PipelineConfig, data: list[str], batch: int, train: int) -> list[Stage]:
    """A LLaVA of each tower, its projector trained on the ``train`` captions, and its answers to the questions."""
    out = Path(config.output)
    captions, compared = out / "llava-data" / "captions.json", out / "questions" / "compare"
    words = ["llm2clip", "llava", "data", *data, "--output", captions.parent, "--overwrite"]
    stages = [stage(config, "LLaVA's captions", *words, result=captions)]
    epochs = math.ceil(max(1, LLAVA_STEPS * batch / train))
    common = [captions, "--image-folder", captions.parent / "images", "--model", config.llava_llm]
    common += ["--global-batch", batch, "--micro-batch", math.gcd(batch // config.num_gpus, config.micro_batch or 32)]
    common += ["--gpus", config.num_gpus, "--python", sys.executable]
    extra = ["--num_train_epochs", epochs, *shlex.split(config.llava_options)]
    half = [] if torch.cuda.is_available() else ["--dtype", "float32"]
    for side in SIDES:
        llava, answers = out / f"llava-{side}", out / "questions" / side
        words = [PRETRAIN, *common, "--tower", f"llm2clip:{out / side / 'tower'}", "--output", llava, "--", *extra]
        stages.append(stage(config, f"LLaVA {side}", *words, result=llava / "mm_projector.bin"))
        words = ["llm2clip", "bench-mllm", config.questions, "--model-path", llava, "--model-base", config.llava_llm]
        result = answers / "scores" / "questions.scores.json"
        stages.append(stage(config, f"questions {side}", *words, *half, "--output", answers, result=result))
    words = ["llm2clip", "compare", *(out / "questions" / side / "scores" for side in SIDES), "--names", *SIDES]
    words += ["--image-folder", Path(config.questions).parent, "--no-references", "--output", compared]
    return [*stages, stage(config, "compare answers", *words, result=compared / "compare.json")]
