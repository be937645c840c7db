#!/usr/bin/env python3
"""Choices of the two stages, measured in the quickstart's miniature: several trainings a side, paired by seed.

    scripts/quickstart/models.py --output DIR/models --image-size 56
    scripts/quickstart/shards.py --output DIR/data
    scripts/quickstart/choices.py scale DIR              the initial logit scale of stage 2
    scripts/quickstart/choices.py pairs DIR              direction, negatives and roles of stage 1's pairs

Trainings and caches are written below DIR; those that exist are kept. The tables are of the validation families: choose
by them, and only then look at ``--split test``. Each compares a side with the first: mean reciprocal rank, mean ±
standard deviation over the seeds, the difference of each seed, and their mean with a 95 % interval over families and
seeds.
"""

import argparse
import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from claims import Measured, interval, make_claims, p_value, signed
from page import Table, as_text, cell
from scores import SEEN_STYLES, SIDES, TESTS, caption_rows, teacher_queries, tower_scores
from shards import EMOJI, UNSEEN

from llm2clip_plugin import load_dual_encoder
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.vision.checkpoint import preprocessor_config

Scores = dict[str, Measured]  # row of a table -> every query
ROLES = (
    "--mix-kinds --pair-kinds short:long=.1 long:short=.1 short:keywords=.4 keywords:short=.4"  # drawn for each pair
)
PAIRS = {  # side -> options of finetune-llm; the first is the base
    "symmetric": "",
    "one-way": "--no-symmetric",
    "one-way-negative": "--no-symmetric --random-negatives",
    "one-way-negative-roles": f"--no-symmetric --random-negatives {ROLES}",  # as the paper does it
    "one-way-roles": f"--no-symmetric {ROLES}",
}
SCALES = {  # side -> options of train-tower
    "14.3": "--dual.logit-scale-init 2.6592600",
    "100": "--dual.logit-scale-init 4.6051702",
}


def run(command: str) -> None:
    """Run a command, with its output in view."""
    print(command, flush=True)
    subprocess.run(command.split(), check=True)


def made(root: Path, name: str) -> str:
    """``llm``, ``tower`` or ``dtype`` of models.json."""
    return json.loads((root / "models" / "models.json").read_text())[name]


def precision(root: Path) -> str:
    """Of tower training: the dtype that models.py found fastest."""
    return {"bfloat16": "bf16", "float16": "fp16"}.get(made(root, "dtype"), "fp32")


def tune(root: Path, side: str, seed: int) -> Path:
    """An adapter, trained as the quickstart does with the side's options."""
    output = root / "llm" / f"{side}-seed{seed}"
    if not (output / "adapter" / "llm2clip_encoder.json").is_file():
        run(
            f"llm2clip finetune-llm {EMOJI / 'train-noto.tar'} --llm {made(root, 'llm')} --output {output}"
            f" --seed {seed} --languages en --group family --pair-kinds short:long=0.2 short:keywords=0.8"
            f" --lists keywords=2:6 --r 16 --alpha 32 --dropout 0 --scale 20 --compute-dtype {made(root, 'dtype')}"
            f" --global-batch 64 --max-steps 12 --lr 1e-3 --warmup-steps 0 --warmup-ratio 0.1 {PAIRS[side]}"
        )
    return output / "adapter"


def embed(root: Path, adapter: Path, shards: str, cache: Path) -> EmbeddingCache:
    """The captions of shards through the LLM with an adapter."""
    given = f"--llm {made(root, 'llm')} --adapter {adapter} --compute-dtype {made(root, 'dtype')}"
    run(f"llm2clip embed {shards} {given} --cache {cache}")
    return EmbeddingCache.open(cache)


def pairs(root: Path, side: str, seed: int, split: str) -> Scores:
    """Train an adapter and measure caption retrieval: names -> keywords, long captions, and English names."""
    shard, cache = EMOJI / f"{split}-noto.tar", root / "teacher" / f"{side}-seed{seed}-{split}"
    embeddings = embed(root, tune(root, side, seed), str(shard), cache)
    source = open_source(SourceConfig(path=str(shard)))
    family = {meta["concept"]: meta["family"] for meta in (source[number].meta for number in range(len(source)))}
    return teacher_queries(caption_rows(source, embeddings), family)


def scale(root: Path, side: str, seed: int, split: str) -> Scores:
    """Train a tower with the seed's symmetric adapter and measure retrieval of the drawings by their captions."""
    cache, output = root / "cache" / f"seed{seed}", root / "towers" / f"scale{side}-seed{seed}"
    embeddings = embed(root, tune(root, next(iter(PAIRS)), seed), f"{root}/data/all/*.tar", cache)
    if not (output / "tower").is_dir():
        run(
            f"llm2clip train-tower --recipe quickstart --data {root}/data/all/train-*.tar --cache {cache}"
            f" --kinds short long --tower {made(root, 'tower')} --image-size 56 --heads.steps 100 --max-steps 50"
            f" --precision {precision(root)} --seed {seed} --output {output} {SCALES[side]}"
        )
    styles = {"test": f"{split}-{SEEN_STYLES}", "unseen style": f"{split}-{UNSEEN}"}
    sets = {name: open_source(SourceConfig(path=f"{root}/data/all/{shards}.tar")) for name, shards in styles.items()}
    images = ImageConfig.from_preprocessor(preprocessor_config(output / "tower"))
    scores = tower_scores(load_dual_encoder(output / "tower"), sets, embeddings, images)
    names = [name for name in TESTS if split == "test" or TESTS[name][1] != "other"]  # validation has English alone
    title_of = {name: name.replace("test families", f"{split} families") for name in names}
    return {f"{title_of[name]}, {title}": scores.queries(name, way) for name in names for way, title in SIDES.items()}


CHOICES: dict[str, tuple[Mapping[str, str], Callable[[Path, str, int, str], Scores]]] = {
    "pairs": (PAIRS, pairs),
    "scale": (SCALES, scale),
}


def compared(base: Mapping[int, Scores], new: Mapping[int, Scores], names: tuple[str, str]) -> Table:
    """A row of each test: both sides, the differences seed by seed, and their mean with its interval."""
    against_zero = {}
    for test in base[min(base)]:
        change = {
            seed: replace(new[seed][test], scores=new[seed][test].scores - base[seed][test].scores) for seed in base
        }
        against_zero[test] = ({seed: replace(one, scores=0 * one.scores) for seed, one in change.items()}, change)
    rows = []
    for claim in make_claims(against_zero):
        sides = [cell([float(side[seed][claim.name].scores.mean()) for seed in base]) for side in (base, new)]
        by_seed = " ".join(signed(one.difference) for one in claim.by_seed.values())
        rows.append([claim.name, *sides, by_seed, interval(claim.difference), p_value(claim.difference.p)])
    return Table(head=["mean reciprocal rank", *names, "by seed", "difference", "p"], rows=rows)


def main() -> None:
    """Parse the command line, train what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("choice", choices=CHOICES)
    parser.add_argument("root", type=Path, metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    options = parser.parse_args()
    sides, measure = CHOICES[options.choice]
    scores = {
        side: {seed: measure(options.root, side, seed, options.split) for seed in options.seeds} for side in sides
    }
    first, *others = sides
    for side in others:
        print(as_text(compared(scores[first], scores[side], (first, side))), end="\n\n")


if __name__ == "__main__":
    main()
