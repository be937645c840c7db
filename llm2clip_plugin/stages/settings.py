"""Settings as dataclasses and as JSON: read with their types checked, flattened, and compared with a checkpoint's.

Standard library only.
"""

import dataclasses
import os
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from llm2clip_plugin.options import Command, Names, joined, nearest

Settings = TypeVar("Settings")

# Fields that may differ when a run resumes: they change where, how often and on what hardware it runs, not what it
# learns.
IGNORED_ON_RESUME = (
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
    "data.clip_cache",
    "data.validation_clip_cache",
    "data.read.cache_folder",
    "data.read.cache_gb",
    "loss.block",
    "contrast.length_groups",
    "train.save_steps",
    "train.save_minutes",
    "train.save_total_limit",
    "train.save_fallback_dir",
    "train.eval_steps",
    "train.eval_on_start",
    "train.logging_steps",
    "train.report_to",
    "train.profile_steps",
    "train.profile_all_ranks",
    "train.dataloader_num_workers",
    "train.dataloader_prefetch_mb",
    "train.tf32",
    "train.full_determinism",
    "train.skip_bad_batches",
    "train.communication_data_type",
    "train.ddp_timeout",
    "train.straggler_seconds",
    "train.gradient_checkpointing",
    "train.torch_compile",
)

# Initial values, which a resumed run takes from its checkpoint; they decide what is learned nevertheless.
INITIAL = ("dual.logit_scale_init", "dual.projection_init_std")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What the configurations of both training stages share."""

    output_dir: str = "runs/run"  # checkpoints, metrics.jsonl, run.json and, at the end, what was trained
    deepspeed: str = ""  # DeepSpeed JSON (scripts/zero*.json, or LLaVA's own); "": ZeRO-1, with fp32 ZeRO-0
    resume: str = "auto"  # auto: this run's newest checkpoint, if any | never | a checkpoint or run folder
    allow_changed: tuple[str, ...] = ()  # fields that may differ from the checkpoint's, e.g. optim.lr or all of optim
    dry_run: bool = False  # print steps, memory and commands, then exit; needs no weights


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of nested dicts; a list is a leaf, and a tuple becomes a list."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from flat(item, f"{path}.{name}" if path else name)
    else:
        yield path, _plain(value)


def _plain(value: Any) -> Any:
    """As JSON returns it, numbers as floats: 4 and 4.0 are the same setting."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return {name: _plain(item) for name, item in value.items()} if isinstance(value, dict) else value


def flat_essentials(config: dict[str, Any], allowed: tuple[str, ...] = ()) -> dict[str, Any]:
    """The leaves that decide what is learned, without the ``allowed`` ones."""
    skipped = (*IGNORED_ON_RESUME, *allowed)
    return {
        name: value
        for name, value in flat(config)
        if not any(name == skip or name.startswith(f"{skip}.") for skip in skipped)
    }


def refuse_changes(saved: dict[str, Any], now: dict[str, Any], allowed: tuple[str, ...], *, where: str) -> None:
    """Raise ValueError naming every field that decides what is learned and differs from the checkpoint's."""
    known = {name for settings in (now, saved) for name, _ in flat(settings)}
    for name in allowed:
        if not any(path == name or path.startswith(f"{name}.") for path in known):
            raise ValueError(f"unknown field {name!r} in --allow-changed{nearest(name, sorted(known))}")
    old, new = (flat_essentials(settings, (*allowed, *INITIAL)) for settings in (saved, now))
    changed = {
        name: f"{old.get(name, 'absent')!r} in the checkpoint, {new.get(name, 'absent')!r} in this run"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, "absent") != new.get(name, "absent")
    }
    if changed:
        listed = "\n  ".join(f"{name}: {values}" for name, values in changed.items())
        raise ValueError(
            f"{where} was saved with other settings:\n  {listed}\n"
            f"restore them, choose another --output, or accept the changes with --allow-changed {' '.join(changed)}"
        )


def from_plain(cls: type[Settings], body: Any, *, where: str, path: str = "") -> Settings:
    """A settings dataclass from parsed JSON.

    Raises ValueError for an unknown field (with the nearest known name) and for a value of another type.
    """
    hints = typing.get_type_hints(cls)
    known = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if not isinstance(body, dict):
        raise ValueError(f"{where}: {path or 'the file'} is {body!r}; expected an object with the fields {known}")
    for name in body:
        if name not in known:
            unknown = f"{where}: unknown option {f'{path}.{name}'.lstrip('.')!r}{nearest(name, known)}"
            raise ValueError(joined(unknown, f"known: {', '.join(known)}"))
    return cls(
        **{
            name: _typed(hints[name], value, where=where, path=f"{path}.{name}".lstrip("."))
            for name, value in body.items()
        }
    )


def _typed(hint: Any, value: Any, *, where: str, path: str) -> Any:
    """``value`` checked against a type annotation, JSON's lists as tuples."""
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
        raise ValueError(f"{where}: {path} is {value!r}; expected {hint}")
    return value


# Options given on the command line: they win over what a recipe sets instead, and one without an effect is an error.

# An option that is given alone -> the setting that would take its place; that one is set to 0.
REPLACES = {
    "train.num_train_epochs": "train.max_steps",
    "optim.warmup_ratio": "optim.warmup_steps",
    "optim.warmup_steps": "optim.warmup_ratio",
}


@dataclass(frozen=True)
class Unused(Generic[Settings]):
    """Options that have no effect in some configurations."""

    options: tuple[str, ...]  # fields or sections, by dotted names
    why: Callable[[Settings], str]  # what makes them so in this configuration; "" if they have an effect
    except_for: tuple[str, ...] = ()  # fields of these sections that have one
    off: Any = None  # a value that asks for nothing, as 0, False, "" and () do


def value_of(config: Any, name: str) -> Any:
    """The value of a dotted name."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def make_room(default: Settings, given: Collection[str]) -> Settings:
    """``default`` without the settings that would take the place of a given option."""
    for option, replaced in REPLACES.items():
        if option in given and replaced not in given:
            default = _with(default, replaced.split("."), 0)
    return default


def _with(config: Any, path: list[str], value: Any) -> Any:
    inner = value if len(path) == 1 else _with(getattr(config, path[0]), path[1:], value)
    return dataclasses.replace(config, **{path[0]: type(getattr(config, path[0]))(inner) if len(path) == 1 else inner})


def refuse_unused(config: Settings, given: Collection[str], rules: Iterable[Unused[Settings]], names: Names) -> None:
    """Raise ValueError that names every given option without an effect, and the setting that makes it so."""
    problems = []
    for rule in rules:
        if why := rule.why(config):
            for name in sorted(given):
                value = value_of(config, name)
                affected = any(name == option or name.startswith(f"{option}.") for option in rule.options)
                if affected and name not in rule.except_for and value and value != rule.off:
                    problems.append(f"{names.flag(name)} {value} has no effect: {why}")
    if problems:
        raise ValueError("\n  ".join(problems) + ("\nremove these options" if len(problems) > 1 else "; remove it"))


def _both_lengths(config: Any) -> str:
    steps = config.train.max_steps
    return f"max_steps {steps} decides the length" if steps > 0 else ""


def unused_in_training(given: Collection[str]) -> list[Unused[Any]]:
    """What both training stages have in common."""
    rules: list[Unused[Any]] = [
        Unused(
            ("optim.min_lr_ratio",),
            lambda c: (
                "optim.schedule constant never lowers the learning rate" if c.optim.schedule == "constant" else ""
            ),
        ),
        Unused(("train.profile_all_ranks",), lambda c: "" if c.train.profile_steps else "train.profile_steps is 0"),
        Unused(("plan",), lambda c: "" if c.dry_run else "it is an assumption of --dry-run"),
        Unused(
            ("allow_changed",), lambda c: "with --resume never, no checkpoint is read" if c.resume == "never" else ""
        ),
    ]
    if "train.max_steps" in given:
        rules.append(Unused(("train.num_train_epochs",), _both_lengths))
    return rules


# What the stages' command lines share: settings over a recipe, and the launcher's variables.


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks, from the launcher's environment; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def plan_or_train(dry_run: bool, plan: Callable[[], str], train: Callable[[], Path], result: str) -> int:
    """Print the plan, or train and print where the result is, in both cases on rank 0; returns exit status 0.

    ``result``: what to print, with {} for the path.
    """
    first_rank = rank_and_world()[0] == 0
    if dry_run:
        if first_rank:
            print(plan(), flush=True)
        return 0
    path = train()
    if first_rank:
        print(result.format(path))
    return 0


def read_settings(
    command: Command[Settings],
    argv: Sequence[str],
    default: Callable[[dict[str, str]], Settings],
    unused: Sequence[Unused[Settings]],
) -> Settings:
    """The settings of a training stage's command line.

    default: what the options override, from the words of the extra options (--recipe ...); unused: which options have
    no effect, and when. Raises ValueError for an unknown option and for one without an effect.
    """
    words = command.read(argv)
    given = words.values
    config = command.build(words, make_room(default(words.extras), given))
    refuse_unused(config, given, [*unused_in_training(given), *unused], command.names)
    return config


# What a dry run assumes; read without torch.


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What --dry-run assumes while there is no data."""

    images: int = 15_000_000  # captioned images; the size of the paper's smaller set
    gpu_gib: float = 80.0  # a GPU's memory in GiB: the plan has the largest micro-batches that fit

    def __post_init__(self) -> None:
        if self.images < 1 or self.gpu_gib <= 0:
            raise ValueError(f"plan.images {self.images} and gpu_gib {self.gpu_gib} must both be above 0")


# What the paper (LLM2CLIP, arXiv 2411.04997) trained with: its LLMs and its data, for recipes and plans.


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """An LLM of the paper, before and after stage 1."""

    base: str  # Hub id of the LLM that stage 1 starts from
    released: str  # Hub id of the LLM that the authors fine-tuned
    preset: str  # how the released one reads a caption (llm2clip embed --preset)
    width: int  # of an embedding, and so of a cache


TEACHERS = {
    "llama-1b": Teacher(
        base="meta-llama/Llama-3.2-1B-Instruct",
        released="microsoft/LLM2CLIP-Llama-3.2-1B-Instruct-CC-Finetuned",
        preset="llm2clip-llama3",
        width=2048,
    ),
    "llama-8b": Teacher(
        base="meta-llama/Meta-Llama-3-8B-Instruct",
        released="microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned",
        preset="llm2clip-llama3",
        width=4096,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Data sets with their nominal sizes (part of the links is dead by now); every sample is drawn equally often."""

    sets: tuple[tuple[str, float], ...]  # name, samples in millions
    captions: str  # which captions of a sample are used

    def __str__(self) -> str:
        listed = " + ".join(f"{name} ({size:g} M)" for name, size in self.sets)
        return f"{sum(size for _, size in self.sets):g} M = {listed}; {self.captions}"


LLM_MIXTURE = Mixture(
    sets=(("CC3M", 3), ("CC12M", 12), ("YFCC15M", 15), ("E5's text pairs", 1.5)),
    captions="a pair is two captions of an image (DreamLIP's) or a text pair, every batch from one source",
)
# shortSV and longSV, both of DreamLIP's (ShareGPT4V's model): data/extract_embedding.py:12, training/data.py:611-617
_SHORT_AND_LONG = "an MLLM's short caption or its long one (DreamLIP's shortSV and longSV), drawn evenly"
TOWER_MIXTURES = (
    Mixture(sets=(("CC3M", 3), ("CC12M", 12)), captions=_SHORT_AND_LONG),
    Mixture(
        sets=(("CC3M", 3), ("CC12M", 12), ("YFCC15M", 15), ("a part of Recap-DataComp-1B", 30)),
        captions=_SHORT_AND_LONG,
    ),
)
