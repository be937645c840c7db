"""What LLaVA's trainer lacks on the libraries of today, and on a machine without a GPU.

``hook`` calls `complete_trainer` in processes that import ``llava.train.llava_trainer``, as LLaVA's training does.
"""

import atexit
import contextlib
import functools
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed

from llava_integration import chatml
from llm2clip_plugin.quiet import quiet_llava

# Those that DeepSpeed starts several of and then waits for the last one only
COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_reduce",
    "reduce",
    "broadcast",
)


def complete_trainer(module: ModuleType) -> None:
    """Complete ``llava.train.llava_trainer``; a second call does nothing."""
    trainer = module.LLaVATrainer
    original = trainer.create_accelerator_and_postprocess
    if original.__module__ == __name__:
        return
    quiet_llava()
    trainer.create_accelerator_and_postprocess = let_deepspeed_accumulate(original)
    chatml.complete_trainer(module)
    if schedulers_count_groups():
        trainer.create_optimizer = without_empty_groups(trainer.create_optimizer)
    trust_random_states()
    sys.excepthook = functools.partial(end_by_error, sys.excepthook)
    if not torch.cuda.is_available():
        complete_for_cpu()


def let_deepspeed_accumulate(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """Make accelerate leave gradient accumulation to DeepSpeed, which counts the micro-batches itself.

    accelerate before 1.2 enters DeepSpeed's ``no_sync`` (since 0.15.4) for every micro-batch but the last of a step,
    which ZeRO-2 and ZeRO-3 refuse, and in which no stage allows ``engine.step()``, called after each micro-batch.
    """

    @functools.wraps(original, assigned=("__name__", "__qualname__", "__doc__"))
    def create_accelerator_and_postprocess(self: Any) -> None:
        original(self)
        if self.is_deepspeed_enabled:
            self.accelerator.no_sync = lambda model: contextlib.nullcontext()

    return create_accelerator_and_postprocess


def schedulers_count_groups() -> bool:
    """Whether this torch's schedulers refuse an optimizer that has lost a group; older ones don't notice."""
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [parameter]} for parameter in parameters], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    del optimizer.param_groups[1]
    try:
        optimizer.step()
        scheduler.step()
    except ValueError:
        return True
    return False


def without_empty_groups(original: Callable[[Any], torch.optim.Optimizer]) -> Callable[[Any], torch.optim.Optimizer]:
    """An optimizer without the empty groups that LLaVA makes for LoRA, whose weights have no biases.

    ZeRO drops them after the scheduler is made, and the scheduler then stops training at the first step.
    """

    @functools.wraps(original, assigned=("__name__", "__qualname__", "__doc__"))
    def create_optimizer(self: Any) -> torch.optim.Optimizer:
        optimizer = original(self)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    return create_optimizer


def trust_random_states() -> None:
    """Let torch 2.6 and newer load numpy's random state, without which the trainer of 4.37 cannot resume."""
    if hasattr(torch.serialization, "add_safe_globals"):
        reconstruct: Any = np.zeros(1).__reduce__()[0]  # its module's name depends on numpy's version
        torch.serialization.add_safe_globals([reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))])


def complete_for_cpu() -> None:
    """Let LLaVA train without a GPU, with any number of ranks."""
    torch.cuda.synchronize = lambda device=None: None  # LLaVA calls it before it saves a full finetune
    for name in COLLECTIVES:
        setattr(torch.distributed, name, finish_at_once(getattr(torch.distributed, name)))
    if find_spec("deepspeed"):
        import deepspeed

        # Only for tensor-parallel inference, but compiled for minutes, in silence, by the first run
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    atexit.register(leave_ranks)


def finish_at_once(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective that is over when it returns.

    DeepSpeed before 0.19.8 starts several gathers and waits for the last one: right on a GPU, whose stream keeps their
    order, but gloo finishes them in any order, and ZeRO-3 would compute with parameters that have not arrived.
    """

    @functools.wraps(collective)
    def finished(*arguments: Any, **options: Any) -> Any:
        work = collective(*arguments, **options)
        if work is not None:
            work.wait()
        return work

    return finished


failed = False  # whether an error that nobody caught ends this process


def end_by_error(hook: Callable[..., None], kind: type[BaseException], *error: Any) -> None:
    """`sys.excepthook` that remembers the error for `leave_ranks`; Ctrl-C is a line, not a traceback on each rank."""
    global failed
    failed = True
    if not issubclass(kind, KeyboardInterrupt):
        hook(kind, *error)
    elif os.environ.get("RANK", "0") == "0":
        print(
            "interrupted; rerun the same command to resume from the newest checkpoint-* in --output_dir",
            file=sys.stderr,
        )


def leave_ranks() -> None:
    """End a rank without the interpreter's shutdown, which aborts one in ten: LLaVA leaves the process group open."""
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if failed else 0)
