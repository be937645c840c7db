"""A tiny tower with data and a cache, as a fixture."""

from tiny_data import tiny

__all__ = ["tiny"]
