"""Speed of the tower inside LLaVA, and of answering in batches, in an environment with LLaVA, on a GPU or a CPU.

    python scripts/bench_llava.py                          # a random ViT-B/16 and a small random Llama
    python scripts/bench_llava.py --shape l14-336 --dtype float16 --images 64   # on a GPU
    python scripts/bench_llava.py --miniature quickstart-output/default/llava   # answers too, of the quickstart's LLaVA

1. Images a second through LLaVA's ``encode_images`` (tower and projector), with LLaVA's own CLIPVisionTower and with
   ours on the same tower directory; the outputs must be equal bit for bit.
2. Answers a second of ``llava_integration.evaluate`` at several batch sizes, on the same questions; the answers must be
   those of batch size 1.

The variants alternate, each round starting with the next one; a ratio is the median over the rounds. On a CPU, seconds
are processor time, which other programs on the machine hardly affect.
"""

# LLaVA may not be installed where types are checked:
# pyright: reportMissingImports=false

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench import Run, alternate, argument_parser, median_seconds, speedups
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from transformers import CLIPVisionConfig, CLIPVisionModel, logging

from llava_integration.answer import command as evaluate
from llava_integration.answer.model import Answerer
from llava_integration.hook import build
from llm2clip_plugin.vision.export import export_tower

SHAPES = {  # width, blocks, heads, image size, patch size
    "tiny": (64, 4, 4, 56, 14),
    "b16": (768, 12, 12, 224, 16),
    "l14-336": (1024, 24, 16, 336, 14),
}


def make_tower(shape: str, folder: Path) -> Path:
    """A CLIP tower directory of that shape with random weights."""
    width, blocks, heads, image, patch = SHAPES[shape]
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        image_size=image,
        patch_size=patch,
    )
    torch.manual_seed(0)
    export_tower(CLIPVisionModel(config).eval(), folder, origin=f"random weights of shape {shape}")
    return folder


def make_llava(tower: Path, device: torch.device, dtype: torch.dtype) -> LlavaLlamaForCausalLM:
    """A small LLaVA with our tower."""
    settings: dict[str, Any] = dict(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=1000,
        mm_vision_tower=f"llm2clip:{tower}",
        mm_vision_select_layer=-2,
        mm_hidden_size=json.loads((tower / "config.json").read_text())["hidden_size"],
        mm_projector_type="mlp2x_gelu",
    )
    model: Any = LlavaLlamaForCausalLM(LlavaConfig(**settings))
    model.get_vision_tower().load_model()
    return model.to(device=device, dtype=dtype).eval()


def median_speedups(runs: dict[str, list[Run[Any]]], base: str) -> dict[str, float]:
    """How many times as fast as ``base`` each other way is: median over the rounds."""
    return {
        f"{name} / {base}": statistics.median(speedups(of_way, runs[base]))
        for name, of_way in runs.items()
        if name != base
    }


def bench_features(options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Images per second of each tower, and the speedup over LLaVA's own."""
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as scratch:
        tower = make_tower(options.shape, Path(scratch) / "tower")
        model = make_llava(tower, device, dtype)
        args = SimpleNamespace(mm_vision_select_layer=-2, vision_tower=str(tower))
        all_blocks = build(str(tower), SimpleNamespace(mm_vision_select_layer=-1, vision_tower=str(tower)))
        all_blocks.select_layer = -2
        all_blocks.blocks_used -= 1  # the last block is loaded, but unused
        towers = {
            "LLaVA's own tower": CLIPVisionTower(str(tower), args),
            "ours, every block": all_blocks,
            "ours": model.get_vision_tower(),
        }
    size = SHAPES[options.shape][3]
    images = torch.randn(options.images, 3, size, size).to(device=device, dtype=dtype)

    def encode(name: str) -> torch.Tensor:
        model.model.vision_tower = towers[name]
        with torch.inference_mode():
            return model.encode_images(images)

    for one in towers.values():
        one.to(device=device, dtype=dtype)
    runs = alternate({name: partial(encode, name) for name in towers}, options.rounds)
    first, *others = (of_tower[-1].result for of_tower in runs.values())
    assert all(torch.equal(first, output) for output in others), "the towers differ"
    speeds = {f"{name}, images/s": options.images / median_seconds(of_tower) for name, of_tower in runs.items()}
    return speeds | median_speedups(runs, "LLaVA's own tower")


def bench_answers(options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Answers per second by batch size, and the fraction of answers equal to the first size's."""
    root = options.miniature
    words = ["--model-path", root / "llava-after", "--question-file", root / "data" / "questions.jsonl"]
    words += ["--image-folder", root / "data" / "images", "--answers-file", "unused", "--workers", 0]
    words += ["--dtype", "float32", "--max_new_tokens", options.max_new_tokens]
    parsed = evaluate.COMMAND.parse([str(word) for word in words])
    answerer = Answerer(parsed)
    questions = evaluate.read_questions(parsed.question_file)
    questions = questions[:: max(1, len(questions) // options.questions)][: options.questions]

    def answer(size: int) -> list[str]:
        answerer.options = replace(parsed, batch_size=size)
        batches = answerer.batches(questions, list(range(len(questions))))
        return [text for batch in batches for text in answerer.generate(batch)]

    runs = alternate(
        {f"batches of {size}": partial(answer, size) for size in options.batch_sizes}, options.answer_rounds
    )
    base = f"batches of {options.batch_sizes[0]}"
    results = {f"{name}, answers/s": len(questions) / median_seconds(of_size) for name, of_size in runs.items()}
    results |= median_speedups(runs, base)
    expected = runs[base][-1].result
    for name, of_size in runs.items():
        equal = sum(a == b for a, b in zip(expected, of_size[-1].result, strict=True))
        results[f"{name}, fraction of answers equal to {base}"] = equal / len(expected)
    return results


def main() -> None:
    """Print the results, as JSON with --json."""
    parser = argument_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="b16", help="shape of the random tower")
    parser.add_argument("--images", type=int, default=8, help="images per call of encode_images")
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each tower")
    parser.add_argument("--answer-rounds", type=int, default=3, help="timed runs of each batch size")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--miniature", type=Path, help="output of scripts/quickstart/miniature.sh, for the second part")
    parser.add_argument("--questions", type=int, default=128, help="number of the miniature's questions to answer")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--max-new-tokens", type=int, default=12)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    logging.set_verbosity_error()  # the tower's weights in LLaVA's checkpoint, which it ignores
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = bench_features(options, device)
    if options.miniature:
        results |= bench_answers(options, device)
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        print("\n".join(f"{value:10.3f}  {name}" for name, value in results.items()))


if __name__ == "__main__":
    main()
