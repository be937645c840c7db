#!/usr/bin/env python3
"""Captions per second of ``llm2clip embed`` and of a naive loop, on captions of mixed length.

    scripts/bench_embed.py --llm PATH_OR_HUB_ID [--captions 256]

The naive loop takes captions in order, in batches of a fixed size padded to the longest, and averages the unmasked
states. Both use the same model and dtype in one process, in turns, and their embeddings must agree.
"""

from __future__ import annotations

import argparse
import json
import random
import time

import torch

from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.settings import EncoderConfig

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


def timed(run) -> tuple[float, torch.Tensor]:
    """Seconds and result of ``run()``; on a CPU process time, which excludes other work on the machine."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    started = clock()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started, result


def main() -> None:
    """Run both in turns and print a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True)
    parser.add_argument("--captions", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32, help="batch size of the naive loop, in captions")
    parser.add_argument("--compute-dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    encoder = CaptionEncoder(EncoderConfig(llm=args.llm, compute_dtype=args.compute_dtype))
    captions = mixed_captions(args.captions)
    encoder.encode(captions[:8])
    naive, ours = [], []
    cosine = 1.0
    for _ in range(args.repeats):
        seconds, left = timed(lambda: arrival_order(encoder, captions, args.batch))
        naive.append(seconds)
        seconds, right = timed(lambda: encoder.encode(captions))
        ours.append(seconds)
        cosine = min(cosine, float(torch.nn.functional.cosine_similarity(left, right).min()))
    best = min(naive), min(ours)
    print(
        json.dumps(
            {
                "captions": args.captions,
                "tokens": sum(map(len, encoder.tokenize(captions))),
                "dtype": str(encoder.dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "arrival_order_captions_per_s": round(args.captions / best[0], 2),
                "ours_captions_per_s": round(args.captions / best[1], 2),
                "times_faster": round(best[0] / best[1], 2),
                "times_faster_each_repeat": [round(a / b, 2) for a, b in zip(naive, ours, strict=True)],
                "least_cosine_between_embeddings": round(cosine, 6),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
