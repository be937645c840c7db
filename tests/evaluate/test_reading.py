"""The search for how an LLM is best read: what it finds is what ``embed`` then gives, from end to end."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import torch
from evaluate_world import write_llm

from llm2clip_plugin.cli import main
from llm2clip_plugin.contracts import CacheManifest
from llm2clip_plugin.evaluate.captions import FIT_CAPTIONS, READINGS, measure_captions, search
from llm2clip_plugin.evaluate.config import CaptionSetConfig, EvaluateCaptionsConfig, ReadingConfig
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import POST_FILE, CaptionEncoder, first_captions, remove_components

NAMES = "cat dog boat tree house lake bird fish moon star road hill".split()


def write_set(path: Path, names: list[str]) -> Path:
    rows = []
    for name in names:
        texts = [
            {"text": name, "kind": "short"},
            {"text": f"a picture of a {name}", "kind": "long"},
            {"text": f"el {name[::-1]}", "kind": "short", "language": "es"},
        ]
        rows.append({"id": name, "image": "x.png", "captions": texts})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LLM, and captions for validation and training."""
    folder = tmp_path_factory.mktemp("reading")
    write_llm(folder / "llm")
    write_set(folder / "validation.jsonl", NAMES[:8])
    write_set(folder / "train.jsonl", NAMES[8:] + [f"{a} and {b}" for a in NAMES for b in NAMES if a < b])
    return folder


def config(folder: Path, **encoder: str) -> EvaluateCaptionsConfig:
    return EvaluateCaptionsConfig(
        measure=CaptionSetConfig(captions=str(folder / "validation.jsonl")),
        encoder=EncoderConfig(llm=str(folder / "llm"), compute_dtype="float32", **encoder),
        search=True,
        reading=ReadingConfig(fit_on=str(folder / "train.jsonl"), components=(0, 2)),
    )


def test_every_reading_is_what_the_encoder_gives(folder: Path, tmp_path: Path) -> None:
    found = search(config(folder))
    assert len(found) == 2 * 2 * 3 * 2 * 3  # templates, attentions, hidden states, poolings, post-processing
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert len({one.score for one in found}) > 3
    training = first_captions(str(folder / "train.jsonl"), FIT_CAPTIONS)
    for number, one in enumerate([*found[:2], *[one for one in found if (one.layer, one.components) == (1, 2)][:2]]):
        settings = {name: vars(one)[name] for name in ("attention", "pooling", "layer", "chat_template")}
        if one.post is not None:
            plain = CaptionEncoder(EncoderConfig(llm=str(folder / "llm"), compute_dtype="float32", **settings), "cpu")
            assert torch.allclose(one.post.mean, plain.encode(training).mean(0), atol=1e-5)
            (tmp_path / str(number)).mkdir()
            one.post.save(tmp_path / str(number))
            settings["post_file"] = str(tmp_path / str(number) / POST_FILE)
        encoder = CaptionEncoder(EncoderConfig(llm=str(folder / "llm"), compute_dtype="float32", **settings), "cpu")
        rows = {row.name: row.cra for row in measure_captions(encoder, config(folder).measure)}
        assert one.rows == pytest.approx({name: rows[name] for name in ("short->long", "languages")})
        assert one.score == pytest.approx((rows["short->long"] + rows["languages"]) / 2)


def test_removed_components_are_the_largest_of_the_fit() -> None:
    torch.manual_seed(0)
    spread_W = torch.tensor([9.0, 5.0, 1.0, 1.0, 1.0, 1.0])
    rotation_WW = torch.linalg.qr(torch.randn(6, 6))[0]
    fitted_NW = torch.randn(400, 6) * spread_W @ rotation_WW.T + 3
    centered, without = remove_components(fitted_NW, (0, 2))
    assert torch.allclose(centered(fitted_NW), fitted_NW - fitted_NW.mean(0), atol=1e-4)
    left_NW = without(fitted_NW)
    assert (left_NW @ rotation_WW[:, :2]).std(0).max() < 0.7  # of 9 and 5; the fit's directions are a little off
    assert (left_NW @ rotation_WW[:, 2:]).std(0).min() > 0.8
    values = torch.linalg.eigvalsh(torch.cov(left_NW.T))
    assert values[:2].abs().max() < 1e-4 < values[2]
    with pytest.raises(ValueError, match="cannot remove 6 components"):
        remove_components(fitted_NW, (6,))


def test_the_printed_command_embeds_so_and_the_fingerprint_knows(folder: Path, tmp_path: Path, capsys) -> None:
    words = ["evaluate", "captions", str(folder / "validation.jsonl"), "--llm", str(folder / "llm"), "--search"]
    words += ["--fit-on", str(folder / "train.jsonl"), "--folder", str(tmp_path / "found")]
    assert main([*words, "--compute-dtype", "float32", "--components", "2", "--templates", ""]) == 0
    said = capsys.readouterr().out.splitlines()
    best = json.loads((tmp_path / "found" / READINGS).read_text())["readings"][0]
    embed = shlex.split(said[-1])[1:]
    embed[embed.index("DATA")] = str(folder / "validation.jsonl")
    if best["components"] < 0:  # then nothing is removed, but the way is the same
        embed += ["--post-file", str(write_post(folder, tmp_path))]
    assert main([*embed, "--cache", str(tmp_path / "cache"), "--compute-dtype", "float32"]) == 0
    teacher = CacheManifest.read(tmp_path / "cache" / CacheManifest.FILE).teacher
    assert (teacher["layer"], teacher["attention"], teacher["pooling"]) == tuple(
        best[name] for name in ("layer", "attention", "pooling")
    )
    assert len(teacher["post"]) == 64
    plain = CaptionEncoder(EncoderConfig(llm=str(folder / "llm"), compute_dtype="float32"), "cpu").identity()
    assert dataclasses.replace(plain, post=teacher["post"]).fingerprint != plain.fingerprint


def write_post(folder: Path, where: Path) -> Path:
    encoder = CaptionEncoder(EncoderConfig(llm=str(folder / "llm"), compute_dtype="float32"), "cpu")
    (post,) = remove_components(encoder.encode(NAMES + [f"a {name}" for name in NAMES]), (1,))
    post.save(where)
    return where / POST_FILE
