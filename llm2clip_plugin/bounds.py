"""The numbers that options take: what lies outside is a mistake, and is refused before any work
starts."""

import os
from typing import Any

# of a number without bounds of its own: a trillion of anything is a slip of the keyboard
LARGEST = 10**12
INT64 = 2**63 - 1
COUNT = 2**31 - 1
GIB = 2**30
PER_CORE = 4  # worker processes for each core: more only wait for each other
ALWAYS = 8  # worker processes that any machine may be asked for
WORKER_BYTES = GIB // 4  # that a worker process needs at least

# Last part of a field -> lowest and highest value. What a command refuses in more detail, its
# settings say.
BOUNDS: dict[str, tuple[float, float]] = {
    "seed": (0, INT64),
    "num_train_epochs": (0, 1e6),
    "max_steps": (-1, COUNT),
    "warmup_steps": (0, COUNT),
    "ddp_timeout": (1, 1e7),
    "timeout": (0, 1e7),
    "betas": (0, 1),
    "lr": (0, 10),
    "head_lr": (0, 10),
    "weight_decay": (0, 10),
    "max_broken": (0, 1),
    **dict.fromkeys(("batch", "batch_size"), (1, 2**20)),
    **dict.fromkeys(("global_batch", "micro_batch"), (0, 2**24)),
    **dict.fromkeys(("limit", "show", "images"), (0, LARGEST)),
    "temperature": (0, 100),
    "top_p": (0, 1),
    **dict.fromkeys(
        ("max_tokens", "max_new_tokens", "num_beams", "concurrency"), (1, 2**20)
    ),
    "tokens_per_batch": (0, COUNT),
    **dict.fromkeys(("layer", "select_layer"), (-1024, 1024)),
    **dict.fromkeys(("adapter_blocks", "freeze_first_blocks"), (0, 1024)),
    "adapter_expansion": (1, 1024),
    **dict.fromkeys(("llm_width", "lora_rank", "r"), (0, 2**17)),
    "projection_dim": (1, 2**17),
    "image_size": (0, 2**14),
    "logit_scale_init": (-100, 100),
    "logit_bias_init": (-1000, 1000),
    **dict.fromkeys(("input_noise", "projection_init_std"), (0, 1000)),
    "decode_margin": (0, 100),
    "components": (0, 2**17),
}
# fields that count processes
PROCESSES = (
    "workers",
    "dataloader_num_workers",
    "gpus",
    "num_gpus",
)


def check_number(option: str, field: str, value: Any) -> None:
    """Raise ValueError for a field's number, or one in its tuple, that is out of bounds."""
    if isinstance(value, tuple):
        for item in value:
            check_number(option, field, item)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    name = field.rpartition(".")[2]
    low, high = BOUNDS.get(name, (-LARGEST, LARGEST))
    where = ""
    if name in PROCESSES:
        low = 0
        high = most_processes()
        where = f" on this machine, with {cores()} cores and {memory() / GIB:.1f} GiB of memory"
    if not low <= value <= high:
        raise ValueError(
            f"{option} {value} is out of range; expected {_shown(low)} to {_shown(high)}{where}"
        )


def _shown(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:.15g}"


def most_processes() -> int:
    """Worker processes that this machine can run: more would take its memory, and with it the
    machine."""
    return max(ALWAYS, min(PER_CORE * cores(), memory() // WORKER_BYTES))


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
