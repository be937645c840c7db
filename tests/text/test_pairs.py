"""What is drawn as a pair, in what order, what is refused before training; the same in any number
of processes."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from llm2clip_plugin.data.sampler import sample_rng
from llm2clip_plugin.text.config import EncoderConfig, PairsConfig
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.pair_batches import (
    PairBatches,
    PairTokenizer,
    tokenized_batches,
)
from llm2clip_plugin.text.pairs import Pair, open_pairs, survey

NAMES = ["cat", "dog", "boat", "tree", "house", "lake", "wall", "bike"]


def write_captions(folder: Path, count: int = 32) -> Path:
    """Images with a name, a long caption, a list of keywords, and a family of four."""
    rows = []
    for i in range(count):
        texts = {
            "short": f"{NAMES[i % 8]} {i}",
            "long": f"a picture of a {NAMES[i % 8]} number {i}",
        }
        texts["keywords"] = f"one{i}, two{i}, three{i}, four{i}, five{i}"
        captions = [{"text": text, "kind": kind} for kind, text in texts.items()]
        rows.append(
            {
                "id": f"k{i}",
                "image": f"{i}.png",
                "family": f"f{i // 4}",
                "captions": captions,
            }
        )
    path = folder / "caps.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def batches(
    config: PairsConfig, *, rank: int = 0, world: int = 1, size: int = 8
) -> PairBatches:
    return PairBatches(config, seed=0, global_batch=size, rank=rank, world=world)


def test_every_sample_comes_once_per_epoch_with_the_selected_kinds(
    tmp_path: Path,
) -> None:
    path = write_captions(tmp_path)
    loader = batches(PairsConfig(data=(str(path),), pair_kinds=("short:long",)))
    pairs = [
        pair for position in range(0, 32, 8) for pair in loader.batch(position)["pairs"]
    ]
    assert sorted(pair.key for pair in pairs) == sorted(f"k{i}" for i in range(32))
    assert all(
        pair.positive.startswith("a picture of a")
        and pair.query in pair.positive.replace("number ", "")
        for pair in pairs
    )
    assert [pair.key for pair in pairs] != [f"k{i}" for i in range(32)]
    later = [
        pair.key
        for position in range(32, 64, 8)
        for pair in loader.batch(position)["pairs"]
    ]
    assert sorted(later) == sorted(pair.key for pair in pairs)
    assert later != [pair.key for pair in pairs]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_hold_the_rows_of_one_global_batch(tmp_path: Path, world: int) -> None:
    other = tmp_path / "other"
    other.mkdir()
    data = (str(write_captions(tmp_path)), str(write_captions(other, 16)))
    config = PairsConfig(
        data=data,
        pair_kinds=("short:long", "short:keywords=3"),
        lists=("keywords=2:4",),
    )
    of_one_rank = batches(config)
    many = [batches(config, rank=rank, world=world) for rank in range(world)]
    for position in range(0, 80, 8):
        whole = of_one_rank.batch(position)
        parts = [loader.batch(position) for loader in many]
        assert [pair for part in parts for pair in part["pairs"]] == whole["pairs"]
        for name in ("caption_hashes", "image_ids"):
            assert torch.equal(
                torch.cat([part[name] for part in parts], dim=-1), whole[name]
            )


def test_a_batch_has_one_source_and_one_kind(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    data = (str(write_captions(tmp_path)), str(write_captions(other, 16)))
    config = PairsConfig(
        data=data, weights=(1.0, 3.0), pair_kinds=("short:long", "short:keywords=3")
    )
    loader = batches(config)
    kinds = []
    sources = []
    for step in range(200):
        pairs = loader.batch(step * 8)["pairs"]
        long = {pair.positive.startswith("a picture") for pair in pairs}
        assert len(long) == 1
        kinds.append(long.pop())
        sources.append(loader.mixture.batch_indices(step * 8, 1)[0].source)
    assert 0.15 < sum(kinds) / 200 < 0.35  # one in four
    assert 0.45 < sum(sources) / 200 < 0.75  # 3 x 16 against 1 x 32: three in five


ROLES = {"pair_kinds": ("short:long", "long:short"), "mix_kinds": True}
INSTRUCTIONS = {"short": "Find a long one; ", "long": "Find a short one; "}


def test_either_caption_is_the_query_with_the_instruction_of_its_kind(
    tmp_path: Path,
) -> None:
    path = write_captions(tmp_path)
    texts = tuple(f"{kind}={text}" for kind, text in INSTRUCTIONS.items())
    config = PairsConfig(data=(str(path),), instructions=texts, **ROLES)
    long_queries = []
    for step in range(100):
        batch = batches(config).batch(step * 8)["pairs"]
        for pair in batch:
            long = pair.query.startswith("a picture")
            assert long is not pair.positive.startswith("a picture")
            assert pair.instruction == INSTRUCTIONS["long" if long else "short"]
        long_queries.append(sum(pair.query.startswith("a picture") for pair in batch))
    # 800 fair coins: 400 +- 14 is one sigma; a batch of one kind would have 0 or 8
    assert 340 < sum(long_queries) < 460
    assert sum(0 < count < 8 for count in long_queries) > 90


def test_a_random_negative_is_of_another_image_and_of_the_positives_kind(
    tmp_path: Path,
) -> None:
    config = PairsConfig(
        data=(str(write_captions(tmp_path, 8)),),
        group="family",
        random_negatives=True,
        **ROLES,
    )
    negatives = set()
    for step in range(100):
        for pair in batches(config).batch(step * 8)["pairs"]:
            number = int(pair.negative.split()[-1])
            assert number // 4 != int(pair.key[1:]) // 4  # two families of four
            assert pair.negative.startswith("a picture") is pair.positive.startswith(
                "a picture"
            )
            negatives.add(number)
    assert negatives == set(range(8))
    assert batches(config).batch(8)["pairs"] == batches(config).batch(8)["pairs"]
    rows = []
    for i in range(3):
        captions = [{"text": f"{i} {n}", "kind": "long"} for n in range(4)]
        rows.append({"id": f"k{i}", "image": "x.png", "captions": captions})
    # of which two are no pair's own texts
    (tmp_path / "four.jsonl").write_text("\n".join(map(json.dumps, rows)))
    four = PairsConfig(
        data=(str(tmp_path / "four.jsonl"),),
        pair_kinds=("long:same",),
        random_negatives=True,
    )
    pairs = [
        pair
        for step in range(20)
        for pair in batches(four, size=3).batch(3 * step)["pairs"]
    ]
    assert all(pair.negative.split()[0] != pair.key[1:] for pair in pairs)


def test_lists_give_some_of_their_items(tmp_path: Path) -> None:
    config = PairsConfig(
        data=(str(write_captions(tmp_path)),),
        pair_kinds=("short:keywords",),
        lists=("keywords=2:4",),
    )
    pairs = batches(config, size=32).batch(0)["pairs"]
    assert {len(pair.positive.split(", ")) for pair in pairs} == {2, 3, 4}
    first = [pair.positive.split(", ")[0] for pair in pairs]
    assert len({text.rstrip("0123456789") for text in first}) > 2  # in any order
    source = open_pairs(config)[0]
    drawn = {
        source.pair(3, source.kinds[0], sample_rng(0, epoch, 0, 3))
        for epoch in range(6)
    }
    assert len(drawn) > 2  # the choice changes from pass to pass


def test_group_and_equal_texts_have_equal_ids(tmp_path: Path) -> None:
    path = write_captions(tmp_path)
    batch = batches(PairsConfig(data=(str(path),), group="family"), size=32).batch(0)
    assert len(set(batch["image_ids"].tolist())) == 8
    assert (
        len(
            set(
                batches(PairsConfig(data=(str(path),)), size=32)
                .batch(0)["image_ids"]
                .tolist()
            )
        )
        == 32
    )
    rows = [
        {"query": "a", "positive": "b"},
        {"query": "c", "positive": "b"},
        {"query": "a", "positive": "d"},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    batch = batches(PairsConfig(data=(str(tmp_path / "pairs.jsonl"),)), size=3).batch(0)
    positives, queries = batch["caption_hashes"].tolist()
    assert len(set(positives)) == 2
    assert len(set(queries)) == 2


def test_sample_without_the_kind_is_replaced_alike_on_all_ranks(tmp_path: Path) -> None:
    path = write_captions(tmp_path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[::2]:
        row["captions"] = row["captions"][:1]
    path.write_text("\n".join(map(json.dumps, rows)))
    config = PairsConfig(data=(str(path),))
    whole = batches(config).batch(8)["pairs"]
    halves = [
        pair
        for rank in (0, 1)
        for pair in batches(config, rank=rank, world=2).batch(8)["pairs"]
    ]
    assert halves == whole
    assert all(int(pair.key[1:]) % 2 for pair in whole)


def test_text_pairs_with_hard_negatives(tmp_path: Path) -> None:
    rows = [
        {
            "query": f"q{i}",
            "positive": f"p{i}",
            "negative": f"n{i}",
            "instruction": "Find it: ",
        }
        for i in range(8)
    ]
    (tmp_path / "e5.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = PairsConfig(data=(str(tmp_path / "e5.jsonl"),))
    for pair in batches(config).batch(0)["pairs"]:
        assert (pair.query[1:], pair.query[1:]) == (
            pair.positive[1:],
            pair.negative[1:],
        )
        assert pair.instruction == "Find it: "


def test_a_line_without_a_positive_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"query": "a", "positive": "b"}\n{"query": "a", "answer": "b"}\n')
    config = PairsConfig(data=(str(bad),))
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2.*'positive'"):
        survey(open_pairs(config)[0])


@pytest.mark.parametrize("negatives", [False, True])
def test_any_number_of_processes_gives_the_same_batches(
    llama: Path, tmp_path: Path, negatives: bool
) -> None:
    rows = [{"query": f"a boat {i}", "positive": f"the boat {i}"} for i in range(40)]
    rows = (
        [{**row, "negative": f"no boat {i}"} for i, row in enumerate(rows)]
        if negatives
        else rows
    )
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    encoding = EncoderConfig(
        llm=str(llama), compute_dtype="float32", query_prompt="Query: ", max_tokens=12
    )
    encoder = CaptionEncoder(encoding, "cpu")
    config = PairsConfig(data=(str(tmp_path / "pairs.jsonl"),))
    made = []
    for workers in (0, 2):
        batches = PairBatches(config, seed=3, global_batch=8, rank=1, world=2)
        tokenizer = PairTokenizer(encoder.tokenizer, encoder.config)
        loaded = tokenized_batches(batches, tokenizer, position=16, workers=workers)
        made.append(list(islice(loaded, 5)))
        del loaded
    batches = PairBatches(config, seed=3, global_batch=8, rank=1, world=2)
    plain = [batches.batch(position) for position in range(16, 56, 8)]
    for without, with_workers, pairs in zip(*made, plain, strict=True):
        assert without["tokens"] == with_workers["tokens"]
        assert without["pairs"] == with_workers["pairs"] == pairs["pairs"]
        assert without["position"] == with_workers["position"] == pairs["position"]
        assert torch.equal(without["caption_hashes"], with_workers["caption_hashes"])
        assert without["tokens"]["query"] == encoder.tokenize(
            [pair.query for pair in pairs["pairs"]], query=True
        )
        assert without["tokens"]["positive"] == encoder.tokenize(
            [pair.positive for pair in pairs["pairs"]]
        )
        assert ("negative" in without["tokens"]) is negatives
    assert len(made[1]) == 5


def test_each_query_has_its_own_instruction_which_is_not_pooled(llama: Path) -> None:
    encoder = CaptionEncoder(
        EncoderConfig(llm=str(llama), query_prompt="Query: ", include_bos=False), "cpu"
    )
    pairs = [
        Pair("a", "a boat", "the boat"),
        Pair("b", "a boat", "the boat", instruction="Find a long caption; "),
    ]
    pairs.append(Pair("c", "a boat", "the boat", instruction=""))
    tokens = PairTokenizer(encoder.tokenizer, encoder.config)(pairs)
    batch = encoder.collate(tokens["query"], tokens["query_frame"])
    for row, text in enumerate(
        ("Query: a boat", "Find a long caption; a boat", "a boat")
    ):
        assert tokens["query"][row] == encoder.tokenizer(text)["input_ids"]
        pooled = batch.input_ids[row][batch.pool_mask[row]].tolist()
        assert encoder.tokenizer.decode(pooled).strip() == "a boat"
