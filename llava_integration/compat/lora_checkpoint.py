"""LoRA checkpoints that LLaVA's own environment reads.

peft 0.10 refuses an adapter_config.json with settings that it does not know; newer versions write all of theirs, at
their defaults too. And an unfrozen tower's weights in non_lora_trainables.bin have other names there: see `saving`.
"""

import functools
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from llava_integration.compat.completion import Completion
from llava_integration.compat.saving import names_of_4

KNOWN = frozenset(  # to peft 0.10
    """alpha_pattern auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights
    layer_replication layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout megatron_config
    megatron_core modules_to_save peft_type r rank_pattern revision target_modules task_type use_dora
    use_rslora""".split()
)


def complete(module: ModuleType) -> None:
    """Make both files what LLaVA's own environment reads.

    At the functions that write them: ``llava.train.train``, which calls these, runs as ``__main__``.
    """
    import torch
    from peft import LoraConfig

    save_config, save_tensors = LoraConfig.save_pretrained, torch.save

    @functools.wraps(save_config)
    def save_pretrained(self: Any, save_directory: str, **options: Any) -> None:
        save_config(self, save_directory, **options)
        drop_defaults(Path(save_directory) / "adapter_config.json", type(self)().to_dict())

    @functools.wraps(save_tensors)
    def save(tensors: Any, file: Any, *arguments: Any, **options: Any) -> None:
        if isinstance(file, (str, os.PathLike)) and Path(file).name == "non_lora_trainables.bin":
            tensors = names_of_4(tensors)
        save_tensors(tensors, file, *arguments, **options)

    LoraConfig.save_pretrained, torch.save = save_pretrained, save


def drop_defaults(file: Path, defaults: dict[str, Any]) -> None:
    """Remove settings that peft 0.10 does not know, unless they say something: then it must refuse them."""
    settings = json.loads(file.read_text())
    kept = {
        name: value
        for name, value in settings.items()
        if name in KNOWN or (name in defaults and value != defaults[name])
    }
    new = file.with_suffix(".new")
    new.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
    os.replace(new, file)


COMPLETION = Completion(
    module="llava.train.llava_trainer",
    when="after",
    libraries={"transformers": ">=5", "peft": ">=0.11"},
    complete=complete,
)
