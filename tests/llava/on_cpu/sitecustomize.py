"""On a machine without a GPU, what LLaVA does with CUDA unconditionally does nothing. For tests alone."""

import torch

if not torch.cuda.is_available():
    torch.cuda.synchronize = lambda device=None: None  # the end of a full finetune under DeepSpeed
    torch.Tensor.cuda = lambda self, *arguments, **options: self  # llava.eval.*
    tensor_to = torch.Tensor.to

    def to_cpu(self, *arguments, **options):
        """``Tensor.to`` where the device "cuda" means the CPU."""
        if options.get("device") == "cuda":
            options["device"] = "cpu"
        return tensor_to(self, *arguments, **options)

    torch.Tensor.to = to_cpu
    gather = torch.distributed.all_gather_into_tensor

    def gather_and_wait(*arguments, **options):
        """DeepSpeed's ZeRO-3 waits for the last of several gathers alone, and gloo ends them in any order."""
        handle = gather(*arguments, **options)
        if handle is not None:
            handle.wait()
        return handle

    torch.distributed.all_gather_into_tensor = gather_and_wait
