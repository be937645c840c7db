"""The error of a batch whose loss or gradient is not finite: which samples, on which rank."""

import math
from typing import Any

from torch import Tensor

from llm2clip_plugin.errors import NonFiniteLossError
from llm2clip_plugin.train.distributed import gather_objects

NAMED_KEYS = 8  # keys per rank that an error lists


def keys_by_rank(keys: list[str]) -> str:
    """The first keys of each rank; every rank must call this."""
    ranks = enumerate(gather_objects(keys[:NAMED_KEYS]))
    return "; ".join(f"rank {r}: {', '.join(names)}" for r, names in ranks if names)


def non_finite_error(
    values: dict[str, float], finite_b: Tensor, batch: dict[str, Any]
) -> NonFiniteLossError:
    """Names the samples with non-finite features on every rank, or the first samples of the batch
    if there are none; every rank must call this.

    values: the loss and its terms; finite_b: which pairs of this rank have finite features.
    """
    where = f"in the batch that ends at sample {batch['position']}"
    first = keys_by_rank(batch["keys"])
    if math.isfinite(values["loss"]):
        return NonFiniteLossError(
            f"the gradient is not finite (loss {values['loss']:.4g}) {where}; "
            f"it starts with {first}",
            "lower the learning rate, use fp32, or leave such batches out with --skip-bad-batches",
        )
    keys = zip(batch["keys"], finite_b.tolist(), strict=True)
    bad = [key for key, is_finite in keys if not is_finite]
    if named := keys_by_rank(bad):
        count = sum(gather_objects(len(bad)))
        samples = f"{count} samples have non-finite features: {named}"
    else:
        samples = f"all features are finite; the batch starts with {first}"
    terms = ", ".join(f"{name} {value}" for name, value in values.items())
    return NonFiniteLossError(
        f"the loss is not finite {where} ({terms}). {samples}",
        "lower the learning rate, check these samples (a cache: `llm2clip embed --verify`), "
        "or leave such batches out with --skip-bad-batches",
    )
