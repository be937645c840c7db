"""On a machine without a GPU, what LLaVA's evaluation does with CUDA unconditionally does nothing.
For tests alone.

Its training is completed by the package itself (llava_integration.plug.training); with our hook
off, for a comparison, here. Otherwise it waits for the import of torch, which most processes of a
shell script never do.
"""

import os
import sys
from importlib.machinery import PathFinder


def complete(torch):
    """Called when torch has been imported."""
    if torch.cuda.is_available():
        return
    torch.Tensor.cuda = lambda self, *arguments, **options: self  # llava.eval.*
    tensor_to = torch.Tensor.to

    def to_cpu(self, *arguments, **options):
        """``Tensor.to`` where the device "cuda" means the CPU."""
        if options.get("device") == "cuda":
            options["device"] = "cpu"
        return tensor_to(self, *arguments, **options)

    torch.Tensor.to = to_cpu


class Watcher:
    """Completes torch when it is executed; many only ask for its spec."""

    def find_spec(self, name, path=None, target=None):
        """See ``importlib.abc.MetaPathFinder``."""
        if name != "torch":
            return None
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            complete(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Watcher())
# at once: DeepSpeed imports torch while it is not yet whole itself
if os.environ.get("LLM2CLIP_LLAVA_HOOK") == "0":
    import torch

    if not torch.cuda.is_available():
        from llava_integration.plug.training import complete_for_cpu

        complete_for_cpu()
