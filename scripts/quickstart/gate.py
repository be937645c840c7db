#!/usr/bin/env python3
"""Does what a teacher knows reach what LLaVA reads? Asked by a ridge regression, in minutes, before
any LLaVA is trained.

    gate.py --data quickstart-output/data --output quickstart-output/table \
        --before quickstart-output/models/dinov2-vits14-56px

LLaVA 1.5 reads the patches of the block before the last. The ridge regression maps them to the
embedding of a picture's name. It is fitted to half of the training families, and is asked about
the other half: stage 2 saw these pictures with their names, the regression did not. So it stands
for a LLaVA that learns to read the tower from few concepts; what it knows of the others can only
come from how the teacher arranged them. Both halves are asked in turn, for several random halves.

An answer counts by the reciprocal rank of the right name among those of its half. Names are those
of a neutral LLM, the scaled-down LLaVA's own, which none of the teachers was made from; and, in a
second column, each teacher's own. The regression's settings are those with the best mean over all
towers for pictures of the validation families, with the neutral names.

Reads ``cache/`` and ``gate/`` below ``--data``, and the towers of ``ARMS`` below ``--output``;
writes ``gate.json`` there. gate.sh trains what is missing.

Shapes: N pictures, P patches, F features, n pictures that are fitted, C concepts, W width of a
name's embedding, S seeds.
"""

import argparse
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from claims import LEVEL, compare_seeds
from gate_caches import SPLITS, caption_embeddings, open_split
from measure import check_run
from torch import Tensor

from llava_integration.evaluator.compare.multiplicity import holm
from llm2clip_plugin.atomic import write_text
from llm2clip_plugin.contracts import TeacherIdentity
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.sources import Source
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.evaluate.features import encode_images
from llm2clip_plugin.report_text import estimate, markdown_table, p_value, spread
from llm2clip_plugin.vision.directory import read_json
from llm2clip_plugin.vision.dual import read_dual_card
from llm2clip_plugin.vision.towers import load_tower, preprocessor_config

BEFORE = "before"
NEUTRAL = "neutral"  # the cache of the names that everything is asked for
# teacher of a tower -> what the tables call it
ARMS = {
    BEFORE: "before stage 2",
    "random": "random embeddings",
    "permuted": "fine-tuned LLM, permuted over concepts",
    "spelling": "random vectors of letters",
    "raw": "raw LLM, read well",
    "map": "linear map on the raw LLM",
    "tuned": "fine-tuned LLM",
    "oracle": "oracle: the neutral LLM itself",
}
# (base, new), fixed before either was measured; p is adjusted for all that are there
COMPARISONS = (
    ("permuted", "tuned"),
    ("permuted", "raw"),
    ("permuted", "map"),
    ("permuted", "oracle"),
    ("spelling", "tuned"),
    ("spelling", "raw"),
    ("spelling", "map"),
    ("spelling", "oracle"),
    ("raw", "tuned"),
    ("map", "tuned"),
)
HALVES = 5  # random ones, each asked both ways
POOLS = ("mean", "patches")  # of the patches: their mean, or all of them side by side
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # times the mean eigenvalue

Names = dict[str, Tensor]  # concept -> the embedding of its name, (W,)


@dataclass(frozen=True)
class Pictures:
    """What LLaVA reads of the training and validation pictures, in every style."""

    split: list[str]  # N
    concept: list[str]  # N
    family: list[str]  # N
    kernels: dict[str, Tensor]  # of POOLS: (N, N), the features' inner products

    def of_split(self, split: str) -> list[int]:
        """The numbers of a split's pictures."""
        return [number for number, name in enumerate(self.split) if name == split]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Of the ridge regression."""

    pool: str
    penalty: float


# What LLaVA reads


def read_pictures(tower: Path, sources: Mapping[str, Source]) -> Pictures:
    """The features of a tower directory, in bfloat16, as LLaVA trains; ``sources``: by split."""
    model = load_tower(tower, dtype=torch.bfloat16)
    images = ImageConfig.from_preprocessor(preprocessor_config(tower))

    def patches(pixels: Tensor) -> Tensor:
        output = model(pixels.bfloat16(), output_hidden_states=True)
        return output.hidden_states[-2][:, 1:]  # without the class token, as LLaVA

    splits: list[str] = []
    meta: list[dict[str, Any]] = []
    features = []
    for split, source in sources.items():
        encoded = encode_images(
            patches, source, images, torch.device("cpu"), quiet=True
        )
        features.append(encoded.joined())
        meta += encoded.meta
        splits += [split] * len(encoded.meta)
    feature_NPH = torch.cat(features)
    kernels = {
        "mean": kernel(feature_NPH.mean(dim=1)),
        "patches": kernel(feature_NPH.flatten(1)),
    }
    concepts = [about["concept"] for about in meta]
    families = [about["family"] for about in meta]
    return Pictures(splits, concepts, families, kernels)


def kernel(feature_NF: Tensor) -> Tensor:
    """(N, N) inner products of the features without their mean."""
    centered_NF = feature_NF - feature_NF.mean(dim=0)
    return centered_NF @ centered_NF.T


# The regression


def reciprocal_ranks(
    pictures: Pictures,
    fit: Sequence[int],
    ask: Sequence[int],
    names: Names,
    setting: Setting,
) -> np.ndarray:
    """A score for each of ``ask``: 1 / the rank of its name among the names of ``ask``, by the
    regression that is fitted to ``fit``. Equal names share the mean of their ranks."""
    fit_concepts = [pictures.concept[number] for number in fit]
    asked = sorted({pictures.concept[number] for number in ask})
    mean_W = torch.stack([names[c] for c in sorted(set(fit_concepts))]).mean(dim=0)
    target_nW = unit(torch.stack([names[c] for c in fit_concepts]) - mean_W)
    item_CW = unit(torch.stack([names[c] for c in asked]) - mean_W)
    predicted_NW = ridge(
        pictures.kernels[setting.pool], fit, ask, target_nW, setting.penalty
    )
    score_NC = unit(predicted_NW) @ item_CW.T
    column_of = {concept: column for column, concept in enumerate(asked)}
    own_N = torch.tensor([column_of[pictures.concept[number]] for number in ask])
    right_N1 = score_NC.gather(1, own_N[:, None])
    higher_N = (score_NC > right_N1).sum(dim=1)
    equal_N = (score_NC == right_N1).sum(dim=1)
    rank_N = 1 + higher_N + (equal_N - 1) / 2
    return (1 / rank_N).numpy()


def unit(rows_NW: Tensor) -> Tensor:
    """Rows of length 1."""
    return F.normalize(rows_NW, dim=1)


def ridge(
    kernel_NN: Tensor,
    fit: Sequence[int],
    ask: Sequence[int],
    target_nW: Tensor,
    penalty: float,
) -> Tensor:
    """The prediction (len(ask), W) of the ridge regression fitted to ``fit``, in its dual form."""
    mean_W = target_nW.mean(dim=0)
    fit_nn = kernel_NN[fit][:, fit]
    asked_Nn = kernel_NN[ask][:, fit]
    eigenvalue = fit_nn.trace() / len(fit)
    penalized_nn = fit_nn + penalty * eigenvalue * torch.eye(len(fit))
    weight_nW = torch.linalg.solve(penalized_nn, target_nW - mean_W)
    return asked_Nn @ weight_nW + mean_W


def halves(pictures: Pictures, seed: int) -> tuple[list[int], list[int]]:
    """The training pictures in two halves, families kept together."""
    numbers = pictures.of_split("train")
    size_of = Counter(pictures.family[number] for number in numbers)
    families = sorted(size_of)
    random.Random(seed).shuffle(families)
    first: set[str] = set()
    size = 0
    for family in families:
        if size < len(numbers) / 2:
            first.add(family)
            size += size_of[family]
    first_half = [number for number in numbers if pictures.family[number] in first]
    second_half = [number for number in numbers if pictures.family[number] not in first]
    return first_half, second_half


def ask_halves(pictures: Pictures, names: Names, setting: Setting) -> np.ndarray:
    """The mean score of each training picture over all halves."""
    numbers = pictures.of_split("train")
    total = np.zeros(len(pictures.split))
    for seed in range(HALVES):
        first_half, second_half = halves(pictures, seed)
        for fit, ask in ((first_half, second_half), (second_half, first_half)):
            total[ask] += reciprocal_ranks(pictures, fit, ask, names, setting)
    return total[numbers] / HALVES


def ask_validation(
    towers: Mapping[str, Pictures], names: Names
) -> dict[tuple[str, float], float]:
    """(pool, penalty) -> the mean score over all towers for pictures of the validation families,
    fitted to all training pictures."""
    means = {}
    for pool, penalty in itertools.product(POOLS, PENALTIES):
        setting = Setting(pool=pool, penalty=penalty)
        scores = []
        for pictures in towers.values():
            fit = pictures.of_split("train")
            ask = pictures.of_split("validation")
            scores.append(reciprocal_ranks(pictures, fit, ask, names, setting).mean())
        means[pool, penalty] = float(np.mean(scores))
    return means


# Towers and names


def find_towers(
    output: Path, before: Path, arms: Iterable[str] = ARMS
) -> dict[str, Path]:
    """``ARM`` or ``ARM-seedN`` -> tower directory. Raises FileNotFoundError without a trained
    one."""
    towers = {BEFORE: before}
    for path in sorted((output / "towers").glob("*-seed*")):
        if path.name.partition("-seed")[0] in arms:
            towers[path.name] = path
    if len(towers) == 1:
        raise FileNotFoundError(
            f"no towers of {', '.join(arms)} in {output / 'towers'}; run gate.sh"
        )
    return towers


def cache_folder(data: Path, name: str) -> Path:
    """Where the teacher's embeddings of a tower are, by the tower's name."""
    arm = name.partition("-seed")[0]
    if arm == "oracle":
        return data / "gate" / NEUTRAL
    if arm in ("permuted", "spelling"):
        return data / "gate" / name
    if arm in ("raw", "random"):
        return data / "cache" / arm
    return data / "cache" / name


def own_cache(data: Path, tower: Path) -> EmbeddingCache:
    """The cache that a tower was trained against. Raises ContractError if it was trained against
    another, or on other shards than its name says."""
    check_run(tower)
    card, _ = read_dual_card(tower)
    teacher = TeacherIdentity(**card.teacher)
    return EmbeddingCache.open(
        cache_folder(data, tower.name), expect_fingerprint=teacher.fingerprint
    )


def name_embeddings(
    sources: Mapping[str, Source], cache: EmbeddingCache
) -> dict[str, Tensor]:
    """Concept -> the embedding of its English name."""
    names = {}
    for source in sources.values():
        for concept, rows in caption_embeddings(source, cache).items():
            names[concept] = rows["short", "en"]
    return names


# What it shows


def seeds_of(scores: Mapping[str, np.ndarray], arm: str) -> dict[int, np.ndarray]:
    """Seed -> the scores of an arm's tower; {} for ``before``, which has none."""
    runs = {}
    for name, score_N in scores.items():
        side, _, seed = name.partition("-seed")
        if side == arm and seed:
            runs[int(seed)] = score_N
    return dict(sorted(runs.items()))


def compare_arms(
    scores: Mapping[str, np.ndarray],
    families: list[str],
    comparisons: Iterable[tuple[str, str]] = COMPARISONS,
) -> list[dict[str, Any]]:
    """New minus base of each of ``comparisons`` that two towers of one seed have: same pictures,
    intervals over families and seeds."""
    rows = []
    for base, new in comparisons:
        old_runs = seeds_of(scores, base)
        new_runs = seeds_of(scores, new)
        seeds = sorted(old_runs.keys() & new_runs.keys())
        if not seeds:
            continue
        difference_SN = [new_runs[seed] - old_runs[seed] for seed in seeds]
        result = compare_seeds(difference_SN, families)
        rows.append(
            {
                "base": base,
                "new": new,
                "seeds": seeds,
                "by_seed": [float(row.mean()) for row in difference_SN],
                "difference": float(np.mean(difference_SN)),
                "interval": list(result.interval(1 - LEVEL)),
                "p": result.p(),
            }
        )
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_adjusted"] = p
        row["significant"] = bool(p < LEVEL)
    return rows


def arms_table(neutral: Mapping[str, float], own: Mapping[str, float]) -> str:
    """A row per arm: the mean over its seeds in either column."""
    rows = []
    for arm, title in ARMS.items():
        names = [name for name in neutral if name.partition("-seed")[0] == arm]
        if not names:
            continue
        owned = [own[name] for name in names if name in own]
        rows.append(
            (
                title,
                str(len(names)) if arm != BEFORE else "",
                spread([neutral[name] for name in names]),
                spread(owned) if owned else "",
            )
        )
    head = ("teacher of the tower", "seeds", "names of the neutral LLM", "own names")
    return markdown_table(head, rows)


def comparisons_table(
    rows: Sequence[Mapping[str, Any]], score: str = "names of the neutral LLM"
) -> str:
    """A row per comparison; ``score``: what is compared."""
    cells = []
    for row in rows:
        p = p_value(row["p_adjusted"])
        if not row["significant"]:
            p += ", not shown"
        title = f"{ARMS[row['new']]} minus {ARMS[row['base']]}"
        difference = estimate(row["difference"], row["interval"])
        cells.append((title, str(len(row["seeds"])), difference, p))
    head = (score, "seeds", "difference", "p (Holm)")
    return markdown_table(head, cells)


def make_report(data: Path, output: Path, before: Path) -> str:
    """Ask every tower, write ``gate.json``, and return the tables."""
    sources = {split: open_split(data / "all", split) for split in SPLITS}
    paths = find_towers(output, before)
    neutral = name_embeddings(sources, EmbeddingCache.open(data / "gate" / NEUTRAL))
    own_names = {}
    steps = set()
    for name, path in paths.items():
        if name != BEFORE:
            own_names[name] = name_embeddings(sources, own_cache(data, path))
            steps.add(max_steps(path))
    if len(steps) > 1:
        raise ContractError(
            f"{output / 'towers'} has towers of {sorted(steps)} steps; expected one number"
        )
    towers = {name: read_pictures(path, sources) for name, path in paths.items()}
    means = ask_validation(towers, neutral)
    pool, penalty = max(means, key=means.__getitem__)
    setting = Setting(pool=pool, penalty=penalty)
    scores = {}
    own_means = {}
    for name, pictures in towers.items():
        scores[name] = ask_halves(pictures, neutral, setting)
        if name in own_names:
            own_score_N = ask_halves(pictures, own_names[name], setting)
            own_means[name] = float(own_score_N.mean())
    any_tower = towers[BEFORE]
    families = [any_tower.family[number] for number in any_tower.of_split("train")]
    comparisons = compare_arms(scores, families)
    mean_scores = {name: float(score_N.mean()) for name, score_N in scores.items()}
    record = {
        "steps": steps.pop(),
        "setting": vars(setting),
        "validation": [[*key, value] for key, value in means.items()],
        "neutral": mean_scores,
        "own": own_means,
        "comparisons": comparisons,
    }
    write_text(output / "gate.json", json.dumps(record, indent=2))
    note = (
        f"{record['steps']} steps of stage 2; mean reciprocal rank of the right name; ridge "
        f"regression on {pool}, penalty {penalty}, chosen on validation families"
    )
    lines = [note, "", arms_table(mean_scores, own_means)]
    if comparisons:
        lines.append(comparisons_table(comparisons))
    return "\n".join(lines)


def max_steps(tower: Path) -> int:
    """The steps of a tower's training, from its run's record."""
    run = tower.parents[1] / "runs" / tower.name / "run.json"
    return read_json(run)["config"]["train"]["max_steps"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--before", type=Path, required=True, help="the tower before stage 2"
    )
    print(make_report(**vars(parser.parse_args())))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
