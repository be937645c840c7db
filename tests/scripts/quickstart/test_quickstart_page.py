"""The quickstart's page and README.md's picture: drawn queries, every picture shown, failures shown
as such."""

import base64
import io
import json
import re
import sys
from pathlib import Path

import chromium
import claims
import found
import inputs
import measure
import page
import pytest
import readme_picture
import torch
from PIL import Image
from quickstart_folders import WIDTH, write_adapter, write_cache, write_run
from transformers import Dinov2Config, Dinov2Model

from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.towers import load_tower

LANGUAGES = ["ar", "de", "en", "zh"]


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


def uri(color: str) -> str:
    return "data:image/png;base64," + base64.b64encode(png(color)).decode()


def query(code: str, text: str, before: int, after: int) -> dict:
    """A query for concept c0, whose picture comes at these ranks."""

    def side(rank: int) -> dict:
        first = [f"c{number}" for number in range(1, 6)]
        if rank <= 5:
            first.insert(rank - 1, "c0")
        return {"rank": rank, "first": first[:5]}

    about = {
        "text": text,
        "language": found.LANGUAGES[code],
        "code": code,
        "style": "noto",
        "concept": "c0",
    }
    return {**about, "before": side(before), "after": side(after)}


FOUND = {
    "images": 326,
    "names": {f"c{number}": f"name {number}" for number in range(6)},
    "recall": {
        side: [
            {
                "title": "names in English",
                "queries": 978,
                "images": 326,
                "first 1": value,
                "first 10": 4 * value,
            }
        ]
        for side, value in (("before", 10.0), ("after", 12.5))
    },
    "queries": [
        query("en", "a <b>bold</b> name", 7, 2),
        query("ar", "قرص طائر", 3, 200),
    ],
    "figure": {
        "drawn": 20,
        "found": 2,
        "queries": [query("zh", "来信", 8, 1), query("en", "child", 10, 3)],
    },
    "pictures": {"noto": {f"c{number}": uri("red") for number in range(6)}},
}


def test_a_tower_that_is_a_link_is_listed_where_the_run_has_it(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    towers = tmp_path / "run" / "default" / "towers"
    towers.mkdir(parents=True)
    (towers / "tuned-seed0").symlink_to(tmp_path / "elsewhere")
    run = tmp_path / "run"
    listed = page.files(
        run / "index.html", run / "data", run / "default", "seed0", None
    )
    assert [path for path, _ in listed] == ["default/towers/tuned-seed0"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished quickstart's results, small and made up; one picture of LLaVA's is missing."""
    output = tmp_path / "default"
    (tmp_path / "data" / "llm" / "seed0").mkdir(parents=True)
    lines = [
        {"step": 0, page.KEYWORDS: 0.421},
        {"step": 1, "loss": 1.0},
        {"step": 12, page.KEYWORDS: 0.695},
    ]
    (tmp_path / "data" / "llm" / "seed0" / "metrics.jsonl").write_text(
        "\n".join(map(json.dumps, lines))
    )
    (output / "logs").mkdir(parents=True)
    (output / "logs" / "seconds.tsv").write_text(
        "80\tstage 1: x\n9\tstage 1: x\n100\tstage 2: y\n"
    )
    (output / "found.json").write_text(json.dumps(FOUND), encoding="utf-8")
    images = output / "llava" / "data" / "images"
    images.mkdir(parents=True)
    (images / "noto-c0.png").write_bytes(png("blue"))
    for side, answers in (
        ("before", ["Flags", "Objects", "Objects"]),
        ("after", ["Objects", "Flags", "Objects"]),
    ):
        items = [
            {
                "id": f"noto-c{number}",
                "question": "Which group?",
                "score": float(answer == "Objects"),
                "cluster": f"c{number}",
                "answer": answer,
                "truth": "Objects",
                "image": f"noto-c{number}.png",
            }
            for number, answer in enumerate(answers)
        ]
        accuracy = 100 * sum(item["score"] for item in items) / 3
        scores = ScoreFile(
            benchmark="miniature: emoji group",
            metrics={"accuracy": accuracy},
            items=items,
        )
        scores.write(output / "llava" / "scores" / side / "emoji-group.scores.json")
    return tmp_path


def write_page(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Path:
    words = [
        "--data",
        folder / "data",
        "--output",
        folder / "default",
        "--page",
        folder / "index.html",
        *more,
    ]
    monkeypatch.setattr(sys, "argv", ["page.py", *map(str, words)])
    page.main()
    return folder / "index.html"


def test_the_page_fills_as_the_stages_end(folder, monkeypatch, capsys) -> None:
    (folder / "default" / "found.json").rename(folder / "found.json")
    first = write_page(folder, monkeypatch, "--llava", "llava").read_text(
        encoding="utf-8"
    )
    assert 'http-equiv="refresh"' in first
    assert "69.5 %" in first
    assert "They come after stage 2." in first
    output = capsys.readouterr().out
    assert "42.1 % ->  69.5 %" in output
    assert "index.html" in output
    (folder / "found.json").rename(folder / "default" / "found.json")
    last = write_page(folder, monkeypatch, "--llava", "llava").read_text(
        encoding="utf-8"
    )
    assert 'http-equiv="refresh"' not in last
    # failures are shown as such
    assert "number 7" in last
    assert "number 2" in last
    assert "number 200" in last
    assert "earlier for 1 of them, later for 1, as before for 0" in last
    assert "a &lt;b&gt;bold&lt;/b&gt; name" in last
    assert last.count("picture not found") == 1  # said where it is missing
    # the longest run of a stage that was resumed
    assert "<td>80 s</td>" in last
    assert "<b>180 s</b>" in last
    output = capsys.readouterr().out
    assert "1 won, 1 lost" in output
    assert "now right: Which group? Objects (was Flags, name 0)" in output


def test_the_right_picture_is_marked_where_it_came(folder, monkeypatch) -> None:
    text = write_page(folder, monkeypatch).read_text(encoding="utf-8")
    bold, arabic = text.split('<article class="query">')[1:]
    # ranks 7 -> 2: after five others, then second; ranks 3 -> 200
    for query_text, before, after in ((bold, ["later"], [1]), (arabic, [2], ["later"])):
        for side, expected in zip(
            query_text.split('<ol class="pictures">')[1:], (before, after), strict=True
        ):
            classes = re.findall(r'<li class="([a-z ]+)">', side.split("</ol>")[0])
            marked = [number for number, name in enumerate(classes) if name == "right"]
            if "right later" in classes:
                marked.append("later")
            assert marked == expected, classes


@pytest.mark.skipif(chromium.find() is None, reason="needs a Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_every_picture_and_fetches_nothing(
    folder, monkeypatch, width
) -> None:
    path = write_page(folder, monkeypatch, "--llava", "llava")
    with chromium.Chromium(width=width) as browser:
        browser.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        browser.open(path.as_uri())
        is_shown = browser.run(
            "[...document.images].map(image => image.naturalWidth > 0 && image.width >= 40)"
        )
        # of each query five and, if it comes later, the right one: 11 + 11; of LLaVA's two
        # questions one
        assert len(is_shown) == 23
        assert all(is_shown)
        assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
        assert browser.run("document.querySelectorAll('li.right').length") == 4
        assert not browser.errors
        assert [
            url for url in browser.requests if not url.startswith(("file:", "data:"))
        ] == []


def test_queries_are_drawn_without_looking() -> None:
    concepts = [f"c{number}" for number in range(50)]
    drawn = found.draw(concepts, LANGUAGES)
    assert drawn == found.draw(concepts[::-1], LANGUAGES[::-1])
    assert sorted(concept for concept, _, _ in drawn) == sorted(concepts)
    assert [language for _, language, _ in drawn[::2]] == ["en"] * 25
    assert {language for _, language, _ in drawn[1:8:2]} == {"ar", "de", "zh"}
    assert {style for _, _, style in drawn} == {0, 1, 2}


def test_the_picture_tells_how_many_were_drawn_for_it() -> None:
    ranks = [
        ("en", 9),
        ("zh", 1),
        ("en", 3),
        ("zh", 2),
        ("de", 6),
        ("ar", 5),
        ("de", 4),
        ("fr", 1),
        ("ru", 1),
    ]
    figure = found.select([query(code, code, 1, rank) for code, rank in ranks])
    assert [query["code"] for query in figure["queries"]] == [
        "zh",
        "en",
        "ar",
        "de",
        "fr",
    ]
    # the second in Chinese is found, too
    assert (figure["drawn"], figure["found"]) == (
        8,
        6,
    )
    drawn = readme_picture.draw(FOUND, readme_picture.COLORS["dark"])
    assert (
        "Of the first 20 names drawn at random, 2 find their drawing among the first five of "
        "326: these"
    ) in drawn
    # the frame and the name of each right one
    assert drawn.count(readme_picture.COLORS["dark"]["good"]) == 4


def test_both_towers_answer_the_same_queries(tmp_path, monkeypatch) -> None:
    """On tiny towers, before and after alike: ranks and recall by hand."""
    inputs.prepare(tmp_path / "data", (3, 3, 8), ("de",))
    identity = write_adapter(tmp_path / "data")
    write_cache(
        tmp_path / "data" / "all", tmp_path / "data" / "cache" / "tuned-seed0", identity
    )
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "tiny")
    dual = DualEncoder(
        load_tower(tmp_path / "tiny"),
        DualConfig(projection_dim=8, llm_width=WIDTH, pool="cls"),
    )
    towers = {}
    for side, kind in found.SIDES.items():
        name = f"{kind}-seed0"
        towers[side] = tmp_path / "out" / "towers" / name
        export_tower(
            dual,
            towers[side],
            origin="tiny",
            teacher=vars(identity),
        )
        write_run(tmp_path / "out", name, cache=["data/cache/tuned-seed0"])
    made = found.find(tmp_path / "data", towers)
    assert len(made["queries"]) == made["images"] == 8
    sets = measure.open_sets(tmp_path / "data" / "all")
    reports = measure.evaluate_tower(
        tmp_path / "out" / "towers" / "tuned-seed0",
        sets,
        measure.open_caches(tmp_path / "data"),
    )
    of_kind = {}
    for kind in ("short", "other"):
        galleries = measure.tower_galleries(reports["test"], kind, "t2i")
        of_kind[kind] = 100 * float(
            torch.cat([ranks.hits(1) for ranks, _, _ in galleries]).mean()
        )
    assert [row["first 1"] for row in made["recall"]["after"][:2]] == pytest.approx(
        [*of_kind.values()]
    )
    for query in made["queries"]:
        assert query["before"] == query["after"]  # the same weights
        is_shown = query["concept"] in query["after"]["first"]
        assert is_shown == (query["after"]["rank"] <= found.SHOWN)
        assert set(query["after"]["first"]) <= set(made["pictures"][query["style"]])
    # towers of the tables are those of the claims alone
    tables, _ = claims.make_report(tmp_path / "data", tmp_path / "out")
    assert "start" not in tables[0]
