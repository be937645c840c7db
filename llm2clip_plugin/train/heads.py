"""An optional first phase: fit the heads while the tower is frozen.

``heads.target images``: projection and text adapter meet at the frozen tower's features, because
gradients of untrained heads distort a pretrained tower. Every training image is encoded once,
without augmentation.

``heads.target clip_text``: the text adapter alone learns the text space of the tower's own CLIP,
from captions, as in ProCLIP's first stage (arXiv 2510.18795); projection and logit scale are the
CLIP's.

Images are encoded in the same blocks, and only rank 0 fits, so the result is independent of the
number of ranks. If the run is in bf16, so are the matrix products here; weights and loss stay fp32.

Shape letters: I images, P width of the tower's pooled feature, M captions, W width of an LLM
embedding, B batch, D width of the joint space.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.atomic import atomic_file
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.eval_pairs import EvalPairs
from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.data.loader import PairLoader
from llm2clip_plugin.data.pairs import PairDataset
from llm2clip_plugin.data.samples import BrokenSample, caption_hash, caption_shares
from llm2clip_plugin.data.sources import Source
from llm2clip_plugin.errors import NonFiniteLossError, StoppedError
from llm2clip_plugin.hashes import canonical_json
from llm2clip_plugin.progress import progress_bar, track
from llm2clip_plugin.signals import StopRequest
from llm2clip_plugin.train.config import HeadsConfig, LossConfig, OptimConfig
from llm2clip_plugin.train.distributed import (
    ALONE,
    gather_objects,
    gather_to_first,
    on_first_rank,
    rank,
    world_size,
)
from llm2clip_plugin.train.losses.base import Features, heads_terms
from llm2clip_plugin.train.losses.distill import Distill
from llm2clip_plugin.train.optim import (
    AdamW,
    Trained,
    is_vector,
    lr_factor,
    parameter_groups,
    set_lr,
)
from llm2clip_plugin.train.step import MAX_LOG_SCALE, position_seed
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder, heads_state, load_heads

log = logging.getLogger(__name__)

# a line for metrics.jsonl: step and samples of the fit so far, loss, loss_NAME, lr, logit_scale,
# samples_per_second
FitLine: TypeAlias = dict[str, float]

NAMED_KEYS = 8  # of samples, in a message
BLOCK_IMAGES = 64  # images per forward pass of the frozen tower
# ProCLIP's first stage: the loss that its code sums over the 128 captions of a rank, 127 / 2, and
# its optimizer
CLIP_TEXT_LOSS = Distill(structure=63.5)
CLIP_TEXT_OPTIM = OptimConfig(eps=1e-6, max_grad_norm=5.0, schedule="cosine")
TEXT_SIDE = (
    "llm_width",
    "adapter",
    "adapter_blocks",
    "adapter_expansion",
    "normalize_input",
)
TEXT_SIDE += ("input_scale", "input_noise")  # fields of DualConfig


@dataclass(frozen=True, kw_only=True)
class FrozenFeatures:
    """The frozen tower's features of the training images, and the teacher's embeddings of all their
    captions."""

    pooled_IP: Tensor
    embedding_MW: Tensor
    caption_hashes_M: Tensor
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
    skip_non_finite: int = 0,
) -> list[FitLine]:
    """Fit the heads in place, equal on every rank; returns the curve, a line every
    ``logging_steps`` and of the last.

    bf16: compute matrix products in bf16. caption_weights: how often each kind of caption is drawn.
    clip_caches: of target clip_text, CLIP's features of the captions, a cache per source. Raises
    StoppedError on every rank when ``stop`` asks for it; the fit's state is then in the file
    ``unfinished``, from which the next call continues. skip_non_finite: samples with a NaN or an
    infinity in a feature or embedding to leave out (with clip_text: batches with one); one more
    raises NonFiniteLossError before the fit (ValueError in it).
    """
    model.to(device)
    products = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    shares = caption_weights or {}
    features: FrozenFeatures | None = None
    if config.target == "images":
        with products:
            features = frozen_features(
                model,
                sources,
                caches,
                images,
                config.max_images,
                device,
                shares,
                stop,
                workers,
                skip_non_finite,
            )

    def fit() -> tuple[list[FitLine], int]:
        if features is not None:
            samples = len(features.count_I)
            batches = partial(
                image_batches, model, features, min(config.batch, samples), seed
            )
        else:
            dataset = PairDataset(
                sources,
                caches,
                None,
                seed=seed,
                caption_weights=shares,
                targets=clip_caches,
            )
            samples = len(dataset)
            batches = partial(
                caption_batches, model, dataset, config.batch, workers, skip_non_finite
            )
        return _fit(
            model,
            samples,
            batches,
            products,
            config,
            loss,
            seed,
            logging_steps,
            stop,
            unfinished,
        )

    # the others wait in no collective, whose timeout a long fit would exceed
    curve, done = on_first_rank(fit)
    if done < config.steps:
        saved = f"saved in {unfinished}" if unfinished else "not saved"
        stopped = f"stopped at step {done} of {config.steps} of the heads' fit, {saved}"
        raise StoppedError(f"{stopped}; rerun the same command to resume")
    for _, parameter in head_parameters(model):
        if world_size() > 1:
            dist.broadcast(parameter.data, src=0)
    return curve


def load_clip_heads(model: DualEncoder, source: str) -> None:
    """Load the projection and logit scale of an imported CLIP into ``model``; ValueError for a
    directory that has other settings than ``model``, or a text adapter."""
    default = DualConfig()
    config = dataclasses.replace(
        model.config, **{name: getattr(default, name) for name in TEXT_SIDE}
    )
    clip_model = DualEncoder(model.tower, config)
    load_heads(clip_model, source)
    model.load_state_dict(
        heads_state(clip_model), strict=False
    )  # all but the text adapter


def head_parameters(model: DualEncoder) -> list[tuple[str, torch.nn.Parameter]]:
    """Trained parameters outside the tower, by name."""
    return [
        (n, p)
        for n, p in model.named_parameters()
        if not n.startswith("tower.") and p.requires_grad
    ]


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
    workers: int = 0,
    skip_non_finite: int = 0,
) -> FrozenFeatures | None:
    """Encode blocks of images, distributed over the ranks, and gather them in order on rank 0; None
    on the others. Images with a non-finite feature or embedding are left out; more than
    ``skip_non_finite`` raise NonFiniteLossError on every rank: one would make the heads NaN."""
    model.eval()
    normalize = Normalize(images, device)
    blocks: list[
        tuple[int, list[int]]
    ] = []  # number of a source, samples evenly spaced in it
    for number, source in enumerate(sources):
        used = min(len(source), max(2, max_images // len(sources)))
        chosen = [index * len(source) // used for index in range(used)]
        blocks += [
            (number, chosen[start : start + BLOCK_IMAGES])
            for start in range(0, used, BLOCK_IMAGES)
        ]
    encoded: dict[
        tuple[int, int], tuple[Tensor, ...]
    ] = {}  # by source and first sample
    broken: list[BrokenSample] = []
    non_finite: list[str] = []  # keys of samples
    blocks_of_rank = blocks[rank() :: world_size()]
    label = "features of the frozen tower"

    def batches() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, source in enumerate(sources):
            # only its last block is shorter, so that the batches are the blocks
            indices = [
                index
                for block_of, block in blocks_of_rank
                if block_of == number
                for index in block
            ]
            only: Any = {
                "kinds": source.config.kinds,
                "languages": source.config.languages,
                "indices": indices,
            }
            pairs = EvalPairs(
                source,
                caches[number],
                images,
                batch=BLOCK_IMAGES,
                workers=workers,
                **only,
            )
            yield from ((number, batch) for batch in pairs)
            broken.extend(pairs.broken)

    for number, batch in track(
        batches(),
        total=len(blocks_of_rank),
        label=label,
        unit="blocks",
        show=rank() == 0,
    ):
        if stop:
            break
        columns, bad_I = _finite(_encode(model, batch, normalize, caption_weights))
        encoded[number, int(batch["image_ids"][0])] = columns
        non_finite += [
            key
            for key, is_bad in zip(batch["keys"], bad_I.tolist(), strict=True)
            if is_bad
        ]
    model.train()
    if any(gather_objects(bool(stop))):
        raise StoppedError(
            "stopped before the heads' fit: nothing to save; rerun the same command to resume"
        )
    refuse_non_finite(non_finite, allowed=skip_non_finite)
    rows = [
        [*number_and_first, *columns] for number_and_first, columns in encoded.items()
    ]
    parts = gather_to_first(
        [rows, [[sample.shard, sample.key, sample.reason] for sample in broken]]
    )
    if rank() > 0:
        return None
    left_out = [BrokenSample(*fields) for _, samples in parts for fields in samples]
    if len(left_out) == sum(len(indices) for _, indices in blocks):
        raise ValueError(
            f"all samples are broken, the first: {left_out[0]}; run `llm2clip data check DATA`"
        )
    if left_out:
        log.warning(
            "fitting the heads without %d broken samples, the first: %s",
            len(left_out),
            left_out[0],
        )
    merged = {
        (number, first): columns
        for part, _ in parts
        for number, first, *columns in part
    }
    columns = zip(
        *(merged[number_and_first] for number_and_first in sorted(merged)), strict=True
    )
    pooled, embedding, ids, counts, share = (torch.cat(column) for column in columns)
    return FrozenFeatures(
        pooled_IP=pooled,
        embedding_MW=embedding,
        caption_hashes_M=ids,
        count_I=counts,
        share_M=share,
    )


def _encode(
    model: DualEncoder,
    batch: dict,
    normalize: Normalize,
    caption_weights: Mapping[str, float],
) -> tuple[Tensor, ...]:
    """Pooled features, embeddings, caption hashes, the number of captions of each image, and their
    probabilities."""
    pooled = (
        model.pool(normalize(batch["pixels"]), *normalize.shapes(batch)).float().cpu()
    )
    ids = torch.tensor([caption_hash(caption.text) for caption in batch["captions"]])
    counts = torch.tensor(
        [int((batch["owners"] == image).sum()) for image in batch["image_ids"]]
    )
    captions = iter(batch["captions"])
    shares = [
        share
        for n in counts.tolist()
        for share in caption_shares(list(islice(captions, n)), caption_weights)
    ]
    return (
        pooled,
        batch["embeddings"],
        ids,
        counts,
        torch.tensor(shares, dtype=torch.float64),
    )


def _finite(columns: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    """The columns of ``_encode`` without images whose feature, or embedding of a caption, is not
    finite; and which those are, (I,) bool."""
    pooled_IP, embedding_MW, caption_hashes_M, count_I, share_M = columns
    image_M = torch.repeat_interleave(torch.arange(len(count_I)), count_I)
    bad_I = ~pooled_IP.isfinite().all(1)
    bad_I[image_M[~embedding_MW.isfinite().all(1)]] = True
    good_I = ~bad_I
    good_M = good_I[image_M]
    kept = (
        pooled_IP[good_I],
        embedding_MW[good_M],
        caption_hashes_M[good_M],
        count_I[good_I],
        share_M[good_M],
    )
    return kept, bad_I


def refuse_non_finite(keys: list[str], *, allowed: int) -> None:
    """Raise NonFiniteLossError on every rank for more than ``allowed`` samples on all of them,
    whose ``keys`` each rank gives; else warn of them. Every rank must call this."""
    named = [key for keys_of_rank in gather_objects(keys) for key in keys_of_rank]
    if not named:
        return
    first_keys = ", ".join(named[:NAMED_KEYS])
    count = "1 sample has" if len(named) == 1 else f"{len(named)} samples have"
    what = f"{count} non-finite features or embeddings: {first_keys}"
    if len(named) > allowed:
        raise NonFiniteLossError(
            f"before the heads' fit: {what}",
            "check these samples (a cache: `llm2clip embed --verify`), "
            "or leave them out with --skip-bad-batches",
        )
    if rank() == 0:
        log.warning(
            "fitting the heads without %d of at most %d: %s", len(named), allowed, what
        )


def _fit(
    model: DualEncoder,
    samples: int,
    batches_from: Callable[[int], Iterator[Features | None]],
    products: torch.autocast,
    config: HeadsConfig,
    loss_config: LossConfig,
    seed: int,
    logging_steps: int,
    stop: StopRequest | None,
    unfinished: Path | None,
) -> tuple[list[FitLine], int]:
    """Train the heads, or the text adapter alone; returns the curve and the number of steps that
    are done. ``batches_from``: the batches from a step on; a step without a batch updates nothing.
    """
    of_clip = config.target == "clip_text"
    optimizer = _optimizer(model, config)
    parameters = [
        parameter for group in optimizer.param_groups for parameter in group["params"]
    ]
    terms = (
        {CLIP_TEXT_LOSS.name: CLIP_TEXT_LOSS} if of_clip else heads_terms(loss_config)
    )
    fit_of = canonical_json(
        ["3", *map(dataclasses.asdict, (config, loss_config)), seed, samples]
    )
    done, curve = _continued(model, optimizer, unfinished, fit_of)
    batches = batches_from(done)
    started = time.perf_counter()
    before = done
    with progress_bar(
        total=config.steps, label="heads", unit="steps", initial=done
    ) as bar:
        while done < config.steps and not stop:
            factor = lr_factor(done, config.steps, CLIP_TEXT_OPTIM) if of_clip else 1.0
            set_lr(optimizer.param_groups, factor)
            with products:
                batch = next(batches)
            if batch is None:
                done += 1
                bar.update()
                continue
            losses = {f"loss_{name}": term(batch) for name, term in terms.items()}
            loss = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad()
            loss.backward()
            if of_clip:
                torch.nn.utils.clip_grad_norm_(
                    parameters, CLIP_TEXT_OPTIM.max_grad_norm
                )
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0.0, MAX_LOG_SCALE)
            done += 1
            if done == config.steps or done % logging_steps == 0:
                values = {"loss": loss, **losses, "logit_scale": batch.log_scale.exp()}
                if batch.reference_bD is not None:
                    values["cosine"] = (
                        (batch.anchor_bD * batch.reference_bD).sum(1).mean()
                    )
                line = {name: float(value.detach()) for name, value in values.items()}
                size = len(batch.anchor_bD)
                rate = (done - before) * size / (time.perf_counter() - started)
                if not math.isfinite(line["loss"]):
                    raise ValueError(
                        f"the loss of the heads' fit is {line['loss']} at step {done}, though all "
                        f"of its inputs are finite; lower --heads.lr (now {config.lr})"
                    )
                line |= {"lr": config.lr * factor, "samples_per_second": rate}
                curve.append({"step": done, "samples": done * size, **line})
                bar.set_postfix_str(f"loss {line['loss']:.4g}", refresh=False)
            bar.update()
    optimizer.zero_grad()  # or these gradients are added to those of the first training step
    if done < config.steps and unfinished is not None:
        state: dict[str, Any] = {"fit_of": fit_of, "done": done, "curve": curve}
        with atomic_file(unfinished) as temporary:
            torch.save(
                state
                | {"optimizer": optimizer.state_dict(), "heads": heads_state(model)},
                temporary,
            )
    return curve, done


def _optimizer(model: DualEncoder, config: HeadsConfig) -> torch.optim.Optimizer:
    of_clip = config.target == "clip_text"
    trained = [
        Trained(name=name, parameter=p, lr=config.lr, decay=not is_vector(p))
        for name, p in head_parameters(model)
        if name.startswith("text_adapter.") or not of_clip
    ]
    groups = parameter_groups(trained, config.weight_decay)
    eps = CLIP_TEXT_OPTIM.eps if of_clip else 1e-8
    return AdamW().make(groups, lr=config.lr, betas=(0.9, 0.98), eps=eps)


def _continued(
    model: DualEncoder,
    optimizer: torch.optim.Optimizer,
    unfinished: Path | None,
    fit_of: str,
) -> tuple[int, list[FitLine]]:
    """Steps done and curve of the same fit that was stopped, whose state is read; of a new one
    otherwise."""
    saved = (
        torch.load(unfinished, "cpu", weights_only=True)
        if unfinished is not None and unfinished.is_file()
        else {}
    )
    if saved.get("fit_of") != fit_of:
        return 0, []
    optimizer.load_state_dict(saved["optimizer"])
    model.load_state_dict(saved["heads"], strict=False)
    log.warning(
        "continuing the heads' fit at step %d, from %s", saved["done"], unfinished
    )
    return saved["done"], saved["curve"]


def image_batches(
    model: DualEncoder, features: FrozenFeatures, size: int, seed: int, start: int
) -> Iterator[Features]:
    """Outputs of the heads, from batch ``start`` on: images drawn without replacement in each pass,
    with one random caption each."""
    device = model.logit_scale.device
    width = features.embedding_MW.shape[1]
    generator = torch.Generator().manual_seed(position_seed(seed, -1))
    queue = torch.empty(0, dtype=torch.int64)
    for number in count():
        if len(queue) < size:
            queue = torch.cat(
                [queue, torch.randperm(len(features.count_I), generator=generator)]
            )
        chosen_B = queue[:size]
        queue = queue[size:]
        caption_B = _draw_captions(
            features, chosen_B, torch.rand(size, generator=generator)
        )
        noise_BW = torch.randn(size, width, generator=generator).to(device)
        if number < start:
            continue
        pooled_BP = features.pooled_IP[chosen_B].to(device)
        embedding_BW = features.embedding_MW[caption_B].float().to(device)
        yield Features(
            anchor_bD=F.normalize(
                model.visual_projection(model.visual_norm(pooled_BP)).float(), dim=-1
            ),
            positive_bkD=model.encode_text(embedding_BW, noise_BW)[:, None],
            log_scale=model.logit_scale,
            bias=torch.zeros(1, device=device)
            if model.logit_bias is None
            else model.logit_bias,
            caption_hashes=features.caption_hashes_M[caption_B].to(device),
            image_ids=chosen_B.to(device),
        )


def caption_batches(
    model: DualEncoder,
    pairs: PairDataset,
    size: int,
    workers: int,
    skip_non_finite: int,
    start: int,
) -> Iterator[Features | None]:
    """Outputs of the text adapter, from batch ``start`` on: captions with CLIP's text features of
    them as the reference, in the order of a training's samples. None for a batch with a non-finite
    input; more than ``skip_non_finite`` of them raise ValueError, as rank 0 alone is here."""
    device = model.logit_scale.device
    left_out = 0
    for batch in PairLoader(
        pairs, local_batch=size, workers=workers, position=start * size
    ):
        good_B = batch["embeddings"].isfinite().flatten(1).all(1)
        good_B &= batch["targets"].isfinite().flatten(1).all(1)
        if not good_B.all():
            left_out += 1
            bad = [
                key
                for key, good in zip(batch["keys"], good_B.tolist(), strict=True)
                if not good
            ]
            named = f"samples have non-finite embeddings: {', '.join(bad[:NAMED_KEYS])}"
            if left_out > skip_non_finite:
                raise ValueError(
                    f"in the heads' fit {named}; check the caches (`llm2clip embed --verify`), or "
                    "leave such batches out with --skip-bad-batches"
                )
            log.warning("a batch of the heads' fit is left out: %s", named)
            yield None
            continue
        target_BD = F.normalize(batch["targets"].to(device).float(), dim=-1)
        yield Features(
            anchor_bD=model.encode_text(batch["embeddings"].to(device)),
            positive_bkD=target_BD[:, None],
            log_scale=model.logit_scale,
            bias=torch.zeros(1, device=device),
            caption_hashes=None,
            image_ids=None,
            reference_bD=target_BD,
            group=ALONE,
        )


def _draw_captions(
    features: FrozenFeatures, chosen_B: Tensor, draw_B: Tensor
) -> Tensor:
    """(B,) a caption of each chosen image by a number in [0, 1), by the captions' shares."""
    end_B = features.count_I.cumsum(0)[chosen_B]
    # the shares of an image add up to 1, so those of image i lie in i .. i + 1 of the running sum
    caption_B = torch.searchsorted(
        features.share_M.cumsum(0), chosen_B + draw_B.double(), right=True
    )
    return caption_B.clamp(end_B - features.count_I[chosen_B], end_B - 1)
