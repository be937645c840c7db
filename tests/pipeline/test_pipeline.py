"""llm2clip run: which stages there are, what is run again, and what stops it; all of it runs in test_first_day."""

import dataclasses
import json
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_data import make_shards, make_tower
from tiny_llm import save_tiny_llm

from llm2clip_plugin.console import attend
from llm2clip_plugin.data.sources import Source, open_source
from llm2clip_plugin.doctor import check_accelerator
from llm2clip_plugin.stages.pipeline import Stage, check_given, complete, plan, survey
from llm2clip_plugin.stages.settings import PipelineConfig
from llm2clip_plugin.text.llm import fastest_dtype
from llm2clip_plugin.train.model import DTYPES


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ (48 images with two captions), llm/ and tower/."""
    folder = tmp_path_factory.mktemp("pipeline")
    make_shards(folder / "data")
    make_tower(folder / "tower")
    save_tiny_llm(folder / "llm", "llama")
    return folder


def opened(folder: Path, **more: object) -> tuple[PipelineConfig, Source]:
    values = {"path": folder / "data", "llm": folder / "llm", "tower": folder / "tower", "output": folder / "out"}
    config = PipelineConfig(**{name: str(value) for name, value in values.items()} | more)
    return config, open_source(config)


def names(stages: list[Stage]) -> list[str]:
    return [" ".join(stage.words[1 : 3 if stage.words[1] in ("data", "llava") else 2]) for stage in stages]


ALL = [
    "data check", "data split", "finetune-llm", "embed", "embed", "train-tower", "train-tower", "evaluate", "evaluate",
    "compare", "export",
]  # fmt: skip


def test_the_stages_follow_from_the_data_and_the_options(tiny: Path):
    config, source = opened(tiny)
    assert survey(source) == ("short:long", "") and len(source) == 48
    found = "short:long"
    stages = plan(config, source, found)
    assert names(stages) == ALL
    assert stages[2].words[stages[2].words.index("--pair-kinds") + 1] == "short:long"
    adapter = str(tiny / "out" / "llm" / "adapter")
    assert all(adapter in stage.words for stage in stages[3:5])
    shorter = dataclasses.replace(config, stage1=False)
    assert names(plan(shorter, source, found)) == [*ALL[:2], *ALL[3:]]
    own = plan(dataclasses.replace(config, adapter="mine"), source, found)
    assert names(own) == [*ALL[:2], *ALL[3:]] and "mine" in own[2].words
    hub = plan(dataclasses.replace(config, tower="openai/clip-vit-base-patch16"), source, found)
    assert names(hub)[0] == "import" and str(tiny / "out" / "start") in hub[6].words
    two = plan(dataclasses.replace(config, num_gpus=2), source, found)
    assert [stage.ranks for stage in two] == [1, 1, 2, 2, 2, 2, 2, 1, 1, 1, 1]
    assert "--nproc_per_node=2" in two[2].argv and "llm2clip_plugin.launch" not in two[1].argv
    with pytest.raises(ValueError, match="--nonsense"):  # before the stages that come first, as all that follows
        plan(dataclasses.replace(config, tower_options="--nonsense 3"), source, found)
    for wrong in ({"llm": str(tiny / "none")}, {"adapter": str(tiny / "llm")}):
        with pytest.raises(FileNotFoundError):
            check_given(dataclasses.replace(config, **wrong))


@pytest.mark.parametrize("second, dtype", [((7, 5), torch.float16), ((9, 0), torch.bfloat16)])
def test_a_gpu_that_emulates_bfloat16_computes_in_float16(tiny: Path, monkeypatch, second: tuple[int, int], dtype):
    """In stages 1.5 and 2, and in doctor's report, of an H100 with a T4 or with another one."""
    both = {"device_count": lambda: 2, "get_device_capability": [(9, 0), second].__getitem__, "get_device_name": str}
    for name, value in (both | {"is_available": lambda: True}).items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert fastest_dtype(torch.device("cuda")) is dtype
    assert next(check_accelerator()).found.endswith(f"bf16 {dtype is torch.bfloat16}")
    words = {word for stage in plan(*opened(tiny), "") for word in stage.words}
    assert DTYPES[(words & {"bf16", "fp16"}).pop()] is dtype


def test_a_stage_counts_while_it_and_all_before_it_are_as_they_were(tmp_path: Path):
    first, second, third = stages = [Stage(name=name, words=("x", name), result=tmp_path / name) for name in "abc"]
    path = tmp_path / "pipeline.json"
    assert complete(stages, path) == {}
    path.write_text(json.dumps({stage.name: {"words": list(stage.words), "seconds": 1.0} for stage in stages}))
    assert complete(stages, path) == {}  # without their results
    for stage in stages:
        stage.result.touch()
    assert list(complete(stages, path)) == ["a", "b", "c"]
    changed = [first, dataclasses.replace(second, words=("y",)), third]
    assert list(complete(changed, path)) == ["a"]
    first.result.unlink()
    assert complete(stages, path) == {}


def test_a_signal_reaches_the_stage_and_ends_the_run(tmp_path: Path):
    """A stage that saves and ends well is no complete one."""
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(0)); open(sys.argv[1], 'w'); time.sleep(60)"

    def kill() -> None:
        while not (tmp_path / "up").exists():
            time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)  # it waits for the stage

    threading.Thread(target=kill, daemon=True).start()
    assert attend([sys.executable, "-c", code, str(tmp_path / "up")]) == 128 + signal.SIGTERM
