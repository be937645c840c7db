"""Silence what libraries say and nobody can act on. Imports a library only where it is loaded."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' bars ("Loading weights", "Writing model shards") and warnings. For
    loading and saving: we compare what was loaded with the file ourselves, and the bars last
    milliseconds."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def quiet_peft() -> None:
    """Silence peft about an attribute that transformers renamed."""
    warnings.filterwarnings(
        "ignore", message=r".*is_gradient_checkpointing.*", category=FutureWarning
    )


def quiet_deepspeed() -> None:
    """Silence DeepSpeed's informational log and the renamed functions of torch.distributed that it
    calls."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed"
    )


def _mute(logger: str, pattern: str) -> None:
    """Silence a logger's records whose message has the pattern."""
    logging.getLogger(logger).addFilter(
        lambda record: not re.search(pattern, record.getMessage())
    )


def quiet_libraries() -> None:
    """Silence what nobody can act on: DeepSpeed about a machine without a GPU, bitsandbytes about a
    kernel of the Hub, torch's DataLoader about more ``--workers`` than cores."""
    _mute("DeepSpeed", "Setting accelerator to CPU")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", message="This DataLoader will create", category=UserWarning
    )


def quiet_llava_loading() -> None:
    """Silence transformers about a LLaVA checkpoint's copy of its tower, which LLaVA reads from the
    tower's own folder. Other weights that are not used, or not there, are still warned of. Bars are
    for terminals."""
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_utils").addFilter(_is_not_about_the_tower)


def _is_not_about_the_tower(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    # of transformers 5: a row per name, or per pattern of names, below a head
    if "LOAD REPORT" in text:
        return bool(
            re.search(
                r"^(?!Key |model\.vision_tower\.[^|]*\| UNEXPECTED)[^|\n]+\|",
                text,
                re.MULTILINE,
            )
        )
    if "were not used when initializing Llava" not in text:
        return True
    names = re.findall(r"'([^']+)'", text.partition("\n")[0].partition("[")[2])
    return not all(name.startswith("model.vision_tower.") for name in names)


def quiet_llava() -> None:
    """Silence what LLaVA's training makes other libraries warn about: old names, memory that a
    machine without a GPU cannot pin, the LLM's type, a config without vocabulary for saved LoRA
    weights, DeepSpeed's own accumulation."""
    quiet_deepspeed()
    warnings.filterwarnings(
        "ignore", r".*gradient_checkpointing(_enable)?` is deprecated", FutureWarning
    )
    _mute("accelerate.accelerator", "Gradient accumulation steps mismatch")
    warnings.filterwarnings(
        "ignore",
        r"Passing the following arguments to `Accelerator` is deprecated",
        FutureWarning,
    )
    warnings.filterwarnings(
        "ignore",
        r"'pin_memory' argument is set as true but no accelerator is found",
        UserWarning,
    )
    warnings.filterwarnings(
        "ignore",
        r"Could not find a config file in .* vocabulary was not modified",
        UserWarning,
    )
    _mute("transformers.configuration_utils", "to instantiate a model of type `?llava")
