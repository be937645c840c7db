"""The blocked contrastive loss against the full matrix of logits, forward and backward.

    python -m scripts.benchmarks.loss --pairs 16384 --width 512

Each way runs in a new process, in which its peak memory is measured; the losses must be equal.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from llm2clip_plugin.train.losses.infonce import contrastive_loss
from scripts.benchmarks.common import DTYPES, alternate_processes, parse, print_table


def full_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The symmetric loss on the full matrix of logits."""
    logits = (scale * image @ text.T).float()
    labels = torch.arange(len(image), device=image.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def prepare(loss_of: Callable[..., Tensor], args: Namespace) -> Callable[[], float]:
    """One forward and backward pass."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)

    def embeddings() -> Tensor:
        rows = torch.randn(args.pairs, args.width, device=device)
        return normalize(rows, dim=-1).to(dtype)

    images = embeddings()
    texts = embeddings()
    scale = torch.tensor([1 / 0.07], device=device, requires_grad=True)

    def forward_backward(count: int = args.pairs) -> float:
        image = images[:count].requires_grad_()
        text = texts[:count].requires_grad_()
        loss = loss_of(image, text, scale)
        loss.backward()
        return loss.item()

    forward_backward(64)  # the first call loads kernels
    return forward_backward


if __name__ == "__main__":
    sizes: dict[str, Any] = {
        "pairs": (16384, "of the batch"),
        "width": (512, "of the embeddings"),
    }
    args = parse(__doc__, **sizes, dtype=("float32", "of the embeddings", *DTYPES))
    ways = {
        "full logits": partial(prepare, full_loss),
        "llm2clip, in blocks": partial(prepare, contrastive_loss),
    }
    runs, memory = alternate_processes(ways, args, args.rounds)
    losses = {}
    for way, runs_of_way in runs.items():
        _, loss = runs_of_way[0]
        losses[way] = f"{loss:.7g}"
    about = f"loss of {args.pairs} pairs, width {args.width}, {args.dtype}"
    columns = {"loss": losses, "peak MiB": memory}
    print_table(about, runs, amount=1, unit="passes", **columns)
