"""An optional first phase: fit the heads while the tower is frozen.

``heads.target images``: projection and text adapter meet at the frozen tower's features, because
gradients of untrained heads distort a pretrained tower. Every training image is encoded once,
without augmentation.

``heads.target clip_text``: the text adapter alone learns the text space of the tower's own CLIP,
from captions, as in ProCLIP's first stage (arXiv 2510.18795); projection and logit scale are the
CLIP's.

Images are encoded in the same blocks, and only rank 0 fits, so the result is independent of the
number of ranks. If the run is in bf16, so are the matrix products here; weights and loss stay fp32.

Shape letters: B images of a batch, k captions of an image, P width of the tower's pooled feature,
W width of an LLM embedding, D width of the joint space.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.atomic import atomic_file
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.loader import PairLoader
from llm2clip_plugin.data.pairs import PairDataset
from llm2clip_plugin.data.sources import Source
from llm2clip_plugin.errors import NonFiniteLossError, StoppedError
from llm2clip_plugin.hashes import canonical_json
from llm2clip_plugin.progress import progress_bar
from llm2clip_plugin.signals import StopRequest
from llm2clip_plugin.train.config import (
    HeadsConfig,
    LossConfig,
    OptimConfig,
    TrainConfig,
)
from llm2clip_plugin.train.distributed import ALONE, on_first_rank, world_size
from llm2clip_plugin.train.frozen_features import (
    NAMED_KEYS,
    FrozenFeatures,
    frozen_features,
)
from llm2clip_plugin.train.losses.base import Features, Terms, heads_terms
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

# ProCLIP's first stage: its code sums over the 128 images of a rank, whose pairs are 127 / 2 times
# as many, and clips the gradient of the sum
CLIP_TEXT_IMAGES = 128
CLIP_TEXT_LOSS = Distill(structure=(CLIP_TEXT_IMAGES - 1) / 2)
CLIP_TEXT_OPTIM = OptimConfig(eps=1e-6, max_grad_norm=5.0, schedule="cosine")
TEXT_SIDE = (  # fields of DualConfig
    "llm_width",
    "adapter",
    "adapter_blocks",
    "adapter_expansion",
    "normalize_input",
    "input_scale",
    "input_noise",
)


def fit_heads(
    model: DualEncoder,
    sources: Sequence[Source],
    caches: Sequence[EmbeddingCache],
    images: ImageConfig,
    config: HeadsConfig,
    loss: LossConfig,
    train: TrainConfig,
    *,
    device: torch.device,
    caption_weights: Mapping[str, float] | None = None,
    clip_caches: Sequence[EmbeddingCache] = (),
    stop: StopRequest | None = None,
    unfinished: Path | None = None,
    learned_from: Mapping[str, Any] = MappingProxyType({}),
) -> list[FitLine]:
    """Fit the heads in place, equal on every rank; returns the curve, a line every
    ``train.logging_steps`` and of the last.

    caption_weights: how often each kind of caption is drawn. clip_caches: of target clip_text,
    CLIP's features of the captions, a cache per source. Raises StoppedError on every rank when
    ``stop`` asks for it; the fit's state is then in the file ``unfinished``, from which the next
    call with the same settings and the same ``learned_from`` (the model's settings, and digests of
    the data) continues.

    ``train.skip_bad_batches``: samples with a NaN or an infinity in a feature or embedding to leave
    out (with clip_text: batches with one); one more raises NonFiniteLossError before the fit, or in
    it, as does a loss that is not finite.
    """
    model.to(device)
    bf16 = train.precision == "bf16"
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
                max_images=config.max_images,
                caption_weights=shares,
                device=device,
                stop=stop,
                workers=train.dataloader_num_workers,
                skip_non_finite=train.skip_bad_batches,
            )

    def fit() -> Fitted:
        if features is not None:
            inputs = _image_inputs(model, features, config, train)
        else:
            inputs = _caption_inputs(
                model, sources, caches, clip_caches, shares, config, train
            )
        saved = None
        if unfinished is not None:
            settings = [dataclasses.asdict(config), dataclasses.asdict(loss)]
            fit_of = ["5", *settings, train.seed, inputs.samples, dict(learned_from)]
            saved = UnfinishedFit(unfinished, canonical_json(fit_of))
        return _fit(model, inputs, products, config, loss, train, stop, saved)

    fitted = _fit_on_first_rank(fit)
    if fitted.done < config.steps:
        where = f"saved in {unfinished}" if unfinished else "not saved"
        stopped = f"stopped at step {fitted.done} of {config.steps} of the heads' fit"
        raise StoppedError(f"{stopped}, {where}; rerun the same command to resume")
    for _, parameter in head_parameters(model):
        if world_size() > 1:
            dist.broadcast(parameter.data, src=0)
    return fitted.curve


class Fitted(NamedTuple):
    """What rank 0 has fitted."""

    curve: list[FitLine]
    done: int  # steps


def _fit_on_first_rank(fit: Callable[[], Fitted]) -> Fitted:
    """What ``fit`` returns on rank 0, on every rank. The others wait in no collective, whose
    timeout a long fit would exceed. A NonFiniteFitError becomes a NonFiniteLossError on every
    rank."""

    def fit_or_failure() -> tuple[list[FitLine], int, list[str]]:
        try:
            curve, done = fit()
        except NonFiniteFitError as error:
            return [], 0, [error.what, error.advice]
        return curve, done, []

    curve, done, failure = on_first_rank(fit_or_failure)
    if failure:
        raise NonFiniteLossError(*failure, outcome="Nothing was saved")
    return Fitted(curve, done)


class FitInputs(NamedTuple):
    """What the heads are fitted on."""

    samples: int
    # the batches from a step on; a step whose batch is None updates nothing
    batches_from: Callable[[int], Iterator[Features | None]]


def _image_inputs(
    model: DualEncoder,
    features: FrozenFeatures,
    config: HeadsConfig,
    train: TrainConfig,
) -> FitInputs:
    """For target images: the frozen tower's features with the captions' embeddings."""
    samples = len(features.count_I)
    size = min(config.batch, samples)
    batches = partial(image_batches, model, features, size, train.seed)
    return FitInputs(samples, batches)


def _caption_inputs(
    model: DualEncoder,
    sources: Sequence[Source],
    caches: Sequence[EmbeddingCache],
    clip_caches: Sequence[EmbeddingCache],
    caption_weights: Mapping[str, float],
    config: HeadsConfig,
    train: TrainConfig,
) -> FitInputs:
    """For target clip_text: the captions' embeddings with CLIP's features of them."""
    dataset = PairDataset(
        sources,
        caches,
        None,
        seed=train.seed,
        caption_weights=caption_weights,
        captions_per_image=config.captions_per_image,
        targets=clip_caches,
    )
    batches = partial(
        caption_batches,
        model,
        dataset,
        config.batch,
        train.dataloader_num_workers,
        train.skip_bad_batches,
    )
    return FitInputs(len(dataset), batches)


class NonFiniteFitError(Exception):
    """Of rank 0, which alone fits; the ranks together raise a NonFiniteLossError."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(what)
        self.what = what
        self.advice = advice


def load_clip_heads(model: DualEncoder, source: str) -> None:
    """Load the projection and logit scale of an imported CLIP into ``model``; ValueError for a
    directory that has other settings than ``model``, or a text adapter."""
    default = DualConfig()
    without_adapter = {name: getattr(default, name) for name in TEXT_SIDE}
    config = dataclasses.replace(model.config, **without_adapter)
    clip_model = DualEncoder(model.tower, config)
    load_heads(clip_model, source)
    # all but the text adapter
    model.load_state_dict(heads_state(clip_model), strict=False)


def head_parameters(model: DualEncoder) -> list[tuple[str, torch.nn.Parameter]]:
    """Trained parameters outside the tower, by name."""
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if not name.startswith("tower.") and parameter.requires_grad
    ]


class UnfinishedFit(NamedTuple):
    """Where the state of a fit that was stopped is kept."""

    file: Path
    fit_of: str  # what is fitted to what; a state with another one is not continued


def _fit(
    model: DualEncoder,
    inputs: FitInputs,
    products: torch.autocast,
    config: HeadsConfig,
    loss: LossConfig,
    train: TrainConfig,
    stop: StopRequest | None,
    unfinished: UnfinishedFit | None,
) -> Fitted:
    """Train the heads, or the text adapter alone, to the last step or until ``stop``."""
    of_clip = config.target == "clip_text"
    if of_clip:
        term = partial(clip_text_loss, captions=config.captions_per_image)
        terms: Terms = {CLIP_TEXT_LOSS.name: term}
    else:
        terms = heads_terms(loss)
    max_grad_norm = CLIP_TEXT_OPTIM.max_grad_norm if of_clip else math.inf
    optimizer = _optimizer(model, config)
    curve, start = _continued(model, optimizer, unfinished)
    batches = inputs.batches_from(start)
    done = start
    values: dict[str, Tensor] = {}  # of the last update
    size = 0  # images of its batch
    started_at = time.perf_counter()
    with progress_bar(
        total=config.steps, label="heads", unit="steps", initial=start
    ) as bar:
        while done < config.steps and not stop:
            factor = lr_factor(done, config.steps, CLIP_TEXT_OPTIM) if of_clip else 1.0
            set_lr(optimizer.param_groups, factor)
            with products:
                batch = next(batches)
            done += 1
            if batch is not None:
                values = _update(model, optimizer, terms, batch, max_grad_norm)
                size = len(batch.positive_bkD)
            is_logged = done % train.logging_steps == 0 and batch is not None
            if values and (is_logged or done == config.steps):
                numbers = {name: float(value) for name, value in values.items()}
                _refuse_non_finite_loss(numbers["loss"], done, config.lr)
                seconds = time.perf_counter() - started_at
                line = {"step": done, "samples": done * size, **numbers}
                line["lr"] = config.lr * factor
                line["samples_per_second"] = (done - start) * size / seconds
                curve.append(line)
                bar.set_postfix_str(f"loss {numbers['loss']:.4g}", refresh=False)
            bar.update()
    optimizer.zero_grad()  # or these gradients are added to those of the first training step
    if done < config.steps and unfinished is not None:
        state = {"fit_of": unfinished.fit_of, "done": done, "curve": curve}
        state |= {"optimizer": optimizer.state_dict(), "heads": heads_state(model)}
        with atomic_file(unfinished.file) as temporary:
            torch.save(state, temporary)
    return Fitted(curve, done)


def _refuse_non_finite_loss(loss: float, step: int, lr: float) -> None:
    if not math.isfinite(loss):
        raise NonFiniteFitError(
            f"the loss of the heads' fit is {loss} at step {step}, though all of its inputs are "
            "finite",
            f"lower --heads.lr (now {lr})",
        )


def _update(
    model: DualEncoder,
    optimizer: torch.optim.Optimizer,
    terms: Terms,
    batch: Features,
    max_grad_norm: float,
) -> dict[str, Tensor]:
    """One step of the optimizer; returns scalars to report."""
    losses = {f"loss_{name}": term(batch) for name, term in terms.items()}
    loss = torch.stack(list(losses.values())).sum()
    optimizer.zero_grad()
    loss.backward()
    if max_grad_norm < math.inf:
        parameters: list[Tensor] = []
        for group in optimizer.param_groups:
            parameters += group["params"]
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0.0, MAX_LOG_SCALE)
    values = {"loss": loss, **losses, "logit_scale": batch.log_scale.exp()}
    if batch.reference_bD is not None:
        values["cosine"] = (batch.anchor_bD * batch.reference_bD).sum(1).mean()
    return {name: value.detach() for name, value in values.items()}


def clip_text_loss(batch: Features, *, captions: int) -> Tensor:
    """What ProCLIP's code sums over the images of a rank, 128: the squared distances of an image's
    ``captions`` to their references, and the structure of the first ones.

    The batch has the first captions of all images, then the second ones, and so on. Of any number
    of images this is 128 times a mean, so that gradients are clipped as its are.
    """
    assert batch.reference_bD is not None
    images = len(batch.anchor_bD) // captions
    first = dataclasses.replace(
        batch,
        anchor_bD=batch.anchor_bD[:images],
        reference_bD=batch.reference_bD[:images],
    )
    difference = batch.anchor_bD[images:] - batch.reference_bD[images:]
    others = difference.square().sum() / images
    return CLIP_TEXT_IMAGES * (CLIP_TEXT_LOSS(first) + others)


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
    unfinished: UnfinishedFit | None,
) -> Fitted:
    """The same fit as far as it came before it was stopped, with its state read; of a new one,
    nothing."""
    if unfinished is None or not unfinished.file.is_file():
        return Fitted([], 0)
    saved = torch.load(unfinished.file, "cpu", weights_only=True)
    if saved.get("fit_of") != unfinished.fit_of:
        log.warning(
            "the heads' fit starts from its first step: %s is of other settings or data",
            unfinished.file,
        )
        return Fitted([], 0)
    optimizer.load_state_dict(saved["optimizer"])
    model.load_state_dict(saved["heads"], strict=False)
    log.warning(
        "continuing the heads' fit at step %d, from %s", saved["done"], unfinished.file
    )
    return Fitted(saved["curve"], saved["done"])


def image_batches(
    model: DualEncoder, features: FrozenFeatures, size: int, seed: int, start: int
) -> Iterator[Features]:
    """Outputs of the heads, from batch ``start`` on: images drawn without replacement in each pass,
    with one random caption each."""
    device = model.logit_scale.device
    images = len(features.count_I)
    width = features.embedding_MW.shape[1]
    bias = model.logit_bias
    if bias is None:
        bias = torch.zeros(1, device=device)
    generator = torch.Generator().manual_seed(position_seed(seed, -1))
    queue = torch.empty(0, dtype=torch.int64)
    for number in count():
        if len(queue) < size:
            queue = torch.cat([queue, torch.randperm(images, generator=generator)])
        chosen_B = queue[:size]
        queue = queue[size:]
        draw_B = torch.rand(size, generator=generator)
        caption_B = _draw_captions(features, chosen_B, draw_B)
        noise_BW = torch.randn(size, width, generator=generator).to(device)
        if number < start:
            continue
        pooled_BP = features.pooled_IP[chosen_B].to(device)
        image_BD = model.visual_projection(model.visual_norm(pooled_BP)).float()
        embedding_BW = features.embedding_MW[caption_B].float().to(device)
        text_BD = model.encode_text(embedding_BW, noise_BW)
        yield Features(
            anchor_bD=F.normalize(image_BD, dim=-1),
            positive_bkD=text_BD[:, None],
            log_scale=model.logit_scale,
            bias=bias,
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
    them as the reference, in the order of a training's samples; with several captions an image,
    first those drawn first. None for a batch with a non-finite input; more than
    ``skip_non_finite`` of them raise NonFiniteFitError."""
    device = model.logit_scale.device
    left_out = 0
    loader = PairLoader(pairs, local_batch=size, workers=workers, position=start * size)
    for batch in loader:
        bad_keys = _non_finite_keys(batch)
        if bad_keys:
            left_out += 1
            first_keys = ", ".join(bad_keys[:NAMED_KEYS])
            problem = f"samples have non-finite embeddings: {first_keys}"
            if left_out > skip_non_finite:
                raise NonFiniteFitError(
                    f"in the heads' fit {problem}",
                    "check the caches (`llm2clip embed --verify`), "
                    "or leave such batches out with --skip-bad-batches",
                )
            log.warning("a batch of the heads' fit is left out: %s", problem)
            yield None
            continue
        embedding_kBW = _by_caption(batch["embeddings"]).to(device)
        target_kBD = _by_caption(batch["targets"]).to(device)
        target_kBD = F.normalize(target_kBD.float(), dim=-1)
        yield Features(
            anchor_bD=model.encode_text(embedding_kBW.flatten(0, 1)),
            positive_bkD=target_kBD.transpose(0, 1),
            log_scale=model.logit_scale,
            bias=torch.zeros(1, device=device),
            caption_hashes=None,
            image_ids=None,
            reference_bD=target_kBD.flatten(0, 1),
            group=ALONE,
        )


def _by_caption(rows: Tensor) -> Tensor:
    """(k, B, W) of the loader's (B, k, W), or its (B, W) for one caption an image."""
    return rows[None] if rows.ndim == 2 else rows.transpose(0, 1)


def _non_finite_keys(batch: Mapping) -> list[str]:
    """Of the samples with a non-finite embedding, of the LLM or of the CLIP."""
    good_B = batch["embeddings"].isfinite().flatten(1).all(1)
    good_B &= batch["targets"].isfinite().flatten(1).all(1)
    keys = zip(batch["keys"], good_B.tolist(), strict=True)
    return [key for key, is_good in keys if not is_good]


def _draw_captions(
    features: FrozenFeatures, chosen_B: Tensor, draw_B: Tensor
) -> Tensor:
    """(B,) a caption of each chosen image by a number in [0, 1), by the captions' shares."""
    count_B = features.count_I[chosen_B]
    end_B = features.count_I.cumsum(0)[chosen_B]
    # the shares of an image add up to 1, so those of image i lie in i .. i + 1 of the running sum
    running_sum = features.share_M.cumsum(0)
    wanted = chosen_B + draw_B.double()
    caption_B = torch.searchsorted(running_sum, wanted, right=True)
    return caption_B.clamp(end_B - count_B, end_B - 1)
