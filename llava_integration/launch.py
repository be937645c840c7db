"""``python -m llava_integration.launch MODULE_OR_SCRIPT ...``: run LLaVA where ``.pth`` files are not read.

For ``pip install --target``, ``python -S`` and zip imports: activates the start-up hook, then runs the module or script
as ``python -m`` or ``python SCRIPT`` would. With DeepSpeed's launcher:
``deepspeed --module llava_integration.launch llava.train.train --deepspeed zero2.json ...``
"""

import os
import runpy
import sys

from llava_integration import boot


def main(argv: list[str]) -> None:
    """Run ``argv[0]``, a module's name or a script's path, with the rest as its arguments."""
    ranks = [word for word in argv[:1] if word.startswith(("--local_rank=", "--local-rank="))]  # DeepSpeed's launcher
    words = argv[len(ranks) :]
    if not words or words[0].startswith("-"):
        raise SystemExit("usage: python -m llava_integration.launch MODULE_OR_SCRIPT ...")
    boot.install()
    target, sys.argv[1:] = words[0], [*ranks, *words[1:]]
    if target.endswith(".py") or os.path.sep in target:
        sys.argv[0] = target
        sys.path[0] = os.path.dirname(os.path.abspath(target))  # as `python SCRIPT` does
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
