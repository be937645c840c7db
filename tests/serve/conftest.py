"""Vision-language models as fixtures."""

from tiny_vlm import built, llms

__all__ = ["built", "llms"]
