"""Keep libraries' remarks about things that this package has settled off the terminal."""

from __future__ import annotations

import logging
import warnings


def quiet_adapters() -> None:
    """peft asks after a renamed attribute of transformers, bitsandbytes after kernels from the Hub: neither matters."""
    warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing.*", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
