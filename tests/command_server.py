"""Reads a command's words per line (JSON), runs ``llm2clip WORDS`` in a forked process, answers with its output."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile

SECONDS = 300  # of a command; then it is killed


def child(words: list[str], output: int) -> None:
    """Run the command with its output in a file, and end the process."""
    signal.alarm(SECONDS)
    for stream in (1, 2):
        os.dup2(output, stream)
    from llm2clip_plugin import cli

    status = 1
    try:
        status = cli.main(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from llm2clip_plugin.cli import COMMANDS

    for module, _, _ in COMMANDS.values():
        importlib.import_module(module)
    for name in ("deepspeed", "peft", "llm2clip_plugin.stages.llm.run", "llm2clip_plugin.stages.tower.run"):
        importlib.import_module(name)
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as output:
            process = os.fork()
            if process == 0:
                child(json.loads(line), output.fileno())
            _, status = os.waitpid(process, 0)
            output.seek(0)
            answer = {"status": os.waitstatus_to_exitcode(status), "output": output.read()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
