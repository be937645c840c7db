"""Compare models on the same questions, from score files or other evaluators' logs. Needs NumPy
alone, no torch.

>>> from llava_integration.compare import build, load_side, page, text          # doctest: +SKIP
>>> # folders of logs, or files
>>> sides = [load_side(Path("logs/base")), load_side(Path("logs/new"), "ours")]
>>> comparison = build(sides)               # paired t tests over images, Holm over all rows
>>> print(text(comparison))                 # Markdown
>>> Path("compare.html").write_text(page(comparison, sides))
"""

from llava_integration.evaluator.compare.comparison import build
from llava_integration.evaluator.compare.page import page
from llava_integration.evaluator.compare.report import text
from llava_integration.evaluator.compare.sides import load_side

__all__ = ["build", "load_side", "page", "text"]
