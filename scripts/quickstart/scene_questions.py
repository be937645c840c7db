#!/usr/bin/env python3
"""What a small LLaVA says of composed scenes, by the teacher of its tower.

    scene_questions.py --data DATA/all --towers OUT/towers --llm GATE/llm --output OUT/questions \
        --arms permuted words tuned --seeds 0 1 2

As in inherited.py, the language model is frozen and the projector alone learns to read the tower,
from the training scenes' captions. It is asked about the test's scenes, whose pairs of concepts it
was never shown. Two scores:

- caption: the place of the right caption among 16, its twin's too, by what the picture adds to a
  caption's log-likelihood (inherited.py); .5 by chance.
- twins: 1 if of a scene and its twin both pictures prefer their own caption, and both captions
  their own picture, by the same numbers; 1 in 6 by chance.

``--arms``: towers/ARM-seedN below ``--towers``; scenes.sh trains them. ``--validation`` asks the
validation scenes instead. Intervals are over pairs of concepts and, if there are several, seeds.

Shapes: N scenes of a group, in which each scene is followed by its twin.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inherited import ORIGIN, TEMPLATE, llava_answers, places, refuse_other_origin
from inputs import Sample, read_tar
from miniature_data import Row, talk
from scene_scores import (
    ARMS,
    arms_table,
    compare_scores,
    comparisons_table,
    group_scores,
    mean_scores,
    twin_groups,
)

from llm2clip_plugin.atomic import atomic_directory, write_text
from llm2clip_plugin.hashes import files_sha256
from llm2clip_plugin.json_files import read_json_value as read_json

SCENES = 16  # of a group, whose captions are the choices
STEPS = 300  # of the projector
SCORES = {"caption": "caption among 16", "twins": "twins, 2 x 2"}  # primary first


def caption_of(sample: Sample) -> str:
    (caption,) = sample[2]["captions"]
    return caption["text"]


def caption_row(sample: Sample) -> Row:
    """A scene and its caption."""
    key = sample[0]
    return talk(key, "", caption_of(sample), f"{key}.png")


def held_out_groups(samples: Sequence[Sample]) -> list[list[Row]]:
    """The scenes in groups of ``SCENES``, each followed by its twin; a rest is left out."""
    scenes = [about["concept"] for _, _, about in samples]
    rows = []
    for scene, twin in twin_groups(scenes):
        for sample in (samples[scene], samples[twin]):
            about = {"name": caption_of(sample), "family": sample[2]["family"]}
            rows.append({**caption_row(sample), **about})
    starts = range(0, len(rows) - SCENES + 1, SCENES)
    return [rows[start : start + SCENES] for start in starts]


def write_data(data: Path, split: str, output: Path) -> None:
    """Write captions.json of the training scenes, groups.json of those of ``split``, and their
    images. Raises ValueError if there are too few, or if the folder is there with others."""
    shards = [data / "train-scenes.tar", data / f"{split}-scenes.tar"]
    made_from = {"split": split, "set of scenes": files_sha256(shards)}
    if output.exists():
        refuse_other_origin(output, made_from)
        return
    training, held_out = (read_tar(shard) for shard in shards)
    groups = held_out_groups(held_out)
    if not groups:
        raise ValueError(f"{data}: {len(held_out)} {split} scenes, fewer than {SCENES}")
    with atomic_directory(output) as temporary:
        images = temporary / "images"
        images.mkdir()
        for key, png, _ in (*training, *held_out):
            (images / f"{key}.png").write_bytes(png)
        (temporary / ORIGIN).write_text(json.dumps(made_from))
        rows = [caption_row(sample) for sample in training]
        (temporary / "captions.json").write_text(json.dumps(rows))
        (temporary / "groups.json").write_text(json.dumps(groups))
        (temporary / "chat_template.jinja").write_text(TEMPLATE)


def score(answers: Sequence[Sequence[Sequence[float]]]) -> dict[str, np.ndarray]:
    """Of all groups: the place of each scene's caption, and 1 or 0 for each pair of twins."""
    captions = []
    twins = []
    for group in answers:
        score_NN = np.array(group)
        captions.append(places(score_NN))
        added_NN = torch.tensor(score_NN - score_NN.mean(axis=0))
        pairs = [(number, number + 1) for number in range(0, len(added_NN), 2)]
        twins.append(group_scores(added_NN, pairs))
    return {"caption": np.concatenate(captions), "twins": np.concatenate(twins)}


def report(
    answers: Mapping[str, Any], groups: Sequence[Sequence[Row]]
) -> tuple[dict[str, Any], str]:
    """The record of all LLaVAs, by ``ARM-seedN``, and their tables."""
    scores = {name: score(of_llava) for name, of_llava in answers.items()}
    means = {name: mean_scores([of_llava]) for name, of_llava in scores.items()}
    pairs = [row["family"] for group in groups for row in group]
    pairs_of = {"caption": pairs, "twins": pairs[::2]}
    comparisons = compare_scores(scores, pairs_of)
    tables = [arms_table(means, SCORES)]
    if comparisons:
        tables.append(comparisons_table(comparisons, SCORES))
    return {"means": means, "comparisons": comparisons}, "\n".join(tables)


def run(
    data: Path,
    towers: Path,
    llm: Path,
    output: Path,
    arms: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    *,
    validation: bool = False,
) -> str:
    """Train and ask what is missing, write questions.json, and return its tables. Raises ValueError
    for an output that has other scenes."""
    split = "validation" if validation else "test"
    write_data(data, split, output / "data")
    groups = read_json(output / "data" / "groups.json")
    answers = llava_answers(towers, llm, output, arms, seeds, steps)
    record, tables = report(answers, groups)
    write_text(output / "questions.json", json.dumps(record, indent=2))
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of the scenes' shards"
    )
    parser.add_argument("--towers", type=Path, required=True)
    parser.add_argument("--llm", type=Path, required=True, help="LLaVA's, frozen")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", required=True, choices=list(ARMS)[1:])
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the projector")
    parser.add_argument(
        "--validation", action="store_true", help="ask validation scenes"
    )
    print(run(**vars(parser.parse_args())))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
