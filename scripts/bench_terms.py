"""What each term of the loss costs against infonce alone: on features, and in a training step with its frozen twin.

    python scripts/bench_terms.py --pairs 2048 --width 768 --tower vit-s --image-size 112 --batch 16 --rounds 3

The ways alternate. Prints two JSON lines, each with a way's median processor seconds (of a GPU: seconds), its ratio to
infonce round by round (median, lowest, highest), and the bytes of all tensors that it makes or changes and that are
alive at once (in a step also weights, optimizer states and the twin's averages), with the ratio.
"""

import argparse
import copy
import json
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from bench import Run, alternate, argument_parser, median_seconds
from bench_step import OPTIM, TOWERS, WIDTH
from torch import Tensor

from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.train.config import LossConfig
from llm2clip_plugin.train.deepspeed_config import EnginePlan, complete
from llm2clip_plugin.train.engine import Engine, start_ranks
from llm2clip_plugin.train.losses.base import Features, needs_reference, weighted_terms
from llm2clip_plugin.train.memory import LiveBytes
from llm2clip_plugin.train.model import trained_parameters
from llm2clip_plugin.train.optim import parameter_groups
from llm2clip_plugin.train.reference import Reference, frozen_copy
from llm2clip_plugin.train.step import TowerStep
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.family import DualConfig

CAPTIONS = 2  # of an image: for multi_positive, and in the features of every way
WAYS = {
    "infonce": LossConfig(),
    "infonce + distance": LossConfig(terms=("infonce", "distill=0.2048"), args=("distill.structure=0",)),
    "infonce + distance + structure": LossConfig(terms=("infonce", "distill=0.2048")),
    "cosine": LossConfig(terms=("cosine",)),
    "sigmoid": LossConfig(terms=("sigmoid",)),
    "multi_positive": LossConfig(terms=("multi_positive",)),
}


def main() -> None:
    """Measure the terms alone, then in a step."""
    parser = argument_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=2048, help="of the terms alone, on one rank")
    parser.add_argument("--width", type=int, default=768, help="of the features")
    parser.add_argument("--tower", default="vit-s", choices=list(TOWERS))
    parser.add_argument("--image-size", type=int, default=112, help="pixels a side, a multiple of 16")
    parser.add_argument("--batch", type=int, default=16, help="pairs of a step")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = start_ranks()
    alone = {name: on_features(config, options, device) for name, config in WAYS.items()}
    print(
        json.dumps({"terms of": options.pairs, "width": options.width, **compared(alone, options.rounds)}), flush=True
    )
    steps = {name: in_a_step(config, options) for name, config in WAYS.items()}
    about = {"steps of": options.batch, "tower": options.tower, "image_size": options.image_size}
    print(json.dumps({**about, **compared(steps, options.rounds)}), flush=True)


def compared(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Seconds, bytes and ratios of each way."""
    runs = alternate(ways, rounds)
    peaks = {name: peak(work) for name, work in ways.items()}
    base = runs["infonce"]
    return {
        name: {
            "seconds": median_seconds(runs[name]),
            "ratio": [round(value, 2) for value in spread(runs[name], base)],
            "megabytes": round(peaks[name] / 1e6, 1),
            "bytes_ratio": round(peaks[name] / peaks["infonce"], 2),
        }
        for name in ways
    }


def spread(runs: list[Run[Any]], base: list[Run[Any]]) -> tuple[float, float, float]:
    """Median, lowest and highest ratio of a round."""
    ratios = [run.seconds / other.seconds for run, other in zip(runs, base, strict=True)]
    return median(ratios), min(ratios), max(ratios)


def peak(work: Callable[[], Any]) -> int:
    """Bytes of the tensors that were made or changed, and alive at once: exact, without what an allocator adds."""
    with LiveBytes() as memory:
        work()
    return memory.peak


def on_features(config: LossConfig, options: argparse.Namespace, device: torch.device) -> Callable[[], Tensor]:
    """Forward and backward pass of the terms, on random features."""
    generator = torch.Generator().manual_seed(0)

    def features(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, options.width, generator=generator), dim=-1).to(device)

    anchor, positive = features(options.pairs), features(options.pairs, CAPTIONS)
    reference = F.normalize(anchor + 0.1 * features(options.pairs), dim=-1)
    leaves = [anchor.requires_grad_(), positive.requires_grad_()]
    scale, bias = torch.tensor([2.66], device=device), torch.tensor([-10.0], device=device)
    number = torch.arange(options.pairs, device=device)
    terms = weighted_terms(config)

    def work() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        given = Features(
            anchor_bD=anchor,
            positive_bkD=positive,
            log_scale=scale,
            bias=bias,
            caption_hashes=torch.stack([number + k * options.pairs for k in range(CAPTIONS)]),
            image_ids=number,
            reference_bD=reference,
        )
        loss = torch.stack([term(given) for term in terms.values()]).sum()
        loss.backward()
        return loss.detach()

    return work


def in_a_step(config: LossConfig, options: argparse.Namespace) -> Callable[[], float]:
    """A training step with these terms: one rank, ZeRO-0, fp32; the twin is an EMA, updated after each step."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    settings = CLIPVisionConfig(image_size=options.image_size, patch_size=16, **TOWERS[options.tower])
    bias = -10.0 if config.terms == ("sigmoid",) else None
    dual = DualEncoder(
        CLIPVisionModel(settings), DualConfig(projection_dim=512, llm_width=WIDTH, logit_bias_init=bias)
    ).train()
    frozen = frozen_copy(dual) if needs_reference(config) else None
    plan = EnginePlan(
        global_batch=options.batch,
        micro_batch=options.batch,
        accumulation=1,
        precision="fp32",
        optim=OPTIM,
        warmup_steps=0,
        total_steps=100,
        hidden_size=dual.tower.config.hidden_size,
    )
    groups = parameter_groups(trained_parameters(dual, OPTIM), OPTIM.weight_decay)
    engine = Engine(dual, groups, OPTIM, complete({}, plan))
    twin = Reference(engine, 0.999, module=frozen) if frozen is not None else None
    normalize = Normalize(ImageConfig(size=options.image_size), engine.device)
    step = TowerStep(engine, weighted_terms(config), seed=0, text_noise=False, normalize=normalize, reference=twin)
    batch = random_batch(options, captions=CAPTIONS if config.terms == ("multi_positive",) else 1)

    def work() -> float:
        loss, _ = step(copy.copy(batch))
        if twin is not None:
            twin.update()
        return loss

    return work


def random_batch(options: argparse.Namespace, *, captions: int) -> dict[str, Any]:
    """Random pixels and embeddings, as the loader hands them over."""
    generator = torch.Generator().manual_seed(0)
    size, side = options.batch, options.image_size
    hashes = torch.arange(size * captions).view(size, captions)
    embeddings = torch.randn(size, captions, WIDTH, generator=generator)
    return {
        "pixels": torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8, generator=generator),
        "embeddings": embeddings if captions > 1 else embeddings[:, 0],
        "caption_hashes": hashes if captions > 1 else hashes[:, 0],
        "image_ids": torch.arange(size),
        "keys": [str(number) for number in range(size)],
        "position": size,
    }


if __name__ == "__main__":
    main()
