"""Start-up hook: completes four modules of LLaVA, each right after Python has executed it.

``llm2clip_llava.pth`` in site-packages puts a six-line watcher on ``sys.meta_path`` of every Python process of the
environment; the watcher imports this module when a process imports the first ``llava.model.*`` module. That covers
``python -m llava.train.train``, a script path under the DeepSpeed launcher, and a notebook that imports only ``llava``.
Nothing here may raise: ``llava.model`` swallows import errors, and the user would see "cannot import name
LlavaLlamaForCausalLM". ``LLM2CLIP_LLAVA_HOOK=0`` disables the hook.
"""

import os
import sys

WATCHED = (
    "llava.model.multimodal_encoder.builder",  # before llava_arch binds build_vision_tower
    "llava.model.llava_arch",
    "llava.model.builder",
    "llava.train.llava_trainer",
)
WATCHER = "LLM2CLIPWatcher"  # class name, here and in the .pth file


class LLM2CLIPWatcher:
    """The watcher of the ``.pth`` file, for processes that do not read it."""

    def find_spec(self, name, path=None, target=None):
        """See ``importlib.abc.MetaPathFinder``."""
        return find_spec(name, path, target)


def find_spec(name, path=None, target=None):
    """For a module in WATCHED: the spec of the other finders, with a loader that calls ``complete``; else None."""
    if os.environ.get("LLM2CLIP_LLAVA_HOOK") == "0":
        return None
    if not any(isinstance(finder, LLM2CLIPWatcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, LLM2CLIPWatcher())  # that of the .pth file asks for llava.model.* alone
    if name not in WATCHED:
        return None
    for finder in sys.meta_path:
        find = None if type(finder).__name__ == WATCHER else getattr(finder, "find_spec", None)
        spec = find(name, path, target) if find else None
        if spec is not None:
            watch(spec)
            return spec
    return None


def watch(spec):
    """Wrap ``exec_module`` on the loader's instance, so that other modules' loaders are unaffected."""
    loader = spec.loader
    original = getattr(loader, "exec_module", None)
    if original is None:  # a namespace package or a loader of the old protocol: not LLaVA
        return

    def exec_module(module):
        original(module)
        complete(module)

    try:
        loader.exec_module = exec_module
    except AttributeError as error:  # a loader with __slots__, from another import hook
        report(error)


def complete(module):
    """Complete a module of LLaVA that has been executed; an error is printed, not raised."""
    try:
        from llava_integration import hook

        hook.complete(module)
    except Exception as error:
        report(error)


def report(error):
    """Print the error in one line on stderr; LLaVA continues without our towers."""
    print(f"llm2clip: --vision_tower llm2clip is not available in this process: {error!r}", file=sys.stderr)


def watching():
    """Whether the hook is active in this process."""
    return os.environ.get("LLM2CLIP_LLAVA_HOOK") != "0" and any(type(f).__name__ == WATCHER for f in sys.meta_path)


def install():
    """Activate the hook where the ``.pth`` file was not read, and complete LLaVA's modules that are loaded already."""
    if os.environ.get("LLM2CLIP_LLAVA_HOOK") == "0":
        return
    if not watching():
        sys.meta_path.insert(0, LLM2CLIPWatcher())
    for name in WATCHED:
        if name in sys.modules:
            complete(sys.modules[name])
