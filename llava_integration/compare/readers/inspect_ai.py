"""inspect_ai's logs, ``.eval`` (a zip file) or ``.json``; the value of the log's headline scorer, mean over epochs."""

import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_integration.compare.readers import CATEGORIES, IMAGES, Log, Reader, first_of, number
from llm2clip_plugin.files import ContractError, read_json_value

GRADES = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}  # correct, partially correct, incorrect, no answer
HEAD = 4096  # bytes at a log's start that name its parts


def fits(path: Path) -> bool:
    """Recognized by its ending, or by JSON that begins with the log's version and status."""
    if path.suffix == ".eval":
        return True  # also one that was cut, which read() refuses
    with path.open("rb") as file:
        head = file.read(HEAD)
    return b'"status"' in head and b'"eval"' in head and b'"run_id"' in head


def load(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A log's header and its samples."""
    if path.suffix == ".json":
        log = read_json_value(path)
        return log, log.get("samples") or []
    if sys.version_info < (3, 14):
        import zipfile_zstd  # noqa: F401 - teaches zipfile zstd, which newer logs are compressed with
    try:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("header.json")), json.loads(archive.read("summaries.json"))
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ContractError(f"{path} is no whole log of inspect_ai ({error}); was the run cut off?") from error


def read(path: Path) -> Iterator[Log]:
    """Raises ContractError for a log without scores, or with samples that its scorer did not judge."""
    header, samples = load(path)
    results = header.get("results") or {}
    headline = results.get("headline") or next(iter(results.get("scores") or []), {})
    scorer, task = headline.get("scorer"), header.get("eval", {}).get("task", path.stem)
    if header.get("status") != "success" or not scorer:
        raise ContractError(f"{path}: the run's status is {header.get('status')!r}; only a finished, scored run counts")
    values: dict[str, list[float]] = {}
    first: dict[str, dict[str, Any]] = {}
    for sample in samples:
        where = f"{path}, sample {sample.get('id')}: {scorer}"
        value = (sample.get("scores") or {}).get(scorer, {}).get("value")
        value = GRADES.get(value, value) if isinstance(value, str) else value
        values.setdefault(str(sample.get("id")), []).append(number(value, where))
        first.setdefault(str(sample.get("id")), sample)
    items = []
    for name, sample in first.items():
        about = sample.get("metadata") or {}
        item = {"id": name, "score": sum(values[name]) / len(values[name]), "truth": sample.get("target")}
        items.append({**item, "cluster": first_of(about, IMAGES) or name, "category": first_of(about, CATEGORIES)})
    model = str(header.get("eval", {}).get("model", ""))
    yield Log(benchmark=f"{task} {scorer}", metrics={}, items=items, model=model)


READER = Reader(name="inspect_ai", endings=(".eval", ".json"), fits=fits, read=read)
