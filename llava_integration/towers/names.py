"""What a tower's name in LLaVA means, and in which directory the tower lies.

| name                          | tower                                                              |
|-------------------------------|--------------------------------------------------------------------|
| ``llm2clip``                  | the one of ``LLM2CLIP_TOWER``, else the one of ``llm2clip use``    |
| ``llm2clip:PATH``             | a tower directory                                                  |
| ``llm2clip:KNOWN``            | a name that ``llm2clip towers`` lists                              |
| ``llm2clip:ORG/NAME[@REV]``   | a tower directory on the Hugging Face Hub                          |
| ``PATH``                      | a tower directory given to LLaVA as a plain path                   |

Standard library only, apart from the Hub's client where a name asks for it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from llava_integration.towers import registry
from llm2clip_plugin.contracts import ContractError, TowerCard, sha256_weights

NAME = "llm2clip"
HUB_ID = re.compile(r"^[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?$")
WEIGHTS = "model.safetensors"
HUB_FILES = ["*.json", "*.safetensors", "README.md"]  # what a tower directory holds


class TowerNotFoundError(FileNotFoundError):
    """No tower under a name; the message says where it was looked for and what to do."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A tower that was found."""

    directory: Path
    card: TowerCard
    origin: str  # absolute path, or Hub id with the revision: what another machine would look for
    how: str  # for people: which rule found it

    def check_weights(self) -> None:
        """Read the weights file whole; ContractError with both hashes if it is not the card's."""
        found = sha256_weights(self.directory / WEIGHTS)
        if found != self.card.weights_sha256:
            raise ContractError(
                f"the weights in {self.directory} have sha256 {found}, {TowerCard.FILE} there says "
                f"{self.card.weights_sha256}: the directory was changed or copied in part; "
                "copy or export the tower again"
            )


def is_ours(name: object) -> bool:
    """Whether ``--vision_tower name`` means a tower of this package: exact word, exact prefix, or our directory."""
    if not isinstance(name, str):
        return False
    return name == NAME or name.startswith(f"{NAME}:") or os.path.isfile(os.path.join(name, TowerCard.FILE))


def locate(name: str) -> Place:
    """The tower that ``name``, one of the table above, means now.

    Raises TowerNotFoundError if there is none, ContractError if what is there is no tower directory.
    """
    if name == NAME:
        return locate_chosen()
    if name.startswith(f"{NAME}:"):
        return locate_spec(name[len(NAME) + 1 :], how=f"named {name!r}")
    return place_of(Path(name), how=f"directory {name!r}")


def locate_chosen() -> Place:
    """The tower of ``LLM2CLIP_TOWER``, else of ``llm2clip use``."""
    if spec := os.environ.get("LLM2CLIP_TOWER"):
        return locate_spec(spec, how=f"LLM2CLIP_TOWER={spec}")
    known = registry.read()
    if known.chosen:
        return locate_spec(known.towers[known.chosen]["spec"], how=f"`llm2clip use`, {known.chosen!r}")
    raise TowerNotFoundError(
        f"--vision_tower {NAME} needs a tower: set LLM2CLIP_TOWER=PATH_OR_HUB_ID, run `llm2clip use PATH_OR_HUB_ID`, "
        f"or name it in place as {NAME}:PATH_OR_HUB_ID; {known.summary()}"
    )


def locate_spec(spec: str, *, how: str) -> Place:
    """The tower of a path, a known name or a Hub id, tried in this order."""
    path = Path(spec).expanduser()
    if path.is_dir():
        return place_of(path, how=how)
    known = registry.read()
    if spec in known.towers and known.towers[spec]["spec"] != spec:
        return locate_spec(known.towers[spec]["spec"], how=f"{how}, known as {spec!r}")
    if HUB_ID.match(spec):
        return place_on_hub(spec, how=how)
    raise TowerNotFoundError(f"{how}: there is no directory {spec!r} here, and it is no Hub id; {known.summary()}")


def place_of(directory: Path, *, how: str, origin: str = "") -> Place:
    """The tower directory at ``directory``; ContractError if it isn't one."""
    if not (directory / TowerCard.FILE).is_file():
        raise ContractError(
            f"{how}: {directory} holds no {TowerCard.FILE}, so it is no tower directory; "
            f"make one with `llm2clip export RUN --output DIR` or `llm2clip import {directory} --output DIR`"
        )
    card = TowerCard.read(directory / TowerCard.FILE)
    return Place(directory=directory, card=card, origin=origin or str(directory.resolve()), how=how)


def place_on_hub(spec: str, *, how: str) -> Place:
    """The tower directory of a Hub repository, downloaded once; TowerNotFoundError says why if it can't be had."""
    from huggingface_hub import snapshot_download

    repository, _, revision = spec.partition("@")
    try:
        directory = snapshot_download(repository, revision=revision or None, allow_patterns=HUB_FILES)
    except (OSError, ValueError) as error:  # what the client raises for network, cache, rights and names
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise TowerNotFoundError(
            f"{how}: {repository!r} is no directory here, and the Hub could not give it "
            f"({type(error).__name__}: {reason}); "
            f"download it where there is a network and use `{NAME}:PATH`, or pass a path; {registry.read().summary()}"
        ) from error
    return place_of(Path(directory), how=how, origin=spec)
