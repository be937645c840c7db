"""Weights and optimizer states of an engine, complete and under the module's own names.

They are read and written one parameter at a time, in fp32, whatever the ZeRO stage, the precision and the number of
ranks. So a checkpoint written by 8 ranks under ZeRO-3 resumes on 2 under ZeRO-1, and DeepSpeed's universal checkpoints
(whose ZeRO-3 load gives every parameter group the settings of the first) are not needed. Optimizers ``by_rank`` are the
exception.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm2clip_plugin.train.distributed import rank, world_size
from llm2clip_plugin.train.optim import AdamW
from llm2clip_plugin.train.tensor_files import HostCopies

SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class EngineStates:
    """The part of an engine that checkpoints use. Every rank calls each method."""

    device_engine: Any  # DeepSpeed's; its optimizer is one of a dozen classes
    stage: int  # of ZeRO
    device: torch.device
    module: nn.Module
    optimizer: AdamW
    trained: list[tuple[str, nn.Parameter]]
    frozen: list[tuple[str, nn.Parameter]]
    keep_frozen: bool  # weights() includes what is frozen
    gathered: Callable[..., AbstractContextManager[None]]
    _read: Callable[[nn.Parameter, str | None], Tensor | None]
    _write: Callable[[nn.Parameter, str | None, Tensor], None]

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

    def read_trained(
        self, copy: Callable[[str, Tensor], Tensor] | None, names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """The masters of trained parameters, as made by ``copy``; {} on ranks without one. names: all by default."""
        values: dict[str, Tensor] = {}
        for name, parameter in self.trained:
            if names is None or name in names:
                master = self._read(parameter, None)
                if copy and master is not None:
                    values[name] = copy(name, master)
        return values

    def write_trained(self, values: Mapping[str, Tensor]) -> None:
        """The inverse of ``read_trained``: each rank writes its part of the masters."""
        for name, parameter in self.trained:
            if name in values:
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
        for name, value in self._moments_by_rank() if self.optimizer.by_rank else self._moments_by_name():
            if copy:
                moments[name] = copy(name, value)
        return moments

    def _moments_by_name(self) -> Iterator[tuple[str, Tensor]]:
        self._link()
        for moment in self.optimizer.moments:
            for name, parameter in self.trained:
                if (value := self._read(parameter, moment)) is not None:
                    yield f"{name}.{moment}", value

    def _moments_by_rank(self) -> Iterator[tuple[str, Tensor]]:
        """``zero2-of-4.0.1.state1``: of rank 0's second master. Masters have the same shapes on all ranks."""
        for number, master in enumerate(self.masters()):
            for moment in self._held(master):
                own = self._base.state[master][moment]
                for source in range(world_size() if self.stage else 1):
                    value = own if source == rank() or not self.stage else torch.empty_like(own)
                    if self.stage and world_size() > 1:
                        dist.broadcast(value, source)
                    yield f"{self._layout}.{source}.{number}.{moment}", value

    def _held(self, master: Tensor) -> list[str]:
        """The moments of a master; one that is too small for 8 bits has fewer."""
        return [moment for moment in self.optimizer.moments if moment in self._base.state.get(master, {})]

    @property
    def _layout(self) -> str:
        """What decides which values a rank's masters hold."""
        return f"zero{self.stage}-of-{world_size() if self.stage else 1}"

    def restore(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Put back what ``weights``, ``moments`` and ``scaler_state`` returned. The module held ``weights`` when the
        engine was made; here the fp32 masters get the digits that a half-precision module lost.

        Raises ValueError if another kind of optimizer wrote the moments, or one ``by_rank`` on other ranks.
        """
        self.write_trained(weights)
        if moments:
            for master in self.masters():
                empty = self.optimizer.empty_state(self._base, master, int(state["updates"]))
                self._base.state[master] = empty
            (self._restore_by_rank if self.optimizer.by_rank else self._restore_by_name)(moments)
        scaler = self._scaler
        for field, value in state["scaler"].items():
            if scaler is not None and field in vars(scaler):
                setattr(scaler, field, value)

    def _restore_by_name(self, moments: Mapping[str, Tensor]) -> None:
        self._link()
        restored = 0  # a parameter without gradient has no moments
        for moment in self.optimizer.moments:
            for name, parameter in self.trained:
                if (saved := moments.get(f"{name}.{moment}")) is not None:
                    self._write(parameter, moment, saved.to(self.device))
                    restored += 1
        if not restored:
            raise ValueError(
                f"the checkpoint's moments ({next(iter(moments))}, ...) are not those of {self.optimizer.name}: resume "
                "with the --optimizer that wrote it"
            )

    def _restore_by_rank(self, moments: Mapping[str, Tensor]) -> None:
        for number, master in enumerate(self.masters()):
            for moment in self._held(master):
                own = self._base.state[master][moment]
                saved = moments.get(f"{self._layout}.{rank() if self.stage else 0}.{number}.{moment}")
                if saved is None or (saved.shape, saved.dtype) != (own.shape, own.dtype):
                    raise ValueError(
                        f"the checkpoint's moments ({next(iter(moments))}, ...) do not fit {self.optimizer.name} in "
                        f"{self._layout}: resume on as many ranks, with the ZeRO stage and --optimizer that wrote it"
                    )
                own.copy_(saved)

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

    def _link(self) -> None:
        """Make ZeRO-1 and 2 look up the states' tensors anew. DeepSpeed does it once, after the first group's first
        step, when the other groups have none yet."""
        if self.stage in (1, 2):
            self.device_engine.optimizer._hp_optimizer_states_linked = False
            self.device_engine.optimizer._lazy_init_hp_params_optimizer_state()
