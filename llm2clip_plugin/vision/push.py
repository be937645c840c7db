"""Publish a tower directory on the Hugging Face Hub."""

import hashlib
import os
from pathlib import Path

from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.outside.timeouts import check_hub_answers
from llm2clip_plugin.vision.intact import TowerChecksums, check_card
from llm2clip_plugin.vision.model_card import model_card
from llm2clip_plugin.vision.places import published

README = "README.md"


def push_to_hub(directory: str | os.PathLike[str], repository: str, *, private: bool = True) -> str:
    """Upload a tower directory to the Hub as ``owner/name``; returns the URL of the commit.

    The uploaded card and README name no local path: of the weights' and the LLM's only the folder's name is left, of
    the adapter's nothing. The directory itself does not change.

    Raises ContractError if the weights don't match the card, OSError if the Hub rejects the upload.
    """
    directory = Path(directory)
    card = check_card(directory)
    message = f"LLM2CLIP {card.family} tower, {card.image_size} px, sha256 {card.weights_sha256[:12]}"
    return upload(directory, repository, message, private=private, replaced=_public(directory, card))


def upload(
    directory: Path, repository: str, message: str, *, private: bool = True, replaced: dict[str, bytes] | None = None
) -> str:
    """Upload a folder to the Hub as ``owner/name`` in one commit; returns its URL.

    ``replaced``: contents that are uploaded in place of files. Raises OSError if the Hub rejects the upload.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    replaced = replaced or {}
    try:
        check_hub_answers(repository)
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        files = [CommitOperationAdd(name, replaced.get(name, directory / name)) for name in sorted(_files(directory))]
        return str(api.create_commit(repository, files, commit_message=message).commit_url)
    except Exception as error:  # of requests or of httpx, by the client's version
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("httpx", "requests")):
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise OSError(
            f"cannot push {directory} to {repository} on {constants.ENDPOINT}: {reason}; the directory is complete: "
            f"check the network, HF_ENDPOINT and `hf auth whoami`, then run `hf upload {repository} {directory}`"
        ) from error


def _public(directory: Path, card: TowerCard) -> dict[str, bytes]:
    """The files that are uploaded without local paths, in place of the directory's; {} if it has none."""
    public = published(card)
    if public == card:
        return {}
    replaced = {TowerCard.FILE: public.to_json().encode(), README: model_card(public).encode()}
    if (directory / TowerChecksums.FILE).is_file():
        files = TowerChecksums.read(directory / TowerChecksums.FILE).files
        files = files | {TowerCard.FILE: hashlib.sha256(replaced[TowerCard.FILE]).hexdigest()}
        replaced[TowerChecksums.FILE] = TowerChecksums(files=files).to_json().encode()
    return replaced


def _files(directory: Path) -> list[str]:
    """The files of a directory by their paths in it, without hidden ones."""
    paths = [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]
    return [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]
