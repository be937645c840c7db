"""Pretraining draws its samples in the order of transformers 4: accelerate would draw them with a seed of its own."""

import functools
from types import ModuleType
from typing import Any

from llava_integration.compat.completion import Completion


def complete(module: ModuleType) -> None:
    """Make the trainer leave the order to torch's ``RandomSampler``, which the seed of the run governs."""
    trainer = module.LLaVATrainer
    original = trainer.create_accelerator_and_postprocess

    @functools.wraps(original, assigned=("__name__", "__qualname__", "__doc__"))
    def create_accelerator_and_postprocess(self: Any) -> None:
        self.args.accelerator_config.use_seedable_sampler = False
        original(self)

    trainer.create_accelerator_and_postprocess = create_accelerator_and_postprocess


COMPLETION = Completion(
    module="llava.train.llava_trainer", when="after", libraries={"transformers": ">=5"}, complete=complete
)
