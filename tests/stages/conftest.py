"""Tiny LLMs, and a tiny tower with data and a cache, as fixtures."""

from pathlib import Path

import pytest
from compiled import graphs
from tiny_data import make_all
from tiny_llm import any_llm, llama, make_llm

__all__ = ["any_llm", "graphs", "llama", "make_llm"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_all(tmp_path_factory.mktemp("tiny"))
