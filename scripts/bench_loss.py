"""The blocked contrastive loss against the full matrix of logits, forward and backward.

    python scripts/bench_loss.py --pairs 16384 --width 512

Each way runs in a new process, in which its peak memory is measured; prints one JSON line.
"""

import argparse
import json
from statistics import median

import torch
import torch.nn.functional as F
from bench import argument_parser, in_new_process, peak_growth, timed

from llm2clip_plugin.train.losses.infonce import contrastive_loss


def main() -> None:
    """Run both ways several times, alternating, and print medians and their ratios."""
    parser = argument_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=16384)
    parser.add_argument("--width", type=int, default=512, help="of the embeddings")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=LOSSES, help="run one way once, in this process")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options)))
        return
    rounds = [{way: in_new_process(measure, way, options) for way in LOSSES} for _ in range(options.repeats)]
    medians = {way: {key: median(r[way][key] for r in rounds) for key in rounds[0][way]} for way in LOSSES}
    ratios = {
        f"{key}_ratio": medians["blocked"][key] / medians["full"][key]
        for key in ("seconds", "cpu_seconds", "peak_bytes")
    }
    print(json.dumps({"pairs": options.pairs, "width": options.width, "dtype": options.dtype, **medians, **ratios}))


def full_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The symmetric loss on the full matrix of logits."""
    logits = scale * image @ text.T
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits.float(), labels) + F.cross_entropy(logits.T.float(), labels)) / 2


LOSSES = {"blocked": contrastive_loss, "full": full_loss}


def measure(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Wall and processor seconds of one forward and backward pass, growth of the peak memory, and the loss."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    pairs = [
        F.normalize(torch.randn(options.pairs, options.width, device=device), dim=-1).to(dtype).requires_grad_()
        for _ in range(2)
    ]
    scale = torch.tensor([1 / 0.07], device=device, requires_grad=True)

    def forward_backward(*sides: torch.Tensor) -> torch.Tensor:
        loss = LOSSES[way](*sides, scale)
        loss.backward()
        return loss

    forward_backward(*(side.detach()[:64].requires_grad_() for side in pairs))  # the first call loads kernels
    growth, run = peak_growth(lambda: timed(lambda: forward_backward(*pairs)), cuda=device == "cuda")
    return {"seconds": run.wall, "cpu_seconds": run.cpu, "peak_bytes": growth, "loss": run.result.item()}


if __name__ == "__main__":
    main()
