"""From score files to a comparison: questions paired by id, statistics for each benchmark."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_integration.benchmarks.benchmark import Item, Statistic, find_image, mean_of_parts, mean_statistic
from llava_integration.benchmarks.rules import benchmarks, published
from llava_integration.compare.comparison import Comparison, Row, Side
from llava_integration.compare.statistics import compare, counted, holm, pair
from llm2clip_plugin.contracts import ScoreFile, sha256_text
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.pages import thumbnail

EMPTY = 0.1  # fraction of empty answers above which a score is not the model's
FEWEST_IN_COMMON = 0.9  # fraction of questions that both sides must have


def ordered(names: Iterable[str]) -> list[str]:
    """Benchmarks in the order of tables, unknown ones last, by name."""
    known = list(benchmarks())
    return sorted(set(names), key=lambda name: (known.index(name) if name in known else len(known), name))


def statistic_of(name: str, items: Sequence[Item]) -> tuple[Statistic, str, str, str]:
    """Statistic, title, unit and a note for a score file's items.

    An unknown benchmark, or items without what its composite needs, get the plain mean of their scores.
    """
    known = benchmarks().get(name)
    missing = [field for field in known.item_fields if any(field not in item for item in items)] if known else []
    if known and not missing:
        return known.statistic(items), known.title, known.unit, ""
    scores = [float(item["score"]) for item in items]
    note = f"items have no {', '.join(missing)}; mean score instead of {known.headline}" if known else ""
    scale, unit = (100.0, "%") if all(0 <= score <= 1 for score in scores) else (1.0, "score")
    title = known.title if known else name
    if items and all("equal_parts" in item for item in items):
        return mean_of_parts([item["equal_parts"] for item in items], scores, scale), title, unit, note
    return mean_statistic(scores, scale=scale), title, unit, note


def build(
    sides: Sequence[Side],
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
    references: bool = True,
) -> Comparison:
    """Compare every side with the first."""
    base, *others = sides
    notes = [note for side in sides for note in side.notes]
    tasks = [(new, name) for new in others for name in ordered(set(base.runs) & set(new.runs))]
    for new in others:
        if not set(base.runs) & set(new.runs):
            raise ValueError(
                f"{base.name} ({', '.join(ordered(base.runs))}) and {new.name} ({', '.join(ordered(new.runs))}) have "
                "no benchmark in common"
            )
        for name in ordered(set(base.runs) ^ set(new.runs)):
            notes.append(f"{name} is not compared: only {base.name if name in base.runs else new.name} has its scores")
    bar = tqdm(tasks, desc="comparing", unit="benchmark", delay=2)
    rows = [compare_benchmark(base, new, name, resamples=resamples, level=level, seed=seed) for new, name in bar]
    rows = [row for new in others for row in _adjust([row for row in rows if row.new == new.name])]
    titles, units, scores = _scores(sides)
    shared = {row.benchmark for row in rows}
    return Comparison(
        names=tuple(side.name for side in sides),
        rows=tuple(rows),
        scores=scores,
        titles=titles,
        units=units,
        references={
            label: {name: value for name, value in values.items() if name in shared}
            for label, values in published().items()
            if references and shared & set(values)
        },
        settings={"resamples": resamples, "level": level, "seed": seed},
        notes=tuple(dict.fromkeys(notes)),
        warnings=tuple(warnings(sides, titles)),
    )


def warnings(sides: Sequence[Side], titles: dict[str, str]) -> Iterator[str]:
    """Empty answers that are more than EMPTY of a side's, and sides in different precisions."""
    for side in sides:
        for name, records in side.runs.items():
            empty = sum(record.counts.get("empty", 0) for record in records)
            total = sum(record.counts.get("answered", 0) for record in records)
            if empty > EMPTY * total:
                yield f"{empty} of the {total} answers of {side.name} to {titles[name]} are empty"
    for field in ("precision", "dtype"):
        used = {
            side.name: "/".join(sorted(values))
            for side in sides
            if (values := {str(r.provenance.get(field, "")) for records in side.runs.values() for r in records} - {""})
        }
        if len(set(used.values())) > 1:
            listed = ", ".join(f"{name} in {value}" for name, value in used.items())
            yield f"the sides differ in their {field}, which alone may move scores: {listed}"


def _adjust(rows: Sequence[Row]) -> list[Row]:
    """Rows with Holm's p over the benchmarks of one pair of sides."""
    adjusted = holm([row.result.p for row in rows])
    return [replace(row, p_holm=p) for row, p in zip(rows, adjusted, strict=True)]


def _scores(sides: Sequence[Side]) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, float]]]:
    """Titles, units and the headline numbers of every side, each over all of its own questions."""
    titles, units, scores = {}, {}, {}
    for name in ordered(name for side in sides for name in side.runs):
        scores[name] = {}
        for side in sides:
            values = []
            for record in side.runs.get(name, ()):
                statistic, titles[name], units[name], _ = statistic_of(name, record.items)
                values.append(statistic.full())
            if values:
                scores[name][side.name] = sum(values) / len(values)
    return titles, units, scores


def compare_benchmark(base: Side, new: Side, name: str, *, resamples: int, level: float, seed: int) -> Row:
    """One benchmark: pair the questions, resample, count wins."""
    base_runs, new_runs = base.runs[name], new.runs[name]
    common, notes = questions_in_common(name, base, new)
    base_items, new_items = ([pick(record, common) for record in runs] for runs in (base_runs, new_runs))
    statistics = [[statistic_of(name, items) for items in side] for side in (base_items, new_items)]
    _, title, unit, note = statistics[0][0]
    clusters = [str(item.get("cluster", item["id"])) for item in base_items[0]]
    of_base, of_new = ([entry[0] for entry in side] for side in statistics)
    result = compare(pair(of_base, of_new, clusters), resamples=resamples, level=level, seed=seed)
    keep = [place for place, counts in enumerate(counted([*of_base, *of_new])) if counts]
    old, now = ([scores[place] for place in keep] for scores in map(_mean_scores, (base_items, new_items)))
    clusters = [clusters[place] for place in keep]
    wins = sum(b > a for a, b in zip(old, now, strict=True))
    losses = sum(b < a for a, b in zip(old, now, strict=True))
    if len(set(clusters)) == 1 and len(clusters) > 1:
        notes.append("all questions are about one image, so the interval is meaningless")
    return Row(
        benchmark=name,
        title=title,
        unit=unit,
        base=base.name,
        new=new.name,
        result=result,
        p_holm=result.p,
        wins=wins,
        losses=losses,
        ties=len(old) - wins - losses,
        questions=len(keep),
        images=len(set(clusters)),
        runs=(len(base_runs), len(new_runs)),
        categories=_categories([base_items[0][place] for place in keep], old, now),
        notes=tuple(dict.fromkeys([*notes, *([note] if note else []), *_fault_notes(base, new, name)])),
    )


def questions_in_common(name: str, base: Side, new: Side) -> tuple[list[str], list[str]]:
    """Ids that every run of both sides has, in the base's order, and notes; ContractError for other questions."""
    records = [*base.runs[name], *new.runs[name]]
    shared = set.intersection(*({str(item["id"]) for item in record.items} for record in records))
    largest = max(len(record.items) for record in records)
    if len(shared) < FEWEST_IN_COMMON * largest:
        sizes = ", ".join(str(len(record.items)) for record in records)
        raise ContractError(
            f"{name}: the score files of {base.name} and {new.name} share {len(shared)} questions of {sizes}; they "
            "were scored with different data or splits. Score both with the same --data"
        )
    order = [str(item["id"]) for item in records[0].items if str(item["id"]) in shared]
    truths = {str(item["id"]): item.get("truth") for item in records[0].items}
    for record in records[1:]:
        for item in record.items:
            identifier = str(item["id"])
            if identifier in shared and item.get("truth") != truths[identifier]:
                raise ContractError(
                    f"{name}: the truth of question {identifier} is {truths[identifier]!r} in {base.name} and "
                    f"{item.get('truth')!r} in {record.model}; score both with the same --data"
                )
    notes = [] if len(shared) == largest else [f"{largest - len(shared)} questions are not in every file; ignored"]
    layouts = {record.provenance.get("layout", "") for record in records} - {"", "submission", "judge"}
    if len({record.provenance.get("data_sha256", "") for record in records} - {""}) > 1:
        notes.append(
            "the sides were scored with different annotation files (with equal truths for the questions in common)"
        )
    if len(layouts) > 1:
        notes.append("one side was evaluated with lmms-eval, the other with LLaVA's scripts; their prompts differ")
    return order, notes


def pick(record: ScoreFile, common: Sequence[str]) -> list[Item]:
    """The items of these ids, in their order."""
    items = {str(item["id"]): item for item in record.items}
    return [items[identifier] for identifier in common]


def _mean_scores(runs: Sequence[Sequence[Item]]) -> list[float]:
    """Each question's score, mean over runs."""
    return [sum(float(item["score"]) for item in question) / len(question) for question in zip(*runs, strict=True)]


def _categories(
    items: Sequence[Item], old: Sequence[float], now: Sequence[float]
) -> dict[str, tuple[float, float, int]]:
    """Mean scores by category, largest first."""
    groups: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(str(item.get("category") or ""), []).append(place)
    if len(groups) < 2:
        return {}
    return {
        key: (sum(old[p] for p in places) / len(places), sum(now[p] for p in places) / len(places), len(places))
        for key, places in sorted(groups.items(), key=lambda group: -len(group[1]))
    }


def _fault_notes(base: Side, new: Side, name: str) -> list[str]:
    """The notes of the score files, with the side's name; notes of both sides once, without a name."""
    base_notes, new_notes = (
        list(dict.fromkeys(note for record in side.runs[name] for note in record.notes)) for side in (base, new)
    )
    return [
        *(note if note in new_notes else f"{base.name}: {note}" for note in base_notes),
        *(f"{new.name}: {note}" for note in new_notes if note not in base_notes),
    ]


# A comparison as text: terminal and Markdown.

NOTE = "reported by others, one run, no interval; VQAv2, VizWiz and MMBench on splits that a server scores"
HEADER = ("benchmark", "base", "new", "difference", "interval", "p", "p (Holm)", "wins", "losses", "verdict")


def number(value: float, unit: str = "%", *, signed: bool = False) -> str:
    """Two decimals; one for points in the thousands."""
    places = 1 if unit == "points" else 2
    text = f"{value:+.{places}f}" if signed else f"{value:.{places}f}"
    return text.replace("-0.00", "0.00") if signed and float(text) == 0 else text


def p_value(value: float) -> str:
    """Three decimals; smaller values as a bound."""
    return "<.001" if value < 0.001 else f"{value:.3f}".lstrip("0") if value < 1 else "1"


def cells(row: Row) -> tuple[str, ...]:
    """A row's columns under HEADER."""
    result = row.result
    return (
        row.title if row.unit == "%" else f"{row.title} ({row.unit})",
        number(result.base, row.unit) + _spread(result.spread_base, row),
        number(result.new, row.unit) + _spread(result.spread_new, row),
        number(result.difference, row.unit, signed=True),
        f"[{number(result.low, row.unit, signed=True)}, {number(result.high, row.unit, signed=True)}]",
        p_value(result.p),
        p_value(row.p_holm),
        str(row.wins),
        str(row.losses),
        row.verdict,
    )


def _spread(spread: float, row: Row) -> str:
    return f" ±{number(spread, row.unit)}" if spread else ""


def method_lines(comparison: Comparison) -> list[str]:
    """The statistical methods, in sentences."""
    settings = comparison.settings
    lines = [
        f"Intervals: {settings['level']:.0%}, paired bootstrap over images ({settings['resamples']} resamples, seed "
        f"{settings['seed']}), composite scores resampled as composites. p: permutation over images, two-sided; Holm "
        "over the benchmarks of a pair."
    ]
    if any(max(row.runs) > 1 for row in comparison.rows):
        lines.append(
            "With several runs per side, the interval includes their variance, and p is Student's (±: s.d. over runs)."
        )
    if any(row.runs == (1, 1) for row in comparison.rows):
        mme = any(row.benchmark == "mme" for row in comparison.rows)
        lines.append(
            "With one run per side, the interval covers the choice of questions but not the training seed"
            + ("; MME varies by about 20 points between identical runs." if mme else ".")
        )
    return lines


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Plain columns: first and last aligned left, others right."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if place in (0, len(header) - 1) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [header, ["-" * min(width, 40) for width in widths], *rows]
    ]


def terminal(comparison: Comparison) -> str:
    """What `llm2clip compare` prints."""
    lines = [f"warning: {warning}" for warning in comparison.warnings]
    for name, rows in comparison.pairs():
        lines += [f"{name} (new) against {comparison.names[0]} (base)", ""]
        lines += [*aligned(HEADER, [cells(row) for row in rows]), ""]
        lines += [f"  {row.title}: {row.power_line()}" for row in rows]
        lines += [f"  {row.title}: note: {note}" for row in rows for note in row.notes]
        lines.append("")
    if comparison.references:
        header, *models = _published(comparison)
        lines += [
            f"Published, not measured here ({NOTE}):",
            "",
            *aligned([*header, ""], [[*row, ""] for row in models]),
            "",
        ]
    lines += [f"note: {note}" for note in comparison.notes]
    return "\n".join([*lines, *method_lines(comparison)])


def markdown(comparison: Comparison) -> str:
    """The tables for a README or an issue."""
    lines = ["# Comparison", "", *(f"**Warning**: {escape_markdown(one)}.\n" for one in comparison.warnings)]
    for name, rows in comparison.pairs():
        lines += [f"## {escape_markdown(name)} (new) against {escape_markdown(comparison.names[0])} (base)", ""]
        lines += [*_markdown_table([HEADER, *map(cells, rows)]), ""]
        lines += [f"- {escape_markdown(f'{row.title}: {row.power_line()}')}." for row in rows]
        lines += [f"- {escape_markdown(f'{row.title}: {note}')}." for row in rows for note in row.notes]
        lines.append("")
    if comparison.references:
        lines += [f"Published, not measured here ({NOTE}):", "", *_markdown_table(_published(comparison)), ""]
    lines += [f"Note: {escape_markdown(note)}." for note in comparison.notes]
    return "\n".join([*lines, *method_lines(comparison)]) + "\n"


def _published(comparison: Comparison) -> list[list[str]]:
    """A header and a row for each model with published numbers."""
    names = [name for name in comparison.titles if any(name in values for values in comparison.references.values())]
    rows = [
        [model, *(f"{values[name]:g}" if name in values else "" for name in names)]
        for model, values in comparison.references.items()
    ]
    return [["", *(comparison.titles[name] for name in names)], *rows]


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first row is the header."""
    lines = ["| " + " | ".join(map(escape_markdown, row)) + " |" for row in rows]
    return [lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]]


def escape_markdown(text: str) -> str:
    """Text without Markdown's markup and column separators."""
    for letter in "\\`*_{}[]<>|#":
        text = text.replace(letter, "\\" + letter)
    return text.replace("\n", " ")


# Pictures of the questions, read from the benchmarks' folders and embedded into the report as small JPEGs.

IMAGE_FOLDERS = ("", "images")  # below the folder of a benchmark without a rule


class Pictures:
    """Data URIs by key; questions about one picture share it."""

    def __init__(self, sides: Sequence[Side], root: Path | None, *, enabled: bool):
        self.encoded: dict[str, str] = {}
        self.missing: dict[str, int] = {}
        self._enabled = enabled
        self._benchmarks = benchmarks()
        self._folders = {
            name: _folders(name, root, [record.provenance for side in sides for record in side.runs.get(name, ())])
            for name in {name for side in sides for name in side.runs}
        }
        if root is not None and not root.is_dir():
            raise FileNotFoundError(
                f"no folder {root} for --image-folder; pass LLaVA's playground/data/eval or one of its folders"
            )

    def key(self, name: str, item: Item) -> str:
        """The key of an item's picture, "" if there is none; encodes it at first use."""
        if not self._enabled or not item.get("image"):
            return ""
        key = f"{name}/{item['image']}"
        if key not in self.encoded:
            encoded = thumbnail(self._read(name, item))
            if encoded is None:
                self.missing[name] = self.missing.get(name, 0) + 1
                return ""
            self.encoded[key] = encoded
        return key

    def _read(self, name: str, item: Item) -> bytes | None:
        known = self._benchmarks.get(name)
        for folder in self._folders[name]:
            if known:
                image = known.image_bytes(folder, item)
            else:
                path = find_image(IMAGE_FOLDERS, folder, str(item["image"]))
                image = path.read_bytes() if path else None
            if image is not None:
                return image
        return None

    def notes(self) -> list[str]:
        """How many pictures were not found."""
        return [
            f"{count} pictures of {name} were not found; pass their folder with --image-folder"
            for name, count in sorted(self.missing.items())
        ]


def _folders(name: str, root: Path | None, scored: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Folders to search for a benchmark's pictures: below --image-folder, else the data that were scored."""
    known = benchmarks().get(name)
    if root is not None:
        below = [root / folder for folder in (known.folders if known else ())]
        return [folder for folder in (*below, root) if folder.is_dir()]
    if known is None:
        return []
    folders = {Path(str(one.get("data"))): one.get("data_sha256") for one in scored if one.get("data")}
    nothing = sha256_text("")  # of a folder without annotations
    return [
        folder
        for folder, digest in folders.items()
        if folder.exists() and nothing != digest == known.data_digest(folder)
    ]


# The questions whose score differs between two sides, as the page's browser shows them.

LONGEST = 600  # characters of a question or an answer that are shown


def disagreements(row: Row, sides: Sequence[Side], pictures: Pictures, most: int) -> list[dict[str, Any]]:
    """At most so many questions of a row whose scores differ: wins and losses evenly, spread over the benchmark.

    Items without an answer, such as the queries of retrieval, are left out.
    """
    number = next(number for number, side in enumerate(sides) if side.name == row.new)
    base_items, new_items = (
        {str(item["id"]): item for item in side.runs[row.benchmark][0].items} for side in (sides[0], sides[number])
    )
    pairs = [
        (base_items[key], new_items[key])
        for key in base_items
        if key in new_items
        and "answer" in base_items[key]
        and "answer" in new_items[key]
        and counts_for_headline(base_items[key], new_items[key])
    ]
    won = [place for place, (base, new) in enumerate(pairs) if new["score"] > base["score"]]
    lost = [place for place, (base, new) in enumerate(pairs) if new["score"] < base["score"]]
    losses = min(len(lost), max(most // 2, most - len(won)))
    chosen = sorted([*spread(lost, losses), *spread(won, most - losses)])  # in the benchmark's order
    return [_question(row, number, *pairs[place], pictures, (len(won), len(lost))) for place in chosen]


def counts_for_headline(base: Item, new: Item) -> bool:
    """False for ScienceQA's questions without an image."""
    return bool(base.get("is_multimodal", True) or new.get("is_multimodal", True))


def spread(values: Sequence[int], most: int) -> list[int]:
    """At most so many values, at even distances."""
    if len(values) <= most:
        return list(values)
    return [values[number * len(values) // most] for number in range(most)] if most > 0 else []


def _question(
    row: Row, number: int, base: Item, new: Item, pictures: Pictures, totals: tuple[int, int]
) -> dict[str, Any]:
    """One entry of the page's data; ``number`` is the new side's, ``totals`` are the row's wins and losses."""
    return {
        "benchmark": row.title,
        "pair": number,
        "id": str(base["id"]),
        "question": _short(base.get("question", "")),
        "choices": [_short(choice) for choice in base.get("choices", [])],
        "truth": _truth(base.get("truth")),
        "category": str(base.get("category") or ""),
        "answers": [_short(base.get("answer", "")), _short(new.get("answer", ""))],
        "missing": [bool(base.get("missing")), bool(new.get("missing"))],
        "scores": [round(float(base["score"]), 3), round(float(new["score"]), 3)],
        "rotations": [_rotations(base), _rotations(new)],
        "image": pictures.key(row.benchmark, base),
        "of": totals,
    }


def _rotations(item: Item) -> str:
    """MMBench's answers to every rotation of the options."""
    rows = item.get("rows") or []
    texts = [f"{_short(str(entry.get('text', '')))} ({'right' if entry.get('correct') else 'wrong'})" for entry in rows]
    return "; ".join(texts) if len(rows) > 1 else ""


def _truth(value: Any) -> str:
    """The truth in one line: human answers with their counts."""
    if isinstance(value, list):
        counts = {str(answer): value.count(answer) for answer in value}
        return ", ".join(f"{answer} ×{count}" for answer, count in sorted(counts.items(), key=lambda entry: -entry[1]))
    return _short("" if value is None else str(value))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"
