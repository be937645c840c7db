"""Tiny decoder LLMs of every family, random, with a byte-level tokenizer; fixtures for whoever
imports them."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TEXT = [
    "a red bicycle leans against a brick wall",
    "two dogs run over the wet grass",
    "the cat sleeps in a box, and a man reads a newspaper at the window",
    "Instruct: find the picture. Query: a boat on the lake",
]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<user>", "<end>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<user>\n{{ m['content'] }}<end>{% endfor %}"
)
FAMILIES = (
    "gemma2 gemma3 llama mistral nemotron olmo2 phi3 qwen2 qwen3 stablelm".split()
)
HYBRIDS = ["qwen3_next"]  # with linear attention
CHATML = """{% for m in messages %}<|im_start|>{{ m['role'] + '\\n' + m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def tiny_tokenizer(
    *, template: bool = True, eos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 entries that puts <bos> first (and <eos> last if asked)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(TEXT, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>" if eos else "<bos> $A",
        special_tokens=[
            (token, bpe.token_to_id(token)) for token in ("<bos>", "<eos>")
        ],
    )
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, extra_special_tokens=["<user>", "<end>"], **special
    )
    if template:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """As SmolLM2's: no token is added to a text, whose beginning would be that of a turn, and the
    end of one pads."""
    tokenizer = tiny_tokenizer(template=False)
    tokenizer.backend_tokenizer.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    end = "<|im_end|>"
    tokenizer.add_special_tokens(
        {"bos_token": "<|im_start|>", "eos_token": end, "pad_token": end}
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def save_tiny_llm(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    width: int = 32,
    **tokenizer_options: bool,
) -> Path:
    """Write a random two-block LLM with its tokenizer, weights large enough that every token
    matters."""
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "head_dim": width // 4,
    }
    sizes |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    }
    sizes |= {
        "vocab_size": 400,
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
        sizes |= {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "mlp_only_layers": [0, 1],
        }
    if family in ("phi3", "stablelm", "olmo2"):
        del sizes["head_dim"]
    tokenizer = (
        chatml_tokenizer()
        if family == "smollm2"
        else tiny_tokenizer(**tokenizer_options)
    )
    if family == "smollm2":
        sizes |= {"tie_word_embeddings": True, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(seed)
    kind = {"gemma3": "gemma3_text", "smollm2": "llama"}.get(family, family)
    config = AutoConfig.for_model(kind, **sizes, initializer_range=0.2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=FAMILIES)
def any_llm(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
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
