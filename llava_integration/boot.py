"""Start-up hook: completes modules of LLaVA as Python executes them.

Right after four of them, so that LLaVA, or a fork under another name with a
``model/multimodal_encoder/builder.py``, knows our towers (``hook``). Before or after others, so
that LLaVA 1.5 runs on today's libraries (``compat``).

``llm2clip_llava.pth`` in site-packages puts a six-line watcher on ``sys.meta_path`` of every Python
process of the environment, which imports this module with the first ``llava.model.*`` or
``*.model.*_arch`` module. Nothing here may raise: ``llava.model`` swallows import errors, and the
user would see "cannot import name LlavaLlamaForCausalLM"; a completion of ``compat`` that fails
ends the import with an error that names its file. ``LLM2CLIP_LLAVA_HOOK=0`` disables the towers,
``LLM2CLIP_LLAVA_COMPAT=0`` the rest.

Where ``.pth`` files are not read (``pip install --target``, ``python -S``, zip imports), ``python
-m llava_integration.boot MODULE_OR_SCRIPT ...`` runs a module or script with the hook, as ``python
-m`` or ``python SCRIPT`` would; with DeepSpeed's launcher ``deepspeed --module
llava_integration.boot llava.train.train ...``.
"""

import functools
import os
import runpy
import sys

TRAINER = "llava.train.llava_trainer"  # of LLaVA alone
MODELS = ".model."  # LLaVA's package, or a fork's, before it
WATCHER = "LLM2CLIPWatcher"  # class name, here and in the .pth file


class LLM2CLIPWatcher:
    """The watcher of the ``.pth`` file, for processes that do not read it."""

    def find_spec(self, name, path=None, target=None):
        """See ``importlib.abc.MetaPathFinder``."""
        return find_spec(name, path, target)


def find_spec(name, path=None, target=None):
    """For a module that is completed: the spec of the other finders, with a loader that completes
    it; else None."""
    if not any(isinstance(finder, LLM2CLIPWatcher) for finder in sys.meta_path):
        # that of the .pth file asks for few modules
        sys.meta_path.insert(0, LLM2CLIPWatcher())
    if not is_completed(name, path):
        return None
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        if find is None or type(finder).__name__ == WATCHER:
            continue
        spec = find(name, path, target)
        if spec is not None:
            try:
                watch(spec)
            except AttributeError as error:  # a loader of another import hook
                report(error)
            return spec
    return None


def is_completed(name, path=None):
    """Whether a module gets our towers, or is completed for today's libraries."""
    if knows_towers(name, path):
        return True
    return name.startswith("llava.") and name in completed_by_compat()


def knows_towers(name, path=None):
    """Whether `hook` completes a module: LLaVA's, or one of a fork, whose ``path`` is its package's
    ``__path__``."""
    if os.environ.get("LLM2CLIP_LLAVA_HOOK") == "0":
        return False
    if name == TRAINER:
        return True
    package, _, part = name.rpartition(MODELS)
    if not package:
        return False
    if part == "multimodal_encoder.builder":
        return True  # before the *_arch binds build_vision_tower
    if part != "builder" and not part.endswith("_arch"):
        return False
    for folder in path or getattr(sys.modules.get(f"{package}.model"), "__path__", ()):
        if os.path.isfile(os.path.join(folder, "multimodal_encoder", "builder.py")):
            return True
    return False


def completed_by_compat():
    """The modules of LLaVA that are completed for today's libraries."""
    runner = compat()
    return runner.watched() if runner else set()


@functools.cache
def compat():
    """`llava_integration.plug.compat.runner`; None, with a line on stderr, if it or a file of its
    folder is broken."""
    try:
        from llava_integration.plug.compat import runner

        runner.watched()
        return runner
    except Exception as error:
        report(error, "LLaVA runs without the patches")
        return None


def watch(spec):
    """Wrap ``exec_module`` on the loader's instance, so that other modules' loaders are
    unaffected."""
    original = spec.loader.exec_module

    def exec_module(module):
        runner = compat()
        if runner:
            runner.run(module, "before")
        original(module)
        if runner:
            runner.run(module, "after")
        complete(module)

    spec.loader.exec_module = exec_module


def complete(module):
    """Make a module of LLaVA that has been executed know our towers; an error is printed, not
    raised."""
    if not knows_towers(module.__name__):
        return
    try:
        from llava_integration.plug import hook

        hook.complete(module)
    except Exception as error:
        report(error)


def report(error, consequence="--vision_tower llm2clip is not available"):
    """Print the error in one line on stderr; LLaVA continues without our towers."""
    print(f"llm2clip: {consequence} in this process: {error!r}", file=sys.stderr)


def watching():
    """Whether the hook is active in this process."""
    return any(type(finder).__name__ == WATCHER for finder in sys.meta_path)


def install():
    """Activate the hook where the ``.pth`` file was not read, and complete LLaVA's modules that are
    loaded already."""
    if not watching():
        sys.meta_path.insert(0, LLM2CLIPWatcher())
    runner = compat()
    loaded = [name for name in sys.modules if is_completed(name)]
    for name in sorted(loaded):
        module = sys.modules[name]
        if runner:
            runner.run(module, "before")
            runner.run(module, "after")
        complete(module)


def main(argv):
    """Run ``argv[0]``, a module's name or a script's path, with the rest as its arguments."""
    rank = []  # of DeepSpeed's launcher
    words = argv
    if argv and argv[0].startswith(("--local_rank=", "--local-rank=")):
        rank = argv[:1]
        words = argv[1:]
    if not words or words[0].startswith("-"):
        raise SystemExit("usage: python -m llava_integration.boot MODULE_OR_SCRIPT ...")
    install()
    target = words[0]
    sys.argv[1:] = [*rank, *words[1:]]
    if target.endswith(".py") or os.path.sep in target:
        sys.argv[0] = target
        # as `python SCRIPT` does
        sys.path[0] = os.path.dirname(os.path.abspath(target))
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    from llava_integration import boot  # not a second copy of this module, as __main__

    boot.main(sys.argv[1:])
