"""LLaVA passes ``tokenizer=`` to its trainer, which transformers 5 calls ``processing_class=``."""

from types import ModuleType
from typing import Any

from llava_integration.compat.completion import Completion


def complete(module: ModuleType) -> None:
    """Make ``LLaVATrainer`` accept ``tokenizer``, and read it as ``trainer.tokenizer``."""
    trainer = module.LLaVATrainer
    original = trainer.__init__

    def __init__(self: Any, *arguments: Any, **options: Any) -> None:  # noqa: N807 - is set as that method
        if "tokenizer" in options:
            options["processing_class"] = options.pop("tokenizer")
        original(self, *arguments, **options)

    trainer.__init__ = __init__
    trainer.tokenizer = property(lambda self: self.processing_class)


COMPLETION = Completion(
    module="llava.train.llava_trainer", when="after", libraries={"transformers": ">=5"}, complete=complete
)
