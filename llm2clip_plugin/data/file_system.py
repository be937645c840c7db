"""Whether data is read over a network, and how many of its shards are then shuffled together.

A sample read at random opens its shard, unless the process has it open. Local disks sustain that; servers of network
file systems and URLs rarely do, so there the order goes by windows of shards, which stay open meanwhile.
"""

import os
import re
from collections.abc import Sequence

from llm2clip_plugin.data.sources.urls import is_url

MOUNTS = "/proc/self/mounts"
NETWORK = (  # types of file systems over a network, as /proc/mounts writes them; fuse.* in addition
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "9p", "afs", "glusterfs", "orangefs", "pvfs2",
    "panfs", "wekafs", "virtiofs", "fuse", "davfs", "ocfs2", "gfs2", "quobyte", "pfs",
)  # fmt: skip
LOCAL_FUSE = ("fuse.mergerfs", "fuse.fuse-overlayfs", "fuse.ntfs-3g")
NETWORK_WINDOW = 16  # shards; of 10,000 samples each: 160,000, dozens of global batches


def shuffle_window(configured: int, paths: Sequence[str], mounts: str = MOUNTS) -> int:
    """Shards that are shuffled together, 0 for whole sources: as configured, or, for -1, by where the data is."""
    if configured >= 0:
        return configured
    return NETWORK_WINDOW if any(is_network(path, mounts) for path in paths) else 0


def is_network(path: str, mounts: str = MOUNTS) -> bool:
    """Whether ``path`` is a URL, or on a file system over a network."""
    if is_url(path):
        return True
    real, best, kind = os.path.realpath(path), "", ""
    try:
        with open(mounts, encoding="utf-8", errors="replace") as file:
            lines = [line.split() for line in file]
    except OSError:
        return False
    for _, point, name, *_ in lines:
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point)
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # the last of several mounts at one place is on top
            best, kind = point, name
    return kind in NETWORK or (kind.startswith("fuse.") and kind not in LOCAL_FUSE)
