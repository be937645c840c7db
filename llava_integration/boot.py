"""Start-up hook: watches for LLaVA's modules and hands each to ``register`` right after it has run.

``llm2clip_llava.pth`` in site-packages puts a watcher of six lines on ``sys.meta_path`` of every Python process of
the environment; this module is imported when the first of LLaVA's model modules is. So it reaches ``python -m
llava.train.train``, a script path under the DeepSpeed launcher and a notebook that imports only ``llava``, and a
process without LLaVA pays for the six lines alone. Nothing here may raise: ``llava.model`` swallows import errors, and
the user would see "cannot import name LlavaLlamaForCausalLM". ``LLM2CLIP_LLAVA_HOOK=0`` switches it off.
"""

import os
import sys

# The three places of LLaVA that are completed, each as soon as it has run:
WATCHED = (
    "llava.model.multimodal_encoder.builder",  # learns the tower's name, before llava_arch binds the function
    "llava.model.llava_arch",  # writes into the configuration which tower a model is trained with
    "llava.model.builder",  # knows the checkpoint's folder, where a bundled tower lies
)
WATCHER = "LLM2CLIPWatcher"  # name of the watcher's class, here and in the .pth file


class LLM2CLIPWatcher:
    """The watcher of the ``.pth`` file, for processes that don't read it."""

    def find_spec(self, name, path=None, target=None):
        """As any finder's."""
        return find_spec(name, path, target)


def find_spec(name, path=None, target=None):
    """For WATCHED alone: the spec that the other finders have for it, its loader told to call ``register``."""
    if name not in WATCHED or os.environ.get("LLM2CLIP_LLAVA_HOOK") == "0":
        return None
    for finder in sys.meta_path:
        find = None if type(finder).__name__ == WATCHER else getattr(finder, "find_spec", None)
        spec = find(name, path, target) if find else None
        if spec is not None:
            watch(spec)
            return spec
    return None


def watch(spec):
    """Wrap ``exec_module`` on the loader's instance: its class, and other modules' loaders, stay as they are."""
    loader = spec.loader
    run = getattr(loader, "exec_module", None)
    if run is None:  # a namespace package or a loader of the old protocol: not LLaVA
        return

    def exec_module(module):
        run(module)
        complete(module)

    try:
        loader.exec_module = exec_module
    except AttributeError as error:  # a loader with slots, from another import hook
        report(error)


def complete(module):
    """Give a module of LLaVA that has just run its addition; says on stderr why if that fails."""
    try:
        from llava_integration.hook import register

        register.complete(module)
    except Exception as error:
        report(error)


def report(error):
    """One line on stderr: LLaVA goes on, without the tower."""
    print(f"llm2clip: --vision_tower llm2clip is unknown in this process: {error!r}", file=sys.stderr)


def watching():
    """Whether a watcher is at work in this process."""
    return os.environ.get("LLM2CLIP_LLAVA_HOOK") != "0" and any(type(f).__name__ == WATCHER for f in sys.meta_path)


def install():
    """Start to watch where the ``.pth`` file was not read; modules of LLaVA that are loaded are completed at once."""
    if os.environ.get("LLM2CLIP_LLAVA_HOOK") == "0":
        return
    if not watching():
        sys.meta_path.insert(0, LLM2CLIPWatcher())
    for name in WATCHED:
        if name in sys.modules:
            complete(sys.modules[name])
