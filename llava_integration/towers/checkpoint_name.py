"""LLaVA decides by words in a checkpoint's folder name how to load it; checked before anything is loaded.

``load_pretrained_model`` takes a folder without "llava" in its name for a language model without images, one without
"lora" for a projector, and one with "mpt" or "mistral" for a model of that kind.
"""

import json
import sys
from pathlib import Path
from typing import Any

WORD, LORA, OTHERS = "llava", "lora", ("mpt", "mistral")


def model_name(path: str) -> str:
    """The name that LLaVA's get_model_name_from_path derives from a path: its last part, with that above checkpoint-N.

    >>> model_name("runs/llava-7b/checkpoint-100/")
    'llava-7b_checkpoint-100'
    """
    parts = path.strip("/").split("/")
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


def refuse_name(path: str, *, base: str | None = None, name: str | None = None) -> None:
    """Raise ValueError if LLaVA would load the checkpoint at ``path`` as another kind of model than it is.

    ``base``: the base model that is given with it; ``name``: in place of the folder's. Paths without a LLaVA
    checkpoint's config.json are left to LLaVA.
    """
    config = config_of(path)
    if "mm_vision_tower" not in config and not str(config.get("model_type")).startswith(WORD):
        return
    given = model_name(str(path)) if name is None else name
    has_lora = (Path(path).expanduser() / "adapter_config.json").is_file()
    what = ""
    if WORD not in given.lower():
        what = f'without "{WORD}" in its name as a language model that sees no images'
    elif has_lora and base and LORA not in given.lower():
        what = f'without "{LORA}" in its name, given a base model, as a projector'
    elif config.get("model_type") == "llava_llama":
        what = next((f'with "{word}" in its name as a {word} model' for word in OTHERS if word in given.lower()), "")
    if what:
        better = "llava-lora-1" if has_lora else "llava-1"
        raise ValueError(
            f"LLaVA loads a folder {what}, but {path} ({given!r}) is a LLaVA checkpoint; rename it, such as to {better}"
        )


def warn_about(output: str) -> None:
    """Print a line if LLaVA would not load the checkpoint that a training will write to ``output``."""
    if output and WORD not in model_name(output).lower():
        told = f"--output_dir {output} has no {WORD!r} in its name, by which LLaVA decides how to load a checkpoint"
        print(f"llm2clip: warning: {told}; rename it before evaluating", file=sys.stderr)


def config_of(path: str) -> dict[str, Any]:
    """A checkpoint's config.json; {} without one, for a Hub id and for a damaged file, which loading will refuse."""
    try:
        config = json.loads((Path(path).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
