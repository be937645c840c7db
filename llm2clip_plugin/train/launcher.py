"""What the launcher says about this process; without torch."""

import os


def local_world_size() -> int:
    """Number of ranks on this machine as set by DeepSpeed's or torch's launcher; 1 without a launcher."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
