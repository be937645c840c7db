"""Start-up hook: watches for LLaVA's modules and hands each to ``register`` right after it has run.

A ``.pth`` line imports this module at the start of every Python process of the environment, so it
imports nothing but ``sys`` and ``os`` and must never raise. It reaches ``python -m llava.train.train``,
a script path under the DeepSpeed launcher and a notebook that imports only ``llava``.
``LLM2CLIP_LLAVA_HOOK=0`` switches it off.
"""

import os
import sys

# The three places of LLaVA that are completed, each as soon as it has run:
WATCHED = (
    "llava.model.multimodal_encoder.builder",  # learns the tower's name, before llava_arch binds the function
    "llava.model.llava_arch",  # writes into the configuration which tower a model is trained with
    "llava.model.builder",  # knows the checkpoint's folder, where a bundled tower lies
)


class Watcher:
    """A finder that answers for WATCHED alone, with whatever spec the other finders have for it."""

    def find_spec(self, fullname, path=None, target=None):
        """The spec that an import without this finder would get, its loader told to call ``register``."""
        if fullname not in WATCHED:
            return None
        for finder in sys.meta_path:
            find = None if isinstance(finder, Watcher) else getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find else None
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
        from llava_integration import register

        register.complete(module)
    except Exception as error:  # raising here would surface as "cannot import name LlavaLlamaForCausalLM"
        report(error)


def report(error):
    """One line on stderr: LLaVA goes on, without the tower."""
    print(f"llm2clip: --vision_tower llm2clip is unknown in this process: {error!r}", file=sys.stderr)


def install():
    """Start to watch, once a process; modules of LLaVA that are loaded already are completed at once."""
    if os.environ.get("LLM2CLIP_LLAVA_HOOK") == "0" or any(isinstance(finder, Watcher) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, Watcher())
    for name in WATCHED:
        if name in sys.modules:
            complete(sys.modules[name])
