"""Tables, and lists of samples in JSON."""

from bad.planted import DEEP, Case, directory, pictures, raw, text

MAKE = "data make {t}/photos/t.csv --output {t}/new"
CHECK = "data check {t}/photos/t.jsonl"
LINE = '{"image": "0.png", "caption": "a bird"}\n'


def table(content: str, encoding: str = "utf-8", name: str = "t.csv"):
    return (pictures(captions=False), text(f"photos/{name}", content, encoding))


CASES = [
    Case(
        "comma without quotes",
        MAKE,
        "{t}/photos/t.csv, line 2: ...",
        table("image,caption\n0.png,a red, round thing\n1.png,b\n"),
    ),
    Case(
        "quote that is not closed",
        MAKE,
        "{t}/photos/t.csv...line 2...",
        table('image,caption\n0.png,"a red thing\n1.png,b\n2.png,c\n'),
    ),
    Case(
        "text after a closing quote",
        MAKE,
        "{t}/photos/t.csv...line 2...",
        table('image,caption\n0.png,"a red" thing\n1.png,b\n'),
    ),
    Case(
        "two columns of one name",
        MAKE,
        "{t}/photos/t.csv...caption...",
        table("image,caption,caption\n0.png,a,b\n"),
    ),
    Case("zero bytes", MAKE, "{t}/photos/t.csv is empty...", table("")),
    Case(
        "a header alone",
        MAKE,
        "{t}/photos/t.csv...no rows...",
        table("image,caption\n"),
    ),
    Case(
        "Latin-1",
        MAKE,
        "{t}/photos/t.csv...UTF-8...iconv...",
        table("image,caption\n0.png,naïve\n", "latin-1"),
    ),
    Case(
        "UTF-16",
        MAKE,
        "{t}/photos/t.csv...UTF-8...iconv...",
        table("image,caption\n0.png,a\n", "utf-16"),
    ),
    Case(
        "caption of 131,073 characters",
        MAKE,
        "{t}/photos/t.csv, line 2...",
        table(f"image,caption\n0.png,{'a' * 131_073}\n"),
    ),
    Case(
        "no image column",
        MAKE,
        "{t}/photos/t.csv...image...name, caption...",
        table("name,caption\n0.png,a\n"),
    ),
    Case(
        "too few fields",
        MAKE,
        "{t}/photos/t.csv, line 3...",
        table("image,caption\n0.png,a\n1.png\n"),
    ),
    Case(
        "zero bytes within",
        MAKE,
        "{t}/photos/t.csv...",
        table("image,caption\n0.png,a\0b\n"),
    ),
    Case(
        "pictures that are not there",
        MAKE,
        "...",
        table("image,caption\nx.png,a\ny.png,b\n"),
    ),
    Case(
        "a folder named as a table",
        MAKE,
        "no pictures in {t}/photos/t.csv...",
        (pictures(), directory("photos/t.csv")),
    ),
    Case(
        "column of captions that is not there",
        MAKE + " --fields title=short",
        "{t}/photos/t.csv has no caption column...title...columns: image, caption",
        table("image,caption\n0.png,a\n"),
    ),
    Case(
        "only blanks as captions",
        MAKE,
        "none of the 2 files in {t}/photos/t.csv can be used: 0.png: no caption...",
        table("image,caption\n0.png,\u00a0\n1.png, \n"),
    ),
    Case(
        "a picture outside the folder",
        MAKE,
        "...",
        table("image,caption\n../../secret.png,a\n"),
    ),
    Case("an absolute path", MAKE, "...", table("image,caption\n/etc/passwd,a\n")),
    Case(
        "a table of its own output",
        "data make {t}/photos/t.csv --output {t}/photos",
        "{t}/photos...",
        table("image,caption\n0.png,a\n"),
    ),
    Case(
        "JSON with one name twice",
        CHECK,
        "...line 1: ...the name 'caption' twice...",
        table('{"image": "0.png", "caption": "a", "caption": "b"}\n', name="t.jsonl"),
        status=1,
    ),
    Case(
        "line that is no JSON",
        CHECK,
        "...line 2: is not valid JSON...",
        table(LINE + "{nonsense\n", name="t.jsonl"),
        status=1,
    ),
    Case(
        "line that is a list",
        CHECK,
        "...line 2: contains a list, expected an object",
        table(LINE + "[1, 2]\n", name="t.jsonl"),
        status=1,
    ),
    Case(
        "deep JSON",
        CHECK,
        "...line 2: ...nested too deep",
        table(LINE + DEEP + "\n", name="t.jsonl"),
        status=1,
    ),
    Case(
        "caption that is a number",
        CHECK,
        "...caption field 'caption' has type int; expected...",
        table('{"image": "0.png", "caption": 5}\n', name="t.jsonl"),
        status=1,
    ),
    Case(
        "image that is a number",
        CHECK,
        "...no image path in field 'image'",
        table('{"image": 5, "caption": "a"}\n', name="t.jsonl"),
        status=1,
    ),
    Case(
        "no image field",
        CHECK,
        "...line 1: no image path in field 'image'",
        table('{"file": "0.png", "caption": "a"}\n', name="t.jsonl"),
        status=1,
    ),
    Case("empty .jsonl", CHECK, "{t}/photos/t.jsonl...", table("", name="t.jsonl")),
    Case(
        "one key twice",
        CHECK + " --key-field id",
        "...1 keys are those of several samples...",
        table('{"id": 1, "image": "0.png", "caption": "a"}\n' * 2, name="t.jsonl"),
        status=0,
    ),
    Case(
        "image field that is not there",
        CHECK + " --image-field picture",
        "...no image path in field 'picture'",
        table(LINE, name="t.jsonl"),
        status=1,
    ),
    Case(
        "compressed .jsonl",
        "data check {t}/t.jsonl.gz",
        "cannot determine the format of {t}/t.jsonl.gz; ...",
        (raw("t.jsonl.gz", b"\x1f\x8b" + bytes(40)),),
    ),
    Case(
        "format that is not known",
        CHECK + " --format parquet",
        "unknown ...'parquet'; known: ...",
        table(LINE, name="t.jsonl"),
    ),
    Case(
        "parquet",
        "data check {t}/t.parquet",
        "cannot determine the format of {t}/t.parquet; ...",
        (raw("t.parquet", b"PAR1" + bytes(40)),),
    ),
    Case(
        "fields without a kind",
        CHECK + " --fields =short",
        "...=short...",
        table(LINE, name="t.jsonl"),
    ),
    Case(
        "languages that no caption has",
        CHECK + " --languages xx",
        "...no caption of the selected kinds and languages",
        table(LINE, name="t.jsonl"),
        status=1,
    ),
]
