"""The settings that determine a caption's embedding, and where they come from: options, presets, the encoder card."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import ContractError, EncoderCard
from llm2clip_plugin.options.names import unknown

ATTENTIONS = ("bidirectional", "causal")
POOLINGS = ("mean", "last")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")
CAPTION = "{caption}"  # placeholder in a chat template


PRESETS: dict[str, dict[str, Any]] = {
    # microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned and ...-Llama-3.2-1B-..., which embed as LLM2Vec does with a
    # Llama 3 Instruct: one user turn, mean over the caption's tokens and the end of the turn, without an instruction
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
    """An LLM as caption encoder. The card of the adapter or of the LLM's folder, if there is one, takes precedence."""

    llm: str = ""  # path or Hub id of a decoder LLM
    preset: str = ""  # settings of known checkpoints without a card: llm2clip-llama3, llm2vec; "" for none
    revision: str = ""  # commit, tag or branch on the Hub; "" for the default
    adapter: str = ""  # folder of a PEFT adapter; "" for none
    attention: str = "bidirectional"  # bidirectional | causal
    pooling: str = "mean"  # mean over the tokens | last: the last token
    layer: int = -1  # hidden state to pool: 0 token embeddings, 1 after the first block, ..., -1 after the final norm
    prompt: str = ""  # text before every caption; not pooled
    query_prompt: str = ""  # text before a query, in training and caption retrieval; not pooled
    chat_template: str = ""  # "" for none; "user": one user turn of the tokenizer's template; or a text with {caption}
    include_bos: bool = True  # include the BOS token, if the tokenizer adds one, in mean pooling
    post_file: str = ""  # post-processing that `evaluate captions --search` wrote: centering, removed components
    max_tokens: int = 512  # tokens of an input, template and prompt included; longer captions are truncated
    compute_dtype: str = "auto"  # float32 | bfloat16 | float16 | auto: bfloat16 on GPUs, the faster one on CPUs
    load_in_4bit: bool = False  # NF4 with double quantization (bitsandbytes)

    def __post_init__(self) -> None:
        if self.preset and self.preset not in PRESETS:
            raise ValueError(unknown("preset", self.preset, PRESETS))
        for name, known in (("attention", ATTENTIONS), ("pooling", POOLINGS), ("compute_dtype", COMPUTE_DTYPES)):
            if (value := vars(self)[name]) not in known:
                raise ValueError(unknown(name, value, known))
        if self.max_tokens < 4:
            raise ValueError(f"max_tokens is {self.max_tokens}; expected at least 4")
        if self.chat_template not in ("", "user") and self.chat_template.count(CAPTION) != 1:
            raise ValueError(
                f'chat_template {self.chat_template!r} must be "", "user", or a text with {CAPTION} exactly once'
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
    """The encoder card in the folder of an adapter or LLM; None without one."""
    path = Path(folder) / EncoderCard.FILE
    return EncoderCard.read(path) if folder and path.is_file() else None


def apply_card(config: EncoderConfig, card: EncoderCard | None, where: str) -> EncoderConfig:
    """The configuration with the card's settings; raises ContractError for a setting that contradicts it."""
    if card is None:
        return config
    return apply_settings(config, {name: vars(card)[name] for name in CARD_SETTINGS}, f"{where} was trained with")


def apply_preset(config: EncoderConfig) -> EncoderConfig:
    """The configuration with its preset's settings; raises ContractError for a setting that contradicts it."""
    if not config.preset:
        return config
    settings = apply_settings(config, PRESETS[config.preset], f"preset {config.preset} sets")
    return dataclasses.replace(settings, preset="")


def apply_settings(config: EncoderConfig, settings: dict[str, Any], reason: str) -> EncoderConfig:
    """The configuration with ``settings``, which an LLM was trained with.

    Raises ContractError, with both values and ``reason``, for an option that differs from its default and from them.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(EncoderConfig)}
    for name, value in settings.items():
        if (given := vars(config)[name]) not in (defaults[name], value):
            raise ContractError(f"{name} is {given!r}, but {reason} {value!r}; omit {name}")
    return dataclasses.replace(config, **settings)
