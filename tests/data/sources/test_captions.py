import hashlib

import pytest

from llm2clip_plugin.data.samples import DEFAULT_FIELDS, Caption, caption_hash, hash_hex, parse_fields, read_captions


def test_fields_give_kind_and_language() -> None:
    fields = parse_fields(("txt=short", "detailed=long", "legende=short:fr"), "en")
    values = {"txt": " a dog \n", "detailed": "a brown dog on grass", "legende": "un chien", "url": "ignored"}
    assert read_captions(values, fields)[0] == (
        Caption("a dog", "short", "en"),
        Caption("a brown dog on grass", "long", "en"),
        Caption("un chien", "short", "fr"),
    )


def test_lists_objects_and_languages_are_read() -> None:
    fields = parse_fields(("captions=short", "names=short"), "en")
    values = {
        "captions": ["one", "two", {"text": "a long one", "kind": "long"}, {"text": "Hund", "language": "de"}],
        "names": {"fr": "chien", "en": "dog"},
    }
    assert read_captions(values, fields)[0] == (
        Caption("one"),
        Caption("two"),
        Caption("a long one", "long"),
        Caption("Hund", "short", "de"),
        Caption("chien", "short", "fr"),
        Caption("dog"),
    )


def test_repeated_and_empty_captions_are_left_out() -> None:
    fields = parse_fields(DEFAULT_FIELDS, "en")
    assert read_captions({"txt": "a cat\n", "caption": "a cat"}, fields) == ((Caption("a cat"),), 0)
    assert read_captions({"captions": ["", "  ", "text", None]}, fields) == ((Caption("text"),), 2)


def test_lone_surrogates_become_text_that_utf8_can_hold() -> None:
    values = {"txt": {"d\ud83d": "a \ud83d\ude00 and \ud83d"}, "caption": {"text": "b", "kind": "k\ud83d"}}
    captions, _ = read_captions(values, parse_fields(("txt=short", "caption=short"), "en"))
    assert captions == (Caption("a \U0001f600 and \ufffd", "short", "d\ufffd"), Caption("b", "k\ufffd", "en"))


@pytest.mark.parametrize("fields", [("caption",), ("=short",), ("caption=",), (), ("a=short", "a=long")])
def test_misspelled_fields_are_refused(fields: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="caption field"):
        parse_fields(fields, "en")


def test_caption_hash_is_the_start_of_sha256_as_a_signed_number() -> None:
    for text in ("a", "b", "c", "ß", ""):
        assert -(1 << 63) <= caption_hash(text) < 1 << 63
        assert hash_hex(caption_hash(text)) == hashlib.sha256(text.encode()).hexdigest()[:16]
