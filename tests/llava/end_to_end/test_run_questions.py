"""llm2clip run --questions --reading, without stage 1: a LLaVA of the tower before and after is
trained, asked and compared, on tiny models."""

import json

import pytest
from llava_world import TODAY
from own_photos import COLORS, make_photos

pytestmark = [
    pytest.mark.both_stacks,
    pytest.mark.skipif(not TODAY, reason="towers train with today's libraries"),
]
SIDES = ("before", "after")


def test_a_llava_of_each_tower_is_asked(world, tmp_path):
    from tiny_reading import make_reading  # not in LLaVA's environment

    make_photos(tmp_path)
    width = json.loads((world.llm / "config.json").read_text())["hidden_size"]
    make_reading(tmp_path / "reading", world.llm, width=width)
    rows = []
    for path in sorted((tmp_path / "photos").glob("*.txt")):
        color = next(color for color in COLORS if color in path.read_text())
        image = f"photos/{path.stem}.jpg"
        rows.append(
            {
                "image": image,
                "question": "Which color is it?",
                "answer": color,
                "category": "color",
            }
        )
        path.with_suffix(".json").unlink()
    (tmp_path / "own.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows[::6])
    )
    words = f"tars --llm {world.llm} --tower {world.towers['clip']} --output out --validation 0.2"
    words += " --num-train-epochs 1 --tower-options='--heads.steps 5 --lr 1e-2'"
    words += f" --reading reading --questions own.jsonl --llava-llm {world.llm}"
    words += " --llava-options='--max_steps 2 --dataloader_num_workers 0'"

    def run(command: str) -> str:
        return world.run(
            "bash",
            "-c",
            f"cd {tmp_path} && {command}",
            PATH=f"{world.programs}:/usr/bin:/bin",
        )

    run("llm2clip data make photos --output tars")
    said = run(f"llm2clip run {words}")
    out = tmp_path / "out"
    assert "16 of 16 stages to run" in said
    assert "out/questions/compare/compare.html" in said
    checkpoints = [
        json.loads((out / f"llava-{side}" / "config.json").read_text())
        for side in SIDES
    ]
    cards = [
        json.loads((out / side / "tower" / "llm2clip.json").read_text())
        for side in SIDES
    ]
    towers = [card["weights_sha256"] for card in cards]
    assert [
        config["llm2clip_tower"]["weights_sha256"] for config in checkpoints
    ] == towers
    assert towers[0] != towers[1]
    for side, card in zip(SIDES, cards, strict=True):
        teacher = card["teacher"]
        assert (teacher["pooling"], teacher["layer"]) == ("last", 1)
        assert teacher["post"]
        assert (out / side / "tower" / "llm2clip_post.safetensors").is_file()
    (row,) = json.loads((out / "questions" / "compare" / "compare.json").read_text())[
        "rows"
    ]
    assert (row["benchmark"], row["questions"]) == ("questions", 12)
    page = (out / "index.html").read_text()
    assert "own questions" in page
    assert 'href="questions/compare/compare.html"' in page
    assert "0 of 16 stages to run" in run(f"llm2clip run {words}")
