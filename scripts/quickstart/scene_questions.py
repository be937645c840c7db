#!/usr/bin/env python3
"""What a small LLaVA says of composed scenes, by the teacher of its tower.

    scene_questions.py --data DATA/all --towers OUT/towers --llm GATE/llm --output OUT/questions \
        --arms permuted words tuned --seeds 0 1 2

As in inherited.py, the language model is frozen and the projector alone learns to read the tower:
from the training scenes' captions, and from yes/no questions about them ("Is a cat left of an
owl?"), whose "no" has the drawings exchanged. It is asked about the test's scenes, whose pairs of
concepts it was never shown. Three scores:

- caption: the place of the right caption among 16, its twin's too, by what the picture adds to a
  caption's log-likelihood (inherited.py); .5 by chance.
- twins: 1 if of a scene and its twin both pictures prefer their own caption, and both captions
  their own picture, by the same numbers; 1 in 6 by chance.
- yes or no: the same for the log-odds of "yes" when asked whether a caption is true.

``--arms``: towers/ARM-seedN below ``--towers``; scenes.sh trains them. ``--validation`` asks the
validation scenes instead. Intervals are over pairs of concepts and, if there are several, seeds.

Shapes: N scenes of a group, which has a scene and its twin in a row; G pairs of twins.
"""

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inherited import TEMPLATE, llava_answers, log_likelihoods, open_llava, places
from inputs import Sample, read_tar
from miniature_data import YES_NO, Row, talk
from scene_scores import (
    ARMS,
    arms_table,
    compare_scores,
    comparisons_table,
    group_scores,
    mean_scores,
    twin_groups,
)
from scenes import RELATIONS

from llm2clip_plugin.atomic import atomic_directory, write_text
from llm2clip_plugin.json_files import read_json_value as read_json

SCENES = 16  # of a group, whose captions are the choices
STEPS = 300  # of the projector
SCORES = {  # first the one that was named first
    "caption": "caption among 16",
    "twins": "twins, 2 x 2",
    "yes_no": "twins by yes or no",
}

# of a group: (N, N) log-likelihoods of captions, a row a picture; (G, 2, 2) log-odds of "yes"
Answers = dict[str, Any]


def exchanged(caption: str) -> str:
    """The caption of a scene's twin."""
    for relation in RELATIONS:
        first, found, second = caption.partition(f" {relation} ")
        if found:
            return f"{second} {relation} {first}"
    raise ValueError(f"{caption!r} has none of the relations {', '.join(RELATIONS)}")


def question(caption: str) -> str:
    """Whether a caption is true: "a cat left of an owl" -> "Is a cat left of an owl?"."""
    return f"Is {caption}?"


def caption_of(sample: Sample) -> str:
    (caption,) = sample[2]["captions"]
    return caption["text"]


def training_rows(samples: Sequence[Sample]) -> list[Row]:
    """Of each scene its caption, and a question that is true or not."""
    draw = random.Random(0)
    rows = []
    for sample in samples:
        key = sample[0]
        caption = caption_of(sample)
        answer = draw.choice(YES_NO)
        asked = caption if answer == "yes" else exchanged(caption)
        rows.append(talk(key, "", caption, f"{key}.png"))
        rows.append(talk(f"{key}-{answer}", question(asked), answer, f"{key}.png"))
    return rows


def held_out_groups(samples: Sequence[Sample]) -> list[list[Row]]:
    """The scenes in groups of ``SCENES``, each followed by its twin; a rest is left out."""
    scenes = [about["concept"] for _, _, about in samples]
    rows = []
    for number in [number for pair in twin_groups(scenes) for number in pair]:
        key, _, about = samples[number]
        caption = caption_of(samples[number])
        row = talk(key, "", caption, f"{key}.png")
        rows.append({**row, "name": caption, "family": about["family"]})
    starts = range(0, len(rows) - SCENES + 1, SCENES)
    return [rows[start : start + SCENES] for start in starts]


def write_data(data: Path, split: str, output: Path) -> None:
    """Write captions.json of the training scenes, groups.json of those of ``split``, and their
    images. Raises ValueError if there are too few."""
    training = read_tar(data / "train-scenes.tar")
    held_out = read_tar(data / f"{split}-scenes.tar")
    groups = held_out_groups(held_out)
    if not groups:
        raise ValueError(f"{data}: {len(held_out)} {split} scenes, fewer than {SCENES}")
    with atomic_directory(output) as temporary:
        images = temporary / "images"
        images.mkdir()
        for key, png, _ in (*training, *held_out):
            (images / f"{key}.png").write_bytes(png)
        rows = training_rows(training)
        (temporary / "captions.json").write_text(json.dumps(rows))
        (temporary / "groups.json").write_text(json.dumps(groups))
        (temporary / "chat_template.jinja").write_text(TEMPLATE)


def ask(trained: Path, data: Path) -> list[Answers]:
    """What a LLaVA says of each group."""
    model, rows = open_llava(trained, data / "images")
    answers = []
    for group in read_json(data / "groups.json"):
        captions = [row["name"] for row in group]
        of_group = [
            log_likelihoods(model, rows, {**row, "names": captions}) for row in group
        ]
        log_odds = []
        for scene, twin in zip(group[::2], group[1::2], strict=True):
            of_twins = []
            for row in (scene, twin):
                odds = [
                    yes_log_odds(model, rows, row, caption)
                    for caption in (scene["name"], twin["name"])
                ]
                of_twins.append(odds)
            log_odds.append(of_twins)
        answers.append({"captions": torch.stack(of_group).tolist(), "yes": log_odds})
    return answers


def yes_log_odds(model: Any, rows: Any, row: Row, caption: str) -> float:
    """Log-odds of "yes" to "no" when asked whether a caption is true of a row's picture."""
    asked = talk(row["id"], question(caption), "", row["image"])
    yes, no = log_likelihoods(model, rows, {**asked, "names": YES_NO}).tolist()
    return yes - no


def score(answers: Sequence[Answers]) -> dict[str, np.ndarray]:
    """Of all groups: the place of each scene's caption, and 1 or 0 for each pair of twins."""
    captions = []
    twins = []
    yes_no = []
    for group in answers:
        score_NN = np.array(group["captions"])
        captions.append(places(score_NN))
        added_NN = torch.tensor(score_NN - score_NN.mean(axis=0))
        pairs = [(number, number + 1) for number in range(0, len(added_NN), 2)]
        twins.append(group_scores(added_NN, pairs))
        for odds in group["yes"]:
            yes_no.append(group_scores(torch.tensor(odds), [(0, 1)]))
    return {
        "caption": np.concatenate(captions),
        "twins": np.concatenate(twins),
        "yes_no": np.concatenate(yes_no),
    }


def report(
    answers: Mapping[str, Sequence[Answers]], groups: Sequence[Sequence[Row]]
) -> tuple[dict[str, Any], str]:
    """The record of all LLaVAs, by ``ARM-seedN``, and their tables."""
    scores = {name: score(of_llava) for name, of_llava in answers.items()}
    means = {name: mean_scores([of_llava]) for name, of_llava in scores.items()}
    pairs = [row["family"] for group in groups for row in group]
    pairs_of = {"caption": pairs, "twins": pairs[::2], "yes_no": pairs[::2]}
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
    """Train and ask what is missing, write questions.json, and return its tables."""
    if not (output / "data").exists():
        write_data(data, "validation" if validation else "test", output / "data")
    answers = llava_answers(ask, towers, llm, output, arms, seeds, steps)
    record, tables = report(answers, read_json(output / "data" / "groups.json"))
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
