"""What LLaVA's trainer lacks on the libraries of today, on a machine without a GPU, and for ChatML.

``hook`` calls `complete_trainer` in processes that import ``llava.train.llava_trainer``, as LLaVA's
training does.
"""

import atexit
import contextlib
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed

from llava_integration.plug.compat.completion import replaces
from llava_integration.plug.resumed_data import (
    BASE,
    data_record,
    model_record,
    record_data,
    refuse_other_data,
    refuse_other_model,
)
from llava_integration.plug.towers import record_tower, refuse_other_checkpoints
from llm2clip_plugin.atomic import atomic_file
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.precision import warn_if_slow
from llm2clip_plugin.quiet import quiet_llava

# LLaVA may be in an environment of its own, not where types are checked.
# pyright: reportMissingImports=false


# as a program, and imported by train_mem.py
PROGRAMS = ("__main__", "llava.train.train")
# those that DeepSpeed starts several of and then waits for the last one only
COLLECTIVES = (
    "all_gather all_gather_into_tensor "
    "reduce_scatter_tensor all_reduce reduce broadcast"
).split()
BESIDE_LORA = "non_lora_trainables.bin"
Turns = list[dict[str, str]]


def complete_trainer(module: ModuleType) -> None:
    """Complete ``llava.train.llava_trainer``; a second call does nothing."""
    trainer = module.LLaVATrainer
    if hasattr(trainer, "completed_by_llm2clip"):
        return
    trainer.completed_by_llm2clip = True
    quiet_llava()
    complete_start(trainer, os.path.dirname(str(module.__file__)))
    complete_checkpoints(trainer)
    complete_optimizer(trainer)
    # torch 2.6 and newer do not load numpy's random state, without which the trainer of 4.37 cannot
    # resume.
    if hasattr(torch.serialization, "add_safe_globals"):
        # its module's name depends on numpy's version
        reconstruct: Any = np.zeros(1).__reduce__()[0]
        torch.serialization.add_safe_globals(
            [reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
        )
    if not torch.cuda.is_available():
        complete_for_cpu()
        complete_precision(trainer)


def complete_start(trainer: Any, folder: str) -> None:
    """Give LLaVA's program in ``folder`` our `preprocess`, and refuse checkpoints of another tower,
    of other data or of another model."""
    file = os.path.realpath(os.path.join(folder, "train.py"))

    # The program, which no import hook sees as __main__, has made its dataset by then; that
    # prepares a sample when it is read.
    @replaces(trainer, "__init__")
    def init(original: Any, self: Any, *arguments: Any, **options: Any) -> None:
        for program in map(sys.modules.get, PROGRAMS):
            if os.path.realpath(getattr(program, "__file__", None) or "") == file:
                setattr(program, "preprocess_mpt", preprocess)  # noqa: B010 - a name of LLaVA's module
        original(self, *arguments, **options)
        refuse_other_checkpoints(self.args.output_dir, self.model.config)
        data_args = getattr(self.train_dataset, "data_args", None)
        data = getattr(data_args, "data_path", None) or ""
        refuse_other_data(self.args.output_dir, data)
        model = self.model.config._name_or_path
        refuse_other_model(self.args.output_dir, model)
        started_from = model_record(model)
        # on every rank: LLaVA writes config.json once a node
        if getattr(self.args, "lora_enable", False):
            setattr(self.model.config, BASE, started_from)
        self.llm2clip_data = {}
        if self.args.should_save:
            self.llm2clip_data = data_record(data) | started_from


def complete_checkpoints(trainer: Any) -> None:
    """Save and load what LLaVA leaves out of a LoRA checkpoint."""

    # A LoRA checkpoint gets no config.json, which would name its tower.
    @replaces(trainer, "_save")
    def save(
        original: Any,
        self: Any,
        output_dir: str | None = None,
        *arguments: Any,
        **options: Any,
    ) -> None:
        original(self, output_dir, *arguments, **options)
        if output_dir and os.path.isdir(output_dir):
            record_tower(output_dir, self.model.config)
            record_data(output_dir, self.llm2clip_data)
            # DeepSpeed and FSDP save and read all weights themselves
            if not self.is_deepspeed_enabled and not self.is_fsdp_enabled:
                save_outside_lora(self.model, output_dir)

    @replaces(trainer, "_load_from_checkpoint")
    def load_from_checkpoint(
        original: Any, self: Any, resume_from_checkpoint: str, model: Any = None
    ) -> None:
        dtypes = {
            name: parameter.dtype for name, parameter in self.model.named_parameters()
        }
        original(self, resume_from_checkpoint, model)
        for name, parameter in self.model.named_parameters():
            # newer PEFT reads LoRA weights as float32
            if parameter.dtype != dtypes[name]:
                parameter.data = parameter.data.to(dtypes[name])
        if not self.is_fsdp_enabled:
            load_outside_lora(self.model, resume_from_checkpoint)


def complete_optimizer(trainer: Any) -> None:
    """Let training go on under DeepSpeed, and with groups that LLaVA leaves empty."""

    # DeepSpeed counts the micro-batches itself. accelerate before 1.2 enters its no_sync (since
    # 0.15.4) for all but the last of a step, which ZeRO-2 and ZeRO-3 refuse, and in which no stage
    # allows engine.step(), called after each.
    @replaces(trainer, "create_accelerator_and_postprocess")
    def create_accelerator_and_postprocess(original: Any, self: Any) -> None:
        original(self)
        if self.is_deepspeed_enabled:
            self.accelerator.no_sync = lambda model: contextlib.nullcontext()

    # LLaVA makes empty groups for LoRA, whose weights have no biases. ZeRO drops them after the
    # scheduler is made, and the scheduler of newer torch then stops training at the first step.
    @replaces(trainer, "create_optimizer")
    def create_optimizer(original: Any, self: Any) -> torch.optim.Optimizer:
        optimizer = original(self)
        optimizer.param_groups[:] = [
            group for group in optimizer.param_groups if group["params"]
        ]
        return optimizer


def outside_lora(model: Any) -> dict[str, torch.nn.Parameter]:
    """What a LoRA training trains in addition to its adapter, the projector and an unfrozen tower,
    by the names that LLaVA's own libraries give; {} without LoRA."""
    from llava_integration.plug.compat.patches import names_of_4

    has_lora = False
    others = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_" in name:
            has_lora = True
        else:
            others[name] = parameter
    return names_of_4(others) if has_lora else {}


def save_outside_lora(model: Any, folder: str) -> None:
    """Write what PEFT leaves out of a checkpoint, under the name and keys that LLaVA gives it at
    the end of a training."""
    weights = {
        name: value.detach().cpu() for name, value in outside_lora(model).items()
    }
    if weights:
        with atomic_file(Path(folder) / BESIDE_LORA) as temporary:
            torch.save(weights, temporary)


def load_outside_lora(model: Any, folder: str) -> None:
    """Read what `save_outside_lora` wrote into a model that is trained further. Raises
    ContractError if the file is missing, damaged or of another model: the projector would start
    anew."""
    parameters = outside_lora(model)
    if not parameters:
        return
    path = Path(folder) / BESIDE_LORA
    advice = "delete the checkpoint, or choose another --output_dir"
    if not path.is_file():
        raise ContractError(
            f"{folder} has no {BESIDE_LORA}: training would resume with a projector that has "
            f"learned nothing; {advice}"
        )
    with errors_about(path, fix=advice):
        weights = torch.load(path, map_location="cpu", weights_only=True)
    expected = {name: tuple(value.shape) for name, value in parameters.items()}
    saved = {name: tuple(value.shape) for name, value in weights.items()}
    if saved != expected:
        differing = sorted(dict(saved.items() ^ expected.items()))
        raise ContractError(
            f"{path} does not fit the model: {', '.join(differing)}; {advice}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def complete_for_cpu() -> None:
    """Let LLaVA train without a GPU, with any number of ranks."""
    # LLaVA calls it before it saves a full finetune
    torch.cuda.synchronize = lambda device=None: None
    for name in COLLECTIVES:
        replaces(torch.distributed, name)(finished)
    if find_spec("deepspeed"):
        import deepspeed

        # Only for tensor-parallel inference, but compiled for minutes, in silence, by the first run
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    atexit.register(leave_ranks)


def complete_precision(trainer: Any) -> None:
    """Let LLaVA train in float32 on a CPU.

    With ``--bf16 False``, LLaVA's program casts the tower to float16 and leaves the rest of the
    model in float32. A CPU computes float16 slowly, torch 2.1 not at all. The tower's weights are
    those that LLaVA has rounded; it computes with them in float32, and an unfrozen one is trained
    in float32. ``--bf16 True`` gets a warning where this CPU is slow in it.
    """

    @replaces(trainer, "__init__")
    def init(original: Any, self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        if self.args.bf16:
            warn_if_slow(torch.bfloat16, self.args.device, "--bf16", "training")
        # a language model that is trained on text alone has none
        get_tower = getattr(self.model, "get_vision_tower", lambda: None)
        tower = get_tower()
        if tower is not None and not (self.args.bf16 or self.args.fp16):
            tower.to(dtype=torch.float32)


def finished(collective: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """A collective that is over when it returns.

    DeepSpeed before 0.19.8 starts several gathers and waits for the last one: right on a GPU, whose
    stream keeps their order, but gloo finishes them in any order, and ZeRO-3 would compute with
    parameters that have not arrived.
    """
    work = collective(*arguments, **options)
    if work is not None:
        work.wait()
    return work


def leave_ranks() -> None:
    """End a rank without the interpreter's shutdown, which aborts one in ten: LLaVA leaves the
    process group open."""
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        failed = hasattr(sys, "last_value")  # set by an error that nobody caught
        os._exit(1 if failed else 0)


# ``--version chatml_direct`` and ``mpt``: labels for language models that speak ChatML. LLaVA's
# ``preprocess_mpt`` counts a token too few in each round, takes that for a tokenization mismatch,
# and ignores all labels of the sample.


def preprocess(
    sources: list[Turns], tokenizer: Any, has_image: bool = False
) -> dict[str, list[torch.Tensor]]:
    """Token ids and labels of conversations, (T,) each, in the template of ``--version``.

    An answer is learned with the ``<|im_end|>`` that ends it; every other label is LLaVA's
    IGNORE_INDEX.
    """
    from llava.mm_utils import tokenizer_image_token

    def ids_of(text: str) -> list[int]:
        if has_image:
            ids: Any = tokenizer_image_token(text, tokenizer)
            return ids
        return tokenizer(text).input_ids

    rows = [labeled(turns, ids_of) for turns in sources]
    return {
        "input_ids": [ids for ids, _ in rows],
        "labels": [labels for _, labels in rows],
    }


def shared_length(first: list[int], second: list[int]) -> int:
    """How many ids two lists have in common at their beginning."""
    length = 0
    for one_id, other_id in zip(first, second, strict=False):
        if one_id != other_id:
            break
        length += 1
    return length


def labeled(
    turns: Turns, ids_of: Callable[[str], list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of one conversation; turns before the first question are left out, as in
    LLaVA's templates."""
    from llava import conversation
    from llava.constants import IGNORE_INDEX

    template = conversation.default_conversation.copy()
    roles = template.roles
    template.messages = []
    prefixes = []  # of each answer: the ids before it, and those through its end
    for turn in turns if turns[0]["from"] == "human" else turns[1:]:
        role = roles[len(template.messages) % 2]
        if turn["from"] != ("human" if role == roles[0] else "gpt"):
            raise ValueError(
                f"turns of a conversation must alternate human, gpt, ...; got {turns}"
            )
        template.append_message(role, None)
        before = ids_of(template.get_prompt())
        template.messages[-1][1] = turn["value"]
        if role == roles[1]:
            prefixes.append((before, ids_of(template.get_prompt())))
    ids = ids_of(template.get_prompt())
    labels = [IGNORE_INDEX] * len(ids)
    for before, through in prefixes:
        # a tokenizer may join the last character before the answer with its first one
        start = shared_length(before, ids)
        end = shared_length(through, ids)
        labels[start:end] = ids[start:end]
    return torch.tensor(ids), torch.tensor(labels)
