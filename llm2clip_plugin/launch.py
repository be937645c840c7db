"""``python -m llm2clip_plugin.launch --nproc_per_node N [-m] PROGRAM ...``: torchrun on one host,
without open ports.

Torchrun keeps a store that listens on all interfaces, even with ``--standalone``, and unpickles
what it reads there. Here it meets itself in a file instead, and leaves the ranks' own store to
them, which they hold on the loopback interface (train/distributed.py). Runs in LLaVA's environment,
too.
"""

import os
import sys
import tempfile
from collections.abc import Sequence


def main(words: Sequence[str] | None = None) -> None:
    """Run torchrun with its ``words``; returns or exits as it does."""
    from torch.distributed.run import main as torchrun

    # the ranks' store is rank 0's, not the launcher's
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # as torchrun does, with three lines about it
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="llm2clip-") as folder:
        rendezvous = [
            "--rdzv-backend=c10d",
            "--rdzv-conf=store_type=file",
            f"--rdzv-endpoint={folder}/store",
        ]
        torchrun(
            [
                *rendezvous,
                "--local-addr=127.0.0.1",
                *(sys.argv[1:] if words is None else words),
            ]
        )


if __name__ == "__main__":
    main()
