"""llm2clip run: which stages there are, what is run again, and what stops it; all of it runs in
test_first_day."""

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_data import make_shards, make_tower
from tiny_llm import save_tiny_llm

from llm2clip_plugin import status
from llm2clip_plugin.data.samples import Caption
from llm2clip_plugin.data.sources import Source, open_source
from llm2clip_plugin.doctor import check_accelerator
from llm2clip_plugin.precision import DTYPES, fastest_dtype
from llm2clip_plugin.signals import attend
from llm2clip_plugin.stages import run_plan
from llm2clip_plugin.stages.digests import Artifact
from llm2clip_plugin.stages.embed_config import EMBED
from llm2clip_plugin.stages.llm_config import FINETUNE_LLM
from llm2clip_plugin.stages.pipeline import main, pairs_of_stage_1, show
from llm2clip_plugin.stages.pipeline_config import RUN, PipelineConfig
from llm2clip_plugin.stages.rerun import RunFolder, Stage
from llm2clip_plugin.stages.run_checks import check_given
from llm2clip_plugin.stages.run_plan import plan, survey
from llm2clip_plugin.train.guard import locked


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ (48 images with two captions), llm/ and tower/."""
    folder = tmp_path_factory.mktemp("pipeline")
    make_shards(folder / "data")
    make_tower(folder / "tower")
    save_tiny_llm(folder / "llm", "llama")
    return folder


def opened(folder: Path, **more: object) -> tuple[PipelineConfig, Source]:
    values = {
        "path": folder / "data",
        "llm": folder / "llm",
        "tower": folder / "tower",
        "output": folder / "out",
    }
    config = PipelineConfig(
        **{name: str(value) for name, value in values.items()} | more
    )
    return config, open_source(config)


def names(stages: list[Stage]) -> list[str]:
    return [
        " ".join(stage.words[1 : 3 if stage.words[1] in ("data", "llava") else 2])
        for stage in stages
    ]


ALL = [
    "data check",
    "data split",
    "finetune-llm",
    "embed",
    "embed",
    "train-tower",
    "train-tower",
    "evaluate",
    "evaluate",
    "compare",
    "export",
]


def test_the_stages_follow_from_the_data_and_the_options(tiny: Path):
    config, source = opened(tiny)
    assert survey(source) == ("short:long", "")
    assert len(source) == 48
    pairs = "short:long"
    stages = plan(config, source, pairs)
    assert names(stages) == ALL
    assert stages[2].words[stages[2].words.index("--pair-kinds") + 1] == "short:long"
    adapter = str(tiny / "out" / "llm" / "adapter")
    assert all(adapter in stage.words for stage in stages[3:5])
    assert pairs_of_stage_1(config, source) == pairs
    for left_out in ({"stage1": False}, {"adapter": "mine"}):
        assert pairs_of_stage_1(dataclasses.replace(config, **left_out), source) == ""
    assert names(plan(config, source, "")) == [*ALL[:2], *ALL[3:]]
    with_adapter = plan(dataclasses.replace(config, adapter="mine"), source, "")
    assert names(with_adapter) == [*ALL[:2], *ALL[3:]]
    assert "mine" in with_adapter[2].words
    hub = plan(
        dataclasses.replace(config, tower="openai/clip-vit-base-patch16"), source, pairs
    )
    assert names(hub)[0] == "import"
    assert str(tiny / "out" / "start") in hub[6].words
    two = plan(dataclasses.replace(config, num_gpus=2), source, pairs)
    assert [stage.ranks for stage in two] == [1, 1, 2, 2, 2, 2, 2, 1, 1, 1, 1]
    assert "--nproc_per_node=2" in two[2].argv()
    assert "llm2clip_plugin.launch" not in two[1].argv()
    # before the stages that come first, as all that follows
    with pytest.raises(ValueError, match="--nonsense"):
        plan(dataclasses.replace(config, tower_options="--nonsense 3"), source, pairs)
    for wrong in ({"llm": str(tiny / "none")}, {"adapter": str(tiny / "llm")}):
        with pytest.raises(FileNotFoundError):
            check_given(dataclasses.replace(config, **wrong))


@pytest.mark.parametrize(
    "second, dtype", [((7, 5), torch.float16), ((9, 0), torch.bfloat16)]
)
def test_a_gpu_that_emulates_bfloat16_computes_in_float16(
    tiny: Path, monkeypatch, second: tuple[int, int], dtype
):
    """In stages 1.5 and 2, and in doctor's report, of an H100 with a T4 or with another one."""
    both = {
        "device_count": lambda: 2,
        "get_device_capability": [(9, 0), second].__getitem__,
        "get_device_name": str,
    }
    for name, value in (both | {"is_available": lambda: True}).items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert fastest_dtype(torch.device("cuda")) is dtype
    assert next(check_accelerator()).value.endswith(f"bf16 {dtype is torch.bfloat16}")
    words = {word for stage in plan(*opened(tiny), "") for word in stage.words}
    assert DTYPES[(words & {"bf16", "fp16"}).pop()] is dtype


@pytest.mark.parametrize("given", [{}, {"adapter": "mine"}])
def test_every_stage_opens_the_llm_alike(
    tiny: Path, given: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    """--revision, --preset and --load-in-4bit, in stages whose own parsers take them."""
    options = {"llm": "owner/llm", "revision": "v1", "load_in_4bit": True}
    options["preset"] = "llm2clip-llama3"
    config, source = opened(tiny, **options, **given)
    pairs = "" if given else "short:long"
    parsers = {"finetune-llm": FINETUNE_LLM, "embed": EMBED}
    stages = plan(config, source, pairs)
    opening = [stage for stage in stages if stage.words[1] in parsers]
    assert len(opening) == (2 if given else 3)
    for stage in opening:
        encoder = parsers[stage.words[1]].parse(stage.words[2:]).encoder
        assert {name: getattr(encoder, name) for name in options} == options
    # an earlier run's embeddings are of another commit
    asked: list[str | None] = []

    def snapshot(repository: str, *, revision: str | None, **_: object) -> Path:
        asked.append(revision)
        return Path("commit")

    monkeypatch.setattr(run_plan, "hub_snapshot", snapshot)
    assert run_plan.Plan(config, source).llm.files() == {
        "owner/llm": "hub://owner/llm@commit"
    }
    assert asked == ["v1"]


def file_of(name: str, *paths: Path) -> Artifact:
    return Artifact(
        name=name,
        files=lambda: {path.name: str(path) for path in paths if path.exists()},
    )


class Run:
    """Three stages in a row, of which the first reads a file and the last a second one; each makes
    a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.out.mkdir()
        for name in ("data", "late"):
            (folder / name).write_text(name)
        data = file_of("data", folder / "data")
        late = file_of("late", folder / "late")
        a = file_of("a", self.out / "a")
        b = file_of("b", self.out / "b")
        c = file_of("c", self.out / "c")

        def stage(name: str, reads: tuple[Artifact, ...], makes: Artifact) -> Stage:
            return Stage(
                name=name,
                words=("x", name, str(self.out)),
                reads=reads,
                makes=(makes,),
                output=self.out / name,
            )

        self.stages = [
            stage("a", (data,), a),
            stage("b", (a,), b),
            stage("c", (b, late), c),
        ]

    def opened(self) -> RunFolder:
        return RunFolder(self.out, {str(self.out): "OUTPUT"})

    def run(self, *, made: str = "made") -> list[str]:
        """Run what is stale; the names."""
        folder = self.opened()
        ran = []
        for stage in self.stages:
            if folder.why(stage) is not None:
                folder.begin(stage, [], {})
                # what was there is gone
                assert stage.output is not None
                assert not stage.output.exists()
                stage.output.write_text(f"{stage.name} {made}")
                folder.end(stage, 1.0)
                ran.append(stage.name)
        return ran

    def stale(self) -> dict[str, str]:
        return self.opened().stale(self.stages)


@pytest.fixture
def three(tmp_path: Path) -> Run:
    run = Run(tmp_path)
    assert run.run() == ["a", "b", "c"]
    assert run.stale() == {}
    return run


def test_a_change_runs_its_stage_and_those_after_it_again_and_says_why(three: Run):
    folder = three.folder
    (folder / "late").write_text("LATE")
    assert three.stale() == {"c": f"{folder}/late changed since it was made"}
    assert three.run() == ["c"]
    (folder / "data").write_text("DATA")
    assert three.stale() == {
        "a": f"{folder}/data changed since it was made",
        "b": "",
        "c": "",
    }
    assert three.run(made="again") == ["a", "b", "c"]


def test_a_stage_that_makes_the_same_again_leaves_those_after_it(three: Run):
    (three.folder / "data").write_text("DATA")
    assert three.run() == ["a"]


def test_a_result_that_was_edited_or_deleted_is_made_again(three: Run):
    (three.out / "b").write_text("edited")
    assert three.stale() == {"b": f"its result {three.out}/b changed", "c": ""}
    assert three.run() == ["b"]
    assert three.stale() == {}
    (three.out / "c").unlink()
    assert three.stale() == {"c": "its result c is gone"}
    assert three.run() == ["c"]


def test_bytes_count_not_times_nor_sizes(three: Run):
    data = three.folder / "data"
    os.utime(data, ns=(0, 0))
    assert three.stale() == {}
    data.write_text("atad")
    os.utime(data, ns=(0, 0))
    assert list(three.stale()) == ["a", "b", "c"]


def test_another_command_runs_again_and_a_moved_folder_does_not(three: Run):
    changed = dataclasses.replace(
        three.stages[1], words=("y", *three.stages[1].words[1:])
    )
    assert three.opened().stale([three.stages[0], changed]) == {
        "b": "its command is y, was x"
    }
    new = three.folder / "moved"
    three.out.rename(new)
    moved = Run.__new__(Run)
    moved.folder = three.folder
    moved.out = new
    words = {stage.name: ("x", stage.name, str(new)) for stage in three.stages}
    at = {name: file_of(name, new / name) for name in "abc"}
    moved.stages = []
    for stage in three.stages:
        reads = tuple(at.get(artifact.name, artifact) for artifact in stage.reads)
        moved_stage = dataclasses.replace(
            stage,
            words=words[stage.name],
            output=new / stage.name,
            makes=(at[stage.name],),
            reads=reads,
        )
        moved.stages.append(moved_stage)
    assert moved.stale() == {}


def test_a_folder_of_others_is_refused_and_an_old_record_says_nothing(tmp_path: Path):
    run = Run(tmp_path)
    (run.out / "b").mkdir()
    with pytest.raises(FileExistsError, match="was not made by `llm2clip run`"):
        run.opened().refuse_foreign(run.stages)
    (run.out / "pipeline.json").write_text(
        json.dumps({"a": {"words": ["x"], "seconds": 1.0}})
    )
    run.opened().refuse_foreign(run.stages)
    stale = run.stale()
    assert list(stale) == ["a", "b", "c"]
    assert "earlier release" in stale["a"]


def test_a_killed_stage_goes_on_with_the_same_input_and_starts_anew_with_another(
    three: Run,
):
    first = dataclasses.replace(
        three.stages[0], resumes=True, moved_fields=("data.path",)
    )
    (three.folder / "data").write_text("DATA")
    three.opened().begin(first, [], {})
    assert not (three.out / "a").exists()
    (three.out / "a").write_text("a checkpoint")
    for _ in range(2):  # a checkpoint may be older than the last start
        more = three.opened().begin(first, [], {})
        assert more == ["--allow-changed", "data.path"]
        assert (three.out / "a").exists()
    (three.folder / "data").write_text("other")
    three.opened().begin(first, [], {})
    assert not (three.out / "a").exists()


def test_a_cache_is_brought_up_to_date(three: Run):
    """Also by the start after one that was killed meanwhile."""
    updated: list[int] = []
    cache = dataclasses.replace(
        three.stages[0],
        resumes=True,
        updates="data",
        update=lambda: updated.append(1),
        update_words=("--overwrite",),
    )
    (three.folder / "data").write_text("DATA")
    for times in (1, 2):
        assert three.opened().begin(cache, [], {}) == ["--overwrite"]
        assert (three.out / "a").exists()
        assert len(updated) == times


def test_a_signal_reaches_the_stage_and_ends_the_run(tmp_path: Path):
    """A stage that saves and ends well is no complete one."""
    code = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(0)); "
        "open(sys.argv[1], 'w'); time.sleep(60)"
    )

    def kill() -> None:
        while not (tmp_path / "up").exists():
            time.sleep(0.05)
        # it waits for the stage
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    threading.Thread(target=kill, daemon=True).start()
    assert (
        attend([sys.executable, "-c", code, str(tmp_path / "up")])
        == 128 + signal.SIGTERM
    )


def refused(tiny: Path, *words: str) -> str:
    """The error of a dry run with the data, LLM and tower of these tests, unless others are
    given."""
    usual = {"--llm": tiny / "llm", "--tower": tiny / "tower", "--output": tiny / "out"}
    given = [
        str(word)
        for option, value in usual.items()
        if option not in words
        for word in (option, value)
    ]
    with pytest.raises((ValueError, OSError)) as error:
        main([str(tiny / "data"), *given, *words, "--dry-run"])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_fails_hours_later_is_refused_before_the_first_stage(tiny: Path):
    llm = str(tiny / "llm")
    data = str(tiny / "data")
    assert "no tower family has model_type 'llama'" in refused(tiny, "--tower", llm)
    assert "not a directory, a checkpoint file or a Hub id" in refused(
        tiny, "--tower", "nonsense"
    )
    assert "leaves nothing for validation" in refused(tiny, "--validation", "0.0001")
    assert "has no field 'nofield' (--by)" in refused(tiny, "--by", "nofield")
    assert "is the data" in refused(tiny, "--output", data)
    assert "is inside the data" in refused(tiny, "--output", f"{data}/run")
    assert "omit one of them" in refused(tiny, "--stage1", "--adapter", llm)
    assert refused(tiny, "--num-gpus", "-3") == "--num-gpus is -3, expected at least 1"
    assert not (tiny / "out").exists()


def test_an_input_in_a_folder_that_the_run_replaces_is_refused(
    tiny: Path, tmp_path: Path
):
    save_tiny_llm(tmp_path / "data" / "llm", "llama")
    message = refused(
        tiny, "--llm", str(tmp_path / "data" / "llm"), "--output", str(tmp_path)
    )
    assert "which 'hold out validation' replaces" in message


def test_another_llms_adapter_is_refused(tiny: Path, tmp_path: Path):
    from llm2clip_plugin.text.adapter import add_lora
    from llm2clip_plugin.text.config import EncoderConfig, LoraSettings
    from llm2clip_plugin.text.llm import load_backbone

    wide = save_tiny_llm(tmp_path / "wide", "llama", width=64)
    llm = load_backbone(
        wide, EncoderConfig(llm=str(wide)), torch.float32, torch.device("cpu")
    )
    add_lora(llm, LoraSettings(), base=str(wide)).save_pretrained(tmp_path / "adapter")
    assert "is for an LLM of width 64" in refused(
        tiny, "--adapter", str(tmp_path / "adapter")
    )


@pytest.fixture
def survey_of(monkeypatch: pytest.MonkeyPatch):
    """The survey of images, each a dict of captions by kind."""

    class Images:
        path = "data"

        def __init__(self, images: Sequence[dict[str, list[str]]]) -> None:
            self.images = []
            for texts_of_kind in images:
                captions = []
                for kind, texts in texts_of_kind.items():
                    captions += [Caption(text, kind) for text in texts]
                self.images.append(tuple(captions))

        def __len__(self) -> int:
            return len(self.images)

        def captions(self, number: int) -> tuple[str, tuple[Caption, ...]]:
            return str(number), self.images[number]

    return lambda *images: survey(Images(images))  # type: ignore[arg-type]


def test_names_in_other_languages_do_not_switch_stage_1_off(survey_of):
    """Some pairs contain one another, most do not."""
    guinea = {
        "short": [
            "Guinea",
            "Guinée",
            "Guinea Ecuatorial",
            "Gvineja",
            "Γουινέα",
            "ギニア",
            "Guiné",
        ]
    }
    assert survey_of(guinea, guinea) == ("short:same", "")
    copies = {"short": ["a red bird"], "long": ["A red bird, drawn."]}
    pairs, why_not = survey_of(copies, copies)
    assert pairs == "short:long"
    assert "one caption contains another" in why_not
    assert survey_of({"short": ["a bird"]}, copies)[0] == ""


def test_stage_1_can_be_demanded(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The option overrides the survey, whose note says so."""
    base = ["data", "--llm", "llm", "--tower", "tower", "--output", "out"]
    auto, demanded, without = (
        RUN.parse([*base, *more]) for more in ([], ["--stage1"], ["--no-stage1"])
    )
    assert (auto.stage1, demanded.stage1, without.stage1) == ("auto", True, False)
    _, source = opened(tiny)
    monkeypatch.setattr(
        "llm2clip_plugin.stages.pipeline.survey",
        lambda source: ("short:same", "they are alike"),
    )
    assert pairs_of_stage_1(auto, source) == ""
    assert (
        "stage 1 is left out: they are alike; --stage1 runs it all the same"
        in capsys.readouterr().out
    )
    tuned = RUN.parse([*base, "--preset", "llm2clip-llama3"])
    assert pairs_of_stage_1(tuned, source) == ""
    assert "--preset is for an LLM that is fine-tuned" in capsys.readouterr().out
    again = dataclasses.replace(tuned, stage1=True)
    assert pairs_of_stage_1(again, source) == "short:same"
    with pytest.raises(ValueError, match="--reading and --preset both say"):
        dataclasses.replace(tuned, reading="reading")
    assert pairs_of_stage_1(demanded, source) == "short:same"
    assert pairs_of_stage_1(without, source) == ""
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(
        "llm2clip_plugin.stages.pipeline.survey", lambda source: ("", "too few")
    )
    with pytest.raises(
        ValueError,
        match="--stage1: it needs images with several captions; name more caption fields",
    ):
        pairs_of_stage_1(demanded, source)


def test_status_shows_the_stages(three: Run, capsys: pytest.CaptureFixture[str]):
    def said() -> list[str]:
        assert status.main([str(three.out)]) == 0
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    folder = three.opened()
    (three.folder / "late").write_text("LATE")
    command = {"words": ["run", "data"], "ranks": 1, "folder": str(three.folder)}
    folder.begin(three.stages[2], ["a", "b", "c", "d"], command)
    again = f"go on cd {three.folder} && llm2clip run data"
    lines = ["a complete, 1 s", "b complete, 1 s", "c not complete", "d to do"]
    assert said() == [f"{three.out}: stopped: 2 of 4 stages complete", *lines, again]
    with locked(three.out):
        first, *rest = said()
    assert first.startswith(f"{three.out}: running (process {os.getpid()} on ")
    assert first.endswith("2 of 4 stages complete")
    assert rest == [line.replace("not complete", "running") for line in lines]
    metrics = three.out / "c" / "metrics.jsonl"
    metrics.parent.mkdir()
    metrics.write_text(json.dumps({"step": 3, "samples": 24, "loss": 1.5}) + "\n")
    assert "progress step 3, 24 samples, loss 1.5, last line 0:00:00 ago" in said()


def test_a_stage_that_is_complete_is_listed_so(
    three: Run, capsys: pytest.CaptureFixture[str]
):
    show(three.stages, dict.fromkeys(("b", "c"), "late changed since it was made"))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == f"1 complete a: x a {three.out}"
    assert lines[2] == f"3 c: x c {three.out}"
    assert lines[3:] == [
        "stage 'b' runs again: late changed since it was made",
        "2 of 3 stages to run",
    ]
