#!/usr/bin/env python3
"""Captions per second of ``llm2clip embed`` and of a naive loop, on captions of mixed length.

    scripts/bench_embed.py --llm PATH_OR_HUB_ID [--captions 256]

The naive loop encodes captions in order, in batches of a fixed size padded to the longest, and averages the unmasked
states. Both alternate in one process with the same model and dtype; the smallest cosine between their embeddings is
printed. Seconds are processor time on a CPU.
"""

import json
import random

import torch
from bench import alternate, argument_parser, speedups

from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import CaptionEncoder

WORDS = (
    "a red bicycle leans against the old brick wall of house near two sleeping dogs while people walk along quiet "
    "street under tall trees in warm evening light and small boat waits on calm lake"
).split()


def mixed_captions(count: int, seed: int = 0) -> list[str]:
    """Captions in random order, half of 4 to 16 words, half of 40 to 160, as in a data set with long captions."""
    rng = random.Random(seed)
    lengths = [rng.randint(4, 16) if i % 2 else rng.randint(40, 160) for i in range(count)]
    rng.shuffle(lengths)
    return [" ".join(rng.choices(WORDS, k=length)) for length in lengths]


@torch.inference_mode()
def arrival_order(encoder: CaptionEncoder, captions: list[str], batch: int) -> torch.Tensor:
    """Embeddings of padded batches in the captions' order."""
    tokenizer = encoder.tokenizer
    tokenizer.padding_side = "right"
    parts = []
    for start in range(0, len(captions), batch):
        inputs = tokenizer(captions[start : start + batch], return_tensors="pt", padding=True).to(encoder.device)
        hidden = encoder.model.llm(**inputs, use_cache=False).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        parts.append(((hidden * mask).sum(1) / mask.sum(1)).float().cpu())
    return torch.cat(parts)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--llm", required=True)
    parser.add_argument("--captions", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32, help="batch size of the naive loop, in captions")
    parser.add_argument("--compute-dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    encoder = CaptionEncoder(EncoderConfig(llm=args.llm, compute_dtype=args.compute_dtype))
    captions = mixed_captions(args.captions)
    encoder.encode(captions[:8])
    ways = {"naive": lambda: arrival_order(encoder, captions, args.batch), "ours": lambda: encoder.encode(captions)}
    runs = alternate(ways, args.repeats, warm_up=False)
    naive, ours = (min(run.seconds for run in runs[way]) for way in ways)
    cosine = min(
        float(torch.nn.functional.cosine_similarity(left.result, right.result).min())
        for left, right in zip(runs["naive"], runs["ours"], strict=True)
    )
    print(
        json.dumps(
            {
                "captions": args.captions,
                "tokens": sum(map(len, encoder.tokenize(captions))),
                "dtype": str(encoder.dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "arrival_order_captions_per_s": round(args.captions / naive, 2),
                "ours_captions_per_s": round(args.captions / ours, 2),
                "times_faster": round(naive / ours, 2),
                "times_faster_each_repeat": [round(ratio, 2) for ratio in speedups(runs["ours"], runs["naive"])],
                "least_cosine_between_embeddings": round(cosine, 6),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
