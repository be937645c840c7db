"""``--dry-run``: full-size recipes planned without weights, data or network; numbers against the
paper's."""

import re
from pathlib import Path

import pytest
import torch
from tiny_data import make_tower

from llm2clip_plugin.stages.settings import TEACHERS
from llm2clip_plugin.stages.tower_config import RECIPES, recipe
from llm2clip_plugin.stages.training import main_tower
from llm2clip_plugin.train.config import OptimConfig, TowerConfig
from llm2clip_plugin.train.model import build_dual, shape_dual, trained_parameters
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.towers import new_tower

# methods that came after the paper's
AFTER = [name for name in RECIPES if name.startswith(("proclip", "lift"))]
PAPER = [name for name in RECIPES if name not in ("base", "quickstart", *AFTER)]
PARAMETERS = {  # published: the Hub's model pages and EVA-CLIP's table 8, in millions
    "openai/clip-vit-base-patch16": 85.8,
    "openai/clip-vit-large-patch14": 303.18,
    "openai/clip-vit-large-patch14-336": 303.51,
    "eva02-l14-336": 304,
    "eva02-bige14": 4350,
    "eva01-g14": 1011,
    "google/siglip-so400m-patch14-384": 428.2,
    "facebook/dinov2-small": 22.06,
    "facebook/dinov2-giant": 1136.5,
}


pytestmark = pytest.mark.usefixtures("no_network")


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main_tower([*argv, "--dry-run"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_of_known_towers_have_the_published_number_of_parameters(name: str):
    tower = new_tower(name, device="meta")
    assert {p.device.type for p in tower.parameters()} == {"meta"}
    assert sum(p.numel() for p in tower.parameters()) / 1e6 == pytest.approx(
        PARAMETERS[name], rel=2e-3
    )


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("name", PAPER)
def test_recipes_have_the_papers_settings(name: str, teacher: str):
    config = recipe(f"{name.replace('_', '-')}/{teacher}")
    optim = config.optim
    train = config.train
    assert optim.lr == 1e-5
    assert optim.weight_decay == 0.05
    assert optim.max_grad_norm == 5.0
    layer_decay = 1.0 if "siglip2" in name else 0.85
    assert optim.layer_decay == layer_decay
    assert optim.betas == (0.9, 0.999)
    assert optim.eps == 1e-8
    assert optim.warmup_steps == 0
    assert optim.warmup_ratio == 0.0
    assert optim.head_lr == 0.0
    assert train.global_batch == 4096
    assert train.num_train_epochs == 4.0
    assert train.precision == "bf16"
    assert config.dual.llm_width == {"llama-1b": 2048, "llama-8b": 4096}[teacher]
    assert config.dual.adapter == "mlp"
    assert config.dual.adapter_blocks == 4
    assert config.dual.adapter_expansion == 2
    start = (
        config.dual.projection_dim,
        config.dual.projection,
        config.dual.projection_bias,
    )
    assert start == (
        (1152, "none", False)
        if "siglip2" in name
        else (1280, "linear", name.startswith("eva02"))
    )
    assert config.dual.projection_init_std == (
        2e-5 if name.startswith("eva02") else None
    )
    assert config.dual.logit_scale_init == (
        pytest.approx(2.6593, abs=1e-4) if "siglip2" in name else None
    )
    assert config.output_dir.endswith(teacher)


@pytest.mark.parametrize("name", PAPER)
def test_full_size_recipes_are_planned_without_weights(
    name: str, capsys: pytest.CaptureFixture[str]
):
    output = planned(capsys, "--recipe", f"{name}/llama-8b")
    # 4 x 15 M / 4096
    assert "steps: 14648 of 4096 pairs, 4.00 epochs of 15,000,000 samples" in output
    rows = [
        row.split()
        for row in re.findall(r"^ +(?:1|8|64) +\d+ .*$", output, re.MULTILINE)
    ]
    trained = int(
        re.search(r"trainable parameters: ([\d,]+);", output)[1].replace(",", "")
    )
    if name == "openai_l14_336":
        # the release's own sum: golden/reference/F_release_directory/evidence.json
        assert trained == 578_587_905
        # 1e-5 x 0.85^25: embeddings, 24 blocks, top
        assert "peak learning rates 1.72e-07 to 1e-05 (26 rates)" in output
        assert [row[-1] for row in rows] == ["on", "on", "off"]
        assert "sent about 13 times during the backward pass; ZeRO-1" in output
    for _, share, micro, *stages in rows:
        assert int(share) % int(micro) == 0
        assert float(stages[1]) <= 72  # nine tenths of 80 GiB
        # bf16 under stage 0 runs as stage 1
        assert float(stages[0]) == float(stages[1]) >= float(stages[2])
    # the states of 4.3 G parameters don't fit one GPU
    assert len(rows) == (2 if "bige" in name else 3)


def test_gradient_checkpointing_is_off_where_the_step_fits(
    capsys: pytest.CaptureFixture[str],
):
    said = {}
    needed = {}
    for gib, given in ((80, "auto"), (16, "auto"), (16, "false"), (80, "true")):
        words = (
            "--recipe",
            "openai_b16",
            "--global-batch",
            "256",
            "--gradient-checkpointing",
            given,
        )
        output = planned(capsys, *words, "--micro-batch", "256", "--gpu-gib", str(gib))
        row = next(
            row.split() for row in output.splitlines() if row.startswith("     1 ")
        )
        # on 64 GPUs that of 256 is the rank's 4 images
        assert "no micro-batch" not in output
        # checkpointing, ZeRO-1
        said[gib, given] = row[7:]
        needed[gib, given] = float(row[4])
    assert said == {
        (80, "auto"): ["off"],
        (16, "auto"): ["on"],
        (16, "false"): [],
        (80, "true"): [],
    }
    assert (
        needed[80, "auto"]
        == needed[16, "false"]
        > 0.9 * 16
        > needed[16, "auto"]
        == needed[80, "true"]
    )


def described(model: torch.nn.Module) -> list[tuple]:
    """What is trained: name, shape, rate and decay."""
    trained = trained_parameters(model, OptimConfig())
    return [(p.name, tuple(p.parameter.shape), p.lr, p.decay) for p in trained]


@pytest.mark.parametrize(
    "options", [{}, {"lora_rank": 2}, {"freeze_first_blocks": 1}, {"image_size": 24}]
)
def test_a_shape_trains_what_the_tower_trains(options: dict, tmp_path: Path):
    config = TowerConfig(path=str(make_tower(tmp_path / "tower")), **options)
    dual = DualConfig(projection_dim=8, llm_width=12)
    real = build_dual(config, dual, seed=0)
    shape = shape_dual(config, dual)
    assert described(real) == described(shape)
    assert {p.device for p in shape.parameters()} == {torch.device("meta")}
