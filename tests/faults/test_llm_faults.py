"""Faults of stage 1: refused before the first step, where possible before the LLM is loaded."""

import pytest
from planted_faults import Fault, World, meet, rows, set_weight
from tiny_llm import save_tiny_llm


def nan(world: World) -> None:
    set_weight(world.path("llm/model.safetensors"), "down_proj", float("nan"))


@rows(
    Fault(
        "batch larger than the data",
        "--global-batch 64",
        "--global-batch 64 ...{w}/data (48 samples)...lower --global-batch",
    ),
    Fault(
        "batch of other micro-batches",
        "--micro-batch 3",
        "...micro_batch 3; try --global-batch 6",
    ),
    Fault(
        "NaN in a weight of the LLM", "--compute-dtype float32", "{w}/llm is ...", nan
    ),
)
def test_refused_before_step_1(
    fault: Fault, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_llm(world.path("llm"), "llama")
    words = [
        "finetune-llm",
        f"{world.folder}/data",
        "--llm",
        f"{world.folder}/llm",
        "--output",
        f"{world.folder}/new",
    ]
    words += [
        "--global-batch",
        "8",
        "--max-steps",
        "2",
        "--warmup-steps",
        "0",
        "--r",
        "4",
    ]
    meet(
        fault,
        world,
        [*words, *fault.words.replace("{w}", str(world.folder)).split()],
        capsys,
    )
    assert not list(world.folder.glob("new/checkpoints/step-*"))
    assert not world.path("new/metrics.jsonl").exists()
