"""The only import of DeepSpeed: an engine that trains a module, and whole states in and out of it.

States are read and written a parameter at a time, under the module's own names and in fp32, whatever the ZeRO
stage, the precision and the number of ranks. So a checkpoint made by 8 ranks under ZeRO-3 goes on with 2 under
ZeRO-1, and DeepSpeed's universal checkpoints (whose ZeRO-3 load mixes up the groups) are not needed.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from llm2clip_plugin.train.deepspeed_config import offloads_optimizer, zero_stage
from llm2clip_plugin.train.distributed import rank, set_single_process_environment, world_size

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def start_ranks() -> torch.device:
    """Join the process group (of one, without a launcher); returns this rank's device."""
    set_single_process_environment()
    prepare_deepspeed()
    accelerator: Any = deepspeed.get_accelerator()
    backend = accelerator.communication_backend_name()
    if not dist.is_initialized():
        atexit.register(_leave_ranks)
    deepspeed.init_distributed("gloo" if backend == "ccl" else backend)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def _leave_ranks() -> None:
    """Close the process group before the interpreter goes: its threads, still there then, may abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def prepare_deepspeed() -> None:
    """Keep DeepSpeed's informational lines off the terminal, and its shared-memory extension unbuilt.

    That C++ extension serves tensor-parallel inference on CPUs alone, yet is compiled for a minute at first use,
    needs a compiler, and a build that was killed leaves a lock that every later run waits for.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if os.environ.get("LLM2CLIP_DEEPSPEED_LOG") != "1":
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


class Engine:
    """A module, its AdamW and DeepSpeed's engine over both.

    One optimizer step is ``accumulation`` times forward, ``backward`` and ``step``. Gradients are summed over the
    micro-batches and averaged over the ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: list[dict[str, Any]],
        adam: dict[str, Any],
        config: dict[str, Any],
        *,
        keep_frozen: bool = True,  # checkpoints hold what is frozen too; not an LLM's weights, which have files
    ) -> None:
        self.stage = zero_stage(config)
        if torch.cuda.is_available() and offloads_optimizer(config):
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, **adam)
        else:
            # torch's own AdamW needs no C++ build, which takes minutes at first use
            optimizer = torch.optim.AdamW(groups, **adam)
        self.module = module
        prepare_deepspeed()
        # ZeRO-0's norm is taken in step() anyway; DeepSpeed's own clipping would take it a second time
        self._clip = float(config.get("gradient_clipping", 0.0)) if self.stage == 0 else 0.0
        config = {**config, "gradient_clipping": 0.0} if self.stage == 0 else config
        with contextlib.redirect_stdout(io.StringIO()):  # BF16_Optimizer prints its memory, group by group
            engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self.device_engine: Any = engine  # its optimizer is one of a dozen classes
        self.accumulation: int = self.device_engine.gradient_accumulation_steps()
        self.device = torch.device(self.device_engine.device)
        self.trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.keep_frozen = keep_frozen
        self.frozen = [(name, p) for name, p in module.named_parameters() if not p.requires_grad and keep_frozen]
        self._local_norm: float | None = None
        if self.stage == 0 and world_size() == 1:
            self.device_engine.enable_backward_allreduce = False  # it would copy every gradient there and back
        if self.stage == 3 and self.device.type == "cpu":
            _wait_for_every_gather()

    # one step -------------------------------------------------------------------------------------

    def __call__(self, *inputs: Tensor | None) -> Any:
        """The module's forward pass."""
        return self.device_engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``: summed, not averaged, over the micro-batches of a step."""
        self.device_engine.backward(loss * self.accumulation)  # DeepSpeed divides by it

    def step(self) -> None:
        """After each micro-batch; the last one of a step updates the parameters."""
        if self.stage == 0 and self.device_engine.is_gradient_accumulation_boundary():
            grads = [p.grad for _, p in self.trained if p.grad is not None]
            norms = [torch.linalg.vector_norm(grad) for grad in grads]
            self._local_norm = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
            if 0 < self._clip < self._local_norm:
                torch._foreach_mul_(grads, self._clip / self._local_norm)
        self.device_engine.step()

    @property
    def grad_norm(self) -> float | None:
        """Global norm of the last step's gradient before clipping, if DeepSpeed tells it."""
        norm = self._local_norm if self._local_norm is not None else self.device_engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def skipped(self) -> int:
        """fp16 updates skipped so far because a gradient overflowed."""
        return int(self.device_engine.skipped_steps)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, for the learning rate."""
        return self.device_engine.optimizer.param_groups

    def clamp(self, parameter: nn.Parameter, low: float, high: float) -> None:
        """Keep a trained parameter within bounds, its fp32 master too."""
        master = self._read(parameter, None)
        if bool(((master < low) | (master > high)).any()):
            self._write(parameter, None, master.clamp(low, high))
            with self.gathered([parameter], modify=True):
                parameter.data.clamp_(low, high)

    @contextmanager
    def gathered(self, parameters: list[nn.Parameter], *, modify: bool = False) -> Iterator[None]:
        """Whole values of parameters that ZeRO-3 has cut up."""
        if self.stage < 3:
            yield
            return
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None):
            yield

    def report(self, values: dict[str, float], samples: int) -> None:
        """Send values to the monitors of the configuration (TensorBoard, W&B, CSV), from rank 0."""
        monitor = self.device_engine.monitor
        if monitor.enabled:
            monitor.write_events([(f"Train/{name}", value, samples) for name, value in values.items()])

    # whole states ---------------------------------------------------------------------------------

    def weights(self, *, keep: bool) -> dict[str, Tensor]:
        """fp32 values of all parameters and buffers on the CPU; every rank calls, ``keep`` says who gets them."""
        values: dict[str, Tensor] = {}
        for name, parameter in self.trained:
            master = self._read(parameter, None)
            if keep:
                values[name] = master.detach().to("cpu", copy=True)
        for name, parameter in self.frozen:
            with self.gathered([parameter]):
                if keep:
                    values[name] = parameter.detach().to("cpu", torch.float32, copy=True)
        if keep and self.keep_frozen:
            persistent = self.module.state_dict(keep_vars=True).keys()
            values |= {n: b.detach().to("cpu", copy=True) for n, b in self.module.named_buffers() if n in persistent}
        return values

    def moments(self, *, keep: bool) -> dict[str, Tensor]:
        """AdamW's ``NAME.exp_avg`` and ``NAME.exp_avg_sq`` on the CPU, empty before the first update."""
        values: dict[str, Tensor] = {}
        if self.updates == 0:
            return values
        self._link_states()
        for name, parameter in self.trained:
            for key in MOMENTS:
                value = self._read(parameter, key)
                if keep and value is not None:
                    values[f"{name}.{key}"] = value.detach().to("cpu", copy=True)
        return values

    def restore(self, weights: dict[str, Tensor], moments: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Put back what ``weights``, ``moments`` and ``scaler_state`` gave. The module held ``weights`` already when
        the engine was made; here the fp32 masters get the digits that a half-precision module lost."""
        for name, parameter in self.trained:
            self._write(parameter, None, weights[name].to(self.device))
        if moments:
            self._make_states(int(state["updates"]))
            for name, parameter in self.trained:
                for key in MOMENTS:
                    if f"{name}.{key}" in moments:
                        self._write(parameter, key, moments[f"{name}.{key}"].to(self.device))
        scaler = self._scaler()
        for field, value in state["scaler"].items():
            if scaler is not None and field in vars(scaler):
                setattr(scaler, field, value)

    @property
    def updates(self) -> int:
        """Updates that AdamW has made (fp16 steps that overflowed are not among them)."""
        for state in self._base().state.values():
            if "step" in state:
                return int(state["step"])
        return 0

    def scaler_state(self) -> dict[str, Any]:
        """Updates, and the fp16 loss scale's fields."""
        scaler = self._scaler()
        fields = vars(scaler) if scaler is not None else {}
        return {"updates": self.updates, "scaler": {key: fields[key] for key in SCALER_FIELDS if key in fields}}

    # DeepSpeed's several optimizers ---------------------------------------------------------------

    def _base(self) -> torch.optim.Optimizer:
        """AdamW itself, inside whatever DeepSpeed wrapped around it."""
        optimizer = self.device_engine.optimizer
        return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer

    def _scaler(self) -> Any:
        """The object that holds the dynamic loss scale, None where nothing is scaled."""
        return self.device_engine.optimizer.loss_scaler if self.device_engine.fp16_enabled() else None

    def _read(self, parameter: nn.Parameter, key: str | None) -> Any:
        """The whole fp32 master (``key`` None) or moment of a trained parameter; a collective under ZeRO."""
        if self.stage > 0:
            return safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
        return parameter.data if key is None else self._base().state.get(parameter, {}).get(key)

    def _write(self, parameter: Any, key: str | None, value: Tensor) -> None:
        """Put a whole master or moment back, each rank its part."""
        if self.stage == 3:
            # safe_set_full_* run past the end of a parameter whose elements are no multiple of the ranks
            size = parameter.ds_tensor.numel()  # pyright: ignore[reportAttributeAccessIssue] - DeepSpeed's
            padded = value.new_zeros(size * world_size())
            padded[: value.numel()] = value.flatten()
            mine = padded.narrow(0, size * rank(), size)
            if key is None:
                safe_set_local_fp32_param(parameter, mine)
            else:
                safe_set_local_optimizer_state(parameter, mine, key)
        elif self.stage > 0 and key is None:
            safe_set_full_fp32_param(parameter, value)
        elif self.stage > 0:
            safe_set_full_optimizer_state(parameter, value, str(key))
        else:
            self._read(parameter, key).copy_(value)

    def _make_states(self, updates: int) -> None:
        """AdamW's states, which it would only make at its first step, with the step count in each of them."""
        base, optimizer = self._base(), self.device_engine.optimizer
        if self.stage == 3:
            masters = optimizer.fp32_partitioned_groups_flat
        elif hasattr(optimizer, "fp32_groups_flat_partition"):  # BF16_Optimizer
            masters = optimizer.fp32_groups_flat_partition
        elif self.stage > 0:
            masters = optimizer.single_partition_of_fp32_groups
        else:
            masters = [p for group in base.param_groups for p in group["params"]]
        as_tensor = isinstance(base, torch.optim.AdamW)
        for master in masters:
            moments = {key: torch.zeros_like(master.data) for key in MOMENTS}
            # a step of its own for each: one shared tensor would advance once per group
            base.state[master] = {"step": torch.tensor(float(updates)) if as_tensor else updates, **moments}
        self._link_states()

    def _link_states(self) -> None:
        """Tell ZeRO-1/2 where the moments are. DeepSpeed does it after the first group's first step, when the other
        groups have none yet, and never again."""
        if self.stage in (1, 2):
            self.device_engine.optimizer._hp_optimizer_states_linked = False
            self.device_engine.optimizer._lazy_init_hp_params_optimizer_state()


def _wait_for_every_gather() -> None:
    """Make ZeRO-3's gathers synchronous on CPU ranks. DeepSpeed before 0.19.8 waits for the last of several alone,
    and gloo finishes them in any order, so a layer could run on weights that have not arrived."""
    from deepspeed import comm

    gather = comm.all_gather_into_tensor
    if gather.__name__ == "gather_and_wait":
        return

    def gather_and_wait(*args: Any, **kwargs: Any) -> Any:
        handle = gather(*args, **kwargs)
        if handle is not None:
            handle.wait()
        return handle

    comm.all_gather_into_tensor = gather_and_wait
