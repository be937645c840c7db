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
from llm2clip_plugin.contracts import RunRecord
from llm2clip_plugin.errors import StoppedError
from llm2clip_plugin.metrics import read_metrics
from llm2clip_plugin.progress import each_in_phase, phase
from llm2clip_plugin.run_folder import METRICS, headline
from llm2clip_plugin.signals import StopRequest, loaded
from llm2clip_plugin.stages.llm_config import FinetuneConfig
from llm2clip_plugin.stages.resume import (
    flat,
    refuse_changes,
    same_on_all_hosts,
    within,
)
from llm2clip_plugin.stages.tower_config import RunConfig
from llm2clip_plugin.train.averages import WeightAverage
from llm2clip_plugin.train.checkpoint import (
    RESUME_AUTO,
    Checkpoints,
    Loaded,
    TrainState,
    load,
)
from llm2clip_plugin.train.config import OptimConfig, TrainConfig
from llm2clip_plugin.train.distributed import on_first_rank, rank, set_tf32, world_size
from llm2clip_plugin.train.engine import Engine, check_deepspeed, start_ranks
from llm2clip_plugin.train.guard import (
    Watch,
    readable_checkpoint,
    refuse_disagreement,
    shared_folder,
)
from llm2clip_plugin.train.loop import Evaluate, LoopParts, run_loop
from llm2clip_plugin.train.optim import (
    Trained,
    complete,
    parameter_groups,
    read_deepspeed_json,
    zero_stage,
)
from llm2clip_plugin.train.step import Batch, ContrastiveStep
from llm2clip_plugin.vision.export import library_versions

# of run_settings: digests of the captions and pictures that are learned, and of what evaluations
# measure
CAPTIONS = "captions"
PICTURES = "pictures"
MEASURED = "measured"
OTHER_SCORES = (
    "its scores are left out: they are of other held-out data, or measured otherwise"
)
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
    # run_folder.started_by; {}: called from Python
    command: dict[str, Any] = field(default_factory=dict)

    @property
    def shows_pictures(self) -> bool:
        """Whether a monitor of this rank shows pictures."""
        return rank() == 0 and bool({"wandb", "tensorboard"} & self.deepspeed.keys())

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

    def find_checkpoint(self, data: Mapping[str, str]) -> Loaded | None:
        """The checkpoint to resume from, chosen by rank 0; None for a new run. Every rank must call
        this. It is without scores of other held-out data.

        data: digests of data and caches, which all ranks must have in common. Raises ValueError if
        it was saved with other settings or captions, DisagreementError if the ranks don't see the
        same.
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
        facts |= {f"data {name}": digest for name, digest in data.items()}
        settings = same_on_all_hosts(type(self.config), self.run_settings)
        facts |= {
            f"setting {name}": json.dumps(value) for name, value in settings.items()
        }
        facts |= {
            f"DeepSpeed {name}": json.dumps(value)
            for name, value in flat(self.deepspeed)
        }
        facts |= {f"version of {name}": version for name, version in versions().items()}
        refuse_disagreement(facts, ADVICE)
        if path is None:
            return None
        loaded = load(path)
        saved = loaded.state.config
        allowed = list(self.config.allow_changed)
        allowed += not_in_both(saved, self.run_settings, (CAPTIONS, PICTURES))
        if MEASURED in self.run_settings:
            allowed.append(MEASURED)
        refuse_changes(
            type(self.config),
            saved,
            self.run_settings,
            tuple(allowed),
            where=str(path),
        )
        state = dataclasses.replace(
            loaded.state, config=self.run_settings, config_hash=self.config.hash
        )
        measured = self.run_settings.get(MEASURED)
        if state.evaluated or state.before:
            if saved.get(MEASURED, measured) != measured:
                if rank() == 0:
                    print(f"note: {path}: {OTHER_SCORES}", file=sys.stderr)
                state = dataclasses.replace(state, metrics={}, before={}, evaluated=0)
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
        engine = Engine(
            module, groups, self.config.optim, self.deepspeed, keep_frozen=keep_frozen
        )
        for name in variables:  # of this run alone
            del os.environ[name]
        if (started := self.wandb_run()) is not None:
            started.config.update(
                dataclasses.asdict(self.config), allow_val_change=True
            )
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
            step=0,
            samples=0,
            config=self.run_settings,
            config_hash=config_hash,
            seed=seed,
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
        averages: Mapping[str, WeightAverage] | None = None,
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
        if evaluate is not None:
            evaluate = phase("evaluation")(evaluate)
        if before is not None:
            before = phase("evaluation before training")(before)
        state = run_loop(
            LoopParts(
                step=step,
                batches=each_in_phase("data", batches, first_step=state.step + 1),
                engine=engine,
                averages=averages or {},
                checkpoints=self.checkpoints,
                evaluate=evaluate,
                before=before,
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


def open_run(
    config: RunConfig | FinetuneConfig,
    *,
    samples: int,
    hidden_size: int,
    learned_from: Mapping[str, Any],
    teacher: dict[str, Any],
    command: dict[str, Any],
) -> TrainingRun:
    """A run over ``samples`` samples an epoch, with the steps that this makes and DeepSpeed's
    configuration.

    hidden_size: as configure_deepspeed, which raises. learned_from: what a checkpoint records
    in addition to the configuration.
    """
    deepspeed = configure_deepspeed(
        config.deepspeed,
        config.train,
        config.optim,
        output_dir=config.output_dir,
        world=world_size(),
        hidden_size=hidden_size,
    )
    return TrainingRun(
        config=config,
        run_settings={**dataclasses.asdict(config), **learned_from},
        teacher=teacher,
        total_steps=config.train.steps(samples),
        deepspeed=deepspeed,
        command=command,
    )


def not_in_both(
    saved: Mapping[str, Any], now: Mapping[str, Any], facts: Sequence[str]
) -> list[str]:
    """The digests among ``facts`` that the checkpoint or this run doesn't have: an earlier release
    did not record them, or they are of data at a URL."""
    old = dict(flat(dict(saved)))
    new = dict(flat(dict(now)))
    return [
        name
        for name in sorted(old.keys() | new.keys())
        if within(name, facts) and not (old.get(name) and new.get(name))
    ]


@contextmanager
def training_ranks(train: TrainConfig) -> Iterator[torch.device]:
    """This rank's device, inside a block in which the ranks form a group and watch each other; TF32
    as the run sets it."""
    device = start_ranks(train.ddp_timeout)
    if train.precision == "fp16" and device.type == "cpu":
        raise ValueError(
            "--precision fp16 needs a GPU; on a CPU use --precision bf16 or fp32"
        )
    set_tf32(train.tf32, train.precision, device)
    with Watch(train.straggler_seconds):
        yield device


def configure_deepspeed(
    path: str,
    train: TrainConfig,
    optim: OptimConfig,
    *,
    output_dir: str,
    world: int,
    hidden_size: int,
) -> dict[str, Any]:
    """The configuration that DeepSpeed gets: that of the file ``path``, if any, completed.

    ``hidden_size`` sets the sizes of ZeRO-3's "auto" buckets. Raises ValueError for a batch that
    the ranks can't share equally, or a DeepSpeed JSON that contradicts the run, and for
    torch_compile with ZeRO-3.
    """
    where = path or "the run"
    deepspeed = complete(
        read_deepspeed_json(path),
        train,
        optim,
        world=world,
        hidden_size=hidden_size,
        output_dir=output_dir,
        where=where,
    )
    if unresolved := sorted(name for name, value in flat(deepspeed) if value == "auto"):
        raise ValueError(
            f'{where}: cannot resolve "auto" of {", ".join(unresolved)}; set a value'
        )
    # whose hooks split every block
    if train.torch_compile and zero_stage(deepspeed) == 3:
        raise ValueError(
            f"{where}: --torch-compile does not work with ZeRO-3; use scripts/zero2.json"
        )
    check_deepspeed(deepspeed, where)
    return deepspeed


def versions() -> dict[str, str]:
    """Versions of the libraries that train, and a digest of this package's files: its version may
    lag behind them."""
    versions_of = {
        "deepspeed": importlib.metadata.version("deepspeed"),
        **library_versions(),
    }
    digest = hashlib.sha256()
    folder = Path(llm2clip_plugin.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        name = str(path.relative_to(folder))
        digest.update(name.encode() + b"\0" + path.read_bytes())
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
    scores = ", ".join(
        f"{name} {before[name]:.3f} -> {after[name]:.3f}" for name in names
    )
    return f"held-out scores, before -> after: {scores}"
