"""ProCLIP's two stages on a tiny CLIP: both caches, the inherited text space, and contrast with self-distillation."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_clip import save_tiny_clip
from tiny_data import make_cache, make_shards
from tower_runs import ROOT, finish, launch, lines, losses, start
from train_helpers import run_ranks

from llm2clip_plugin import cli
from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.stages.text_adapter.opening import open_data
from llm2clip_plugin.stages.text_adapter.options import COMMAND
from llm2clip_plugin.text.teacher import scores
from llm2clip_plugin.train.checkpoint import TWIN
from llm2clip_plugin.vision.dual import load_dual

TERMS = "--loss.terms infonce=1 distill=0.2048 --tower.keep-heads --dual.projection-dim 24 --heads.steps 0"
SHAPE = "--dual.adapter-blocks 1 --dual.input-scale sqrt_width --global-batch 16 --precision fp32 --lr 1e-3 --workers 0"
STEPS_1, STEPS_2 = 40, 6


def options(folder: Path, run: Path, *more: str) -> list[str]:
    """Stage 1 on the captions of tiny_data."""
    return [
        *(str(folder / "data"), "--tower", str(folder / "tower"), "--output", str(run), "--global-batch", "16"),
        *("--adapter.blocks", "1", "--adapter.input-scale", "sqrt_width", "--lr", "1e-2", "--save-steps", "8"),
        *("--save-minutes", "0", "--loss.args", "structure=5", "--validation", str(folder / "data"), *more),
    ]


def options_1(folder: Path, run: Path, zero: int) -> list[str]:
    """All of stage 1, with gradient caching."""
    more = ("--save-total-limit", "0", "--max-steps", str(STEPS_1), "--micro-batch", "4")
    return options(folder, run, *more, "--deepspeed", str(ROOT / f"scripts/zero{zero}.json"))


def options_2(folder: Path, run: Path, zero: int) -> list[str]:
    """All of stage 2, from the tower of stage 1."""
    words = [str(folder / "data"), "--tower", str(folder / "whole/tower"), "--output", str(run), *TERMS.split()]
    words += ["--deepspeed", str(ROOT / f"scripts/zero{zero}.json"), "--max-steps", str(STEPS_2), *SHAPE.split()]
    return [*words, "--distill.decay", "0.8", "--save-steps", "2", "--save-minutes", "0"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP and its tower, captions with the caches of a made-up LLM and of the CLIP."""
    folder = tmp_path_factory.mktemp("inherit")
    save_tiny_clip(folder / "clip", "clip")
    make_cache(make_shards(folder / "data"))
    for words in (
        ["import", str(folder / "clip"), "--output", str(folder / "tower")],
        ["embed", str(folder / "data"), "--llm", str(folder / "clip"), "--compute-dtype", "float32"],
    ):
        assert cli.main(words) == 0
    return folder


def both_stages(rank: int, world: int, folder: str) -> None:
    """Stage 1 with gradient caching, whole under ZeRO-1, resumed under ZeRO-3; then stage 2 under ZeRO-3."""
    from llm2clip_plugin.stages.text_adapter.run import train_text_adapter
    from llm2clip_plugin.stages.tower.config import TRAIN_TOWER as TOWER
    from llm2clip_plugin.stages.tower.run import train_tower

    place = Path(folder)
    for run, stage in (("whole", 1), ("cut", 3)):
        train_text_adapter(COMMAND.parse(options_1(place, place / run, stage)))
        if run == "whole" and rank == 0:
            shutil.copytree(place / "whole/checkpoints/step-00000032", place / "cut/checkpoints/step-00000032")
        torch.distributed.barrier()
    train_tower(TOWER.parse(options_2(place, place / "stage2", 3)))


@pytest.fixture(scope="module")
def trained(clip: Path) -> Path:
    run_ranks(both_stages, 2, str(clip))
    return clip


def test_the_adapter_learns_the_clips_text_space(trained: Path):
    values = losses(trained / "whole")
    assert len(values) == STEPS_1 and values[STEPS_1] < 0.5 * values[1]
    card = TowerCard.read(trained / "whole/tower" / TowerCard.FILE)
    before = next(line for line in lines(trained / "whole") if "cosine" in line)
    assert before["step"] == 0 and before["cosine"] < 0.5 and card.metrics["cosine"] > 0.8
    assert card.metrics["structure"] > 0.4 and card.metrics["caption_r1"] > 0.0
    assert card.teacher["llm"] == "made-up" and card.training["inherited_from"] == str(trained / "clip")
    dual, _ = load_dual(trained / "whole/tower")
    own, _ = load_dual(trained / "tower")
    assert torch.equal(dual.visual_projection.weight, own.visual_projection.weight)
    assert torch.equal(dual.logit_scale, own.logit_scale)


def test_killed_and_resumed_under_another_stage_it_ends_the_same(trained: Path):
    """ZeRO-1 and ZeRO-3 sum in another order: 1e-5."""
    whole, cut = losses(trained / "whole"), losses(trained / "cut")
    assert sorted(cut) == list(range(33, 41))
    assert cut == pytest.approx({step: whole[step] for step in cut}, abs=1e-4)
    weights = [load_file(trained / run / "tower/text_adapter.safetensors") for run in ("whole", "cut")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-3, rtol=1e-2)


def test_stage_2_starts_from_it(trained: Path):
    first, *_, last = [line for line in lines(trained / "stage2") if "loss" in line]
    assert first["loss_distill"] < 1e-6 < last["loss_distill"]
    assert (trained / "stage2/tower" / TowerCard.FILE).is_file()


KILLED = {  # of which run, after how many steps, ZeRO stage
    "stage 1, ZeRO-1": ("whole", 10, 1),
    "stage 1, ZeRO-3": ("whole", 10, 3),
    "stage 2, ZeRO-1": ("stage2", 3, 1),
    "stage 2, ZeRO-3": ("stage2", 3, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(KILLED))
def test_a_sigkill_changes_nothing(trained: Path, tmp_path: Path, name: str):
    """Both ranks die between checkpoints, and the run is started again, once by a launcher. The whole stage 1 ran
    under ZeRO-1, stage 2 under ZeRO-3: the other one sums in another order (1e-5), and the twin is bit for bit the same
    only under the same."""
    whole, goal, zero = KILLED[name]
    words = (options_1 if whole == "whole" else options_2)(trained, tmp_path / "run", zero)
    script = "scripts/train_text_adapter.py" if whole == "whole" else "scripts/train_tower.py"
    processes = start(words, 2, script)
    deadline = time.monotonic() + 900
    while max(losses(tmp_path / "run"), default=0) < goal and time.monotonic() < deadline:
        assert processes[0].poll() is None, "ended before it was killed"
        time.sleep(0.01)
    for process in processes:
        process.kill()
    finish(processes)
    assert not (tmp_path / "run/tower").exists()
    if name == "stage 1, ZeRO-1":
        again = launch([script, *words])
        assert again.returncode == 0, again.stderr[-2000:]
    else:
        assert finish(start(words, 2, script)) == [0, 0]
    assert losses(tmp_path / "run") == pytest.approx(losses(trained / whole), abs=1e-4)
    if whole == "stage2":
        file = f"checkpoints/step-{STEPS_2:08d}/{TWIN}"
        twins = [load_file(run / file) for run in (trained / whole, tmp_path / "run")]
        assert twins[0].keys() == twins[1].keys() and len(twins[0]) > 20
        for key, value in twins[0].items():
            atol, rtol = (0.0, 0.0) if zero == 3 else (1e-5, 1e-4)
            torch.testing.assert_close(twins[1][key], value, atol=atol, rtol=rtol)


def test_the_plan_says_what_the_run_does(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["train-text-adapter", *options_1(trained, tmp_path / "run", 1), "--dry-run"]
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    dual, _ = load_dual(trained / "whole/tower")
    assert dual.text_adapter is not None
    parameters = sum(p.numel() for p in dual.text_adapter.parameters())
    assert f"trainable parameters: {parameters:,};" in told and f"steps: {STEPS_1} of 16 pairs" in told
    assert "assumed" not in told and "to a CLIP's 24" in told and "ZeRO-1" in told
    assert not (tmp_path / "run").exists()
    assert cli.main(["train-text-adapter", "--dry-run", "--plan.clip-width", "512"]) == 0
    told = capsys.readouterr().out
    assert "assumed: 30,000,000 captioned images" in told and "from an LLM's 4096 to a CLIP's 512" in told


def test_wrong_input_is_one_error(clip: Path, tmp_path: Path):
    llm_cache = next(
        str(path.parent) for path in (clip / "data").glob("embeddings-*/*.json") if "made-up" in path.read_text()
    )
    refused: dict[str, tuple[list[str], str]] = {
        "kind": (["--clip-cache", llm_cache], "--clip-cache .* is of an LLM .*made-up.*, expected one of a CLIP"),
        "bias": (["--loss.terms", "sigmoid", "--loss.args="], "no bias is learned here"),
        "no CLIP": (["--tower="], "no CLIP: add --tower"),
    }
    for more, message in refused.values():
        with pytest.raises(ValueError, match=message):
            open_data(COMMAND.parse(options(clip, tmp_path / "run", *more)).validate())
    (tmp_path / "data").mkdir()
    shutil.copy(clip / "data/00000.tar", tmp_path / "data")
    make_cache(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match=r"no cache of a CLIP's text features .* create it: llm2clip embed"):
        open_data(COMMAND.parse([str(tmp_path / "data"), "--tower", "x"]).validate())


def test_scores_are_those_of_equal_and_of_other_spaces():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.nn.functional.normalize(torch.randn(2, 50, 64, generator=generator), dim=-1)
    assert scores(one, one) == pytest.approx({"cosine": 1.0, "structure": 1.0, "caption_r1": 1.0}, abs=1e-5)
    apart: dict[str, Any] = scores(one, other)
    assert abs(apart["cosine"]) < 0.1 and abs(apart["structure"]) < 0.2 and apart["caption_r1"] < 0.2
