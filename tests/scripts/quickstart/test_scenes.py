"""Composed scenes: which pairs each split shows, twins, and how towers are asked for them."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import scene_scores
import scene_words
import scenes
import torch
from gate import Pictures, Setting, kernel
from gate_caches import open_split
from inputs import read_tar
from PIL import Image, ImageOps
from quickstart_folders import IDENTITY, WIDTH, write_cache, write_run
from test_quickstart_parts import ROOT, started, value
from transformers import Dinov2Config, Dinov2Model

from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.sampler import PassOrder
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.towers import load_tower

PARTS = ROOT / "scripts" / "quickstart"
SETTING = Setting(pool="mean", penalty=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Few scenes of few concepts."""
    output = tmp_path_factory.mktemp("scenes") / "all"
    scenes.make_scenes(output, scenes=20, concepts=12)
    return output


def read_split(folder: Path, split: str) -> dict[str, tuple[bytes, dict]]:
    """Scene -> its picture and description."""
    return read_scenes(folder / f"{split}-scenes.tar")


def read_scenes(shard: Path) -> dict[str, tuple[bytes, dict]]:
    return {about["concept"]: (png, about) for _, png, about in read_tar(shard)}


def text_of(about: dict) -> str:
    (caption,) = about["captions"]
    return caption["text"]


def test_scenes_are_the_same_every_time(folder, tmp_path) -> None:
    scenes.make_scenes(tmp_path / "all", scenes=20, concepts=12)
    for shard in folder.glob("*.tar"):
        name = shard.name
        assert (folder / name).read_bytes() == (tmp_path / "all" / name).read_bytes()


def test_each_pair_of_concepts_and_each_caption_is_in_one_split(folder) -> None:
    pairs = {}
    captions = []
    for split, count in (("train", 20), ("validation", 24), ("test", 24)):
        samples = read_split(folder, split)
        assert len(samples) == count
        pairs[split] = {about["family"] for _, about in samples.values()}
        captions += [text_of(about) for _, about in samples.values()]
    assert len(pairs["train"]) == 20
    assert not pairs["train"] & pairs["validation"]
    assert not pairs["train"] & pairs["test"]
    assert not pairs["validation"] & pairs["test"]
    assert len(set(captions)) == len(captions)
    shown = "+".join(pairs["test"]).split("+")
    assert len(set(shown)) == len(shown) == 12


def test_training_with_twins_shows_half_of_the_pairs_and_each_twice(folder) -> None:
    shards = sorted(folder.glob("twins-*.tar"))
    pairs = []
    sizes = []
    for shard in shards:
        samples = read_scenes(shard)
        sizes.append(len(samples))
        pairs += [about["family"] for _, about in samples.values()]
        # so that both can be in one batch
        assert all(scenes.twin_of(scene) in samples for scene in samples)
    assert sizes == [16, 4]
    without_twins = read_split(folder, "train")
    in_training = [about["family"] for _, about in without_twins.values()]
    assert sorted(pairs) == sorted(2 * in_training[:10])


def test_shards_of_twins_that_are_read_one_after_the_other_keep_them_in_a_batch() -> (
    None
):
    order = PassOrder([scenes.TWINS_SHARD] * 125, window=1, key=3)
    numbers = order(np.arange(2000))
    for start in range(0, 2000, 80):
        batch = set(numbers[start : start + 80].tolist())
        assert all(number ^ 1 in batch for number in batch)


@pytest.mark.parametrize("shard", ["test-scenes", "twins-000"])
def test_a_twin_has_its_drawings_and_its_names_exchanged(folder, shard) -> None:
    samples = read_scenes(folder / f"{shard}.tar")
    for scene, (png, about) in samples.items():
        twin_png, twin = samples[scenes.twin_of(scene)]
        relation = " above " if " above " in text_of(about) else " left of "
        first, second = text_of(about).split(relation)
        assert text_of(twin) == f"{second}{relation}{first}"
        assert (twin["family"], twin["style"]) == (about["family"], about["style"])
        halves = halves_of(png, relation)
        twin_halves = halves_of(twin_png, relation)
        assert halves[0] != halves[1]
        assert halves == twin_halves[::-1]
    with pytest.raises(ValueError, match="train-0001 has no twin"):
        scenes.twin_of("train-0001")


def halves_of(png: bytes, relation: str) -> list[bytes]:
    """The pixels of both drawings without the white around them."""
    image = Image.open(io.BytesIO(png))
    side = scenes.SIDE
    half = scenes.DRAWING
    boxes = [(0, 0, half, side), (half, 0, side, side)]
    if relation == " above ":
        boxes = [(0, 0, side, half), (0, half, side, side)]
    pixels = []
    for box in boxes:
        drawing = image.crop(box)
        drawn = ImageOps.invert(drawing).getbbox()
        pixels.append(drawing.crop(drawn).tobytes())
    return pixels


def test_more_scenes_than_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="--scenes 60: 12 concepts allow 54"):
        scenes.split_pairs([f"{number:02}" for number in range(12)], scenes=60)


def test_a_group_counts_only_if_all_four_choices_are_right() -> None:
    scores = torch.tensor(
        [
            [0.9, 0.1, 0.0, 0.0],
            [0.2, 0.3, 0.0, 0.0],
            [0.0, 0.0, 0.9, 0.5],
            [0.0, 0.0, 0.3, 0.4],
        ]
    )
    groups = [(0, 1), (2, 3)]
    # the last scene's caption prefers its twin's picture
    assert scene_scores.group_scores(scores, groups).tolist() == [1.0, 0.0]
    assert scene_scores.reciprocal_ranks(scores).tolist() == [1.0, 1.0, 1.0, 1.0]
    assert scene_scores.reciprocal_ranks(torch.ones(4, 4)) == pytest.approx(0.4)
    rng = torch.Generator().manual_seed(0)
    many = torch.rand(4000, 4000, generator=rng)
    pairs = [(number, number + 1) for number in range(0, 4000, 2)]
    assert scene_scores.group_scores(many, pairs).mean() == pytest.approx(
        1 / 6, abs=0.03
    )


def planted(noise: float) -> tuple[Pictures, dict[str, torch.Tensor]]:
    """Scenes whose pictures tell their captions linearly, but for the noise."""
    generator = torch.Generator().manual_seed(0)
    names = [f"train-{number:04}" for number in range(60)]
    for split in ("validation", "test"):
        for number in range(15):
            names += [f"{split}-{number}-{part}" for part in scenes.PARTS]
    captions = {name: torch.randn(8, generator=generator) for name in names}
    mixed = torch.randn(8, 20, generator=generator)
    feature_NF = torch.stack(list(captions.values())) @ mixed
    feature_NF += noise * torch.randn(feature_NF.shape, generator=generator)
    pictures = Pictures(
        split=[name.partition("-")[0] for name in names],
        concept=names,
        family=[name.rpartition("-")[0] for name in names],
        kernels=dict.fromkeys(("mean", "patches"), kernel(feature_NF)),
    )
    return pictures, captions


def test_scenes_that_the_regression_never_saw_are_found_if_pictures_tell_them() -> None:
    pictures, captions = planted(noise=0.1)
    found = scene_scores.ask_tower(pictures, captions, "test", SETTING)
    assert found["retrieval"].shape == (30,)
    assert found["twins"].shape == (15,)
    assert found["retrieval"].mean() > 0.9
    assert found["twins"].mean() > 0.9
    pictures, captions = planted(noise=1000.0)
    lost = scene_scores.ask_tower(pictures, captions, "test", SETTING)
    assert lost["retrieval"].mean() < 0.3
    assert lost["twins"].mean() < 0.5
    means = scene_scores.ask_validation({"before": pictures}, captions)
    assert len(means) == 14


def test_whitening_makes_small_differences_count() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([100.0, 10.0, 1.0])
    rows = torch.randn(500, 3, generator=generator) * scale + 7
    captions = {str(number): row for number, row in enumerate(rows)}
    white = scene_scores.whitened(captions, list(captions))
    deviation = torch.stack(list(white.values())).std(dim=0)
    # variances 10,000, 100 and 1; a tenth of their mean, 337, is added to each
    expected = [(1 / 338) ** 0.5, (100 / 437) ** 0.5, (10_000 / 10_337) ** 0.5]
    assert sorted(deviation.tolist()) == pytest.approx(expected, rel=0.1)


def test_random_words_share_what_captions_share(folder, towers, tmp_path) -> None:
    def cosine(one: str, other: str) -> float:
        rows = [scene_words.embed_words(text, 4000, seed=0) for text in (one, other)]
        return float(torch.cosine_similarity(*rows, dim=0))

    scene = "a red apple left of an ox"
    # of five vectors: two names anywhere, two at their place, the relation
    assert cosine(scene, "an ox left of a red apple") == pytest.approx(0.6, abs=0.05)
    assert cosine(scene, "a red apple left of a cat") == pytest.approx(0.6, abs=0.05)
    assert cosine(scene, "a bat above a cat") == pytest.approx(0, abs=0.05)
    with pytest.raises(ValueError, match="none of the relations left of, above"):
        scene_words.embed_words("a cat", 4, seed=0)
    raw = folder.parent / "cache" / "raw"
    scene_words.write_words(folder, raw, tmp_path / "words", seed=1)
    cache = EmbeddingCache.open(tmp_path / "words")
    test = {"test": open_split(folder, "test")}
    captions = scene_scores.scene_captions(test, cache)
    training = {"twins": open_split(folder, "twins")}
    captions |= scene_scores.scene_captions(training, cache)
    asked = read_split(folder, "test") | read_scenes(folder / "twins-000.tar")
    for scene, (_, about) in asked.items():
        expected = scene_words.embed_words(text_of(about), WIDTH, seed=1)
        assert torch.allclose(captions[scene].float(), expected, atol=0.01)


def test_both_scores_are_adjusted_together() -> None:
    rng = np.random.default_rng(0)
    scores = {}
    for seed in range(3):
        base = {"retrieval": rng.uniform(size=80), "twins": np.zeros(40)}
        scores[f"permuted-seed{seed}"] = base
        better = base["retrieval"] + 0.1 + 0.01 * rng.normal(size=80)
        scores[f"tuned-seed{seed}"] = {**base, "retrieval": better}
    pairs_of = {
        "retrieval": [str(number // 4) for number in range(80)],
        "twins": [str(number // 2) for number in range(40)],
    }
    rows = scene_scores.compare_scores(scores, pairs_of)
    assert [row["score"] for row in rows] == ["retrieval", "twins"]
    assert [row["significant"] for row in rows] == [True, False]
    assert rows[0]["p_adjusted"] == pytest.approx(2 * rows[0]["p"])
    assert scene_scores.comparisons_table(rows).count("not shown") == 1
    # towers that were trained with twins are a family of their own
    for seed in range(3):
        scores[f"permuted-twins-seed{seed}"] = scores[f"permuted-seed{seed}"]
        scores[f"tuned-twins-seed{seed}"] = scores[f"tuned-seed{seed}"]
    with_twins = scene_scores.compare_scores(scores, pairs_of)
    assert with_twins[:2] == rows
    compared = [(row["score"], row["base"], row["new"]) for row in with_twins[2:]]
    assert compared == [
        ("retrieval", "permuted-twins", "tuned-twins"),
        ("retrieval", "tuned", "tuned-twins"),
        ("twins", "permuted-twins", "tuned-twins"),
        ("twins", "tuned", "tuned-twins"),
    ]
    assert with_twins[2]["p_adjusted"] == pytest.approx(4 * with_twins[2]["p"])
    assert with_twins[3]["difference"] == 0


def test_towers_of_scenes_differ_in_their_cache_alone(tmp_path) -> None:
    for cache in (
        "raw",
        "random",
        "tuned-seed3",
        "permuted-seed3",
        "map-seed3",
        "words-seed3",
    ):
        (tmp_path / "data" / "cache" / cache).mkdir(parents=True)
    arms = ("permuted", "words", "raw", "tuned", "map", "random", "raw-twins")
    commands = started(
        tmp_path,
        f"PRESET=gate; . {PARTS}/gate_parts.sh; . {PARTS}/scenes_parts.sh; "
        f"for a in {' '.join(arms)}; do scenes_arm $a 3; done",
    )
    settings = set()
    trained = [command for command in commands if "scripts/train_tower.py" in command]
    for arm, command in zip(arms, trained, strict=True):
        cache = scene_scores.cache_name(f"{arm}-seed3")
        assert value(command, "--cache") == f"data/cache/{cache}"
        assert value(command, "--kinds") == "short"
        assert "--augment.no-flip" in command
        words = " ".join(command).replace(value(command, "--cache"), "")
        words = words.replace(f"{arm}-seed3", "")
        if arm == "raw-twins":
            assert value(command, "--data") == "data/all/twins-*.tar"
            assert value(command, "--shuffle-window") == "1"
            words = words.replace("/twins-", "/train-")
            words = words.replace(" --shuffle-window 1", "")
        settings.add(words)
    assert len(settings) == 1


def test_the_caches_of_scenes_are_made_of_the_right_teachers(tmp_path) -> None:
    (tmp_path / "data" / "reading").mkdir(parents=True)
    commands = started(
        tmp_path,
        f"PRESET=gate; . {PARTS}/gate_parts.sh; . {PARTS}/scenes_parts.sh; "
        "NEUTRAL_LAYER=28; mkdir -p gate/llm gate/reading; neutral_captions gate; "
        "for a in permuted map words; do scenes_cache $a 3; shown $(cache_of $a 3); done",
    )
    (
        neutral,
        tuned,
        permuted,
        name,
        raw,
        stage_1,
        linear,
        map_name,
        _,
        words,
        words_name,
    ) = commands
    assert value(neutral, "--llm") == "gate/llm"
    assert value(neutral, "--layer") == "28"
    assert value(tuned, "--adapter") == "data/llm/seed3/adapter"
    assert value(permuted, "--cache") == "data/cache/tuned-seed3"
    assert "--splits train twins" in " ".join(permuted)
    assert value(permuted, "--output") == "data/cache/permuted-seed3"
    assert name == ["permuted-seed3"]
    assert value(raw, "--cache") == "data/cache/raw"
    assert value(stage_1, "--cache") == "data/captions"
    assert value(linear, "--output") == "data/cache/map-seed3"
    assert map_name == ["map-seed3"]
    assert value(words, "--output") == "data/cache/words-seed3"
    assert words_name == ["words-seed3"]


@pytest.fixture(scope="module")
def towers(folder) -> Path:
    """Towers of two arms, which nothing trained, below out/, and the tower before stage 2; caches
    beside the scenes."""
    data = folder.parent
    tuned = dataclasses.replace(IDENTITY, llm="tuned", weights_sha256="1")
    write_cache(folder, data / "cache" / "neutral")
    write_cache(folder, data / "cache" / "raw")
    write_cache(folder, data / "cache" / "tuned-seed0", tuned)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Dinov2Config(**sizes, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(data / "tiny")
    dual_config = DualConfig(projection_dim=8, llm_width=WIDTH, pool="cls")
    for name, identity in (("raw-seed0", IDENTITY), ("tuned-seed0", tuned)):
        dual = DualEncoder(load_tower(data / "tiny"), dual_config)
        path = data / "out" / "towers" / name
        export_tower(dual, path, origin="tiny", teacher=dataclasses.asdict(identity))
        write_run(data / "out", name)
    return data / "out"


def test_every_tower_is_asked_for_the_same_captions(towers) -> None:
    data = towers.parent
    table = scene_scores.make_report(data, towers, data / "tiny", validation=True)
    assert "validation scenes" in table
    assert not (towers / "scenes.json").exists()
    table = scene_scores.make_report(data, towers, data / "tiny")
    record = json.loads((towers / "scenes.json").read_text())
    assert record["steps"] == 50
    # the same weights, asked for the same captions
    means = record["means"]
    assert means["raw-seed0"] == means["tuned-seed0"] == means["before"]
    compared = [
        (row["score"], row["base"], row["new"]) for row in record["comparisons"]
    ]
    assert compared == [("retrieval", "raw", "tuned"), ("twins", "raw", "tuned")]
    for score, setting in record["settings"].items():
        best = max(record["validation"], key=lambda row: row[score])
        assert setting == {"pool": best["pool"], "penalty": best["penalty"]}
    assert "| fine-tuned LLM | 1 |" in table


def test_a_tower_of_another_teacher_is_refused(towers, tmp_path) -> None:
    data = towers.parent
    (tmp_path / "towers").mkdir()
    (tmp_path / "towers" / "raw-seed0").symlink_to(towers / "towers" / "tuned-seed0")
    write_run(tmp_path, "raw-seed0")
    with pytest.raises(ContractError, match="has embeddings of"):
        scene_scores.make_report(data, tmp_path, data / "tiny")
