#!/usr/bin/env python3
"""Inherited words: can LLaVA name what it was never shown, because its tower's teacher knew it?

    inherited.py --towers OUT/towers --llm DATA/gate/llm --output OUT/inherited \
        --arms permuted oracle --seeds 0 1

Stage 2 saw every training emoji with its name; LLaVA is shown a part of them, A (half), and is
asked about others, B, of other families. Its language model is frozen, so that all it learns is to
read the tower (the projector). It chooses among 40 names of B, one of a family: an answer's place
is the share of the other names that it holds for less likely than the right one (.5 by chance).
What counts is the place minus that of the same name for the pictures of the others, which takes
away what the language model prefers without looking.

``--arms``: towers/ARM-seedN below ``--towers``; gate.sh trains them. Intervals of a difference to
the first arm are over families and, if there are several, seeds, which are paired.

Shapes: N pictures, C names, T tokens of a name.
"""

import argparse
import copy
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import LEVEL, compare_seeds
from miniature import train_stage
from miniature_data import emoji, talk
from torch import Tensor

from llava_integration.evaluator.compare.multiplicity import holm
from llava_integration.serve.build import register
from llava_integration.serve.rows import LlavaRows
from llm2clip_plugin.atomic import atomic_directory, write_text
from llm2clip_plugin.cli import main as llm2clip
from llm2clip_plugin.json_files import read_json_value as read_json
from llm2clip_plugin.report_text import estimate, markdown_table, p_value, spread

QUESTION = "What is it?"
# concepts of A, as gate.py fits to; with 100, and 80 steps, not even the oracle showed anything
SHOWN = 534
NAMES = 40  # of B
STEPS = 120  # of the projector, as the miniature's
BATCH = 16
# SmolLM2's own without the system message, which would be a third of a sample's tokens
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
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
) -> tuple[list[str], list[str]]:
    """A: the concepts of random families, ``shown`` or a few more; B: a concept of each of
    ``names`` other families. Raises ValueError if there are too few families."""
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
    of_b = [draw.choice(concepts[family]) for family in families[:names]]
    return of_a, of_b


def write_data(output: Path, shown: int, names: int) -> None:
    """Write captions.json of A, questions.json of B, and their images."""
    pictures = emoji("train")
    family_of = {about["concept"]: about["family"] for _, _, about in pictures}
    of_a, of_b = split_families(family_of, shown, names)
    captions = []
    questions = []
    with atomic_directory(output) as temporary:
        images = temporary / "images"
        images.mkdir()
        for key, png, about in pictures:
            concept = about["concept"]
            if concept not in of_a and concept not in of_b:
                continue
            (images / f"{key}.png").write_bytes(png)
            name = about["english"]["short"]
            row = talk(key, QUESTION, name, f"{key}.png")
            if concept in of_a:
                captions.append(row)
            else:
                questions.append({**row, "name": name, "family": about["family"]})
        (temporary / "captions.json").write_text(json.dumps(captions))
        (temporary / "questions.json").write_text(json.dumps(questions))
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
        cache = copy.deepcopy(prompt.past_key_values)
        cache.batch_repeat_interleave(len(numbers))
        logits = model(input_ids=name_CT[:, :-1], past_key_values=cache).logits
        next_CTV = logits.float().log_softmax(dim=-1)
        later_CT1 = next_CTV.gather(2, name_CT[:, 1:, None])
        total_C[numbers] += later_CT1.sum(dim=(1, 2))
    return total_C


def ask(trained: Path, data: Path) -> np.ndarray:
    """(N, C) log-likelihoods of B's names for each of its pictures."""
    import transformers

    processor = transformers.AutoProcessor.from_pretrained(
        trained, trust_remote_code=False
    )
    rows = LlavaRows(processor, data / "images")
    model: Any = transformers.LlavaForConditionalGeneration.from_pretrained(
        trained, dtype=torch.bfloat16
    ).eval()
    questions = read_json(data / "questions.json")
    names = sorted({row["name"] for row in questions})
    answers = [
        log_likelihoods(model, rows, {**row, "names": names}) for row in questions
    ]
    return torch.stack(answers).numpy()


def places(score_NC: np.ndarray, own_N: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of each picture, the place of its own name: the share of the other names with a lower score;
    and the mean place of that name for the pictures with another name. Equal scores count half."""
    name_N = np.asarray(own_N)
    names = score_NC.shape[1]
    # asked picture x picture that is shown
    place_NN = np.empty((len(name_N), len(name_N)))
    for number, name in enumerate(name_N):
        right_N1 = score_NC[:, [name]]
        below_N = (score_NC < right_N1).sum(axis=1)
        equal_N = (score_NC == right_N1).sum(axis=1) - 1
        place_NN[number] = (below_N + equal_N / 2) / (names - 1)
    is_other_NN = name_N[:, None] != name_N
    exchanged_N = (place_NN * is_other_NN).sum(axis=1) / is_other_NN.sum(axis=1)
    return place_NN.diagonal().copy(), exchanged_N


def compare_arms(
    scores: Mapping[str, Mapping[int, np.ndarray]], families: list[str]
) -> list[dict[str, Any]]:
    """Each arm's own places minus exchanged ones, and minus those of the first arm; p is adjusted
    for all of these differences."""
    base = next(iter(scores.values()))
    results = []
    for arm, of_seed in scores.items():
        row: dict[str, Any] = {"arm": arm, "seeds": list(of_seed)}
        row["values"] = [float(score_N.mean()) for score_N in of_seed.values()]
        above = compare_seeds(list(of_seed.values()), families)
        row["interval"] = list(above.interval(1 - LEVEL))
        if of_seed is not base:
            difference_SN = [of_seed[seed] - base[seed] for seed in of_seed]
            paired = compare_seeds(difference_SN, families)
            row["difference"] = float(np.mean(difference_SN))
            row["difference_interval"] = list(paired.interval(1 - LEVEL))
            row["p"] = paired.p()
        results.append(row)
    differences = results[1:]
    adjusted = holm([row["p"] for row in differences])
    for row, p in zip(differences, adjusted, strict=True):
        row["p_adjusted"] = p
    return results


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """A row per arm."""
    rows = []
    for row in results:
        mean = float(np.mean(row["values"]))
        cells = [row["arm"], str(len(row["seeds"])), spread(row["values"])]
        cells.append(estimate(mean, row["interval"]))
        if "p_adjusted" in row:
            difference = estimate(row["difference"], row["difference_interval"])
            p = p_value(row["p_adjusted"])
            if row["p_adjusted"] >= LEVEL:
                p += ", not shown"
            cells += [difference, p]
        else:
            cells += ["", ""]
        rows.append(tuple(cells))
    head = ("tower's teacher", "seeds", "place of the right name minus exchanged")
    head += ("with interval", "minus the first row", "p (Holm)")
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
    register()
    data = output / "data"
    if not data.exists():
        write_data(data, shown, names)
    questions = read_json(data / "questions.json")
    all_names = sorted({row["name"] for row in questions})
    right_names = [all_names.index(row["name"]) for row in questions]
    scores: dict[str, dict[int, np.ndarray]] = {arm: {} for arm in arms}
    for seed in seeds:  # all arms of a seed before the next, so that pairs are complete
        for arm in arms:
            folder = output / f"{arm}-seed{seed}"
            answers = folder / "log_likelihoods.json"
            if not answers.exists():
                tower = towers / folder.name
                trained = train_llava(tower, llm, data, folder, steps)
                write_text(answers, json.dumps(ask(trained, data).tolist()))
            own_N, exchanged_N = places(np.array(read_json(answers)), right_names)
            scores[arm][seed] = own_N - exchanged_N
    results = compare_arms(scores, [row["family"] for row in questions])
    write_text(output / "inherited.json", json.dumps(results, indent=2))
    return results_table(results)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--towers", type=Path, required=True)
    parser.add_argument("--llm", type=Path, required=True, help="LLaVA's, frozen")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--arms", nargs="+", required=True, help="the first is the base"
    )
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--shown", type=int, default=SHOWN, help="concepts of A")
    parser.add_argument("--names", type=int, default=NAMES, help="of B")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the projector")
    print(run(**vars(parser.parse_args())))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
