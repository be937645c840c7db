"""``LLaVATrainer._get_train_sampler(self)`` is called with the data set by transformers 5."""

from types import ModuleType
from typing import Any

from llava_integration.compat.completion import Completion


def complete(module: ModuleType) -> None:
    """Make the method accept the data set, which is always that of the trainer."""
    trainer = module.LLaVATrainer
    original = trainer._get_train_sampler

    def _get_train_sampler(self: Any, train_dataset: Any = None) -> Any:
        return original(self)

    trainer._get_train_sampler = _get_train_sampler


COMPLETION = Completion(
    module="llava.train.llava_trainer", when="after", libraries={"transformers": ">=5"}, complete=complete
)
