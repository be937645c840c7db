"""On a machine without a GPU, what LLaVA does with CUDA unconditionally does nothing. For tests alone."""

import atexit
import functools
import os
import sys

import torch
import torch.distributed


def waits(collective):
    """A collective of torch.distributed that is over when it returns.

    DeepSpeed's ZeRO-3 starts several gathers and waits for the last one: right on a GPU, whose stream keeps the order,
    but gloo finishes them in any order, so that parameters are used before they have arrived.
    """

    @functools.wraps(collective)
    def waiting(*arguments, **options):
        work = collective(*arguments, **options)
        if work is not None:
            work.wait()
        return work

    return waiting


errors = []  # what ended the process, if an error did


def note_error(*error, hook=sys.excepthook):
    """Remember an error that nobody caught."""
    errors.append(error)
    hook(*error)


def leave_ranks():
    """End a rank without the interpreter's own end, at which the process group that LLaVA leaves open aborts one
    process in ten ("terminate called without an active exception"; see llm2clip_plugin.cli.leave)."""
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if errors else 0)


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
    if torch.distributed.is_available():
        sys.excepthook = note_error
        atexit.register(leave_ranks)
        for name in (
            "all_gather",
            "all_gather_into_tensor",
            "reduce_scatter_tensor",
            "all_reduce",
            "reduce",
            "broadcast",
        ):
            setattr(torch.distributed, name, waits(getattr(torch.distributed, name)))
