"""No import hook sees LLaVA's training program, which ``python -m llava.train.train`` and DeepSpeed's launcher run as
``__main__``: what completes ``llava.train.train`` after its execution runs when the program makes its trainer.
"""

import functools
import os
import sys
from types import ModuleType
from typing import Any

from llava_integration.compat import runner
from llava_integration.compat.completion import Completion

PROGRAM = "llava.train.train"


def complete(module: ModuleType) -> None:
    """Make ``LLaVATrainer(...)`` complete the program that it is called by."""
    trainer = module.LLaVATrainer
    original = trainer.__init__
    file = os.path.join(os.path.dirname(str(module.__file__)), "train.py")

    @functools.wraps(original)
    def __init__(self: Any, *arguments: Any, **options: Any) -> None:  # noqa: N807 - is set as that method
        main = sys.modules["__main__"]
        if os.path.realpath(getattr(main, "__file__", None) or "") == os.path.realpath(file):
            runner.run(main, "after", name=PROGRAM)
        original(self, *arguments, **options)

    trainer.__init__ = __init__


COMPLETION = Completion(
    module="llava.train.llava_trainer", when="after", libraries={"transformers": ">=5"}, complete=complete
)
