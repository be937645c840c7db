"""What other libraries print on a normal run, silenced by name and reason. Their errors are never silenced.

Everything here is called where it applies, not at import: no library is imported for its silence.
"""

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

TOWER = "model.vision_tower."  # names of its weights in a LLaVA checkpoint


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' bars ("Loading weights", "Writing model shards") and warnings.

    For loading and saving: we compare what was loaded with the file ourselves, and the bars last milliseconds.
    """
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
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
    warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing.*", category=FutureWarning)


def quiet_deepspeed() -> None:
    """Silence DeepSpeed's informational log and the renamed functions of torch.distributed that it calls.

    ``LLM2CLIP_DEEPSPEED_LOG=1`` keeps them.
    """
    if os.environ.get("LLM2CLIP_DEEPSPEED_LOG") != "1":
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def quiet_libraries() -> None:
    """Silence what nobody can act on: DeepSpeed about a machine without a GPU, bitsandbytes about a kernel of the Hub,
    torch's DataLoader about more ``--workers`` than cores."""
    logging.getLogger("DeepSpeed").addFilter(_is_not_about_the_cpu)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)


def _is_not_about_the_cpu(record: logging.LogRecord) -> bool:
    return "Setting accelerator to CPU" not in record.getMessage()


@contextmanager
def quiet_onnx() -> Iterator[None]:
    """Silence torch's ONNX exporter about a renamed class of torch's own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        yield


def quiet_llava_loading() -> None:
    """Silence transformers about a LLaVA checkpoint's copy of its tower, which LLaVA reads from the tower's own folder.

    Other weights that are not used, or not there, are still warned of. Bars are for terminals.
    """
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_utils").addFilter(_is_not_about_the_tower)


def _is_not_about_the_tower(record: logging.LogRecord) -> bool:
    first, _, table = record.getMessage().partition("\n")
    if "LOAD REPORT" in first:  # of transformers 5: a row per name, or per pattern of names
        rows = [row.split("|") for row in table.splitlines() if row.count("|") > 1][1:]  # below the head
        return not all(name.startswith(TOWER) and "UNEXPECTED" in status for name, status, *_ in rows)
    if "were not used when initializing Llava" not in first:
        return True
    names = re.findall(r"'([^']+)'", first.partition("[")[2])
    return not all(name.startswith(TOWER) for name in names)


def quiet_llava() -> None:
    """Silence what LLaVA's training makes other libraries warn about: old names that LLaVA and the trainer of its
    transformers use, memory that a machine without a GPU cannot pin, the type of the language model it extends, a
    config that peft asks the Hub for when LoRA weights are saved, which have no vocabulary, and gradient accumulation,
    which is DeepSpeed's own there."""
    quiet_deepspeed()
    warnings.filterwarnings("ignore", r".*gradient_checkpointing(_enable)?` is deprecated", FutureWarning)
    logging.getLogger("accelerate.accelerator").addFilter(
        lambda record: "Gradient accumulation steps mismatch" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", r"Passing the following arguments to `Accelerator` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", r"'pin_memory' argument is set as true but no accelerator is found", UserWarning)
    warnings.filterwarnings("ignore", r"Could not find a config file in .* vocabulary was not modified", UserWarning)
    logging.getLogger("transformers.configuration_utils").addFilter(
        lambda record: not re.search("to instantiate a model of type `?llava", record.getMessage())
    )
