"""EVA02 and CLIP towers against timm's with the same weights: images per second, memory with gradient checkpointing.

    python scripts/bench_towers.py [--towers eva02-b16 clip-b16] [--batch 4] [--rounds 5] [--clock cpu]

Both models get the same weights and images, and must compute the same features before they are timed. Timed passes
alternate; printed are medians over the rounds, for ratios with a 95 % interval. Peak memory is measured in a new
process.
"""

import json
import random
import statistics
from typing import Any

import torch
from bench import alternate, argument_parser, in_new_process, median_seconds, peak_growth, speedups
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm2clip_plugin.vision.convert.layouts.eva_clip import eva_state
from llm2clip_plugin.vision.convert.layouts.open_clip import NAMES
from llm2clip_plugin.vision.eva02 import Eva02Config, Eva02VisionModel
from llm2clip_plugin.vision.towers import use_quick_gelu

EVA = {"rope_pretrained_grid": 16}
CLIP = {"hidden_act": "quick_gelu"}
B16 = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 16}
L14 = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 224, "patch_size": 14}
TOWERS: dict[str, tuple[dict[str, Any], str]] = {  # name -> (ours, timm's)
    "eva02-b16": ({**EVA, **B16, "intermediate_size": 2048}, "eva02_base_patch16_clip_224"),
    "eva02-l14": ({**EVA, **L14, "intermediate_size": 2730}, "eva02_large_patch14_clip_224"),
    "clip-b16": ({**CLIP, **B16, "intermediate_size": 3072}, "vit_base_patch16_clip_quickgelu_224"),
    "clip-l14": ({**CLIP, **L14, "intermediate_size": 4096}, "vit_large_patch14_clip_quickgelu_224"),
}


def interval(ratios: list[float], *, draws: int = 2000) -> tuple[float, float]:
    """Bootstrap 95 % interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[draws // 40], medians[-draws // 40 - 1]


def our_tower(name: str) -> PreTrainedModel:
    """The tower in this package (EVA02) or in transformers (CLIP, with training's QuickGELU), random weights."""
    fields = TOWERS[name][0]
    torch.manual_seed(0)
    if name.startswith("eva02"):
        return Eva02VisionModel(Eva02Config(**fields))
    from transformers import CLIPVisionConfig, CLIPVisionModel

    tower = CLIPVisionModel(CLIPVisionConfig(**fields))
    use_quick_gelu(tower)
    return tower


def timm_tower(name: str, ours: PreTrainedModel) -> nn.Module:
    """timm's model with the weights of ours."""
    import timm

    model = timm.create_model(TOWERS[name][1], pretrained=False, num_classes=0)
    if name.startswith("eva02"):
        assert isinstance(ours.config, Eva02Config)
        state = {k: v for k, v in eva_state(ours.state_dict(), ours.config).items() if "rope" not in k}
        state = timm.models.eva.checkpoint_filter_fn(state, model)
        left = model.load_state_dict(state, strict=False)
        assert not left.unexpected_keys and all("k_bias" in key for key in left.missing_keys), left
        return model
    from llm2clip_plugin.vision.towers import core_of

    state = NAMES.to_theirs({f"vision_model.{k}": v for k, v in core_of(ours).state_dict().items()})
    assert isinstance(model, timm.models.VisionTransformer)
    state = timm.models.vision_transformer.checkpoint_filter_fn(state, model)
    model.load_state_dict(state)
    return model


def passes(model: nn.Module, pixels: Tensor, *, is_timm: bool) -> tuple:
    """A forward pass in eval mode, and a training step's forward and backward."""

    def forward() -> Tensor:
        return model(pixels) if is_timm else model(pixel_values=pixels).pooler_output

    def evaluate() -> None:
        model.eval()
        with torch.no_grad():
            forward()

    def train() -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        forward().square().mean().backward()

    return evaluate, train


def compare_speed(name: str, *, batch: int, rounds: int, clock: str) -> dict[str, float]:
    """Images per second of both by ``clock``, and their ratio, for a forward pass and for forward and backward."""
    ours = our_tower(name)
    theirs = timm_tower(name, ours)
    size = TOWERS[name][0]["image_size"]
    pixels = torch.randn(batch, 3, size, size)
    with torch.no_grad():
        difference = (ours.eval()(pixel_values=pixels).pooler_output - theirs.eval()(pixels)).abs().max().item()
    assert difference < 1e-3, f"{name}: features differ by {difference}"
    measured = {"difference": difference}
    pairs = zip(
        ("forward", "train"), passes(ours, pixels, is_timm=False), passes(theirs, pixels, is_timm=True), strict=True
    )
    for kind, mine, other in pairs:
        runs = alternate({"ours": mine, "timm": other}, rounds)
        ratios = speedups(runs["ours"], runs["timm"], clock)
        for model in runs:
            measured[f"{kind} {model}"] = batch / median_seconds(runs[model], clock)
        measured[f"{kind} ratio"] = statistics.median(ratios)
        measured[f"{kind} low"], measured[f"{kind} high"] = interval(ratios)
    return measured


def measure_memory(name: str, batch: int, threads: int, checkpointing: bool) -> float:
    """Peak memory of a forward and backward pass without weights and gradients, in MiB."""
    torch.set_num_threads(threads)
    ours = our_tower(name).train()
    if checkpointing:
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    size = TOWERS[name][0]["image_size"]
    pixels = torch.randn(batch, 3, size, size)

    def forward_backward(images: Tensor) -> None:
        ours(pixel_values=images).pooler_output.square().mean().backward()

    forward_backward(pixels[:1])  # allocates the gradients
    return peak_growth(lambda: forward_backward(pixels))[0] / 2**20


def main() -> None:
    """Print a table and the results as one line of JSON."""
    parser = argument_parser(__doc__)
    parser.add_argument("--towers", nargs="+", default=["eva02-b16", "clip-b16"], choices=list(TOWERS))
    parser.add_argument("--batch", type=int, default=4, help="images per pass")
    parser.add_argument("--memory-batch", type=int, default=8, help="images per pass for the memory measurement")
    parser.add_argument("--rounds", type=int, default=5, help="timed passes of each model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", default="wall", choices=["wall", "cpu"], help="cpu: processor time, for a busy machine"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    for name in options.towers:
        speed = compare_speed(name, batch=options.batch, rounds=options.rounds, clock=options.clock)
        memory = {
            f"{kind} MiB": in_new_process(
                measure_memory, name, options.memory_batch, options.threads, kind == "checkpointed"
            )
            for kind in ("plain", "checkpointed")
        }
        results[name] = {**speed, **memory}
        print(f"{name}, batch {options.batch}, {options.threads} threads")
        for kind in ("forward", "train"):
            ours, theirs, ratio, low, high = (
                speed[f"{kind} {part}"] for part in ("ours", "timm", "ratio", "low", "high")
            )
            print(f"  {kind:8} {ours:7.2f} images/s, timm {theirs:7.2f}, {ratio:.3f}x [{low:.3f}, {high:.3f}]")
        row = results[name]
        print(
            f"  activations of a pass over {options.memory_batch} images {row['plain MiB']:.0f} MiB, "
            f"checkpointed {row['checkpointed MiB']:.0f} MiB"
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
