"""The vision towers that LLaVA can be given: what a name means, which are registered, which one a
checkpoint has.

| name                        | tower                                                     |
|-----------------------------|-----------------------------------------------------------|
| ``llm2clip``                | ``LLM2CLIP_TOWER`` if set, else the ``llm2clip use`` tower |
| ``llm2clip:PATH``           | a tower directory                                         |
| ``llm2clip:NAME``           | a name listed by ``llm2clip towers``                      |
| ``llm2clip:ORG/NAME[@REV]`` | a tower directory on the Hugging Face Hub                 |
| ``PATH``                    | a tower directory, recorded as ``llm2clip:PATH``          |

LLaVA records only the name, which can come to mean another tower: a checkpoint's config.json also
records the hash, and only that tower is loaded. The registry is ``towers.json`` in
``$LLM2CLIP_HOME``, else in ``~/.config/llm2clip``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from llava_integration.plug.checkpoints import (
    CONFIG,
    HUB_ID,
    checkpoint_config,
    config_of,
)
from llm2clip_plugin.atomic import atomic_directory, write_text
from llm2clip_plugin.contracts import TowerCard, VersionedRecord
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.hub import hub_snapshot
from llm2clip_plugin.options import Command, NoOptions, command, setting
from llm2clip_plugin.vision.directory import check_card

NAME = "llm2clip"
KEY = "llm2clip_tower"  # in a checkpoint's config.json, or in RECORD where it has none
RECORD = "llm2clip_tower.json"
BUNDLE = "vision_tower"  # folder of a checkpoint with a copy of its tower
HUB_FILES = ["*.json", "*.safetensors", "README.md"]  # of a tower directory
BUNDLED_FILES = (*HUB_FILES, "*.py")
LOCK_SECONDS = 10.0  # that a `llm2clip use` waits for others


class TowerNotFoundError(FileNotFoundError):
    """No tower under a name; the message lists where it was searched for and what to do."""


@dataclass(frozen=True, kw_only=True)
class TowerLocation:
    """A tower directory on this machine."""

    directory: Path
    card: TowerCard
    # where another machine would look: absolute path, or Hub id with revision
    origin: str
    how: str  # how the tower was named, for messages: "LLM2CLIP_TOWER=...", "bundled in ..."

    @classmethod
    def of(cls, directory: Path, *, how: str, origin: str = "") -> TowerLocation:
        """Read the card of ``directory``, ContractError without one; ``origin`` defaults to its
        absolute path."""
        if not (directory / TowerCard.FILE).is_file():
            import_it = command("import", directory, "--output", "DIR")
            raise ContractError(
                f"{how}: {directory} is not a tower directory (no {TowerCard.FILE}); "
                f"create one with `llm2clip export RUN` or `{import_it}`"
            )
        card = TowerCard.read(directory / TowerCard.FILE)
        return cls(
            directory=directory,
            card=card,
            origin=origin or str(directory.resolve()),
            how=how,
        )

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights, from the card."""
        return self.card.weights_sha256

    def check_weights(self) -> None:
        """Compare the tower's files with their hashes; raises ContractError with both if one was
        changed."""
        check_card(self.directory, adapter=False)

    def describe(self) -> str:
        """One line: origin, hash, family, width, blocks, patches."""
        card = self.card
        grid = card.image_size // card.patch_size
        return (
            f"{self.origin}, sha256 {card.weights_sha256[:12]}, {card.family}, "
            f"width {card.hidden_size}, {card.num_layers} blocks, {card.image_size} px, "
            f"{grid} x {grid} = {card.num_patches} patches"
        )


Source = tuple[str, Callable[[], TowerLocation]]  # where a tower may be, and its search


# The registry


@dataclass(frozen=True, kw_only=True)
class Registry(VersionedRecord):
    """The contents of ``towers.json``: the towers that the user registered by name, and the
    selected one."""

    KIND: ClassVar[str] = "llm2clip-towers"
    FILE: ClassVar[str] = "towers.json"

    chosen: str = ""  # key of towers; "" before the first `llm2clip use`
    # name -> {"spec", "weights_sha256"}
    towers: dict[str, dict[str, str]] = field(default_factory=dict)

    def check_values(self, *, where: str) -> None:
        """Raise ContractError for an entry without its fields, names that lead to each other, an
        unknown selection."""
        advice = "correct the file, or delete it and run `llm2clip use TOWER` again"
        for name, entry in self.towers.items():
            if {*entry} != {"spec", "weights_sha256"} or not entry["spec"].strip():
                raise ContractError(
                    f"{where}: towers.{name} has {sorted(entry)}, "
                    f"expected a spec (path or Hub id) and weights_sha256; {advice}"
                )
            if self.leads_back(name):
                raise ContractError(
                    f"{where}: towers.{name} leads back to itself; {advice}"
                )
        if self.chosen and self.chosen not in self.towers:
            names = ", ".join(sorted(self.towers)) or "none"
            raise ContractError(
                f"{where}: chosen is {self.chosen!r}, which is not one of its towers ({names}); "
                f"{advice}"
            )

    def leads_back(self, name: str) -> bool:
        """Whether a tower's spec is a name that leads to a name ... that came before; a name may be
        its own spec."""
        seen = {name}
        spec = self.towers[name]["spec"]
        while spec in self.towers and spec != self.towers[spec].get("spec"):
            if spec in seen:
                return True
            seen.add(spec)
            spec = self.towers[spec].get("spec", "")
        return False

    def summary(self) -> str:
        """The registered towers in one line, for error messages."""
        if not self.towers:
            return f"no towers are registered in {registry_file()}"
        listed = []
        for name, entry in sorted(self.towers.items()):
            listed.append(f"{name} ({entry['spec']})")
        return f"registered towers: {', '.join(listed)}"


def registry_file() -> Path:
    """Path of the registry; the file need not exist."""
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    home = os.environ.get("LLM2CLIP_HOME") or f"{config}/llm2clip"
    return Path(home).expanduser() / Registry.FILE


def registry() -> Registry:
    """The registry, empty if there is no file. Raises ContractError for a damaged file."""
    path = registry_file()
    return Registry.read(path) if path.is_file() else Registry()


@contextmanager
def registry_lock() -> Iterator[None]:
    """Held by one `llm2clip use` at a time, so that none overwrites what another registers; where
    the file system has no locks, nobody waits longer than LOCK_SECONDS."""
    from filelock import FileLock

    path = registry_file()
    lock = FileLock(f"{path}.lock")
    # its Timeout, also of old versions where there are no locks, is an OSError
    with suppress(OSError, NotImplementedError):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_SECONDS)
    try:
        yield
    finally:
        lock.release()


def select(spec: str, weights_sha256: str, *, name: str = "") -> str:
    """Register a tower (``spec``: absolute path or Hub id), select it and return its name. Without
    ``name`` it keeps the one that it has, or gets the last part of ``spec``, with a number if that
    is taken."""
    entry = {"spec": spec, "weights_sha256": weights_sha256}
    registry()  # a damaged file is refused before anything is written
    with registry_lock():
        registered = registry()
        name = name or registered_name(registered, entry) or free_name(registered, spec)
        towers = {**registered.towers, name: entry}
        replace(registered, chosen=name, towers=towers).write(registry_file())
    return name


def registered_name(registered: Registry, tower: dict[str, str]) -> str:
    """The first name of a tower, else of another one that was at its place, "" if it has none."""
    at_its_place = ""
    for name, entry in registered.towers.items():
        if entry == tower:
            return name
        if entry["spec"] == tower["spec"]:
            at_its_place = at_its_place or name
    return at_its_place


def free_name(registered: Registry, spec: str) -> str:
    """The last part of ``spec``, with a number if another tower has that name."""
    stem = spec.partition("@")[0].rstrip("/").rpartition("/")[2]
    name = stem
    number = 1
    while name in registered.towers:
        number += 1
        name = f"{stem}-{number}"
    return name


# What a name means


def is_ours(name: object) -> bool:
    """Whether ``--vision_tower name`` is a tower of this package: ``llm2clip``, ``llm2clip:...`` or
    a tower directory. Never matches a substring: ``my-llm2clip`` is left to LLaVA."""
    if not isinstance(name, str):
        return False
    return (
        name == NAME
        or name.startswith(f"{NAME}:")
        or os.path.isfile(os.path.join(name, TowerCard.FILE))
    )


def prefixed(name: str) -> str:
    """A name that `is_ours` with the prefix: ``llm2clip:PATH`` for a plain path, which becomes an
    absolute one, as ``owner/name`` might be a Hub id elsewhere."""
    if name == NAME or name.startswith(f"{NAME}:"):
        return name
    return f"{NAME}:{os.path.abspath(os.path.expanduser(name))}"


def locate(name: str) -> TowerLocation:
    """The tower that ``name`` (see the table above) means now. Raises TowerNotFoundError if there
    is none, ContractError if what it names is not a tower directory."""
    if name.startswith(f"{NAME}:"):
        return locate_spec(name[len(NAME) + 1 :], how=f"--vision_tower {name}")
    if name != NAME:
        return TowerLocation.of(Path(name), how=f"--vision_tower {name}")
    if spec := os.environ.get("LLM2CLIP_TOWER"):
        return locate_spec(spec, how=f"LLM2CLIP_TOWER={spec}")
    registered = registry()
    if registered.chosen:
        return locate_registered(
            registered, registered.chosen, how=f"`llm2clip use {registered.chosen}`"
        )
    raise TowerNotFoundError(
        f"--vision_tower {NAME}: no tower is selected; run `llm2clip use TOWER`, "
        f"set LLM2CLIP_TOWER=TOWER, or pass --vision_tower {NAME}:TOWER (path or Hub id); "
        f"{registered.summary()}"
    )


def locate_spec(spec: str, *, how: str) -> TowerLocation:
    """The tower of a path, a registered name or a Hub id, tried in this order."""
    path = Path(spec).expanduser()
    if spec.strip() and path.is_dir():
        return TowerLocation.of(path, how=how)
    registered = registry()
    if spec in registered.towers:
        if registered.towers[spec]["spec"] != spec:
            how = f"{how} (registered as {spec!r})"
            return locate_registered(registered, spec, how=how)
    if HUB_ID.match(spec):
        directory = download(spec, HUB_FILES)
        return TowerLocation.of(directory, how=how, origin=spec)
    raise TowerNotFoundError(
        f"{how}: {spec!r} is not a directory, a registered name or a Hub id; {registered.summary()}"
    )


def locate_registered(registered: Registry, name: str, *, how: str) -> TowerLocation:
    """The tower that was registered under a name. Raises as ``locate_spec``, and ContractError with
    both hashes if another one is at its place by now."""
    entry = registered.towers[name]
    location = locate_spec(entry["spec"], how=how)
    if location.sha256 != entry["weights_sha256"]:
        use_it = command("use", entry["spec"], "--name", name)
        raise ContractError(
            f"{how}: the tower at {entry['spec']} has sha256 {location.sha256}, but the one that "
            f"was registered as {name!r} had {entry['weights_sha256']}; run `{use_it}` to take "
            "what is there now"
        )
    return location


def download(repository: str, patterns: list[str]) -> Path:
    """Files of a Hub repository, ``owner/name[@revision]``; raises TowerNotFoundError."""
    try:
        return hub_snapshot(repository, patterns=patterns)
    except (OSError, ValueError) as error:
        # the client's errors for network, cache, permissions and names
        first_line = str(error).strip().partition("\n")[0]
        reason = f"{type(error).__name__}: {first_line}"
        raise TowerNotFoundError(
            f"no directory {repository!r}, and downloading it from the Hub failed ({reason}); "
            f"download it elsewhere and pass {NAME}:PATH; {registry().summary()}"
        ) from error


# Which tower a checkpoint was trained with

# The path or Hub id given to load_pretrained_model. A LoRA or projector checkpoint needs it: the
# configuration that reaches the tower has the base model's path.
checkpoint_being_loaded: ContextVar[str] = ContextVar(
    "checkpoint_being_loaded", default=""
)


@contextmanager
def loading(checkpoint: str) -> Iterator[None]:
    """Also search the ``vision_tower`` folder of ``checkpoint`` within the block."""
    token = checkpoint_being_loaded.set(str(checkpoint))
    try:
        yield
    finally:
        checkpoint_being_loaded.reset(token)


def checkpoint_of(config: Any) -> str:
    """Path or Hub id of the checkpoint that is being loaded; "" for a new model."""
    return checkpoint_being_loaded.get() or getattr(config, "_name_or_path", "")


def tower_record(
    location: TowerLocation, name: str, hidden_size: int
) -> dict[str, Any]:
    """What config.json records of the tower, under KEY; ``name`` is LLaVA's ``--vision_tower``."""
    return {
        "weights_sha256": location.sha256,
        "origin": location.origin,
        "name": name,
        "family": location.card.family,
        "image_size": location.card.image_size,
        "mm_hidden_size": hidden_size,
    }


def find_tower(name: str, config: Any) -> TowerLocation:
    """The tower of a model, by the hash in ``config`` (LLaVA's configuration or model arguments),
    else by ``name``.

    Searches the name, the checkpoint's ``vision_tower`` folder, the recorded origin,
    ``LLM2CLIP_TOWER`` and the registry, in this order. Raises ContractError with both hashes if
    only other towers are found, TowerNotFoundError if none is.
    """
    record = getattr(config, KEY, None)
    checkpoint = checkpoint_of(config)
    if not record:
        return find_unrecorded(name, checkpoint)
    about_checkpoint = f"config.json of {checkpoint or 'the checkpoint'}"
    with errors_about(f"{KEY} in {about_checkpoint}", fix="copy the checkpoint again"):
        wanted = str(record["weights_sha256"])
        origin = str(record["origin"])
    searched: list[str] = []
    problem: type[Exception] = TowerNotFoundError
    for where, find in sources_of(name, checkpoint, origin, wanted):
        try:
            location = find()
        except (FileNotFoundError, ContractError) as error:
            searched.append(f"\n  - {where}: {error}")
            continue
        if location.sha256 == wanted:
            if searched:
                source = f"{location.directory} ({where})"
                print(f"llm2clip: loading the vision tower {name!r} from {source}")
            return location
        problem = ContractError  # another tower is not loaded in its place
        searched.append(
            f"\n  - {where}: {location.directory} has sha256 {location.sha256}"
        )
    about = f"origin {origin}, {record.get('family')}, {record.get('image_size')} px"
    bundle_it = command("llava", "bundle", checkpoint or "the checkpoint")
    raise problem(
        f"{checkpoint or 'the checkpoint'} was trained with the tower sha256 {wanted} ({about}); "
        f"refusing to load a different tower. Searched:{''.join(searched)}\n"
        "Copy that tower to this machine and run `llm2clip use PATH` or set LLM2CLIP_TOWER=PATH, "
        f"or run `{bundle_it}` where the tower still exists "
        "and copy the checkpoint again"
    )


def find_unrecorded(name: str, checkpoint: str) -> TowerLocation:
    """The tower of a name, of which no hash is known; else the one that is bundled in the
    checkpoint."""
    try:
        return locate(name)
    except FileNotFoundError:
        checkpoint = checkpoint or "the checkpoint"
        directory = Path(checkpoint) / BUNDLE
        if not (directory / TowerCard.FILE).is_file():
            raise
        return TowerLocation.of(directory, how=f"bundled in {checkpoint}")


def sources_of(name: str, checkpoint: str, origin: str, wanted: str) -> list[Source]:
    """Where a checkpoint's tower may be, in the order of the search."""
    sources: list[Source] = [(f"by name, {name!r}", partial(locate, name))]
    if checkpoint:
        bundled = partial(locate_bundled, checkpoint, origin)
        sources.append((f"in {checkpoint}/{BUNDLE}", bundled))
    if origin != name.partition(":")[2]:
        at_origin = partial(locate_spec, origin, how="origin")
        sources.append((f"at its origin, {origin}", at_origin))
    spec = os.environ.get("LLM2CLIP_TOWER")
    if spec and name != NAME:  # which means it already
        variable = f"LLM2CLIP_TOWER={spec}"
        sources.append((variable, partial(locate_spec, spec, how=variable)))
    for registered, entry in sorted(registry().towers.items()):
        if entry["weights_sha256"] == wanted:
            find = partial(locate_spec, entry["spec"], how="registry")
            sources.append((f"registered as {registered!r}", find))
    return sources


def record_tower(folder: str | os.PathLike[str], config: Any) -> None:
    """Write what config.json records of the tower into a checkpoint that has none: PEFT saves the
    adapter alone."""
    record = getattr(config, KEY, None)
    if record and not (Path(folder) / CONFIG).is_file():
        write_text(Path(folder) / RECORD, json.dumps({KEY: record}, indent=2) + "\n")


def refuse_other_checkpoints(output: str, config: Any) -> None:
    """Raise ContractError if LLaVA would resume in ``output`` what was trained with another tower,
    under its name."""
    now = (getattr(config, KEY, None) or {}).get("weights_sha256")
    for folder in Path(output).glob("checkpoint-*"):
        record = config_of(folder).get(KEY) or config_of(folder, RECORD).get(KEY)
        if now and not record and not (folder / CONFIG).is_file():
            print(
                f"note: {folder} does not record its vision tower; "
                "it was not compared with --vision_tower"
            )
        was = (record or {}).get("weights_sha256", now)
        if was != now:
            raise ContractError(
                f"{folder} was trained with the vision tower sha256 {was}, "
                f"--vision_tower is now sha256 {now}; "
                "pass that tower, or choose another --output_dir"
            )


def locate_bundled(checkpoint: str, origin: str) -> TowerLocation:
    """The tower in a checkpoint's ``vision_tower`` folder, on this machine or on the Hub."""
    directory = Path(checkpoint)
    if not directory.is_dir() and HUB_ID.match(checkpoint):
        directory = download(checkpoint, [f"{BUNDLE}/*"])
    if not (directory / BUNDLE).is_dir():
        raise TowerNotFoundError("no such folder")
    return TowerLocation.of(
        directory / BUNDLE, how=f"bundled in {checkpoint}", origin=origin
    )


# ``llm2clip use``, ``llm2clip towers``, ``llm2clip llava bundle``


@dataclass(frozen=True, kw_only=True)
class UseConfig:
    """The tower to use."""

    tower: str = setting(help="tower directory, Hub id, or a registered name")
    name: str = setting(
        "", help='register it under this name; "": last part of the path or id'
    )


USE = Command(
    name="use",
    example="llm2clip use towers/l14-336",
    about="Register a tower and make it the one that --vision_tower llm2clip loads.",
    settings=UseConfig,
    arguments="tower",
)
TOWERS = Command(
    name="towers",
    example="llm2clip towers",
    about="List the registered towers: location, hash, width, patches. An asterisk marks the "
    "selected one.",
    settings=NoOptions,
)


def main_use(argv: list[str]) -> int:
    options = USE.parse(argv)
    if HUB_ID.match(options.name) and "/" in options.name:
        raise ValueError(
            f"--name {options.name} reads as a Hub id; choose a name without /"
        )
    location = locate_spec(options.tower, how=f"llm2clip use {options.tower}")
    location.check_weights()
    name = options.name
    is_folder = Path(options.tower).expanduser().is_dir()
    if not name and not is_folder and options.tower in registry().towers:
        name = options.tower
    name = select(location.origin, location.sha256, name=name)
    print(f"--vision_tower llm2clip is now {name}: {location.describe()}")
    if spec := os.environ.get("LLM2CLIP_TOWER"):
        print(f"note: LLM2CLIP_TOWER={spec} is set and takes precedence")
    return 0


def main_towers(argv: list[str]) -> int:
    TOWERS.parse(argv)
    registered = registry()
    for name, entry in sorted(registered.towers.items()):
        spec = entry["spec"]
        description = f"on the Hub as {spec}, sha256 {entry['weights_sha256'][:12]}"
        # those of the Hub are not downloaded for it
        if Path(spec).is_dir() or not HUB_ID.match(spec):
            try:
                description = locate_registered(registered, name, how=name).describe()
            except (FileNotFoundError, ContractError) as error:
                description = f"not usable: {error}"
        mark = "*" if name == registered.chosen else " "
        print(f"{mark} {name}: {description}")
    if not registered.towers:
        print(
            f"{registered.summary()}; register one with `llm2clip use PATH_OR_HUB_ID`"
        )
    return 0


def bundle(checkpoint: Path, *, tower: str = "") -> Path:
    """Copy the checkpoint's tower, or ``tower`` (path, registered name or Hub id), to
    ``CHECKPOINT/vision_tower``.

    Raises ContractError if the checkpoint was trained with another, FileExistsError if another is
    bundled already.
    """
    config = checkpoint_config(checkpoint)
    name = str(config.get("mm_vision_tower"))
    if not is_ours(name):
        raise ContractError(
            f"{checkpoint} has the vision tower {name!r}; only a tower of this package is bundled"
        )
    location = locate_tower(checkpoint, name, config, tower)
    target = checkpoint / BUNDLE
    if (target / TowerCard.FILE).is_file():
        bundled = TowerLocation.of(target, how="bundled")
        if bundled.sha256 == location.sha256:
            bundled.check_weights()
            return target
    advice = f"it holds no bundled tower of {location.sha256[:12]}: move it, and bundle again"
    with atomic_directory(target, fix=advice) as temporary:
        for pattern in BUNDLED_FILES:
            for source in sorted(location.directory.glob(pattern)):
                shutil.copyfile(source, temporary / source.name)
        replace(location, directory=temporary).check_weights()
    return target


def locate_tower(
    checkpoint: Path, name: str, config: dict[str, Any], tower: str
) -> TowerLocation:
    """The tower at ``tower``, or else the one that loading the checkpoint finds. Raises
    ContractError with both hashes if ``tower`` is not the one that the checkpoint was trained with.
    """
    if not tower:
        loaded_config = {**config, "_name_or_path": str(checkpoint)}
        return find_tower(name, SimpleNamespace(**loaded_config))
    location = locate_spec(tower, how=f"--tower {tower}")
    recorded = config.get(KEY, {}).get("weights_sha256", location.sha256)
    if location.sha256 != recorded:
        raise ContractError(
            f"{checkpoint} was trained with the tower sha256 {recorded}, "
            f"but {location.directory} has sha256 {location.sha256}; "
            "pass the original with --tower"
        )
    return location


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """Checkpoints that get their tower."""

    checkpoints: tuple[Path, ...] = setting(
        help="folders with config.json", option="checkpoint"
    )
    tower: str = setting(
        "",
        help="path, registered name or Hub id of the tower, if the checkpoint cannot find it",
    )


LLAVA_BUNDLE = Command(
    name="llava bundle",
    example="llm2clip llava bundle checkpoints/llava-7b-llm2clip",
    about="Copy the vision tower into LLaVA checkpoints, so that they load on another machine.",
    settings=BundleConfig,
    arguments="checkpoints",
)


def main_bundle(argv: list[str]) -> int:
    options = LLAVA_BUNDLE.parse(argv)
    for checkpoint in options.checkpoints:
        target = bundle(checkpoint, tower=options.tower)
        card = TowerCard.read(target / TowerCard.FILE)
        print(f"{target}: sha256 {card.weights_sha256}")
    return 0
