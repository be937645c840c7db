"""Publish a tower directory on the Hugging Face Hub."""

import os
from pathlib import Path

from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.outside.timeouts import check_hub_answers
from llm2clip_plugin.vision.intact import check_card
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
    return upload(directory, repository, message, private=private, replaced=_public(card))


def upload(
    directory: Path, repository: str, message: str, *, private: bool = True, replaced: dict[str, bytes] | None = None
) -> str:
    """Upload a folder to the Hub as ``owner/name`` in one commit; returns its URL.

    ``replaced``: contents that are uploaded in place of files. Raises OSError, whatever the upload fails with: the
    folder is complete and can be uploaded later.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    replaced = replaced or {}
    try:
        check_hub_answers(repository)
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        files = [CommitOperationAdd(name, replaced.get(name, directory / name)) for name in sorted(_files(directory))]
        return str(api.create_commit(repository, files, commit_message=message).commit_url)
    except Exception as error:  # an LFS error is a ValueError or RuntimeError, others by the client's version
        server = constants.ENDPOINT
        raise OSError(
            f"cannot push {directory} to {repository} on {server}: {_reason(error)}; the directory is complete: "
            f"check the network, HF_ENDPOINT and `hf auth whoami`, then run `hf upload {repository} {directory}`"
        ) from error


def check_repository(repository: str | None) -> None:
    """Raise ValueError for what cannot be a repository's name; for commands that upload at their end."""
    from huggingface_hub.utils import validate_repo_id

    if repository is None:
        return
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise ValueError(f"--push {repository!r}: {str(error).splitlines()[0]}") from error
    if "/" not in repository:
        raise ValueError(f"--push {repository!r} names no owner, expected OWNER/NAME")


def _reason(error: BaseException) -> str:
    """One line: what the client says, and if it wraps another error, that one's words."""
    head, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if head.endswith(":") and rest:
        head = f"{head} {rest[0]}"
    head, cause = head.rstrip("."), error.__cause__
    return f"{head}: {_reason(cause)}" if isinstance(error, RuntimeError) and cause else head


def _public(card: TowerCard) -> dict[str, bytes]:
    """The files that are uploaded without local paths, in place of the directory's; {} if it has none."""
    public = published(card)
    return {} if public == card else {TowerCard.FILE: public.to_json().encode(), README: model_card(public).encode()}


def _files(directory: Path) -> list[str]:
    """The files of a directory by their paths in it, without hidden ones."""
    paths = [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]
    return [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]
