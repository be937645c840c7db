import hashlib
import json
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from data_world import jpeg, write_tar

from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.loader import PairLoader
from llm2clip_plugin.data.pairs import PairDataset
from llm2clip_plugin.data.samples import (
    DEFAULT_FIELDS,
    Caption,
    caption_hash,
    caption_shares,
    choose_caption,
    hash_hex,
    parse_fields,
    parse_weights,
    read_captions,
)
from llm2clip_plugin.data.sources import Source, SourceConfig, check_kinds, open_source


def test_fields_give_kind_and_language() -> None:
    fields = parse_fields(("txt=short", "detailed=long", "legende=short:fr"), "en")
    values = {
        "txt": " a dog \n",
        "detailed": "a brown dog on grass",
        "legende": "un chien",
        "url": "ignored",
    }
    assert read_captions(values, fields)[0] == (
        Caption("a dog", "short", "en"),
        Caption("a brown dog on grass", "long", "en"),
        Caption("un chien", "short", "fr"),
    )


def test_lists_objects_and_languages_are_read() -> None:
    fields = parse_fields(("captions=short", "names=short"), "en")
    values = {
        "captions": [
            "one",
            "two",
            {"text": "a long one", "kind": "long"},
            {"text": "Hund", "language": "de"},
        ],
        "names": {"fr": "chien", "en": "dog"},
    }
    foreign = (Caption("Hund", "short", "de"), Caption("chien", "short", "fr"))
    expected = (
        Caption("one"),
        Caption("two"),
        Caption("a long one", "long"),
        *foreign,
        Caption("dog"),
    )
    assert read_captions(values, fields)[0] == expected


def test_repeated_and_empty_captions_are_left_out() -> None:
    fields = parse_fields(DEFAULT_FIELDS, "en")
    assert read_captions({"txt": "a cat\n", "caption": "a cat"}, fields) == (
        (Caption("a cat"),),
        0,
    )
    assert read_captions({"captions": ["", "  ", "text", None]}, fields) == (
        (Caption("text"),),
        2,
    )


def test_lone_surrogates_become_text_that_utf8_can_hold() -> None:
    values = {
        "txt": {"d\ud83d": "a \ud83d\ude00 and \ud83d"},
        "caption": {"text": "b", "kind": "k\ud83d"},
    }
    captions, _ = read_captions(
        values, parse_fields(("txt=short", "caption=short"), "en")
    )
    assert captions == (
        Caption("a \U0001f600 and \ufffd", "short", "d\ufffd"),
        Caption("b", "k\ufffd", "en"),
    )


@pytest.mark.parametrize(
    "fields", [("caption",), ("=short",), ("caption=",), (), ("a=short", "a=long")]
)
def test_misspelled_fields_are_refused(fields: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="caption field"):
        parse_fields(fields, "en")


def test_caption_hash_is_the_start_of_sha256_as_a_signed_number() -> None:
    for text in ("a", "b", "c", "ß", ""):
        assert -(1 << 63) <= caption_hash(text) < 1 << 63
        assert (
            hash_hex(caption_hash(text))
            == hashlib.sha256(text.encode()).hexdigest()[:16]
        )


MANY = (
    Caption("a", "short"),
    Caption("b", "short"),
    Caption("c", "short"),
    Caption("d", "long"),
)
EVENLY = parse_weights(("short=1", "long=1"))


def test_a_kind_has_its_weight_whatever_the_number_of_its_captions() -> None:
    assert caption_shares(MANY, EVENLY) == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    assert caption_shares(MANY, parse_weights(("short=3", "long=1"))) == pytest.approx(
        [1 / 4] * 4
    )
    # this sample has no long one
    assert caption_shares(MANY[:2], EVENLY) == pytest.approx([1 / 2, 1 / 2])
    assert caption_shares(MANY, {}) == [1 / 4] * 4
    rng = random.Random(0)
    drawn = Counter(choose_caption(MANY, EVENLY, rng).text for _ in range(6000))
    # standard deviations: sqrt(6000 / 4) = 39 and sqrt(6000 x 5 / 36) = 29
    assert abs(drawn["d"] - 3000) < 160
    assert all(abs(drawn[text] - 1000) < 120 for text in "abc")


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """20 samples with three short captions, one long and one of a kind of its own."""
    members = []
    for number in range(20):
        captions = [f"short {number} {letter}" for letter in "abc"]
        tags = [{"text": f"tags {number}", "kind": "tags"}]
        meta = {"captions": captions, "long_caption": f"long {number}", "caption": tags}
        members += [
            (f"{number:03}.jpg", jpeg(number)),
            (f"{number:03}.json", json.dumps(meta).encode()),
        ]
    write_tar(tmp_path / "0.tar", members)
    return open_source(SourceConfig(path=str(tmp_path)))


def test_training_draws_by_kind_the_same_on_any_ranks_and_workers(
    source: Source,
) -> None:
    dataset = PairDataset(
        [source], [None], ImageConfig(size=8), seed=1, caption_weights=EVENLY
    )
    texts = [
        text
        for batch in islice(PairLoader(dataset, local_batch=20), 20)
        for text in batch["captions"]
    ]
    kinds = Counter(text.split()[0] for text in texts)
    # of 400; standard deviation 10
    assert kinds.keys() == {"short", "long"}
    assert abs(kinds["long"] - 200) < 50
    ranks = [
        PairLoader(dataset, local_batch=10, rank=rank, world=2, workers=rank)
        for rank in range(2)
    ]
    steps = zip(*(islice(loader, 3) for loader in ranks), strict=True)
    assert [
        text for step in steps for batch in step for text in batch["captions"]
    ] == texts[:60]


def test_unknown_kinds_are_refused(source: Source) -> None:
    check_kinds([source], {})
    # no field declares tags, a caption has it
    check_kinds([source], parse_weights(("short=1", "long=1", "tags=2")))
    with pytest.raises(
        ValueError,
        match="name the kinds lnog, which the data does not have; known: long, short, tags",
    ):
        check_kinds([source], parse_weights(("short=1", "lnog=1")))
