"""Publish a tower directory on the Hugging Face Hub."""

import os
from pathlib import Path

from llm2clip_plugin.vision.intact import check_card


def push_to_hub(directory: str | os.PathLike[str], repository: str, *, private: bool = True) -> str:
    """Upload a tower directory to the Hub as ``owner/name``; returns the URL of the commit.

    Raises ContractError if the weights don't match the card, OSError if the Hub rejects the upload.
    """
    from huggingface_hub import HfApi

    directory = Path(directory)
    card = check_card(directory)
    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    message = f"LLM2CLIP {card.family} tower, {card.image_size} px, sha256 {card.weights_sha256[:12]}"
    return str(api.upload_folder(repo_id=repository, folder_path=directory, commit_message=message).commit_url)
