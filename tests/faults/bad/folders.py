"""Folders of pictures, and folders that a command would replace."""

from bad.planted import (
    DEEP,
    Case,
    copy,
    directory,
    link,
    pictures,
    pipe,
    png_header,
    raw,
    text,
)

MAKE = "data make {t}/photos --output {t}/new"
THESIS = text("mine/thesis.tex", "years of work")
FOREIGN = "{t}/mine...thesis.tex..."

CASES = [
    Case("empty folder", MAKE, "...{t}/photos...", (directory("photos"),)),
    Case("no captions", MAKE, "...captions...", (pictures(captions=False),)),
    Case(
        "blank captions",
        MAKE,
        "...captions...",
        (pictures(captions=False), *(text(f"photos/{n}.txt", " \n") for n in range(3))),
    ),
    Case(
        "caption in Latin-1",
        MAKE,
        "...",
        (pictures(count=1, captions=False), text("photos/0.txt", "naïve", "latin-1")),
    ),
    Case(
        "deep JSON beside every picture",
        MAKE,
        "...",
        (pictures(count=1, captions=False), text("photos/0.json", DEEP)),
    ),
    Case(
        "list beside every picture",
        MAKE,
        "...",
        (pictures(count=1, captions=False), text("photos/0.json", "[1]")),
    ),
    Case(
        "pictures of zero bytes",
        MAKE,
        "...",
        (raw("photos/0.png", b""), text("photos/0.txt", "a")),
    ),
    Case(
        "pictures that are texts",
        MAKE,
        "...",
        (text("photos/0.png", "hello"), text("photos/0.txt", "a")),
    ),
    Case(
        "picture of 10^10 pixels",
        MAKE,
        "...",
        (raw("photos/0.png", png_header(100_000, 100_000)), text("photos/0.txt", "a")),
    ),
    Case(
        "named pipe as picture",
        MAKE,
        "...",
        (text("photos/0.txt", "a"), pipe("photos/0.png")),
    ),
    Case(
        "named pipe as caption",
        MAKE,
        "...",
        (pictures(count=1, captions=False), pipe("photos/0.txt")),
    ),
    Case(
        "endless device as picture",
        MAKE,
        "...",
        (text("photos/0.txt", "a"), link("photos/0.png", "/dev/zero")),
    ),
    Case(
        "endless device as caption",
        MAKE,
        "...",
        (pictures(count=1, captions=False), link("photos/0.txt", "/dev/zero")),
    ),
    Case(
        "caption that is a link to elsewhere",
        MAKE,
        "...",
        (
            pictures(count=1, captions=False),
            text("secret.txt", "my password"),
            link("photos/0.txt", "{t}/secret.txt"),
        ),
    ),
    Case(
        "picture that is a link to elsewhere",
        MAKE,
        "...",
        (
            pictures("other", 1),
            text("photos/0.txt", "a"),
            link("photos/0.png", "{t}/other/0.png"),
        ),
    ),
    Case(
        "folder that is a link to elsewhere",
        MAKE,
        "...",
        (pictures("other", 2), directory("photos"), link("photos/in", "{t}/other")),
    ),
    Case(
        "output is the pictures",
        "data make {t}/photos --output {t}/photos --overwrite",
        "...{t}/photos...",
        (pictures(),),
    ),
    Case(
        "pictures inside the output",
        "data make {t}/photos/sub --output {t}/photos --overwrite",
        "...{t}/photos...",
        (pictures("photos/sub"),),
    ),
    Case(
        "data make over a thesis",
        "data make {t}/photos --output {t}/mine --overwrite",
        FOREIGN,
        (pictures(), THESIS),
    ),
    Case(
        "data split over a thesis",
        "data split {w}/data --validation 0.3 --output {t}/mine --overwrite",
        FOREIGN,
        (THESIS,),
    ),
    Case(
        "llava data over a thesis",
        "llava data {w}/data --output {t}/mine --overwrite",
        FOREIGN,
        (THESIS,),
    ),
    Case(
        "export over a thesis",
        "export {w}/run --output {t}/mine --overwrite",
        FOREIGN,
        (THESIS,),
    ),
    Case(
        "import over a thesis",
        "import {w}/tower --output {t}/mine --overwrite",
        FOREIGN,
        (THESIS,),
    ),
    Case(
        "export-llm over a thesis",
        "export-llm --llm {w}/llm --output {t}/mine --overwrite",
        FOREIGN,
        (THESIS,),
    ),
    Case(
        "vlm build over a thesis",
        "vlm build --tower {w}/tower --llm {w}/llm --output {t}/mine --overwrite",
        FOREIGN,
        (THESIS,),
    ),
    Case(
        "a thesis inside what export wrote",
        "export {w}/run/tower --output {t}/mine --overwrite",
        FOREIGN,
        (copy("run/tower", "mine"), THESIS),
    ),
    Case(
        "output is a file",
        "data make {t}/photos --output {t}/photos/0.txt",
        "--output {t}/photos/0.txt exists and would be lost; ...",
        (pictures(),),
    ),
    Case(
        "output below a file",
        "data make {t}/photos --output {t}/photos/0.txt/new",
        "...{t}/photos/0.txt...",
        (pictures(),),
    ),
    Case(
        "output that is not UTF-8",
        "data make {t}/photos --output {t}/n\\xe9w",
        "...",
        (pictures(),),
    ),
    Case(
        "workers below 0", MAKE + " --workers -1", "...workers...-1...", (pictures(),)
    ),
    Case(
        "workers without measure",
        MAKE + " --workers 100000",
        "...workers...100000...",
        (pictures(),),
    ),
    Case(
        "background of no color",
        MAKE + " --background puce",
        "...puce...white...",
        (pictures(),),
    ),
    Case(
        "data split of one sample",
        "data split {t}/one.jsonl --image-folder {w}/pictures --validation 0.5 --output {t}/new",
        "...",
        (text("one.jsonl", '{"image": "0.png", "caption": "a"}\n'),),
    ),
    Case(
        "nothing held out",
        "data split {w}/data --validation 0.0001 --output {t}/new",
        "...validation...",
        (),
    ),
    Case(
        "everything held out",
        "data split {w}/data --validation 0.9999 --output {t}/new",
        "...validation...",
        (),
    ),
    Case(
        "split by a field that is not there",
        "data split {w}/data --validation 0.3 --by nofield --output {t}/new",
        "...nofield...",
        (),
    ),
    Case(
        "table of outputs as data",
        "data check {t}/new.html",
        "...{t}/new.html...",
        (text("new.html", "<html>"),),
    ),
    Case(
        "a shard that is a text",
        "data check {t}/d",
        "...{t}/d/00000.tar: no tar, compressed, truncated or damaged...",
        (text("d/00000.tar", "hello" * 500),),
        status=1,
    ),
    Case(
        "a shard of zero bytes",
        "data check {t}/d",
        "...{t}/d/00000.tar: no tar...empty file...",
        (raw("d/00000.tar", b""),),
        status=1,
    ),
    Case(
        "braces that match nothing",
        "data check {w}/data/{00007..00009}.tar",
        "...no file at {w}/data/00007.tar",
        (),
        status=1,
    ),
    Case(
        "wildcard that matches nothing",
        "data check {w}/data/x*.tar",
        "...no file at {w}/data/x*.tar",
        (),
        status=1,
    ),
    Case(
        "max-broken of 2",
        "data check {w}/data --max-broken 2",
        "...max-broken...2...",
        (),
    ),
    Case("show -1", "data check {w}/data --show -1", "...show...-1...", ()),
    Case(
        "captions for LLaVA of a field that is not there",
        "llava data {w}/data --fields nothing=short --output {t}/new",
        "...nothing...",
        (),
    ),
]
