"""Reading answers: LLaVA's JSONL or a folder of its chunks (``0_8.jsonl`` ...), submission files;
detected by content.

| layout     | a row                                                                             |
|------------|-----------------------------------------------------------------------------------|
| llava      | ``question_id, prompt, text, answer_id, model_id``, as ``llava.eval.model_*`` do  |
| submission | of an array: ``{question_id or questionId or image, answer or prediction}``;      |
|            | or id: text                                                                       |
| judge      | rows with ``tuple`` (LLaVA-Bench), or id: ``{"score": [...]}`` (MM-Vet)           |
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.outside import refuse_encoding

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's answer to one question."""

    id: Any  # a number or text, as written; None where the layout has no id
    text: str | None  # None: the row has no text
    prompt: str  # "" where the layout has none
    line: int  # 1-based
    row: Row  # the complete row
    layout: str  # of the file, as in Answers


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The content of an answers file."""

    path: Path
    layout: str  # llava | submission | judge
    rows: tuple[Answer, ...]
    broken: tuple[str, ...] = ()  # lines that are not JSON objects

    @property
    def model(self) -> str:
        """The model's name in the rows, or the file's."""
        named = (
            str(name) for answer in self.rows if (name := answer.row.get("model_id"))
        )
        return next(
            named,
            self.path.parent.name if self.path.stem == "merge" else self.path.stem,
        )


def read_text(path: Path) -> str:
    """Text of a UTF-8 file. Raises ValueError for an empty file or another encoding, naming the
    first invalid byte."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    raw = path.read_bytes()
    refuse_encoding(path, raw)
    text = raw.decode("utf-8-sig", "replace")
    if "\0" in text or not text.strip():
        raise ValueError(f"{path} is empty, or has NUL bytes; run the evaluation again")
    return text


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of each line of a JSONL file. Raises ContractError that names the line."""
    name = str(path)
    where = str(path)
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, 1):
                where = f"{name}, line {number}"
                if line.strip():
                    value = json.loads(line)
                    if not isinstance(value, dict):
                        raise ContractError(
                            f"{where}: expected a JSON object, got {line.strip()[:60]!r}"
                        )
                    yield where, value
        except json.JSONDecodeError as error:
            raise ContractError(
                f"{where}: not valid JSON ({error}); was the run cut off?"
            ) from error
        except RecursionError as error:
            raise ContractError(f"{where}: not valid JSON (nested too deep)") from error
        except UnicodeDecodeError as error:
            raise ContractError(f"{path} is not UTF-8 text ({error})") from error


def read_jsonl(path: Path) -> list[Row]:
    """Rows of a benchmark's JSONL file. Raises ContractError for the first line that is not a JSON
    object."""
    if not (rows := [row for _, row in json_lines(path)]):
        raise ContractError(f"{path} is empty; download it again")
    return rows


def read_answers(path: str | Path) -> Answers:
    """Read a file, or a folder of chunks; ValueError for an empty one, a wrong encoding or an
    unknown layout."""
    path = Path(path)
    if (path / "merge.jsonl").is_file():
        path = path / "merge.jsonl"
    text = _text_of_chunks(path) if path.is_dir() else read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and not {"text", "answer", "prediction", "tuple"} & set(
        value
    ):
        value = [_mapped_row(path, key, entry) for key, entry in value.items()]
    in_list = isinstance(value, list)
    lines: list[Any] = value if in_list else text.split("\n")
    rows = []
    broken = []
    # not splitlines(): an answer may contain U+2028 and the like, which JSON leaves unescaped
    for number, line in enumerate(lines, start=1):
        if in_list or line.strip():
            try:
                rows.append((number, {**(line if in_list else json.loads(line))}))
            except (ValueError, TypeError, RecursionError) as error:
                broken.append(f"line {number} ({error})")
    if not rows:
        reason = f": no line is a JSON object; {broken[0]}" if broken else ""
        raise ValueError(f"{path} has no answers{reason}")
    layout = _layout(path, rows[0][1])
    answers = tuple(_answer(layout, number, row) for number, row in rows)
    return Answers(path=path, layout=layout, rows=answers, broken=tuple(broken))


def _mapped_row(path: Path, key: str, entry: Any) -> Row:
    """A row of ``{id: text}`` (MM-Vet's results) or of ``{id: {"score": [...]}}`` (its judge's
    file)."""
    if isinstance(entry, str):
        return {"question_id": key, "answer": entry}
    if isinstance(entry, dict) and "score" in entry:
        return {**entry, "question_id": key, "content": "", "tuple": ()}
    raise ValueError(
        f"{path} is a JSON object with {key!r}: {str(entry)[:80]}; expected answers, one per line"
    )


def _layout(path: Path, head: Row) -> str:
    """The layout of rows whose keys are those of ``head``; ValueError for an unknown one."""
    keys = set(head)
    if keys & {"filtered_resps", "resps"}:
        raise ValueError(
            f"{path} is a log of another evaluator, which has scored it: "
            "pass it to `llm2clip compare`"
        )
    if "tuple" in keys:
        return "judge"
    of_llava = keys & {"prompt", "answer_id", "model_id"} or keys <= {
        "question_id",
        "text",
    }
    if "text" in keys and of_llava:
        return "llava"
    if keys & {"answer", "prediction"} and keys & {
        "question_id",
        "questionId",
        "image",
        "index",
    }:
        return "submission"
    if {"question_id", "image", "text"} <= keys:
        raise ValueError(
            f"{path} is a question file; --answers is the --answers-file of llava.eval.model_vqa*"
        )
    expected = "LLaVA's answers (question_id, prompt, text) or a submission (question_id, answer)"
    raise ValueError(f"{path}: rows have {sorted(keys)[:12]}; expected {expected}")


def _answer(layout: str, line: int, row: Row) -> Answer:
    identifier = next(
        (
            row[key]
            for key in ("question_id", "questionId", "index", "image")
            if key in row
        ),
        None,
    )
    # as a table writes it where one is missing
    if isinstance(identifier, float) and identifier.is_integer():
        identifier = int(identifier)
    key = "prediction" if "prediction" in row else "answer"
    text = row.get({"judge": "content", "llava": "text"}.get(layout, key))
    if isinstance(text, str):
        # without lone surrogates, which UTF-8 can't encode
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    else:
        text = None
    prompt = row.get("prompt") if layout == "llava" else ""
    if not isinstance(prompt, str):
        prompt = ""
    return Answer(
        id=identifier, text=text, prompt=prompt, line=line, row=row, layout=layout
    )


CHUNK = re.compile(r"(\d+)_(\d+)\.jsonl")


def _text_of_chunks(folder: Path) -> str:
    """What LLaVA's multi-GPU scripts write into a folder."""
    chunks = {
        match[0]: match
        for path in folder.glob("*.jsonl")
        if (match := CHUNK.fullmatch(path.name))
    }
    if not chunks:
        files = sorted(path.name for path in folder.iterdir())[:12]
        raise FileNotFoundError(
            f"{folder} has no answers: expected merge.jsonl or chunks; it has {files}"
        )
    totals = sorted({int(match[2]) for match in chunks.values()})
    if len(totals) > 1:
        listed = " and of ".join(map(str, totals))
        raise ValueError(
            f"{folder} has chunks of {listed}, so of several runs; delete those that are not of "
            "the run to score"
        )
    (total,) = totals
    names = [f"{number}_{total}.jsonl" for number in range(total)]
    if missing := [name for name in names if name not in chunks]:
        raise FileNotFoundError(
            f"{folder} is missing the chunks {missing} of {total}; run them again"
        )
    return "\n".join(read_text(folder / name) for name in names)
