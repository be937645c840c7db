"""llm2clip run: what each stage is given, and what its result depends on."""

from pathlib import Path

import pytest
import torch
from tiny_data import SHARDS, make_shards, make_tower
from tiny_llm import save_tiny_llm

from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.stages import run_plan
from llm2clip_plugin.stages.pipeline_config import PipelineConfig
from llm2clip_plugin.stages.rerun import RunFolder, Stage, changed_words
from llm2clip_plugin.stages.run_plan import movable, plan, prune_cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    make_shards(folder / "data")
    make_tower(folder / "tower")
    save_tiny_llm(folder / "llm", "llama")
    return folder


@pytest.fixture(scope="module")
def stages(folder: Path) -> dict[str, Stage]:
    """Name -> stage of a run with stage 1 and questions."""
    paths = {
        "path": "data",
        "llm": "llm",
        "tower": "tower",
        "output": "out",
        "questions": "questions.jsonl",
    }
    given = {name: str(folder / path) for name, path in paths.items()}
    config = PipelineConfig(**given, llava_llm="llava-llm", num_train_epochs=3.0)
    return {
        stage.name: stage for stage in plan(config, open_source(config), "short:long")
    }


def option(stage: Stage, name: str) -> str:
    return stage.words[stage.words.index(name) + 1]


def test_the_start_tower_is_not_trained(stages: dict[str, Stage]):
    before, after = (
        stages[name].words for name in ("heads on the start tower", "stage 2")
    )
    different = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    epochs, (tower_before, tower_after) = different
    assert epochs == ("0", "3")
    assert (Path(tower_before).name, Path(tower_after).name) == ("before", "after")


@pytest.mark.parametrize("side", ["before", "after"])
def test_each_side_is_measured_on_validation_and_has_a_llava(
    stages: dict[str, Stage], folder: Path, side: str
):
    out = folder / "out"
    measure = stages[f"measure {side}"]
    assert measure.words[2:4] == (
        str(out / side / "tower"),
        str(out / "data" / "validation"),
    )
    assert option(measure, "--cache") == str(out / "embeddings" / "validation")
    assert (
        option(stages[f"LLaVA {side}"], "--tower") == f"llm2clip:{out / side / 'tower'}"
    )
    assert option(stages[f"questions {side}"], "--model-path") == str(
        out / f"llava-{side}"
    )


@pytest.mark.parametrize("side", ["train", "validation"])
def test_embeddings_are_of_the_trained_adapter(
    stages: dict[str, Stage], folder: Path, side: str
):
    embed = stages[f"embed {side}"]
    assert option(embed, "--adapter") == str(folder / "out" / "llm" / "adapter")
    assert {artifact.name for artifact in embed.reads} == {
        f"the {side} data",
        "the LLM",
        "the trained adapter",
    }
    for name in ("heads on the start tower", "stage 2"):
        assert f"the embeddings of {side}" in {
            artifact.name for artifact in stages[name].reads
        }


def test_a_cache_loses_the_shards_that_the_data_no_longer_has(
    folder: Path, tmp_path: Path
):
    names = [f"{number:05d}.safetensors" for number in range(SHARDS + 1)]
    for name in (*names, "manifest.json"):
        (tmp_path / name).write_text("")
    prune_cache(tmp_path, SourceConfig(path=str(folder / "data")))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *names[:SHARDS],
        "manifest.json",
    ]


def test_trust_in_the_llms_code_reaches_the_stages_that_open_it(folder: Path):
    given = {name: str(folder / name) for name in ("llm", "tower")}
    paths = {"path": str(folder / "data"), "output": str(folder / "out")}
    config = PipelineConfig(**given, **paths, trust_remote_code=True)
    trusting = {
        stage.name
        for stage in plan(config, open_source(config), "short:long")
        if "--trust-remote-code" in stage.words
    }
    assert trusting == {"stage 1", "embed train", "embed validation"}


def keys(folder: Path, **settings: object) -> dict[str, list[str]]:
    """Name -> what is compared of a stage's command."""
    paths = {name: str(folder / name) for name in ("llm", "tower")}
    given = {"path": str(folder / "data"), "output": "out", **paths, **settings}
    config = PipelineConfig(**given)  # type: ignore[arg-type]
    source = open_source(config)
    run = RunFolder(Path(config.output), movable(config, source))
    return {stage.name: run._key(stage) for stage in plan(config, source, "short:long")}


def test_another_spelling_of_the_output_is_no_reason_to_run_again(folder: Path):
    assert keys(folder, output="./out") == keys(folder) == keys(folder, output="out/")


def test_another_machine_is_no_reason_to_run_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """What a GPU decides: precisions, and how many processes share a batch."""
    questions = folder / "own.jsonl"
    questions.write_text('{"image": "0.png", "question": "?", "answer": "yes"}\n')
    asked = {"questions": str(questions), "llava_llm": str(folder / "llm")}
    on_cpu = keys(folder, **asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run_plan, "gpu_precision", lambda: "bf16")
    assert keys(folder, **asked, num_gpus=8) == on_cpu
    assert keys(folder, **asked, precision="bf16") != on_cpu


@pytest.mark.parametrize(
    ("before", "now", "says"),
    [
        ("x --lr 1 --r 2", "x --r 2", "--lr 1 is gone"),
        ("x --r 2", "x --lr 1 --r 2", "--lr 1 is new"),
        ("x --by a", "x --by b", "--by is b, was a"),
        ("x --a --b 1", "x --b 1 --a", "the order of its options changed"),
        ("x y", "x z", "its command is z, was y"),
        ("x y", "x y", ""),
    ],
)
def test_a_changed_command_is_named_by_its_option(before: str, now: str, says: str):
    assert changed_words(before.split(), now.split()) == says


def test_a_folder_named_as_a_command_is_no_command(tmp_path: Path):
    stage = Stage(name="a", words=("llm2clip", "data", "check", "data"))
    assert RunFolder(tmp_path, {"data": "DATA"})._key(stage) == [
        "llm2clip",
        "data",
        "check",
        "DATA",
    ]
