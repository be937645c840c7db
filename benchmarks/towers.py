"""EVA02 and CLIP towers against timm's with the same weights: images per second, memory with gradient checkpointing.

    python -m benchmarks.towers --towers eva02-b16 clip-b16 --batch 4 --rounds 21

Both models get the same weights and images, and must compute the same features before they are timed. Memory:
activations of a forward and backward pass, measured in a new process.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.common import alternate, in_new_process, parser, peak_growth, print_table
from llm2clip_plugin.vision.convert.layouts.eva_clip import eva_state
from llm2clip_plugin.vision.convert.layouts.open_clip import NAMES
from llm2clip_plugin.vision.eva02 import Eva02Config, Eva02VisionModel
from llm2clip_plugin.vision.quick_gelu import use_quick_gelu
from llm2clip_plugin.vision.towers import core_of

B16 = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 16}
L14 = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 224, "patch_size": 14}
TOWERS: dict[str, tuple[dict[str, Any], str]] = {  # name -> (ours, timm's)
    "eva02-b16": ({**B16, "intermediate_size": 2048}, "eva02_base_patch16_clip_224"),
    "eva02-l14": ({**L14, "intermediate_size": 2730}, "eva02_large_patch14_clip_224"),
    "clip-b16": ({**B16, "intermediate_size": 3072}, "vit_base_patch16_clip_quickgelu_224"),
    "clip-l14": ({**L14, "intermediate_size": 4096}, "vit_large_patch14_clip_quickgelu_224"),
}


def our_tower(name: str) -> PreTrainedModel:
    """The tower in this package (EVA02) or in transformers (CLIP, with training's QuickGELU), random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    fields = TOWERS[name][0]
    torch.manual_seed(0)
    if name.startswith("eva02"):
        return Eva02VisionModel(Eva02Config(**fields, rope_pretrained_grid=16))
    tower = CLIPVisionModel(CLIPVisionConfig(**fields, hidden_act="quick_gelu"))
    use_quick_gelu(tower)
    return tower


def timm_tower(name: str, ours: PreTrainedModel) -> nn.Module:
    """timm's model with the weights of ours."""
    import timm

    model: Any = timm.create_model(TOWERS[name][1], pretrained=False, num_classes=0)
    if isinstance(ours.config, Eva02Config):
        state = {k: v for k, v in eva_state(ours.state_dict(), ours.config).items() if "rope" not in k}
        state = timm.models.eva.checkpoint_filter_fn(state, model)
        left = model.load_state_dict(state, strict=False)
        assert not left.unexpected_keys and all("k_bias" in key for key in left.missing_keys), left
        return model
    state = NAMES.to_theirs({f"vision_model.{k}": v for k, v in core_of(ours).state_dict().items()})
    model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, model))
    return model


def passes(model: nn.Module, forward: Callable[[], Tensor]) -> dict[str, Callable[[], None]]:
    """A forward pass in eval mode, and a training step's forward and backward."""

    def evaluate() -> None:
        model.eval()
        with torch.no_grad():
            forward()

    def train() -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        forward().square().mean().backward()

    return {"forward": evaluate, "forward and backward": train}


def compare(name: str, *, batch: int, rounds: int, clock: str, memory: dict[str, str]) -> None:
    """A table for a forward pass, and one for forward and backward."""
    ours = our_tower(name)
    theirs = timm_tower(name, ours)
    pixels = torch.randn(batch, 3, 224, 224)
    forwards = {"timm": lambda: theirs(pixels), "llm2clip": lambda: ours(pixel_values=pixels).pooler_output}
    with torch.no_grad():
        ours.eval()
        theirs.eval()
        difference = (forwards["timm"]() - forwards["llm2clip"]()).abs().max().item()
    assert difference < 1e-3, f"{name}: features differ by {difference}"
    works = {way: passes(model, forwards[way]) for way, model in (("timm", theirs), ("llm2clip", ours))}
    for kind in ("forward", "forward and backward"):
        runs = alternate({way: both[kind] for way, both in works.items()}, rounds)
        columns = {"MiB of a pass over 8 images": {"llm2clip": memory[name]}} if kind != "forward" else None
        about = f"{name}, {kind}, batch {batch}, features differ by {difference:.0e}"
        print_table(about, runs, amount=batch, unit="images", clock=clock, columns=columns)


def activation_mib(name: str, threads: int, checkpointing: bool) -> float:
    """Peak memory of a forward and backward pass over 8 images, without weights and gradients."""
    torch.set_num_threads(threads)
    ours = our_tower(name).train()
    if checkpointing:
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    pixels = torch.randn(8, 3, 224, 224)

    def forward_backward(images: Tensor) -> None:
        ours(pixel_values=images).pooler_output.square().mean().backward()

    forward_backward(pixels[:1])  # allocates the gradients
    return peak_growth(lambda: forward_backward(pixels))[0] / 2**20


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--towers", nargs="+", default=["eva02-b16", "clip-b16"], choices=list(TOWERS))
    options.add_argument("--batch", type=int, default=4, help="images per pass")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: for a busy machine")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.towers:
        plain, saved = (in_new_process(activation_mib, name, args.threads, flag) for flag in (False, True))
        memory = {name: f"{plain:,.0f}, with gradient checkpointing {saved:,.0f}"}
        compare(name, batch=args.batch, rounds=args.rounds, clock=args.clock, memory=memory)


if __name__ == "__main__":
    main()
