"""Pages are shown as meant, their links lead somewhere, and what they say about open lists is
complete."""

import re
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from llm2clip_plugin.stages.settings import TEACHERS
from llm2clip_plugin.stages.tower_config import RECIPES

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS]


def parse(text: str) -> list[Token]:
    """The blocks of a page, as GitHub reads it."""
    return MarkdownIt("commonmark").enable("table").parse(text)


def shown_text(inline: Token) -> str:
    """What a reader sees of a heading or paragraph."""
    return "".join(part.content for part in inline.children or [])


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings; those of a repeated heading are
    numbered."""
    blocks = parse(text)
    names: set[str] = set()
    for opening, inline in pairwise(blocks):
        if opening.type != "heading_open":
            continue
        name = re.sub(r"[^\w\- ]", "", shown_text(inline).lower()).replace(" ", "-")
        repeated = sum(
            re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None
            for other in names
        )
        names.add(f"{name}-{repeated}" if repeated else name)
    return names


def links(text: str) -> list[str]:
    """Where a page's links and pictures lead, those in HTML included."""
    targets: list[str] = []
    for block in parse(text):
        for part in block.children or [block]:
            target = part.attrGet("href") or part.attrGet("src")
            if target:
                targets.append(str(target))
            if part.type in ("html_block", "html_inline"):
                targets += re.findall(r'(?:href|src|srcset)="([^"]+)"', part.content)
    return targets


def table_problems(text: str) -> list[str]:
    """Lines of tables with other cells than the header has, and tables that are shown as text."""
    lines = text.splitlines()
    problems: list[str] = []
    for block in parse(text):
        if block.type == "table_open":
            first, end = block.map
            rows = lines[first:end]
            problems += [row for row in rows if cells(row) != cells(rows[0])]
        elif block.type == "inline":
            problems += [
                line for line in block.content.splitlines() if line.startswith("|")
            ]
    return problems


def cells(row: str) -> int:
    """How many cells a line of a table has, 0 if it is no row. Bars in code count, too, as on
    GitHub."""
    row = row.strip()
    if not (row.startswith("|") and row.endswith("|")):
        return 0
    return len(re.findall(r"(?<!\\)\|", row)) - 1


def unclosed(text: str) -> list[str]:
    """First lines of code blocks that do not end."""
    lines = text.splitlines()
    fences = [block for block in parse(text) if block.type == "fence"]
    return [
        lines[block.map[0]]
        for block in fences
        if lines[block.map[1] - 1].strip() != block.markup
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_shown_as_meant(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert table_problems(text) == []
    assert unclosed(text) == []
    for link in links(text):
        if not link.startswith(("http://", "https://", "mailto:")):
            name, _, anchor = link.partition("#")
            target = (page.parent / unquote(name)).resolve() if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(
                target.read_text(encoding="utf-8")
            ), f"no heading for {link}"


CODE = [
    path
    for folder in ("llm2clip_plugin", "llava_integration", "scripts")
    for ending in ("*.py", "*.sh", "*.sbatch")
    for path in (ROOT / folder).rglob(ending)
]
# experiments whose scripts are gone, with their commits
HISTORY = ("benchmarks.md", "decisions.md", "log.md", "CHANGELOG.md")


def test_pages_that_code_names_are_there() -> None:
    """With the headings that it names; LLaVA has names in capitals."""
    wrong = []
    for path in CODE:
        text = path.read_text(encoding="utf-8")
        for page, anchor in re.findall(r"\b(docs/[a-z-]+\.md)(?:#([\w-]+))?", text):
            target = ROOT / page
            if not target.exists():
                wrong.append(f"{path}: {page}")
            elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
                wrong.append(f"{path}: {page}#{anchor}")
    assert wrong == []


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in HISTORY],
    ids=lambda page: page.name,
)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """Those of scripts/ and tests/, but those of LLaVA's own scripts/."""
    named = re.findall(
        r"(?<![\w/.-])(?:scripts|tests)/[\w./-]*\w", page.read_text(encoding="utf-8")
    )
    missing = {path for path in named if not list(ROOT.glob(f"{path}*"))}
    assert missing <= {"scripts/merge_lora_weights.py"}


def test_what_a_broken_page_is_told() -> None:
    table = "| a | b |\n|---|---|\n| 1 | 2 |\n"
    assert table_problems(table + "\nText after it.\n") == []
    assert table_problems(table + "Text after it.\n") == ["Text after it."]
    assert table_problems(table + "| 1 |\n| `x|y` | 2 |\n") == [
        "| 1 |",
        "| `x|y` | 2 |",
    ]
    assert table_problems("| a | b |\n|---|\n| 1 | 2 |\n") == [
        "| a | b |",
        "|---|",
        "| 1 | 2 |",
    ]
    assert unclosed("```bash\nls\n```\n") == []
    assert unclosed("```bash\nls\n") == ["```bash"]
    assert anchors("# A `b`: c?\n\n## A b c\n") == {"a-b-c", "a-b-c-1"}
    assert links("[a](b.md) ![c](d.png)\n\n```\n[e](f.md)\n```\n") == ["b.md", "d.png"]
    assert links(
        '<picture>\n<source srcset="a.png">\n</picture>\n\nb <img src="c.png">\n'
    ) == [
        "a.png",
        "c.png",
    ]


def test_every_page_is_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS if f"docs/{page.name}" not in readme] == []


def test_licenses_of_every_recipe():
    text = (ROOT / "docs" / "licenses.md").read_text(encoding="utf-8")
    assert [name for name in [*RECIPES, *TEACHERS] if f"`{name}`" not in text] == []
