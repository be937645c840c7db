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

from llm2clip_plugin.contracts import EncoderCard, shard_file
from llm2clip_plugin.data.remote import is_url
from llm2clip_plugin.data.samples import Caption, words_of
from llm2clip_plugin.data.sources import Source, SourceConfig, open_source
from llm2clip_plugin.data.sources.rows import RowSource
from llm2clip_plugin.data.split import outputs
from llm2clip_plugin.hub import hub_snapshot
from llm2clip_plugin.options import changed_options
from llm2clip_plugin.precision import gpu_precision
from llm2clip_plugin.stages.digests import Artifact, folder_files
from llm2clip_plugin.stages.pipeline_config import PipelineConfig
from llm2clip_plugin.stages.rerun import Stage
from llm2clip_plugin.stages.run_page import AFTER, BEFORE, SIDES, held_out_config
from llm2clip_plugin.stages.tower_config import TRAIN_TOWER
from llm2clip_plugin.text.post import POST_FILE
from llm2clip_plugin.text.reading import embed_options, read_reading, stage_1_options
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
# how every stage opens the LLM
OPEN_LLM = ("preset", "revision", "load_in_4bit", "trust_remote_code")
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


def default_batch(train_images: int) -> int:
    """Pairs per step where none are set: the power of two above a sixteenth of the images, 8 to
    256."""
    sixteenth = train_images // 16
    power_of_two = 1 << sixteenth.bit_length()
    return min(256, max(8, power_of_two))


class Plan:
    """Stages in order, as they are added, and what their commands have in common."""

    def __init__(self, config: PipelineConfig, source: Source) -> None:
        self.config = config
        self.source = source
        self.out = Path(config.output)
        self.stages: list[Stage] = []
        self.data = Artifact(name="the data", files=source.files)
        # pictures of rows are read where they are, those of tars are copied by the split
        self.pictures = [self.data] if isinstance(source, RowSource) else []
        self.train_images = round(len(source) * (1 - config.validation))
        # pairs per step
        self.batch = config.global_batch or default_batch(self.train_images)
        sides = outputs(source, self.out / "data")
        # train and validation
        self.paths = {side: str(path) for side, path in sides.items()}
        # options of the commands that read these, of those that read the whole data, of trainings
        images: list[str] = []
        if isinstance(source, RowSource):
            images = ["--image-folder", source.images_folder]
        self.read = [*images, *changed_options(config, READ)]
        self.read_all = [config.path, *changed_options(config, ("images", *READ))]
        self.batches = ["--global-batch", str(self.batch)]
        self.batches += changed_options(config, ("micro_batch",))
        self.llm = model("the LLM", config.llm, config.revision)
        self.open_llm = ["--llm", config.llm, *changed_options(config, OPEN_LLM)]
        self.reading: EncoderCard | None = None
        if config.reading:
            self.reading = read_reading(config.reading, config.llm)

    def output(
        self, name: str, *outputs: str, patterns: tuple[str, ...] = ("**/*",)
    ) -> Artifact:
        """What is in folders, or files, of the run's folder."""

        def files() -> Mapping[str, str]:
            digests: dict[str, str] = {}
            for output in outputs:
                digests |= folder_files(self.out / output, self.out, patterns)
            return digests

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
    start, start_tower = add_import(run)
    sides = add_split(run)
    adapter, teacher = add_stage_1(run, pairs, sides["train"])
    embedded = add_embedding(run, adapter, teacher, sides)
    towers = add_stage_2(run, start, start_tower, sides, embedded)
    add_measures(run, sides, embedded, towers)
    words = [run.out / AFTER, "--output", run.out / "tower", "--overwrite"]
    if adapter:
        words.append("--with-adapter")
    exported = run.output("the export", "tower")
    reads = [towers[AFTER], *teacher[1:]]
    run.add("export", "export", *words, reads=reads, makes=[exported], output="tower")
    if config.questions:
        ask(run, sides["train"], towers)
    return run.stages


def add_import(run: Plan) -> tuple[str, Artifact]:
    """The start tower's path, and the tower; it is imported first unless it is a Hugging Face
    folder already."""
    path_or_id = run.config.tower
    tower = model("the start tower", path_or_id)
    if (Path(path_or_id).expanduser() / "config.json").is_file():
        return path_or_id, tower
    start = str(run.out / "start")
    imported = run.output("the imported tower", "start")
    words = ["import", path_or_id, "--output", start]
    run.add("import the tower", *words, reads=[tower], makes=[imported], output="start")
    return start, imported


def add_split(run: Plan) -> dict[str, Artifact]:
    """Check the data and hold out a part; the data of both sides."""
    config = run.config
    run.add("check the data", "data", "check", *run.read_all, reads=[run.data])
    sides: dict[str, Artifact] = {}
    for side in SPLIT:
        name = Path(run.paths[side]).name
        sides[side] = run.output(f"the {side} data", f"data/{name}")
    words = ["data", "split", *run.read_all, "--output", run.out / "data"]
    words += [
        "--validation",
        f"{config.validation:g}",
        *changed_options(config, ("by",)),
    ]
    makes = [*sides.values(), run.output("the record of the split", "data/split.json")]
    run.add(SPLIT_STAGE, *words, reads=[run.data], makes=makes, output="data")
    return sides


def add_stage_1(
    run: Plan, pairs: str, train_side: Artifact
) -> tuple[str, list[Artifact]]:
    """The adapter's path, "" without one, and what an embedding depends on: the LLM and the
    adapter."""
    config = run.config
    if config.adapter:
        return config.adapter, [run.llm, model("the adapter", config.adapter)]
    if not pairs:
        return "", [run.llm]
    trained = run.output("the trained adapter", "llm/adapter")
    epochs = 1 if run.train_images > 100 * run.batch else 4
    steps = max(1, run.train_images * epochs // run.batch)
    warmup_steps = min(300, steps // 10)
    words = ["finetune-llm", run.paths["train"], *run.read, *run.open_llm]
    if run.reading is not None:
        words += stage_1_options(run.reading)
    words += ["--pair-kinds", pairs, *run.batches]
    words += ["--max-steps", steps, "--warmup-steps", warmup_steps]
    words += ["--output", run.out / "llm"]
    run.add(
        "stage 1", *words, reads=[train_side, run.llm], makes=[trained], output="llm"
    )
    return str(run.out / "llm" / "adapter"), [run.llm, trained]


def add_embedding(
    run: Plan, adapter: str, teacher: list[Artifact], sides: Mapping[str, Artifact]
) -> dict[str, Artifact]:
    """The caches of both sides."""
    config = run.config
    read_by = list(teacher)
    if run.reading is not None and run.reading.post_sha256 and not adapter:
        read_by.append(post_processing(config.reading))
    embedded: dict[str, Artifact] = {}
    for side in SPLIT:
        cache = f"embeddings/{side}"
        embedded[side] = run.output(
            f"the embeddings of {side}",
            cache,
            patterns=("**/*.safetensors", "manifest.json"),
        )
        words = ["embed", run.paths[side], *run.read, *run.open_llm]
        if adapter:
            words += ["--adapter", adapter]
        elif run.reading is not None:
            words += embed_options(run.reading, Path(config.reading))
        words += ["--cache", run.out / cache]
        held_out = held_out_config(config, run.source, side)
        run.add(
            f"embed {side}",
            *words,
            reads=[sides[side], *read_by],
            makes=[embedded[side]],
            output=cache,
            updates=sides[side],
            update=partial(prune_cache, run.out / cache, held_out),
        )
    return embedded


def add_stage_2(
    run: Plan,
    start: str,
    start_tower: Artifact,
    sides: Mapping[str, Artifact],
    embedded: Mapping[str, Artifact],
) -> dict[str, Artifact]:
    """The towers before and after: the start tower with fitted heads, and the trained one."""
    config = run.config
    own_options = shlex.split(config.tower_options)
    chosen = gpu_precision() if torch.cuda.is_available() else "fp32"
    follows_machine = not config.precision and "--precision" not in own_options
    towers = {
        side: run.output(f"the tower {side} stage 2", f"{side}/tower") for side in SIDES
    }
    caches = run.out / "embeddings"
    for name, side, epochs in (
        ("heads on the start tower", BEFORE, 0.0),
        ("stage 2", AFTER, config.num_train_epochs),
    ):
        words = ["train-tower", run.paths["train"], "--cache", caches / "train"]
        words += ["--validation", run.paths["validation"]]
        words += ["--validation-cache", caches / "validation"]
        words += [*run.read, "--tower", start, *run.batches]
        words += ["--precision", config.precision or chosen, *own_options]
        words += ["--num-train-epochs", f"{epochs:g}", "--output", run.out / side]
        data = [*sides.values(), *embedded.values(), *run.pictures]
        run.add(
            name,
            *words,
            reads=[start_tower, *data],
            makes=[towers[side]],
            output=side,
            by_machine=("--precision",) if follows_machine else (),
        )
    return towers


def add_measures(
    run: Plan,
    sides: Mapping[str, Artifact],
    embedded: Mapping[str, Artifact],
    towers: Mapping[str, Artifact],
) -> None:
    """Both towers on validation data, compared."""
    files = {side: f"{side}/validation.scores.json" for side in SIDES}
    scores = {
        side: run.output(f"the scores {side}", file) for side, file in files.items()
    }
    for side, file in files.items():
        words = ["evaluate", run.out / side / "tower", run.paths["validation"]]
        words += ["--cache", run.out / "embeddings" / "validation", *run.read]
        words += ["--output", run.out / file]
        data = [sides["validation"], embedded["validation"], *run.pictures]
        run.add(
            f"measure {side}",
            *words,
            reads=[towers[side], *data],
            makes=[scores[side]],
            output=file,
        )
    words = ["compare", *(run.out / file for file in files.values()), "--names", *SIDES]
    words += ["--output", run.out / "compare"]
    compared = run.output("the comparison", "compare")
    run.add(
        "compare", *words, reads=[*scores.values()], makes=[compared], output="compare"
    )


def ask(run: Plan, train_side: Artifact, towers: Mapping[str, Artifact]) -> None:
    """Add a LLaVA of each tower, its projector trained on the training captions, and its answers to
    the questions."""
    config = run.config
    captions = run.out / "llava-data" / "captions.json"
    llava_data = run.output("LLaVA's captions", "llava-data")
    llm = model("LLaVA's LLM", config.llava_llm)
    files_of_questions = partial(question_files, Path(config.questions))
    asked = Artifact(name="the questions", files=files_of_questions)
    words = ["llava", "data", run.paths["train"], *run.read]
    words += ["--output", captions.parent, "--overwrite"]
    run.add(
        "LLaVA's captions",
        *words,
        reads=[train_side, *run.pictures],
        makes=[llava_data],
        output="llava-data",
    )
    half = [] if torch.cuda.is_available() else ["--dtype", "float32"]
    answered: list[Artifact] = []
    for side in SIDES:
        llava = run.out / f"llava-{side}"
        files = [f"llava-{side}/mm_projector.bin", f"llava-{side}/config.json"]
        projector = run.output(f"the projector {side}", *files)
        run.add(
            f"LLaVA {side}",
            *projector_words(run, captions, side),
            program=PRETRAIN,
            reads=[llava_data, llm, towers[side]],
            makes=[projector],
            output=f"llava-{side}",
            by_machine=("--gpus", "--micro-batch"),
        )
        words = ["bench-mllm", config.questions, "--model-path", llava]
        words += ["--model-base", config.llava_llm, *half]
        words += ["--output", run.out / "questions" / side]
        answers = run.output(f"the answers {side}", f"questions/{side}/scores")
        answered.append(answers)
        run.add(
            f"questions {side}",
            *words,
            reads=[asked, projector, llm, towers[side]],
            makes=[answers],
            output=f"questions/{side}",
            by_machine=("--dtype",),
        )
    compared = "questions/compare"
    words = ["compare", *(run.out / "questions" / side / "scores" for side in SIDES)]
    words += ["--names", *SIDES, "--image-folder", Path(config.questions).parent]
    words += ["--no-references", "--output", run.out / compared]
    makes = [run.output("the comparison of answers", compared)]
    run.add("compare answers", *words, reads=answered, makes=makes, output=compared)


def projector_words(run: Plan, captions: Path, side: str) -> list[object]:
    """The arguments of scripts/llava/pretrain.sh."""
    config = run.config
    share = math.gcd(run.batch // config.num_gpus, config.micro_batch or 32)
    epochs = math.ceil(max(1, LLAVA_STEPS * run.batch / run.train_images))
    words = [
        captions,
        "--image-folder",
        captions.parent / "images",
        "--model",
        config.llava_llm,
    ]
    words += ["--global-batch", run.batch, "--micro-batch", share]
    words += ["--gpus", config.num_gpus, "--python", sys.executable]
    words += ["--tower", f"llm2clip:{run.out / side / 'tower'}"]
    words += ["--output", run.out / f"llava-{side}"]
    return [
        *words,
        "--",
        "--num_train_epochs",
        epochs,
        *shlex.split(config.llava_options),
    ]


def model(name: str, path_or_id: str, revision: str = "") -> Artifact:
    """The files of a model: those of its folder, a checkpoint file, or a commit of the Hub.
    ``revision``: commit, tag or branch; "" for the default."""
    path = Path(path_or_id).expanduser()

    @functools.cache
    def commit() -> str:
        if path_or_id.startswith(TIMM_PREFIX):
            return f"timm://{path_or_id}"
        with suppress(OSError, ValueError):
            snapshot = hub_snapshot(
                path_or_id, revision=revision or None, patterns=["config.json"]
            )
            return f"hub://{path_or_id}@{snapshot.name}"
        return f"hub://{path_or_id}@{revision}" if revision else f"hub://{path_or_id}"

    def files() -> Mapping[str, str]:
        if not path.exists():
            return {path_or_id: commit()}
        digests = folder_files(path, path if path.is_dir() else path.parent, ("*",))
        return {
            name: file for name, file in digests.items() if not name.endswith(".md")
        }

    return Artifact(name=name, files=files)


def post_processing(reading: str) -> Artifact:
    """The post-processing in the folder of a reading."""
    files = {POST_FILE: str(Path(reading) / POST_FILE)}
    return Artifact(name="the post-processing", files=lambda: files)


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
    if config.reading:
        inputs["READING"] = str(Path(config.reading))
    if isinstance(source, RowSource):
        inputs["IMAGES"] = source.images_folder
    for what, path in inputs.items():
        if (
            path
            and not is_url(path)
            and (what == "DATA" or Path(path).expanduser().exists())
        ):
            places.setdefault(path, what)
    return places


def survey(source: Source) -> tuple[str, str]:
    """How stage 1 pairs captions, QUERY:POSITIVE ("": it cannot), and why it is better left out
    ("": it is not); from SURVEYED samples, evenly spaced."""
    step = max(1, len(source) // SURVEYED)
    texts = [source.captions(number)[1] for number in range(0, len(source), step)]
    if not any(texts):
        raise ValueError(
            f"no captions in {source.path}; llm2clip data check shows its fields"
        )
    several = [captions for captions in texts if len(captions) > 1]
    if len(several) <= len(texts) / 2:
        return "", SEVERAL
    short_and_long = [
        captions for captions in texts if has_kinds(captions, "short", "long")
    ]
    positive_kind = "long" if len(short_and_long) > len(texts) / 2 else "short"
    shares: list[float] = []  # of an image's pairs, those that teach nothing
    for captions in several:
        queries = [caption.text for caption in captions if caption.kind == "short"]
        positives = [
            caption.text for caption in captions if caption.kind == positive_kind
        ]
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


def contains(text: str, other: str) -> bool:
    """Whether the words of one text are within the other's, in order."""
    first = f" {words_of(text)} "
    second = f" {words_of(other)} "
    return first != second and (first in second or second in first)
