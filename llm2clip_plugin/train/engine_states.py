"""Weights and optimizer states of an engine, complete and under the module's own names.

They are read and written one parameter at a time, in fp32, whatever the ZeRO stage, the precision and the number of
ranks. So a checkpoint written by 8 ranks under ZeRO-3 resumes on 2 under ZeRO-1, and DeepSpeed's universal checkpoints
(whose ZeRO-3 load gives every parameter group the settings of the first) are not needed.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip_plugin.train.host_copies import HostCopies
from llm2clip_plugin.train.optimizers.base import OptimizerSpec

SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class EngineStates(ABC):
    """The part of an engine that checkpoints use. Every rank calls each method."""

    device_engine: Any  # DeepSpeed's; its optimizer is one of a dozen classes
    stage: int  # of ZeRO
    device: torch.device
    module: nn.Module
    optimizer: OptimizerSpec
    trained: list[tuple[str, nn.Parameter]]
    frozen: list[tuple[str, nn.Parameter]]
    keep_frozen: bool  # weights() includes what is frozen

    @abstractmethod
    def gathered(self, parameters: list[nn.Parameter], *, modify: bool = False) -> AbstractContextManager[None]:
        """Full values of parameters that ZeRO-3 has partitioned."""

    @abstractmethod
    def _read(self, parameter: nn.Parameter, key: str | None) -> Tensor | None:
        """The full fp32 master (``key`` None) or a tensor of the optimizer's state; a collective under ZeRO."""

    @abstractmethod
    def _write(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        """The inverse of ``_read``: each rank writes its part of ``value``."""

    def weights(self, copy: HostCopies | None) -> dict[str, Tensor]:
        """fp32 values of all parameters, and all persistent buffers, as made by ``copy``; {} on ranks without one."""
        values = self.read_trained(copy)
        for name, parameter in self.frozen:
            with self.gathered([parameter]):
                if copy:
                    values[name] = copy(name, parameter, torch.float32)
        if copy and self.keep_frozen:
            persistent = self.module.state_dict(keep_vars=True).keys()
            values |= {n: copy(n, buffer) for n, buffer in self.module.named_buffers() if n in persistent}
        return values

    def read_trained(self, copy: HostCopies | None) -> dict[str, Tensor]:
        """The masters of all trained parameters, as made by ``copy``; {} on ranks without one."""
        values: dict[str, Tensor] = {}
        for name, parameter in self.trained:
            master = self._read(parameter, None)
            if copy and master is not None:
                values[name] = copy(name, master)
        return values

    def write_trained(self, values: Mapping[str, Tensor]) -> None:
        """The inverse of ``read_trained``: each rank writes its part of the masters."""
        for name, parameter in self.trained:
            self._write(parameter, None, values[name].to(self.device))

    @contextmanager
    def exchanged(self, others: list[Tensor]) -> Iterator[None]:
        """Inside the block, ``masters()`` hold the values of ``others``, and ``others`` theirs. For reading and writing
        alone: the module's weights stay as they are."""
        self._exchange(others)
        yield
        self._exchange(others)

    @torch.no_grad()
    def _exchange(self, others: list[Tensor]) -> None:
        for master, other in zip(self.masters(), others, strict=True):
            value = master.clone()
            master.copy_(other)
            other.copy_(value)

    def moments(self, copy: HostCopies | None) -> dict[str, Tensor]:
        """The optimizer's moments, ``NAME.exp_avg`` and so on, as made by ``copy``; {} before the first update and on
        ranks without one."""
        moments: dict[str, Tensor] = {}
        if self.updates == 0:
            return moments
        for moment in self.optimizer.moments:
            with self._exposed(moment):
                for name, parameter in self.trained:
                    values: dict[str, Tensor] = {}
                    for key in self.optimizer.keys(moment):
                        value = self._read(parameter, key)
                        if copy and value is not None:
                            values[key] = value.detach()
                    packed = self.optimizer.pack(moment, values) if values else {}
                    if copy:
                        moments |= {f"{name}.{key}": copy(f"{name}.{key}", value) for key, value in packed.items()}
        return moments

    def restore(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Put back what ``weights``, ``moments`` and ``scaler_state`` returned. The module held ``weights`` when the
        engine was made; here the fp32 masters get the digits that a half-precision module lost.

        Raises ValueError if another kind of optimizer wrote the moments.
        """
        self.write_trained(weights)
        if moments:
            for master in self.masters():
                empty = self.optimizer.empty_state(self._base, master, int(state["updates"]))
                self._base.state[master] = empty
            for moment in self.optimizer.moments:
                with self._exposed(moment, absorb=True):
                    for name, parameter in self.trained:
                        values = self.optimizer.unpack(moment, lambda key, name=name: moments.get(f"{name}.{key}"))
                        for key, value in values.items():
                            self._write(parameter, key, value.to(self.device))
        scaler = self._scaler
        for field, value in state["scaler"].items():
            if scaler is not None and field in vars(scaler):
                setattr(scaler, field, value)

    @property
    def updates(self) -> int:
        """Updates that the optimizer has made; fp16 steps that overflowed don't count."""
        return next((int(state["step"]) for state in self._base.state.values() if "step" in state), 0)

    def scaler_state(self) -> dict[str, Any]:
        """Updates, and the fields of the fp16 loss scale."""
        fields = vars(self._scaler) if self._scaler is not None else {}
        return {"updates": self.updates, "scaler": {key: fields[key] for key in SCALER_FIELDS if key in fields}}

    @property
    def _base(self) -> torch.optim.Optimizer:
        """The optimizer itself, inside whatever DeepSpeed wrapped around it."""
        optimizer = self.device_engine.optimizer
        return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer

    @property
    def _scaler(self) -> Any:
        """The object that holds the dynamic loss scale; None if nothing is scaled."""
        return self.device_engine.optimizer.loss_scaler if self.device_engine.fp16_enabled() else None

    def masters(self) -> list[Tensor]:
        """The fp32 tensors that the optimizer updates on this rank: the parameters, or flat partitions of them."""
        optimizer = self.device_engine.optimizer
        if self.stage == 3:
            return optimizer.fp32_partitioned_groups_flat
        if hasattr(optimizer, "fp32_groups_flat_partition"):  # BF16_Optimizer
            return optimizer.fp32_groups_flat_partition
        if self.stage > 0:
            return optimizer.single_partition_of_fp32_groups
        return [p for group in self._base.param_groups for p in group["params"]]

    @contextmanager
    def _exposed(self, moment: str, *, absorb: bool = False) -> Iterator[None]:
        """Inside the block, every state has the elementwise tensors of a moment; ``absorb``: they are written to."""
        exposed = [(state, self.optimizer.expose(state, moment)) for state in self._base.state.values() if state]
        for state, tensors in exposed:
            state.update(tensors)
        self._link()
        yield
        for state, tensors in exposed:
            for key in tensors:
                del state[key]
            if absorb:
                self.optimizer.absorb(state, moment, tensors)
        self._link()

    def _link(self) -> None:
        """Make ZeRO-1 and 2 look up the states' tensors anew. DeepSpeed does it once, after the first group's first
        step, when the other groups have none yet."""
        if self.stage in (1, 2):
            self.device_engine.optimizer._hp_optimizer_states_linked = False
            self.device_engine.optimizer._lazy_init_hp_params_optimizer_state()
