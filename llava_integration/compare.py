"""Compare models on the same questions: the public name of ``evaluator.compare``. Needs no torch.

>>> from llava_integration.compare import build, load_side, page, text          # doctest: +SKIP
"""

from llava_integration.evaluator.compare import build, load_side, page, text

__all__ = ["build", "load_side", "page", "text"]
