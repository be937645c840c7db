"""Caption-contrastive training on the tower's loop: ranks, micro-batches, kills and reloads change
nothing."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from llm_runs import (
    SAME,
    STEPS,
    WORDS,
    losses,
    options,
    step_lines,
    tuned,
)
from safetensors.torch import load_file, save_file
from tower_runs import ROOT, finish, start, wait_for

from llm2clip_plugin.cli import main
from llm2clip_plugin.contracts import RunRecord
from llm2clip_plugin.stages.llm import finetune_llm
from llm2clip_plugin.stages.llm_config import FINETUNE_LLM
from llm2clip_plugin.stages.run import not_in_both
from llm2clip_plugin.text.pairs import SURVEYED, TextPairs
from llm2clip_plugin.train.checkpoint import TrainState


def zero_file(stage: int) -> str:
    return str(ROOT / f"scripts/zero{stage}.json")


def test_loss_falls(plain: Path) -> None:
    of_steps = losses(plain)
    assert of_steps[-1] < of_steps[0] - 0.2
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
    ranks = start(
        [*arguments, "--deepspeed", zero_file(2)], 2, "scripts/finetune_llm.py"
    )
    wait_for(lambda: (tmp_path / "checkpoints/latest").is_file())
    for process in ranks:
        process.kill()
    finish(ranks)
    done = TrainState.read(
        next(iter((tmp_path / "checkpoints").glob("step-*/state.json")))
    )
    assert done.world_size == 2
    assert done.step >= 1
    assert finetune_llm(FINETUNE_LLM.parse(arguments)) is not None
    assert losses(tmp_path) == pytest.approx(losses(plain), abs=SAME)


def test_other_captions_in_a_runs_folder_are_refused(
    plain: Path,
    captions: Path,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(plain, tmp_path / "run")
    changed = tmp_path / "captions.jsonl"
    # in the last sample; the first ones are read before the run
    monkeypatch.setattr("llm2clip_plugin.text.pairs.SURVEYED", 40)
    first, last = captions.read_text().rsplit("\n", 1)
    changed.write_text(f"{first}\n{last.replace('red', 'blue')}")
    assert changed.read_text() != captions.read_text()
    arguments = options(changed, llama, tmp_path / "run")
    with pytest.raises(ValueError, match=r"\n  captions\.1: '\w+' in the checkpoint"):
        finetune_llm(FINETUNE_LLM.parse(arguments))
    # the same ones at another path
    changed.write_text(captions.read_text())
    arguments += ["--allow-changed", "pairs.data"]
    assert finetune_llm(FINETUNE_LLM.parse(arguments))


def test_digests_that_an_earlier_release_did_not_record_are_not_compared() -> None:
    now = {"captions": {"1": "b"}, "pictures": {"1": {"content": "", "sizes": "c"}}}
    facts = ("captions", "pictures")
    lacking = not_in_both({"captions": "a"}, now, facts)
    assert lacking == [
        "captions",
        "captions.1",
        "pictures.1.content",
        "pictures.1.sizes",
    ]
    local = {"captions": {"1": "a"}, "pictures": {"1": {"content": "d", "sizes": "e"}}}
    assert not_in_both(local, now, facts) == ["pictures.1.content"]


def test_other_text_pairs_in_a_runs_folder_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(SURVEYED + 2)]
    path.write_text("\n".join(map(json.dumps, rows)))
    before = TextPairs(path).captions_digest()
    path.write_text(path.read_text().replace(f"p{SURVEYED + 1}", "another"))
    assert TextPairs(path).captions_digest() != before


STAGES = """
import json, sys
from llm2clip_plugin.cli import leave, run

for argv in json.loads(sys.argv[-1]):
    if status := run("finetune-llm", argv):
        break
leave(status)
"""


@pytest.mark.slow
def test_two_ranks_are_one(
    plain: Path, captions: Path, llama: Path, tmp_path: Path
) -> None:
    """Two ranks with gradient caching, under each ZeRO stage in turn."""
    more = [
        ("--micro-batch", "4", "--deepspeed", zero_file(stage)) for stage in range(4)
    ]
    runs = [
        options(captions, llama, tmp_path / str(stage), *more[stage])
        for stage in range(4)
    ]
    (tmp_path / "stages.py").write_text(STAGES)
    ranks = start([json.dumps(runs)], 2, tmp_path / "stages.py")
    assert finish(ranks) == [0, 0], ranks[0].output[-3000:]
    for stage in range(4):
        assert losses(tmp_path / str(stage)) == pytest.approx(
            losses(plain), abs=SAME
        ), stage


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
    assert losses(tmp_path / "cut") == pytest.approx(
        losses(tmp_path / "whole"), abs=SAME
    )


def test_learned_scale(captions: Path, llama: Path, tmp_path: Path) -> None:
    tuned(captions, llama, tmp_path / "run", "--learn-scale")
    lines = step_lines(tmp_path / "run")
    assert lines[-1]["logit_scale"] != lines[0]["logit_scale"] == pytest.approx(20.0)


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
        (("--global-batch", "64"), "--global-batch 64"),
        (
            ("--start-adapters", str(tmp_path / "none"), "--load-in-4bit"),
            "start_adapters",
        ),
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
    assert (
        main(["finetune-llm", *options(captions, llama, tmp_path / "run", *more)]) == 0
    )
    counts = re.findall(
        r"(\d+) of the first (\d+) (?:queries|positives) are longer",
        capsys.readouterr().out,
    )
    assert len(counts) == 2
    assert all(0 < int(long) < int(all_) for long, all_ in counts)


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
    message = capsys.readouterr().err
    assert re.search(rf"error: {broken}: .*embed_tokens.weight", message)
    assert message.count("error: ") == 1
    assert "Traceback" not in message
    assert not (tmp_path / "run/adapter").exists()
