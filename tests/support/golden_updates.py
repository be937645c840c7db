"""Compares weights after a training with a golden's, by what the training changed.

Another instruction set, or another number of threads, rounds every product otherwise, and Adam
divides by gradients that may be smaller than this rounding, so single elements differ by up to a
step (the learning rate), whatever the code does. The error of a whole tensor, divided by how far
the training moved it, stays small. An error of a thousandth in a rate moves every tensor by about
a thousandth of its update, so it shows in the median over tensors, which a single tensor of small
gradients does not move.
"""

from collections.abc import Mapping
from statistics import median

from torch import Tensor

# the softmax cancels it: its gradient and steps are rounding
CANCELLED = "k_proj.bias"


def update_errors(
    ours: Mapping[str, Tensor],
    golden: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
) -> dict[str, float]:
    """Tensor -> ||ours - golden|| / ||golden - start||, of those that the training moved."""
    assert ours.keys() == golden.keys()
    errors = {}
    for name, value in golden.items():
        if name.endswith(CANCELLED):
            continue
        moved = float((value.double() - start[name].double()).norm())
        wrong = float((ours[name].double() - value.double()).norm())
        if moved:
            errors[name] = wrong / moved
        else:
            assert not wrong, f"{name} is frozen in the golden"
    return errors


def assert_updates_are_golden(
    ours: Mapping[str, Tensor],
    golden: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    *,
    typical: float,
    worst: float,
) -> None:
    """``typical``: bound of the median over tensors. ``worst``: of each."""
    errors = update_errors(ours, golden, start)
    largest = max(errors, key=lambda name: errors[name])
    assert median(errors.values()) < typical, errors
    assert errors[largest] < worst, f"{largest}: {errors[largest]}"
