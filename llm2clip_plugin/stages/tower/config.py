"""RunConfig: everything that decides a tower's training, validated once, hashed, compared on resume.

The settings themselves are declared beside the code that reads them. Standard library only, so that it also
runs in LLaVA's environment.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llm2clip_plugin.contracts import canonical_json, rename_keys, sha256_text
from llm2clip_plugin.data.images import AugmentConfig
from llm2clip_plugin.data.sources.base import ReadConfig, SourceConfig
from llm2clip_plugin.evaluate.measure import RetrievalConfig
from llm2clip_plugin.stages.plan_text import PlanConfig
from llm2clip_plugin.train.heads import HeadsConfig
from llm2clip_plugin.train.loop import TrainConfig
from llm2clip_plugin.train.losses.config import LossConfig
from llm2clip_plugin.train.model import TowerConfig
from llm2clip_plugin.train.optim import OptimConfig
from llm2clip_plugin.vision.dual import DualConfig

Settings = TypeVar("Settings")

# Fields that may differ when a run goes on: they change where, how often and on what machine, not what is learned.
HARMLESS = (
    "output_dir",
    "resume",
    "allow_changed",
    "dry_run",
    "deepspeed",
    "evaluation",
    "plan",
    "tower.architecture",
    "data.cache",
    "data.validation",
    "data.validation_cache",
    "data.read.cache_folder",
    "data.read.cache_gb",
    "loss.block",
    "contrast.length_groups",
    "train.save_steps",
    "train.save_minutes",
    "train.save_total_limit",
    "train.eval_steps",
    "train.logging_steps",
    "train.report_to",
    "train.dataloader_num_workers",
    "train.gradient_checkpointing",
    "train.torch_compile",
)


# Names of earlier releases, in configuration files, run.json and state.json.
RENAMED = {"dual.joint_width": "dual.projection_dim"}
# Settings that checkpoints of earlier releases lack, and the values that they stand for.
ADDED: dict[str, Any] = {"loss.args": [], "optim.name": "adamw", "optim.args": []}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Captioned images, the teacher's embeddings of their captions, and a held-out split."""

    path: tuple[str, ...] = ()  # what to train on: folders of tars, .tar, .jsonl, LLaVA's .json, URLs of these
    cache: tuple[str, ...] = ()  # embedding cache of each path; empty: the one embeddings-* folder beside it
    weight: tuple[float, ...] = ()  # how often a sample of each path comes up, against weight 1; empty: 1
    validation: str = ""  # held-out split for recall during training; "": none
    validation_cache: str = ""  # its embedding cache; "": the one embeddings-* folder beside it
    read: ReadConfig = field(default_factory=ReadConfig)  # how all of them are read
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        for name, values in (("cache", self.cache), ("weight", self.weight)):
            if values and len(values) != len(self.path):
                raise ValueError(
                    f"data.{name} has {len(values)} values for {len(self.path)} paths; give one each, or none"
                )

    @property
    def sources(self) -> list[SourceConfig]:
        """One a path."""
        weights = self.weight or (1.0,) * len(self.path)
        pairs = zip(self.path, weights, strict=True)
        return [SourceConfig(path=path, weight=weight, **vars(self.read)) for path, weight in pairs]

    @property
    def held_out(self) -> SourceConfig | None:
        """The validation split with all its captions: ``evaluation`` says which ones count."""
        if not self.validation:
            return None
        return SourceConfig(path=self.validation, **{**vars(self.read), "kinds": (), "languages": ()})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run of a tower (stage 2)."""

    output_dir: str = "runs/tower"  # checkpoints, metrics.jsonl, run.json and, at the end, tower/
    deepspeed: str = ""  # your DeepSpeed JSON (scripts/zero*.json or LLaVA's own); "": ZeRO-0
    resume: str = "auto"  # auto: this run's newest checkpoint, if any | never | a checkpoint or run folder
    allow_changed: tuple[str, ...] = ()  # fields that may differ from the checkpoint's, as optim.lr or all of optim
    dry_run: bool = False  # print steps, memory, cache size and commands, and stop; needs no weights
    data: DataConfig = field(default_factory=DataConfig)
    tower: TowerConfig = field(default_factory=TowerConfig)
    dual: DualConfig = field(default_factory=DualConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: RetrievalConfig = field(default_factory=RetrievalConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)

    @property
    def hash(self) -> str:
        """SHA-256 over all fields but the harmless ones."""
        return sha256_text(canonical_json(dict(flat_essentials(dataclasses.asdict(self)))))

    def validate(self, *, planned: bool = False) -> RunConfig:
        """Raise ValueError for what no folder can see by itself; returns itself. A run that is ``planned`` alone
        needs no data."""
        if not self.data.path and not planned:
            raise ValueError("no data to train on: say --data.path, or take a recipe that names some")
        self.loss.check(self.dual)
        if self.tower.freeze and self.dual.projection == "none" and self.dual.adapter == "none":
            raise ValueError("tower.freeze with no projection and no adapter leaves nothing to train")
        return self


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of nested dicts; lists count as leaves, tuples as lists."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from flat(item, f"{path}.{name}" if path else name)
    else:
        yield path, _plain(value)


def _plain(value: Any) -> Any:
    """As JSON gives it back, numbers as floats: 4 and 4.0 are one setting."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return {name: _plain(item) for name, item in value.items()} if isinstance(value, dict) else value


def flat_essentials(config: dict[str, Any], allowed: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """The leaves that decide what is learned."""
    skipped = (*HARMLESS, *allowed)
    for name, value in flat(config):
        if not any(name == skip or name.startswith(f"{skip}.") for skip in skipped):
            yield name, value


def refuse_changes(saved: dict[str, Any], now: dict[str, Any], allowed: tuple[str, ...], *, where: str) -> None:
    """Raise ValueError naming every field that decides what is learned and differs from the checkpoint's."""
    saved, allowed = rename_keys(saved, RENAMED), tuple(RENAMED.get(name, name) for name in allowed)
    known = dict(flat(now)) | dict(flat(saved))
    for name in allowed:
        if not any(field_ == name or field_.startswith(f"{name}.") for field_ in known):
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"allow_changed: no field {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    old, new = dict(flat_essentials(saved, allowed)), dict(flat_essentials(now, allowed))
    old = {name: value for name, value in ADDED.items() if name in new} | old
    changed = [
        f"{name}: {old.get(name, 'absent')!r} there, {new.get(name, 'absent')!r} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, "absent") != new.get(name, "absent")
    ]
    if changed:
        names = " ".join(line.split(":", 1)[0] for line in changed)
        raise ValueError(
            f"the run in {where} was started with other settings:\n  "
            + "\n  ".join(changed)
            + f"\nset them back, choose another --output_dir, or go on all the same with --allow-changed {names}"
        )


def from_plain(cls: type[Settings], body: dict[str, Any], *, where: str, path: str = "") -> Settings:
    """A settings dataclass from parsed JSON. Raises ValueError for an unknown field (with the nearest known ones) and
    for a value of another type."""
    hints = typing.get_type_hints(cls)
    known = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if not isinstance(body, dict):
        raise ValueError(f"{where}: {path or 'the file'} is {body!r}, expected an object with fields of {known}")
    body = body if path else rename_keys(body, RENAMED)
    for name in body:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{where}: unknown option {f'{path}.{name}'.lstrip('.')!r}; {hint}")
    values = {
        name: _typed(hints[name], value, where=where, path=f"{path}.{name}".lstrip(".")) for name, value in body.items()
    }
    return cls(**values)


def _typed(hint: Any, value: Any, *, where: str, path: str) -> Any:
    """``value`` as ``hint`` asks, JSON's lists as tuples."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value, where=where, path=path)
    if origin is tuple and isinstance(value, (list, tuple)):
        if arguments[-1] is not Ellipsis and len(arguments) != len(value):
            raise ValueError(f"{where}: {path} has {len(value)} values, expected {len(arguments)}")
        hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(
            _typed(h, item, where=where, path=f"{path}.{i}")
            for i, (h, item) in enumerate(zip(hints, value, strict=True))
        )
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _typed(arguments[0], value, where=where, path=path)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{where}: {path} is {value!r}; known: {', '.join(map(str, arguments))}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(hint, type) or not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where}: {path} is {value!r}, expected {hint}")
    return value
