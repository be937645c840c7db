"""Texts in Python: load_dual_encoder(...).encode_text(["a bird"]) with the teacher that the tower's
card names."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from text_helpers import write_moved
from tiny_data import make_tower

from llm2clip_plugin import load_dual_encoder
from llm2clip_plugin.cli import main as cli
from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.post import POST_FILE, Post
from llm2clip_plugin.vision.directory import DualConfig, published
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.export import export_tower, reexport, summary
from llm2clip_plugin.vision.towers import load_tower

CAPTIONS = [
    "a red bicycle",
    "two dogs run over the wet grass",
    "zwei Hunde rennen",
    "二匹の犬",
]


@pytest.fixture(scope="module")
def world(llama, tmp_path_factory):
    """A folder with an LLM, its adapter, captioned images with their cache, and a tower that names
    this teacher."""
    folder = tmp_path_factory.mktemp("teacher of a tower")
    shutil.copytree(llama, folder / "llm")
    write_moved(
        folder / "llm", folder / "adapter", prompt="Describe: ", chat_template="user"
    )
    rows = [
        {"id": str(number), "image": f"{number}.png", "caption": text}
        for number, text in enumerate(CAPTIONS)
    ]
    data = folder / "data" / "pairs.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = [
        "embed",
        str(data),
        "--llm",
        str(folder / "llm"),
        "--adapter",
        str(folder / "adapter"),
    ]
    assert (
        cli([*words, "--cache", str(folder / "cache"), "--compute-dtype", "float32"])
        == 0
    )
    cache = EmbeddingCache.open(folder / "cache")
    torch.manual_seed(0)
    dual = DualEncoder(
        load_tower(make_tower(folder / "start")),
        DualConfig(projection_dim=16, llm_width=cache.width, adapter_blocks=1),
    )
    export_tower(
        dual,
        folder / "tower",
        origin=str(folder / "start"),
        teacher=dataclasses.asdict(cache.teacher),
    )
    return folder


@pytest.fixture(scope="module")
def post_processed(world: Path) -> Path:
    """post/ with a post-processing, and post-tower/, whose teacher was read with it."""
    folder = world / "post"
    folder.mkdir()
    width = EmbeddingCache.open(world / "cache").width
    Post(torch.full((width,), 0.5)).save(folder)
    config = EncoderConfig(
        llm=str(world / "llm"),
        post_file=str(folder / POST_FILE),
        compute_dtype="float32",
    )
    torch.manual_seed(0)
    dual = DualEncoder(
        load_tower(world / "start"),
        DualConfig(projection_dim=16, llm_width=width, adapter_blocks=1),
    )
    teacher = dataclasses.asdict(CaptionEncoder(config, "cpu").identity())
    export_tower(dual, world / "post-tower", origin="tiny", teacher=teacher)
    return world


def test_a_tower_holds_the_post_processing_of_its_teacher(
    post_processed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Moved alone, also after another export, it asks for the LLM alone."""
    world = post_processed
    words = ["export", str(world / "post-tower"), "--output", str(tmp_path / "again")]
    assert cli(words) == 0
    assert "--post-file" not in capsys.readouterr().out
    moved = shutil.copytree(tmp_path / "again", tmp_path / "far" / "tower")
    shutil.rmtree(tmp_path / "again")
    card = TowerCard.read(moved / TowerCard.FILE)
    assert published(card).teacher["post_file"] == f"./{POST_FILE}"
    exact = EncoderConfig(llm=str(world / "llm"), compute_dtype="float32")
    explicit = dataclasses.replace(exact, post_file=str(world / "post" / POST_FILE))
    with torch.no_grad():
        embeddings = load_dual_encoder(moved, teacher=exact).encode_text(CAPTIONS)
        expected = load_dual_encoder(moved, teacher=explicit).encode_text(CAPTIONS)
    assert torch.equal(embeddings, expected)
    width = card.teacher["width"]
    Post(torch.zeros(width)).save(moved)
    with pytest.raises(ContractError, match=r"has SHA-256 .* copy the file again, or"):
        load_dual_encoder(moved, teacher=exact).encode_text("a bird")
    (moved / POST_FILE).unlink()
    with pytest.raises(ValueError, match=r"no longer at .* pass .* --post-file"):
        load_dual_encoder(moved, teacher=exact).encode_text("a bird")


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_another_post_processing_is_not_taken_along(
    post_processed: Path, tmp_path: Path, damage: str
):
    world = shutil.copytree(post_processed, tmp_path / "world")
    inside = world / "post-tower" / POST_FILE
    inside.unlink()
    if damage == "changed":
        Post(torch.zeros(32)).save(inside.parent)
    card = reexport(world / "post-tower", tmp_path / "out")
    assert not (tmp_path / "out" / POST_FILE).exists()
    place = f"world/post-tower/{POST_FILE}"
    assert card.teacher["post_file"].endswith(place)
    assert "--post-file (it is missing, or changed, at " in summary(tmp_path, card)
    assert "post_file" not in published(card).teacher


def cached_rows(folder: Path) -> torch.Tensor:
    source = open_source(SourceConfig(path=str(folder / "data" / "pairs.jsonl")))
    cache = EmbeddingCache.open(folder / "cache")
    rows = []
    for number in range(len(source)):
        key, captions = source.captions(number)
        rows.append(cache.rows(*source.locate(number), captions, key=key))
    return torch.cat(rows)


def test_strings_are_embedded_as_the_cached_captions_are(world):
    dual = load_dual_encoder(world / "tower")
    with torch.no_grad():
        # embeddings are accepted as before
        expected = dual.encode_text(cached_rows(world))
        embeddings = dual.encode_text(CAPTIONS)
        embedding = dual.encode_text(CAPTIONS[1])
    # the cache rounds to float16, 2**-11, and the LLM may compute in bfloat16, 2**-8
    assert torch.nn.functional.cosine_similarity(embeddings, expected).min() > 0.999
    assert torch.allclose(embedding, embeddings[1:2], atol=0.02)
    assert embedding.shape == (1, 16)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(len(CAPTIONS)), atol=1e-5)
    assert dual.encode_text([]).shape == (0, 16)


def test_the_card_finds_its_teacher_after_everything_was_moved_together(
    world, tmp_path
):
    """Paths in the card are relative to the tower."""
    card = TowerCard.read(world / "tower" / TowerCard.FILE)
    assert card.teacher["llm"] == "../llm"
    assert card.teacher["adapter"] == "../adapter"
    assert card.origin == "../start"
    shutil.copytree(world, tmp_path / "elsewhere")
    with torch.no_grad():
        moved = load_dual_encoder(tmp_path / "elsewhere" / "tower")
        assert moved.card.teacher["llm"] == str(tmp_path / "elsewhere" / "llm")
        assert torch.allclose(
            moved.encode_text("a bird"),
            load_dual_encoder(world / "tower").encode_text("a bird"),
            atol=1e-6,
        )
    reexport(world / "tower", tmp_path / "deep" / "er" / "tower")
    again = load_dual_encoder(tmp_path / "deep" / "er" / "tower")
    assert again.card.teacher["adapter"] == str(world / "adapter")


def test_a_teacher_that_is_not_at_hand(world, tmp_path):
    """The error says what is missing and how to give it; given, the tower works; another LLM is
    refused."""
    shutil.copytree(world / "tower", tmp_path / "tower")
    with pytest.raises(ValueError, match="--adapter"):
        load_dual_encoder(tmp_path / "tower").encode_text("a bird")
    adapter = str(world / "adapter")
    with pytest.raises(FileNotFoundError, match="--llm"):
        load_dual_encoder(tmp_path / "tower", adapter=adapter).encode_text("a bird")
    given = load_dual_encoder(
        tmp_path / "tower", teacher=str(world / "llm"), adapter=adapter
    )
    assert given.encode_text("a bird").shape == (1, 16)
    other = write_moved(world / "llm", tmp_path / "other")[1]
    with pytest.raises(ContractError, match="prompt is 'Describe: '"):
        load_dual_encoder(world / "tower", adapter=str(other)).encode_text("a bird")


def test_a_tower_with_its_adapter_needs_the_base_llm_alone(world, tmp_path, capsys):
    """Exported --with-adapter, moved without anything else, exported again: texts as before, and no
    path of here."""
    words = ["export", str(world / "tower"), "--output"]
    assert cli([*words, str(tmp_path / "tower"), "--with-adapter"]) == 0
    assert "the adapter is in teacher-adapter/" in capsys.readouterr().out
    assert (
        cli(["export", str(tmp_path / "tower"), "--output", str(tmp_path / "again")])
        == 0
    )
    shutil.copytree(tmp_path / "again", tmp_path / "far" / "tower")
    for gone in ("tower", "again"):
        shutil.rmtree(tmp_path / gone)
    with torch.no_grad():
        expected = load_dual_encoder(world / "tower").encode_text(CAPTIONS)
        embeddings = load_dual_encoder(
            tmp_path / "far" / "tower", teacher=str(world / "llm")
        ).encode_text(CAPTIONS)
    assert torch.equal(embeddings, expected)
    card = TowerCard.read(tmp_path / "far" / "tower" / TowerCard.FILE)
    assert (
        published(card).teacher["adapter"]
        == card.teacher["adapter"]
        == "./teacher-adapter"
    )
    inside = (tmp_path / "far" / "tower" / "teacher-adapter").iterdir()
    assert not [
        path.name for path in inside if str(world).encode() in path.read_bytes()
    ]
    settings = tmp_path / "far" / "tower" / "teacher-adapter" / "adapter_config.json"
    settings.write_text(
        settings.read_text().replace('"lora_alpha": 32', '"lora_alpha": 16')
    )
    words = [
        "export",
        str(tmp_path / "far" / "tower"),
        "--output",
        str(tmp_path / "changed"),
        "--with-adapter",
    ]
    assert cli(words) == 2
    assert "--with-adapter" in capsys.readouterr().err
