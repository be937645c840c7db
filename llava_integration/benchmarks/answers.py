"""Reading answers: LLaVA's JSONL or a folder of its chunks (``0_8.jsonl`` ...), submission files; detected by content.

| layout       | a row                                                                                    |
|--------------|------------------------------------------------------------------------------------------|
| llava        | ``question_id, prompt, text, answer_id, model_id`` per line, as ``llava.eval.model_*`` write |
| submission   | JSON array of ``{question_id or questionId or image, answer or prediction}``, or id: text   |
| judge        | rows with ``tuple`` (LLaVA-Bench), or id: ``{"score": [...]}`` (MM-Vet)                     |
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip_plugin.files import errors_about, refuse_encoding

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
    unparsable: int = 0  # lines that are not JSON objects
    first_unparsable: str = ""  # the first of them, for messages

    @property
    def model(self) -> str:
        """The model's name in the rows, or the file's."""
        for answer in self.rows:
            if name := answer.row.get("model_id"):
                return str(name)
        return self.path.parent.name if self.path.stem == "merge" else self.path.stem


def read_text(path: Path) -> str:
    """Text of a UTF-8 file. Raises ValueError for an empty file or another encoding, naming the first invalid byte."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    raw = path.read_bytes()
    refuse_encoding(path, raw)
    text = raw.decode("utf-8-sig", "replace")
    if "\0" in text:
        raise ValueError(f"{path} has NUL bytes: it is truncated or not a text file; generate it again")
    if not text.strip():
        raise ValueError(f"{path} is empty; run the evaluation again")
    return text


def read_jsonl(path: Path) -> list[Row]:
    """Rows of a benchmark's JSONL file. Raises ValueError for the first line that is not a JSON object."""
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip():
            with errors_about(f"{path}, line {number}", fix="download it again"):
                rows.append({**json.loads(line)})
    return rows


def read_answers(path: str | Path) -> Answers:
    """Read an answers file or a folder of chunks.

    Raises FileNotFoundError, or ValueError for an empty file, a wrong encoding or an unknown layout.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and not {"text", "answer", "prediction", "tuple"} & set(value):
        value = [_mapped_row(path, key, entry) for key, entry in value.items()]
    if isinstance(value, list):
        return _from_rows(path, list(enumerate(value, start=1)))
    return _from_lines(path, text)


def _mapped_row(path: Path, key: str, entry: Any) -> Row:
    """A row of ``{id: text}`` (MM-Vet's results) or ``{id: {"score": [...]}}`` (its judge's file)."""
    if isinstance(entry, str):
        return {"question_id": key, "answer": entry}
    if isinstance(entry, dict) and "score" in entry:
        return {**entry, "question_id": key, "content": "", "tuple": ()}
    raise ValueError(f"{path} is a JSON object with {key!r}: {str(entry)[:80]}; expected answers, one per line")


def _from_lines(path: Path, text: str) -> Answers:
    rows, broken = [], []
    # not splitlines(): an answer may contain U+2028 and the like, which JSON leaves unescaped
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append((number, {**json.loads(line)}))
            except (ValueError, TypeError, RecursionError) as error:
                broken.append(f"line {number} ({error})")
    if not rows:
        raise ValueError(f"{path} has no answers: none of its {len(broken)} lines is a JSON object; {broken[0]}")
    return _from_rows(path, rows, broken)


def _from_rows(path: Path, rows: Sequence[tuple[int, Any]], broken: Sequence[str] = ()) -> Answers:
    """Detect the layout by the first row's keys and unify the rows, each with its line; ``broken``: other lines."""
    if not rows:
        raise ValueError(f"{path} has no answers")
    head = rows[0][1] if isinstance(rows[0][1], dict) else {}
    layout = _layout(path, head)
    broken = [*broken, *(f"row {line} (not an object)" for line, row in rows if not isinstance(row, dict))]
    answers = []
    for line, row in rows:
        if isinstance(row, dict):
            identifier, text, prompt = _fields(layout, row)
            if isinstance(identifier, float) and identifier.is_integer():  # as a table writes it where one is missing
                identifier = int(identifier)
            if isinstance(text, str):  # without lone surrogates, which UTF-8 can't encode
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            else:
                text = None
            answers.append(Answer(id=identifier, text=text, prompt=prompt, line=line, row=row, layout=layout))
    return Answers(
        path=path, layout=layout, rows=tuple(answers), unparsable=len(broken), first_unparsable=next(iter(broken), "")
    )


def _layout(path: Path, head: Row) -> str:
    """The layout of rows whose keys are those of ``head``; ValueError for an unknown one."""
    keys = set(head)
    if keys & {"filtered_resps", "resps"}:
        raise ValueError(f"{path} is a log of another evaluator, which has scored it: pass it to `llm2clip compare`")
    if "tuple" in keys:
        return "judge"
    if "text" in keys and (keys & {"prompt", "answer_id", "model_id"} or keys <= {"question_id", "text"}):
        return "llava"
    if keys & {"answer", "prediction"} and keys & {"question_id", "questionId", "image", "index"}:
        return "submission"
    if {"question_id", "image", "text"} <= keys:
        raise ValueError(
            f"{path} is a question file (its 'text' is the question); --answers is the --answers-file of "
            "llava.eval.model_vqa*"
        )
    raise ValueError(
        f"{path}: rows have {sorted(keys)[:12]}; expected LLaVA's answers (question_id, prompt, text) or a submission "
        "(question_id, answer)"
    )


def _fields(layout: str, row: Row) -> tuple[Any, Any, str]:
    """Id, text and prompt of a row, not yet checked."""
    if layout == "judge":
        return row.get("question_id"), row.get("content"), ""
    if layout == "llava":
        prompt = row.get("prompt")
        return row.get("question_id"), row.get("text"), prompt if isinstance(prompt, str) else ""
    keys = [key for key in ("question_id", "questionId", "index", "image") if key in row]
    text = row["answer"] if "answer" in row and "prediction" not in row else row.get("prediction")
    return row[keys[0]] if keys else None, text, ""


CHUNK = re.compile(r"(\d+)_(\d+)\.jsonl")


def _read_folder(folder: Path) -> Answers:
    """The chunks that LLaVA's multi-GPU scripts write."""
    if (folder / "merge.jsonl").is_file():
        return read_answers(folder / "merge.jsonl")
    chunks = {match[0]: match for path in folder.glob("*.jsonl") if (match := CHUNK.fullmatch(path.name))}
    if chunks:
        total = max(int(match[2]) for match in chunks.values())
        names = [f"{number}_{total}.jsonl" for number in range(total)]
        if missing := [name for name in names if name not in chunks]:
            raise FileNotFoundError(f"{folder} is missing the chunks {missing} of {total}; run them again")
        return _from_lines(folder, "\n".join(read_text(folder / name) for name in names))
    files = sorted(path.name for path in folder.iterdir())[:12]
    raise FileNotFoundError(f"{folder} has no answers: expected merge.jsonl or chunks; it has {files}")
