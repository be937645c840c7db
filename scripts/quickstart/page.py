#!/usr/bin/env python3
"""The quickstart's page: what was trained, the pictures found, LLaVA's answers, where each file is.

    page.py --data DATA --output quickstart-output/default --page PAGE.html

It shows what is there so far, so it can be written after any stage; until all is there, the page
loads itself again from time to time. It fetches nothing. Prints what the last stage brought.
"""

import argparse
import base64
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm2clip_plugin.atomic import write_text
from llm2clip_plugin.pages import page_style, render

SHOWN = 9  # of LLaVA's answers won, and as many lost, of each kind of question
SIDES = ("before", "after")
Item = Mapping[str, Any]  # of a score file: a question, its answer, its score
KEYWORDS = "short->keywords"  # stage 1's score on validation, in metrics.jsonl
QUESTIONS = {  # benchmark -> what the page calls it
    "miniature: emoji group": "Which group does an unseen emoji belong to?",
    "miniature: easy-vqa": "Shapes and colors (easy-vqa)",
    "miniature: emoji name, keyword": (
        "What does an unseen emoji show? (points above exchanged pictures)"
    ),
}


def read(path: Path) -> Any:
    """A JSON file; None if it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def picture(path: Path) -> str | None:
    """A small PNG as a data URI; None if there is no such file."""
    if not path.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def stage1_scores(run: Path) -> tuple[float, float] | None:
    """How often the LLM puts the keywords of a validation emoji first, given its name: before and
    after stage 1, in percent. None if that was not measured."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return None
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    scores = [100 * line[KEYWORDS] for line in lines if KEYWORDS in line]
    return (scores[0], scores[-1]) if len(scores) > 1 else None


def recall_rows(retrieval: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each row of recall: its title, and of both sides how often the right picture is first, or
    among ten."""
    recall = retrieval["recall"]
    rows = []
    for before, after in zip(recall["before"], recall["after"], strict=True):
        rows.append({"title": before["title"], "before": before, "after": after})
    return rows


def tally(retrieval: Mapping[str, Any]) -> str:
    """How many of the queries found their picture earlier, and how many later."""
    earlier = 0
    later = 0
    for query in retrieval["queries"]:
        before = query["before"]["rank"]
        after = query["after"]["rank"]
        if after < before:
            earlier += 1
        elif after > before:
            later += 1
    same = len(retrieval["queries"]) - earlier - later
    moved = f"earlier for {earlier} of them, later for {later}, as before for {same}"
    return f"After stage 2 the right picture comes {moved}"


def scores_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Benchmark -> the score file of the first training in a folder of scores."""
    files = [read(path) for path in sorted(folder.glob("*.scores.json"))]
    return {file["benchmark"]: file for file in files}


def concept_of(item: Mapping[str, Any]) -> str:
    """The concept that an emoji's question is about; "" for other pictures."""
    return "" if item["image"].startswith("test-") else item["cluster"]


def show_question(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    images: Path,
    names: Mapping[str, str],
) -> dict:
    """What the page shows of a question: its picture and both answers."""
    return {
        "picture": picture(images / new["image"]),
        "name": names.get(concept_of(new), ""),
        "question": new["question"],
        "truth": new["truth"],
        "before": old["answer"],
        "after": new["answer"],
    }


def spread_over(questions: Sequence[Any], count: int) -> list[Any]:
    """``count`` questions, evenly spaced; all if there are fewer."""
    if len(questions) <= count:
        return list(questions)
    step = len(questions) / count
    return [questions[int(number * step)] for number in range(count)]


def llava_kinds(folder: Path, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """For each kind of question: what both LLaVAs reach, and questions that are won and lost; []
    without scores."""
    sides = [scores_of(folder / "scores" / side) for side in SIDES]
    kinds = []
    for benchmark, title in QUESTIONS.items():
        if not all(benchmark in side for side in sides):
            continue
        before, after = (side[benchmark] for side in sides)
        changed = changed_questions(before["items"], after["items"])
        images = folder / "data" / "images"
        examples = {}
        for outcome, questions in changed.items():
            examples[outcome] = [
                show_question(old, new, images, names)
                for old, new in spread_over(questions, SHOWN)
            ]
        metric = "above" if "above" in after["metrics"] else "accuracy"
        kind = {
            "title": title,
            "questions": len(after["items"]),
            "before": before["metrics"][metric],
            "after": after["metrics"][metric],
            "without_picture": after["metrics"].get("without_looking"),
            "counts": {
                outcome: len(questions) for outcome, questions in changed.items()
            },
            "shown": examples,
        }
        kinds.append(kind)
    return kinds


def changed_questions(
    before: Sequence[Item], after: Sequence[Item]
) -> dict[str, list[tuple[Item, Item]]]:
    """The questions that are won and lost: (before, after) of each."""
    # a question that is right scores 1, or in points above exchanged pictures most of 100
    most = max(item["score"] for item in (*before, *after)) / 2
    changed: dict[str, list[tuple[Item, Item]]] = {"won": [], "lost": []}
    for old, new in zip(before, after, strict=True):
        gain = new["score"] - old["score"]
        if gain > most:
            changed["won"].append((old, new))
        elif -gain > most:
            changed["lost"].append((old, new))
    return changed


def stage_seconds(logs: Path) -> dict[str, int]:
    """Stage -> seconds; of a stage that was resumed, those of its longest run."""
    seconds: dict[str, int] = {}
    path = logs / "seconds.tsv"
    if not path.is_file():
        return seconds
    for line in path.read_text(encoding="utf-8").splitlines():
        took, name = line.split("\t")
        seconds[name] = max(int(took), seconds.get(name, 0))
    return seconds


def files(
    page: Path, data: Path, output: Path, seed: str, llava: Path | None
) -> list[tuple[str, str]]:
    """Those that exist: path from the page, and what it is. Links are named, not followed: a tower
    may lie elsewhere."""
    tower = output / "towers" / f"tuned-{seed}"
    descriptions = {
        tower: "the trained tower: a Hugging Face folder, with its text side",
        data / "llm" / seed / "adapter": "the LLM's adapter of stage 1",
        data / "cache" / f"tuned-{seed}": "the LLM's embeddings of the captions",
        data / "all": "the pictures and captions",
        output / "found.json": "recall and the queries of this page",
        output / "tables.md": "the tables of the controls",
        output / "logs": "everything that the stages printed",
    }
    if llava:
        comparison = llava / "compare" / "compare.html"
        what = "every question that the two LLaVAs answer differently"
        descriptions[comparison] = what
    folder = page.parent.absolute()
    existing = []
    for path, what in descriptions.items():
        if path.exists():
            existing.append((os.path.relpath(path.absolute(), folder), what))
    return existing


def tell(
    stage1: tuple[float, float] | None,
    retrieval: Any,
    kinds: Sequence[Mapping[str, Any]],
    page: Path,
) -> list[str]:
    """What a terminal shows of what the last stage brought."""
    if kinds:
        lines = [
            "LLaVA with the tower before and after stage 2, right answers to questions about "
            "unseen pictures:"
        ]
        for kind in kinds:
            change = f"{kind['before']:5.1f} % -> {kind['after']:5.1f} %"
            counts = f"{kind['counts']['won']} won, {kind['counts']['lost']} lost"
            lines.append(
                f"  {change}  {kind['title']} ({kind['questions']} questions: {counts})"
            )
        for kind in kinds:
            for question in spread_over(kind["shown"]["won"], 2):
                name = f", {question['name']}" if question["name"] else ""
                was = f"was {question['before'] or 'no answer'}{name}"
                lines.append(
                    f"  now right: {question['question']} {question['after']} ({was})"
                )
        return lines
    if retrieval or stage1 is None:
        return []
    return [
        "Given the name of an unseen emoji, the LLM puts that emoji's keywords first, "
        "before -> after stage 1:",
        f"  {stage1[0]:5.1f} % -> {stage1[1]:5.1f} %",
        f"A first look, which fills as the stages end: {page}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the towers"
    )
    parser.add_argument("--page", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--llava",
        default="",
        help="folder of LLaVA's results below --output; none if left out",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    options = parser.parse_args()
    seed = f"seed{options.seed}"
    retrieval = read(options.output / "found.json")
    llava = options.output / options.llava if options.llava else None
    kinds = llava_kinds(llava, retrieval["names"]) if llava and retrieval else []
    stage1 = stage1_scores(options.data / "llm" / seed)
    html = render(
        Path(__file__).with_name("page.html"),
        style=page_style(),
        stage1=stage1,
        found=retrieval,
        recall=recall_rows(retrieval) if retrieval else [],
        tally=tally(retrieval) if retrieval else "",
        kinds=kinds,
        expects_llava=llava is not None,
        finished=bool(retrieval) and (llava is None or bool(kinds)),
        seconds=stage_seconds(options.output / "logs"),
        files=files(options.page, options.data, options.output, seed, llava),
    )
    write_text(options.page, html)
    for line in tell(stage1, retrieval, kinds, options.page):
        print(line)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
