"""The ``llm2clip`` command: a table of commands, each imported when it is called.

The table keeps ``llm2clip --help`` free of torch. A command is ``main(argv) -> exit status or
None`` in a module of its own. ValueError (wrong input) and OSError (files, permissions, disk space,
connections) end as one ``error:`` line and exit status 2; errors.py lists all statuses. What is
raised on every rank alike (a non-finite loss, ranks that disagree) is printed by rank 0 alone, the
loss of another rank by each that is left.
"""

import atexit
import importlib
import os
import sys
import traceback

from llm2clip_plugin.errors import (
    FINAL_STATUSES,
    FirstRankError,
    SameOnAllRanksError,
    StoppedError,
    lost_rank,
)
from llm2clip_plugin.installation import (
    MissingExtraError,
    extra_of,
    missing_message,
    require,
)
from llm2clip_plugin.outside import expand_home_in_word
from llm2clip_plugin.processes import end_children, protect_children, raise_open_files
from llm2clip_plugin.quiet import quiet_libraries
from llm2clip_plugin.signals import Interrupted, interrupts_end_loading

TYPE_CHECKING = False  # see llm2clip_plugin
if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from typing import Any, NoReturn

# A place is MODULE:NAME, of this package unless it is llava_integration's.
# name -> place of the function, one line of help
COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("doctor:main", "check this environment and show how to fix problems"),
    "run": (
        "stages.pipeline:main",
        "all stages in order, from checked data to a tower and a page",
    ),
    "data make": (
        "data.make:main",
        "write WebDataset tars from a folder of pictures or a table",
    ),
    "data check": (
        "data.check:main",
        "read a data set once; report its contents and problems",
    ),
    "data split": (
        "data.split:main_split",
        "hold out a part of a data set for validation",
    ),
    "finetune-llm": (
        "stages.training:main_llm",
        "stage 1: fine-tune an LLM contrastively on captions (LoRA, QLoRA)",
    ),
    "export-llm": (
        "stages.export:main_llm",
        "export a fine-tuned LLM: its adapter merged into the weights",
    ),
    "embed": (
        "stages.embed:main",
        "stage 1.5: cache the caption embeddings of the teacher LLM",
    ),
    "train-tower": (
        "stages.training:main_tower",
        "stage 2: train a vision tower against the cache",
    ),
    "status": (
        "status:main",
        "where a run or cache stands: progress, scores, checkpoints, how to resume",
    ),
    "evaluate": (
        "evaluate.commands:main",
        "measure a tower's image-text retrieval recall",
    ),
    "evaluate captions": (
        "evaluate.captions:main",
        "measure an LLM's caption-to-caption retrieval",
    ),
    "evaluate zeroshot": (
        "evaluate.classification:main_zeroshot",
        "measure a tower's zero-shot classification",
    ),
    "evaluate probe": (
        "evaluate.classification:main_probe",
        "measure a tower's features by kNN and linear probe",
    ),
    "forecast": (
        "evaluate.forecast:main",
        "how well towers are likely to serve an LLM in LLaVA, before training",
    ),
    "search": (
        "evaluate.search:main",
        "find the images that are nearest to a text; a page with pictures",
    ),
    "export": (
        "stages.export:main",
        "export a training run as a tower directory or in another format",
    ),
    "import": (
        "vision.convert.importing:main",
        "convert a vision checkpoint into a tower directory",
    ),
    "use": (
        "llava_integration.plug.towers:main_use",
        "choose the tower for --vision_tower llm2clip",
    ),
    "towers": (
        "llava_integration.plug.towers:main_towers",
        "list known towers: location, hash, sizes",
    ),
    "llava data": (
        "data.llava_data:main_llava_data",
        "write a data set as LLaVA's pretraining reads it",
    ),
    "llava evaluate": (
        "llava_integration.evaluator.answer.command:main",
        "answer a question file with LLaVA, in batches",
    ),
    "compare": (
        "llava_integration.evaluator.compare.command:main",
        "is a model better? paired statistics over scores or other evaluators' logs",
    ),
    "bench-mllm": (
        "llava_integration.evaluator.benchmarks.bench:main",
        "evaluate LLaVA on each benchmark that is found",
    ),
    "score": (
        "llava_integration.evaluator.benchmarks.bench:main_score",
        "score answers with a benchmark's official rule",
    ),
    "llava bundle": (
        "llava_integration.plug.towers:main_bundle",
        "copy the tower into a LLaVA checkpoint",
    ),
    "llava export": (
        "llava_integration.serve.export:main",
        "convert a LLaVA checkpoint to a Hugging Face model",
    ),
    "vlm build": (
        "llava_integration.serve.vlm:main",
        "build a vision-language model to train: any tower, any LLM",
    ),
}

# Where a command declares its options, an options.Command: COMMAND next to the function, or
# elsewhere. These modules import no torch, and neither --help nor a misspelled option needs more.
OPTIONS: dict[str, str] = {
    name: f"{location.partition(':')[0]}:COMMAND"
    for name, (location, _) in COMMANDS.items()
} | {
    "run": "stages.pipeline_config:RUN",
    "data split": "data.split:SPLIT",
    "llava data": "data.llava_data:LLAVA_DATA",
    "finetune-llm": "stages.llm_config:FINETUNE_LLM",
    "export-llm": "text.config:EXPORT_LLM",
    "embed": "stages.embed_config:EMBED",
    "train-tower": "stages.tower_config:TRAIN_TOWER",
    "evaluate": "evaluate.config:EVALUATE",
    "evaluate captions": "evaluate.config:EVALUATE_CAPTIONS",
    "evaluate zeroshot": "evaluate.config:EVALUATE_ZEROSHOT",
    "evaluate probe": "evaluate.config:EVALUATE_PROBE",
    "forecast": "evaluate.config:FORECAST",
    "search": "evaluate.config:SEARCH",
    "export": "vision.convert:EXPORT",
    "import": "vision.convert:IMPORT",
    "use": "llava_integration.plug.towers:USE",
    "towers": "llava_integration.plug.towers:TOWERS",
    "llava evaluate": "llava_integration.evaluator.answer.questions:COMMAND",
    "score": "llava_integration.evaluator.benchmarks.bench:SCORE",
    "llava bundle": "llava_integration.plug.towers:LLAVA_BUNDLE",
    "llava export": "llava_integration.serve:EXPORT",
    "vlm build": "llava_integration.serve:VLM",
}

# What a command needs besides the base install: an extra of pyproject.toml. The others run without
# torch, or need more for some of their options alone (`llava evaluate` without --endpoint).
EXTRAS: dict[str, str] = {
    "run": "train",
    "finetune-llm": "train",
    "export-llm": "train",
    "embed": "train",
    "train-tower": "train",
    "evaluate": "tower",
    "evaluate captions": "train",
    "evaluate zeroshot": "tower",
    "evaluate probe": "tower",
    "forecast": "tower",
    "search": "tower",
    "export": "tower",
    "import": "tower",
    "use": "tower",
    "llava bundle": "tower",
    "llava export": "tower",
    "vlm build": "tower",
}

HELP = ("-h", "--help", "--help-all")
OURS = ("llm2clip_plugin", "llava_integration")
EPILOG = (
    "Run `llm2clip COMMAND --help` for its options. LLM2CLIP_TRACEBACK=1 shows the full traceback "
    "of an error."
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status (2 for wrong input)."""
    words = list(sys.argv[1:] if argv is None else argv)
    # --local_rank comes from the DeepSpeed launcher, which also sets LOCAL_RANK
    words = [word for word in words if not word.startswith("--local_rank=")]
    if garbled := next((word for word in words if not is_utf8(word)), ""):
        advice = (
            "rename the file, or set the terminal's encoding, such as LC_ALL=C.UTF-8"
        )
        print(
            f"error: {os.fsencode(garbled)!r} on the command line is not UTF-8; {advice}",
            file=sys.stderr,
        )
        return 2
    words = [expand_home_in_word(word) for word in words]
    if not words or words[0] in (*HELP, "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        from llm2clip_plugin import __version__

        print(f"llm2clip {__version__}")
        return 0
    group = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if group and words[0] not in COMMANDS and (len(words) == 1 or words[1] in HELP):
        print(usage(group))  # `llm2clip data --help`
        return 0
    name = command_in(words)
    if not name:
        from llm2clip_plugin.options import unknown
        from llm2clip_plugin.outside import printable

        typed = " ".join(words[:2]) if group else words[0]
        problem = printable(unknown("command", typed, group or COMMANDS))
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return run(name, words[len(name.split()) :])


def is_utf8(word: str) -> bool:
    """Whether a word of the command line was text: Python turns other bytes into surrogates, which
    no record holds."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def command() -> "NoReturn":
    """The ``llm2clip`` program."""
    protect_children()
    leave(main())


def leave(status: int) -> "NoReturn":
    """``sys.exit``; but one of several ranks runs its exit handlers and ends without the
    interpreter's shutdown, of which one in ten aborts: DeepSpeed keeps the destroyed group, and so
    Gloo's threads, alive. After an error no exit handlers run: destroying a group waits for
    collectives that other ranks may never join."""
    end_children()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(status)
    if status in (0, StoppedError.status):
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(name: str, argv: list[str]) -> int:
    """Import and run one command of the table; returns its exit status."""
    # Both are read when torch is imported. Threads that spin while they wait take the cores from
    # every other program, and are several times slower next to one; so are ranks that each use all
    # cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise_open_files()
    quiet_libraries()
    try:
        with interrupts_end_loading():
            if name in EXTRAS and not set(argv) & set(HELP):
                require(EXTRAS[name], f"`llm2clip {name}`")
            read_options(name, argv)
            return load(COMMANDS[name][0])(argv) or 0
    except KeyboardInterrupt as error:
        ended = error if isinstance(error, Interrupted) else Interrupted()
        print(ended, file=sys.stderr)
        return ended.status
    except BrokenPipeError:  # `llm2clip ... | head` stops reading
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # the shell's status for SIGPIPE
    except Exception as error:
        status = (
            None if os.environ.get("LLM2CLIP_TRACEBACK") == "1" else reported(error)
        )
        if status is not None:
            return status
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        # one of several ranks must not wait in the interpreter's shutdown
        traceback.print_exception(error)
        return 1


def reported(error: Exception) -> int | None:
    """Print an error that a user can act upon; its exit status. None for any other error."""
    from llm2clip_plugin.outside import printable_lines, without_queries
    from llm2clip_plugin.run_folder import FINAL, tell_job

    text = f"error: {error}"
    status = 2
    is_final = False
    if isinstance(error, FirstRankError):
        return 2
    if isinstance(error, (ValueError, OSError)):
        is_final = isinstance(error, ValueError)  # an OSError may pass
    elif isinstance(error, SameOnAllRanksError):
        text = f"{error.label}{error}" if os.environ.get("RANK", "0") == "0" else ""
        status = error.status
        is_final = error.status in FINAL_STATUSES
    elif isinstance(error, RuntimeError) and (message := lost_rank(error)):
        text = f"error: {message}"
        status = 1
    elif isinstance(error, MissingExtraError):
        is_final = True
    elif isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith(
        OURS
    ):
        text = f"error: {missing_package(error.name or str(error))}"
    else:
        return None
    if text:
        # names come from files and servers
        print(printable_lines(without_queries(text)), file=sys.stderr)
    if is_final:  # a rerun would meet it again: left for the job script, too
        tell_job(FINAL, str(status))
    return status


def missing_package(module: str) -> str:
    """One line about a module that is not installed: the extra that brings it, or its package."""
    module = module.partition(".")[0]
    extra = extra_of(module)
    if extra:
        return missing_message(extra, "this command", [module])
    return f"the module {module} is not installed: pip install {module}"


def read_options(name: str, argv: list[str]) -> None:
    """Print --help and exit, or refuse an unknown option or a wrong path, before anything large is
    imported."""
    from llm2clip_plugin.options import check_paths

    check_paths(load(OPTIONS[name]), argv)


def load(location: str) -> "Any":
    """What is at a place of the tables; its module is imported."""
    module, _, name = location.partition(":")
    if not module.startswith("llava_integration"):
        module = f"llm2clip_plugin.{module}"
    return getattr(importlib.import_module(module), name)


def command_in(words: "Sequence[str]") -> str:
    """The command at the start of a command line, of two words or one; "" if there is none."""
    for count in (2, 1):
        name = " ".join(words[:count])
        if name in COMMANDS:
            return name
    return ""


def usage(names: "Collection[str]" = COMMANDS) -> str:
    """The text of ``llm2clip --help``, or of a group of commands."""
    width = max(map(len, names))
    rows = "\n".join(f"  {name:<{width}}  {COMMANDS[name][1]}" for name in names)
    return f"usage: llm2clip COMMAND [options]\n\nLLM2CLIP for LLaVA 1.5.\n\n{rows}\n\n{EPILOG}"


if __name__ == "__main__":
    command()
