"""A learning rate for each module of a LLaVA, in trainers that have one rate for all.

    from trl import SFTTrainer
    trainer = with_rates(SFTTrainer, vision_tower=2e-6, multi_modal_projector=1e-4)(model=...)

For transformers' Trainer and what is derived from it: TRL, LLaMA-Factory. See docs/vlm.md.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn


def with_rates(trainer: type, **rates: float) -> type:
    """A subclass of ``trainer`` with these peak learning rates, by name of a module of
    transformers' LLaVA (vision_tower, multi_modal_projector, language_model); the other parameters
    have the rate of the trainer's settings.

    Schedule and weight decay stay those of the settings. Training raises ValueError for a module
    without trained parameters. An optimizer that DeepSpeed makes from its own configuration is not
    split.
    """

    class WithRates(trainer):
        def create_optimizer(self, *arguments: Any, **more: Any) -> Any:
            optimizer = super().create_optimizer(*arguments, **more)
            optimizer.param_groups = split(optimizer.param_groups, self.model, rates)
            return optimizer

    WithRates.__name__ = trainer.__name__  # reports and model cards show it
    return WithRates


def split(
    groups: list[dict[str, Any]], model: nn.Module, rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The optimizer's groups, each divided by module. First come those without a rate of their own,
    for trainers log the rate of the first group."""
    module_of = {}
    for name, parameter in model.named_parameters():
        for module in rates:
            if module in name.split("."):
                module_of[parameter] = module
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
