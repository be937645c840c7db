"""Tiny LLMs, and a tiny tower with data and a cache, as fixtures."""

from compiled import graphs
from tiny_data import tiny
from tiny_llm import any_llm, llama, make_llm

__all__ = ["any_llm", "graphs", "llama", "make_llm", "tiny"]
