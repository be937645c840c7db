"""What decides a caption's embedding, and the card that carries it with an adapter."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import ContractError, EncoderCard

ATTENTIONS = ("bidirectional", "causal")
POOLINGS = ("mean", "last")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")
CAPTION = "{caption}"  # its place in a chat template


PRESETS: dict[str, dict[str, Any]] = {
    # microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned and ...-Llama-3.2-1B-...: LLM2Vec's reading of a Llama 3
    # Instruct: one user turn, mean over the caption's tokens and the end of the turn, an instruction left out
    "llm2clip-llama3": {
        "attention": "bidirectional",
        "pooling": "mean",
        "chat_template": "<|start_header_id|>user<|end_header_id|>\n\n{caption}<|eot_id|>",
        "include_bos": False,
    },
    # LLM2Vec's adapters and checkpoints of base models
    "llm2vec": {"attention": "bidirectional", "pooling": "mean", "include_bos": False},
}


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """An LLM as caption encoder. Where the adapter (or the LLM's folder) has a card, the card's settings hold."""

    llm: str = ""  # path or Hub id of a decoder LLM
    preset: str = ""  # settings of a known kind of checkpoint without a card: llm2clip-llama3, llm2vec; "" for none
    revision: str = ""  # commit, tag or branch on the Hub; "" for the default
    adapter: str = ""  # folder of a PEFT adapter; "" for none
    attention: str = "bidirectional"  # bidirectional | causal
    pooling: str = "mean"  # mean over the tokens | last token
    layer: int = -1  # hidden state to pool: 0 embeddings, 1 first block ... -1 after the last norm; the rest is dropped
    prompt: str = ""  # text before every caption; left out of the pooling
    query_prompt: str = ""  # text before a query, in training and caption retrieval; left out of the pooling
    chat_template: str = ""  # "" none; "user" the tokenizer's own, one user turn; or a text with {caption} in it
    include_bos: bool = True  # count the beginning-of-text token in mean pooling, where the tokenizer adds one
    max_tokens: int = 512  # tokens of one input, template and prompt included; longer captions are cut and counted
    compute_dtype: str = "auto"  # float32 | bfloat16 | float16 | auto: bfloat16 on GPUs, on CPUs as measured
    load_in_4bit: bool = False  # NF4 with double quantisation through bitsandbytes

    def __post_init__(self) -> None:
        if self.preset and self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset!r}; known: {', '.join(PRESETS)}")
        for name, known in (("attention", ATTENTIONS), ("pooling", POOLINGS), ("compute_dtype", COMPUTE_DTYPES)):
            if (value := vars(self)[name]) not in known:
                raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        if self.max_tokens < 4:
            raise ValueError(f"max_tokens is {self.max_tokens}; expected 4 or more")
        if self.chat_template not in ("", "user") and self.chat_template.count(CAPTION) != 1:
            raise ValueError(
                f'chat_template {self.chat_template!r} is neither "" nor "user" nor a text with {CAPTION} in it once'
            )


CARD_SETTINGS = (
    "attention",
    "pooling",
    "layer",
    "prompt",
    "query_prompt",
    "chat_template",
    "include_bos",
    "max_tokens",
)


def find_card(folder: str) -> EncoderCard | None:
    """The encoder card of an adapter's or LLM's folder, if it has one."""
    path = Path(folder) / EncoderCard.FILE
    return EncoderCard.read(path) if folder and path.is_file() else None


def apply_card(config: EncoderConfig, card: EncoderCard | None, where: str) -> EncoderConfig:
    """The configuration with the card's settings, which an adapter was trained with; ContractError if it has others."""
    if card is None:
        return config
    return apply_settings(config, {name: vars(card)[name] for name in CARD_SETTINGS}, f"{where} was trained with")


def apply_preset(config: EncoderConfig) -> EncoderConfig:
    """The configuration with its preset's settings; ContractError for a setting that contradicts it."""
    if not config.preset:
        return config
    return apply_settings(
        config, {"preset": "", **PRESETS[config.preset]}, f"preset {config.preset} means", ("preset",)
    )


def apply_settings(
    config: EncoderConfig, settings: dict[str, Any], because: str, free: tuple[str, ...] = ()
) -> EncoderConfig:
    """The configuration with ``settings``.

    One that was changed from its default and is another here is refused: an LLM embeds as it was trained. ``free``
    settings are replaced without asking. Raises ContractError with both values and the reason.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(EncoderConfig)}
    for name, value in settings.items():
        if name not in free and (given := vars(config)[name]) not in (defaults[name], value):
            raise ContractError(f"{name} is {given!r}, but {because} {value!r}; leave {name} out")
    return dataclasses.replace(config, **settings)
