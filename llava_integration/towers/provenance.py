"""Which tower a LLaVA checkpoint was trained with: written into its config.json, held to on load.

LLaVA itself writes the tower's name alone, and a name can come to mean another tower.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from llava_integration.towers import names, registry
from llava_integration.towers.names import Place, TowerNotFoundError
from llm2clip_plugin.contracts import ContractError, TowerCard

KEY = "llm2clip_tower"  # in the checkpoint's config.json
BUNDLE = "vision_tower"  # folder in a checkpoint that holds its tower

# The folder or Hub id that load_pretrained_model was given: for an adapter or a projector alone, the
# configuration that reaches the tower says only where the base model lies.
checkpoint_being_loaded: ContextVar[str] = ContextVar("checkpoint_being_loaded", default="")


@contextmanager
def loading(checkpoint: str) -> Iterator[None]:
    """Within the block, towers are also looked for in ``checkpoint``."""
    token = checkpoint_being_loaded.set(str(checkpoint))
    try:
        yield
    finally:
        checkpoint_being_loaded.reset(token)


def record_of(place: Place, name: str, hidden_size: int) -> dict[str, Any]:
    """What a checkpoint remembers of its tower."""
    return {
        "weights_sha256": place.card.weights_sha256,
        "origin": place.origin,
        "name": name,
        "family": place.card.family,
        "image_size": place.card.image_size,
        "mm_hidden_size": hidden_size,
    }


def find(name: str, config: Any) -> Place:
    """The tower of a model: as named, in the checkpoint's ``vision_tower`` folder, in the registry.

    ``config`` is LLaVA's configuration or its model arguments. Without a record in it, the name alone decides.
    Raises ContractError with both hashes if only other towers are found, TowerNotFoundError if none is.
    """
    record = getattr(config, KEY, None)
    if not record:
        return find_unrecorded(name, config)
    wanted = record["weights_sha256"]
    seen: list[str] = []
    others: list[Place] = []
    for label, look in places_to_look(name, record, config):
        try:
            place = look()
        except (FileNotFoundError, ContractError) as error:
            seen.append(f"{label}: {error}")
            continue
        if place.card.weights_sha256 == wanted:
            if seen or others:
                print(f"llm2clip: the tower named {name!r} is taken from {place.directory} ({label})")
            return place
        others.append(place)
        seen.append(f"{label}: {place.directory} has sha256 {place.card.weights_sha256}")
    where = checkpoint_of(config) or "the checkpoint"
    trained = f"origin {record['origin']}, {record['family']}, {record['image_size']} px"
    told = f"{where} was trained with the tower sha256 {wanted} ({trained})"
    looked = "".join(f"\n  - {line}" for line in seen)
    way_out = (
        f"\nCopy that tower here and run `llm2clip use PATH`, or run `llm2clip llava bundle {where}` "
        "where it still is and copy the checkpoint again"
    )
    if others:
        raise ContractError(f"{told}; another tower is not taken in its place:{looked}{way_out}")
    raise TowerNotFoundError(f"{told}, which is not here:{looked}{way_out}")


def find_unrecorded(name: str, config: Any) -> Place:
    """The tower by its name; a checkpoint's own folder helps out where the name leads nowhere."""
    try:
        return names.locate(name)
    except FileNotFoundError:
        checkpoint = checkpoint_of(config)
        if not checkpoint or not (Path(checkpoint) / BUNDLE / TowerCard.FILE).is_file():
            raise
        return names.place_of(Path(checkpoint) / BUNDLE, how=f"bundled in {checkpoint}")


def places_to_look(name: str, record: dict[str, Any], config: Any) -> Iterator[tuple[str, Any]]:
    """(label for people, function that returns a Place or raises), in the order of the lookup."""
    yield f"as named, {name!r}", lambda: names.locate(name)
    if checkpoint := checkpoint_of(config):
        yield f"in {checkpoint}/{BUNDLE}", lambda: bundled(checkpoint, record["origin"])
    if record["origin"] != name.partition(":")[2]:
        yield f"where it was, {record['origin']}", lambda: names.locate_spec(record["origin"], how="origin")
    for known, entry in sorted(registry.read().towers.items()):
        if entry["weights_sha256"] == record["weights_sha256"]:
            spec = entry["spec"]
            yield f"in the registry as {known!r}", lambda spec=spec: names.locate_spec(spec, how="registry")


def bundled(checkpoint: str, origin: str) -> Place:
    """The tower in a checkpoint's own folder, local or on the Hub."""
    directory = Path(checkpoint)
    if not directory.is_dir() and names.HUB_ID.match(checkpoint):
        directory = hub_bundle(checkpoint)
    if not (directory / BUNDLE).is_dir():
        raise TowerNotFoundError("no such folder")
    return names.place_of(directory / BUNDLE, how=f"bundled in {checkpoint}", origin=origin)


def hub_bundle(repository: str) -> Path:
    """The local copy of a Hub checkpoint's ``vision_tower`` folder."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=[f"{BUNDLE}/*"]))
    except (OSError, ValueError) as error:
        raise TowerNotFoundError(f"the Hub could not give {repository}: {type(error).__name__}") from error


def checkpoint_of(config: Any) -> str:
    """Folder or Hub id of the checkpoint that is being loaded; "" for a model that is being made."""
    return checkpoint_being_loaded.get() or getattr(config, "_name_or_path", "")


def check_width(name: str, hidden_size: int, config: Any) -> None:
    """Hold a tower to the width that the projector was trained for, before the projector fails without a reason.

    Looks at a checkpoint's ``mm_hidden_size`` and at the weights behind ``--pretrain_mm_mlp_adapter``.
    """
    if trained := getattr(config, "mm_hidden_size", None):
        compare_widths(name, hidden_size, trained, checkpoint_of(config) or "the checkpoint")
    if adapter := getattr(config, "pretrain_mm_mlp_adapter", None):
        if (width := projector_width(adapter)) is not None:
            compare_widths(name, hidden_size, width, adapter)


def compare_widths(name: str, hidden_size: int, trained: int, where: str) -> None:
    """ContractError with both widths if they differ."""
    if hidden_size != trained:
        raise ContractError(
            f"the projector of {where} takes features of width {trained}, the tower {name!r} gives {hidden_size}: "
            "it was trained with another tower; name that one (its config.json says mm_vision_tower), or pretrain "
            "a projector for this one"
        )


def projector_width(adapter: str) -> int | None:
    """Input width of the projector saved in ``mm_projector.bin``; None if its first layer is no linear one."""
    import torch

    weights = torch.load(adapter, map_location="cpu", weights_only=True)
    first = re.compile(r"mm_projector\.(0\.)?weight$")
    widths = [tensor.shape[1] for key, tensor in weights.items() if first.search(key) and tensor.ndim == 2]
    return widths[0] if widths else None
