"""A tower directory with its card: what every name of a tower resolves to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm2clip_plugin.commands import command
from llm2clip_plugin.contracts import ContractError, TowerCard
from llm2clip_plugin.vision.intact import check_card


class TowerNotFoundError(FileNotFoundError):
    """No tower under a name; the message lists where it was searched for and what to do."""


@dataclass(frozen=True, kw_only=True)
class TowerLocation:
    """A tower directory on this machine."""

    directory: Path
    card: TowerCard
    origin: str  # absolute path, or Hub id with revision: where another machine would look
    how: str  # how the tower was named, for messages: "LLM2CLIP_TOWER=...", "bundled in ..."

    @classmethod
    def of(cls, directory: Path, *, how: str, origin: str = "") -> TowerLocation:
        """Read the card of ``directory``; ``origin`` defaults to its absolute path.

        Raises ContractError if ``directory`` is not a tower directory.
        """
        if not (directory / TowerCard.FILE).is_file():
            raise ContractError(
                f"{how}: {directory} is not a tower directory (no {TowerCard.FILE}); "
                "create one with `llm2clip export RUN --output DIR` or "
                f"`{command('import', directory, '--output', 'DIR')}`"
            )
        card = TowerCard.read(directory / TowerCard.FILE)
        return cls(directory=directory, card=card, origin=origin or str(directory.resolve()), how=how)

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights, from the card."""
        return self.card.weights_sha256

    def check_weights(self) -> None:
        """Compare the tower's files with their hashes; raises ContractError with both if one was changed."""
        check_card(self.directory, adapter=False)

    def describe(self) -> str:
        """One line: origin, hash, family, width, blocks, patches."""
        card = self.card
        grid = card.image_size // card.patch_size
        return (
            f"{self.origin}, sha256 {card.weights_sha256[:12]}, {card.family}, width {card.hidden_size}, "
            f"{card.num_layers} blocks, {card.image_size} px, {grid} x {grid} = {card.num_patches} patches"
        )
