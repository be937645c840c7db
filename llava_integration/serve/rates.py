"""A learning rate for each module of a LLaVA, in trainers that have one rate for all.

    from trl import SFTTrainer
    trainer = with_rates(SFTTrainer, vision_tower=2e-6, multi_modal_projector=1e-4)(model=...)

For transformers' Trainer and what is derived from it: TRL, LLaMA-Factory. See docs/vlm.md.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

# children that contain the whole model: transformers', PEFT's, DistributedDataParallel's
WRAPPERS = ("model", "base_model", "module")
# a module next to the one that it belongs to: the LLM's output layer
PART_OF = {"lm_head": "language_model"}


def with_rates(trainer: type, **rates: float) -> type:
    """A subclass of ``trainer`` with these peak learning rates, by name of a module of
    transformers' LLaVA: vision_tower, multi_modal_projector, language_model (and with it lm_head,
    unless that has a rate of its own); the other parameters have the rate of the trainer's
    settings.

    Schedule and weight decay stay those of the settings. Raises ValueError for a rate that is no
    number; so does the trainer, when it is made, for a module that the model lacks or a scheduler
    of one's own, and training for a module without trained parameters. An optimizer that DeepSpeed
    makes from its own configuration is not split.
    """
    for module, rate in rates.items():
        check_rate(module, rate)

    class WithRates(trainer):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            check_modules(self.model, rates)
            if self.lr_scheduler is not None:
                raise ValueError(
                    "the trainer was given a scheduler (optimizers=...), which is of the "
                    "optimizer's own groups; pass optimizers=(OPTIMIZER, None), or none"
                )

        def create_optimizer(self, *arguments: Any, **more: Any) -> Any:
            optimizer = super().create_optimizer(*arguments, **more)
            optimizer.param_groups = split(optimizer.param_groups, self.model, rates)
            return optimizer

    WithRates.__name__ = trainer.__name__  # reports and model cards show it
    return WithRates


def check_rate(module: str, rate: Any) -> None:
    """ValueError unless ``rate`` is a finite number, 0 or above."""
    is_number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
    if not is_number or not 0 <= rate < math.inf:
        raise ValueError(
            f"learning rate for {module} is {rate!r}, expected a number, 0 or above, such as 1e-5"
        )


def check_modules(model: nn.Module, rates: Mapping[str, float]) -> None:
    """ValueError for a rate of a module that the model lacks."""
    module_names: set[str] = set()
    for name, _ in model.named_parameters():
        module_names.update(name.split("."))
    unknown = sorted(set(rates) - module_names)
    if unknown:
        raise ValueError(
            f"learning rate for {', '.join(unknown)}, which the model does not have; its modules: "
            f"{', '.join(modules_of(model))}"
        )


def modules_of(model: nn.Module) -> list[str]:
    """The names of a model's parts, inside whatever wraps them."""
    names = []
    inner: nn.Module | None = model
    while inner is not None:
        children = dict(inner.named_children())
        inner = None
        for name, child in children.items():
            if name in WRAPPERS:
                inner = child
            else:
                names.append(name)
    return sorted(names)


def split(
    groups: list[dict[str, Any]], model: nn.Module, rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The optimizer's groups, each divided by module. First come those without a rate of their own,
    for trainers log the rate of the first group."""
    module_of = {}
    for name, parameter in model.named_parameters():
        module_of[parameter] = module_with_rate(name.split("."), rates)
    others = []
    with_rate = []
    unused = set(rates)
    for group in groups:
        by_module: dict[str, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_module.setdefault(module_of.get(parameter, ""), []).append(parameter)
        for module, parameters in by_module.items():
            part = {**group, "params": parameters}
            if module:
                with_rate.append({**part, "lr": rates[module]})
            else:
                others.append(part)
        unused -= set(by_module)
    if unused:
        modules = ", ".join(sorted(unused))
        raise ValueError(
            f"learning rate for {modules}, which has no trained parameter; "
            "unfreeze it, or leave out its rate"
        )
    return others + with_rate


def module_with_rate(path: list[str], rates: Mapping[str, float]) -> str:
    """The innermost module of a parameter that has a rate; "" if none has. ``path``: its name's
    parts."""
    for module in reversed(path):
        if module in rates:
            return module
    for part in path:
        whole = PART_OF.get(part, "")
        if whole in rates:
            return whole
    return ""
