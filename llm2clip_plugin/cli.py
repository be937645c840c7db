"""The ``llm2clip`` command: a table of commands, each imported when it is called.

The table keeps ``llm2clip --help`` free of torch. A command is ``main(argv) -> exit status or None``
in the module of its subject; what a user got wrong arrives here as ValueError, what the machine refused (files,
rights, space, connections) as OSError, and leaves as one ``error:`` line and exit status 2. A loss that is no number
leaves as one line of rank 0 and exit status 1 on every rank.
"""

import atexit
import importlib
import os
import sys
from typing import NoReturn

from llm2clip_plugin.train.errors import NonFiniteLossError

COMMANDS: dict[str, tuple[str, str, str]] = {
    # name: (module, function, one line of help)
    "doctor": ("llm2clip_plugin.doctor", "main", "what this environment lacks, and the command that mends it"),
    "data check": (
        "llm2clip_plugin.data.check.command",
        "main",
        "read a data set once and report what is in it and what is broken",
    ),
    "pretrain-llm": (
        "llm2clip_plugin.stages.llm.command",
        "main_pretrain",
        "optional warm-up of an LLM: guess masked tokens",
    ),
    "finetune-llm": (
        "llm2clip_plugin.stages.llm.command",
        "main",
        "stage 1: teach an LLM to tell captions apart (LoRA, QLoRA)",
    ),
    "export-llm": ("llm2clip_plugin.text.export", "main", "a tuned LLM as merged weights or for sentence-transformers"),
    "embed": ("llm2clip_plugin.stages.embed.command", "main", "stage 1.5: cache the teacher's caption embeddings"),
    "train-tower": (
        "llm2clip_plugin.stages.tower.command",
        "main",
        "stage 2: train the vision tower against the cache",
    ),
    "evaluate": ("llm2clip_plugin.evaluate.command", "main", "retrieval recall of a tower directory"),
    "evaluate captions": ("llm2clip_plugin.evaluate.captions", "main", "how well an LLM tells captions apart"),
    "evaluate zeroshot": ("llm2clip_plugin.evaluate.zeroshot", "main", "classification by the classes' names alone"),
    "evaluate probe": ("llm2clip_plugin.evaluate.probe", "main", "kNN and linear probe on a tower's features"),
    "export": (
        "llm2clip_plugin.stages.tower.export",
        "main",
        "write a trained run as a tower directory, or in other formats",
    ),
    "import": (
        "llm2clip_plugin.vision.convert.command",
        "main",
        "turn an existing vision checkpoint into a tower directory",
    ),
    "use": ("llava_integration.towers.commands", "main_use", "choose the tower that --vision_tower llm2clip means"),
    "towers": (
        "llava_integration.towers.commands",
        "main_towers",
        "the towers that are known: where, hash, widths, patches",
    ),
    "llava evaluate": (
        "llava_integration.answer.generate",
        "main",
        "a LLaVA model answers a question file, in batches",
    ),
    "compare": (
        "llava_integration.compare.command",
        "main",
        "is the new tower better? paired statistics and report",
    ),
    "bench-mllm": (
        "llava_integration.benchmarks.bench",
        "main",
        "evaluate and score one LLaVA checkpoint on what is here",
    ),
    "score": ("llava_integration.benchmarks.score", "main", "score an MLLM's answers by a benchmark's official rule"),
    "llava bundle": (
        "llava_integration.towers.bundle",
        "main",
        "put the tower into a LLaVA checkpoint, so that it travels",
    ),
}

EPILOGUE = "`llm2clip COMMAND --help` explains a command. LLM2CLIP_TRACEBACK=1 shows the whole trace of an error."


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status (2 for what the user can mend)."""
    words = list(sys.argv[1:] if argv is None else argv)
    words = [
        word for word in words if not word.startswith("--local_rank=")
    ]  # the DeepSpeed launcher's; in LOCAL_RANK too
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        from llm2clip_plugin import __version__

        print(f"llm2clip {__version__}")
        return 0
    name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in COMMANDS), None)
    if name is None:
        within = [known for known in COMMANDS if known.startswith(f"{words[0]} ")]  # of `data`, say
        given = " ".join(words[:2]) if within else words[0]
        print(f"error: unknown command {given!r}; known: {', '.join(within or COMMANDS)}", file=sys.stderr)
        return 2
    return run(name, words[len(name.split()) :])


def command() -> NoReturn:
    """The ``llm2clip`` program."""
    leave(main())


def leave(status: int) -> NoReturn:
    """``sys.exit``, but a rank of several ends its process, exit handlers done, without the interpreter's own end.

    While anything still refers to the process group (DeepSpeed does, though it is destroyed), Gloo's threads are there,
    and one in ten such ends is an abort.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(name: str, argv: list[str]) -> int:
    """Import and call one command of the table."""
    share_cores()
    module, function, _ = COMMANDS[name]
    try:
        return getattr(importlib.import_module(module), function)(argv) or 0
    except BrokenPipeError:  # `llm2clip ... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell says SIGPIPE
    except (ValueError, OSError) as error:
        if os.environ.get("LLM2CLIP_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NonFiniteLossError as error:
        if os.environ.get("LLM2CLIP_TRACEBACK") == "1":
            raise
        if os.environ.get("RANK", "0") == "0":  # every rank has it
            print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        ours = (error.name or "").split(".")[0] in ("llm2clip_plugin", "llava_integration")
        if ours or os.environ.get("LLM2CLIP_TRACEBACK") == "1":
            raise
        everything = 'pip install "llm2clip-plugin[train]"'
        print(f"error: {error}; pip install {error.name}, or all of training: {everything}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def share_cores() -> None:
    """Under a launcher one thread a rank, and passive waiting, unless the user says otherwise; before torch comes in.

    Ranks that each take all cores, and spin while they wait, are several times slower.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def usage() -> str:
    """The text of ``llm2clip --help``."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {help_line}" for name, (_, _, help_line) in COMMANDS.items())
    return f"usage: llm2clip COMMAND [options]\n\nLLM2CLIP for LLaVA 1.5.\n\n{rows}\n\n{EPILOGUE}"


if __name__ == "__main__":
    command()
