"""The stages of ``llm2clip run``: their commands, and what each reads and makes."""

from __future__ import annotations

import functools
import itertools
import json
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from llm2clip_plugin.contracts import shard_file
from llm2clip_plugin.data.make import outputs
from llm2clip_plugin.data.remote import is_url
from llm2clip_plugin.data.samples import Caption, words_of
from llm2clip_plugin.data.sources import Source, SourceConfig, open_source
from llm2clip_plugin.data.sources.rows import RowSource
from llm2clip_plugin.files import hub_snapshot
from llm2clip_plugin.options import changed_options
from llm2clip_plugin.stages.digests import Artifact, folder_files
from llm2clip_plugin.stages.rerun import Stage
from llm2clip_plugin.stages.run_page import AFTER, BEFORE, SIDES, held_out_config
from llm2clip_plugin.stages.settings import PipelineConfig
from llm2clip_plugin.stages.tower_config import TRAIN_TOWER
from llm2clip_plugin.train.distributed import gpu_precision
from llm2clip_plugin.vision.towers import TIMM_PREFIX

SURVEYED = 1000  # samples that are read
READ = (
    "format",
    "fields",
    "language",
    "image_field",
    "key_field",
    "cache_folder",
    "cache_gb",
    "index_folder",
)
LLAVA_STEPS = 300  # of the projector, at least; LLaVA 1.5's own are 2,180
PRETRAIN = Path(__file__).parents[2] / "scripts" / "llava" / "pretrain.sh"
# commands that go on from what they have written
RESUMED = ("finetune-llm", "embed", "train-tower", "bench-mllm")
ON_ALL_GPUS = ("finetune-llm", "embed", "train-tower")
SPLIT = ("train", "validation")
SPLIT_STAGE = "hold out validation"
# settings that name folders, which a checkpoint records and which may be moved; the run compares
# contents
MOVED = {
    "finetune-llm": ("pairs.data", "pairs.read.images", "encoder.llm"),
    "train-tower": ("data.path", "data.read.images", "tower.path"),
}
SEVERAL = "it needs images with several captions"
CONTAINED = "in most images one caption contains another, so it learns little"


class Plan:
    """Stages in order, as they are added."""

    def __init__(self, config: PipelineConfig, source: Source) -> None:
        self.config = config
        self.out = Path(config.output)
        self.stages: list[Stage] = []
        self.data = Artifact(name="the data", files=source.files)
        # pictures of rows are read where they are, those of tars are copied by the split
        self.pictures = [self.data] if isinstance(source, RowSource) else []

    def made(self, name: str, *places: str, patterns: tuple[str, ...] = ("**/*",)) -> Artifact:
        """What is in folders, or files, of the run's folder."""

        def files() -> Mapping[str, str]:
            found: dict[str, str] = {}
            for place in places:
                found |= folder_files(self.out / place, self.out, patterns)
            return found

        return Artifact(name=name, files=files)

    def add(
        self,
        name: str,
        *words: object,
        reads: Sequence[Artifact],
        makes: Sequence[Artifact] = (),
        output: str = "",
        program: object = "llm2clip",
        updates: Artifact | None = None,
        update: Callable[[], object] = lambda: None,
        by_machine: Sequence[str] = (),
    ) -> None:
        """Add a stage. Raises ValueError for options that train-tower would refuse, hours later."""
        command = str(words[0])
        if command == "train-tower":
            TRAIN_TOWER.parse([*map(str, words[1:])]).validate()
        stage = Stage(
            name=name,
            words=tuple(map(str, (program, *words))),
            reads=tuple(reads),
            makes=tuple(makes),
            output=self.out / output if output else None,
            ranks=self.config.num_gpus if command in ON_ALL_GPUS else 1,
            resumes=command in RESUMED or program == PRETRAIN,
            updates=updates.name if updates else "",
            update=update,
            update_words=("--overwrite",) if updates else (),
            moved_fields=MOVED.get(command, ()),
            by_machine=tuple(by_machine),
        )
        self.stages.append(stage)


def plan(config: PipelineConfig, source: Source, pairs: str) -> list[Stage]:
    """Every stage of the run, in order; ``pairs``: how stage 1 pairs captions, QUERY:POSITIVE; "":
    without stage 1."""
    run = Plan(config, source)
    out = Path(config.output)
    train = round(len(source) * (1 - config.validation))
    batch = config.global_batch or min(256, max(8, 1 << (train // 16).bit_length()))
    data = {side: str(path) for side, path in outputs(source, out / "data").items()}
    images = ["--image-folder", source.images_folder] if isinstance(source, RowSource) else []
    read = [*images, *changed_options(config, READ)]
    given = [config.path, *changed_options(config, ("images", *READ))]
    batches = ["--global-batch", str(batch), *changed_options(config, ("micro_batch",))]
    llm = model("the LLM", config.llm)
    opened = ["--llm", config.llm, *changed_options(config, ("trust_remote_code",))]

    tower = model("the start tower", config.tower)
    start = config.tower
    if not (Path(config.tower).expanduser() / "config.json").is_file():
        start = str(out / "start")
        imported = run.made("the imported tower", "start")
        run.add(
            "import the tower",
            "import",
            config.tower,
            "--output",
            start,
            reads=[tower],
            makes=[imported],
            output="start",
        )
        tower = imported
    run.add("check the data", "data", "check", *given, reads=[run.data])
    side_of = {
        side: run.made(f"the {side} data", f"data/{Path(data[side]).name}") for side in SPLIT
    }
    words = [
        "--output",
        out / "data",
        "--validation",
        f"{config.validation:g}",
        *changed_options(config, ("by",)),
    ]
    sides = [*side_of.values(), run.made("the record of the split", "data/split.json")]
    run.add(
        SPLIT_STAGE, "data", "split", *given, *words, reads=[run.data], makes=sides, output="data"
    )

    adapter = config.adapter
    of_llm = [llm]
    if config.adapter:
        of_llm.append(model("the adapter", config.adapter))
    if pairs:
        adapter = str(out / "llm" / "adapter")
        of_llm.append(run.made("the trained adapter", "llm/adapter"))
        steps = max(1, train * (1 if train > 100 * batch else 4) // batch)
        words = [
            "--pair-kinds",
            pairs,
            *batches,
            "--max-steps",
            steps,
            "--warmup-steps",
            min(300, steps // 10),
        ]
        words = [data["train"], *read, *opened, *words, "--output", out / "llm"]
        run.add(
            "stage 1",
            "finetune-llm",
            *words,
            reads=[side_of["train"], llm],
            makes=of_llm[1:],
            output="llm",
        )
    embedded: dict[str, Artifact] = {}
    for side in SPLIT:
        cache = f"embeddings/{side}"
        embedded[side] = run.made(
            f"the embeddings of {side}", cache, patterns=("**/*.safetensors", "manifest.json")
        )
        words = [
            data[side],
            *read,
            *opened,
            *(["--adapter", adapter] if adapter else []),
        ]
        update = partial(prune_cache, out / cache, held_out_config(config, source, side))
        run.add(
            f"embed {side}",
            "embed",
            *words,
            "--cache",
            out / cache,
            reads=[side_of[side], *of_llm],
            makes=[embedded[side]],
            output=cache,
            updates=side_of[side],
            update=update,
        )

    precision = config.precision or (gpu_precision() if torch.cuda.is_available() else "fp32")
    towers = {side: run.made(f"the tower {side} stage 2", f"{side}/tower") for side in SIDES}
    trained_on = [*side_of.values(), *embedded.values(), *run.pictures]
    own_options = shlex.split(config.tower_options)
    for name, side, epochs in (
        ("heads on the start tower", BEFORE, 0.0),
        ("stage 2", AFTER, config.num_train_epochs),
    ):
        words = [data["train"], "--cache", out / "embeddings" / "train"]
        words += [
            "--validation",
            data["validation"],
            "--validation-cache",
            out / "embeddings" / "validation",
        ]
        words += [*read, "--tower", start, *batches]
        words += [
            "--precision",
            precision,
            *own_options,
            "--num-train-epochs",
            f"{epochs:g}",
        ]
        run.add(
            name,
            "train-tower",
            *words,
            "--output",
            out / side,
            reads=[tower, *trained_on],
            makes=[towers[side]],
            output=side,
            by_machine=() if config.precision or "--precision" in own_options else ("--precision",),
        )
    scores = {
        side: run.made(f"the scores {side}", f"{side}/validation.scores.json") for side in SIDES
    }
    for side in SIDES:
        path = f"{side}/validation.scores.json"
        words = [
            out / side / "tower",
            data["validation"],
            "--cache",
            out / "embeddings" / "validation",
            *read,
        ]
        run.add(
            f"measure {side}",
            "evaluate",
            *words,
            "--output",
            out / path,
            makes=[scores[side]],
            output=path,
            reads=[towers[side], side_of["validation"], embedded["validation"], *run.pictures],
        )
    files = [out / side / "validation.scores.json" for side in SIDES]
    run.add(
        "compare",
        "compare",
        *files,
        "--names",
        *SIDES,
        "--output",
        out / "compare",
        reads=[*scores.values()],
        makes=[run.made("the comparison", "compare")],
        output="compare",
    )
    words = [
        out / AFTER,
        "--output",
        out / "tower",
        "--overwrite",
        *(["--with-adapter"] if adapter else []),
    ]
    run.add(
        "export",
        "export",
        *words,
        reads=[towers[AFTER], *of_llm[1:]],
        makes=[run.made("the export", "tower")],
        output="tower",
    )
    if config.questions:
        ask(run, [data["train"], *read], batch, train, side_of["train"], towers)
    return run.stages


def ask(
    run: Plan,
    data: list[str],
    batch: int,
    train: int,
    train_side: Artifact,
    towers: Mapping[str, Artifact],
) -> None:
    """Add a LLaVA of each tower, its projector trained on the ``train`` captions, and its answers
    to the questions."""
    config = run.config
    out = run.out
    captions = out / "llava-data" / "captions.json"
    compared = out / "questions" / "compare"
    llava_data = run.made("LLaVA's captions", "llava-data")
    llm = model("LLaVA's LLM", config.llava_llm)
    questions = Artifact(
        name="the questions", files=partial(question_files, Path(config.questions))
    )
    run.add(
        "LLaVA's captions",
        "llava",
        "data",
        *data,
        "--output",
        captions.parent,
        "--overwrite",
        reads=[train_side, *run.pictures],
        makes=[llava_data],
        output="llava-data",
    )
    epochs = math.ceil(max(1, LLAVA_STEPS * batch / train))
    common = [captions, "--image-folder", captions.parent / "images", "--model", config.llava_llm]
    common += [
        "--global-batch",
        batch,
        "--micro-batch",
        math.gcd(batch // config.num_gpus, config.micro_batch or 32),
    ]
    common += ["--gpus", config.num_gpus, "--python", sys.executable]
    extra = ["--num_train_epochs", epochs, *shlex.split(config.llava_options)]
    half = [] if torch.cuda.is_available() else ["--dtype", "float32"]
    answered: list[Artifact] = []
    for side in SIDES:
        llava = out / f"llava-{side}"
        answers = out / "questions" / side
        projector = run.made(
            f"the projector {side}", f"llava-{side}/mm_projector.bin", f"llava-{side}/config.json"
        )
        words = [
            *common,
            "--tower",
            f"llm2clip:{out / side / 'tower'}",
            "--output",
            llava,
            "--",
            *extra,
        ]
        run.add(
            f"LLaVA {side}",
            *words,
            program=PRETRAIN,
            by_machine=("--gpus", "--micro-batch"),
            reads=[llava_data, llm, towers[side]],
            makes=[projector],
            output=f"llava-{side}",
        )
        words = [
            config.questions,
            "--model-path",
            llava,
            "--model-base",
            config.llava_llm,
            *half,
            "--output",
            answers,
        ]
        answered.append(run.made(f"the answers {side}", f"questions/{side}/scores"))
        run.add(
            f"questions {side}",
            "bench-mllm",
            *words,
            by_machine=("--dtype",),
            reads=[questions, projector, llm, towers[side]],
            makes=answered[-1:],
            output=f"questions/{side}",
        )
    words = [*(out / "questions" / side / "scores" for side in SIDES), "--names", *SIDES]
    words += [
        "--image-folder",
        Path(config.questions).parent,
        "--no-references",
        "--output",
        compared,
    ]
    run.add(
        "compare answers",
        "compare",
        *words,
        reads=answered,
        output="questions/compare",
        makes=[run.made("the comparison of answers", "questions/compare")],
    )


def model(name: str, given: str) -> Artifact:
    """The files of a model: those of its folder, a checkpoint file, or a commit of the Hub."""
    path = Path(given).expanduser()

    @functools.cache
    def revision() -> str:
        if given.startswith(TIMM_PREFIX):
            return f"timm://{given}"
        with suppress(OSError, ValueError):
            return f"hub://{given}@{hub_snapshot(given, patterns=['config.json']).name}"
        return f"hub://{given}"

    def files() -> Mapping[str, str]:
        if not path.exists():
            return {given: revision()}
        found = folder_files(path, path if path.is_dir() else path.parent, ("*",))
        return {name: file for name, file in found.items() if not name.endswith(".md")}

    return Artifact(name=name, files=files)


def question_files(path: Path) -> dict[str, str]:
    """A file of questions, and the pictures that it names."""
    files = {path.name: str(path)}
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, AttributeError):
            if picture := json.loads(line).get("image"):
                files[str(picture)] = str(path.parent / str(picture))
    return files


def prune_cache(folder: Path, side: SourceConfig) -> None:
    """Delete the files of shards that the data no longer has."""
    names = {shard_file(shard.name) for shard in open_source(side).shards}
    for file in folder.rglob("*.safetensors"):
        if str(file.relative_to(folder)) not in names:
            file.unlink()


def movable(config: PipelineConfig, source: Source) -> dict[str, str]:
    """Path -> what is there, of all that may be at another place when the run goes on: its contents
    are compared."""
    # commands have the output as Path spells it
    places = {
        str(Path(config.output)): "OUTPUT",
        sys.executable: "PYTHON",
        str(PRETRAIN): "PRETRAIN",
    }
    inputs = {
        "DATA": config.path,
        "LLM": config.llm,
        "TOWER": config.tower,
        "ADAPTER": config.adapter,
    }
    inputs |= {"QUESTIONS": config.questions, "LLAVA-LLM": config.llava_llm}
    if config.questions:
        inputs["QUESTIONS-FOLDER"] = str(Path(config.questions).parent)
    if isinstance(source, RowSource):
        inputs["IMAGES"] = source.images_folder
    for what, path in inputs.items():
        if path and not is_url(path) and (what == "DATA" or Path(path).expanduser().exists()):
            places.setdefault(path, what)
    return places


def survey(source: Source) -> tuple[str, str]:
    """How stage 1 pairs captions, QUERY:POSITIVE ("": it cannot), and why it is better left out
    ("": it is not); from SURVEYED samples, evenly spaced."""
    step = max(1, len(source) // SURVEYED)
    texts = [source.captions(number)[1] for number in range(0, len(source), step)]
    if not any(texts):
        raise ValueError(f"no captions in {source.path}; llm2clip data check shows its fields")
    several = [captions for captions in texts if len(captions) > 1]
    if len(several) <= len(texts) / 2:
        return "", SEVERAL
    short_and_long = [captions for captions in texts if has_kinds(captions, "short", "long")]
    positive_kind = "long" if len(short_and_long) > len(texts) / 2 else "short"
    shares: list[float] = []  # of an image's pairs, those that teach nothing
    for captions in several:
        queries = [caption.text for caption in captions if caption.kind == "short"]
        positives = [caption.text for caption in captions if caption.kind == positive_kind]
        pairs = [
            (query, positive)
            for query, positive in itertools.product(queries, positives)
            if query != positive
        ]
        if pairs:
            shares.append(sum(contains(*pair) for pair in pairs) / len(pairs))
    most = bool(shares) and sum(shares) / len(shares) > 0.5
    pair_kinds = "short:long" if positive_kind == "long" else "short:same"
    return pair_kinds, CONTAINED if most else ""


def has_kinds(captions: Sequence[Caption], *kinds: str) -> bool:
    """Whether there is a caption of each kind."""
    return set(kinds) <= {caption.kind for caption in captions}


def contains(one: str, other: str) -> bool:
    """Whether the words of one text are within the other's, in order."""
    first = f" {words_of(one)} "
    second = f" {words_of(other)} "
    return first != second and (first in second or second in first)
