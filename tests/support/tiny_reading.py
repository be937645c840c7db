"""A reading of a tiny LLM, as ``evaluate captions --search`` leaves it."""

from pathlib import Path

import torch

from llm2clip_plugin.evaluate.config import PROMPT_EOL
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import local_folder, weights_sha256
from llm2clip_plugin.text.post import Post
from llm2clip_plugin.text.reading import write_reading

WIDTH = 32  # of save_tiny_llm's embeddings


def make_reading(
    folder: Path, llm: Path, *, layer: int = 1, mean: float = 0.5, width: int = WIDTH
) -> Path:
    """The last token after a prompt, at ``layer``, centered by ``mean``."""
    way = EncoderConfig(
        llm=str(llm),
        attention="causal",
        pooling="last",
        layer=layer,
        prompt="Caption: ",
        chat_template=PROMPT_EOL,
    )
    write_reading(
        folder,
        way,
        Post(torch.full((width,), mean)),
        base_sha256=weights_sha256(local_folder(str(llm))),
        accuracies={"score": 0.5},
        search={"captions": 8},
    )
    return folder
