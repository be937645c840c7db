"""The ``llm2clip`` command: a table of commands, each imported when it is called.

The table keeps ``llm2clip --help`` free of torch. A command is ``main(argv) -> exit status or None`` in a module of its
own. ValueError (wrong input) and OSError (files, permissions, disk space, connections) end as one ``error:`` line and
exit status 2; train/errors.py lists all statuses. What is raised on every rank alike (a non-finite loss, ranks that
disagree) is printed by rank 0 alone, the loss of another rank by each that is left.
"""

import atexit
import importlib
import os
import sys

from llm2clip_plugin.console import Interrupted, end_children, interrupts_end_loading, quiet_libraries
from llm2clip_plugin.train.errors import FINAL_STATUSES, FirstRankError, SameOnAllRanksError, StoppedError, lost_rank

TYPE_CHECKING = False  # see llm2clip_plugin
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, NoReturn

COMMANDS: dict[str, tuple[str, str, str]] = {
    # name: (module, function, one line of help)
    "doctor": ("llm2clip_plugin.doctor", "main", "check this environment and show how to fix problems"),
    "run": ("llm2clip_plugin.stages.pipeline", "main", "all stages in order, from checked data to a tower and a page"),
    "data make": (
        "llm2clip_plugin.data.make",
        "main",
        "write WebDataset tars from a folder of pictures or a table",
    ),
    "data check": (
        "llm2clip_plugin.data.check",
        "main",
        "read a data set once; report its contents and problems",
    ),
    "data split": (
        "llm2clip_plugin.data.split",
        "main",
        "hold out a part of a data set for validation",
    ),
    "finetune-llm": (
        "llm2clip_plugin.stages.llm",
        "main",
        "stage 1: fine-tune an LLM contrastively on captions (LoRA, QLoRA)",
    ),
    "export-llm": (
        "llm2clip_plugin.text.export",
        "main",
        "export a fine-tuned LLM: merged weights or sentence-transformers",
    ),
    "embed": (
        "llm2clip_plugin.stages.embed",
        "main",
        "stage 1.5: cache the caption embeddings of the teacher LLM",
    ),
    "train-tower": (
        "llm2clip_plugin.stages.tower",
        "main",
        "stage 2: train a vision tower against the cache",
    ),
    "status": (
        "llm2clip_plugin.status",
        "main",
        "where a run or cache stands: progress, scores, checkpoints, how to resume",
    ),
    "evaluate": ("llm2clip_plugin.evaluate.commands", "main", "measure a tower's image-text retrieval recall"),
    "evaluate captions": (
        "llm2clip_plugin.evaluate.captions",
        "main",
        "measure an LLM's caption-to-caption retrieval",
    ),
    "evaluate zeroshot": (
        "llm2clip_plugin.evaluate.classification",
        "main_zeroshot",
        "measure a tower's zero-shot classification",
    ),
    "evaluate probe": (
        "llm2clip_plugin.evaluate.classification",
        "main_probe",
        "measure a tower's features by kNN and linear probe",
    ),
    "forecast": (
        "llm2clip_plugin.evaluate.forecast",
        "main",
        "how well towers are likely to serve an LLM in LLaVA, before one is trained",
    ),
    "search": (
        "llm2clip_plugin.evaluate.search",
        "main",
        "find the images that are nearest to a text; a page with pictures",
    ),
    "export": (
        "llm2clip_plugin.stages.tower_export",
        "main",
        "export a training run as a tower directory or in another format",
    ),
    "import": (
        "llm2clip_plugin.vision.convert.importing",
        "main",
        "convert a vision checkpoint into a tower directory",
    ),
    "use": ("llava_integration.towers", "main_use", "choose the tower for --vision_tower llm2clip"),
    "towers": (
        "llava_integration.towers",
        "main_towers",
        "list known towers: location, hash, sizes",
    ),
    "llava data": (
        "llm2clip_plugin.data.make",
        "main_llava_data",
        "write a data set as LLaVA's pretraining reads it",
    ),
    "llava evaluate": (
        "llava_integration.answer.command",
        "main",
        "answer a question file with a LLaVA model, in batches",
    ),
    "compare": (
        "llava_integration.compare.command",
        "main",
        "compare score files: paired statistics and a report",
    ),
    "bench-mllm": (
        "llava_integration.benchmarks.bench",
        "main",
        "evaluate a LLaVA checkpoint on every benchmark whose files are found",
    ),
    "score": ("llava_integration.benchmarks.score", "main", "score answers with a benchmark's official rule"),
    "llava bundle": (
        "llava_integration.towers",
        "main_bundle",
        "copy the tower into a LLaVA checkpoint",
    ),
    "llava export": (
        "llava_integration.serve",
        "main",
        "convert a LLaVA checkpoint into a Hugging Face model that vLLM serves",
    ),
}

# Where a command declares its options, an options.Command. These modules import no torch, and neither --help
# nor a misspelled option needs more.
OPTIONS: dict[str, tuple[str, str]] = {
    "doctor": ("llm2clip_plugin.doctor", "COMMAND"),
    "run": ("llm2clip_plugin.stages.settings", "RUN"),
    "data make": ("llm2clip_plugin.data.make", "COMMAND"),
    "data check": ("llm2clip_plugin.data.check", "COMMAND"),
    "data split": ("llm2clip_plugin.data.split", "COMMAND"),
    "llava data": ("llm2clip_plugin.data.make", "LLAVA_DATA"),
    "finetune-llm": ("llm2clip_plugin.stages.llm_config", "FINETUNE_LLM"),
    "export-llm": ("llm2clip_plugin.text.config", "COMMAND"),
    "embed": ("llm2clip_plugin.stages.settings", "EMBED"),
    "train-tower": ("llm2clip_plugin.stages.tower_config", "TRAIN_TOWER"),
    "status": ("llm2clip_plugin.status", "COMMAND"),
    "evaluate": ("llm2clip_plugin.evaluate.config", "EVALUATE"),
    "evaluate captions": ("llm2clip_plugin.evaluate.config", "EVALUATE_CAPTIONS"),
    "evaluate zeroshot": ("llm2clip_plugin.evaluate.config", "EVALUATE_ZEROSHOT"),
    "evaluate probe": ("llm2clip_plugin.evaluate.config", "EVALUATE_PROBE"),
    "forecast": ("llm2clip_plugin.evaluate.config", "FORECAST"),
    "search": ("llm2clip_plugin.evaluate.config", "SEARCH"),
    "export": ("llm2clip_plugin.stages.tower_config", "EXPORT"),
    "import": ("llm2clip_plugin.vision.convert", "IMPORT"),
    "use": ("llava_integration.towers", "USE"),
    "towers": ("llava_integration.towers", "TOWERS"),
    "llava evaluate": ("llava_integration.answer.questions", "COMMAND"),
    "compare": ("llava_integration.compare.command", "COMMAND"),
    "bench-mllm": ("llava_integration.benchmarks.bench", "COMMAND"),
    "score": ("llava_integration.benchmarks.score", "COMMAND"),
    "llava bundle": ("llava_integration.towers", "LLAVA_BUNDLE"),
    "llava export": ("llava_integration.serve", "COMMAND"),
}

EPILOG = "Run `llm2clip COMMAND --help` for its options. LLM2CLIP_TRACEBACK=1 shows the full traceback of an error."


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status (2 for wrong input)."""
    words = list(sys.argv[1:] if argv is None else argv)
    # --local_rank comes from the DeepSpeed launcher, which also sets LOCAL_RANK
    words = [word for word in words if not word.startswith("--local_rank=")]
    if not words or words[0] in ("-h", "--help", "--help-all", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        from llm2clip_plugin import __version__

        print(f"llm2clip {__version__}")
        return 0
    group = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if group and words[0] not in COMMANDS and (len(words) == 1 or words[1] in ("-h", "--help", "--help-all")):
        print(usage(group))  # `llm2clip data --help`
        return 0
    name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in COMMANDS), None)
    if name is None or _misspelled_sibling(name, words):
        _report(f"error: {unknown_command(words)}")
        return 2
    return run(name, words[len(name.split()) :])


def _misspelled_sibling(name: str, words: list[str]) -> bool:
    """Whether a word behind ``evaluate`` is nearly that of another command, `evaluate zeroshot`, and not a path."""
    from llm2clip_plugin.options import closest

    siblings = [other.split()[1] for other in COMMANDS if other.startswith(f"{words[0]} ")]
    word = words[1] if name == words[0] and len(words) > 1 else ""
    return bool(closest(word, siblings, 0.8)) and not os.path.exists(word)


def unknown_command(words: list[str]) -> str:
    """``unknown command 'trian-tower'; did you mean 'train-tower'? known: ...``"""
    from llm2clip_plugin.options import closest, joined

    siblings = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]  # `data check` for `data chekc`
    given = " ".join(words[:2]) if siblings else words[0]
    near = closest(given, COMMANDS) or closest(" ".join(words[:2]), COMMANDS)
    problem = f"unknown command {given!r}" + (f"; did you mean {near!r}?" if near else "")
    return joined(problem, f"known: {', '.join(siblings or COMMANDS)}")


def command() -> "NoReturn":
    """The ``llm2clip`` program."""
    leave(main())


def leave(status: int) -> "NoReturn":
    """``sys.exit``; but one of several ranks runs its exit handlers and ends without the interpreter's shutdown.

    DeepSpeed keeps a reference to the process group after it is destroyed, so Gloo's threads are still alive, and one
    in ten such shutdowns aborts. After an error the exit handlers don't run either: destroying a group waits for
    collectives that other ranks may never join.
    """
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
    limit_threads()
    allow_open_files()
    quiet_libraries()
    module, function, _ = COMMANDS[name]
    try:
        with interrupts_end_loading():
            read_options(name, argv)
            return getattr(importlib.import_module(module), function)(argv) or 0
    except BrokenPipeError:  # `llm2clip ... | head` stops reading
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # the shell's status for SIGPIPE
    except FirstRankError:
        return 2
    except (ValueError, OSError) as error:
        if os.environ.get("LLM2CLIP_TRACEBACK") == "1":
            raise
        _report(f"error: {error}")
        return _final(2) if isinstance(error, ValueError) else 2  # an OSError may pass
    except SameOnAllRanksError as error:
        if os.environ.get("LLM2CLIP_TRACEBACK") == "1":
            raise
        if os.environ.get("RANK", "0") == "0":
            _report(f"{error.label}{error}")
        return _final(error.status) if error.status in FINAL_STATUSES else error.status
    except RuntimeError as error:
        message = lost_rank(error)
        if not message or os.environ.get("LLM2CLIP_TRACEBACK") == "1":
            return _unexpected(error)
        print(f"error: {message}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        ours = (error.name or "").split(".")[0] in ("llm2clip_plugin", "llava_integration")
        if ours or os.environ.get("LLM2CLIP_TRACEBACK") == "1":
            raise
        extra = 'pip install "llm2clip-plugin[train]"'
        print(f"error: {error}; run `pip install {error.name}`, or `{extra}` for all of training", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        ended = error if isinstance(error, Interrupted) else Interrupted()
        print(ended, file=sys.stderr)
        return ended.status
    except Exception as error:
        return _unexpected(error)


def _final(status: int) -> int:
    """The exit status of an error that a rerun would meet again, left for the job script, too."""
    from llm2clip_plugin.files import FINAL, tell_job

    tell_job(FINAL, str(status))
    return status


def _report(text: str) -> None:
    """Print an error; names in it come from files and servers, so control characters are shown as escapes."""
    from llm2clip_plugin.files import printable_lines

    print(printable_lines(text), file=sys.stderr)


def _unexpected(error: Exception) -> int:
    """Raise it; but one of several ranks prints it: it must not wait for the others in the interpreter's shutdown."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        raise error
    import traceback

    traceback.print_exception(error)
    return 1


def read_options(name: str, argv: list[str]) -> None:
    """Print --help and exit, or refuse an unknown option or a wrong path, before anything large is imported."""
    from llm2clip_plugin.options import check_paths

    module, attribute = OPTIONS[name]
    command: Any = getattr(importlib.import_module(module), attribute)
    check_paths(command, command.read(argv).values)


def limit_threads() -> None:
    """Under a launcher: one thread per rank and passive waiting, unless set otherwise; called before torch is imported.

    Ranks that each use all cores, and spin while they wait, are several times slower.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def allow_open_files() -> None:
    """Raise the limit of open files as far as the machine allows, and say so where that is little."""
    from llm2clip_plugin.console import raise_open_files, remedy_open_files

    limit = raise_open_files()
    if (fix := remedy_open_files(limit)) and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: a process may open only {limit} files; {fix}", file=sys.stderr)


def usage(names: "Iterable[str]" = COMMANDS) -> str:
    """The text of ``llm2clip --help``, or of a group of commands."""
    names = list(names)
    width = max(map(len, names))
    rows = "\n".join(f"  {name:<{width}}  {COMMANDS[name][2]}" for name in names)
    return f"usage: llm2clip COMMAND [options]\n\nLLM2CLIP for LLaVA 1.5.\n\n{rows}\n\n{EPILOG}"


if __name__ == "__main__":
    command()
