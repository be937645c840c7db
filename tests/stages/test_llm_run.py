"""Caption-contrastive training on the tower's loop: ranks, micro-batches, kills and reloads change
nothing."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_helpers import moved, write_moved
from tower_runs import ROOT, finish, lines, start, wait_for

from llm2clip_plugin.cli import main
from llm2clip_plugin.contracts import EncoderCard, RunRecord
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.stages.llm import finetune_llm
from llm2clip_plugin.stages.llm_config import FINETUNE_LLM, FinetuneConfig
from llm2clip_plugin.text.config import EncoderConfig, LoraSettings
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.train.checkpoint import TrainState

WORDS = (
    "a red bicycle leans against the brick wall of an old house near two sleeping dogs in rain"
).split()
STEPS = 4
# fp32 sums in another order, through AdamW, over a few steps of a rate that changes the loss by
# tenths
SAME = 2e-5


def write_captions(path: Path, count: int = 48) -> Path:
    """Names of one to three words and long captions that hold them."""
    names = [f"{WORDS[i % 16]} {WORDS[i * 7 % 16]} {i % 12 % 8}" for i in range(count)]
    long = [" ".join([*WORDS[: i % 16], name]) for i, name in enumerate(names)]
    pairs = enumerate(zip(names, long, strict=True))
    rows = [
        {"id": f"k{i}", "image": "x.png", "caption": one, "long_caption": other}
        for i, (one, other) in pairs
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captions(tmp_path_factory.mktemp("captions") / "caps.jsonl")


def options(captions: Path, llm: Path, output: Path, *more: str) -> list[str]:
    """A short run at a rate that moves the loss; dropout 0, so that micro-batches can be
    compared."""
    return [
        *(
            str(captions),
            "--llm",
            str(llm),
            "--compute-dtype",
            "float32",
            "--output-dir",
            str(output),
        ),
        *("--global-batch", "16", "--max-steps", str(STEPS), "--lr", "3e-3", "--warmup-steps", "0"),
        *(
            "--dropout",
            "0",
            "--scale",
            "20",
            "--query-prompt",
            "Instruct: find the picture. Query: ",
            *more,
        ),
    ]


def tuned(captions: Path, llm: Path, output: Path, *more: str) -> Path:
    """The adapter of such a run."""
    return finetune_llm(FINETUNE_LLM.parse(options(captions, llm, output, *more)))


def step_lines(output: Path) -> list[dict[str, Any]]:
    return [line for line in lines(output) if "loss" in line]  # without evaluations and checkpoints


def losses(output: Path) -> list[float]:
    found = step_lines(output)
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    return [line["loss"] for line in found]


@pytest.fixture(scope="module")
def plain(captions: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, one batch, one length group: what all other ways must equal."""
    output = tmp_path_factory.mktemp("plain")
    assert tuned(captions, llama, output, "--length-groups", "1") == output / "adapter"
    return output


def zero_file(stage: int) -> str:
    return str(ROOT / f"scripts/zero{stage}.json")


def test_loss_falls(plain: Path) -> None:
    found = losses(plain)
    assert found[-1] < found[0] - 0.2
    record = RunRecord.read(plain / "run.json")
    assert record.finished
    assert record.step == STEPS
    assert record.samples == 16 * STEPS


@pytest.mark.parametrize(
    "more",
    [
        ("--micro-batch", "4"),
        ("--micro-batch", "8", "--length-groups", "3"),
        ("--gradient-checkpointing",),
    ],
    ids=["micro-batches", "length groups", "gradient checkpointing"],
)
def test_how_a_batch_is_cut_changes_nothing(
    plain: Path, captions: Path, llama: Path, tmp_path: Path, more
) -> None:
    tuned(captions, llama, tmp_path, *more)
    assert losses(tmp_path) == pytest.approx(losses(plain), abs=SAME)


def test_compiled_it_has_the_same_losses(
    plain: Path, captions: Path, llama: Path, tmp_path: Path, graphs
) -> None:
    """With gradient caching and checkpointing; no graph is added after the first step, whatever the
    texts' lengths."""
    tuned(
        captions,
        llama,
        tmp_path,
        "--torch-compile",
        "True",
        "--micro-batch",
        "4",
        "--gradient-checkpointing",
    )
    assert losses(tmp_path) == pytest.approx(losses(plain), abs=SAME)
    assert len(graphs) == STEPS
    assert 0 < graphs[0] == graphs[-1] <= 3


def test_two_ranks_killed_and_resumed_with_one(
    plain: Path, captions: Path, llama: Path, tmp_path: Path
) -> None:
    """ZeRO-2 on two ranks, SIGKILL after the first checkpoint, the rest on one rank with ZeRO-0:
    the same losses."""
    arguments = options(captions, llama, tmp_path, "--save-steps", "1")
    ranks = start([*arguments, "--deepspeed", zero_file(2)], 2, "scripts/finetune_llm.py")
    wait_for(lambda: (tmp_path / "checkpoints/latest").is_file())
    for process in ranks:
        process.kill()
    finish(ranks)
    done = TrainState.read(next(iter((tmp_path / "checkpoints").glob("step-*/state.json"))))
    assert done.world_size == 2
    assert done.step >= 1
    assert finetune_llm(FINETUNE_LLM.parse(arguments)) is not None
    assert losses(tmp_path) == pytest.approx(losses(plain), abs=SAME)


STAGES = """
import json, sys
from llm2clip_plugin.cli import leave, run

for argv in json.loads(sys.argv[-1]):
    if status := run("finetune-llm", argv):
        break
leave(status)
"""


@pytest.mark.slow
def test_two_ranks_are_one(plain: Path, captions: Path, llama: Path, tmp_path: Path) -> None:
    """Two ranks with gradient caching, under each ZeRO stage in turn."""
    more = [("--micro-batch", "4", "--deepspeed", zero_file(stage)) for stage in range(4)]
    runs = [options(captions, llama, tmp_path / str(stage), *more[stage]) for stage in range(4)]
    (tmp_path / "stages.py").write_text(STAGES)
    ranks = start([json.dumps(runs)], 2, tmp_path / "stages.py")
    assert finish(ranks) == [0, 0], ranks[0].output[-3000:]
    for stage in range(4):
        assert losses(tmp_path / str(stage)) == pytest.approx(losses(plain), abs=SAME), stage


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
        EncoderConfig(llm=str(any_llm), adapter=str(folder), compute_dtype="float32"), "cpu"
    )
    assert reloaded.config.chat_template == "<bos><user>\n{caption}<end>"
    assert {name: vars(reloaded.config)[name] for name in settings if name != "chat_template"} == {
        name: value for name, value in settings.items() if name != "chat_template"
    }
    left = reloaded.encode(TEXTS)
    right = trained.encode(TEXTS)
    assert torch.allclose(left, right, atol=2e-5 * float(right.norm(dim=1).max()))
    raw = CaptionEncoder(
        EncoderConfig(llm=str(any_llm), compute_dtype="float32", **settings), "cpu"
    )
    assert not torch.allclose(raw.encode(TEXTS), right, atol=1e-2)
    assert raw.identity().fingerprint != reloaded.identity().fingerprint
    with pytest.raises(ContractError, match=r"max_tokens is 32, but .* was trained with 48"):
        CaptionEncoder(EncoderConfig(llm=str(any_llm), adapter=str(folder), max_tokens=32), "cpu")


def with_adapter(llm: Path, load_in_4bit: bool) -> tuple[CaptionEncoder, torch.nn.Module]:
    encoding = EncoderConfig(llm=str(llm), compute_dtype="float32", load_in_4bit=load_in_4bit)
    encoder = CaptionEncoder(encoding, "cpu", trainable_adapter=True)
    return encoder, moved(encoder, FinetuneConfig(encoder=encoding))


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["float32", "4-bit"])
def test_embedding_is_its_own_after_lora(llama40: Path, load_in_4bit: bool) -> None:
    """Width 40: bitsandbytes' packed CPU kernel refuses it in evaluation mode."""
    encoder, _ = with_adapter(llama40, load_in_4bit)
    rows = encoder.tokenize(TEXTS)
    alone = torch.cat([encoder.embed_tokens([row]) for row in rows])
    assert ((encoder.embed_tokens(rows) - alone).norm(dim=1) < 1e-5 * alone.norm(dim=1)).all()
    assert (encoder.identity().quantization == "nf4") is load_in_4bit


@pytest.fixture(scope="session")
def llama40(make_llm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llm(tmp_path_factory.mktemp("llm") / "llama40", "llama", width=40)


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["float32", "4-bit"])
def test_gradients_reach_the_adapter_alone(llama40: Path, load_in_4bit: bool) -> None:
    encoder, module = with_adapter(llama40, load_in_4bit)
    module.train()
    names = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    layers = [f"self_attn.{name}_proj" for name in "qkvo"] + [
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    places = [
        f"{block}.{layer}.lora_{side}" for block in (0, 1) for layer in layers for side in "AB"
    ]
    assert names == {
        f"model.llm.base_model.model.layers.{place}.default.weight" for place in places
    }
    tokens = torch.tensor(encoder.tokenize(["two dogs"]))
    ones = torch.ones_like(tokens)
    embeddings, _ = module(tokens, ones, torch.arange(tokens.shape[1])[None], ones.bool())
    embeddings.pow(3).sum().backward()
    assert {
        name for name, parameter in module.named_parameters() if parameter.grad is not None
    } == names
    assert all(
        float(parameter.grad.abs().sum()) > 0
        for name, parameter in module.named_parameters()
        if name in names
    )


def test_qlora_on_a_cpu_end_to_end(captions: Path, llama40: Path, tmp_path: Path) -> None:
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
    assert EncoderCard.read(adapter / EncoderCard.FILE).training["quantization"] == "nf4"
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
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["metrics"]["short->long/cra"] == pytest.approx(scores["short->long"], abs=1e-6)
    # of 45, those with equal texts once
    assert len(found["items"]) == found["counts"]["short->long"] == 30


@pytest.mark.parametrize(
    "more", [(), ("--no-symmetric",)], ids=["both directions", "one direction"]
)
def test_how_a_batch_with_hard_negatives_is_cut_changes_nothing(
    llama: Path, tmp_path: Path, more
) -> None:
    words = [f"{WORDS[i % 16]} {i}" for i in range(33)]
    rows = [
        {"query": words[i], "positive": f"the {words[i]}", "negative": words[i + 1]}
        for i in range(32)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, cut in (("whole", ()), ("cut", ("--micro-batch", "4"))):
        tuned(tmp_path / "pairs.jsonl", llama, tmp_path / name, *more, *cut)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), abs=SAME)


def test_learned_scale(captions: Path, llama: Path, tmp_path: Path) -> None:
    tuned(captions, llama, tmp_path / "run", "--learn-scale")
    lines = step_lines(tmp_path / "run")
    assert lines[-1]["logit_scale"] != lines[0]["logit_scale"] == pytest.approx(20.0)


def test_training_continues_from_an_adapter(
    plain: Path, captions: Path, llama: Path, tmp_path: Path
) -> None:
    arguments = options(captions, llama, tmp_path)
    words = arguments.index("--query-prompt")
    finetune_llm(
        FINETUNE_LLM.parse(
            [*arguments[:words], *arguments[words + 2 :], "--adapter", str(plain / "adapter")]
        )
    )
    assert losses(tmp_path)[0] < losses(plain)[0] - 0.1
    assert EncoderCard.read(tmp_path / "adapter" / EncoderCard.FILE).query_prompt.startswith(
        "Instruct"
    )


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
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "by hand"), abs=SAME)
    pairs = ((llama, adapter), (llm, by_hand), (llama, first))
    found, expected, other = (
        CaptionEncoder(
            EncoderConfig(llm=str(path), adapter=str(own), compute_dtype="float32"), "cpu"
        ).encode(TEXTS)
        for path, own in pairs
    )
    assert torch.allclose(found, expected, atol=2e-5 * float(expected.norm(dim=1).max()))
    assert not torch.allclose(found, other, atol=1e-2)
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


def test_wrong_settings_stop_before_training(
    captions: Path, llama: Path, tmp_path: Path, capsys
) -> None:
    base = ["finetune-llm", *options(captions, llama, tmp_path / "run")]
    zero3 = ("--load-in-4bit", "--deepspeed", zero_file(3))
    for more, said in (
        (("--targets", "query"), "['query']"),
        (zero3, "ZeRO-3"),
        (("--torch-compile", "True", *zero3[1:]), "--torch-compile"),
        (
            ("--torch-compile", "True", "--load-in-4bit", "--gradient-checkpointing"),
            "--torch-compile",
        ),
        (("--precision", "bf16"), "train.precision bf16"),
        (("--max-tokens", "36", "--pair-kinds", "long:short"), "max_tokens 36"),
        (("--fields", "label=short"), "'label'"),
        (("--pair-kinds", "short:poem"), "short:poem"),
        (("--global-batch", "64"), "global_batch 64"),
        (("--start-adapters", str(tmp_path / "none"), "--load-in-4bit"), "start_adapters"),
    ):
        assert main([*base, *more]) == 2, more
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "adapter").exists()


def test_long_texts_are_counted_and_queries_cut_on_request(
    captions: Path, llama: Path, tmp_path: Path, capsys
) -> None:
    more = (
        "--max-tokens",
        "36",
        "--pair-kinds",
        "long:short",
        "short:long",
        "--cut-queries",
        "--max-steps",
        "1",
    )
    assert main(["finetune-llm", *options(captions, llama, tmp_path / "run", *more)]) == 0
    found = re.findall(
        r"(\d+) of the first (\d+) (?:queries|positives) are longer", capsys.readouterr().out
    )
    assert len(found) == 2
    assert all(0 < int(long) < int(all_) for long, all_ in found)


def test_a_weight_that_is_not_finite_is_one_line(
    captions: Path, llama: Path, tmp_path: Path, capsys
) -> None:
    broken = tmp_path / "llm"
    shutil.copytree(llama, broken)
    weights = load_file(broken / "model.safetensors")
    # words that the probe at loading does not use
    weights["model.embed_tokens.weight"][100:] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert main(["finetune-llm", *options(captions, broken, tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert re.search(rf"error: {broken}: .*embed_tokens.weight", told)
    assert told.count("error: ") == 1
    assert "Traceback" not in told
    assert not (tmp_path / "run/adapter").exists()
