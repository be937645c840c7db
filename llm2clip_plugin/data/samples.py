"""What a sample is: a key, an image, and captions with a kind and a language. And processes that
share the reading."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import threading
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llm2clip_plugin.options import setting

# "txt" is a tar's .txt member, "gpt" the answer in LLaVA's JSON, every other name a field of the
# sample's JSON.
DEFAULT_FIELDS = (
    "txt=short",
    "caption=short",
    "short_caption=short",
    "long_caption=long",
    "captions=short",
    "gpt=short",
)
LANGUAGE_CODE = re.compile(r"[a-z]{2,3}([-_]\w+)?")  # en, pt-BR, zh_Hant
# categories of characters: controls, formats, separators
INVISIBLE = ("Cc", "Cf", "Zl", "Zp", "Zs")
WORDS = re.compile(r"\w+")


@dataclass(frozen=True)
class Caption:
    """One text about an image."""

    text: str
    # short | long | keywords, or any word that the configuration names
    kind: str = "short"
    language: str = "en"


@dataclass(frozen=True)
class Sample:
    """One image with its captions. The image is read when ``read_image`` is called, the rest is in
    memory."""

    key: str  # name within its shard; a label, never a path
    # what captions are read from, by the names in ReadConfig.fields
    values: dict[str, Any] = field(compare=False)
    meta: dict[str, Any]  # the sample's own JSON
    # JPEG, PNG or WebP; raises BrokenSample if it is missing
    read_image: Callable[[], bytes] = field(compare=False)
    captions: tuple[Caption, ...] = ()
    blank_captions: int = 0  # captions without text, which ``captions`` leaves out


class BrokenSample(ValueError):  # noqa: N818 - an event of the data, as StopIteration is of a loop
    """A sample that can't be used: which shard, which key, and why."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"sample {key!r} of shard {shard!r}: {reason}")
        self.shard = shard
        self.key = key
        self.reason = reason

    def __reduce__(self) -> tuple[type[BrokenSample], tuple[str, str, str]]:
        # an exception pickles its message alone
        return BrokenSample, (self.shard, self.key, self.reason)


def count_broken(broken: Sequence[BrokenSample]) -> str:
    """How many samples can't be read, and which is the first."""
    return f"{len(broken)} samples can't be read, the first: {broken[0]}"


@dataclass(frozen=True)
class CaptionField:
    """A field that holds captions, with their kind and language."""

    name: str
    kind: str
    language: str


def parse_fields(
    specifications: Sequence[str], language: str
) -> tuple[CaptionField, ...]:
    """Parse ``NAME=KIND`` or ``NAME=KIND:LANGUAGE``; ValueError for another form, no fields, or a
    duplicate name."""
    fields: dict[str, CaptionField] = {}
    for text in specifications:
        name, equals, rest = text.partition("=")
        kind, _, own_language = rest.partition(":")
        if not (name and equals and kind):
            raise ValueError(
                f"caption field {text!r} is not NAME=KIND or NAME=KIND:LANGUAGE, as in txt=long"
            )
        if name in fields:
            raise ValueError(
                f"duplicate caption field {name!r} in {', '.join(specifications)}"
            )
        fields[name] = CaptionField(name, kind, own_language or language)
    if not fields:
        raise ValueError(
            "no caption fields configured; set at least one with --fields, such as caption=short"
        )
    return tuple(fields.values())


def read_captions(
    values: dict[str, Any], fields: Sequence[CaptionField]
) -> tuple[tuple[Caption, ...], int]:
    """The distinct captions, stripped, among a sample's ``values`` in the order of ``fields``, and
    how many are blank.

    A value is a text, an object {language: text}, an object ``{"text": ..., "kind": ...,
    "language": ...}``, whose kind and language take precedence over the field's, or a list of
    these. Raises ValueError for another shape.
    """
    captions = [
        caption
        for field in fields
        for caption in _captions(values.get(field.name), field)
    ]
    distinct = dict.fromkeys(caption for caption in captions if caption.text)
    return tuple(distinct), sum(not caption.text for caption in captions)


def _captions(value: Any, field: CaptionField) -> Iterator[Caption]:
    """Captions of one field's value, blank ones included."""
    if isinstance(value, str):
        yield Caption(visible(value), field.kind, field.language)
    elif isinstance(value, list):
        for item in value:
            yield from _captions(item, field)
    elif isinstance(value, dict) and isinstance(value.get("text"), str):
        kind = value.get("kind") or field.kind
        language = value.get("language") or field.language
        yield Caption(
            visible(value["text"]), well_formed(str(kind)), well_formed(str(language))
        )
    elif isinstance(value, dict) and all(
        isinstance(text, str) for text in value.values()
    ):
        for language, text in value.items():
            yield Caption(visible(text), field.kind, well_formed(language))
    elif value is not None:
        expected = "a text, a list of texts, {language: text}, or objects with a text"
        raise ValueError(
            f"caption field {field.name!r} has type {type(value).__name__}; expected {expected}"
        )


def visible(text: str) -> str:
    """The text, stripped and well formed; "" if all of it is spaces, or characters that nothing
    shows."""
    text = well_formed(text.strip())
    shows = text.isascii() or any(
        unicodedata.category(letter) not in INVISIBLE for letter in text
    )
    return text if shows else ""


def well_formed(text: str) -> str:
    """The text with surrogates, which JSON allows and UTF-8 does not: pairs joined, lone ones
    replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def holds_words(value: Any) -> bool:
    """Whether a field that is not used may be a caption: a text of words, not a name, a hash or
    JSON, or a list of texts or {language: text} with one."""
    if isinstance(value, str):
        return " " in value.strip() and value[0] not in "{["
    texts = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return False
    if (
        isinstance(value, dict)
        and len(value) > 1
        and all(map(LANGUAGE_CODE.fullmatch, value))
    ):
        return True
    return any(map(holds_words, texts))


def select_captions(
    captions: Iterable[Caption],
    kinds: Sequence[str] = (),
    languages: Sequence[str] = (),
) -> tuple[Caption, ...]:
    """The captions of these kinds and languages, in order; an empty sequence allows all."""
    of_kinds = (caption for caption in captions if not kinds or caption.kind in kinds)
    return tuple(
        caption
        for caption in of_kinds
        if not languages or caption.language in languages
    )


def caption_hash(text: str) -> int:
    """The first 64 bits of the text's SHA-256, as a signed integer that fits torch.int64."""
    return int.from_bytes(
        hashlib.sha256(text.encode()).digest()[:8], "big", signed=True
    )


def hash_hex(value: int) -> str:
    """A caption hash as the 16 hexadecimal characters that manifests and messages show."""
    return value.to_bytes(8, "big", signed=True).hex()


def words_of(text: str) -> str:
    """The words of a text, so that texts are compared without case and punctuation."""
    return " ".join(WORDS.findall(text.casefold()))


def parse_weights(specifications: Sequence[str]) -> dict[str, float]:
    """``KIND=WEIGHT`` as in ``short=1``. Raises ValueError for another form, a duplicate, or a
    weight not above 0."""
    weights: dict[str, float] = {}
    for text in specifications:
        kind, equals, number = text.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not (kind and equals and 0 < weight < float("inf")):
            raise ValueError(
                f"caption weight {text!r} is not KIND=WEIGHT with a number above 0, "
                "as in short=1 long=1"
            )
        if kind in weights:
            raise ValueError(
                f"caption weights {' '.join(specifications)} name {kind!r} twice"
            )
        weights[kind] = weight
    return weights


def caption_shares(
    captions: Sequence[Caption], weights: Mapping[str, float]
) -> list[float]:
    """(m) probabilities: a kind's is its weight among the kinds that the sample has, shared by its
    captions. Without ``weights`` all are equal. Raises KeyError for a caption of a kind without a
    weight."""
    if not weights:
        return [1 / len(captions)] * len(captions)
    counts = Counter(caption.kind for caption in captions)
    total = sum(weights[kind] for kind in counts)
    return [
        weights[caption.kind] / counts[caption.kind] / total for caption in captions
    ]


def choose_caption(
    captions: Sequence[Caption], weights: Mapping[str, float], rng: random.Random
) -> Caption:
    """One caption, drawn with one number of ``rng``."""
    if not weights:
        return captions[rng.randrange(len(captions))]
    draw = rng.random()
    for caption, share in zip(captions, caption_shares(captions, weights), strict=True):
        draw -= share
        if draw < 0:
            return caption
    return captions[-1]  # the shares add up to 1 but for rounding


def choose_captions(
    captions: Sequence[Caption],
    weights: Mapping[str, float],
    count: int,
    rng: random.Random,
) -> tuple[Caption, ...]:
    """``count`` captions, drawn without replacement until none is left, then again from all."""
    chosen: list[Caption] = []
    left: list[Caption] = []
    while len(chosen) < count:
        left = left or list(captions)
        chosen.append(choose_caption(left, weights, rng))
        left.remove(chosen[-1])
    return tuple(chosen)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of training images."""

    scale: tuple[float, float] = setting(
        (0.9, 1.0),
        help="smallest and largest area of the crop, a fraction of the image's",
        learned=True,
    )
    ratio: tuple[float, float] = setting(
        (3 / 4, 4 / 3),
        help="smallest and largest width / height of the crop; NaFlex: x its own",
        learned=True,
    )
    flip: bool = setting(
        False,
        help="mirror half of the images; text in them is mirrored too",
        learned=True,
    )
    rotate: float = setting(
        0.0,
        help="degrees; the angle is uniform in -rotate .. rotate",
        unit="degrees",
        learned=True,
    )
    decode_margin: float = setting(
        1.0,
        help="a JPEG is decoded to at least this many times the pixels a side that the crop needs",
        learned=True,
    )

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"crop scale is {self.scale}, expected two numbers within 0 .. 1, the smaller first"
            )
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(
                f"crop ratio is {self.ratio}, expected two numbers above 0, the smaller first"
            )
        if not 0 <= self.rotate <= 180:
            raise ValueError(
                f"rotate is {self.rotate}, expected degrees within 0 .. 180"
            )


# Processes that share the reading of a data set, and what they hand over in shared memory.

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parallel(
    function: Callable[[Item], Result], items: Iterable[Item], *, processes: int
) -> Iterator[Result]:
    """``function`` of each item in order, in processes that get it once; in this process if
    ``processes`` is below 2. What is left is dropped after an error or Ctrl-C, and the processes
    end when this one is killed."""
    if processes <= 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(processes, initializer=_begin, initargs=(function,))
    try:
        yield from map_in_order(pool, _call, items, ahead=8 * processes)
    finally:
        pool.shutdown(cancel_futures=True)


def map_in_order(
    pool: Executor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    ahead: int,
) -> Iterator[Result]:
    """Results in order of the items, of which at most ``ahead`` are in work or waiting;
    ``pool.map`` takes them all."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_function: Callable[[Any], Any]  # of ``parallel``; set in each of its processes


def _begin(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    # Ctrl-C reaches them too; the parent ends them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _call(item: Any) -> Any:
    return _function(item)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# Loader processes hand over images in parts of a batch, through a bounded amount of shared memory.

SHARED_MEMORY = "/dev/shm"  # where torch's loader processes put tensors on Linux
PREFETCH_MB = 256  # of /dev/shm, for each rank; 10^6 bytes
EVALUATION_MB = 64  # more during an evaluation, and in the fit of the heads
SMALL_PART = 16  # rows; a smaller part would cost more to hand over than it helps


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """The parts in which one rank's loader processes hand over its rows of a batch."""

    part: int  # rows that a loader process hands over at once
    prefetch: int  # parts that each loader process prepares ahead
    workers: int  # loader processes; 0: the rank itself loads, without shared memory
    row_bytes: int  # image and embedding of a row

    @property
    def shared_bytes(self) -> int:
        """Most bytes in shared memory: the parts prepared ahead, and the one that the rank copies
        out."""
        if not self.workers:
            return 0
        parts = self.workers * self.prefetch + 1
        return parts * self.part * self.row_bytes


def row_bytes(side: int, width: int) -> int:
    """Bytes of a row: an RGB image of ``side`` pixels a side, and an embedding of ``width`` float32
    values."""
    return 3 * side**2 + 4 * width


def plan_loading(
    *, rows: int, micro_batch: int, workers: int, row_bytes: int, prefetch_mb: float
) -> LoadPlan:
    """Parts of at most a micro-batch, two or more ahead for each process, within ``prefetch_mb``
    (10^6 bytes), but no more than two batches. Under a very small ``prefetch_mb`` each process
    prepares one row ahead."""
    if not workers:
        return LoadPlan(part=micro_batch, prefetch=0, workers=0, row_bytes=row_bytes)
    affordable = int(prefetch_mb * 1e6) // row_bytes  # rows
    # every process has a share of every batch
    spread = max(SMALL_PART, -(-rows // workers))
    part = max(1, min(micro_batch, spread, affordable // (2 * workers + 1)))
    enough = max(2, -(-2 * rows // (part * workers)))
    prefetch = max(1, min(enough, (affordable // part - 1) // workers))
    return LoadPlan(part=part, prefetch=prefetch, workers=workers, row_bytes=row_bytes)


def plan_evaluation(batch: int, workers: int, side: int, width: int) -> LoadPlan:
    """Of an evaluation, or of the heads' fit: batches of images of ``side`` pixels and embeddings
    of ``width``."""
    sizes = {"rows": batch, "micro_batch": batch, "row_bytes": row_bytes(side, width)}
    return plan_loading(**sizes, workers=workers, prefetch_mb=EVALUATION_MB)


def lacks_shared_memory(
    plans: Sequence[LoadPlan], ranks: int, folder: str = SHARED_MEMORY
) -> str:
    """Why ``ranks`` ranks on this machine can't load as planned, each with all of ``plans``; "" if
    they can."""
    need = ranks * sum(plan.shared_bytes for plan in plans)
    if not os.path.isdir(folder):  # not Linux: nothing to compare
        return ""
    free = shutil.disk_usage(folder).free
    if need <= free:
        return ""
    gigabytes = -(-need // 10**9) + 1
    return (
        f"{folder} has {free:,} bytes free, the loader processes of "
        f"{ranks} ranks on this machine need {need:,}; "
        f"start the container with --ipc=host or --shm-size={gigabytes}g, "
        "or lower --dataloader-prefetch-mb or --workers (0 needs none)"
    )
