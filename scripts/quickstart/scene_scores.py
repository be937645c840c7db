#!/usr/bin/env python3
"""What towers that were trained on composed scenes know of scenes that they did not see.

    scene_scores.py --data quickstart-output/scenes --output quickstart-output/scenes-towers \
        --before quickstart-output/models/dinov2-vits14-56px

As in gate.py, a ridge regression maps the patches that LLaVA reads to a caption's embedding, and it
is fitted to the same training scenes for every tower, also for the one before stage 2 and for those
that were trained with twins. The captions are those of a neutral LLM, which no teacher was made
from. Two scores on the test's scenes, whose pairs of concepts no training scene shows:

- retrieval: the reciprocal rank of a picture's caption among those of all test scenes, its twin's
  too.
- twins: 1 if of a scene and its twin both pictures prefer their own caption, and both captions
  their own picture, else 0. Chance is 1 in 6.

The regression's settings are those with the best mean over all towers on validation scenes, for
each of the scores. Reads ``all/`` and ``cache/`` below ``--data``, and ``towers/`` and ``runs/``
below ``--output``; writes ``scenes.json`` there. scenes.sh trains what is missing.

Shapes: N scenes of a split, G pairs of twins.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import LEVEL
from gate import ARMS as GATE_ARMS
from gate import (
    BEFORE,
    NEUTRAL,
    PENALTIES,
    POOLS,
    Names,
    Pictures,
    Setting,
    compare_arms,
    find_towers,
    max_steps,
    read_pictures,
    ridge,
    unit,
)
from gate_caches import open_split
from measure import check_run
from scenes import PARTS, twin_of
from torch import Tensor

from llava_integration.evaluator.compare.multiplicity import holm
from llm2clip_plugin.atomic import write_text
from llm2clip_plugin.contracts import TeacherIdentity
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.sources import Source
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.report_text import estimate, markdown_table, p_value, spread
from llm2clip_plugin.vision.dual import read_dual_card

ARMS = {
    BEFORE: GATE_ARMS[BEFORE],
    "random": GATE_ARMS["random"],
    "permuted": "fine-tuned LLM, permuted over captions",
    "words": "random vectors of words, their sum",
    "raw": GATE_ARMS["raw"],
    "map": GATE_ARMS["map"],
    "tuned": GATE_ARMS["tuned"],
}
WITH_TWINS = "-twins"  # at the end of an arm's name: twins in its training
ARMS |= {
    arm + WITH_TWINS: f"{title}, twins in training"
    for arm, title in ARMS.items()
    if arm != BEFORE
}
# (base, new), as in gate.py
COMPARISONS = (
    ("permuted", "tuned"),
    ("permuted", "raw"),
    ("permuted", "map"),
    ("raw", "tuned"),
    ("map", "tuned"),
    ("words", "tuned"),
    ("words", "raw"),
    ("words", "map"),
)
# with twins in training; planned later, so that these are a family of their own
TWINS_COMPARISONS = (
    ("permuted-twins", "tuned-twins"),
    ("words-twins", "tuned-twins"),
    ("tuned", "tuned-twins"),
    ("words", "words-twins"),
)
SPLITS = ("train", "validation", "test")
# of the captions' covariance, in mean eigenvalues: smaller ones hardly count more than this
WHITENING = 0.1
SCORES = {"retrieval": "caption among all", "twins": "twins, 2 x 2"}  # primary first

Scores = dict[str, np.ndarray]  # of SCORES: (N,), (G,)


# One tower


def score_matrix(
    pictures: Pictures, captions: Names, split: str, setting: Setting
) -> Tensor:
    """(N, N) cosine of each picture's prediction and each caption of a split; the regression is
    fitted to the training scenes."""
    fit = pictures.of_split("train")
    ask = pictures.of_split(split)
    fit_rows = torch.stack([captions[pictures.concept[number]] for number in fit])
    ask_rows = torch.stack([captions[pictures.concept[number]] for number in ask])
    mean_W = fit_rows.mean(dim=0)
    kernel_NN = pictures.kernels[setting.pool]
    predicted_NW = ridge(kernel_NN, fit, ask, unit(fit_rows - mean_W), setting.penalty)
    return unit(predicted_NW) @ unit(ask_rows - mean_W).T


def reciprocal_ranks(score_NN: Tensor) -> np.ndarray:
    """(N,) of the right captions, which are the diagonal; equal scores share the mean rank."""
    right_N1 = score_NN.diagonal()[:, None]
    higher_N = (score_NN > right_N1).sum(dim=1)
    equal_N = (score_NN == right_N1).sum(dim=1)
    return (1 / (1 + higher_N + (equal_N - 1) / 2)).numpy()


def twin_groups(scenes: Sequence[str]) -> list[tuple[int, int]]:
    """The numbers of each scene and its twin."""
    number_of = {scene: number for number, scene in enumerate(scenes)}
    return [
        (number, number_of[twin_of(scene)])
        for scene, number in number_of.items()
        if scene.endswith(PARTS[0])
    ]


def group_scores(score_NN: Tensor, groups: Sequence[tuple[int, int]]) -> np.ndarray:
    """(G,) 1 where both pictures prefer their caption, and both captions their picture."""
    scores = []
    for scene, twin in groups:
        right = min(score_NN[scene, scene], score_NN[twin, twin])
        wrong = max(score_NN[scene, twin], score_NN[twin, scene])
        scores.append(1.0 if right > wrong else 0.0)
    return np.array(scores)


def ask_tower(
    pictures: Pictures, captions: Names, split: str, setting: Setting
) -> Scores:
    """Both scores of a tower with one setting."""
    score_NN = score_matrix(pictures, captions, split, setting)
    scenes = [pictures.concept[number] for number in pictures.of_split(split)]
    return {
        "retrieval": reciprocal_ranks(score_NN),
        "twins": group_scores(score_NN, twin_groups(scenes)),
    }


def ask_validation(
    towers: Mapping[str, Pictures], captions: Names
) -> dict[Setting, dict[str, float]]:
    """Setting -> the mean over all towers of each score on validation scenes."""
    means = {}
    for pool, penalty in itertools.product(POOLS, PENALTIES):
        setting = Setting(pool=pool, penalty=penalty)
        asked = [
            ask_tower(pictures, captions, "validation", setting)
            for pictures in towers.values()
        ]
        means[setting] = mean_scores(asked)
    return means


def mean_scores(towers: Sequence[Scores]) -> dict[str, float]:
    """The mean over towers of each score."""
    means = {}
    for name in towers[0]:
        means[name] = float(np.mean([scores[name].mean() for scores in towers]))
    return means


# All towers


def cache_name(tower: str) -> str:
    """The folder in ``cache/`` of a tower's teacher, by the tower's name."""
    arm, _, seed = tower.partition("-seed")
    teacher = arm.removesuffix(WITH_TWINS)
    return teacher if teacher in ("raw", "random") else f"{teacher}-seed{seed}"


def check_teacher(data: Path, tower: Path) -> None:
    """Raise ContractError if a tower was trained on other shards, or against another teacher, than
    its name says."""
    check_run(tower)
    card, _ = read_dual_card(tower)
    teacher = TeacherIdentity(**card.teacher)
    folder = data / "cache" / cache_name(tower.name)
    EmbeddingCache.open(folder, expect_fingerprint=teacher.fingerprint)


def scene_captions(sources: Mapping[str, Source], cache: EmbeddingCache) -> Names:
    """Scene -> the embedding of its caption."""
    captions = {}
    for source in sources.values():
        for number in range(len(source)):
            sample = source[number]
            rows = cache.rows(*source.locate(number), sample.captions, key=sample.key)
            captions[sample.meta["concept"]] = rows[0]
    return captions


def whitened(captions: Names, scenes: Sequence[str]) -> Names:
    """The embeddings in coordinates in which those of ``scenes`` vary alike in all directions, but
    for the smallest."""
    fitted_NW = torch.stack([captions[scene] for scene in scenes]).double()
    mean_W = fitted_NW.mean(dim=0)
    centered_NW = fitted_NW - mean_W
    covariance_WW = centered_NW.T @ centered_NW / len(scenes)
    variance_W, direction_WW = torch.linalg.eigh(covariance_WW)
    scale_W = (variance_W.clamp(min=0) + WHITENING * variance_W.mean()).rsqrt()
    root_WW = direction_WW * scale_W
    return {
        scene: ((row.double() - mean_W) @ root_WW).float()
        for scene, row in captions.items()
    }


def compare_scores(
    scores: Mapping[str, Scores], pairs_of: Mapping[str, list[str]]
) -> list[dict[str, Any]]:
    """``COMPARISONS`` and ``TWINS_COMPARISONS`` for each score, p adjusted within each of the two.
    ``pairs_of``: of a score, the pair of concepts of each value, whose scenes are right or wrong
    together."""
    return [
        *compare_family(scores, pairs_of, COMPARISONS),
        *compare_family(scores, pairs_of, TWINS_COMPARISONS),
    ]


def compare_family(
    scores: Mapping[str, Scores],
    pairs_of: Mapping[str, list[str]],
    comparisons: Sequence[tuple[str, str]],
) -> list[dict[str, Any]]:
    """These comparisons for each score, p adjusted for all of them."""
    rows = []
    for name in pairs_of:
        of_score = {tower: values[name] for tower, values in scores.items()}
        for row in compare_arms(of_score, pairs_of[name], comparisons):
            rows.append({"score": name, **row})
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_adjusted"] = p
        row["significant"] = bool(p < LEVEL)
    return rows


def arms_table(
    means: Mapping[str, Mapping[str, float]], titles: Mapping[str, str] = SCORES
) -> str:
    """A row per arm: the mean over its seeds of each score; ``titles``: of the scores."""
    rows = []
    for arm, title in ARMS.items():
        towers = [tower for tower in means if tower.partition("-seed")[0] == arm]
        if not towers:
            continue
        seeds = "" if arm == BEFORE else str(len(towers))
        row = [title, seeds]
        for name in titles:
            row.append(spread([means[tower][name] for tower in towers]))
        rows.append(tuple(row))
    return markdown_table(("teacher of the tower", "seeds", *titles.values()), rows)


def comparisons_table(
    rows: Sequence[Mapping[str, Any]], titles: Mapping[str, str] = SCORES
) -> str:
    """A row per score and comparison; ``titles``: of the scores."""
    cells = []
    for row in rows:
        p = p_value(row["p_adjusted"])
        if not row["significant"]:
            p += ", not shown"
        title = f"{ARMS[row['new']]} minus {ARMS[row['base']]}"
        difference = estimate(row["difference"], row["interval"])
        seeds = str(len(row["seeds"]))
        cells.append((titles[row["score"]], title, seeds, difference, p))
    head = ("score", "towers", "seeds", "difference", "p (Holm)")
    return markdown_table(head, cells)


def check_towers(data: Path, towers: Mapping[str, Path]) -> int:
    """The steps of all towers. Raises ContractError if they differ, or a tower is not what its name
    says."""
    steps = set()
    for name, path in towers.items():
        if name != BEFORE:
            check_teacher(data, path)
            steps.add(max_steps(path))
    if len(steps) > 1:
        raise ContractError(
            f"towers of {sorted(steps)} steps; expected one number: choose another --output"
        )
    return steps.pop()


def best_settings(
    validation: Mapping[Setting, Mapping[str, float]],
) -> dict[str, Setting]:
    """The setting with the best mean of each score."""
    settings = {}
    for score in SCORES:
        means = {setting: values[score] for setting, values in validation.items()}
        settings[score] = max(means, key=means.__getitem__)
    return settings


def make_report(
    data: Path, output: Path, before: Path, *, validation: bool = False
) -> str:
    """Ask every tower, write ``scenes.json``, and return the tables. ``validation``: ask validation
    scenes alone, and write nothing."""
    splits = SPLITS[:2] if validation else SPLITS
    sources = {split: open_split(data / "all", split) for split in splits}
    neutral = EmbeddingCache.open(data / "cache" / NEUTRAL)
    training = scene_captions({"train": sources["train"]}, neutral)
    captions = whitened(scene_captions(sources, neutral), list(training))
    paths = find_towers(output, before, ARMS)
    steps = check_towers(data, paths)
    towers = {name: read_pictures(path, sources) for name, path in paths.items()}
    validated = ask_validation(towers, captions)
    settings = best_settings(validated)
    split = splits[-1]
    scores = {}
    means = {}
    for name, pictures in towers.items():
        scores[name] = {
            score: ask_tower(pictures, captions, split, setting)[score]
            for score, setting in settings.items()
        }
        means[name] = mean_scores([scores[name]])
    comparisons = compare_scores(scores, pairs_of_scores(towers[BEFORE], split))
    record = {
        "steps": steps,
        "settings": {score: vars(setting) for score, setting in settings.items()},
        "validation": [
            {**vars(setting), **values} for setting, values in validated.items()
        ],
        "means": means,
        "comparisons": comparisons,
    }
    if not validation:
        write_text(output / "scenes.json", json.dumps(record, indent=2))
    note = f"{steps} steps of stage 2; {split} scenes; settings chosen on validation scenes"
    for score, setting in settings.items():
        note += f"; {SCORES[score]}: {setting.pool}, penalty {setting.penalty}"
    lines = [note, "", arms_table(means)]
    if comparisons:
        lines.append(comparisons_table(comparisons))
    return "\n".join(lines)


def pairs_of_scores(pictures: Pictures, split: str) -> dict[str, list[str]]:
    """Score -> the pair of concepts of each of its values."""
    numbers = pictures.of_split(split)
    pairs = [pictures.family[number] for number in numbers]
    groups = twin_groups([pictures.concept[number] for number in numbers])
    return {"retrieval": pairs, "twins": [pairs[scene] for scene, _ in groups]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--before", type=Path, required=True, help="the tower before stage 2"
    )
    parser.add_argument(
        "--validation",
        action="store_true",
        help="ask validation scenes, and leave the test's alone",
    )
    print(make_report(**vars(parser.parse_args())))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
