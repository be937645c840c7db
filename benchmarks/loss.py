"""The blocked contrastive loss against the full matrix of logits, forward and backward.

    python -m benchmarks.loss --pairs 16384 --width 512

Each way runs in a new process, in which its peak memory is measured; the losses must be equal.
"""

import argparse

import torch
import torch.nn.functional as F

from benchmarks.common import Run, alternate_processes, parser, peak_growth, print_table, timed
from llm2clip_plugin.train.losses.infonce import contrastive_loss


def full_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The symmetric loss on the full matrix of logits."""
    logits = scale * image @ text.T
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits.float(), labels) + F.cross_entropy(logits.T.float(), labels)) / 2


LOSSES = {"full logits": full_loss, "llm2clip, in blocks": contrastive_loss}


def measure(way: str, args: argparse.Namespace) -> tuple[int, Run]:
    """Growth of the peak memory in one forward and backward pass, its time, and the loss."""
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype)
    torch.manual_seed(0)
    pairs = [F.normalize(torch.randn(args.pairs, args.width, device=device), dim=-1).to(dtype) for _ in range(2)]
    scale = torch.tensor([1 / 0.07], device=device, requires_grad=True)

    def forward_backward(count: int) -> float:
        loss = LOSSES[way](*(side[:count].requires_grad_() for side in pairs), scale)
        loss.backward()
        return loss.item()

    forward_backward(64)  # the first call loads kernels
    return peak_growth(lambda: timed(lambda: forward_backward(args.pairs)))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--pairs", type=int, default=16384)
    options.add_argument("--width", type=int, default=512, help="of the embeddings")
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    args = options.parse_args()
    runs, memory = alternate_processes(measure, LOSSES, args)
    loss = {way: f"{of_way[0].result:.7g}" for way, of_way in runs.items()}
    about = f"loss of {args.pairs} pairs, width {args.width}, {args.dtype}"
    print_table(about, runs, amount=1, unit="passes", loss=loss, **{"peak MiB": memory})


if __name__ == "__main__":
    main()
