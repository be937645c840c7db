"""scripts/nano/llm2clip.py has the package's losses in both stages, from the same
weights and batches."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import context
from tiny_data import make_all
from tiny_llm import save_tiny_llm

ROOT = Path(__file__).parents[2]
EMOJI = ROOT / "llm2clip_plugin" / "data" / "emoji"
STEPS = 20


def nano() -> Any:
    """The file as a module."""
    spec = importlib.util.spec_from_file_location(
        "nano", ROOT / "scripts" / "nano" / "llm2clip.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(words: list[str], file: Path) -> None:
    """Run a command of the package, and save the weights before its first step, its batches, noise
    and losses."""
    from llm2clip_plugin import cli
    from llm2clip_plugin.train.step import ContrastiveStep, TowerStep

    steps: list[dict[str, Any]] = []
    weights: dict[str, torch.Tensor] = {}
    plain_step = ContrastiveStep.__call__
    plain_noise = TowerStep._noise

    def step(self: Any, batch: Any, flags: Any = None) -> Any:
        if not weights:
            weights.update(
                {
                    n: value.detach().clone()
                    for n, value in self.engine.module.state_dict().items()
                }
            )
        steps.append({"pairs": [(p.query, p.positive) for p in batch.get("pairs", ())]})
        steps[-1] |= {
            "hashes": batch["caption_hashes"],
            "images": batch["image_ids"].tolist(),
        }
        if "pixels" in batch:
            steps[-1] |= {
                "pixels": self.normalize(batch["pixels"]),
                "embeddings": batch["embeddings"],
            }
        loss, values = plain_step(self, batch, flags)
        steps[-1]["loss"] = loss
        return loss, values

    def noise(self: Any, micro: Any) -> torch.Tensor:
        steps[-1]["noise"] = plain_noise(self, micro)
        return steps[-1]["noise"]

    # type: ignore[method-assign]
    ContrastiveStep.__call__ = step
    TowerStep._noise = noise
    assert cli.main(words) == 0
    torch.save((weights, steps), file)


def recorded(
    words: list[str], file: Path
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """What ``record`` saves, in a process of its own: DeepSpeed's process group stays in it."""
    process = context().Process(target=record, args=(words, file))
    process.start()
    process.join()
    assert process.exitcode == 0
    weights, steps = torch.load(file, weights_only=False)
    assert len(steps) == STEPS
    return weights, steps


def test_stage_1_has_the_losses_of_finetune_llm(tmp_path: Path) -> None:
    llm = save_tiny_llm(tmp_path / "llm", "gemma3")
    words = [
        "finetune-llm",
        str(EMOJI / "validation-noto.tar"),
        "--llm",
        str(llm),
        "--output",
        str(tmp_path / "run"),
    ]
    words += [
        "--languages",
        "en",
        "--group",
        "family",
        "--pair-kinds",
        "short:keywords",
        "--lists",
        "keywords=2:6",
    ]
    words += [
        "--attention",
        "causal",
        "--pooling",
        "last",
        "--dropout",
        "0",
        "--scale",
        "20",
        "--lr",
        "1e-3",
    ]
    words += [
        "--chat-template",
        'This sentence: "{caption}" means in one word: "',
        "--warmup-steps",
        "0",
    ]
    words += [
        "--compute-dtype",
        "float32",
        "--warmup-ratio",
        "0.1",
        "--global-batch",
        "16",
        "--max-steps",
        str(STEPS),
    ]
    weights, steps = recorded(words, tmp_path / "recorded.pt")

    module = nano()
    teacher = module.Teacher(str(llm))
    optimizer = module.caption_optimizer(teacher.add_lora())
    with torch.no_grad():
        for name, parameter in teacher.llm.named_parameters():
            if name.endswith((".a", ".b")):
                kind = "lora_A" if name.endswith(".a") else "lora_B"
                (theirs,) = [key for key in weights if f"{name[:-2]}.{kind}." in key]
                parameter.copy_(weights[theirs])
    for number, step in enumerate(steps):
        factor = module.rate(number, STEPS, warmup=2)
        loss = module.caption_step(
            teacher, optimizer, step["pairs"], step["images"], factor
        )
        assert loss == pytest.approx(step["loss"], abs=1e-5)
    assert abs(steps[-1]["loss"] - steps[0]["loss"]) > 0.1  # the updates matter


def test_stage_2_has_the_losses_of_train_tower(tmp_path: Path) -> None:
    tiny = make_all(tmp_path / "tiny", "dinov2")
    words = [
        "train-tower",
        "--recipe",
        "quickstart",
        "--tower",
        str(tiny / "tower"),
        "--image-size",
        "16",
    ]
    words += [
        "--data",
        str(tiny / "data"),
        "--output",
        str(tmp_path / "run"),
        "--max-steps",
        str(STEPS),
    ]
    words += ["--global-batch", "16", "--heads.steps", "5", "--evaluation.group="]
    weights, steps = recorded(words, tmp_path / "recorded.pt")

    module = nano()
    model = module.DualEncoder(str(tiny / "tower"), steps[0]["embeddings"].shape[1])
    model.load_state_dict(
        {name.removeprefix("text_adapter."): value for name, value in weights.items()}
    )
    model.train()
    optimizer = module.tower_optimizer(model)
    for number, step in enumerate(steps):
        image_BP = model.pool(step["pixels"])
        factor = module.rate(number, STEPS, warmup=3)
        embedding_BW = step["embeddings"].float()
        noise_BW = step["noise"]
        texts = step["hashes"].flatten().tolist()
        images = step["images"]
        loss = module.tower_step(
            model, optimizer, image_BP, embedding_BW, noise_BW, texts, images, factor
        )
        assert loss == pytest.approx(step["loss"], abs=1e-5)
    assert abs(steps[-1]["loss"] - steps[0]["loss"]) > 0.1
