#!/usr/bin/env python3
"""Inherited words: can LLaVA name what it was never shown, because its tower's teacher knew it?

    inherited.py --towers OUT/towers --llm DATA/gate/llm --output OUT/inherited \
        --arms permuted oracle --seeds 0 1

Stage 2 saw every training emoji with its name; LLaVA is shown a part of them, A (half), and is
asked about others, B, of other families. It learns from a picture and its name alone, without a
question, as in LLaVA 1.5's pretraining, and its language model is frozen, so that all it learns is
to read the tower (the projector).

B has a concept of each of its families, and a picture of each. They are asked about in groups of
40, whose 40 names are the choices. What counts of a name is what the picture adds: its
log-likelihood minus the mean of that name's over the group's pictures, so that a language model
that does not look has nothing. A picture's score is the place of its own name: the share of the
other names for which the picture adds less (.5 by chance).

``--arms``: towers/ARM-seedN below ``--towers``; gate.sh trains them. Compared are the pairs that
gate.py compares; intervals are over families and, if there are several, seeds, which are paired.

Shapes: N pictures of a group, C names of it, T tokens of a name.
"""

import argparse
import copy
import inspect
import itertools
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import LEVEL, compare_seeds
from gate import ARMS, compare_arms, comparisons_table, seeds_of
from miniature import train_stage
from miniature_data import emoji, talk
from torch import Tensor

from llava_integration.serve.build import register
from llava_integration.serve.rows import LlavaRows
from llm2clip_plugin.atomic import atomic_directory, write_text
from llm2clip_plugin.cli import main as llm2clip
from llm2clip_plugin.hashes import files_sha256
from llm2clip_plugin.json_files import read_json_value as read_json
from llm2clip_plugin.report_text import fraction, markdown_table, spread
from llm2clip_plugin.vision.directory import WEIGHTS_FILE

# concepts of A, as gate.py fits to; with 100, and 80 steps, not even the oracle showed anything
SHOWN = 534
NAMES = 40  # of a group of B
STEPS = 300  # of the projector
BATCH = 16
CHANCE = 0.5  # of a place
ORIGIN = "made_from.json"  # what a folder was made from
STYLES = ("noto", "twemoji", "fluent")  # of the pictures of B, in turn
# as LLaVA's "plain": the picture, then its caption
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|im_end|>\n{% endif %}{% endfor %}"
)


class AnswerRows(LlavaRows):
    """A data collator whose batches ask the model for the logits of answers alone; the others cost
    time, and no label needs them."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        label_NT = batch["labels"]
        is_learned_T = (label_NT != -100).any(dim=0)
        first = int(is_learned_T.nonzero()[0])
        kept = len(is_learned_T) - first + 1  # a token follows from the one before it
        return {**batch, "labels": label_NT[:, -kept:], "logits_to_keep": kept}


def split_families(
    family_of: Mapping[str, str], shown: int, names: int
) -> tuple[list[str], list[list[str]]]:
    """A: the concepts of random families, ``shown`` or a few more; B: groups with a concept of each
    of ``names`` other families, as many as there are. Raises ValueError if there is none."""
    concepts: dict[str, list[str]] = {}
    for concept, family in sorted(family_of.items()):
        concepts.setdefault(family, []).append(concept)
    families = sorted(concepts)
    draw = random.Random(0)
    draw.shuffle(families)
    of_a: list[str] = []
    while families and len(of_a) < shown:
        of_a += concepts[families.pop()]
    if len(families) < names:
        raise ValueError(
            f"{len(families)} families are left for B, fewer than {names}; show fewer"
        )
    of_b = [draw.choice(concepts[family]) for family in families]
    starts = range(0, len(of_b) - names + 1, names)
    return of_a, [of_b[start : start + names] for start in starts]


def refuse_other_origin(folder: Path, made_from: Mapping[str, Any]) -> None:
    """Raises ValueError if what is in the folder was made from something else."""
    file = folder / ORIGIN
    before = read_json(file) if file.exists() else {}
    others = [name for name, value in made_from.items() if before.get(name) != value]
    if others:
        raise ValueError(
            f"{folder} was made with another {' and another '.join(others)}; remove this "
            "folder, or choose another --output"
        )


def write_data(output: Path, shown: int, names: int) -> None:
    """Write captions.json of A, groups.json of B, and their images. Raises ValueError if the folder
    is there with other numbers."""
    made_from = {"--shown": shown, "--names": names}
    if output.exists():
        refuse_other_origin(output, made_from)
        return
    pictures = emoji("train")
    family_of = {about["concept"]: about["family"] for _, _, about in pictures}
    of_a, of_b = split_families(family_of, shown, names)
    asked = [concept for group in of_b for concept in group]
    style_of = dict(zip(asked, itertools.cycle(STYLES)))
    captions = []
    questions = {}
    with atomic_directory(output) as temporary:
        images = temporary / "images"
        images.mkdir()
        for key, png, about in pictures:
            concept = about["concept"]
            name = about["english"]["short"]
            row = talk(key, "", name, f"{key}.png")
            if concept in of_a:
                captions.append(row)
            elif style_of.get(concept) == about["style"]:
                questions[concept] = {**row, "name": name, "family": about["family"]}
            else:
                continue
            (images / f"{key}.png").write_bytes(png)
        groups: list[list[dict[str, Any]]] = []
        for group in of_b:
            groups.append([questions[concept] for concept in group])
        (temporary / ORIGIN).write_text(json.dumps(made_from))
        (temporary / "captions.json").write_text(json.dumps(captions))
        (temporary / "groups.json").write_text(json.dumps(groups))
        (temporary / "chat_template.jinja").write_text(TEMPLATE)


def train_llava(tower: Path, llm: Path, data: Path, output: Path, steps: int) -> Path:
    """A LLaVA whose projector is trained on A's captions, with the seed of the tower; what is
    finished stays."""
    seed = tower.name.partition("-seed")[2]
    built = output / "stage0"
    trained = output / "stage1"
    if not built.exists():
        template = data / "chat_template.jinja"
        words = ["--tower", str(tower), "--llm", str(llm), "--output", str(built)]
        words += ["--chat-template", str(template), "--seed", seed]
        status = llm2clip(["vlm", "build", *words])
        if status:
            sys.exit(status)
    if not trained.exists():
        train_stage(
            built,
            trained,
            data / "captions.json",
            lora=False,
            rows_type=AnswerRows,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            seed=int(seed),
        )
    return trained


@torch.inference_mode()
def log_likelihoods(model: Any, rows: LlavaRows, row: dict[str, Any]) -> Tensor:
    """(C,) log-likelihood of each of ``row["names"]`` as the answer about a picture."""
    question = {**row, "conversations": row["conversations"][:1]}
    inputs = rows.encode([rows.chat(question)], add_generation_prompt=True)
    prompt = model(**inputs.to(model.dtype), use_cache=True)
    # as transformers 5.24 and newer call it, and as others do
    parameters = inspect.signature(model.forward).parameters
    cache_name = "cache" if "cache" in parameters else "past_key_values"
    first_V = prompt.logits[0, -1].float().log_softmax(dim=-1)
    tokenizer = rows.processor.tokenizer
    tokens = [
        tokenizer(name, add_special_tokens=False)["input_ids"] for name in row["names"]
    ]
    total_C = first_V[[ids[0] for ids in tokens]]
    # names of one length together, so that none is padded
    for length in sorted({len(ids) for ids in tokens}):
        if length == 1:
            continue
        numbers = [number for number, ids in enumerate(tokens) if len(ids) == length]
        name_CT = torch.tensor([tokens[number] for number in numbers])
        cache = copy.deepcopy(prompt[cache_name])
        cache.batch_repeat_interleave(len(numbers))
        logits = model(input_ids=name_CT[:, :-1], **{cache_name: cache}).logits
        next_CTV = logits.float().log_softmax(dim=-1)
        later_CT1 = next_CTV.gather(2, name_CT[:, 1:, None])
        total_C[numbers] += later_CT1.sum(dim=(1, 2))
    return total_C


def ask(trained: Path, data: Path) -> list[list[list[float]]]:
    """Of each group, (N, C) log-likelihoods of its names for each of its pictures."""
    import transformers

    processor = transformers.AutoProcessor.from_pretrained(
        trained, trust_remote_code=False
    )
    rows = LlavaRows(processor, data / "images")
    model: Any = transformers.LlavaForConditionalGeneration.from_pretrained(
        trained, dtype=torch.bfloat16
    ).eval()
    answers = []
    for group in read_json(data / "groups.json"):
        names = [row["name"] for row in group]
        of_group = [
            log_likelihoods(model, rows, {**row, "names": names}) for row in group
        ]
        answers.append(torch.stack(of_group).tolist())
    return answers


def llava_answers(
    towers: Path,
    llm: Path,
    output: Path,
    arms: Sequence[str],
    seeds: Sequence[int],
    steps: int,
) -> dict[str, Any]:
    """``ARM-seedN`` -> the answers of a LLaVA on that tower (``ask``). Trains and asks what is
    missing; ``output`` has the data. Raises ValueError if a LLaVA that is there has another tower,
    language model, number of steps, or data."""
    register()
    data = output / "data"
    of_all = {
        "language model": files_sha256(sorted(llm.glob("*.safetensors"))),
        "number of steps": steps,
        "set of questions": files_sha256(
            [data / "captions.json", data / "groups.json"]
        ),
    }
    answers: dict[str, Any] = {}
    for seed in seeds:  # all arms of a seed before the next, so that pairs are complete
        for arm in arms:
            folder = output / f"{arm}-seed{seed}"
            tower = towers / folder.name
            made_from = {"tower": files_sha256([tower / WEIGHTS_FILE]), **of_all}
            if folder.exists():
                refuse_other_origin(folder, made_from)
            else:
                with atomic_directory(folder) as temporary:
                    (temporary / ORIGIN).write_text(json.dumps(made_from))
            file = folder / "log_likelihoods.json"
            if not file.exists():
                trained = train_llava(tower, llm, data, folder, steps)
                write_text(file, json.dumps(ask(trained, data)))
            answers[folder.name] = read_json(file)
    return answers


def places(score_NC: np.ndarray) -> np.ndarray:
    """Of each picture, the place of its own name, which has the picture's number: the share of the
    other names for which the picture adds less to their mean over all pictures. Equal ones count
    half."""
    added_NC = score_NC - score_NC.mean(axis=0)
    own_N1 = added_NC.diagonal()[:, None]
    below_N = (added_NC < own_N1).sum(axis=1)
    equal_N = (added_NC == own_N1).sum(axis=1) - 1
    return (below_N + equal_N / 2) / (score_NC.shape[1] - 1)


def arms_table(scores: Mapping[str, np.ndarray], families: list[str]) -> str:
    """A row per arm; ``scores``: places, by ``ARM-seedN``."""
    rows = []
    for arm, title in ARMS.items():
        runs = list(seeds_of(scores, arm).values())
        if not runs:
            continue
        above_chance = compare_seeds([score_N - CHANCE for score_N in runs], families)
        ends = [CHANCE + end for end in above_chance.interval(1 - LEVEL)]
        means = [float(score_N.mean()) for score_N in runs]
        interval = f"[{fraction(ends[0])}, {fraction(ends[1])}]"
        rows.append((title, str(len(runs)), spread(means), interval))
    head = ("teacher of the tower", "seeds", "place of the right name", "interval")
    return markdown_table(head, rows)


def run(
    towers: Path,
    llm: Path,
    output: Path,
    arms: Sequence[str],
    seeds: Sequence[int],
    shown: int,
    names: int,
    steps: int,
) -> str:
    """Train and ask what is missing, write inherited.json, and return its table."""
    data = output / "data"
    write_data(data, shown, names)
    scores: dict[str, np.ndarray] = {}
    answers = llava_answers(towers, llm, output, arms, seeds, steps)
    for name, of_groups in answers.items():
        scores[name] = np.concatenate([places(np.array(group)) for group in of_groups])
    groups = read_json(data / "groups.json")
    families = [row["family"] for group in groups for row in group]
    comparisons = compare_arms(scores, families)
    means = {name: float(score_N.mean()) for name, score_N in scores.items()}
    record = {"places": means, "comparisons": comparisons}
    write_text(output / "inherited.json", json.dumps(record, indent=2))
    tables = [arms_table(scores, families)]
    if comparisons:
        tables.append(comparisons_table(comparisons, "place of the right name"))
    return "\n".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--towers", type=Path, required=True)
    parser.add_argument("--llm", type=Path, required=True, help="LLaVA's, frozen")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", required=True, choices=list(ARMS)[1:])
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--shown", type=int, default=SHOWN, help="concepts of A")
    parser.add_argument("--names", type=int, default=NAMES, help="of a group of B")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the projector")
    print(run(**vars(parser.parse_args())))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
