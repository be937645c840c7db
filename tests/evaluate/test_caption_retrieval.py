"""Caption retrieval accuracy, against a loop by hand, and the search for how an LLM is best read,
from end to end."""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from evaluate_world import write_llm

from llm2clip_plugin.cli import main
from llm2clip_plugin.contracts import CacheManifest
from llm2clip_plugin.data.samples import Caption
from llm2clip_plugin.data.sources import ReadConfig
from llm2clip_plugin.evaluate.captions import (
    FIT_CAPTIONS,
    check_captions,
    find_pairs,
    measure_captions,
    search,
)
from llm2clip_plugin.evaluate.config import (
    CaptionSetConfig,
    EvaluateCaptionsConfig,
    ReadingConfig,
)
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import CaptionEncoder, first_captions
from llm2clip_plugin.text.post import POST_FILE, remove_components
from llm2clip_plugin.text.reading import check_reading, read_reading

NAMES = "cat dog boat tree house lake bird fish moon star road hill".split()
READ = ReadConfig(fields=("texts=short",))
GERMAN = ["Katze", "Hund", "Boot", "Baum", "Haus", "See"]


def write_set(
    path: Path, names: Sequence[str], foreign: Sequence[str], language: str
) -> Path:
    rows = []
    for number, (name, other) in enumerate(zip(names, foreign, strict=True)):
        texts = [
            {"text": name, "kind": "short"},
            {"text": f"a picture of a {name}", "kind": "long"},
        ]
        texts.append({"text": other, "kind": "short", "language": language})
        rows.append({"id": f"k{number}", "image": "x.png", "texts": texts})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("set") / "set.jsonl"
    # each twice, as in two drawing styles
    return write_set(path, NAMES[:6] * 2, GERMAN * 2, "de")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> CaptionEncoder:
    llm = write_llm(tmp_path_factory.mktemp("llm"))
    return CaptionEncoder(
        EncoderConfig(llm=str(llm), compute_dtype="float32", query_prompt="Query: "),
        "cpu",
    )


def test_scores_of_other_captions_under_one_name_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    llm = str(write_llm(tmp_path / "llm"))
    outputs: list[str] = []
    for folder, names in (
        ("one", NAMES[:6]),
        ("same", NAMES[:6]),
        ("other", NAMES[6:]),
    ):
        (tmp_path / folder).mkdir()
        path = write_set(tmp_path / folder / "set.jsonl", names, GERMAN, "de")
        outputs.append(str(tmp_path / f"{folder}.json"))
        words = ["evaluate", "captions", str(path), "--llm", llm]
        words += ["--fields", "texts=short", "--json", outputs[-1]]
        assert main(words) == 0
    for other, is_said in ((outputs[1], False), (outputs[2], True)):
        capsys.readouterr()
        assert main(["compare", outputs[0], other]) == 0
        printed = capsys.readouterr().out
        assert ("measured on different images, captions" in printed) == is_said


def top1(
    encoder: CaptionEncoder,
    first: list[str],
    second: list[str],
    *,
    center: bool = False,
) -> float:
    """By a plain loop; the first as queries."""
    left = torch.cat([encoder.encode([text], query=True) for text in first])
    right = torch.cat([encoder.encode([text]) for text in second])
    if center:
        left = left - left.mean(0)
        right = right - right.mean(0)
    scores = F.normalize(left, dim=1) @ F.normalize(right, dim=1).T
    return sum(int(scores[i].argmax()) == i for i in range(len(first))) / len(first)


def test_accuracy_is_that_of_a_plain_loop(
    teacher: CaptionEncoder, captions: Path
) -> None:
    rows = {
        row.name: row
        for row in measure_captions(
            teacher, CaptionSetConfig(captions=str(captions)), READ
        )
    }
    assert list(rows) == ["short->long", "de->en", "languages"]
    names = NAMES[:6]
    long = [f"a picture of a {name}" for name in names]
    assert rows["short->long"].pairs == 6  # the same pair of another style counts once
    assert rows["short->long"].cra == pytest.approx(top1(teacher, names, long))
    assert rows["short->long"].centred == pytest.approx(
        top1(teacher, names, long, center=True)
    )
    assert (
        rows["de->en"].cra
        == rows["languages"].cra
        == pytest.approx(top1(teacher, GERMAN, names))
    )


def test_a_cut_last_line_is_named(folder: Path, tmp_path: Path, capsys) -> None:
    path = write_set(tmp_path / "set.jsonl", NAMES[:6], GERMAN, "de")
    path.write_text(path.read_text()[:-20])
    words = ["evaluate", "captions", str(path), "--llm", str(folder / "llm")]
    words += ["--fields", *READ.fields, "--json", str(tmp_path / "scores.json")]
    assert main(words) == 0
    (note,) = json.loads((tmp_path / "scores.json").read_text())["notes"]
    assert note.startswith("left out: sample 'line 6' of shard 'set': is not valid")
    assert note in capsys.readouterr().out
    check_captions(CaptionSetConfig(captions=str(path)), READ)  # of finetune-llm
    assert note in capsys.readouterr().out
    path.write_text(path.read_text().splitlines()[-1])
    assert main(words) == 2
    assert "1 samples can't be read, the first: sample 'line 1'" in (
        capsys.readouterr().err
    )


def test_pairs_are_of_two_different_texts() -> None:
    same = (Caption("x"), Caption("x", "long"))
    two = (Caption("y"), Caption("y", "long"), Caption("z", "long"))
    pairs = find_pairs([("a", same), ("b", two)], ("short", "en"), ("long", "en"))
    assert pairs == [("b", "y", "z")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LLM, and captions for validation and training."""
    folder = tmp_path_factory.mktemp("reading")
    write_llm(folder / "llm")
    training = NAMES[8:] + [f"{a} and {b}" for a in NAMES for b in NAMES if a < b]
    for name, texts in (("validation", NAMES[:8]), ("train", training)):
        write_set(
            folder / f"{name}.jsonl",
            texts,
            [f"el {text[::-1]}" for text in texts],
            "es",
        )
    return folder


def config(folder: Path) -> EvaluateCaptionsConfig:
    return EvaluateCaptionsConfig(
        measure=CaptionSetConfig(captions=str(folder / "validation.jsonl")),
        read=READ,
        encoder=EncoderConfig(llm=str(folder / "llm"), compute_dtype="float32"),
        search=True,
        reading=ReadingConfig(fit_on=str(folder / "train.jsonl"), components=(0, 2)),
    )


def test_every_reading_is_what_the_encoder_gives(folder: Path, tmp_path: Path) -> None:
    readings = search(config(folder))
    # templates, attentions, hidden states, poolings, post-processing
    assert len(readings) == 2 * 2 * 3 * 2 * 3
    assert [reading.score for reading in readings] == sorted(
        (reading.score for reading in readings), reverse=True
    )
    assert len({reading.score for reading in readings}) > 3
    training = first_captions(str(folder / "train.jsonl"), FIT_CAPTIONS, READ)
    inner = [
        reading
        for reading in readings
        if (reading.way.layer, reading.components) == (1, 2)
    ]
    for number, reading in enumerate([*readings[:2], *inner[:2]]):
        settings = {
            name: vars(reading.way)[name]
            for name in ("attention", "pooling", "layer", "chat_template")
        }
        if reading.post is not None:
            plain = CaptionEncoder(
                EncoderConfig(
                    llm=str(folder / "llm"), compute_dtype="float32", **settings
                ),
                "cpu",
            )
            assert torch.allclose(
                reading.post.mean, plain.encode(training).mean(0), atol=1e-5
            )
            (tmp_path / str(number)).mkdir()
            reading.post.save(tmp_path / str(number))
            settings["post_file"] = str(tmp_path / str(number) / POST_FILE)
        encoder = CaptionEncoder(
            EncoderConfig(llm=str(folder / "llm"), compute_dtype="float32", **settings),
            "cpu",
        )
        rows = {
            row.name: row.cra
            for row in measure_captions(encoder, config(folder).measure, READ)
        }
        assert reading.rows == pytest.approx(
            {name: rows[name] for name in ("short->long", "languages")}
        )
        assert reading.score == pytest.approx(
            (rows["short->long"] + rows["languages"]) / 2
        )


def test_removed_components_are_the_largest_of_the_fit() -> None:
    torch.manual_seed(0)
    spread_W = torch.tensor([9.0, 5.0, 1.0, 1.0, 1.0, 1.0])
    rotation_WW = torch.linalg.qr(torch.randn(6, 6))[0]
    fitted_NW = torch.randn(400, 6) * spread_W @ rotation_WW.T + 3
    centered, without = remove_components(fitted_NW, (0, 2))
    assert torch.allclose(centered(fitted_NW), fitted_NW - fitted_NW.mean(0), atol=1e-4)
    left_NW = without(fitted_NW)
    # of 9 and 5; the fit's directions are a little off
    assert (left_NW @ rotation_WW[:, :2]).std(0).max() < 0.7
    assert (left_NW @ rotation_WW[:, 2:]).std(0).min() > 0.8
    values = torch.linalg.eigvalsh(torch.cov(left_NW.T))
    assert values[:2].abs().max() < 1e-4 < values[2]
    with pytest.raises(ValueError, match="cannot remove 6 components"):
        remove_components(fitted_NW, (6,))


def test_the_printed_command_embeds_so_and_the_fingerprint_knows(
    folder: Path, tmp_path: Path, capsys
) -> None:
    training = tmp_path / "train.jsonl"
    training.write_text(f'{{"cut\n{(folder / "train.jsonl").read_text()}')
    words = [
        "evaluate",
        "captions",
        str(folder / "validation.jsonl"),
        "--llm",
        str(folder / "llm"),
        "--search",
    ]
    words += [
        "--fit-on",
        str(training),
        "--folder",
        str(tmp_path / "found"),
        "--fields",
        *READ.fields,
    ]
    assert (
        main(
            [
                *words,
                "--no-include-bos",
                "--compute-dtype",
                "float32",
                "--components",
                "2",
                "--templates",
                "",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out.splitlines()
    unread = "1 samples can't be read, the first: sample 'line 1' of shard 'train'"
    assert said[0].startswith(f"{training}: {unread}")
    title = next(
        number
        for number, line in enumerate(said)
        if line.startswith("attention, pooling, layer")
    )
    attention, pooling, layer = said[title + 2].split(", ")[:3]
    embed = shlex.split(said[-3])[1:]
    run = [
        "--tower",
        "TOWER",
        "--output",
        "OUTPUT",
        "--reading",
        str(tmp_path / "found"),
    ]
    assert shlex.split(said[-1])[1:] == ["run", "DATA", *words[3:5], *run]
    card = read_reading(str(tmp_path / "found"), words[4])
    assert (card.attention, card.pooling, card.layer) == (
        attention,
        pooling,
        int(layer),
    )
    assert (card.include_bos, card.base) == (False, words[4])
    assert card.training["search"]["captions"] == len({*NAMES[:8]}) * 3
    assert card.metrics["score"] == pytest.approx(
        float(said[title + 2].split()[-3]), abs=5e-4
    )
    check_reading(str(tmp_path / "found"), EncoderConfig(llm=words[4]))
    embed[(position := embed.index("DATA")) : position + 1] = [
        str(folder / "validation.jsonl"),
        "--fields",
        *READ.fields,
    ]
    if "--post-file" not in embed:  # then nothing is removed, but the way is the same
        remove_components(torch.randn(40, 24), (1,))[0].save(tmp_path)
        embed += ["--post-file", str(tmp_path / POST_FILE)]
    assert (
        main([*embed, "--cache", str(tmp_path / "cache"), "--compute-dtype", "float32"])
        == 0
    )
    teacher = CacheManifest.read(tmp_path / "cache" / CacheManifest.FILE).teacher
    assert (teacher["layer"], teacher["attention"], teacher["pooling"]) == (
        int(layer),
        attention,
        pooling,
    )
    assert len(teacher["post"]) == 64
    assert not teacher["include_bos"]
    plain = CaptionEncoder(
        EncoderConfig(llm=str(folder / "llm"), compute_dtype="float32"), "cpu"
    ).identity()
    assert (
        dataclasses.replace(plain, post=teacher["post"]).fingerprint
        != plain.fingerprint
    )
