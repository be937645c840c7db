"""Which tower a LLaVA checkpoint was trained with: recorded in its config.json and enforced on load.

LLaVA records only the name of the tower, and a name can come to mean another tower.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from llava_integration.towers import names, registry
from llava_integration.towers.location import TowerLocation, TowerNotFoundError
from llm2clip_plugin.commands import command
from llm2clip_plugin.contracts import ContractError, TowerCard
from llm2clip_plugin.outside.timeouts import hub_snapshot
from llm2clip_plugin.outside.values import errors_about

KEY = "llm2clip_tower"  # in the checkpoint's config.json
BUNDLE = "vision_tower"  # folder of a checkpoint with a copy of its tower

# The path or Hub id given to load_pretrained_model. A LoRA or projector checkpoint needs it: the configuration that
# reaches the tower has the base model's path.
checkpoint_being_loaded: ContextVar[str] = ContextVar("checkpoint_being_loaded", default="")


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


def tower_record(location: TowerLocation, name: str, hidden_size: int) -> dict[str, Any]:
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
    """The tower of a model, by the hash recorded in ``config`` (LLaVA's configuration or model arguments).

    Searches the name, the checkpoint's ``vision_tower`` folder, the recorded origin and the registry, in this order.
    Without a record the name decides. Raises ContractError with both hashes if only other towers are found,
    TowerNotFoundError if none is.
    """
    record = getattr(config, KEY, None)
    if not record:
        return find_unrecorded(name, config)
    checkpoint = checkpoint_of(config) or "the checkpoint"
    with errors_about(f"{KEY} in config.json of {checkpoint}", fix="copy the checkpoint again"):
        wanted, origin = str(record["weights_sha256"]), str(record["origin"])
    failures: list[str] = []
    other_tower = False
    for where, locate in candidates(name, wanted, origin, config):
        try:
            location = locate()
        except (FileNotFoundError, ContractError) as error:
            failures.append(f"{where}: {error}")
            continue
        if location.sha256 == wanted:
            if failures:
                print(f"llm2clip: loading the vision tower {name!r} from {location.directory} ({where})")
            return location
        other_tower = True
        failures.append(f"{where}: {location.directory} has sha256 {location.sha256}")
    refusal = "refusing to load a different tower" if other_tower else "which is not on this machine"
    searched = "".join(f"\n  - {failure}" for failure in failures)
    message = (
        f"{checkpoint} was trained with the tower sha256 {wanted} (origin {origin}, {record.get('family')}, "
        f"{record.get('image_size')} px); {refusal}. Searched:{searched}\n"
        "Copy that tower to this machine and run `llm2clip use PATH`, or run "
        f"`{command('llava', 'bundle', checkpoint)}` where the tower still exists and copy the checkpoint again"
    )
    raise ContractError(message) if other_tower else TowerNotFoundError(message)


def find_unrecorded(name: str, config: Any) -> TowerLocation:
    """The tower by its name, or else the one bundled in the checkpoint."""
    try:
        return names.locate(name)
    except FileNotFoundError:
        checkpoint = checkpoint_of(config)
        if not checkpoint or not (Path(checkpoint) / BUNDLE / TowerCard.FILE).is_file():
            raise
        return TowerLocation.of(Path(checkpoint) / BUNDLE, how=f"bundled in {checkpoint}")


def candidates(name: str, wanted: str, origin: str, config: Any) -> Iterator[tuple[str, Callable[[], TowerLocation]]]:
    """(label for messages, function that returns a location or raises), in the order of the search."""
    yield f"by name, {name!r}", lambda: names.locate(name)
    if checkpoint := checkpoint_of(config):
        yield f"in {checkpoint}/{BUNDLE}", lambda: locate_bundled(checkpoint, origin)
    if origin != name.partition(":")[2]:
        yield f"at its origin, {origin}", lambda: names.locate_spec(origin, how="origin")
    for known, entry in sorted(registry.read().towers.items()):
        if entry["weights_sha256"] == wanted:
            spec = entry["spec"]
            yield f"registered as {known!r}", lambda spec=spec: names.locate_spec(spec, how="registry")


def locate_bundled(checkpoint: str, origin: str) -> TowerLocation:
    """The tower in a checkpoint's ``vision_tower`` folder, on this machine or on the Hub."""
    directory = Path(checkpoint)
    if not directory.is_dir() and names.HUB_ID.match(checkpoint):
        try:
            directory = hub_snapshot(checkpoint, patterns=[f"{BUNDLE}/*"])
        except (OSError, ValueError) as error:
            reason = str(error) if isinstance(error, TimeoutError) else type(error).__name__
            raise TowerNotFoundError(f"downloading {checkpoint} from the Hub failed ({reason})") from error
    if not (directory / BUNDLE).is_dir():
        raise TowerNotFoundError("no such folder")
    return TowerLocation.of(directory / BUNDLE, how=f"bundled in {checkpoint}", origin=origin)
