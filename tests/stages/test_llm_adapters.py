"""Adapters of stage 1: what a run writes is what was trained; starts from others, 4-bit weights."""

import json
from pathlib import Path

import pytest
import torch
from llm_runs import (
    SAME,
    losses,
    options,
    tuned,
)
from text_helpers import moved, write_moved

from llm2clip_plugin.cli import main
from llm2clip_plugin.contracts import EncoderCard, RunRecord
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.stages.llm import finetune_llm
from llm2clip_plugin.stages.llm_config import FINETUNE_LLM, FinetuneConfig
from llm2clip_plugin.text.config import EncoderConfig, LoraSettings
from llm2clip_plugin.text.encoder import CaptionEncoder


def test_checkpoint_holds_the_adapter_alone_and_other_settings_are_refused(
    plain: Path, captions: Path, llama: Path
) -> None:
    (checkpoint,) = (plain / "checkpoints").glob("step-*")
    assert (checkpoint / "model.safetensors").stat().st_size < 100_000
    with pytest.raises(
        ValueError, match=r"optim\.lr: 0\.003 in the checkpoint, 0\.001 in this run"
    ):
        tuned(captions, llama, plain, "--lr", "1e-3")


TEXTS = [
    "a red bicycle",
    "two sleeping dogs near the brick wall of an old house in rain " * 2,
    "x",
    "猫",
]


@pytest.mark.parametrize("layer", [-1, 1])
def test_a_reloaded_adapter_has_the_trained_weights_and_settings(
    any_llm: Path, tmp_path: Path, layer: int
) -> None:
    """Reloaded in float32 it is merged, so this also says that merged weights give the adapter's
    embeddings."""
    settings = {
        "pooling": "last",
        "attention": "causal",
        "layer": layer,
        "chat_template": "user",
        "max_tokens": 48,
    }
    trained, folder = write_moved(any_llm, tmp_path / "adapter", **settings)
    reloaded = CaptionEncoder(
        EncoderConfig(llm=str(any_llm), adapter=str(folder), compute_dtype="float32"),
        "cpu",
    )
    assert reloaded.config.chat_template == "<bos><user>\n{caption}<end>"
    assert {
        name: vars(reloaded.config)[name]
        for name in settings
        if name != "chat_template"
    } == {name: value for name, value in settings.items() if name != "chat_template"}
    left = reloaded.encode(TEXTS)
    right = trained.encode(TEXTS)
    assert torch.allclose(left, right, atol=2e-5 * float(right.norm(dim=1).max()))
    raw = CaptionEncoder(
        EncoderConfig(llm=str(any_llm), compute_dtype="float32", **settings), "cpu"
    )
    assert not torch.allclose(raw.encode(TEXTS), right, atol=1e-2)
    assert raw.identity().fingerprint != reloaded.identity().fingerprint
    with pytest.raises(
        ContractError, match=r"max_tokens is 32, but .* was trained with 48"
    ):
        CaptionEncoder(
            EncoderConfig(llm=str(any_llm), adapter=str(folder), max_tokens=32), "cpu"
        )


def with_adapter(
    llm: Path, load_in_4bit: bool
) -> tuple[CaptionEncoder, torch.nn.Module]:
    encoding = EncoderConfig(
        llm=str(llm), compute_dtype="float32", load_in_4bit=load_in_4bit
    )
    encoder = CaptionEncoder(encoding, "cpu", trainable_adapter=True)
    return encoder, moved(encoder, FinetuneConfig(encoder=encoding))


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["float32", "4-bit"])
def test_embedding_is_its_own_after_lora(llama40: Path, load_in_4bit: bool) -> None:
    """Width 40: bitsandbytes' packed CPU kernel refuses it in evaluation mode."""
    encoder, _ = with_adapter(llama40, load_in_4bit)
    rows = encoder.tokenize(TEXTS)
    alone = torch.cat([encoder.embed_tokens([row]) for row in rows])
    assert (
        (encoder.embed_tokens(rows) - alone).norm(dim=1) < 1e-5 * alone.norm(dim=1)
    ).all()
    assert (encoder.identity().quantization == "nf4") is load_in_4bit


@pytest.fixture(scope="session")
def llama40(make_llm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llm(tmp_path_factory.mktemp("llm") / "llama40", "llama", width=40)


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["float32", "4-bit"])
def test_gradients_reach_the_adapter_alone(llama40: Path, load_in_4bit: bool) -> None:
    encoder, module = with_adapter(llama40, load_in_4bit)
    module.train()
    names = {
        name for name, parameter in module.named_parameters() if parameter.requires_grad
    }
    layers = [f"self_attn.{name}_proj" for name in "qkvo"] + [
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    weights_of_lora = [
        f"{block}.{layer}.lora_{side}"
        for block in (0, 1)
        for layer in layers
        for side in "AB"
    ]
    assert names == {
        f"model.llm.base_model.model.layers.{weight}.default.weight"
        for weight in weights_of_lora
    }
    tokens = torch.tensor(encoder.tokenize(["two dogs"]))
    ones = torch.ones_like(tokens)
    embeddings, _ = module(
        tokens, ones, torch.arange(tokens.shape[1])[None], ones.bool()
    )
    embeddings.pow(3).sum().backward()
    assert {
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    } == names
    assert all(
        float(parameter.grad.abs().sum()) > 0
        for name, parameter in module.named_parameters()
        if name in names
    )


def test_qlora_on_a_cpu_end_to_end(
    captions: Path, llama40: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    more = (
        "--load-in-4bit",
        "--gradient-checkpointing",
        "--captions",
        str(captions),
        "--lr",
        "1e-2",
    )
    adapter = tuned(captions, llama40, output, *more)
    assert losses(output)[-1] < losses(output)[0] - 0.2
    assert (
        EncoderCard.read(adapter / EncoderCard.FILE).training["quantization"] == "nf4"
    )
    scores = RunRecord.read(output / "run.json").metrics
    command = [
        "evaluate",
        "captions",
        str(captions),
        "--llm",
        str(llama40),
        "--adapter",
        str(adapter),
    ]
    assert (
        main(
            [
                *command,
                "--load-in-4bit",
                "--compute-dtype",
                "float32",
                "--json",
                str(tmp_path / "s.json"),
            ]
        )
        == 0
    )
    evaluated = json.loads((tmp_path / "s.json").read_text())
    assert evaluated["metrics"]["short->long/cra"] == pytest.approx(
        scores["short->long"], abs=1e-6
    )
    # of 45, those with equal texts once
    assert len(evaluated["items"]) == evaluated["counts"]["short->long"] == 30


def test_training_continues_from_an_adapter(
    plain: Path, captions: Path, llama: Path, tmp_path: Path
) -> None:
    arguments = options(captions, llama, tmp_path)
    words = arguments.index("--query-prompt")
    finetune_llm(
        FINETUNE_LLM.parse(
            [
                *arguments[:words],
                *arguments[words + 2 :],
                "--adapter",
                str(plain / "adapter"),
            ]
        )
    )
    assert losses(tmp_path)[0] < losses(plain)[0] - 0.1
    assert EncoderCard.read(
        tmp_path / "adapter" / EncoderCard.FILE
    ).query_prompt.startswith("Instruct")


def test_start_adapters_are_merged_and_written_with_the_new_one(
    captions: Path, llama: Path, tmp_path: Path
) -> None:
    """As export-llm twice, then training on the merged LLM; the adapter that is written fits the
    LLM itself."""
    few = LoraSettings(r=2, alpha=3, targets=("q_proj", "v_proj"), rslora=True)
    _, first = write_moved(llama, tmp_path / "first")
    _, second = write_moved(llama, tmp_path / "second", lora=few, seed=1)
    for folder in (first, second):
        (folder / EncoderCard.FILE).unlink()  # as LLM2Vec's
    llm = llama
    for number, adapter in enumerate((first, second)):
        merged = tmp_path / f"merged-{number}"
        assert (
            main(
                [
                    "export-llm",
                    "--llm",
                    str(llm),
                    "--adapter",
                    str(adapter),
                    "--output",
                    str(merged),
                ]
            )
            == 0
        )
        (merged / EncoderCard.FILE).unlink()
        llm = merged
    by_hand = tuned(captions, llm, tmp_path / "by hand")
    started = ("--start-adapters", str(first), str(second))
    adapter = tuned(captions, llama, tmp_path / "run", *started)
    assert losses(tmp_path / "run") == pytest.approx(
        losses(tmp_path / "by hand"), abs=SAME
    )
    pairs = ((llama, adapter), (llm, by_hand), (llama, first))
    embeddings, expected, other = (
        CaptionEncoder(
            EncoderConfig(
                llm=str(path), adapter=str(adapter_path), compute_dtype="float32"
            ),
            "cpu",
        ).encode(TEXTS)
        for path, adapter_path in pairs
    )
    assert torch.allclose(
        embeddings, expected, atol=2e-5 * float(expected.norm(dim=1).max())
    )
    assert not torch.allclose(embeddings, other, atol=1e-2)
    assert EncoderCard.read(adapter / EncoderCard.FILE).training["start_adapters"] == [
        "first",
        "second",
    ]
    # a finished run, loaded again
    assert tuned(captions, llama, tmp_path / "run", *started) == adapter


def test_adapter_of_another_model(llama: Path, make_llm, tmp_path: Path) -> None:
    _, adapter = write_moved(llama, tmp_path / "adapter")

    def opened(llm: Path, adapter: Path) -> CaptionEncoder:
        return CaptionEncoder(EncoderConfig(llm=str(llm), adapter=str(adapter)), "cpu")

    with pytest.raises(ContractError, match="was trained on"):
        opened(make_llm(tmp_path / "other", "llama", seed=1), adapter)
    (adapter / EncoderCard.FILE).unlink()
    for llm in (
        make_llm(tmp_path / "wide", "llama", width=64),
        make_llm(tmp_path / "phi3", "phi3"),
    ):
        with pytest.raises(ContractError, match="does not fit"):
            opened(llm, adapter)
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        opened(llama, tmp_path)
