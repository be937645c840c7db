"""The gate: a ridge regression on what LLaVA reads, and the teachers that it needs."""

import dataclasses
import json
from pathlib import Path

import gate
import gate_caches
import inputs
import numpy as np
import pytest
import torch
from gate import Pictures, Setting
from quickstart_folders import IDENTITY, WIDTH, write_cache, write_run
from test_quickstart_parts import ROOT, started, value
from transformers import Dinov2Config, Dinov2Model

from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.towers import load_tower

PARTS = ROOT / "scripts" / "quickstart" / "parts.sh"
ARMS = [name for name in gate.ARMS if name != gate.BEFORE]
NEUTRAL = dataclasses.replace(IDENTITY, llm="neutral", weights_sha256="1")
SETTING = Setting(pool="mean", penalty=0.1)


def make_pictures(feature_NF: torch.Tensor, families: int) -> Pictures:
    """A training picture of each concept, whose families have equal sizes; kernels of features."""
    count = len(feature_NF)
    return Pictures(
        split=["train"] * count,
        concept=[f"concept {number}" for number in range(count)],
        family=[f"family {number % families}" for number in range(count)],
        kernels={"mean": gate.kernel(feature_NF)},
    )


def random_names(count: int, seed: int) -> gate.Names:
    """Names whose embeddings are random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"concept {number}": torch.randn(12, generator=generator)
        for number in range(count)
    }


def features_of(names: gate.Names, noise: float) -> torch.Tensor:
    """Features from which the names' embeddings follow linearly, but for the noise."""
    generator = torch.Generator().manual_seed(9)
    mixed = torch.randn(12, 20, generator=generator)
    clean_NF = torch.stack(list(names.values())) @ mixed
    return clean_NF + noise * torch.randn(clean_NF.shape, generator=generator)


def test_names_that_the_regression_never_saw_are_found_if_pictures_tell_them() -> None:
    names = random_names(120, seed=0)
    pictures = make_pictures(features_of(names, noise=0.5), families=40)
    found_N = gate.ask_halves(pictures, names, SETTING)
    other_N = gate.ask_halves(pictures, random_names(120, seed=1), SETTING)
    chance = np.mean(1 / np.arange(1, 61))
    assert found_N.mean() > 0.8
    assert other_N.mean() < 2 * chance
    assert found_N.shape == (120,)


def test_the_dual_form_is_the_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    feature_NF = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    feature_NF -= feature_NF.mean(dim=0)
    target_nW = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    fit = list(range(20))
    ask = list(range(20, 30))
    kernel_NN = feature_NF @ feature_NF.T
    dual_NW = gate.ridge(kernel_NN.float(), fit, ask, target_nW.float(), 0.3)
    fit_nF = feature_NF[fit]
    penalty = 0.3 * (fit_nF**2).sum() / 20
    gram_FF = fit_nF.T @ fit_nF + penalty * torch.eye(5, dtype=torch.float64)
    mean_W = target_nW.mean(dim=0)
    weight_FW = torch.linalg.solve(gram_FF, fit_nF.T @ (target_nW - mean_W))
    primal_NW = feature_NF[ask] @ weight_FW + mean_W
    assert torch.allclose(dual_NW.double(), primal_NW, atol=1e-5)


def test_families_are_in_one_half() -> None:
    pictures = make_pictures(torch.randn(60, 4), families=13)
    splits = [gate.halves(pictures, seed) for seed in range(3)]
    for one, other in splits:
        assert sorted(one + other) == list(range(60))
        assert abs(len(one) - len(other)) <= 10
        families_of_one = {pictures.family[number] for number in one}
        families_of_other = {pictures.family[number] for number in other}
        assert not families_of_one & families_of_other
    assert splits[0] != splits[1]


def test_equal_names_share_the_mean_of_their_ranks() -> None:
    names = dict.fromkeys(random_names(40, seed=0), torch.ones(12))
    names |= {"concept 0": torch.zeros(12), "concept 1": torch.zeros(12)}
    pictures = make_pictures(torch.randn(40, 4), families=40)
    ask = list(range(20, 40))
    score_N = gate.reciprocal_ranks(pictures, range(20), ask, names, SETTING)
    assert score_N == pytest.approx(1 / 10.5)


def test_comparisons_pair_seeds_and_are_adjusted_together() -> None:
    rng = np.random.default_rng(0)
    base = {seed: rng.uniform(size=90) for seed in range(3)}
    scores = {"before": rng.uniform(size=90)}
    for seed in range(3):
        scores[f"permuted-seed{seed}"] = base[seed]
        scores[f"tuned-seed{seed}"] = base[seed] + 0.1 + 0.01 * rng.normal(size=90)
    scores["raw-seed1"] = base[1] + 0.05 * rng.normal(size=90)
    families = [str(number // 3) for number in range(90)]
    rows = {
        (row["base"], row["new"]): row for row in gate.compare_arms(scores, families)
    }
    assert set(rows) == {("permuted", "tuned"), ("permuted", "raw"), ("raw", "tuned")}
    tuned = rows["permuted", "tuned"]
    assert tuned["seeds"] == [0, 1, 2]
    assert rows["permuted", "raw"]["seeds"] == [1]
    assert tuned["difference"] == pytest.approx(0.1, abs=0.01)
    assert tuned["interval"][0] < tuned["difference"] < tuned["interval"][1]
    assert tuned["significant"]
    assert not rows["permuted", "raw"]["significant"]
    assert all(row["p_adjusted"] >= row["p"] for row in rows.values())
    table = gate.comparisons_table(list(rows.values()))
    assert table.count("not shown") == 1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few concepts of each split in every style, and a teacher's cache of them."""
    folder = tmp_path_factory.mktemp("gate")
    inputs.prepare(folder, (5, 4, 3), ("de",))
    write_cache(folder / "all", folder / "cache" / "tuned-seed0")
    return folder


def test_permuted_embeddings_are_those_of_other_concepts(data, tmp_path) -> None:
    teacher = EmbeddingCache.open(data / "cache" / "tuned-seed0")
    output = tmp_path / "permuted-seed0"
    gate_caches.write_permuted(
        data / "all", data / "cache" / "tuned-seed0", output, seed=0
    )
    permuted = EmbeddingCache.open(output)
    assert permuted.fingerprint != teacher.fingerprint
    for split, count in (("train", 5), ("validation", 4)):
        source = gate_caches.open_split(data / "all", split)
        own = gate_caches.caption_embeddings(source, teacher)
        other = gate_caches.caption_embeddings(source, permuted)
        assert len(own) == count
        for kind in ("short", "long"):
            before = [own[concept][kind, "en"] for concept in sorted(own)]
            after = [other[concept][kind, "en"] for concept in sorted(own)]
            for one, new in zip(before, after, strict=True):
                assert not torch.equal(one, new)
                assert any(torch.equal(row, new) for row in before)
    # a picture in another style has the same
    shard = permuted.shard("train-twemoji")
    assert torch.equal(
        shard.embeddings([0]), permuted.shard("train-noto").embeddings([0])
    )
    again = tmp_path / "seed1"
    gate_caches.write_permuted(data / "all", data / "cache" / "tuned-seed0", again, 1)
    assert EmbeddingCache.open(again).fingerprint != permuted.fingerprint


def test_spelling_shares_what_words_share_and_nothing_of_what_they_mean(
    data, tmp_path
) -> None:
    def cosine(one: str, other: str) -> float:
        rows = [gate_caches.embed_letters(text, 4000, seed=0) for text in (one, other)]
        return float(torch.cosine_similarity(*rows, dim=0))

    assert gate_caches.letter_runs("cat") == [
        "<ca",
        "cat",
        "at>",
        "<cat",
        "cat>",
        "<cat>",
    ]
    assert cosine("cat face", "FACE cat") == pytest.approx(1)
    # runs: cat 6, face 9, tiger 12
    assert cosine("cat face", "tiger face") == pytest.approx(
        9 / (15 * 21) ** 0.5, abs=0.05
    )
    assert cosine("cat", "kitten") == pytest.approx(0, abs=0.05)
    raw = data / "cache" / "tuned-seed0"
    for seed in (0, 1):
        output = tmp_path / f"seed{seed}"
        gate_caches.write_spelling(data / "all", raw, output, seed)
    first, second = (EmbeddingCache.open(tmp_path / f"seed{seed}") for seed in (0, 1))
    assert first.fingerprint != second.fingerprint
    source = gate_caches.open_split(data / "all", "train")
    embeddings = gate_caches.caption_embeddings(source, first)
    rows = [
        row.float() for of_concept in embeddings.values() for row in of_concept.values()
    ]
    # without the mean over the captions of training
    assert torch.stack(rows).mean(dim=0).abs().max() < 0.01
    shard = first.shard("train-twemoji")
    assert torch.equal(shard.embeddings([0]), first.shard("train-noto").embeddings([0]))


def test_a_control_has_nothing_of_how_its_teacher_embeds_texts() -> None:
    teacher = dataclasses.asdict(IDENTITY) | {"adapter": "a", "post_file": "b"}
    identity = gate_caches.control_identity(teacher, "control", "seed 0")
    assert (identity.llm, identity.width) == ("control", WIDTH)
    assert (identity.adapter, identity.adapter_sha256, identity.post_file) == (
        "",
        "",
        "",
    )


def test_a_name_is_that_of_a_cycle_through_all() -> None:
    partner = gate_caches.exchanged(list("abcdefg"), seed=3)
    visited = ["a"]
    for _ in range(6):
        visited.append(partner[visited[-1]])
    assert sorted(visited) == list("abcdefg")
    assert gate_caches.exchanged(list("gfedcba"), seed=3) == partner


def test_towers_of_the_gate_differ_in_their_cache_alone(tmp_path) -> None:
    controls = ("gate/permuted-seed3", "gate/spelling-seed3")
    for cache in ("cache/random", "gate/neutral", *controls):
        (tmp_path / "data" / cache).mkdir(parents=True)
    gate_parts = PARTS.with_name("gate_parts.sh")
    commands = started(
        tmp_path,
        f"PRESET=gate; . {gate_parts}; neutral_names; for a in {' '.join(ARMS)}; do arm $a 3; done",
    )
    settings = set()
    for name, command in zip(ARMS, commands, strict=True):
        assert value(command, "--output") == f"{tmp_path}/out/runs/{name}-seed3"
        cache = Path(value(command, "--cache"))
        expected = gate.cache_folder(tmp_path / "data", f"{name}-seed3")
        assert (tmp_path / cache).resolve() == expected.resolve()
        words = " ".join(command).replace(value(command, "--cache"), "")
        settings.add(words.replace(f"{name}-seed3", ""))
        assert "--validation" not in command
    assert len(settings) == 1


def test_the_gates_own_caches_are_made_of_the_right_teachers(tmp_path) -> None:
    gate_parts = PARTS.with_name("gate_parts.sh")
    commands = started(
        tmp_path,
        f". {gate_parts}; NEUTRAL_LAYER=28; neutral_names; arm permuted 3; arm spelling 3",
    )
    llm, components, neutral, permuted, _, spelling, _ = commands
    assert llm[2:] == ["llm", "--output", "data/gate"]
    assert value(components, "--llm") == value(neutral, "--llm") == "data/gate/llm"
    assert value(components, "--layer") == value(neutral, "--layer") == "28"
    assert value(neutral, "--post-file").startswith(value(components, "--output"))
    assert value(neutral, "--output") == "data/gate/neutral"
    assert value(permuted, "--cache") == "data/cache/tuned-seed3"
    assert value(permuted, "--seed") == "3"
    assert spelling[2] == "spelling"
    assert value(spelling, "--cache") == "data/cache/raw"
    assert value(spelling, "--output") == "data/gate/spelling-seed3"


@pytest.fixture(scope="module")
def towers(data):
    """Towers of two arms, which nothing trained, below out/; and the tower before stage 2."""
    write_cache(data / "all", data / "cache" / "raw")
    write_cache(data / "all", data / "gate" / "neutral", NEUTRAL)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Dinov2Config(**sizes, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(data / "tiny")
    dual_config = DualConfig(projection_dim=8, llm_width=WIDTH, pool="cls")
    for name, identity in (("raw-seed0", IDENTITY), ("oracle-seed0", NEUTRAL)):
        dual = DualEncoder(load_tower(data / "tiny"), dual_config)
        path = data / "out" / "towers" / name
        teacher = dataclasses.asdict(identity)
        export_tower(dual, path, origin="tiny", teacher=teacher)
        write_run(data / "out", name)
    return data / "out"


def test_every_tower_is_asked_for_neutral_names_and_for_its_own(data, towers) -> None:
    table = gate.make_report(data, towers, data / "tiny")
    record = json.loads((towers / "gate.json").read_text())
    assert record["steps"] == 50
    # the same weights, asked for the same names
    neutral = record["neutral"]
    assert neutral.keys() == {"before", "raw-seed0", "oracle-seed0"}
    assert neutral["raw-seed0"] == neutral["before"] == neutral["oracle-seed0"]
    assert record["own"].keys() == {"raw-seed0", "oracle-seed0"}
    assert record["own"]["oracle-seed0"] == neutral["oracle-seed0"]
    best = max(record["validation"], key=lambda row: row[2])
    assert record["setting"] == {"pool": best[0], "penalty": best[1]}
    assert "| raw LLM, read well | 1 |" in table
    # what LLaVA reads: the patches of the block before the last
    sources = {"train": gate.open_split(data / "all", "train")}
    pictures = gate.read_pictures(data / "tiny", sources)
    assert len(pictures.concept) == 15
    assert pictures.kernels["patches"].shape == (15, 15)


def test_a_tower_of_another_teacher_or_of_other_steps_is_refused(
    data, towers, tmp_path
) -> None:
    (tmp_path / "towers").mkdir()
    for name, origin in (("oracle-seed1", "raw-seed0"), ("raw-seed0", "raw-seed0")):
        (tmp_path / "towers" / name).symlink_to(towers / "towers" / origin)
        write_run(tmp_path, name)
    with pytest.raises(ContractError, match="has embeddings of neutral"):
        gate.make_report(data, tmp_path, data / "tiny")
    (tmp_path / "towers" / "oracle-seed1").unlink()
    (tmp_path / "towers" / "raw-seed1").symlink_to(towers / "towers" / "raw-seed0")
    write_run(tmp_path, "raw-seed1")
    record = tmp_path / "runs" / "raw-seed1" / "run.json"
    record.write_text(record.read_text().replace('"max_steps": 50', '"max_steps": 200'))
    with pytest.raises(ContractError, match=r"towers of \[50, 200\] steps"):
        gate.make_report(data, tmp_path, data / "tiny")
    with pytest.raises(FileNotFoundError, match="no towers of"):
        gate.make_report(data, tmp_path / "other", data / "tiny")
