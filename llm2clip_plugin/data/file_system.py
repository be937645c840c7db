"""Where a path is: on a local disk, on a file system over a network, or at a URL."""

import os
import re

from llm2clip_plugin.data.sources.urls import is_url

MOUNTS = "/proc/self/mounts"
NETWORK = (  # types of file systems over a network, as /proc/mounts writes them; fuse.* in addition
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "9p", "afs", "glusterfs", "orangefs", "pvfs2",
    "panfs", "wekafs", "virtiofs", "fuse", "davfs", "ocfs2", "gfs2", "quobyte", "pfs",
)  # fmt: skip
LOCAL_FUSE = ("fuseblk", "fuse.mergerfs", "fuse.fuse-overlayfs", "fuse.ntfs-3g")


def file_system(path: str, mounts: str = MOUNTS) -> str:
    """Type of the file system that holds ``path``, as in /proc/mounts; "url" for a URL, "" if unknown."""
    if is_url(path):
        return "url"
    real = os.path.realpath(path)
    try:
        with open(mounts, encoding="utf-8", errors="replace") as file:
            lines = [line.split() for line in file]
    except OSError:
        return ""
    best, kind = "", ""
    for _, point, name, *_ in lines:
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point)
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # the last of several mounts at one place is on top
            best, kind = point, name
    return kind


def is_network(path: str, mounts: str = MOUNTS) -> bool:
    """Whether ``path`` is a URL, or on a file system over a network."""
    kind = file_system(path, mounts)
    return kind == "url" or kind in NETWORK or (kind.startswith("fuse.") and kind not in LOCAL_FUSE)
