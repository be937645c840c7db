"""Commands that documentation and messages show: their options exist."""

import ast
import re
from pathlib import Path

from llm2clip_plugin.cli import COMMANDS, OPTIONS, load

ROOT = Path(__file__).parents[2]


def known_options(name: str) -> set[str]:
    """The options that the help of a command lists."""
    command = load(OPTIONS[name])
    return {
        f"--{option}"
        for option in (*command.options.values(), *command.extras, "help", "help-all")
    }


def shown_commands() -> list[tuple[str, str]]:
    """(where, command line) in documentation and in the texts of the code; lines that end in a
    backslash joined."""
    lines = []
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        spans = [*re.findall(r"`([^`\n]+)`", text), *text.split("\n")]
        lines += [(path.name, span) for span in spans]
    for path in (
        *ROOT.glob("llm2clip_plugin/**/*.py"),
        *ROOT.glob("llava_integration/**/*.py"),
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                text = ""
                for part in node.values:
                    text += part.value if isinstance(part, ast.Constant) else "X"
                lines.append((path.name, text))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines += [(path.name, line) for line in node.value.split("\n")]
    start = re.compile(
        r"(?:llm2clip|llm2clip_plugin\.cli) ((?:[a-z]+[a-z-]*)(?: [a-z]+)?)"
    )
    commands = []
    for where, text in lines:
        match = start.search(text)
        if match:
            commands.append((where, text[match.start() :]))
    return commands


def test_every_option_after_a_command_exists():
    """Also of names that --help does not show: documentation and messages use the names that it
    shows."""
    unknown = []
    seen = 0
    for where, line in shown_commands():
        words = re.split(r"(?:llm2clip|llm2clip_plugin\.cli) ", line, maxsplit=1)[
            1
        ].split()
        name = next(
            (" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in COMMANDS), ""
        )
        if not name:
            continue
        line = re.split(r"[`#|;)]| -- ", line, maxsplit=1)[0]
        for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*", line):
            seen += 1
            option = option.rstrip(".").replace("--no-", "--")
            options = known_options(name)
            if option not in options and not option.startswith("--vision_tower"):
                unknown.append(f"{where}: llm2clip {name} {option}")
    assert seen > 50, "\n".join(unknown)
    assert not unknown, "\n".join(unknown)
