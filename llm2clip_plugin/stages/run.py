"""A run of either training stage: DeepSpeed's configuration, the checkpoint to resume from,
run.json, the end."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import llm2clip_plugin
from llm2clip_plugin.contracts import PROJECTED, CacheManifest, RunRecord, TeacherIdentity
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.samples import LoadPlan, plan_evaluation, plan_loading, row_bytes
from llm2clip_plugin.data.sources import Source, SourceConfig, data_folder
from llm2clip_plugin.errors import StoppedError
from llm2clip_plugin.metrics import read_metrics
from llm2clip_plugin.progress import each_in_phase, phase
from llm2clip_plugin.run_folder import METRICS, headline
from llm2clip_plugin.signals import StopRequest, loaded
from llm2clip_plugin.stages.llm_config import FinetuneConfig
from llm2clip_plugin.stages.resume import flat, refuse_changes, same_on_all_hosts
from llm2clip_plugin.stages.tower_config import RunConfig
from llm2clip_plugin.text.config import embed_command
from llm2clip_plugin.train.checkpoint import RESUME_AUTO, Checkpoints, Loaded, TrainState, load
from llm2clip_plugin.train.config import TrainConfig
from llm2clip_plugin.train.distributed import on_first_rank, rank, set_tf32
from llm2clip_plugin.train.engine import Engine, Reference, check_deepspeed, start_ranks
from llm2clip_plugin.train.guard import (
    Watch,
    readable_checkpoint,
    refuse_disagreement,
    shared_folder,
)
from llm2clip_plugin.train.heads import BLOCK_IMAGES
from llm2clip_plugin.train.loop import Evaluate, LoopParts, run_loop
from llm2clip_plugin.train.model import StepMemory, rank_bytes
from llm2clip_plugin.train.optim import (
    REDUCTION,
    Trained,
    complete,
    parameter_groups,
    read_deepspeed_json,
    zero_stage,
)
from llm2clip_plugin.train.step import Batch, ContrastiveStep
from llm2clip_plugin.vision.export import library_versions

ADVICE = {  # first word of a fact -> what to do
    "output_dir": "output_dir must be a folder that all hosts share: "
    "set --output to one on NFS or Lustre",
    "checkpoint": "every host must see the same checkpoints: "
    "set --output (or --resume) to a shared folder",
    "data": "every host must read the same data and caches: "
    "copy them again, or use a shared folder",
    "setting": "start every rank with the same command",
    "DeepSpeed": "every host must read the same DeepSpeed configuration",
    "version": "install the same environment on every host",
}


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A run's folder and settings, and the checkpoint that it resumes from."""

    config: RunConfig | FinetuneConfig
    # what a checkpoint is compared with: the configuration, and what it was applied to
    run_settings: dict[str, Any]
    teacher: dict[str, Any]  # TeacherIdentity as a dict; {} in stage 1
    total_steps: int
    deepspeed: dict[str, Any]  # DeepSpeed's configuration
    data: dict[str, str]  # digests of data and caches, which all ranks must have in common
    # run_folder.started_by; {}: called from Python
    command: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder, keep=self.config.train.save_total_limit)

    def _chosen_checkpoint(self) -> str:
        """The path of the checkpoint that ``resume`` means; "" for a new run."""
        path = self.checkpoints.find(self.config.resume)
        return "" if path is None else str(path)

    def find_checkpoint(self) -> Loaded | None:
        """The checkpoint to resume from, chosen by rank 0; None for a new run. Every rank must call
        this.

        Raises ValueError if it was saved with other settings, DisagreementError if the ranks don't
        see the same.
        """
        chosen = on_first_rank(self._chosen_checkpoint)
        path = Path(chosen) if chosen else None
        facts = {
            "output_dir": shared_folder(self.folder),
            "setting total steps": str(self.total_steps),
            "checkpoint": "none",
        }
        if path is not None:
            facts["checkpoint"] = readable_checkpoint(path, TrainState.FILE)
        facts |= {f"data {name}": digest for name, digest in self.data.items()}
        settings = same_on_all_hosts(type(self.config), self.run_settings)
        facts |= {f"setting {name}": json.dumps(value) for name, value in settings.items()}
        facts |= {f"DeepSpeed {name}": json.dumps(value) for name, value in flat(self.deepspeed)}
        facts |= {f"version of {name}": version for name, version in versions().items()}
        refuse_disagreement(facts, ADVICE)
        if path is None:
            return None
        loaded = load(path)
        refuse_changes(
            type(self.config),
            loaded.state.config,
            self.run_settings,
            self.config.allow_changed,
            where=str(path),
        )
        state = dataclasses.replace(
            loaded.state, config=self.run_settings, config_hash=self.config.hash
        )
        return dataclasses.replace(loaded, state=state)

    def make_engine(
        self,
        module: nn.Module,
        trained: Iterable[Trained],
        resumed: Loaded | None,
        *,
        keep_frozen: bool = True,
    ) -> Engine:
        """DeepSpeed's engine over the module; its optimizer resumes from the checkpoint, as the
        weights already do."""
        groups = parameter_groups(trained, self.config.optim.weight_decay)
        variables = self._wandb_variables() if resumed is not None else {}
        os.environ.update(variables)
        engine = Engine(module, groups, self.config.optim, self.deepspeed, keep_frozen=keep_frozen)
        for name in variables:  # of this run alone
            del os.environ[name]
        if (started := self.wandb_run()) is not None:
            started.config.update(dataclasses.asdict(self.config), allow_val_change=True)
        if resumed is not None:
            engine.restore(resumed.weights, resumed.moments, vars(resumed.state))
        return engine

    def _wandb_variables(self) -> dict[str, str]:
        """For W&B to go on with the run, unless the user has chosen one."""
        with suppress(OSError, ValueError):  # run.json is missing or damaged
            saved = RunRecord.read(self.folder / RunRecord.FILE).wandb
            if saved and "WANDB_RUN_ID" not in os.environ:
                return {"WANDB_RUN_ID": saved, "WANDB_RESUME": "allow"}
        return {}

    def start_state(self, resumed: Loaded | None) -> TrainState:
        """Where training starts; checkpoints that it does not continue from are moved aside."""
        moved = on_first_rank(
            lambda: self.checkpoints.move_aside(resumed.path if resumed else None)
        )
        if moved and rank() == 0:
            start = f"resuming from {resumed.path}" if resumed else "starting over"
            advice = ""
            if self.config.resume != RESUME_AUTO:
                advice = "; rerun without --resume, or this happens again"
            print(f"warning: {start}: {moved}{advice}", file=sys.stderr)
        return self.new_state() if resumed is None else resumed.state

    def new_state(self) -> TrainState:
        """Before the first step."""
        config_hash = self.config.hash
        seed = self.config.train.seed
        return TrainState(
            step=0, samples=0, config=self.run_settings, config_hash=config_hash, seed=seed
        )

    def train_to_end(
        self,
        engine: Engine,
        state: TrainState,
        *,
        step: ContrastiveStep,
        batches: Iterator[Batch],
        evaluate: Evaluate | None,
        before: Evaluate | None = None,
        heads: Sequence[dict[str, float]] = (),
        stop: StopRequest,
        references: Mapping[str, Reference] | None = None,
    ) -> TrainState:
        """Run the training loop and record its start and end in run.json; returns the state at its
        end.

        ``before``: scores of a new run before its first step, if they are wanted. ``heads``: the
        curve of a fit of the heads before it, to be reported. Raises StoppedError on every rank if
        it was stopped before its end.
        """
        loaded()
        self.record(state)
        warmup = self.config.optim.warmup(self.total_steps)
        if rank() == 0 and 0 < self.total_steps <= warmup:
            print(
                f"note: all {self.total_steps} steps are warm-up ({warmup}); "
                "set --warmup-ratio 0.1",
                file=sys.stderr,
            )
        state = run_loop(
            LoopParts(
                step=step,
                batches=each_in_phase("data", batches, first_step=state.step + 1),
                engine=engine,
                references=references or {},
                checkpoints=self.checkpoints,
                evaluate=phase("evaluation")(evaluate) if evaluate else None,
                before=phase("evaluation before training")(before) if before else None,
                heads=heads,
                train=self.config.train,
                optim=self.config.optim,
                total_steps=self.total_steps,
                run_folder=self.folder,
                state=state,
                stop=stop,
            )
        )
        self.record(state)
        if state.step < self.total_steps:
            raise StoppedError(
                f"stopped at step {state.step} of {self.total_steps}; "
                f"exit status {StoppedError.status}"
            )
        if rank() == 0:
            if needed := read_metrics(self.folder / METRICS).loader():
                print(f"loader: {needed}")
            if line := before_and_after(state.before, state.metrics):
                print(line)
        return state

    def record(self, state: TrainState) -> None:
        """Write run.json, on rank 0. Every rank must call this."""
        record = RunRecord(
            config=dataclasses.asdict(self.config),
            config_hash=self.config.hash,
            teacher=self.teacher,
            step=state.step,
            samples=state.samples,
            finished=state.step >= self.total_steps,
            metrics=state.metrics,
            before=state.before,
            total_steps=self.total_steps,
            epoch_samples=int(self.run_settings.get("samples", 0)),
            command=self.command,
            versions=library_versions(),
            wandb=getattr(self.wandb_run(), "id", ""),
        )
        on_first_rank(lambda: str(record.write(self.folder / RunRecord.FILE)))

    def wandb_run(self) -> Any:
        """The run that DeepSpeed has started in Weights & Biases, on rank 0; None without one."""
        if "wandb" not in self.deepspeed:
            return None
        return getattr(sys.modules.get("wandb"), "run", None)


@contextmanager
def training_ranks(train: TrainConfig) -> Iterator[torch.device]:
    """This rank's device, inside a block in which the ranks form a group and watch each other; TF32
    as the run sets it."""
    device = start_ranks(train.ddp_timeout)
    if train.precision == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU; on a CPU use --precision bf16 or fp32")
    set_tf32(train.tf32, train.precision, device)
    with Watch(train.straggler_seconds):
        yield device


def plan_engine(
    config: RunConfig | FinetuneConfig, *, samples: int, world: int, hidden_size: int
) -> tuple[int, dict[str, Any]]:
    """Steps of the run, and the configuration that DeepSpeed gets.

    ``hidden_size`` sets the sizes of ZeRO-3's "auto" buckets. Raises ValueError for a batch that
    the ranks can't share equally, or a DeepSpeed JSON that contradicts the run, and for
    torch_compile with ZeRO-3.
    """
    where = config.deepspeed or "the run"
    steps = config.train.steps(samples)
    deepspeed = complete(
        read_deepspeed_json(config.deepspeed),
        config.train,
        config.optim,
        world=world,
        hidden_size=hidden_size,
        output_dir=config.output_dir,
        where=where,
    )
    if unresolved := sorted(name for name, value in flat(deepspeed) if value == "auto"):
        raise ValueError(f'{where}: cannot resolve "auto" of {", ".join(unresolved)}; set a value')
    if config.train.torch_compile and zero_stage(deepspeed) == 3:  # whose hooks split every block
        raise ValueError(
            f"{where}: --torch-compile does not work with ZeRO-3; use scripts/zero2.json"
        )
    check_deepspeed(deepspeed, where)
    return steps, deepspeed


def find_cache(
    source: SourceConfig, teacher: TeacherIdentity | None = None, *, of_clip: bool = False
) -> str:
    """The only ``embeddings-*`` folder of an LLM, or of a CLIP's text tower, next to the data.

    ``teacher``: for the message, if it is known. Raises FileNotFoundError if there is none,
    ValueError if there are several.
    """
    folder = data_folder(source.path)
    caches = []
    for path in sorted(folder.glob(f"embeddings-*/{CacheManifest.FILE}")):
        if (CacheManifest.read(path).teacher.get("pooling") == PROJECTED) is of_clip:
            caches.append(str(path.parent))
    option = "--clip-cache" if of_clip else "--cache"
    kind = "of a CLIP's text features" if of_clip else "of an LLM"
    if not caches:
        create = embed_command(source.path, None if of_clip else teacher)
        raise FileNotFoundError(
            f"no embedding cache {kind} (embeddings-*) in {folder}; create it: {create}"
        )
    if len(caches) > 1:
        raise ValueError(
            f"{folder} contains the caches {', '.join(caches)} {kind}; choose one with {option}"
        )
    return caches[0]


def open_caches(
    sources: list[Source],
    paths: tuple[str, ...],
    teacher: TeacherIdentity | None = None,
    *,
    of_clip: bool = False,
) -> list[EmbeddingCache]:
    """The cache of each source, all of one teacher (that of the first, unless it is given), checked
    against them."""
    caches: list[EmbeddingCache] = []
    for source, path in zip(sources, paths or ("",) * len(sources), strict=True):
        folder = path or find_cache(source.config, teacher, of_clip=of_clip)
        fingerprint = teacher.fingerprint if teacher else None
        cache = EmbeddingCache.open(folder, expect_fingerprint=fingerprint)
        cache.check(source)
        caches.append(cache)
        teacher = caches[0].teacher
    return caches


def load_plans(config: RunConfig, side: int, width: int, world: int) -> list[LoadPlan]:
    """What loader processes take: for training, and for evaluation or the heads' fit if the run has
    them.

    side: pixels of an image; width: of an embedding; world: ranks.
    """
    rows, micro_batch, _ = config.train.rows(world)
    train = plan_loading(
        rows=rows,
        micro_batch=micro_batch,
        workers=config.train.dataloader_num_workers,
        row_bytes=row_bytes(side, width * config.data.captions_per_image),
        prefetch_mb=config.train.dataloader_prefetch_mb,
    )
    workers = max(config.evaluated.workers or 0, train.workers if config.heads.steps else 0)
    evaluation = plan_evaluation(max(config.evaluation.batch, BLOCK_IMAGES), workers, side, width)
    if config.evaluates or config.heads.steps:
        return [train, evaluation]
    return [train]


def versions() -> dict[str, str]:
    """Versions of the libraries that train, and a digest of this package's files: its version may
    lag behind them."""
    versions_of = {"deepspeed": importlib.metadata.version("deepspeed"), **library_versions()}
    digest = hashlib.sha256()
    folder = Path(llm2clip_plugin.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    versions_of["llm2clip-plugin"] += f" ({digest.hexdigest()[:12]})"
    return versions_of


def before_and_after(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """One line with the scores before training and now: of all captions, or of every part if there
    is no total."""
    names = list(headline(name for name in after if name in before))
    if not names:
        return ""
    if before == after:  # a run without steps
        scores = ", ".join(f"{name} {after[name]:.3f}" for name in names)
        return f"held-out scores: {scores}"
    scores = ", ".join(f"{name} {before[name]:.3f} -> {after[name]:.3f}" for name in names)
    return f"held-out scores, before -> after: {scores}"


# How a --dry-run prints: steps, parameters, memory by GPUs and ZeRO stage.

GIB = 1 << 30
WORLDS = (1, 8, 64)  # numbers of GPUs that a run is planned for
# fraction of a GPU's memory that a plan fills; CUDA and the allocator's gaps have the rest
FILLED = 0.9


def describe_run(
    config: RunConfig | FinetuneConfig,
    deepspeed: dict[str, Any],
    trained: list[Trained],
    samples: int,
    world: int,
) -> str:
    """Steps, ranks, schedule, precision, and how many parameters train at which peak learning
    rates."""
    train = config.train
    optim = config.optim
    steps = train.steps(samples)
    _, micro_batch, accumulation = train.rows(world)
    epochs = steps * train.global_batch / samples
    sizes = [item.parameter.numel() for item in trained]
    decayed = sum(item.parameter.numel() for item in trained if item.decay)
    rates = sorted({item.lr for item in trained})
    peaks = f"{rates[0]:.3g}"
    if len(rates) > 1:
        peaks = f"{rates[0]:.3g} to {rates[-1]:.3g} ({len(rates)} rates)"
    zero = deepspeed["zero_optimization"]
    overlaps = zero["stage"] == 1 and zero.get("overlap_comm") and accumulation == 1
    reduced_in = deepspeed.get("communication_data_type", train.precision)
    sent = ""
    if zero["stage"] == 2 or overlaps:
        buckets = filled_buckets(sizes, zero["reduce_bucket_size"])
        sent = f", sent about {buckets} times during the backward pass"
    lines = [
        f"steps: {steps} of {train.global_batch} pairs, {epochs:.2f} epochs of {samples:,} samples",
        f"ranks: {world} x {accumulation} micro-batches of {micro_batch}",
        f"schedule: {optim.schedule}, {optim.warmup(steps)} steps of warm-up, "
        f"gradient clipping {optim.max_grad_norm:g}",
        f"precision: {train.precision}, gradients reduced in {reduced_in}{sent}; "
        f"ZeRO-{zero_stage(deepspeed)}",
        f"trainable parameters: {sum(sizes):,}; weight decay {optim.weight_decay:g} "
        f"on {decayed:,}, none on {sum(sizes) - decayed:,}; peak learning rates {peaks}",
    ]
    return "\n".join(lines)


def filled_buckets(sizes: Sequence[int], elements: float) -> int:
    """How often a bucket of so many elements is sent because the next parameter's gradient does not
    fit; ``sizes`` in the order of the forward pass. The last bucket is sent after the backward
    pass."""
    count = filled = 0
    for size in reversed(sizes):
        if filled + size > elements:
            count = count + 1
            filled = 0
        filled += size
    return count


def rank_gib(
    memory: StepMemory, zero: dict[str, Any], train: TrainConfig, world: int, micro_batch: int
) -> float:
    """Expected memory of a rank, in GiB."""
    parts = rank_bytes(
        memory, zero, world=world, global_batch=train.global_batch, micro_batch=micro_batch
    )
    return sum(parts.values()) / GIB


def fits(
    memory: StepMemory, deepspeed: dict[str, Any], train: TrainConfig, *, world: int, gib: float
) -> bool:
    """Whether a rank's memory holds what a step needs."""
    micro_batch = train.rows(world)[1]
    return (
        rank_gib(memory, deepspeed["zero_optimization"], train, world, micro_batch) <= FILLED * gib
    )


def describe_memory(
    memory: StepMemory,
    train: TrainConfig,
    gpu_gib: float,
    *,
    about: str = "",
    stages: Sequence[int] = (0, 1, 2, 3),
    kept: StepMemory | None = None,
) -> str:
    """A table of GPUs by ZeRO stage, with scripts/zeroN.json: the run's micro-batch (0: the largest
    that fits under ZeRO-1) and a GPU's memory. ``kept``: what a step needs without gradient
    checkpointing, which is on where this does not fit."""

    def total(memory: StepMemory, stage: int, world: int, micro_batch: int) -> float:
        # as it runs, see train.optim
        stage = 1 if stage == 0 and memory.precision != "fp32" else stage
        return rank_gib(memory, {"stage": stage, **REDUCTION}, train, world, micro_batch)

    def micro_batches(world: int) -> list[int]:
        """That divide a rank's batch, the largest first; the run's alone if it names one."""
        local, rest = divmod(train.global_batch, world)
        if rest:
            return []
        sizes = [size for size in range(local, 0, -1) if local % size == 0]
        if train.micro_batch:
            return [size for size in sizes if size == min(train.micro_batch, local)]
        return [size for size in sizes if total(memory, 1, world, size) <= FILLED * gpu_gib]

    head = "  GPUs   local  micro-batch" + "".join(f"   ZeRO-{stage}" for stage in stages)
    if kept:
        head += "  checkpointing"
    lines = [f"expected memory per GPU in GiB{about}:", head]
    for world in WORLDS:
        sizes = micro_batches(world)
        if not sizes:
            lines.append(
                f"{world:6}   no micro-batch fits into {gpu_gib:g} GiB "
                f"or divides the global batch {train.global_batch}"
            )
            continue
        size = sizes[0]
        without = kept is not None and total(kept, 1, world, size) <= FILLED * gpu_gib
        used = kept if kept is not None and without else memory
        line = f"{world:6} {train.global_batch // world:7} {size:12}"
        for stage in stages:
            line += f"{total(used, stage, world, size):9.1f}"
        if kept is not None:
            line += f"{'off' if without else 'on':>15}"
        lines.append(line)
    return "\n".join(lines)
