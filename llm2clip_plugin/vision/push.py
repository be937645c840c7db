"""Publish a tower directory on the Hugging Face Hub."""

import os
from pathlib import Path

from llm2clip_plugin.vision.intact import check_card


def push_to_hub(directory: str | os.PathLike[str], repository: str, *, private: bool = True) -> str:
    """Upload a tower directory to the Hub as ``owner/name``; returns the URL of the commit.

    Raises ContractError if the weights don't match the card, OSError if the Hub rejects the upload.
    """
    from huggingface_hub import HfApi, constants

    directory = Path(directory)
    card = check_card(directory)
    message = f"LLM2CLIP {card.family} tower, {card.image_size} px, sha256 {card.weights_sha256[:12]}"
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=directory, commit_message=message).commit_url)
    except Exception as error:  # of requests or of httpx, by the client's version
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("httpx", "requests")):
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise OSError(
            f"cannot push {directory} to {repository} on {constants.ENDPOINT}: {reason}; the directory is complete: "
            f"check the network, HF_ENDPOINT and `hf auth whoami`, then run `hf upload {repository} {directory}`"
        ) from error
