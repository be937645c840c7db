"""Commands whose options are the fields of nested dataclasses: one declaration gives names, parser,
checks, --help. docs/options.md has the names that all commands share."""

from llm2clip_plugin.options.parser import Command, NoOptions
from llm2clip_plugin.options.paths import check_paths
from llm2clip_plugin.options.setting import leaves_of, section, setting
from llm2clip_plugin.options.text import changed_options, command, unknown

__all__ = [
    "Command",
    "NoOptions",
    "changed_options",
    "check_paths",
    "command",
    "leaves_of",
    "section",
    "setting",
    "unknown",
]
