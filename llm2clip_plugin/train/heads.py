"""An optional first phase: fit the heads while the tower is frozen.

``heads.target images``: projection and text adapter meet at the frozen tower's features. Gradients of untrained heads
distort a pretrained tower. Here every training image is encoded once, without augmentation, and the heads are fitted to
these features with a separate batch size and learning rate, at a fraction of the cost of training the tower.

``heads.target clip_text``: the text adapter alone learns the text space of the tower's own CLIP, from captions, as in
ProCLIP's first stage (arXiv 2510.18795); projection and logit scale are the CLIP's.

Images are encoded in the same blocks on any number of ranks, and only rank 0 fits, so the result is independent of the
number of ranks. If the run is in bf16, so are the matrix products here; weights and loss stay fp32.

Shape letters: I images, P width of the tower's pooled feature, M captions, W width of an LLM embedding, B batch,
D width of the joint space.
"""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.console import progress_bar, track
from llm2clip_plugin.contracts import atomic_file, canonical_json
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.data.loader import PairLoader
from llm2clip_plugin.data.pairs import PairDataset, eval_pairs
from llm2clip_plugin.data.samples import BrokenSample, caption_hash, caption_shares
from llm2clip_plugin.data.sources.base import Source
from llm2clip_plugin.train.config import HeadsConfig, LossConfig, OptimConfig
from llm2clip_plugin.train.distributed import ALONE, gather_objects, gather_to_first, on_first_rank, rank, world_size
from llm2clip_plugin.train.errors import StoppedError, StopRequest
from llm2clip_plugin.train.losses.base import Features, heads_terms
from llm2clip_plugin.train.losses.distill import Distill
from llm2clip_plugin.train.optim import is_vector, lr_factor
from llm2clip_plugin.train.step import MAX_LOG_SCALE, position_seed
from llm2clip_plugin.vision.dual import DualEncoder, heads_state, load_heads
from llm2clip_plugin.vision.family import DualConfig

log = logging.getLogger(__name__)

# a line for metrics.jsonl: step and samples of the fit so far, loss, loss_NAME, lr, logit_scale, samples_per_second
FitLine: TypeAlias = dict[str, float]

BLOCK_IMAGES = 64  # images per forward pass of the frozen tower
# ProCLIP's first stage: the loss that its code sums over the 128 captions of a rank, 127 / 2, and its optimizer
CLIP_TEXT_LOSS = Distill(structure=63.5)
CLIP_TEXT_OPTIM = OptimConfig(eps=1e-6, max_grad_norm=5.0, schedule="cosine")
TEXT_SIDE = ("llm_width", "adapter", "adapter_blocks", "adapter_expansion", "normalise_input")
TEXT_SIDE += ("input_scale", "input_noise")  # fields of DualConfig


@dataclass(frozen=True, kw_only=True)
class FrozenFeatures:
    """The frozen tower's features of the training images, and the teacher's embeddings of all their captions."""

    pooled_IP: Tensor
    embedding_MW: Tensor
    caption_hashes_M: Tensor
    first_I: Tensor  # index of an image's first caption
    count_I: Tensor  # number of its captions
    share_M: Tensor  # float64, probability of each of an image's captions


def fit_heads(
    model: DualEncoder,
    sources: Sequence[Source],
    caches: Sequence[EmbeddingCache],
    images: ImageConfig,
    config: HeadsConfig,
    loss: LossConfig,
    *,
    device: torch.device,
    seed: int,
    bf16: bool = False,
    caption_weights: Mapping[str, float] | None = None,
    clip_caches: Sequence[EmbeddingCache] = (),
    workers: int = 0,
    logging_steps: int = 10,
    stop: StopRequest | None = None,
    unfinished: Path | None = None,
) -> list[FitLine]:
    """Fit the heads in place, equal on every rank; returns the curve, a line every ``logging_steps`` and of the last.

    bf16: compute matrix products in bf16. caption_weights: how often each kind of caption is drawn, as in training.
    clip_caches: of target clip_text, CLIP's features of the captions, a cache per source; ``workers`` processes read.
    Raises StoppedError on every rank when ``stop`` asks for it; the fit's state is then in the file ``unfinished``,
    from which the next call continues, to the same heads as without a stop.
    """
    model.to(device)
    products = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    if config.target == "clip_text":
        weights = caption_weights or {}
        dataset = PairDataset(sources, caches, None, seed=seed, caption_weights=weights, targets=clip_caches)
        make_batches = partial(CaptionBatches, model, dataset, config.batch, workers, products, device)
    else:
        with products:
            features = frozen_features(
                model, sources, caches, images, config.max_images, device, caption_weights or {}, stop
            )
        make_batches = partial(ImageBatches, model, features, config.batch, seed, products, device)
    # the others wait in no collective, whose timeout a long fit would exceed
    curve, done = on_first_rank(
        lambda: _fit(model, make_batches(), config, loss, device, seed, logging_steps, stop, unfinished)
    )
    if done < config.steps:
        saved = f"saved in {unfinished}" if unfinished else "not saved"
        raise StoppedError(
            f"stopped at step {done} of {config.steps} of the heads' fit, {saved}; rerun the same command to resume"
        )
    for _, parameter in head_parameters(model):
        if world_size() > 1:
            dist.broadcast(parameter.data, src=0)
    return curve


def load_clip_heads(model: DualEncoder, source: str) -> None:
    """Load the projection and logit scale of an imported CLIP, which has no text adapter, into ``model``, in place.

    Raises ValueError for a directory that has other settings than ``model``, or a text adapter.
    """
    default = DualConfig()
    config = dataclasses.replace(model.config, **{name: getattr(default, name) for name in TEXT_SIDE})
    own = DualEncoder(model.tower, config)
    load_heads(own, source)
    model.load_state_dict(heads_state(own), strict=False)  # all but the text adapter


def head_parameters(model: DualEncoder) -> list[tuple[str, torch.nn.Parameter]]:
    """Trained parameters outside the tower, by name."""
    return [(n, p) for n, p in model.named_parameters() if not n.startswith("tower.") and p.requires_grad]


@torch.no_grad()
def frozen_features(
    model: DualEncoder,
    sources: Sequence[Source],
    caches: Sequence[EmbeddingCache],
    images: ImageConfig,
    max_images: int,
    device: torch.device,
    caption_weights: Mapping[str, float],
    stop: StopRequest | None = None,
) -> FrozenFeatures | None:
    """Encode blocks of images, distributed over the ranks, and gather them in order on rank 0; None on the others.

    Raises StoppedError on every rank if ``stop`` asks for it on one.
    """
    model.eval()
    normalize = Normalize(images, device)
    blocks = [
        (number, indices)
        for number, source in enumerate(sources)
        for indices in _blocks(len(source), max(2, max_images // len(sources)))
    ]
    encoded: dict[int, list[tuple[Tensor, ...]]] = {}
    broken: list[BrokenSample] = []
    numbers = range(rank(), len(blocks), world_size())
    label = "features of the frozen tower"
    for number in track(numbers, total=len(numbers), label=label, unit="blocks") if rank() == 0 else numbers:
        if stop:
            break
        source_number, indices = blocks[number]
        config = sources[source_number].config
        pairs = eval_pairs(
            sources[source_number],
            caches[source_number],
            images,
            batch=BLOCK_IMAGES,
            kinds=config.kinds,
            languages=config.languages,
            indices=indices,
        )
        encoded[number] = [_encode(model, batch, normalize, caption_weights) for batch in pairs]
        broken += pairs.broken
    model.train()
    if any(gather_objects(bool(stop))):
        raise StoppedError("stopped before the heads' fit: nothing to save; rerun the same command to resume")
    parts = gather_to_first((encoded, broken))
    if rank() > 0:
        return None
    if left_out := [sample for _, samples in parts for sample in samples]:
        total = sum(len(indices) for _, indices in blocks)
        counted = f"{len(left_out)} of {total} samples are broken, the first: {left_out[0]}"
        if len(left_out) == total:
            raise ValueError(f"{counted}; run `llm2clip data check DATA` to list them")
        log.warning("fitting the heads without some samples: %s", counted)
    merged = {number: items for part, _ in parts for number, items in part.items()}
    columns = zip(*(item for number in sorted(merged) for item in merged[number]), strict=True)
    pooled, embedding, ids, counts, shares = (torch.cat(column) for column in columns)
    return FrozenFeatures(
        pooled_IP=pooled,
        embedding_MW=embedding,
        caption_hashes_M=ids,
        first_I=counts.cumsum(0) - counts,
        count_I=counts,
        share_M=shares,
    )


def _blocks(length: int, limit: int) -> list[list[int]]:
    """Samples 0 .. length-1, or ``limit`` of them evenly spaced, in blocks of BLOCK_IMAGES."""
    used = min(length, limit)
    chosen = [number * length // used for number in range(used)]
    return [chosen[start : start + BLOCK_IMAGES] for start in range(0, used, BLOCK_IMAGES)]


def _encode(
    model: DualEncoder, batch: dict, normalize: Normalize, caption_weights: Mapping[str, float]
) -> tuple[Tensor, ...]:
    """Pooled features, embeddings, caption hashes, the number of captions of each image, and their probabilities."""
    pooled = model.pool(normalize(batch["pixels"])).float().cpu()
    ids = torch.tensor([caption_hash(caption.text) for caption in batch["captions"]])
    counts = torch.tensor([int((batch["owners"] == image).sum()) for image in batch["image_ids"]])
    captions = iter(batch["captions"])
    of_images = [list(islice(captions, count)) for count in counts.tolist()]
    shares = [share for of_image in of_images for share in caption_shares(of_image, caption_weights)]
    return pooled, batch["embeddings"], ids, counts, torch.tensor(shares, dtype=torch.float64)


def _fit(
    model: DualEncoder,
    batches: "ImageBatches | CaptionBatches",
    config: HeadsConfig,
    loss_config: LossConfig,
    device: torch.device,
    seed: int,
    logging_steps: int,
    stop: StopRequest | None,
    unfinished: Path | None,
) -> tuple[list[FitLine], int]:
    """Train the heads, or the text adapter alone; returns the curve and the number of steps that are done."""
    of_clip = config.target == "clip_text"
    parameters = [p for name, p in head_parameters(model) if name.startswith("text_adapter.") or not of_clip]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if not is_vector(p)], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if is_vector(p)], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(0.9, 0.98),
        eps=CLIP_TEXT_OPTIM.eps if of_clip else 1e-8,
        fused=device.type == "cuda",
    )
    terms = {CLIP_TEXT_LOSS.name: CLIP_TEXT_LOSS} if of_clip else heads_terms(loss_config, group=ALONE)
    curve: list[FitLine] = []
    done = 0
    fit_of = canonical_json([dataclasses.asdict(config), dataclasses.asdict(loss_config), seed, batches.samples])
    if unfinished is not None and unfinished.is_file():
        saved = torch.load(unfinished, weights_only=True)
        if saved["fit_of"] == fit_of:
            done, curve = saved["done"], saved["curve"]
            batches.restore(saved["batches"], done)
            optimizer.load_state_dict(saved["optimizer"])
            for parameter, value in zip(parameters, saved["parameters"], strict=True):
                parameter.data.copy_(value)
            log.warning("continuing the heads' fit at step %d of %d, from %s", done, config.steps, unfinished)
    started, before = time.perf_counter(), done
    bar = progress_bar(total=config.steps, label="heads", unit="steps")
    bar.update(done)
    for step in range(done + 1, config.steps + 1):
        if stop:
            break
        batch = batches.draw()
        losses = {f"loss_{name}": term(batch) for name, term in terms.items()}
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        lr = config.lr
        if of_clip:
            torch.nn.utils.clip_grad_norm_(parameters, CLIP_TEXT_OPTIM.max_grad_norm)
            lr *= lr_factor(step - 1, config.steps, CLIP_TEXT_OPTIM)
            for group in optimizer.param_groups:
                group["lr"] = lr
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, MAX_LOG_SCALE)
        if step == config.steps or step % logging_steps == 0:
            values = {"loss": loss, **losses, "logit_scale": batch.log_scale.exp()}
            if batch.reference_bD is not None:
                values["cosine"] = (batch.anchor_bD * batch.reference_bD).sum(1).mean()
            line = {name: float(value.detach()) for name, value in values.items()}
            rate = (step - before) * batches.size / (time.perf_counter() - started)
            curve.append({"step": step, "samples": step * batches.size, **line, "lr": lr, "samples_per_second": rate})
            bar.set_postfix_str(f"loss {line['loss']:.4g}", refresh=False)
        bar.update()
        done = step
    bar.close()
    optimizer.zero_grad()  # or these gradients are added to those of the first training step
    if done < config.steps and unfinished is not None:
        state = {"fit_of": fit_of, "done": done, "curve": curve, "batches": batches.state()}
        state |= {"optimizer": optimizer.state_dict(), "parameters": [parameter.detach() for parameter in parameters]}
        with atomic_file(unfinished) as temporary:
            torch.save(state, temporary)
    return curve, done


class ImageBatches:
    """Images drawn without replacement in each pass, with one random caption each."""

    def __init__(
        self,
        model: DualEncoder,
        features: FrozenFeatures | None,
        size: int,
        seed: int,
        products: torch.autocast,
        device: torch.device,
    ) -> None:
        assert features is not None  # of rank 0
        self.model, self.features, self.products, self.device = model, features, products, device
        self.samples = len(features.count_I)
        self.size = min(size, self.samples)
        self.generator = torch.Generator().manual_seed(position_seed(seed, -1))
        self.queue = torch.empty(0, dtype=torch.int64)

    def state(self) -> dict[str, Any]:
        return {"queue": self.queue, "generator": self.generator.get_state()}

    def restore(self, state: dict[str, Any], done: int) -> None:
        self.queue = state["queue"]
        self.generator.set_state(state["generator"])

    def draw(self) -> Features:
        if len(self.queue) < self.size:
            self.queue = torch.cat([self.queue, torch.randperm(self.samples, generator=self.generator)])
        chosen, self.queue = self.queue[: self.size], self.queue[self.size :]
        with self.products:
            return _features(self.model, self.features, chosen, self.generator, self.device)


class CaptionBatches:
    """Captions with CLIP's text features of them as the reference, in the order of a training's samples."""

    def __init__(
        self,
        model: DualEncoder,
        dataset: PairDataset,
        size: int,
        workers: int,
        products: torch.autocast,
        device: torch.device,
    ) -> None:
        self.model, self.products, self.device = model, products, device
        self.size, self.samples = size, len(dataset)
        self.load = partial(PairLoader, dataset, local_batch=size, workers=workers)
        self.batches = iter(self.load())

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any], done: int) -> None:
        self.batches = iter(self.load(position=done * self.size))

    def draw(self) -> Features:
        batch = next(self.batches)
        with self.products:
            feature_BD = self.model.encode_text(batch["embeddings"].to(self.device))
        target_BD = F.normalize(batch["targets"].to(self.device).float(), dim=-1)
        return Features(
            anchor_bD=feature_BD,
            positive_bkD=target_BD[:, None],
            log_scale=self.model.logit_scale,
            bias=torch.zeros(1, device=self.device),
            caption_hashes=None,
            image_ids=None,
            reference_bD=target_BD,
            group=ALONE,
        )


def _features(
    model: DualEncoder, features: FrozenFeatures, chosen_B: Tensor, generator: torch.Generator, device: torch.device
) -> Features:
    """Output of the heads for chosen images, with a random caption of each."""
    caption_B = _draw_captions(features, chosen_B, torch.rand(len(chosen_B), generator=generator))
    embedding_BW = features.embedding_MW[caption_B].float().to(device)
    noise_BW = torch.randn(embedding_BW.shape, generator=generator).to(device)
    pooled_BP = features.pooled_IP[chosen_B].to(device)
    image_BD = F.normalize(model.visual_projection(model.visual_norm(pooled_BP)).float(), dim=-1)
    bias = torch.zeros(1, device=device) if model.logit_bias is None else model.logit_bias
    return Features(
        anchor_bD=image_BD,
        positive_bkD=model.encode_text(embedding_BW, noise_BW)[:, None],
        log_scale=model.logit_scale,
        bias=bias,
        caption_hashes=features.caption_hashes_M[caption_B].to(device),
        image_ids=chosen_B.to(device),
    )


def _draw_captions(features: FrozenFeatures, chosen_B: Tensor, draw_B: Tensor) -> Tensor:
    """(B,) a caption of each chosen image by a number in [0, 1), by the captions' shares."""
    first_B, count_B = features.first_I[chosen_B], features.count_I[chosen_B]
    # the shares of an image add up to 1, so those of image i lie in i .. i + 1 of the running sum
    caption_B = torch.searchsorted(features.share_M.cumsum(0), chosen_B + draw_B.double(), right=True)
    return caption_B.clamp(first_B, first_B + count_B - 1)
