"""llm2clip llava data: what LLaVA's pretraining reads."""

import json
from pathlib import Path

import pytest
from data_world import jpeg
from tiny_data import write_tar

from llm2clip_plugin.cli import main


def test_each_image_has_its_first_caption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = []
    for number in range(3):
        captions = [
            {"text": f"{ordinal} of {number}", "kind": "short"}
            for ordinal in ("first", "second", "third")
        ]
        if number == 2:  # LLaVA would look for a second image
            captions.insert(0, {"text": "shown in <image>", "kind": "short"})
        members.append((f"k{number}.jpg", jpeg(number)))
        members.append((f"k{number}.json", json.dumps({"captions": captions}).encode()))
    members.append(("k3.jpg", b"<html>not found</html>"))
    members.append(("k3.json", json.dumps({"captions": captions}).encode()))
    members.append(("k4.jpg", jpeg(4)[:-200]))  # cut, with a good header
    members.append(("k4.json", json.dumps({"captions": captions}).encode()))
    write_tar(tmp_path / "data" / "0.tar", members)
    output = tmp_path / "made"
    assert main(["llava", "data", str(tmp_path / "data"), "--output", str(output)]) == 0
    assert "3 images with a caption, 2 left out" in capsys.readouterr().out
    rows = json.loads((output / "captions.json").read_text())
    assert [row["id"] for row in rows] == ["k0", "k1", "k2"]
    for number, row in enumerate(rows):
        question, answer = row["conversations"]
        assert question == {"from": "human", "value": "<image>"}
        assert answer == {"from": "gpt", "value": f"first of {number}"}
        assert (output / "images" / row["image"]).read_bytes() == jpeg(number)
