"""The seam between loop and model: ``loss, values = step(batch)``.

A step is one update from this rank's rows of the global batch. With one micro-batch it is forward,
loss, backward. With more it is gradient caching (Gao et al. 2021, arXiv 2101.06983): every
micro-batch is encoded without a graph, the loss of the whole batch gives the gradient of each
feature, and every micro-batch is encoded again to carry the gradients of its features into the
parameters. Ranks x micro-batches x accumulation then equal one big batch, because the negatives are
always those of the global batch.

Randomness in a forward pass depends only on the position of the sample in the run, so that the
second pass repeats the first and any number of ranks draws the same: text noise is drawn per
sample, and torch's generator (dropout, stochastic depth) is seeded for each micro-batch with the
position of its first sample.

Shape letters: b this rank's pairs, m pairs of a micro-batch, k texts that belong to an anchor, D
width of the features, W width of an LLM embedding, T patches of an image, H width of the tower.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm2clip_plugin.train.averages import ReferenceTower
from llm2clip_plugin.train.distributed import (
    rank,
    sum_over_ranks,
    timed,
    world_size,
)
from llm2clip_plugin.train.engine import Engine
from llm2clip_plugin.train.losses.base import Features, Terms
from llm2clip_plugin.train.non_finite import non_finite_error

MAX_LOG_SCALE = math.log(100)  # upper bound of the logit scale, as in CLIP

Batch = dict[str, Any]  # as data.pairs and text.pairs yield it


class Encoded(NamedTuple):
    """What a module gives for a micro-batch of m pairs, or those of a whole batch together."""

    anchor_mD: Tensor  # L2-normalized
    positive_mkD: Tensor  # L2-normalized
    log_scale: Tensor  # (1,)
    bias: Tensor  # (1,)
    patches_mTH: Tensor | None = None  # these two if a term of the loss reads them
    patch_features_mTD: Tensor | None = None


SCALARS = ("log_scale", "bias")  # fields of Encoded that belong to no row


class Flags(NamedTuple):
    """What a rank tells the others with its losses; after a step, whether any rank did so."""

    stop: bool = False  # the run shall end
    save_due: bool = False  # the last checkpoint is old
    saving: bool = False  # a checkpoint is being written


class SharedFlags:
    """The flags of all ranks, which a step sends with its losses: no collective of their own."""

    def __init__(self, read: Callable[[], Flags]) -> None:
        """read: this rank's flags now."""
        self.read = read
        self.raised = Flags()  # what any rank had in the last step


class ExactScalars:
    """The fp32 values of the module's logit scale and bias, with the gradient of its rounded ones:
    in bf16, the logit scale would move in steps of 1.6 to 3 % and end at 98.86 instead of 100."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._values: dict[str, Tensor] = {}  # since the last update

    def exact(self, name: str, rounded: Tensor) -> Tensor:
        """The value of the parameter ``name``, which the module gave ``rounded``."""
        parameter = getattr(self.engine.module, name, None)
        if parameter is None or parameter.dtype == torch.float32:
            return rounded
        if name not in self._values:
            self._values[name] = self.engine.fp32(parameter)
        return self._values[name] + (rounded - rounded.detach())

    def after_update(self) -> None:
        """Forget the values, and clamp a trained logit scale."""
        self._values.clear()
        scale = getattr(self.engine.module, "logit_scale", None)
        if scale is not None and scale.requires_grad:
            self._values["logit_scale"] = self.engine.clamp(scale, 0.0, MAX_LOG_SCALE)


class ContrastiveStep(ABC):
    """One optimizer step over this rank's rows of a global batch, whatever the two sides of its
    pairs are. ``batch``: caption_hashes and image_ids (b,), keys (b), ``position`` (samples that
    the run has consumed after it), and what the subclass encodes."""

    def __init__(
        self, engine: Engine, terms: Terms, *, seed: int, total_samples: int = 0
    ) -> None:
        """total_samples: pairs of the whole run, over which the terms' weights may change."""
        self.engine = engine
        self.terms = terms
        self.seed = seed
        self.total_samples = total_samples
        self._scalars = ExactScalars(engine)

    @abstractmethod
    def _on_device(self, batch: Batch) -> Batch:
        """The batch on the module's device."""

    @abstractmethod
    def _rows(self, batch: Batch, rows: slice) -> Batch:
        """What ``_forward`` needs of these rows."""

    @abstractmethod
    def _forward(self, micro: Batch) -> Encoded:
        """Encode a micro-batch; ``micro["first"]`` is the position of its first sample."""

    def _reference(self, micro: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Of the reference tower, for the same anchors: features (m, D), L2-normalized, and patches
        (m, T, H); None for what no term reads."""
        return None, None

    def __call__(
        self, batch: Batch, flags: SharedFlags | None = None
    ) -> tuple[float, dict[str, float]]:
        """Update the parameters; returns the loss of the global batch and values to report.

        ``flags`` are read as the losses are sent; ``flags.raised`` then has those of any rank, also
        after an error. Every rank must have them, or none. Raises NonFiniteLossError on every rank,
        none of which has updated, where fp16 can't lower its loss scale.
        """
        batch = self._on_device(batch)
        rows = len(batch["keys"])  # of this rank
        size = rows // self.engine.accumulation
        first = batch["position"] - (world_size() - rank()) * rows
        micro_batches: list[Batch] = []
        for start in range(0, rows, size):
            micro = self._rows(batch, slice(start, start + size))
            micro_batches.append({**micro, "first": first + start})
        skipped = self.engine.skipped
        lowers = self.engine.can_lower_loss_scale
        if len(micro_batches) == 1:
            reference = self._reference(micro_batches[0])
            encoded = self._encode(micro_batches[0])
            loss, numbers, finite_b = self._loss(encoded, batch, *reference, flags)
            self.engine.backward(loss)
            self.engine.step()
        else:
            numbers, finite_b = self._cached_step(batch, micro_batches, flags)
        names = self._names_of_numbers(flags)
        means = dict(zip(names, self.engine.read(numbers), strict=True))
        loss = means["loss"]
        if flags is not None:
            flags.raised = Flags(**{name: means[name] > 0 for name in Flags._fields})
        values = {f"loss_{name}": means[f"loss_{name}"] for name in self.terms}
        left_out = self.engine.skipped > skipped
        finite = math.isfinite(loss + (self.engine.grad_norm or 0))
        if not lowers and (left_out or not finite):
            raise non_finite_error({"loss": loss, **values}, finite_b, batch)
        self._scalars.after_update()
        return loss, values | {"logit_scale": means["logit_scale"]}

    def _names_of_numbers(self, flags: SharedFlags | None) -> list[str]:
        """What a step reads from the device, in the order of ``_loss``."""
        names = ["loss", *(f"loss_{name}" for name in self.terms)]
        if flags is not None:
            names += Flags._fields
        return [*names, "logit_scale"]

    def _cached_step(
        self, batch: Batch, micro_batches: list[Batch], flags: SharedFlags | None
    ) -> tuple[Tensor, Tensor]:
        """Features without a graph, the gradient of the loss for each, and a second pass that
        propagates it."""
        references = [self._reference(micro) for micro in micro_batches]
        reference_bD, reference_patches_bTH = map(
            _joined, zip(*references, strict=True)
        )
        with torch.no_grad():
            parts = [self._encode(micro) for micro in micro_batches]
        leaves: dict[str, Tensor] = {}
        columns = zip(*parts, strict=True)
        for name, column in zip(Encoded._fields, columns, strict=True):
            leaf = column[0].clone() if name in SCALARS else _joined(column)
            if leaf is not None:
                leaves[name] = leaf.requires_grad_()
        loss, numbers, finite_b = self._loss(
            Encoded(**leaves), batch, reference_bD, reference_patches_bTH, flags
        )
        with timed("backward"):
            gradients = torch.autograd.grad(
                loss, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
        # a whole batch's patches, which the second pass would hold at the peak of its memory
        del references, reference_bD, reference_patches_bTH
        gradient_of = dict(zip(leaves, gradients, strict=True))
        size = len(parts[0].anchor_mD)
        for i, micro in enumerate(micro_batches):
            rows = slice(i * size, (i + 1) * size)
            encoded = self._encode(micro)
            products = []
            for name, gradient in gradient_of.items():
                part = gradient / len(parts) if name in SCALARS else gradient[rows]
                products.append((getattr(encoded, name) * part).sum())
            self.engine.backward(torch.stack(products).sum())
            self.engine.step()
        return numbers, finite_b

    def _encode(self, micro: Batch) -> Encoded:
        """Forward pass of one micro-batch, with the same random draws each time."""
        torch.manual_seed(position_seed(self.seed, micro["first"]))
        encoded = self._forward(micro)
        scale = self._scalars.exact("logit_scale", encoded.log_scale)
        bias = self._scalars.exact("logit_bias", encoded.bias)
        return encoded._replace(log_scale=scale, bias=bias)

    def _loss(
        self,
        encoded: Encoded,
        batch: Batch,
        reference_bD: Tensor | None,
        reference_patches_bTH: Tensor | None,
        flags: SharedFlags | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's sum of weighted terms; the ``_names_of_numbers``, which are means over ranks
        but for the logit scale; which pairs (b,) have finite features."""
        before = batch["position"] - len(batch["keys"]) * world_size()
        progress = before / self.total_samples if self.total_samples else 1.0
        features = Features(
            anchor_bD=encoded.anchor_mD,
            positive_bkD=encoded.positive_mkD,
            log_scale=encoded.log_scale,
            bias=encoded.bias,
            caption_hashes=batch["caption_hashes"],
            image_ids=batch["image_ids"],
            reference_bD=reference_bD,
            patches_bTH=encoded.patches_mTH,
            reference_patches_bTH=reference_patches_bTH,
            patch_features_bTD=encoded.patch_features_mTD,
            spatial_shapes=batch.get("spatial_shapes"),
            progress=progress,
        )
        losses = {name: term(features) for name, term in self.terms.items()}
        loss = torch.stack(list(losses.values())).sum()
        raised = [] if flags is None else [float(flag) for flag in flags.read()]
        raised_on_device = torch.tensor(raised).to(loss, non_blocking=True)
        sent = torch.stack([loss, *losses.values()]).detach()
        sums = sum_over_ranks(torch.cat([sent, raised_on_device]))
        logit_scale = encoded.log_scale.detach().exp().to(sums)
        numbers = torch.cat([sums / world_size(), logit_scale])
        finite_anchor_b = encoded.anchor_mD.isfinite().all(1)
        finite_positive_b = encoded.positive_mkD.isfinite().flatten(1).all(1)
        finite_b = finite_anchor_b & finite_positive_b
        # a non-finite value on one rank makes the gradients of all NaN, for which the engine makes
        # no update: reading it here would make the host wait for the device before the backward
        # pass
        return loss * torch.where(sums[0].isfinite(), 1.0, math.nan), numbers, finite_b


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The rows of micro-batches together; None if they have none."""
    rows = [part for part in parts if part is not None]
    return torch.cat(rows) if rows else None


class TowerStep(ContrastiveStep):
    """A step of stage 2, whose module is a DualEncoder: images against embeddings (b, W), or (b, k,
    W) of k captions.

    ``normalize`` maps the pixels of a micro-batch, (m, S, S, 3) uint8 on the device, to (m, 3, S,
    S) float32.
    """

    def __init__(
        self,
        engine: Engine,
        terms: Terms,
        *,
        seed: int,
        text_noise: bool,
        normalize: Callable[[Tensor], Tensor],
        total_samples: int = 0,
        reference: ReferenceTower | None = None,
        patch_layers: Mapping[str, int] | None = None,
    ) -> None:
        """text_noise: whether the text adapter adds noise to its input. patch_layers:
        losses.base.patch_layers."""
        super().__init__(engine, terms, seed=seed, total_samples=total_samples)
        self.normalize = normalize
        self.reference = reference
        self.text_noise = text_noise
        self.patch_layers = patch_layers or {}
        self.dtype = next(
            p.dtype for p in engine.module.parameters() if p.is_floating_point()
        )

    def _on_device(self, batch: Batch) -> Batch:
        """Pixels stay bytes; embeddings stay fp32 because the adapter normalizes them first."""
        device = self.engine.device
        moved = dict(batch)
        for name, value in batch.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device, non_blocking=True)
        # (b, k) of k captions an image; losses take (k, b)
        if (hashes := moved["caption_hashes"]).dim() > 1:
            moved["caption_hashes"] = hashes.T.contiguous()
        return moved

    def _rows(self, batch: Batch, rows: slice) -> Batch:
        shapes = {}
        if "spatial_shapes" in batch:
            shapes["spatial_shapes"] = batch["spatial_shapes"][rows]
        return {
            "pixels": batch["pixels"][rows],
            "embeddings": batch["embeddings"][rows],
            "shapes": shapes,
        }

    def _forward(self, micro: Batch) -> Encoded:
        noise_mW = self._noise(micro) if self.text_noise else None
        options = {**micro["shapes"], **self.patch_layers}
        pixel_values = self.normalize(micro["pixels"]).to(self.dtype)
        image_mD, text_mD, *others = self.engine(
            pixel_values, micro["embeddings"], noise_mW, **options
        )
        text_mkD = text_mD if text_mD.dim() > 2 else text_mD[:, None]
        return Encoded(image_mD, text_mkD, *others)

    def _reference(self, micro: Batch) -> tuple[Tensor | None, Tensor | None]:
        if self.reference is None:
            return None, None
        pixel_values = self.normalize(micro["pixels"]).to(self.dtype)
        return self.reference.encode(
            pixel_values, self.patch_layers.get("patches"), **micro["shapes"]
        )

    def _noise(self, micro: Batch) -> Tensor:
        """Standard normal values like the embeddings, drawn once for both passes; each row is a
        function of the seed and its sample's position. Pinned, so that the next rows are drawn
        while the device computes."""
        if "noise" not in micro:
            like = micro["embeddings"]
            generator = torch.Generator()
            noise_mW = torch.empty(like.shape, pin_memory=like.is_cuda)
            for position, noise_W in enumerate(noise_mW, micro["first"]):
                generator.manual_seed(position_seed(self.seed + 1, position))
                noise_W.normal_(generator=generator)
            micro["noise"] = noise_mW.to(like.device, non_blocking=True)
        return micro["noise"]


def position_seed(seed: int, position: int) -> int:
    """A 63-bit seed from a run's seed and a position in its order of samples."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
