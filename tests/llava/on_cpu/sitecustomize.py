"""On a machine without a GPU, what LLaVA's evaluation does with CUDA unconditionally does nothing. For tests alone.

Its training is completed by the package itself (llava_integration.training); with our hook off, for a comparison, here.
"""

import os

import torch

if os.environ.get("LLM2CLIP_LLAVA_HOOK") == "0" and not torch.cuda.is_available():
    from llava_integration.training import complete_for_cpu

    complete_for_cpu()

if not torch.cuda.is_available():
    torch.Tensor.cuda = lambda self, *arguments, **options: self  # llava.eval.*
    tensor_to = torch.Tensor.to

    def to_cpu(self, *arguments, **options):
        """``Tensor.to`` where the device "cuda" means the CPU."""
        if options.get("device") == "cuda":
            options["device"] = "cpu"
        return tensor_to(self, *arguments, **options)

    torch.Tensor.to = to_cpu
