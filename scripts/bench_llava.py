"""How fast the tower is inside LLaVA, and how fast batches answer. Runs in LLaVA's environment, on a GPU or a CPU.

    python scripts/bench_llava.py                          # a random ViT-B/16 and a small random Llama
    python scripts/bench_llava.py --shape l14-336 --dtype float16 --images 64   # on a GPU

1. Images a second through LLaVA's ``encode_images`` (tower and projector), with LLaVA's own CLIPVisionTower and with
   ours on the same tower directory, taken in turns; the outputs must be equal bit for bit.
2. Answers a second of ``llava_integration.evaluate`` at several batch sizes, on the same questions; the answers must be
   those of batch size 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_integration.register import build
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
    config = LlavaConfig(
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
    model = LlavaLlamaForCausalLM(config)
    model.get_vision_tower().load_model()
    return model.to(device=device, dtype=dtype).eval()


def bench_features(options: argparse.Namespace) -> dict[str, float]:
    """Images a second by tower, best of the rounds, and the ratio of each round's pair in the middle."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as scratch:
        tower = make_tower(options.shape, Path(scratch) / "tower")
        model = make_llava(tower, device, dtype)
        args = SimpleNamespace(mm_vision_select_layer=-2, vision_tower=str(tower))
        whole = build(str(tower), SimpleNamespace(mm_vision_select_layer=-1, vision_tower=str(tower)))
        whole.select_layer, whole.blocks_used = -2, whole.blocks_used - 1  # ours, with the block that nobody reads
        towers = {
            "LLaVA's own tower": CLIPVisionTower(str(tower), args),
            "ours, every block": whole,
            "ours": model.get_vision_tower(),
        }
    size = SHAPES[options.shape][3]
    images = torch.randn(options.images, 3, size, size).to(device=device, dtype=dtype)
    seconds: dict[str, list[float]] = {name: [] for name in towers}
    outputs = {}
    for round_number in range(options.rounds + 1):
        for name, one in towers.items():
            model.model.vision_tower = one.to(device=device, dtype=dtype)
            started = time.perf_counter()
            with torch.inference_mode():
                outputs[name] = model.encode_images(images)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_number:  # the first is for warming up
                seconds[name].append(time.perf_counter() - started)
    first = outputs["LLaVA's own tower"]
    assert all(torch.equal(first, output) for output in outputs.values()), "the towers differ"
    found = {f"{name}, images/s": options.images / min(times) for name, times in seconds.items()}
    for name in ("ours, every block", "ours"):
        ratios = [a / b for a, b in zip(seconds["LLaVA's own tower"], seconds[name], strict=True)]
        found[f"{name} / LLaVA's own"] = statistics.median(ratios)
    return found


def bench_answers(options: argparse.Namespace) -> dict[str, float]:
    """Answers a second by batch size, with a checkpoint and questions of the user's."""
    from llava_integration import evaluate

    found, texts = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for size in options.batch_sizes:
            answers = Path(scratch) / f"{size}.jsonl"
            words = ["--model-path", options.checkpoint, "--question-file", options.questions, "--dtype", options.dtype]
            words += ["--image-folder", options.image_folder, "--answers-file", answers, "--batch-size", size]
            words += ["--max_new_tokens", options.max_new_tokens]
            parsed = evaluate.parser().parse_args([str(word) for word in words])
            asked = evaluate.read_questions(parsed.question_file)
            answerer = evaluate.Answerer(parsed)
            started = time.perf_counter()
            texts[size] = [
                text for batch in answerer.batches(asked, list(range(len(asked)))) for text in answerer.generate(batch)
            ]
            found[f"batch {size}, answers/s"] = len(asked) / (time.perf_counter() - started)
    first = texts[options.batch_sizes[0]]
    for size, answers in texts.items():
        same = sum(a == b for a, b in zip(first, answers, strict=True))
        found[f"batch {size}, answers as at batch {options.batch_sizes[0]}, share"] = same / len(first)
    return found


def main() -> None:
    """Print both tables; as JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="b16", help="of the random tower")
    parser.add_argument("--images", type=int, default=8, help="in one call of encode_images")
    parser.add_argument("--rounds", type=int, default=7, help="timed turns of each tower")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--checkpoint", default="", help="LLaVA checkpoint for the second part; left out without one")
    parser.add_argument("--questions", default="", help="its question file")
    parser.add_argument("--image-folder", default="")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    options = parser.parse_args()
    found = bench_features(options)
    if options.checkpoint:
        found |= bench_answers(options)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(f"{value:10.3f}  {name}" for name, value in found.items()))


if __name__ == "__main__":
    main()
