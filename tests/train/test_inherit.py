"""ProCLIP on a tiny CLIP: the text adapter learns the CLIP's text space, then contrast with
self-distillation."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_clip import save_tiny_clip
from tiny_data import make_cache, make_shards
from tower_runs import ROOT, lines, losses
from train_helpers import run_ranks

from llm2clip_plugin import cli
from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.errors import NonFiniteLossError, StoppedError
from llm2clip_plugin.run_folder import UNFINISHED_HEADS
from llm2clip_plugin.stages.tower import train_tower
from llm2clip_plugin.stages.tower_config import TRAIN_TOWER
from llm2clip_plugin.stages.tower_data import open_data
from llm2clip_plugin.train import heads
from llm2clip_plugin.train.config import HeadsConfig
from llm2clip_plugin.train.distributed import ALONE
from llm2clip_plugin.train.losses.base import Features
from llm2clip_plugin.vision.dual import load_dual

FIT = 120
STEPS = 6


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP and its tower, captions with the caches of a made-up LLM and of the CLIP."""
    folder = tmp_path_factory.mktemp("inherit")
    save_tiny_clip(folder / "clip", "clip")
    make_cache(make_shards(folder / "data"))
    for words in (
        ["import", str(folder / "clip"), "--output", str(folder / "tower")],
        [
            "embed",
            str(folder / "data"),
            "--llm",
            str(folder / "clip"),
            "--compute-dtype",
            "float32",
        ],
    ):
        assert cli.main(words) == 0
    return folder


def options(folder: Path, run: Path, *more: str) -> list[str]:
    """The fit of the text adapter, then stage 2 with distillation."""
    return [
        *(
            str(folder / "data"),
            "--tower",
            str(folder / "tower"),
            "--output",
            str(run),
            "--heads.target",
            "clip_text",
        ),
        *(
            "--heads.steps",
            str(FIT),
            "--heads.batch-size",
            "16",
            "--heads.lr",
            "1e-2",
            "--dual.projection-dim",
            "24",
        ),
        *(
            "--dual.adapter-blocks",
            "1",
            "--dual.input-scale",
            "sqrt_width",
            "--global-batch",
            "16",
            "--workers",
            "0",
        ),
        *(
            "--loss.terms",
            "infonce=1",
            "distill=0.2048",
            "--distill.decay",
            "0.8",
            "--max-steps",
            str(STEPS),
        ),
        *("--precision", "fp32", "--lr", "1e-3", *more),
    ]


def two_ranks(rank: int, world: int, folder: str) -> None:
    zero3 = ("--deepspeed", str(ROOT / "scripts/zero3.json"))
    train_tower(
        TRAIN_TOWER.parse(options(Path(folder), Path(folder) / "ranks", *zero3))
    )


def fit_lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in lines(run) if line.get("event") == "heads"]


def test_the_adapter_learns_the_clips_text_space_on_any_ranks(
    clip: Path, tmp_path: Path
):
    """Rank 0 fits; the projection and the scale stay the CLIP's, and stage 2 starts from there."""
    words = options(
        clip, tmp_path / "run", "--max-steps", "0", "--num-train-epochs", "0"
    )
    tower = train_tower(TRAIN_TOWER.parse(words))
    fit = fit_lines(tmp_path / "run")
    assert fit[0]["heads_cosine"] < 0.5
    assert fit[-1]["heads_loss"] < 0.5 * fit[0]["heads_loss"]
    assert fit[-1]["heads_lr"] < 0.01 * fit[0]["heads_lr"] == pytest.approx(1e-4)
    dual, card = load_dual(tower)
    start, _ = load_dual(clip / "tower")
    assert torch.equal(dual.visual_projection.weight, start.visual_projection.weight)
    assert torch.equal(dual.logit_scale, start.logit_scale)
    assert card.teacher["llm"] == "made-up"
    opened = map(EmbeddingCache.open, (clip / "data").glob("embeddings-*"))
    caches = sorted(opened, key=lambda cache: cache.teacher.llm != "made-up")
    source = open_source(SourceConfig(path=str(clip / "data")))
    rows_of_samples = [
        (*source.locate(number), source.captions(number)[1][:1])
        for number in range(len(source))
    ]
    own_cache, target_cache = caches
    ours = torch.cat([own_cache.rows(*rows) for rows in rows_of_samples])
    target = torch.cat([target_cache.rows(*rows) for rows in rows_of_samples])
    with torch.no_grad():
        assert torch.cosine_similarity(dual.encode_text(ours), target).mean() > 0.8
    run_ranks(two_ranks, 2, str(clip))
    for line, line_of_ranks in zip(fit, fit_lines(clip / "ranks"), strict=True):
        assert line_of_ranks["heads_loss"] == pytest.approx(
            line["heads_loss"], rel=1e-4
        )
    first, *_, last = [line for line in lines(clip / "ranks") if "loss" in line]
    assert first["loss_distill"] < 1e-6 < last["loss_distill"]
    assert (
        TowerCard.read(clip / "ranks/tower" / TowerCard.FILE).training["steps"] == STEPS
    )


def test_stopped_and_started_again_it_ends_the_same(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    train_tower(TRAIN_TOWER.parse(options(clip, whole)))
    batches = heads.caption_batches
    calls = []

    def stopped_at_40(*given: Any) -> Any:
        for batch in batches(*given):
            calls.append(1)
            if len(calls) == 40:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(heads, "caption_batches", stopped_at_40)
    with pytest.raises(StoppedError):
        train_tower(TRAIN_TOWER.parse(options(clip, cut)))
    assert (cut / UNFINISHED_HEADS).is_file()
    train_tower(TRAIN_TOWER.parse(options(clip, cut)))
    assert len(calls) == FIT
    assert losses(cut) == pytest.approx(losses(whole), abs=1e-6)
    weights = [
        load_file(run / "tower/text_adapter.safetensors") for run in (whole, cut)
    ]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-6, rtol=1e-5)


def test_captions_of_an_image_are_all_drawn(clip: Path, tmp_path: Path):
    """The loss with a second caption an image is larger by its squared distance, which is at most
    4."""
    starts = []
    for captions in ("1", "2"):
        run = tmp_path / captions
        more = ("--heads.captions-per-image", captions, "--heads.steps", "1")
        more = (*more, "--max-steps", "0", "--num-train-epochs", "0")
        train_tower(TRAIN_TOWER.parse(options(clip, run, *more)))
        (line,) = fit_lines(run)
        assert line["heads_samples"] == 16
        starts.append(line["heads_loss"])
    assert 1 < starts[1] - starts[0] < 128 * 4


def test_captions_of_an_image_need_the_text_target():
    with pytest.raises(ValueError, match=r"captions_per_image 2 has no effect with"):
        HeadsConfig(captions_per_image=2)


@pytest.mark.parametrize("captions", [1, 2])
def test_the_loss_of_the_fit_is_the_sum_over_128_images(captions: int):
    """ProCLIP's code on one rank: squares summed over all captions, smooth L1 over the pairs of
    first ones."""
    images = 128
    generator = torch.Generator().manual_seed(0)
    own = F.normalize(torch.randn(captions * images, 8, generator=generator), dim=-1)
    theirs = F.normalize(own + torch.randn(own.shape, generator=generator), dim=-1)
    batch = Features(
        anchor_bD=own,
        positive_bkD=theirs[:images, None],
        log_scale=torch.zeros(1),
        bias=torch.zeros(1),
        caption_hashes=None,
        image_ids=None,
        reference_bD=theirs,
        group=ALONE,
    )
    distance = F.mse_loss(own, theirs, reduction="sum")
    structure = F.smooth_l1_loss(
        F.pdist(own[:images]), F.pdist(theirs[:images]), reduction="sum"
    )
    loss = heads.clip_text_loss(batch, captions=captions)
    assert float(loss) == pytest.approx(float(distance + structure), rel=1e-5)


def test_a_loss_that_is_not_finite_ends_the_fit_with_status_3(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def not_finite(batch: Features, *, captions: int) -> torch.Tensor:
        return math.nan * batch.anchor_bD.sum()

    monkeypatch.setattr(heads, "clip_text_loss", not_finite)
    words = options(clip, tmp_path / "run")
    with pytest.raises(NonFiniteLossError, match="heads' fit is nan at step") as caught:
        train_tower(TRAIN_TOWER.parse(words))
    assert caught.value.status == 3
    assert "Nothing was saved; lower --heads.lr (now 0.01)" in str(caught.value)


def test_the_last_batch_of_the_fit_is_left_out(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The curve ends at the last step all the same; without --skip-bad-batches the status is 3."""
    steps = 5
    find = heads._non_finite_keys
    calls = []

    def bad_at_the_end(batch: Any) -> list[str]:
        calls.append(1)
        return ["0-001"] if len(calls) == steps else find(batch)

    monkeypatch.setattr(heads, "_non_finite_keys", bad_at_the_end)
    more = ("--heads.steps", str(steps), "--num-train-epochs", "0", "--max-steps", "0")
    words = options(clip, tmp_path / "run", *more, "--logging-steps", "2")
    with pytest.raises(NonFiniteLossError, match="non-finite embeddings: 0-001"):
        train_tower(TRAIN_TOWER.parse(words))
    calls.clear()
    train_tower(TRAIN_TOWER.parse([*words, "--skip-bad-batches", "1"]))
    logged = [line["heads_step"] for line in fit_lines(tmp_path / "run")]
    assert logged == [2, 4, steps]


def test_the_cache_of_another_teacher_is_refused(clip: Path, tmp_path: Path):
    caches = {
        EmbeddingCache.open(path).teacher.llm: str(path)
        for path in (clip / "data").glob("embeddings-*")
    }
    more = ("--data.clip-cache", caches["made-up"])
    config = TRAIN_TOWER.parse(options(clip, tmp_path / "run", *more)).validate()
    with pytest.raises(ValueError, match=r"--clip-cache .*made-up"):
        open_data(config.data, clip_width=config.clip_width)
