"""An optional first phase: fit projection and text adapter on the frozen tower's features.

Gradients of untrained heads distort a pretrained tower. Here every training image is encoded once by the frozen tower,
without augmentation, and the heads are fitted to these features with a separate batch size and learning rate, at a
fraction of the cost of training the tower.

Images are encoded in the same blocks on any number of ranks, and only rank 0 fits, so the result is independent of the
number of ranks. If the run is in bf16, so are the matrix products here; weights and loss stay fp32.

Shape letters: I images, P width of the tower's pooled feature, M captions, W width of an LLM embedding, B batch.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.console import progress_bar, track
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.data.pairs import eval_pairs
from llm2clip_plugin.data.samples import BrokenSample, caption_hash
from llm2clip_plugin.data.sources.base import Source, caption_shares
from llm2clip_plugin.train.config import HeadsConfig, LossConfig
from llm2clip_plugin.train.distributed import ALONE, gather_objects, gather_to_first, on_first_rank, rank, world_size
from llm2clip_plugin.train.errors import StoppedError, StopRequest
from llm2clip_plugin.train.losses.base import Features, heads_terms
from llm2clip_plugin.train.optim import is_vector
from llm2clip_plugin.train.step import MAX_LOG_SCALE, position_seed
from llm2clip_plugin.vision.dual import DualEncoder

log = logging.getLogger(__name__)

# a line for metrics.jsonl: step and samples of the fit so far, loss, loss_NAME, lr, logit_scale, samples_per_second
FitLine: TypeAlias = dict[str, float]

BLOCK_IMAGES = 64  # images per forward pass of the frozen tower


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
    logging_steps: int = 10,
    stop: StopRequest | None = None,
) -> list[FitLine]:
    """Fit the heads in place, equal on every rank; returns the curve, a line every ``logging_steps`` and of the last.

    bf16: compute matrix products in bf16. caption_weights: how often each kind of caption is drawn, as in training.
    Raises StoppedError on every rank when ``stop`` asks for it; nothing of the fit is saved.
    """
    model.to(device)
    products = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    with products:
        features = frozen_features(
            model, sources, caches, images, config.max_images, device, caption_weights or {}, stop
        )
    # the others wait in no collective, whose timeout a long fit would exceed
    curve, done = on_first_rank(
        lambda: _fit(model, features, config, loss, products, device, seed, logging_steps, stop)
    )
    if done < config.steps:
        raise StoppedError(
            f"stopped at step {done} of {config.steps} of the heads' fit; rerun the same command, which begins it again"
        )
    for _, parameter in head_parameters(model):
        if world_size() > 1:
            dist.broadcast(parameter.data, src=0)
    return curve


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
    features: FrozenFeatures | None,
    config: HeadsConfig,
    loss_config: LossConfig,
    products: torch.autocast,
    device: torch.device,
    seed: int,
    logging_steps: int,
    stop: StopRequest | None,
) -> tuple[list[FitLine], int]:
    """Train the heads; images are drawn without replacement in each pass, with one random caption each.

    Returns the curve and the number of steps that are done.
    """
    assert features is not None  # of rank 0
    parameters = head_parameters(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for _, p in parameters if not is_vector(p)], "weight_decay": config.weight_decay},
            {"params": [p for _, p in parameters if is_vector(p)], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
    terms = heads_terms(loss_config, group=ALONE)
    generator = torch.Generator().manual_seed(position_seed(seed, -1))
    queue = torch.empty(0, dtype=torch.int64)
    size = min(config.batch, len(features.count_I))
    curve: list[FitLine] = []
    done, started = 0, time.perf_counter()
    bar = progress_bar(total=config.steps, label="heads", unit="steps")
    for step in range(1, config.steps + 1):
        if stop:
            break
        if len(queue) < size:
            queue = torch.cat([queue, torch.randperm(len(features.count_I), generator=generator)])
        chosen, queue = queue[:size], queue[size:]
        with products:
            batch = _features(model, features, chosen, generator, device)
        losses = {f"loss_{name}": term(batch) for name, term in terms.items()}
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, MAX_LOG_SCALE)
        if step == config.steps or step % logging_steps == 0:
            values = {"loss": loss, **losses, "logit_scale": batch.log_scale.exp()}
            line = {name: float(value.detach()) for name, value in values.items()}
            rate = step * size / (time.perf_counter() - started)
            curve.append({"step": step, "samples": step * size, **line, "lr": config.lr, "samples_per_second": rate})
            bar.set_postfix_str(f"loss {line['loss']:.4g}", refresh=False)
        bar.update()
        done = step
    bar.close()
    optimizer.zero_grad()  # or these gradients are added to those of the first training step
    return curve, done


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
