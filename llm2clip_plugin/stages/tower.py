"""Stage 2, ``llm2clip train-tower``: captioned images and a cache in, a trained and exported tower
out."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm2clip_plugin.contracts import PROJECTED
from llm2clip_plugin.data.cache import EmbeddingCache, cache_digest, source_digest
from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.data.loader import PairLoader
from llm2clip_plugin.data.pairs import PairDataset
from llm2clip_plugin.data.remote import is_url, shuffle_window
from llm2clip_plugin.data.sampler import epoch_draws
from llm2clip_plugin.data.samples import lacks_shared_memory
from llm2clip_plugin.data.sources import Source, check_fields, check_kinds, open_source
from llm2clip_plugin.progress import phase
from llm2clip_plugin.run_folder import UNFINISHED_HEADS, started_by
from llm2clip_plugin.signals import StopRequest, loaded, stop_requests
from llm2clip_plugin.stages import run as plans
from llm2clip_plugin.stages.run import (
    TrainingRun,
    load_plans,
    open_caches,
    plan_engine,
    training_ranks,
)
from llm2clip_plugin.stages.settings import TEACHERS, plan_or_train, rank_and_world
from llm2clip_plugin.stages.tower_config import DEFAULT, TRAIN_TOWER, RunConfig
from llm2clip_plugin.stages.tower_export import TOWER, export_towers
from llm2clip_plugin.train.checkpoint import AVERAGES, TWIN, Loaded, load_weights
from llm2clip_plugin.train.config import local_world_size
from llm2clip_plugin.train.distributed import choose_device, on_first_rank, rank, world_size
from llm2clip_plugin.train.engine import Engine, Reference, frozen_copy
from llm2clip_plugin.train.guard import check_finite, locked
from llm2clip_plugin.train.heads import FitLine, fit_heads, load_clip_heads
from llm2clip_plugin.train.losses.base import (
    check_patch_layers,
    needs_reference,
    patch_layers,
    weighted_terms,
)
from llm2clip_plugin.train.model import (
    DTYPES,
    StepMemory,
    activation_bytes,
    build_dual,
    compile_blocks,
    enable_gradient_checkpointing,
    shape_dual,
    trained_parameters,
    with_llm_width,
)
from llm2clip_plugin.train.optim import chosen_optimizer
from llm2clip_plugin.train.step import TowerStep
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.towers import preprocessor_config, tower_blocks, use_fastest_attention

if TYPE_CHECKING:
    from llm2clip_plugin.evaluate.in_training import Evaluation


def main(argv: list[str]) -> int:
    """Print the plan or train; exit status 0."""
    config = TRAIN_TOWER.parse(argv)
    config.validate(needs_data=not config.dry_run)
    chosen = any(word.startswith(("--recipe", "--config")) for word in argv)
    if rank_and_world()[0] == 0 and not chosen:
        print(
            f"recipe: {DEFAULT} (the paper's settings for any data and tower; "
            "--recipe NAME chooses another)"
        )
    train = partial(train_tower, config, command=started_by("train-tower", argv))
    return plan_or_train(config.dry_run, partial(tower_plan, config), train, "tower")


def train_tower(config: RunConfig, *, command: dict[str, Any] | None = None) -> Path:
    """Train a tower; returns the directory of the exported tower.

    The same call resumes from the newest checkpoint of ``config.output_dir``. Raises ValueError,
    FileNotFoundError or ContractError for what the user can correct, NonFiniteLossError for a loss
    that is NaN or infinite. ``command``: run_folder.started_by, for run.json.
    """
    # the handlers outlive the watch: a launcher's SIGTERM must not end this rank before it says
    # which one failed
    with stop_requests() as stop, training_ranks(config.train) as device:
        with phase("opening the data"):
            data = open_data(config.validate())
        with locked(Path(config.output_dir)):
            with phase("checking the data"):
                on_first_rank(lambda: check_data(config, data))
            if data.measured is not None:
                with phase("embedding the benchmarks' texts"):
                    data.measured.embed(data.caches[0].teacher)
            config = with_data(config, data)
            for source, decided in zip(data.sources, config.data.sources, strict=True):
                source.config = decided
            return _train(config, data, device, stop, command or {})


def with_data(config: RunConfig, data: Data) -> RunConfig:
    """What the data decides: the order of reading, which a checkpoint records, and the width of
    embeddings."""
    shard_sizes = [shard.size for source in data.sources for shard in source.shards]
    batch_shards = config.train.global_batch / mean(shard_sizes)
    read = config.data.read
    window = shuffle_window(read.shuffle_window, config.data.path, batch_shards)
    read = dataclasses.replace(read, shuffle_window=window)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, read=read),
        dual=with_llm_width(config.dual, data.caches[0].width),
    )


def _train(
    config: RunConfig, data: Data, device: torch.device, stop: StopRequest, command: dict[str, Any]
) -> Path:
    dual, images = start_model(config, data)
    trained = trained_parameters(dual, config.optim)
    run = open_run(config, data, command, hidden_size=dual.tower.config.hidden_size)
    resumed = run.find_checkpoint()
    if resumed is not None:
        load_weights(dual, resumed.weights, where=resumed.path)
    on_first_rank(
        lambda: check_finite(dual, config.tower.path if resumed is None else resumed.path)
    )
    curve = fit(run, dual, data, images, stop) if resumed is None and config.heads.steps else []
    # before the engine, which partitions the weights under ZeRO-3
    frozen = frozen_copy(dual) if needs_reference(config.loss) else None
    for model in filter(None, (dual, frozen)):
        use_fastest_attention(model.tower, device, bf16=config.train.precision == "bf16")
        if config.train.torch_compile:
            compile_blocks(tower_blocks(model.tower), dynamic=False)
    if recomputes(config, run.deepspeed, device):
        enable_gradient_checkpointing(dual.tower)
    engine = run.make_engine(dual, trained, resumed)
    evaluate = None
    if data.measured is not None:
        shows = rank() == 0 and bool({"wandb", "tensorboard"} & run.deepspeed.keys())
        show = engine.pictures.update if shows else None
        evaluate = partial(data.measured, dual, images, show)
    # random ones have no scores to compare with
    has_heads = bool(config.heads.steps or config.tower.keep_heads)
    references = make_references(config, engine, frozen, resumed)
    start = run.start_state(resumed)
    step = TowerStep(
        engine,
        weighted_terms(config.loss),
        seed=config.train.seed,
        text_noise=config.dual.input_noise > 0,
        normalize=Normalize(images, engine.device),
        total_samples=run.total_steps * config.train.global_batch,
        reference=references.get(TWIN),
        patch_layers=patch_layers(config.loss),
    )
    state = run.train_to_end(
        engine,
        start,
        step=step,
        batches=iter(make_batches(config, data, images, start.samples)),
        evaluate=evaluate,
        before=evaluate if config.train.eval_on_start and has_heads else None,
        heads=curve,
        stop=stop,
        references=references,
    )
    if rank() == 0:
        (run.folder / UNFINISHED_HEADS).unlink(missing_ok=True)
    with phase("export"):
        on_first_rank(lambda: export_towers(config, state.step))
    return run.folder / TOWER


def start_model(config: RunConfig, data: Data) -> tuple[DualEncoder, ImageConfig]:
    """The tower with its heads, and how images are made for it. Raises ValueError for what would
    stop the run later."""
    dual = build_dual(config.tower, config.dual, seed=config.train.seed)
    if config.heads.target == "clip_text":
        load_clip_heads(dual, config.tower.path)
    check_patch_layers(config.loss, dual.tower.config.num_hidden_layers)
    images = ImageConfig.from_preprocessor(preprocessor_config(dual.tower))
    loading = load_plans(config, images.size, data.caches[0].width, world_size())
    if problem := lacks_shared_memory(loading, local_world_size()):
        # else a process that writes beyond the end dies of SIGBUS in the middle of the run
        raise ValueError(problem)
    return dual, images


def fit(
    run: TrainingRun, dual: DualEncoder, data: Data, images: ImageConfig, stop: StopRequest
) -> list[FitLine]:
    """Fit the heads on the frozen tower, in place; returns the curve."""
    config: RunConfig = run.config  # type: ignore[assignment]
    run.record(run.new_state())
    loaded()
    with phase("heads"):
        return fit_heads(
            dual,
            data.sources,
            data.caches,
            images,
            config.heads,
            config.loss,
            device=choose_device(),
            seed=config.train.seed,
            bf16=config.train.precision == "bf16",
            caption_weights=config.data.kind_weights,
            clip_caches=data.clip_caches,
            workers=config.train.dataloader_num_workers,
            logging_steps=config.train.logging_steps,
            stop=stop,
            unfinished=run.folder / UNFINISHED_HEADS,
            skip_non_finite=config.train.skip_bad_batches,
        )


def make_references(
    config: RunConfig, engine: Engine, frozen: DualEncoder | None, resumed: Loaded | None
) -> dict[str, Reference]:
    """The moving average that is exported, and the tower that the loss compares with, where the run
    has them."""
    references: dict[str, Reference] = {}
    if decay := config.train.ema_decay:
        updates = resumed.state.step if resumed is not None else 0
        values = resumed.averages if resumed is not None else None
        references[AVERAGES] = Reference(engine, decay, warmup=True, updates=updates, values=values)
    if frozen is not None:
        values = resumed.twin if resumed is not None else None
        decay = config.distill.decay if config.distill.reference == "ema" else 1.0
        references[TWIN] = Reference(engine, decay, module=frozen, values=values)
    return references


def open_run(
    config: RunConfig, data: Data, command: dict[str, Any], *, hidden_size: int
) -> TrainingRun:
    steps, deepspeed = plan_engine(
        config, samples=data.samples, world=world_size(), hidden_size=hidden_size
    )
    learned_from = {"teacher": data.caches[0].manifest.lasting_fingerprint, "samples": data.samples}
    if data.clip_caches:
        learned_from["clip"] = data.clip_caches[0].manifest.lasting_fingerprint
    return TrainingRun(
        config=config,
        run_settings={**dataclasses.asdict(config), **learned_from},
        teacher=dataclasses.asdict(data.caches[0].teacher),
        total_steps=steps,
        deepspeed=deepspeed,
        data=data.digests,
        command=command,
    )


def make_batches(config: RunConfig, data: Data, images: ImageConfig, position: int) -> PairLoader:
    """This rank's rows of the global batches, from sample number ``position`` of the run on."""
    local_batch, micro_batch, _ = config.train.rows(world_size())
    dataset = PairDataset(
        data.sources,
        data.caches,
        images,
        config.data.augment,
        seed=config.train.seed,
        caption_weights=config.data.kind_weights,
        captions_per_image=config.data.captions_per_image,
        one_source_batch=config.train.global_batch if config.data.one_source_per_batch else 0,
    )
    return PairLoader(
        dataset,
        local_batch=local_batch,
        micro_batch=micro_batch,
        position=position,
        rank=rank(),
        world=world_size(),
        nodes=max(1, world_size() // local_world_size()),
        workers=config.train.dataloader_num_workers,
        prefetch_mb=config.train.dataloader_prefetch_mb,
        max_broken=config.train.max_broken,
        pin_memory=torch.cuda.is_available(),
    )


@dataclass(frozen=True)
class Data:
    """Opened sources with their caches, checked against each other."""

    sources: list[Source]
    caches: list[EmbeddingCache]
    # with heads.target clip_text: a CLIP's text features of each source's captions
    clip_caches: list[EmbeddingCache]
    measured: Evaluation | None

    @property
    def samples(self) -> int:
        """Training samples of one epoch over all sources: the sum of weight x size."""
        sizes = [len(source) for source in self.sources]
        return sum(epoch_draws(sizes, [source.config.weight for source in self.sources]))

    @property
    def digests(self) -> dict[str, str]:
        """What is compared between ranks."""
        digests: dict[str, str] = {}
        for number, source in enumerate(self.sources, 1):
            digests[str(number)] = source_digest(source)
        for number, cache in enumerate(self.caches, 1):
            digests[f"{number}, its cache"] = cache_digest(cache)
        for number, cache in enumerate(self.clip_caches, 1):
            digests[f"{number}, its CLIP cache"] = cache_digest(cache)
        if self.measured is not None:
            digests |= self.measured.digests
        return digests


def open_data(config: RunConfig) -> Data:
    """Open every source and cache; ContractError if caches have different teachers, or one doesn't
    fit its data."""
    data = config.data
    caches_of = (*(data.cache or ("",) * len(data.path)), data.validation_cache)
    for path, cache in zip((*data.path, data.validation), caches_of, strict=True):
        if is_url(path) and not cache:  # before anything is downloaded
            raise ValueError(
                f"{path} is not a local folder; "
                "set --cache DIR (--validation-cache DIR for --validation)"
            )
    sources = [open_source(source) for source in data.sources]
    check_fields(*sources)
    caches = open_caches(sources, data.cache)
    measured = None
    # evaluation, with the LLM that embeds its texts, is imported by such runs alone
    if config.evaluates:
        from llm2clip_plugin.evaluate.in_training import Evaluation, open_suites

        split = None
        if data.held_out is not None:
            held_out = open_source(data.held_out)
            split_cache = open_caches([held_out], (data.validation_cache,), caches[0].teacher)[0]
            split = (held_out, split_cache)
        measured = Evaluation(config.evaluated, split, open_suites(config.benchmarks))
    of_clip = config.heads.target == "clip_text"
    clip_caches = open_caches(sources, data.clip_cache, of_clip=True) if of_clip else []
    for cache in clip_caches:
        if cache.teacher.pooling != PROJECTED or cache.width != config.dual.projection_dim:
            raise ValueError(
                f"--clip-cache {cache.directory} has features of {cache.teacher.llm}, "
                f"{cache.width} wide; expected the text features of the tower's own CLIP, "
                f"dual.projection_dim {config.dual.projection_dim} wide"
            )
    return Data(sources, caches, clip_caches, measured)


def check_data(config: RunConfig, data: Data) -> None:
    """Raise ValueError for data on which training or the run's evaluation would fail; warn about
    what is unusual."""
    batch = config.train.global_batch
    samples = sum(map(len, data.sources))
    if batch > samples:
        paths = ", ".join(config.data.path)
        problem = f"global_batch {batch} is more than the {samples} samples of {paths}"
        if not config.loss.mask_same_image:
            raise ValueError(
                f"{problem}: samples would be their own negatives, as loss.mask_same_image is off"
            )
        print(f"warning: {problem}: a sample comes several times in a batch", file=sys.stderr)
    small = [
        f"{source.path} ({len(source)} samples)" for source in data.sources if len(source) < batch
    ]
    if config.data.one_source_per_batch and len(data.sources) > 1 and small:
        problem = f"global_batch {batch} is larger than {', '.join(small)}"
        raise ValueError(
            f"{problem}; lower --global-batch, or mix the sources with --no-one-source-per-batch"
        )
    check_kinds(data.sources, config.data.kind_weights)
    if data.measured is not None:
        data.measured.check(zip(data.sources, data.caches, strict=True))


ASSUMED_WIDTH = TEACHERS["llama-8b"].width  # of an embedding, while the LLM is unknown
IMAGES = 16  # of the pass that measures activations


def tower_plan(config: RunConfig) -> str:
    """The plan as text. Raises what would stop the run itself."""
    _, world = rank_and_world()
    samples, width, assumed = measure_data(config)
    config = dataclasses.replace(config, dual=with_llm_width(config.dual, width))
    dual = shape_dual(config.tower, config.dual)
    check_patch_layers(config.loss, dual.tower.config.num_hidden_layers)
    heads = config.heads
    tower = dual.tower.config
    _, deepspeed = plan_engine(config, samples=samples, world=world, hidden_size=tower.hidden_size)
    trained = trained_parameters(dual, config.optim)
    run = plans.describe_run(config, deepspeed, trained, samples, world)
    memory = step_memory(config, checkpointing=bool(config.train.gradient_checkpointing))
    kept = None  # without gradient checkpointing
    if config.train.gradient_checkpointing == "auto":
        kept = step_memory(config, checkpointing=False)
    loading = load_plans(config, tower.image_size, width, world)
    lacking = lacks_shared_memory(loading, local_world_size())
    parameters = sum(p.numel() for p in dual.tower.parameters())
    parts = [f"assumed: {line}" for line in assumed]
    parts.append(
        f"tower: {config.tower.path or config.tower.architecture}, {tower.image_size} px, "
        f"{tower.num_hidden_layers} blocks x {tower.hidden_size}, {parameters:,} parameters; "
        f"projection_dim {config.dual.projection_dim}, LLM embeddings {width} wide"
    )
    if heads.steps:
        parts.append(f"heads first: {heads.steps} steps of {heads.batch} pairs ({heads.target})")
    parts.append(run)
    parts.append(plans.describe_memory(memory, config.train, config.plan.gpu_gib, kept=kept))
    if lacking:
        parts.append(f"too many loader processes for this machine: {lacking}")
    return "\n".join(parts)


def measure_data(config: RunConfig) -> tuple[int, int, list[str]]:
    """Samples, width of the embeddings, and a line for each thing that is missing and assumed."""
    samples = config.plan.images
    assumed = f"{config.plan.images:,} images (--assumed-samples, or DATA)"
    if config.evaluates:
        from llm2clip_plugin.evaluate.in_training import open_suites

        open_suites(config.benchmarks)  # one that is missing stops the run
    if config.data.path:
        try:
            data = open_data(config)
        except FileNotFoundError as error:  # no cache yet
            if config.data.cache:
                raise
            samples = sum(len(open_source(source)) for source in config.data.sources)
            assumed = str(error)
        else:
            check_data(config, data)
            return data.samples, data.caches[0].width, []
    if config.dual.llm_width:
        return samples, config.dual.llm_width, [assumed]
    widths = ", ".join(f"{teacher.width} for {name}" for name, teacher in TEACHERS.items())
    width = f"LLM embeddings of width {ASSUMED_WIDTH} (--dual.llm-width: {widths})"
    return samples, ASSUMED_WIDTH, [assumed, width]


def recomputes(config: RunConfig, deepspeed: dict[str, Any], device: torch.device) -> bool:
    """Whether this rank recomputes the tower's blocks: as set, or where its memory would not hold
    their activations."""
    if config.train.gradient_checkpointing != "auto":
        return config.train.gradient_checkpointing
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        # this rank's share
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // local_world_size()
    gib = total / plans.GIB
    memory = step_memory(config, checkpointing=False)
    on = not plans.fits(memory, deepspeed, config.train, world=world_size(), gib=gib)
    if rank() == 0:
        print(f"gradient checkpointing (auto): {'on' if on else 'off'}, with {gib:.0f} GiB")
    return on


def step_memory(config: RunConfig, *, checkpointing: bool) -> StepMemory:
    """Measured on fake tensors."""
    dual = shape_dual(config.tower, config.dual)
    precision = config.train.precision
    tower = dual.tower.config
    parameters = sum(p.numel() for p in dual.parameters())
    trained = sum(p.numel() for p in dual.parameters() if p.requires_grad)
    tower_parameters = sum(p.numel() for p in dual.tower.parameters())
    dtype = DTYPES[precision]
    pixels = (3, tower.image_size, tower.image_size)
    if checkpointing:
        enable_gradient_checkpointing(dual.tower)

    def make_inputs() -> tuple[Tensor, Tensor]:
        captions = (IMAGES, config.data.captions_per_image, config.dual.llm_width)
        return torch.empty(IMAGES, *pixels, dtype=dtype), torch.empty(captions)

    layers = patch_layers(config.loss)

    def forward(*inputs: Tensor) -> Tensor:
        features = [feature for feature in dual(*inputs, **layers) if feature is not None]
        return sum((feature.sum() for feature in features), torch.zeros(()))

    of_patch = {"patches": 3 * tower.hidden_size, "patch_features": 2 * config.dual.projection_dim}
    patches = (tower.image_size // tower.patch_size) ** 2
    has_average = bool(config.train.ema_decay)
    has_frozen_tower = needs_reference(config.loss)
    frozen_tower_bytes = 0.0
    if has_frozen_tower:
        frozen_tower_bytes = tower_parameters * dtype.itemsize
    return StepMemory(
        precision=precision,
        trained=trained,
        frozen_bytes=(parameters - trained) * dtype.itemsize,
        parameters=parameters,
        pair_bytes=activation_bytes(dual.to(dtype), make_inputs, forward) / IMAGES,
        width=config.dual.projection_dim,
        state_bytes=chosen_optimizer(config.optim).state_bytes,
        pixels=math.prod(pixels),
        averages=[has_average, has_frozen_tower].count(True),
        frozen_tower_bytes=frozen_tower_bytes,
        patches=patches * sum(of_patch[reads] for reads in layers),
    )
