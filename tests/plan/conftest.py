"""A tiny LLM as a fixture."""

from tiny_llm import llama

__all__ = ["llama"]
