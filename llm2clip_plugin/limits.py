"""What the machine allows a process: open files. Standard library only."""

import resource
import sys

# of a rank, whatever the number of shards: 64 tars, some files of libraries, and a few for each batch that a loader
# process has sent and the rank has not taken yet
OPEN_FILES_NEEDED = 1024


def raise_open_files() -> int:
    """Raise the soft limit of open files to the hard one; processes started from here inherit it. Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):  # macOS has a lower limit of its own
            return soft
    return hard if hard != resource.RLIM_INFINITY else sys.maxsize


def remedy_open_files(limit: int) -> str:
    """What to do about a limit of open files; "" if it is high enough."""
    if limit >= OPEN_FILES_NEEDED:
        return ""
    return f"raise the hard limit to at least {OPEN_FILES_NEEDED} (ulimit -Hn, limits.conf, docker run --ulimit nofile)"
