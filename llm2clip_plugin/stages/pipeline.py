"""``llm2clip run``: all stages of one training in order, resumed by the same command, and a page about it."""

from __future__ import annotations

import itertools
import json
import math
import random
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from llm2clip_plugin.console import attend, page_style, render, thumbnail
from llm2clip_plugin.contracts import TowerCard, atomic_file
from llm2clip_plugin.data.make import outputs
from llm2clip_plugin.data.samples import BrokenSample, words_of
from llm2clip_plugin.data.sources import Source, SourceConfig, open_source
from llm2clip_plugin.data.sources.rows import RowSource
from llm2clip_plugin.evaluate.commands import measure_pairs
from llm2clip_plugin.evaluate.config import EvaluateConfig
from llm2clip_plugin.evaluate.retrieval import EmbeddedPairs
from llm2clip_plugin.options import changed_options, command
from llm2clip_plugin.processes import on_ranks
from llm2clip_plugin.stages.settings import RUN, PipelineConfig
from llm2clip_plugin.stages.tower_config import TRAIN_TOWER
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import adapter_sha256, fetch_directory
from llm2clip_plugin.text.llm import llm_config
from llm2clip_plugin.train.distributed import gpu_precision

SURVEYED = 1000  # samples that are read
BEFORE, AFTER = SIDES = "before", "after"  # folders of the two towers' trainings
READ = ("format", "fields", "language", "image_field", "key_field", "cache_folder", "cache_gb", "index_folder")
LLAVA_STEPS = 300  # of the projector, at least; LLaVA 1.5's own are 2,180
PRETRAIN = Path(__file__).parents[2] / "scripts" / "llava" / "pretrain.sh"
ON_ALL_GPUS = ("finetune-llm", "embed", "train-tower")
SHOWN = 5  # pictures that each tower finds first
QUERIES = 24  # validation captions that the page shows
RECORD = "pipeline.json"  # in the output: stage -> its words and seconds, of those that are complete


def main(argv: list[str]) -> int:
    """Run what is not complete yet; the exit status of the stage that failed, 128 + N after signal N, else 0."""
    config = RUN.parse(argv)
    check_given(config)
    source, out = open_source(config), Path(config.output)
    pairs, why_not = survey(source)
    stages = plan(config, source, pairs)
    record = complete(stages, out / RECORD)
    print(f"{config.path}: {len(source):,} images")
    if why_not and config.stage1 and not config.adapter:
        print(f"note: stage 1 is left out: {why_not}")
    for number, stage in enumerate(stages, 1):
        print(f"{number:3} {'complete' * (stage.name in record):>8}  {stage.name}: {shlex.join(stage.words)}")
    todo = [stage for stage in stages if stage.name not in record]
    print(f"{len(todo)} of {len(stages)} stages to run")
    if config.dry_run:
        return 0
    for stage in todo:
        print(f"\n[{stages.index(stage) + 1}/{len(stages)}] {stage.name}: {shlex.join(stage.words)}", flush=True)
        begin = time.monotonic()
        status = attend(stage.argv)
        if status or not stage.result.exists():
            print(f"stopped in {stage.name!r}; rerun the same command to resume", file=sys.stderr)
            return status or 1
        record[stage.name] = {"words": list(stage.words), "seconds": round(time.monotonic() - begin, 1)}
        with atomic_file(out / RECORD) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    page = write_page(config, source, stages, {name: saved["seconds"] for name, saved in record.items()})
    print(f"\n{page}: scores, queries won and lost, with pictures")
    print(f"tower: {out / 'tower'}; in LLaVA: {command('use', out / 'tower', '--name', out.name)}")
    return 0


def check_given(config: PipelineConfig) -> None:
    """Raise FileNotFoundError or ValueError for what would stop a stage, hours later."""
    llm_config(EncoderConfig(llm=config.llm))
    if config.adapter:
        adapter_sha256(fetch_directory(config.adapter))
    if not config.questions:
        return
    from llava_integration.benchmarks.rules import benchmark
    from llava_integration.preflight import check_model

    if not PRETRAIN.is_file() or find_spec("llava") is None:
        llava = "LLaVA (pip install --no-deps llava-torch==1.2.2.post1)"
        raise ValueError(f"--questions needs {llava} and a checkout with {PRETRAIN}")
    benchmark("questions").load(Path(config.questions))
    for problem in check_model(config.llava_llm):
        raise ValueError(problem.replace("--model", "--llava-llm"))


def complete(stages: list[Stage], path: Path) -> dict[str, dict]:
    """The record of the stages that are complete: all before it are, its words are the same, its result exists."""
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    words = {name: entry["words"] for name, entry in saved.items()}
    done = itertools.takewhile(lambda one: words.get(one.name) == list(one.words) and one.result.exists(), stages)
    return {stage.name: saved[stage.name] for stage in done}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command of a run."""

    name: str
    words: tuple[str, ...]  # llm2clip ..., or a shell script and its arguments
    result: Path  # exists when the stage is complete
    ranks: int = 1  # processes

    @property
    def argv(self) -> list[str]:
        """The program and its words, by this Python."""
        if self.words[0] != "llm2clip":
            return ["bash", *self.words]
        return on_ranks(self.ranks, "llm2clip_plugin.cli", *self.words[1:])


def plan(config: PipelineConfig, source: Source, pairs: str) -> list[Stage]:
    """Every stage of the run, in order; ``pairs``: as ``survey`` says."""
    out = Path(config.output)
    train = round(len(source) * (1 - config.validation))
    batch = config.global_batch or min(256, max(8, 1 << (train // 16).bit_length()))
    data = {side: str(path) for side, path in outputs(source, out / "data").items()}
    images = ["--image-folder", source.images_folder] if isinstance(source, RowSource) else []
    read = [*images, *changed_options(config, READ)]
    given = [config.path, *changed_options(config, ("images", *READ))]
    tunes = config.stage1 and bool(pairs) and not config.adapter
    adapter = str(out / "llm" / "adapter") if tunes else config.adapter
    imported = not (Path(config.tower) / "config.json").is_file()
    start = str(out / "start") if imported else config.tower
    batches = ["--global-batch", str(batch), *changed_options(config, ("micro_batch",))]
    stages: list[Stage] = []

    def add(name: str, *words: object, result: Path, program: object = "llm2clip") -> None:
        ranks = config.num_gpus if words[0] in ON_ALL_GPUS else 1
        if words[0] == "train-tower":
            TRAIN_TOWER.parse([*map(str, words[1:])]).validate()  # --tower-options, before hours of work
        stages.append(Stage(name=name, words=tuple(map(str, (program, *words))), result=result, ranks=ranks))

    if imported:
        add("import the tower", "import", config.tower, "--output", start, result=Path(start))
    add("check the data", "data", "check", *given, result=Path())  # it writes nothing
    split = ["--output", out / "data", "--validation", f"{config.validation:g}", *changed_options(config, ("by",))]
    add("hold out validation", "data", "split", *given, *split, result=out / "data" / "split.json")
    if tunes:
        steps = max(1, train * (1 if train > 100 * batch else 4) // batch)
        words = ["--pair-kinds", pairs, *batches, "--max-steps", steps, "--warmup-steps", min(300, steps // 10)]
        words = [data["train"], *read, "--llm", config.llm, *words, "--output", out / "llm"]
        add("stage 1", "finetune-llm", *words, result=Path(adapter))
    for side in ("train", "validation"):
        words = [data[side], *read, "--llm", config.llm, *(["--adapter", adapter] if adapter else [])]
        add(f"embed {side}", "embed", *words, result=Path(data[side]))
    precision = config.precision or (gpu_precision() if torch.cuda.is_available() else "fp32")
    towers = (("heads on the start tower", BEFORE, 0.0), ("stage 2", AFTER, config.num_train_epochs))
    for name, side, epochs in towers:
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
        ask(config, add, [data["train"], *read], batch, train)
    return stages


def ask(config: PipelineConfig, add: Callable[..., None], data: list[str], batch: int, train: int) -> None:
    """Add a LLaVA of each tower, its projector trained on the ``train`` captions, and its answers to the questions."""
    out = Path(config.output)
    captions, compared = out / "llava-data" / "captions.json", out / "questions" / "compare"
    add("LLaVA's captions", "llava", "data", *data, "--output", captions.parent, "--overwrite", result=captions)
    epochs = math.ceil(max(1, LLAVA_STEPS * batch / train))
    common = [captions, "--image-folder", captions.parent / "images", "--model", config.llava_llm]
    common += ["--global-batch", batch, "--micro-batch", math.gcd(batch // config.num_gpus, config.micro_batch or 32)]
    common += ["--gpus", config.num_gpus, "--python", sys.executable]
    extra = ["--num_train_epochs", epochs, *shlex.split(config.llava_options)]
    half = [] if torch.cuda.is_available() else ["--dtype", "float32"]
    for side in SIDES:
        llava, answers = out / f"llava-{side}", out / "questions" / side
        words = [*common, "--tower", f"llm2clip:{out / side / 'tower'}", "--output", llava, "--", *extra]
        add(f"LLaVA {side}", *words, program=PRETRAIN, result=llava / "mm_projector.bin")
        words = [config.questions, "--model-path", llava, "--model-base", config.llava_llm, *half, "--output", answers]
        add(f"questions {side}", "bench-mllm", *words, result=answers / "scores" / "questions.scores.json")
    words = [*(out / "questions" / side / "scores" for side in SIDES), "--names", *SIDES]
    words += ["--image-folder", Path(config.questions).parent, "--no-references", "--output", compared]
    add("compare answers", "compare", *words, result=compared / "compare.json")


def survey(source: Source) -> tuple[str, str]:
    """How stage 1 pairs captions, QUERY:POSITIVE, or "" and why it cannot; from SURVEYED samples, evenly spaced."""
    step = max(1, len(source) // SURVEYED)
    texts = [source.captions(number)[1] for number in range(0, len(source), step)]
    if not any(texts):
        raise ValueError(f"no captions in {source.path}; llm2clip data check shows its fields")
    words = [[f" {words_of(caption.text)} " for caption in captions] for captions in texts if len(captions) > 1]
    if len(words) <= len(texts) / 2:
        return "", "it needs images with several captions (--fields)"
    if sum(any(one != other and one in other for one in each for other in each) for each in words) > len(words) / 2:
        return "", "most captions contain another one of their image, so it learns nothing"
    kinds = [{caption.kind for caption in captions} for captions in texts]
    return ("short:long" if sum({"short", "long"} <= one for one in kinds) > len(texts) / 2 else "short:same"), ""


def write_page(config: PipelineConfig, source: Source, stages: list[Stage], seconds: dict[str, float]) -> Path:
    """Write OUTPUT/index.html; returns its path."""
    out = Path(config.output)
    values = {item.name: getattr(config, item.name) for item in fields(SourceConfig)}
    images = source.images_folder if isinstance(source, RowSource) else ""
    held_out = SourceConfig(**{**values, "path": str(outputs(source, out / "data")["validation"]), "images": images})
    towers = {side: EvaluateConfig(tower=str(out / side / "tower"), data=held_out) for side in SIDES}
    pairs = {side: measure_pairs(tower)[1].pairs for side, tower in towers.items()}
    compared = [stage.result for stage in stages if stage.result.name == "compare.json"]
    queries = draw(open_source(held_out), pairs)
    page = out / "index.html"
    with atomic_file(page) as temporary:
        html = render(
            Path(__file__).with_name("page.html"),
            title=" · ".join(Path(place).name for place in (config.path, config.tower, config.llm)),
            style=page_style(),
            rows=[row for path in compared for row in json.loads(path.read_text(encoding="utf-8"))["rows"]],
            comparisons=[path.relative_to(out).with_suffix(".html") for path in compared],
            images=len(pairs[BEFORE].keys),
            queries=queries,
            won=sum(query["place"][AFTER] < query["place"][BEFORE] for query in queries),
            lost=sum(query["place"][AFTER] > query["place"][BEFORE] for query in queries),
            stages=[(stage, seconds.get(stage.name, 0.0)) for stage in stages],
        )
        temporary.write_text(html, encoding="utf-8")
    return page


def draw(source: Source, pairs: dict[str, EmbeddedPairs]) -> list[dict[str, Any]]:
    """Queries drawn from all validation captions, the same ones at every call: text and picture (a data URI), and by
    side the place of the right picture, and the first ones that are found, each with whether it is right."""
    first = pairs[BEFORE]
    chosen = sorted(random.Random(0).sample(range(len(first.captions)), min(QUERIES, len(first.captions))))
    orders: dict[str, Any] = {}  # side -> (Q, N): the images for each of these captions, the most similar first
    for side, each in pairs.items():
        image_ND, text_QD = (torch.nn.functional.normalize(x, dim=1) for x in (each.image_ND, each.text_MD[chosen]))
        orders[side] = (text_QD @ image_ND.T).argsort(dim=1, descending=True, stable=True)

    def picture(image: int) -> str | None:
        with suppress(BrokenSample):
            return thumbnail(source[first.numbers[image]].read_image())

    queries = []
    for row, caption in enumerate(chosen):
        right = int(first.owner_M[caption])
        tops = {side: order_QN[row].tolist() for side, order_QN in orders.items()}
        query = {"text": first.captions[caption].text, "picture": picture(right)}
        query["place"] = {side: top.index(right) + 1 for side, top in tops.items()}
        query["found"] = {side: [(picture(one), one == right) for one in top[:SHOWN]] for side, top in tops.items()}
        queries.append(query)
    return queries
