"""Tiny LLMs as fixtures."""

from tiny_llm import any_llm, llama, make_llm

__all__ = ["any_llm", "llama", "make_llm"]
