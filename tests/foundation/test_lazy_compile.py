"""Functions of other libraries are compiled when they are called."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from llm2clip_plugin.lazy_compile import import_without_compiler

DECORATED = """
import torch

@torch.compile
def plain(x):
    "Doubles."
    return 2 * x

@torch.compile(dynamic=False)
def with_options(x, *, more):
    return x + more

model = torch.compile(torch.nn.Identity())
"""


def test_decorated_functions_are_compiled_at_their_first_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compiled = []

    def compiler(function, **options):
        compiled.append((getattr(function, "__name__", "a module"), options))
        return function

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "decorated.py").write_text(DECORATED)
    import_without_compiler("decorated")
    decorated = sys.modules.pop("decorated")
    assert torch.compile is compiler and compiled == [("a module", {})]
    assert (decorated.plain.__name__, decorated.plain.__doc__) == ("plain", "Doubles.")
    assert [decorated.plain(3), decorated.plain(4), decorated.with_options(1, more=2)] == [6, 8, 3]
    assert compiled[1:] == [("plain", {}), ("with_options", {"dynamic": False})]


def test_what_is_not_installed_is_left_to_the_caller():
    compiler = torch.compile
    import_without_compiler("not_installed_anywhere")
    assert torch.compile is compiler
