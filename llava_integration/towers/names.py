"""From the name given to ``--vision_tower`` to a tower directory.

| name                        | tower                                                     |
|-----------------------------|-----------------------------------------------------------|
| ``llm2clip``                | ``LLM2CLIP_TOWER`` if set, else the ``llm2clip use`` tower |
| ``llm2clip:PATH``           | a tower directory                                         |
| ``llm2clip:NAME``           | a name listed by ``llm2clip towers``                      |
| ``llm2clip:ORG/NAME[@REV]`` | a tower directory on the Hugging Face Hub                 |
| ``PATH``                    | a tower directory, given as a plain path                  |

Standard library only; the Hub's client is imported when a name needs it.
"""

import os
import re
from pathlib import Path

from llava_integration.towers import registry
from llava_integration.towers.location import TowerLocation, TowerNotFoundError
from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.outside.timeouts import hub_snapshot

NAME = "llm2clip"
HUB_ID = re.compile(r"^[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?$")
HUB_FILES = ["*.json", "*.safetensors", "README.md"]  # of a tower directory


def is_ours(name: object) -> bool:
    """Whether ``--vision_tower name`` is a tower of this package: ``llm2clip``, ``llm2clip:...`` or a tower directory.

    Never matches a substring: ``my-llm2clip`` is left to LLaVA.
    """
    if not isinstance(name, str):
        return False
    return name == NAME or name.startswith(f"{NAME}:") or os.path.isfile(os.path.join(name, TowerCard.FILE))


def locate(name: str) -> TowerLocation:
    """The tower that ``name`` (see the table above) means now.

    Raises TowerNotFoundError if there is none, ContractError if what it names is not a tower directory.
    """
    if name == NAME:
        return locate_default()
    if name.startswith(f"{NAME}:"):
        return locate_spec(name[len(NAME) + 1 :], how=f"--vision_tower {name}")
    return TowerLocation.of(Path(name), how=f"--vision_tower {name}")


def locate_default() -> TowerLocation:
    """The tower of the bare name: ``LLM2CLIP_TOWER``, else the one selected with ``llm2clip use``."""
    if spec := os.environ.get("LLM2CLIP_TOWER"):
        return locate_spec(spec, how=f"LLM2CLIP_TOWER={spec}")
    known = registry.read()
    if known.chosen:
        return locate_spec(known.towers[known.chosen]["spec"], how=f"`llm2clip use {known.chosen}`")
    raise TowerNotFoundError(
        f"--vision_tower {NAME}: no tower is selected; run `llm2clip use PATH_OR_HUB_ID`, set "
        f"LLM2CLIP_TOWER=PATH_OR_HUB_ID, or pass --vision_tower {NAME}:PATH_OR_HUB_ID; {known.summary()}"
    )


def locate_spec(spec: str, *, how: str) -> TowerLocation:
    """The tower of a path, a registered name or a Hub id, tried in this order."""
    path = Path(spec).expanduser()
    if spec.strip() and path.is_dir():
        return TowerLocation.of(path, how=how)
    known = registry.read()
    if spec in known.towers and known.towers[spec]["spec"] != spec:
        return locate_spec(known.towers[spec]["spec"], how=f"{how} (registered as {spec!r})")
    if HUB_ID.match(spec):
        return locate_on_hub(spec, how=how)
    raise TowerNotFoundError(f"{how}: {spec!r} is not a directory, a registered name or a Hub id; {known.summary()}")


def locate_on_hub(spec: str, *, how: str) -> TowerLocation:
    """The tower directory of a Hub repository, downloaded once; raises TowerNotFoundError if the download fails."""
    repository, _, revision = spec.partition("@")
    try:
        directory = hub_snapshot(repository, revision=revision or None, patterns=HUB_FILES)
    except (OSError, ValueError) as error:  # the client's errors for network, cache, permissions and names
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise TowerNotFoundError(
            f"{how}: no directory {repository!r}, and downloading it from the Hub failed "
            f"({type(error).__name__}: {reason}); download it on a machine with network access and pass "
            f"{NAME}:PATH; {registry.read().summary()}"
        ) from error
    return TowerLocation.of(directory, how=how, origin=spec)
