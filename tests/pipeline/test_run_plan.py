"""llm2clip run: what each stage is given, and what its result depends on."""

from pathlib import Path

import pytest
from tiny_data import SHARDS, make_shards, make_tower
from tiny_llm import save_tiny_llm

from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.stages.rerun import Stage
from llm2clip_plugin.stages.run_plan import plan, prune_cache
from llm2clip_plugin.stages.settings import PipelineConfig


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
    given = {name: str(folder / place) for name, place in paths.items()}
    config = PipelineConfig(**given, llava_llm="llava-llm", num_train_epochs=3.0)
    return {stage.name: stage for stage in plan(config, open_source(config), "short:long")}


def option(stage: Stage, name: str) -> str:
    return stage.words[stage.words.index(name) + 1]


def test_the_start_tower_is_not_trained(stages: dict[str, Stage]):
    before, after = (stages[name].words for name in ("heads on the start tower", "stage 2"))
    different = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    epochs, (one, other) = different
    assert epochs == ("0", "3")
    assert (Path(one).name, Path(other).name) == ("before", "after")


@pytest.mark.parametrize("side", ["before", "after"])
def test_each_side_is_measured_on_validation_and_has_a_llava(
    stages: dict[str, Stage], folder: Path, side: str
):
    out = folder / "out"
    measure = stages[f"measure {side}"]
    assert measure.words[2:4] == (str(out / side / "tower"), str(out / "data" / "validation"))
    assert option(measure, "--cache") == str(out / "embeddings" / "validation")
    assert option(stages[f"LLaVA {side}"], "--tower") == f"llm2clip:{out / side / 'tower'}"
    assert option(stages[f"questions {side}"], "--model-path") == str(out / f"llava-{side}")


@pytest.mark.parametrize("side", ["train", "validation"])
def test_embeddings_are_of_the_trained_adapter(stages: dict[str, Stage], folder: Path, side: str):
    embed = stages[f"embed {side}"]
    assert option(embed, "--adapter") == str(folder / "out" / "llm" / "adapter")
    assert {artifact.name for artifact in embed.reads} == {
        f"the {side} data",
        "the LLM",
        "the trained adapter",
    }
    for name in ("heads on the start tower", "stage 2"):
        assert f"the embeddings of {side}" in {artifact.name for artifact in stages[name].reads}


def test_a_cache_loses_the_shards_that_the_data_no_longer_has(folder: Path, tmp_path: Path):
    names = [f"{number:05d}.safetensors" for number in range(SHARDS + 1)]
    for name in (*names, "manifest.json"):
        (tmp_path / name).write_text("")
    prune_cache(tmp_path, SourceConfig(path=str(folder / "data")))
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names[:SHARDS], "manifest.json"]


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
