"""ProCLIP's recipe against twenty steps of each stage by ProCLIP's own code.

golden/proclip holds what VisionXLab/ProCLIP at commit d39e872 computes: golden/make_proclip.py ran
its model, optimizer, schedule and both of its training functions, in fp32, and says which lines of
them it had to correct.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import proclip_pairs
import pytest
import torch
from golden_updates import assert_updates_are_golden
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_data import encoded, made_up, make_cache, write_tar
from torch import Tensor
from tower_runs import ROOT, lines

from llm2clip_plugin.data.sampler import Mixture
from llm2clip_plugin.stages import tower
from llm2clip_plugin.stages.tower import train_tower
from llm2clip_plugin.stages.tower_config import TRAIN_TOWER
from llm2clip_plugin.text.clip_text import PROJECTED
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.dual import DualEncoder, load_dual

GOLDEN = ROOT / "tests" / "golden"
STEPS = 20
FIT_BATCH = 128
BATCH = 128  # theirs is 512: the sums of the second stage have fewer terms here
DISTILL = 4e-4 * BATCH
STRUCTURE = (BATCH - 1) / 2
ROWS = STEPS * BATCH
# Twenty steps of AdamW in fp32. Three instruction sets gave at most 6e-4 in one tensor, 2e-4 in all
# together, and 1.6e-5 in a loss (golden/README.md).
UPDATE_BOUNDS = {"typical": 5e-4, "worst": 5e-3}
LOSS_BOUND = 1e-4
# which of an image's captions is drawn first, theirs is always the short one
SHORT_FIRST = ("short=1", "long=1e-9")


def described() -> dict[str, Any]:
    """The model on which golden/proclip starts."""
    return json.loads((GOLDEN / "authors" / "openai.json").read_text())


def curves() -> dict[str, Any]:
    return json.loads((GOLDEN / "proclip" / "curves.json").read_text())


def weights(when: str) -> dict[str, Tensor]:
    stored = load_file(GOLDEN / "proclip" / "weights.safetensors")
    return under(stored, f"{when}.")


def under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names have the prefix, without it."""
    chosen: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith(prefix):
            chosen[name.removeprefix(prefix)] = value
    return chosen


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pairs, stored so that a run reads them in the order of their numbers, with the caches of
    the LLM and of the CLIP."""
    folder = tmp_path_factory.mktemp("proclip") / "data"
    order = [draw.index for draw in Mixture([[ROWS]], [1.0], 0).batch_indices(0, ROWS)]
    row_at = {index: row for row, index in enumerate(order)}
    members: list[tuple[str, bytes]] = []
    for index in range(ROWS):
        row = row_at[index]
        captions = {"caption": f"{row} short", "long_caption": f"{row} raw"}
        image = Image.fromarray(proclip_pairs.pixels(row).numpy())
        members += [
            (f"{index:05d}.png", encoded(image, "PNG", compress_level=0)),
            (f"{index:05d}.json", json.dumps(captions).encode()),
        ]
    write_tar(folder / "00000.tar", members)

    def llm(text: str) -> Tensor:
        row, caption = text.split()
        return proclip_pairs.embedding(int(row), caption)

    def clip(text: str) -> Tensor:
        row, caption = text.split()
        return proclip_pairs.clip_feature(int(row), caption)

    make_cache(folder, embed=llm)
    identity = made_up("clip", pooling=PROJECTED)
    identity = dataclasses.replace(identity, width=proclip_pairs.CLIP_WIDTH)
    make_cache(folder, embed=clip, identity=identity)
    return folder


def imported(state: dict[str, Tensor], folder: Path) -> Path:
    """A state of the authors' model as a tower directory."""
    folder.mkdir()
    save_file(state, folder / "state.safetensors")
    config = folder / "config.json"
    config.write_text(json.dumps(described()["model_config"]))
    import_tower(folder / "state.safetensors", folder / "tower", config=config)
    return folder / "tower"


def clip_state() -> dict[str, Tensor]:
    """Tower, projection and scale as their training starts."""
    stored = load_file(GOLDEN / "authors" / "openai.safetensors")
    state: dict[str, Tensor] = {}
    for name, value in stored.items():
        if name.startswith("start.visual."):
            state[name.removeprefix("start.")] = value
    state["logit_scale"] = torch.tensor(described()["pretrained_log_scale"])
    return state


def text_adapter(when: str, folder: Path) -> dict[str, Tensor]:
    """Their text adapter, by our names."""
    state = clip_state()
    for name, value in weights(when).items():
        state[f"text.{name}"] = value
    dual, _ = load_dual(imported(state, folder))
    assert dual.text_adapter is not None
    return dual.text_adapter.state_dict()


def options(data: Path, tower_folder: Path, run: Path, lr: float) -> list[str]:
    """Widths, rates, precision, batch and the number of steps are the tiny run's, the crop is the
    whole image, and the reference is their code's; all else is the recipe's."""
    return [
        *("--recipe", "proclip-b16", "--data.path", str(data)),
        *("--data.caption-weights", *SHORT_FIRST, "--output_dir", str(run)),
        *("--tower.path", str(tower_folder), "--dual.projection-dim", "16"),
        *("--heads.steps", str(STEPS), "--heads.batch-size", str(FIT_BATCH)),
        *("--heads.lr", str(lr), "--optim.lr", str(lr), "--train.precision", "fp32"),
        *("--train.global-batch", str(BATCH), "--num_train_epochs", "1"),
        *("--data.augment.scale", "1", "1", "--data.augment.ratio", "1", "1"),
        *("--train.dataloader-num-workers", "0", "--train.logging-steps", "1"),
        *("--loss.terms", "infonce=1", f"distill={DISTILL}"),
        *("--loss.args", f"distill.structure={STRUCTURE}"),
        *("--distill.reference", "start"),
    ]


def train(
    words: list[str], start: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Tensor], Path]:
    """Train with this text adapter at the start; the adapter after the fit, and the trained
    tower."""
    build_dual = tower.build_dual
    fit_heads = tower.fit_heads
    fitted: dict[str, Tensor] = {}

    def build(*arguments: Any, **more: Any) -> DualEncoder:
        dual = build_dual(*arguments, **more)
        assert dual.text_adapter is not None
        dual.text_adapter.load_state_dict(start)
        return dual

    def fit(dual: DualEncoder, *arguments: Any, **more: Any) -> Any:
        curve = fit_heads(dual, *arguments, **more)
        assert dual.text_adapter is not None
        for name, value in dual.text_adapter.state_dict().items():
            fitted[name] = value.clone()
        return curve

    monkeypatch.setattr(tower, "build_dual", build)
    monkeypatch.setattr(tower, "fit_heads", fit)
    return fitted, train_tower(TRAIN_TOWER.parse(words))


def test_twenty_steps_of_each_stage_are_proclips(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    golden = curves()
    lr = golden["stage1"]["lr"]
    run = tmp_path / "run"
    start = imported(clip_state(), tmp_path / "clip")
    adapter = text_adapter("start", tmp_path / "start")
    fitted, trained = train(options(data, start, run, lr), adapter, monkeypatch)

    fit = [line for line in lines(run) if line.get("event") == "heads"]
    assert [line["heads_loss"] for line in fit] == pytest.approx(
        golden["stage1"]["loss"], rel=LOSS_BOUND
    )
    stage1 = text_adapter("stage1", tmp_path / "stage1")
    assert_updates_are_golden(fitted, stage1, adapter, **UPDATE_BOUNDS)

    steps = [line for line in lines(run) if "loss" in line]
    for ours, theirs in (
        ("loss", "loss"),
        ("loss_infonce", "infonce"),
        ("logit_scale", "scale"),
    ):
        assert [line[ours] for line in steps] == pytest.approx(
            golden["stage2"][theirs], rel=LOSS_BOUND
        )
    start_state = load_dual(start)[0].state_dict()
    for name, value in adapter.items():
        start_state[f"text_adapter.{name}"] = value
    end = imported(weights("stage2"), tmp_path / "stage2")
    end_state = load_dual(end)[0].state_dict()
    ours_end = load_dual(trained)[0].state_dict()
    assert_updates_are_golden(ours_end, end_state, start_state, **UPDATE_BOUNDS)
