"""The model that trains: parameter groups, freezing, options of the tower, the fit of the heads,
memory."""

import dataclasses
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tensor_memory import peak_bytes
from tiny_clip import save_tiny_clip
from tiny_data import WIDTH, make_all, make_tower
from train_helpers import run_ranks, trainable_names
from transformers import CLIPVisionConfig, CLIPVisionModel

from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.errors import NonFiniteLossError, StoppedError
from llm2clip_plugin.plan.memory import activation_bytes
from llm2clip_plugin.signals import StopRequest
from llm2clip_plugin.train import heads
from llm2clip_plugin.train.config import (
    HeadsConfig,
    LossConfig,
    OptimConfig,
    TowerConfig,
    TrainConfig,
)
from llm2clip_plugin.train.frozen_features import FrozenFeatures
from llm2clip_plugin.train.heads import fit_heads, head_parameters
from llm2clip_plugin.train.model import (
    build_dual,
    enable_gradient_checkpointing,
    trained_parameters,
    with_llm_width,
)
from llm2clip_plugin.train.optim import parameter_groups, set_lr
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import heads_state
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.fast import use_quick_gelu
from llm2clip_plugin.vision.parts import tower_blocks
from llm2clip_plugin.vision.towers import preprocessor_config

DUAL = DualConfig(
    projection_dim=16,
    llm_width=WIDTH,
    adapter_blocks=1,
    pool="cls_mean",
    projection_norm=True,
)


@pytest.fixture(scope="module", params=["clip", "dinov2"])
def tiny(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return make_all(tmp_path_factory.mktemp(request.param), request.param)


def test_layer_wise_rates_and_no_decay_where_it_does_harm(tiny: Path):
    dual = build_dual(TowerConfig(path=str(tiny / "tower")), DUAL, seed=0)
    trained = {
        item.name: item
        for item in trained_parameters(
            dual, OptimConfig(lr=1.0, head_lr=3.0, layer_decay=0.5)
        )
    }
    assert set(trained) == set(trainable_names(dual))
    for name, item in trained.items():
        block = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if not name.startswith("tower."):
            expected = 3.0
        elif "embeddings" in name or "pre_layrnorm" in name:
            expected = 0.125  # depth 0 of 3: 0.5 ** 3
        else:
            expected = 1.0 if block is None else 0.5 ** (2 - block)
        assert item.lr == expected, name
        table = any(
            part in name
            for part in ("position", "cls_token", "class_embedding", "mask_token")
        )
        assert item.decay == (item.parameter.ndim > 1 and not table), name
    groups = parameter_groups(trained.values(), 0.05)
    assert sum(len(group["params"]) for group in groups) == len(trained)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    set_lr(groups, 0.5)
    assert {group["lr"] for group in groups} == {1.5, 0.5, 0.25, 0.125, 0.0625}


def test_freezing_is_visible(tiny: Path):
    path = str(tiny / "tower")
    frozen = trainable_names(
        build_dual(TowerConfig(path=path, freeze=True), DUAL, seed=0)
    )
    assert frozen
    assert not [name for name in frozen if name.startswith("tower.")]
    first = trainable_names(
        build_dual(TowerConfig(path=path, freeze_first_blocks=1), DUAL, seed=0)
    )
    assert not [
        name
        for name in first
        if (".0." in name and name.startswith("tower.")) or "embeddings" in name
    ]
    assert [name for name in first if ".1." in name and name.startswith("tower.")]
    with pytest.raises(ValueError, match="--tower"):
        build_dual(TowerConfig(), DUAL, seed=0)
    with pytest.raises(ValueError, match=r"24.* 32"):
        with_llm_width(DUAL, 32)


def fit(
    rank: int,
    world: int,
    folder: str,
    steps: int,
    *,
    decay: float = 0.05,
    scale: float | None = None,
    skip_non_finite: int = 0,
    workers: int = 0,
    logging_steps: int = 10,
    bf16: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """The first phase on a tiny set."""
    tiny = Path(folder)
    dual_config = dataclasses.replace(DUAL, logit_scale_init=scale)
    dual = build_dual(
        TowerConfig(path=str(tiny / "tower"), image_size=16), dual_config, seed=0
    )
    source = open_source(SourceConfig(path=str(tiny / "data")))
    cache = EmbeddingCache.open(next((tiny / "data").glob("embeddings-*")))
    images = ImageConfig.from_preprocessor(preprocessor_config(dual.tower))
    tower = {name: value.clone() for name, value in dual.tower.state_dict().items()}
    config = HeadsConfig(steps=steps, batch=16, lr=0.01, weight_decay=decay)
    train = TrainConfig(
        seed=1,
        precision="bf16" if bf16 else "fp32",
        dataloader_num_workers=workers,
        logging_steps=logging_steps,
        skip_bad_batches=skip_non_finite,
    )
    cpu = torch.device("cpu")
    curve = fit_heads(
        dual,
        [source],
        [cache],
        images,
        config,
        LossConfig(),
        train,
        device=cpu,
        **more,
    )
    return {
        "loss": curve[-1]["loss"],
        "steps": [line["step"] for line in curve],
        "heads": {
            name: value.detach().clone() for name, value in head_parameters(dual)
        },
        "tower untouched": all(
            torch.equal(tower[name], value)
            for name, value in dual.tower.state_dict().items()
        ),
        "gradients": [
            name for name, p in dual.named_parameters() if p.grad is not None
        ],
        "training": dual.training,
    }


def test_heads_learn_on_frozen_features_and_leave_nothing_behind(tiny: Path):
    short = fit(0, 1, str(tiny), 1)
    long = fit(0, 1, str(tiny), 40)
    assert long["loss"] < 0.7 * short["loss"]
    assert math.isfinite(long["loss"])
    assert short["steps"] == [1]
    assert fit(0, 1, str(tiny), 5, logging_steps=2)["steps"] == [2, 4, 5]
    assert long["tower untouched"]
    assert long["gradients"] == []
    assert long["training"]
    assert float(
        fit(0, 1, str(tiny), 1, scale=9.0)["heads"]["logit_scale"]
    ) == pytest.approx(math.log(100))


def test_heads_decay_matrices_and_no_vectors(tiny: Path):
    """A decay of 20 takes a fifth of a weight each step; the steps themselves move it by .01."""
    plain, decayed = (
        fit(0, 1, str(tiny), 5, decay=decay)["heads"] for decay in (0.0, 20.0)
    )
    for name, value in plain.items():
        if value.numel() > max(value.shape):
            assert decayed[name].norm() < 0.6 * value.norm(), name
        else:
            assert (decayed[name] - value).abs().max() < 0.15, name
    assert any(
        value.numel() == max(value.shape) and value.abs().max() > 0.8
        for value in plain.values()
    )


def test_a_tower_without_a_logit_scale_starts_at_its_familys_and_says_so(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """As in the authors' code, which reads the scale (100) of OpenAI's image-text model."""

    def start(folder: Path, **fields: Any) -> float:
        config = TowerConfig(path=str(folder))
        return float(
            build_dual(
                config, dataclasses.replace(DUAL, **fields), seed=0
            ).scale.detach()
        )

    expected = 100.0 if "clip" in tiny.name else 1 / 0.07
    folder = tmp_path / "vision-only"
    folder.symlink_to(tiny / "tower")
    assert start(folder) == pytest.approx(expected)
    note = f"{folder} has no logit scale; training starts at {expected:.4g}, the default of"
    assert note in capsys.readouterr().err
    assert start(folder, logit_scale_init=1.0) == pytest.approx(math.e)
    whole = tmp_path / "whole"
    of_clip = save_tiny_clip(whole, "clip").logit_scale.detach().exp().clamp(max=100)
    assert start(whole) == pytest.approx(float(of_clip))
    assert "no logit scale" not in capsys.readouterr().err


def fit_with_a_nan(rank: int, world: int, folder: str, allowed: int) -> dict[str, Any]:
    """The first phase with a row of the cache that is NaN; its result, or its error."""
    read_rows = EmbeddingCache.rows

    def damaged_rows(cache: EmbeddingCache, *where: Any, key: str) -> Any:
        rows = read_rows(cache, *where, key=key)
        if key == "1-005":
            rows[-1, 3] = math.nan
        return rows

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(EmbeddingCache, "rows", damaged_rows)
        try:
            return fit(rank, world, folder, 5, skip_non_finite=allowed)
        except NonFiniteLossError as error:
            return {"error": str(error), "status": error.status}


def test_a_nan_in_the_cache_is_named_before_the_heads_are_fitted(
    tiny: Path, caplog: pytest.LogCaptureFixture
):
    refused = run_ranks(fit_with_a_nan, 2, str(tiny), 0)
    for result in (*refused, fit_with_a_nan(0, 1, str(tiny), 0)):
        assert (
            "1 sample has non-finite features or embeddings: 1-005. The"
            in result["error"]
        )
        assert result["status"] == 3
    without = fit_with_a_nan(0, 1, str(tiny), 1)
    assert "without 1 of at most 1" in caplog.text
    assert math.isfinite(without["loss"])
    for name, value in without["heads"].items():
        assert value.isfinite().all(), name


def test_heads_do_not_depend_on_the_ranks(tiny: Path):
    alone = fit(0, 1, str(tiny), 3)
    ranks = run_ranks(fit, 2, str(tiny), 3)
    processes = fit(0, 1, str(tiny), 3, workers=2)["heads"]
    for name, value in alone["heads"].items():
        assert torch.equal(processes[name], value), name
        torch.testing.assert_close(ranks[0]["heads"][name], value, atol=1e-5, rtol=1e-5)
        assert torch.equal(ranks[1]["heads"][name], ranks[0]["heads"][name])


def test_heads_in_bf16_keep_fp32_weights_and_learn_the_same(tiny: Path):
    exact = fit(0, 1, str(tiny), 40)
    half = fit(0, 1, str(tiny), 40, bf16=True)
    assert half["loss"] != exact["loss"]
    assert half["loss"] == pytest.approx(exact["loss"], rel=0.1)
    assert {value.dtype for value in half["heads"].values()} == {torch.float32}
    assert half["tower untouched"]


def test_a_stopped_fit_goes_on_to_the_same_heads_on_the_same_data(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = fit(0, 1, str(tiny), 5)
    unfinished = tmp_path / "unfinished"
    stop = StopRequest()
    batches = heads.image_batches
    calls = []

    def stopped_at_2(*given: Any) -> Any:
        for batch in batches(*given):
            calls.append(1)
            if len(calls) == 2:
                stop.signals.append(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(heads, "image_batches", stopped_at_2)
    # as written on a GPU
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    data = {"captions": "1234"}
    with pytest.raises(StoppedError, match="step 2 of 5"):
        fit(0, 1, str(tiny), 5, stop=stop, unfinished=unfinished, learned_from=data)
    resumed = fit(0, 1, str(tiny), 5, unfinished=unfinished, learned_from=data)
    assert len(calls) == 5
    for name, value in whole["heads"].items():
        torch.testing.assert_close(resumed["heads"][name], value, atol=1e-6, rtol=1e-5)
    other_data = {"captions": "5678"}
    fit(0, 1, str(tiny), 5, unfinished=unfinished, learned_from=other_data)
    assert len(calls) == 10, "continued on other data"


def test_heads_draw_captions_by_their_shares():
    """Three images with one, three and two captions; the second one's last has half of its
    chance."""
    shares = torch.tensor([1.0, 0.25, 0.25, 0.5, 0.5, 0.5], dtype=torch.float64)
    nothing = {
        "pooled_IP": torch.empty(3, 1),
        "embedding_MW": torch.empty(6, 1),
        "caption_hashes_M": torch.arange(6),
    }
    features = FrozenFeatures(
        count_I=torch.tensor([1, 3, 2]), share_M=shares, **nothing
    )
    chosen = torch.tensor([0, 1, 1, 1, 1, 2, 2, 0, 2])
    draws = torch.tensor([0.99, 0.0, 0.3, 0.5, 0.99, 0.49, 0.51, 0.0, 1.0])
    assert heads._draw_captions(features, chosen, draws).tolist() == [
        0,
        1,
        2,
        3,
        3,
        4,
        5,
        0,
        5,
    ]


PLAIN = DualConfig(projection_dim=8, llm_width=24, pool="mean")


@pytest.fixture
def tower(tmp_path):
    return str(make_tower(tmp_path / "tower"))


def test_keep_heads_trains_the_heads_of_the_directory(tower, tmp_path):
    first = build_dual(TowerConfig(path=tower), PLAIN, seed=1)
    export_tower(first, tmp_path / "trained", origin="x")
    again = build_dual(
        TowerConfig(path=str(tmp_path / "trained"), keep_heads=True), PLAIN, seed=2
    )
    fresh = build_dual(TowerConfig(path=str(tmp_path / "trained")), PLAIN, seed=2)
    kept = heads_state(first)
    assert all(
        torch.equal(value, kept[name]) for name, value in heads_state(again).items()
    )
    assert not torch.equal(
        fresh.visual_projection.weight, first.visual_projection.weight
    )
    narrow = dataclasses.replace(PLAIN, projection_dim=6)
    with pytest.raises(ValueError, match="projection_dim 8"):
        build_dual(
            TowerConfig(path=str(tmp_path / "trained"), keep_heads=True), narrow, seed=2
        )


def test_lora_trains_low_rank_updates_and_the_heads(tower):
    model = build_dual(TowerConfig(path=tower, lora_rank=4), PLAIN, seed=1)
    names = trainable_names(model)
    assert any(".lora_B." in name for name in names)
    assert all(".lora_" in name for name in names if name.startswith("tower."))
    assert {name.split(".")[0] for name in names} == {
        "tower",
        "visual_projection",
        "text_adapter",
        "logit_scale",
    }
    rates = {
        trained.name: trained.lr
        for trained in trained_parameters(model, OptimConfig(lr=1.0, layer_decay=0.5))
    }
    blocks = len(tower_blocks(model.tower))
    assert {rate for name, rate in rates.items() if ".lora_" in name} == {
        0.5**depth for depth in range(1, blocks + 1)
    }
    with pytest.raises(ValueError, match="lora_rank"):
        TowerConfig(path=tower, lora_rank=4, freeze=True)


def first_scale(tower: TowerConfig, dual: DualConfig = PLAIN) -> float:
    return build_dual(tower, dual, seed=1).logit_scale.item()


@pytest.mark.parametrize(
    "source", ["whole", "sharded", "siglip", "imported", "trained"]
)
def test_the_pretrained_logit_scale_stays(source, tmp_path):
    """As in the authors' code, whichever file it is in; a set value takes precedence."""
    model = save_tiny_clip(
        tmp_path / "clip", "siglip" if source == "siglip" else "clip"
    )
    path = tmp_path / "clip"
    model.logit_scale.data.fill_(4.25)
    model.save_pretrained(path, max_shard_size="20KB" if source == "sharded" else "1GB")
    if source == "sharded":
        (path / "model.safetensors").unlink()
    if source == "imported":
        card, _ = import_tower(path, path := tmp_path / "tower")
        assert card.dual["logit_scale_init"] == 4.25
    if source == "trained":
        dual = build_dual(TowerConfig(path=str(path)), PLAIN, seed=1)
        export_tower(dual, path := tmp_path / "tower", origin="x")
    tower = TowerConfig(path=str(path))
    assert first_scale(tower) == 4.25
    assert first_scale(tower, dataclasses.replace(PLAIN, logit_scale_init=3.0)) == 3.0
    resized = dataclasses.replace(tower, image_size=24)
    assert first_scale(resized) == 4.25
    scratch = TowerConfig(architecture=str(path), from_scratch=True)
    assert first_scale(scratch) == pytest.approx(math.log(1 / 0.07))


SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 140,
    "patch_size": 14,
}


def small_tower(device: str):
    """A small tower with hidden layers four times as wide."""
    with torch.device(device):
        model = CLIPVisionModel(
            CLIPVisionConfig(**SIZES, intermediate_size=4 * 128)
        ).train()
        use_quick_gelu(model)
        return model


def activations(model: torch.nn.Module) -> int:
    """Of a tower on the meta device; expected, not measured."""
    return activation_bytes(
        model,
        lambda: [torch.empty(12, 3, 140, 140)],
        lambda pixels: model(pixel_values=pixels).pooler_output.square().mean(),
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_expected_activations_are_near_measured_peaks(checkpointing: bool):
    """Memory of a forward and backward pass of 12 images, without the gradients themselves."""
    model = small_tower("cpu")
    expected = small_tower("meta")
    pixels = torch.randn(12, 3, 140, 140)
    if checkpointing:
        enable_gradient_checkpointing(model)
        enable_gradient_checkpointing(expected)

    def step(images: torch.Tensor) -> None:
        model(pixel_values=images).pooler_output.square().mean().backward()

    step(pixels[:1])
    assert 0.9 < peak_bytes(lambda: step(pixels)) / activations(expected) < 1.1
