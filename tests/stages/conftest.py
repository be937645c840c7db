"""Tiny LLMs, a tiny tower with data and a cache, and a run of stage 1, as fixtures."""

from compiled import graphs
from llm_runs import captions, plain
from tiny_data import tiny
from tiny_llm import any_llm, llama, make_llm

__all__ = ["any_llm", "captions", "graphs", "llama", "make_llm", "plain", "tiny"]
