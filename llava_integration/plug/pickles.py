"""LLaVA's checkpoints have pickles (``mm_projector.bin``, ``non_lora_trainables.bin``), and LLaVA's
loader leaves it to torch whether code in them runs: before torch 2.6, it does."""

import pickle
from functools import wraps
from pathlib import Path
from typing import Any

from llm2clip_plugin.vision.directory import refused_pickle


def load_tensors_only() -> None:
    """Let ``torch.load`` in this process read tensors and nothing else, unless a caller asks for
    more. It then raises ContractError for other pickles, none of which is run."""
    import torch

    load = torch.load

    @wraps(load)
    def load_tensors(file: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return load(file, *arguments, **{"weights_only": True, **options})
        except pickle.UnpicklingError as error:
            raise refused_pickle(Path(str(file)), error) from error

    torch.load = load_tensors
