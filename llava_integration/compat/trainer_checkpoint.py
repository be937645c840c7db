"""``LLaVATrainer._save_checkpoint(model, trial, metrics)`` calls that of transformers 5, which takes no ``metrics``.

Pretraining writes its projector into ``checkpoint-N`` by itself; in 4.37 the trainer's state makes the folder.
"""

import os
from types import ModuleType
from typing import Any

from llava_integration.compat.completion import Completion


def complete(module: ModuleType) -> None:
    """Drop ``metrics``, and make the folder that pretraining writes into."""
    trainer = module.LLaVATrainer
    base = trainer.__mro__[1]
    original = trainer._save_checkpoint

    def _save_checkpoint(self: Any, model: Any, trial: Any = None, metrics: Any = None) -> None:
        if getattr(self.args, "tune_mm_mlp_adapter", False):
            folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            os.makedirs(folder, exist_ok=True)
            original(self, model, trial)
        else:
            base._save_checkpoint(self, model, trial)

    trainer._save_checkpoint = _save_checkpoint


COMPLETION = Completion(
    module="llava.train.llava_trainer", when="after", libraries={"transformers": ">=5"}, complete=complete
)
