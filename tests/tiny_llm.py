"""Tiny decoder LLMs of every family, random, with a byte-level tokenizer; fixtures for whoever imports them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    StableLmConfig,
)

TEXT = [
    "a red bicycle leans against a brick wall",
    "two dogs run over the wet grass",
    "the cat sleeps in a box, and a man reads a newspaper at the window",
    "Instruct: find the picture. Query: a boat on the lake",
]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<user>", "<end>"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<user>\n{{ m['content'] }}<end>{% endfor %}"
FAMILIES = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "phi3": Phi3Config,
    "stablelm": StableLmConfig,
    "nemotron": NemotronConfig,
    "olmo2": Olmo2Config,
}
HYBRIDS = {"qwen3_next": Qwen3NextConfig}  # with linear attention
CHATML = """{% for m in messages %}<|im_start|>{{ m['role'] + '\\n' + m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def tiny_tokenizer(*, template: bool = True, eos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 entries that puts <bos> first (and <eos> last if asked)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>" if eos else "<bos> $A",
        special_tokens=[(token, bpe.token_to_id(token)) for token in ("<bos>", "<eos>")],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=["<user>", "<end>"],
    )
    if template:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """As SmolLM2's: no token is added to a text, whose beginning would be that of a turn, and the end of one pads."""
    tokenizer = tiny_tokenizer(template=False)
    tokenizer.backend_tokenizer.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(
        {"bos_token": "<|im_start|>"} | dict.fromkeys(("eos_token", "pad_token"), "<|im_end|>")
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def save_tiny_llm(folder: Path, family: str, *, seed: int = 0, width: int = 32, **tokenizer_options: bool) -> Path:
    """Write a random two-block LLM with its tokenizer, weights large enough that every token matters."""
    sizes: dict[str, Any] = {
        "vocab_size": 400,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family in ("mistral", "gemma2", "gemma3"):
        sizes["sliding_window"] = 16  # shorter than the longest captions of the tests
    if family == "gemma3":
        sizes["layer_types"] = ["sliding_attention", "full_attention"]
    if family == "qwen3_next":
        sizes["layer_types"] = ["linear_attention", "full_attention"]
        sizes |= {f"linear_{kind}_head_dim": width // 4 for kind in ("key", "value")}
        sizes |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "mlp_only_layers": [0, 1]}
    if family in ("phi3", "stablelm", "olmo2"):
        del sizes["head_dim"]
    tokenizer = chatml_tokenizer() if family == "smollm2" else tiny_tokenizer(**tokenizer_options)
    if family == "smollm2":
        sizes |= {"tie_word_embeddings": True, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(seed)
    config = LlamaConfig if family == "smollm2" else (FAMILIES | HYBRIDS)[family]
    model = AutoModelForCausalLM.from_config(config(**sizes, initializer_range=0.2))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def any_llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLM of each family in turn."""
    return save_tiny_llm(tmp_path_factory.mktemp("llm") / request.param, request.param)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return save_tiny_llm(tmp_path_factory.mktemp("llm") / "llama", "llama")


@pytest.fixture(scope="session")
def make_llm():
    """``save_tiny_llm``, for tests that need another one."""
    return save_tiny_llm
