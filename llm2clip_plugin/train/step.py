"""The seam between loop and model: ``loss, report = step(batch)``.

A step is one update from this rank's rows of the global batch. With one micro-batch it is forward, loss,
backward. With more, gradient caching (Gao et al. 2021, arXiv 2101.06983): every micro-batch is encoded without a
graph, the loss of the whole batch gives the gradient of each feature, and every micro-batch is encoded again
to carry its features' gradients into the parameters. Ranks x micro-batches x accumulation then equal one big
batch, because the negatives are always the global batch.

What is random in a forward pass depends on the sample's place in the run alone, so that the second pass
repeats the first and another number of ranks draws the same: noise on the text side is drawn a sample at a
time, and torch's generator (dropout, stochastic depth) is seeded for each micro-batch by its first sample.

Shape letters: b this rank's pairs, m pairs of a micro-batch, D joint width, W width of an LLM embedding.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llm2clip_plugin.train.distributed import Group, gather_objects, rank, sum_over_ranks, world_size
from llm2clip_plugin.train.engine import Engine
from llm2clip_plugin.train.errors import NonFiniteLossError
from llm2clip_plugin.train.loss import LossConfig, contrastive_loss, sigmoid_loss

MAX_LOG_SCALE = math.log(100)  # the logit scale's bound, as CLIP's
NAMED_KEYS = 8  # keys of a rank that an error lists

Batch = dict[str, Any]  # what data.loader yields


@dataclass(frozen=True, kw_only=True)
class Features:
    """What the terms of a loss see of a batch: this rank's rows."""

    image_bD: Tensor  # L2-normalised
    text_bD: Tensor  # L2-normalised
    log_scale: Tensor  # (1,), natural logarithm
    bias: Tensor  # (1,), of the sigmoid loss; 0 where the module has none
    caption_hashes: Tensor  # (b,) int64
    image_ids: Tensor  # (b,) int64


Term = Callable[[Features], Tensor]


class DualModule(Protocol):
    """What a step needs of a module."""

    logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None

    def __call__(self, pixel_values: Tensor, embeddings: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]: ...


class Scaled(nn.Module):
    """A dual encoder whose forward pass also gives its logit scale and bias, which ZeRO-3 only gathers there."""

    def __init__(self, dual: Any) -> None:  # an nn.Module that is a Dual
        super().__init__()
        self.dual = dual

    def forward(
        self, pixel_values: Tensor, embeddings: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(m, 3, S, S) and (m, W) -> features (m, D) twice, log scale (1,), bias (1,); all fp32."""
        image_mD, text_mD = self.dual(pixel_values, embeddings, noise)
        scale, bias = self.dual.logit_scale, self.dual.logit_bias
        bias = torch.zeros_like(scale) if bias is None else bias
        return image_mD.float(), text_mD.float(), scale.float() * 1, bias.float() * 1


def loss_terms(config: LossConfig, *, group: Group = None) -> dict[str, tuple[float, Term]]:
    """The named, weighted terms of a configuration, over the batch of a group of ranks."""

    def infonce(x: Features) -> Tensor:
        return contrastive_loss(x.image_bD, x.text_bD, x.log_scale.exp(), **_shared(x, config, group))

    def sigmoid(x: Features) -> Tensor:
        return sigmoid_loss(x.image_bD, x.text_bD, x.log_scale.exp(), x.bias, **_shared(x, config, group))

    return {config.kind: (config.weight, {"infonce": infonce, "sigmoid": sigmoid}[config.kind])}


def _shared(x: Features, config: LossConfig, group: Group) -> dict[str, Any]:
    return {
        "caption_hashes": x.caption_hashes if config.mask_same_caption else None,
        "image_ids": x.image_ids if config.mask_same_image else None,
        "block": config.block,
        "group": group,
    }


class ContrastiveStep(ABC):
    """One optimizer step over this rank's rows of a global batch, whatever the two sides of its pairs are.

    ``batch``: caption_hashes and image_ids (b,), keys (b), ``position``, the number of samples that the run has
    consumed after this batch, and what the subclass encodes.
    """

    def __init__(self, engine: Engine, terms: dict[str, tuple[float, Term]], *, seed: int) -> None:
        self.engine = engine
        self.terms = terms
        self.seed = seed

    @abstractmethod
    def _on_device(self, batch: Batch) -> Batch:
        """The batch where the module is."""

    @abstractmethod
    def _part(self, batch: Batch, rows: slice) -> Batch:
        """What a micro-batch of these rows encodes."""

    @abstractmethod
    def _forward(self, micro: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalised features of both sides (m, ..., D), log scale (1,), bias (1,); ``micro["first"]`` is the place
        of the first row."""

    @abstractmethod
    def _after_update(self) -> None:
        """What holds the parameters within bounds."""

    def __call__(self, batch: Batch) -> tuple[float, dict[str, float]]:
        """Update the parameters; returns the loss of the global batch and values to report.

        Raises NonFiniteLossError on every rank, before the update, naming the keys.
        """
        batch = self._on_device(batch)
        micro_batches = self._micro_batches(batch)
        if len(micro_batches) == 1:
            outputs = self._encode(micro_batches[0])
            loss, values = self._loss(outputs, batch)
            self.engine.backward(loss)
            self.engine.step()
        else:
            values = self._cached_step(batch, micro_batches)
        self._after_update()
        return values.pop("loss"), values

    def _cached_step(self, batch: Batch, micro_batches: list[Batch]) -> dict[str, float]:
        """Features without a graph, the loss's gradient for each, and a second pass that carries it on."""
        with torch.no_grad():
            parts = [self._encode(micro) for micro in micro_batches]
        image_bD, text_bD = (torch.cat([part[i] for part in parts]).requires_grad_() for i in (0, 1))
        scale, bias = (parts[0][i].clone().requires_grad_() for i in (2, 3))
        loss, values = self._loss((image_bD, text_bD, scale, bias), batch)
        leaves = (image_bD, text_bD, scale, bias)
        grads = [
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True)
        ]
        rows = len(parts[0][0])
        for i, micro in enumerate(micro_batches):
            part = slice(i * rows, (i + 1) * rows)
            outputs = self._encode(micro)
            shares = (grads[0][part], grads[1][part], grads[2] / len(parts), grads[3] / len(parts))
            self.engine.backward(torch.stack([(x * g).sum() for x, g in zip(outputs, shares, strict=True)]).sum())
            self.engine.step()
        return values

    def _encode(self, micro: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Forward pass of one micro-batch; the same random draws each time it is called for it."""
        torch.manual_seed(place_seed(self.seed, micro["first"]))
        return self._forward(micro)

    def _loss(self, outputs: tuple[Tensor, Tensor, Tensor, Tensor], batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """This rank's weighted sum of terms, and their means over ranks."""
        image_bD, text_bD, log_scale, bias = outputs
        features = Features(
            image_bD=image_bD,
            text_bD=text_bD,
            log_scale=log_scale,
            bias=bias,
            caption_hashes=batch["caption_hashes"],
            image_ids=batch["image_ids"],
        )
        parts = {name: weight * term(features) for name, (weight, term) in self.terms.items()}
        loss = torch.stack(list(parts.values())).sum()
        # a non-finite value on one rank is one in the sum of all, so every rank stops
        means = sum_over_ranks(torch.stack([loss.detach(), *(part.detach() for part in parts.values())]))
        numbers = (means / world_size()).tolist()
        values = dict(zip(("loss", *(f"loss_{name}" for name in parts)), numbers, strict=True))
        if not math.isfinite(values["loss"]):
            raise NonFiniteLossError(self._describe(values, outputs, batch))
        values["logit_scale"] = float(log_scale.detach().exp())
        return loss, values

    def _describe(self, values: dict[str, float], outputs: tuple[Tensor, ...], batch: Batch) -> str:
        """Which samples of which rank: those with non-finite features if there are any, else the whole batch."""
        finite_b = torch.isfinite(outputs[0]).flatten(1).all(1) & torch.isfinite(outputs[1]).flatten(1).all(1)
        keys = [key for key, finite in zip(batch["keys"], finite_b.tolist(), strict=True) if not finite]
        told = {"bad": keys[:NAMED_KEYS], "bad_count": len(keys), "all": batch["keys"][:NAMED_KEYS]}
        ranks = gather_objects(told)
        which = "bad" if any(item["bad"] for item in ranks) else "all"
        named = "; ".join(f"rank {r}: {', '.join(item[which])}" for r, item in enumerate(ranks) if item[which])
        count = sum(item["bad_count"] for item in ranks)
        about = (
            f"{count} samples have non-finite features" if count else "all features are finite; the batch began with"
        )
        terms = ", ".join(f"{name} {value}" for name, value in values.items())
        return (
            f"the loss is not finite in the batch that ends at sample {batch['position']} ({terms}). {about}: {named}. "
            "Nothing was updated and the last checkpoint stays; lower the learning rate, or look at these samples"
        )

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        """``accumulation`` equal parts of this rank's rows, each with the place of its first sample."""
        rows = len(batch["keys"])
        size = rows // self.engine.accumulation
        if size * self.engine.accumulation != rows:
            raise ValueError(f"{rows} rows on this rank are not {self.engine.accumulation} equal micro-batches")
        first = batch["position"] - (world_size() - rank()) * rows
        starts = range(0, rows, size)
        return [{**self._part(batch, slice(start, start + size)), "first": first + start} for start in starts]


class Step(ContrastiveStep):
    """A step of the tower: pixel_values (b, 3, S, S) against embeddings (b, W)."""

    def __init__(self, engine: Engine, terms: dict[str, tuple[float, Term]], *, seed: int, noisy: bool) -> None:
        super().__init__(engine, terms, seed=seed)
        self.noisy = noisy  # whether the text side wants noise
        self.dual: nn.Module = engine.module.dual  # type: ignore[assignment]
        self.dtype = next(p.dtype for p in self.dual.parameters() if p.is_floating_point())

    def _on_device(self, batch: Batch) -> Batch:
        """Pixels in the module's dtype; embeddings stay fp32, the adapter normalises them first."""
        device = self.engine.device
        moved = {
            key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }
        moved["pixel_values"] = moved["pixel_values"].to(self.dtype)
        return moved

    def _part(self, batch: Batch, rows: slice) -> Batch:
        return {"pixel_values": batch["pixel_values"][rows], "embeddings": batch["embeddings"][rows]}

    def _forward(self, micro: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        noise = self._noise(micro) if self.noisy else None
        return self.engine(micro["pixel_values"], micro["embeddings"], noise)  # pyright: ignore[reportArgumentType]

    def _noise(self, micro: Batch) -> Tensor:
        """(m, W) standard normal values, each row a function of (seed, place of its sample)."""
        rows, width = micro["embeddings"].shape
        noise_mW = torch.empty(rows, width)
        generator = torch.Generator()
        for i in range(rows):
            generator.manual_seed(place_seed(self.seed + 1, micro["first"] + i))
            noise_mW[i].normal_(generator=generator)
        return noise_mW.to(micro["embeddings"].device)

    def _after_update(self) -> None:
        self.engine.clamp(self.dual.logit_scale, 0.0, MAX_LOG_SCALE)  # type: ignore[arg-type]


def place_seed(seed: int, place: int) -> int:
    """A 63-bit seed from a run's seed and a place in its order of samples."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=8).digest(), "big") >> 1
