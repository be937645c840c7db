"""``finetune-llm --dry-run``: numbers against the published ones and against a real step's peak."""

import contextlib
import dataclasses
import functools
import io
import re
from pathlib import Path

import pytest
import torch
from tensor_memory import peak_bytes
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

from llm2clip_plugin.cli import run
from llm2clip_plugin.plan.llm import llm_memory, shape_llm
from llm2clip_plugin.stages.llm_config import LLM_RECIPES, FinetuneConfig
from llm2clip_plugin.text.config import ContrastConfig, EncoderConfig
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.finetune import trained_module
from llm2clip_plugin.text.llm import llm_config
from llm2clip_plugin.text.pair_module import equal_parts

# published, less the 8B's head of 128,256 x 4096 (the 1B's is its table of embeddings)
PARAMETERS = {
    "llama-1b": 1_235_814_400,
    "llama-8b": 8_030_261_248 - 128_256 * 4096,
}
# what PEFT prints for r 16 on all linear layers
TRAINED = {"llama-1b": 11_272_192, "llama-8b": 41_943_040}


@functools.cache
def planned(*argv: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run("finetune-llm", [*argv, "--dry-run"]) == 0
    return out.getvalue()


def rows_of(output: str) -> list[list[float]]:
    """Both tables' rows: GPUs, share, micro-batch, GiB by stage."""
    rows = re.findall(r"^ +(?:1|8|64) +\d+ .*$", output, re.MULTILINE)
    return [list(map(float, row.split())) for row in rows]


@pytest.mark.parametrize("name", [name for name in LLM_RECIPES if name != "paper"])
def test_the_papers_llms_are_planned_without_anything(name: str, no_network):
    output = planned("--recipe", name)
    llm = name.removeprefix("paper-")
    assert f"pairs of {2 if name == llm else 3} texts" in output
    assert (output.count("McGill-NLP/LLM2Vec-") == 2) is (name == "paper-llama-8b")
    assert f"{PARAMETERS[llm]:,} parameters without a head" in output
    assert f"trainable parameters: {TRAINED[llm]:,};" in output
    assert f"{PARAMETERS[llm] * 2 / 2**30:.2f} GiB in bfloat16" in output
    assert "assumed: 15,000,000 pairs" in output
    assert "steps: 29297 of 512 pairs" in output  # 15 M / 512
    rows = rows_of(output)
    assert [row[0] for row in rows] == [1, 8, 64, 1, 8, 64]
    for _, share, micro, zero0, zero1, zero2, zero3 in rows:
        assert share % micro == 0
        assert zero1 <= 72  # nine tenths of 80 GiB
        assert zero0 > PARAMETERS[llm] * 2 / 2**30
        assert zero2 <= zero1
        assert share == 512 or zero3 < zero1
    assert all(
        usual[2] >= longest[2]
        for usual, longest in zip(rows[:3], rows[3:], strict=True)
    )


@pytest.fixture(scope="module")
def four_blocks(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four blocks, whose activations are most of what a step takes."""
    folder = tmp_path_factory.mktemp("llm") / "llama"
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 448,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    LlamaModel(
        LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=400)
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


TEXTS = TOKENS = 64


def inputs() -> list[torch.Tensor]:
    """Random texts of one length, one of them a token shorter for a mask: four tensors for each of
    a step's groups."""
    tensors: list[torch.Tensor] = []
    for part in equal_parts(range(TEXTS), ContrastConfig().length_groups):
        attended = torch.ones(len(part), TOKENS, dtype=torch.int64)
        attended[-1, -1] = 0
        positions = torch.arange(TOKENS).expand(len(part), TOKENS)
        tensors += [
            torch.randint(5, 300, (len(part), TOKENS)),
            attended,
            positions,
            attended.bool(),
        ]
    return tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_expected_activations_are_near_a_real_steps_peak(
    four_blocks: Path, dtype: str, checkpointing: bool
):
    config = FinetuneConfig(
        encoder=EncoderConfig(llm=str(four_blocks), compute_dtype=dtype)
    )
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, gradient_checkpointing=checkpointing),
    )
    encoder = CaptionEncoder(config.encoder, "cpu", trainable_adapter=True)
    module = trained_module(encoder, config.lora, config.contrast, config.train)
    texts = inputs()

    def step() -> None:
        features, scale = module(*texts)
        logits = scale.exp() * features[::2] @ features[1::2].T
        torch.nn.functional.cross_entropy(logits, torch.arange(TEXTS // 2)).backward()

    step()  # makes the gradients themselves
    settings = llm_config(config.encoder)
    shape = shape_llm(settings, config.encoder, config.lora, config.train.precision)
    sections = (
        config.encoder,
        config.lora,
        config.contrast,
        config.optim,
        config.train,
    )
    memory = llm_memory(shape, settings, *sections, texts=2, tokens=TOKENS)
    assert 0.85 < peak_bytes(step) / (TEXTS / 2 * memory.pair_bytes) < 1.15


def test_rows_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    row = (
        '{"caption": "a boat", "long_caption": "a boat on a lake", "image": "x.jpg"}\n'
    )
    training = tmp_path / "train.jsonl"
    training.write_text(row * 8 + '{"cut\n' * 2)
    validation = tmp_path / "validation.jsonl"
    validation.write_text(row * 2 + '{"cut')
    output = planned(
        str(training),
        "--recipe",
        "llama-1b",
        "--validation",
        str(validation),
        "--global-batch",
        "4",
    )
    unread = (
        "of the first 10 samples, 2 samples can't be read, the first: sample 'line 9'"
    )
    assert f"{training}: {unread}" in output
    assert "left out: sample 'line 3' of shard 'validation': is not valid" in output
