"""Image-text retrieval over embeddings: recall@k in both directions, with any number of captions
per image.

Shapes: N images, B of a batch, S pixels a side, M captions, D projection dimension, Q queries of
one direction.

``i2t``: an image is the query and the captions are ranked, a hit if any correct caption is in the
top k (other code calls this text retrieval). ``t2i``: a caption is the query and the images are
ranked (image retrieval).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig, Normalize
from llm2clip_plugin.data.pairs import EvalPairs
from llm2clip_plugin.data.samples import BrokenSample, Caption, select_captions
from llm2clip_plugin.data.sources import Source
from llm2clip_plugin.evaluate.config import KS, RetrievalConfig
from llm2clip_plugin.progress import track
from llm2clip_plugin.train.distributed import (
    Group,
    gather_objects,
    group_of,
    rank,
    sum_over_ranks,
    world_size,
)
from llm2clip_plugin.vision.dual import DualEncoder, LoadedDualEncoder
from llm2clip_plugin.vision.towers import eval_mode

ALL = "all"  # the part with every caption
# samples whose JSON is read before a run, evenly spaced: what fewer lack is found later
LOOKED_AT = 2048
BLOCK = 1 << 22  # scores computed at once: 16 MiB
TEXT_BATCH = 512  # captions in one call of the text adapter

Dual: TypeAlias = DualEncoder | LoadedDualEncoder


@dataclass(frozen=True, kw_only=True)
class QueryRanks:
    """Three int64 counts per query that decide its hit at any k."""

    higher_Q: Tensor  # items that score strictly above the best correct item
    wrong_equal_Q: Tensor  # wrong items with exactly its score
    # correct items with exactly its score, itself included; 0 if the query has no correct item
    correct_equal_Q: Tensor

    def __len__(self) -> int:
        return len(self.higher_Q)

    def select(self, index: Tensor) -> QueryRanks:
        """The counts of some queries; ``index`` is a mask or positions."""
        return QueryRanks(**{name: count_Q[index] for name, count_Q in vars(self).items()})

    def hits(self, k: int) -> Tensor:
        """(Q,) float64 in [0, 1]: is a correct item in the top ``k``? Equal scores are in random
        order.

        The hit is the probability that a correct item is in the top k: a tie with one wrong item
        counts one half, with n - 1 wrong ones 1 / n, so a tower that gives everything the same
        embedding gets chance. Raises ValueError for a query without a correct item.
        """
        if missing := int((self.correct_equal_Q == 0).sum()):
            raise ValueError(
                f"{missing} of {len(self)} queries have no correct item; exclude them with select()"
            )
        wrong_Q = self.wrong_equal_Q.double()
        correct_Q = self.correct_equal_Q.double()
        # probability that wrong items alone fill the s = k - higher places
        miss_Q = torch.ones_like(wrong_Q)
        # C(e, s) / C(e + r, s) = product over j < s of (e - j) / (e + r - j): e wrong, r correct
        for j in range(k):
            factor_Q = (wrong_Q - j).clamp(min=0) / (wrong_Q + correct_Q - j).clamp(min=1)
            miss_Q = torch.where(k - self.higher_Q > j, miss_Q * factor_Q, miss_Q)
        return 1.0 - miss_Q


def rank_both(
    first_ND: Tensor,
    second_MD: Tensor,
    first_label_N: Tensor,
    second_label_M: Tensor,
    *,
    all_ranks: bool = False,
) -> tuple[QueryRanks, QueryRanks]:
    """Ranks of each first row's best correct item among the second rows, and vice versa; on the
    CPU.

    The score is the dot product, on the embeddings' device, in fp32 whatever the input dtype,
    autocast and TF32; rows are correct for each other if their labels (int) are equal. A query
    without a correct item has ``correct_equal`` 0. ``all_ranks``: every rank of the default process
    group calls this with the same arrays and gets all results; the ranks split the blocks, which
    are the same for any number of ranks, and so are the results. Raises ValueError for embeddings
    that don't fit their labels, are none, or are not finite.
    """
    sides = [(first_ND, first_label_N), (second_MD, second_label_M)]
    for vectors, labels in sides:
        if vectors.ndim != 2 or not len(vectors) or labels.shape != vectors.shape[:1]:
            raise ValueError(
                f"expected (N, D) embeddings and (N,) labels, got {vectors.shape} and "
                f"{labels.shape}"
            )
        # no comparison with a NaN is true: it would be a hit
        if broken := int((~torch.isfinite(vectors.sum(1))).sum()):
            raise ValueError(f"{broken} of {len(vectors)} embeddings are not finite")
    group = group_of(all_ranks)
    first, second = ((vectors.float(), labels.to(vectors.device)) for vectors, labels in sides)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(first_ND.device.type, enabled=False):
            return _rank(*first, *second, group), _rank(*second, *first, group)
    finally:
        torch.set_float32_matmul_precision(before)


def _rank(
    query_QD: Tensor, label_Q: Tensor, item_ID: Tensor, label_I: Tensor, group: Group
) -> QueryRanks:
    """The ranks of one direction."""
    label_I, order_I = label_I.sort()  # a query's correct items are neighbors
    item_ID = item_ID[order_I]
    # identical items get one score, and tie exactly, whatever the matrix product does at its edges
    item_UD, distinct_I = torch.unique(item_ID, dim=0, return_inverse=True)
    if len(item_UD) == len(item_ID):
        item_UD = item_ID
        distinct_I = slice(None)
    first_Q, end_Q = (torch.searchsorted(label_I, label_Q, right=right) for right in (False, True))
    counts_3Q = torch.zeros(3, len(query_QD), dtype=torch.int64, device=query_QD.device)
    step = max(1, BLOCK // len(item_ID))
    for start in range(rank(group) * step, len(query_QD), world_size(group) * step):
        some = slice(start, start + step)
        score_qI = (query_QD[some] @ item_UD.T)[:, distinct_I]
        first_q1 = first_Q[some, None]
        end_q1 = end_Q[some, None]
        place_qC = first_q1 + torch.arange(
            max(1, int((end_q1 - first_q1).max())), device=first_q1.device
        )
        inside_qC = place_qC < end_q1
        correct_qC = score_qI.gather(1, place_qC.clamp(max=len(item_ID) - 1)).masked_fill(
            ~inside_qC, -torch.inf
        )
        best_q1 = correct_qC.amax(1, keepdim=True)
        counts_3Q[0, some] = (score_qI > best_q1).sum(1, dtype=torch.int32)
        counts_3Q[2, some] = ((correct_qC == best_q1) & inside_qC).sum(1)
        counts_3Q[1, some] = (score_qI == best_q1).sum(1, dtype=torch.int32) - counts_3Q[2, some]
    higher_Q, wrong_equal_Q, correct_equal_Q = sum_over_ranks(counts_3Q, group).cpu()
    return QueryRanks(
        higher_Q=higher_Q, wrong_equal_Q=wrong_equal_Q, correct_equal_Q=correct_equal_Q
    )


@dataclass(frozen=True)
class Retrieval:
    """Of each direction (i2t, t2i) the ranks and the positions of its queries, among the images or
    the captions.

    The queries of i2t are the images with a correct caption in the pool, those of t2i the captions
    in it.
    """

    sides: dict[str, tuple[QueryRanks, Tensor]]

    def metrics(self, ks: Sequence[int] = KS) -> dict[str, float]:
        """Mean hits, fractions 0 to 1: ``i2t_r1``, ``t2i_r1``, ``i2t_r5`` ..."""
        return {
            f"{side}_r{k}": float(ranks.hits(k).mean())
            for k in ks
            for side, (ranks, _) in self.sides.items()
        }


def recall(
    image_ND: Tensor,
    text_MD: Tensor,
    owner_M: Tensor,
    ks: Sequence[int] = KS,
    *,
    group_N: Tensor | None = None,
    all_ranks: bool = False,
) -> dict[str, float]:
    """Recall@k in both directions by cosine similarity, as fractions: ``i2t_r1``, ``t2i_r1`` ...;
    ties count half.

    ``image_ND``, ``text_MD``: embeddings, normalized here. ``owner_M``: int, the image of each
    caption; every image has at least one. ``group_N``: int, a label per image (several pictures of
    one concept): the captions of a group are correct for all of its images, and its images for all
    of its captions; None: every image is its own group. ``all_ranks``: see `rank_both`. Raises
    ValueError for an image without a caption, or non-finite embeddings.
    """
    label_N = torch.arange(len(image_ND)) if group_N is None else group_N.cpu()
    retrieval = retrieve(image_ND, text_MD, label_N, label_N[owner_M.cpu()], all_ranks=all_ranks)
    if missing := len(image_ND) - len(retrieval.sides["i2t"][0]):
        raise ValueError(f"{missing} of {len(image_ND)} images have no caption")
    return retrieval.metrics(ks)


def retrieve(
    image_ND: Tensor,
    text_MD: Tensor,
    image_label_N: Tensor,
    caption_label_M: Tensor,
    *,
    captions: Tensor | None = None,
    all_ranks: bool = False,
) -> Retrieval:
    """Rank in both directions; a caption is correct for an image if their labels (int) are equal.

    ``captions``: positions or a mask of the captions to use (one kind, one language); None: all. An
    image without a correct caption among them stays in the pool of t2i, but is not a query of i2t.
    """
    caption_index = torch.arange(len(text_MD))
    if captions is not None:
        caption_index = caption_index[captions.cpu()]
        text_MD = text_MD[caption_index.to(text_MD.device)]
    image_ND = F.normalize(image_ND.float(), dim=1)
    text_MD = F.normalize(text_MD.float(), dim=1)
    labels = image_label_N.cpu(), caption_label_M.cpu()[caption_index]
    i2t, t2i = rank_both(image_ND, text_MD, *labels, all_ranks=all_ranks)
    image_index = torch.nonzero(i2t.correct_equal_Q).flatten()
    return Retrieval({"i2t": (i2t.select(image_index), image_index), "t2i": (t2i, caption_index)})


class EncodedImages(NamedTuple):
    """The readable images in order, and the others."""

    numbers: list[int]  # in the source
    keys: list[str]
    meta: list[dict[str, Any]]  # the JSON of each sample
    vectors: list[Tensor]  # (b, D) of each batch, float32, on the CPU
    broken: list[BrokenSample]

    def joined(self) -> Tensor:
        """(N, D): all vectors; raises ValueError if there are none."""
        if not self.numbers:
            raise ValueError(f"no usable images: {(self.broken or ['the data is empty'])[0]}")
        return torch.cat(self.vectors)


@torch.no_grad()
def encode_images(
    encode: Callable[..., Tensor],
    source: Source,
    images: ImageConfig,
    device: torch.device,
    *,
    all_ranks: bool = False,
    quiet: bool = False,
    label: str = "images",
    **options: Any,
) -> EncodedImages:
    """A source's images, also those without captions, through ``encode``, (B, 3, S, S) on
    ``device`` -> (B, D) or more; of images that keep their aspect it gets the spatial_shapes (B,
    2), too.

    ``options``: batch, workers, and which samples: see `EvalPairs`. ``all_ranks``: every rank of
    the default process group calls this, encodes a part, and gets all.
    """
    group = group_of(all_ranks)
    normalize = Normalize(images, device)
    options = {
        "batch": 64,
        "kinds": None,
        "rank": rank(group),
        "world": world_size(group),
        **options,
    }
    batches = EvalPairs(source, None, images, **options)
    # Under ZeRO-3 each forward gathers weights from all ranks, so all must make the same number of
    # calls.
    calls = max(gather_objects(len(batches), group))
    encoded = EncodedImages([], [], [], [], [])
    remaining = iter(batches)
    show = not quiet and rank(group) == 0
    for _ in track(range(calls), total=calls, label=label, unit="batches", show=show):
        loaded = next(remaining, None)
        if loaded is None:
            encode(normalize(torch.zeros(1, images.size, images.size, 3, dtype=torch.uint8)))
            continue
        encoded.vectors.append(
            encode(normalize(loaded["pixels"]), *normalize.shapes(loaded)).float().cpu()
        )
        encoded.numbers.extend(loaded["image_ids"].tolist())
        encoded.keys.extend(loaded["keys"])
        encoded.meta.extend(loaded["meta"])
    encoded.broken.extend(batches.broken)
    return _of_all_ranks(encoded, group)


def _of_all_ranks(encoded: EncodedImages, group: Group) -> EncodedImages:
    """The images of every rank, in order of rank, on every rank."""
    broken = [[sample.shard, sample.key, sample.reason] for sample in encoded.broken]
    exchanged: list[Any] = [encoded.numbers, encoded.keys, encoded.meta, encoded.vectors, broken]
    total = EncodedImages([], [], [], [], [])
    for part in gather_objects(exchanged, group):
        numbers, keys, meta, vectors, left_out = part
        total.numbers.extend(numbers)
        total.keys.extend(keys)
        total.meta.extend(meta)
        total.vectors.extend(vectors)
        total.broken.extend(BrokenSample(*fields) for fields in left_out)
    return total


@dataclass(frozen=True, kw_only=True)
class EmbeddedPairs:
    """Images and captions in the space that the dual encoder projects to."""

    image_ND: Tensor  # float32, on the CPU, in the source's order
    text_MD: Tensor  # float32, on the CPU; captions with one teacher embedding have the same bits
    owner_M: Tensor  # int64: position among the N of the image that a caption describes
    captions: list[Caption]  # M
    keys: list[str]  # N
    meta: list[dict[str, Any]]  # N: the JSON of each sample
    broken: list[BrokenSample]  # samples left out
    numbers: list[int] = field(default_factory=list)  # N: of the images in the source

    def meta_values(self, field: str) -> list[str]:
        """The value of a field of each image's JSON as text (N); ValueError names an image without
        it."""
        return [
            str(json_field(meta, field, key))
            for key, meta in zip(self.keys, self.meta, strict=True)
        ]


def embed_pairs(
    dual: Dual,
    source: Source,
    cache: EmbeddingCache,
    images: ImageConfig,
    config: RetrievalConfig,
    *,
    all_ranks: bool = False,
    quiet: bool = False,
) -> EmbeddedPairs:
    """The images of ``source`` and their captions that ``config`` selects (kinds, languages,
    limit).

    Equal captions get equal bits, whichever images have them: each goes through the text adapter
    once. ``all_ranks``: every rank of the default process group calls this and gets everything; the
    ranks split the work. Raises ValueError if no sample is usable; ContractError if the cache does
    not belong to this source.
    """
    with eval_mode(dual) as encoders, torch.no_grad():
        options: dict[str, Any] = {
            "batch": config.batch,
            "workers": config.workers or 0,
            "kinds": config.kinds,
            "languages": config.languages,
            "indices": range(min(config.limit or len(source), len(source))),
            "all_ranks": all_ranks,
            "quiet": quiet,
        }
        device = next(encoders.parameters()).device
        encoded = encode_images(encoders.encode_image, source, images, device, **options)
        image_ND = encoded.joined()
        rows: dict[bytes, Tensor] = {}  # each distinct teacher embedding
        # of each caption
        distinct: list[bytes] = []
        owner: list[int] = []
        captions: list[Caption] = []
        for image, number in enumerate(encoded.numbers):
            key, of_sample = source.captions(number)
            used = select_captions(of_sample, config.kinds, config.languages)
            embedded = cache.rows(*source.locate(number), used, key=key)
            for caption, row in zip(used, embedded, strict=True):
                digest = hashlib.blake2b(row.numpy().tobytes(), digest_size=16).digest()
                distinct.append(digest)
                rows.setdefault(digest, row)
                owner.append(image)
                captions.append(caption)
        text_UD = encode_texts(encoders, torch.stack(list(rows.values())), all_ranks)
    position_of = {digest: position for position, digest in enumerate(rows)}
    return EmbeddedPairs(
        image_ND=image_ND,
        text_MD=text_UD[[position_of[digest] for digest in distinct]],
        owner_M=torch.tensor(owner),
        captions=captions,
        keys=encoded.keys,
        meta=encoded.meta,
        broken=encoded.broken,
        numbers=encoded.numbers,
    )


def encode_texts(encoders: Dual, teacher_UW: Tensor, all_ranks: bool = False) -> Tensor:
    """(U, D) float32 on the CPU; batches, and so bits, are the same on any number of ranks."""
    device = next(encoders.parameters()).device
    group = group_of(all_ranks)
    batches = teacher_UW.split(TEXT_BATCH)
    ranks = world_size(group)
    # every rank makes the same number of calls, the last ones perhaps with a row that is not used
    turns = range(rank(group), -(-len(batches) // ranks) * ranks, ranks)
    encoded_here: list[Tensor] = []
    for turn in turns:
        teacher_BW = batches[turn] if turn < len(batches) else batches[0][:1]
        encoded_here.append(encoders.encode_text(teacher_BW.to(device)).float().cpu())
    encoded = gather_objects(encoded_here, group)
    return torch.cat([encoded[number % ranks][number // ranks] for number in range(len(batches))])


@dataclass(frozen=True, kw_only=True)
class RetrievalReport:
    """Ranks of every part, and what identifies their queries."""

    ks: tuple[int, ...]
    parts: dict[str, Retrieval]  # ALL first
    pairs: EmbeddedPairs
    cluster_N: list[str]  # bootstrap cluster of each image
    counts: dict[str, int]

    def metrics(self) -> dict[str, float]:
        """``i2t_r1`` ... over all captions, ``long:en/i2t_r1`` by part."""
        flat: dict[str, float] = {}
        for name, part in self.parts.items():
            flat |= {
                ("" if name == ALL else f"{name}/") + key: value
                for key, value in part.metrics(self.ks).items()
            }
        return flat

    def items(self) -> list[dict[str, Any]]:
        """One per query: ``id``, ``score`` (hit at the first k), ``cluster``, ``part``, ``side``,
        ``r1`` ..."""
        owner_M = self.pairs.owner_M
        keys = self.pairs.keys
        # among its image's captions
        number_M = torch.arange(len(owner_M)) - torch.searchsorted(owner_M, owner_M)
        captions = zip(owner_M.tolist(), number_M.tolist(), strict=True)
        named = {  # (image, name that is the same in every run) of each possible query
            "i2t": list(enumerate(keys)),
            "t2i": [(image, f"{keys[image]}#{number}") for image, number in captions],
        }
        out: list[dict[str, Any]] = []
        for name, part in self.parts.items():
            for side, (ranks, index_Q) in part.sides.items():
                for query, *hits in zip(
                    index_Q.tolist(), *(ranks.hits(k).tolist() for k in self.ks), strict=True
                ):
                    image, label = named[side][query]
                    item = {
                        "id": f"{name}/{side}/{label}",
                        "score": hits[0],
                        "cluster": self.cluster_N[image],
                    }
                    scores = {f"r{k}": hit for k, hit in zip(self.ks, hits, strict=True)}
                    out.append(item | {"part": name, "side": side, **scores})
        return out

    def scores(self) -> ScoreFile:
        """The record that `llm2clip compare` reads, without the names of the benchmark and the
        model."""
        notes = [f"left out: {error}" for error in self.pairs.broken]
        return ScoreFile(
            benchmark="",
            metrics=self.metrics(),
            items=self.items(),
            counts=self.counts,
            notes=notes,
        )


def evaluate_retrieval(
    dual: Dual,
    source: Source,
    cache: EmbeddingCache,
    images: ImageConfig,
    config: RetrievalConfig | None = None,
    *,
    all_ranks: bool = False,
    quiet: bool = False,
) -> RetrievalReport:
    """Measure a dual encoder's retrieval on a data source whose captions are in the cache; every
    submodule keeps its mode (train, eval). ``all_ranks``: every rank of the default process group
    calls this and gets the report.

    Raises ValueError if no image is usable, or if samples have no field ``group`` or ``cluster``.
    """
    config = config or RetrievalConfig()
    pairs = embed_pairs(dual, source, cache, images, config, all_ranks=all_ranks, quiet=quiet)
    return report_retrieval(
        pairs, config, all_ranks=all_ranks, device=next(dual.parameters()).device
    )


def report_retrieval(
    pairs: EmbeddedPairs,
    config: RetrievalConfig,
    *,
    all_ranks: bool = False,
    device: torch.device | str = "cpu",
) -> RetrievalReport:
    """Measure retrieval on embedded pairs; ``device``: where scores are computed."""
    image_ND = pairs.image_ND.to(device)
    text_MD = pairs.text_MD.to(device)
    label_N = torch.arange(len(pairs.keys))
    if config.group:
        number_of: dict[str, int] = {}
        label_N = torch.tensor(
            [number_of.setdefault(v, len(number_of)) for v in pairs.meta_values(config.group)]
        )
    label_M = label_N[pairs.owner_M]

    def ranked(captions: Tensor) -> Retrieval:
        subset = None if bool(captions.all()) else captions  # all captions need no copy
        return retrieve(image_ND, text_MD, label_N, label_M, captions=subset, all_ranks=all_ranks)

    used_M = torch.ones(len(label_M), dtype=torch.bool)
    if config.group:  # the first of each group's captions with the same text, kind and language
        first: dict[tuple[int, Caption], int] = {}
        for number, caption in enumerate(zip(label_M.tolist(), pairs.captions, strict=True)):
            used_M[number] = first.setdefault(caption, number) == number
    parts = {ALL: ranked(used_M)}
    names = [f"{caption.kind}:{caption.language}" for caption in pairs.captions]
    if len(set(names)) > 1:
        for name in dict.fromkeys(names):
            parts[name] = ranked(used_M & torch.tensor([other == name for other in names]))
    cluster = config.cluster or config.group
    return RetrievalReport(
        ks=config.ks,
        parts=parts,
        pairs=pairs,
        cluster_N=pairs.meta_values(cluster) if cluster else list(pairs.keys),
        counts={
            "images": len(pairs.keys),
            "captions": int(used_M.sum()),
            "left_out": len(pairs.broken),
        },
    )


def json_field(meta: Mapping[str, Any], name: str, key: str, *, before: str = "") -> Any:
    """A field of the JSON of the sample ``key``. ValueError with the known ones, after ``before``,
    if it has none."""
    if name in meta:
        return meta[name]
    names = ", ".join(sorted(meta)) or "none"
    raise ValueError(f"{before}sample {key!r} has no field {name!r} in its JSON; known: {names}")


def check_measurable(source: Source, config: RetrievalConfig, *, option: str = "--") -> None:
    """ValueError for kinds and languages without a caption, a field that a sample lacks;
    ``option``: their prefix."""
    images = min(config.limit or len(source), len(source))
    captions = set[Caption]()
    for number in range(0, images, max(1, images // LOOKED_AT)):
        with suppress(BrokenSample):
            sample = source[number]
            captions.update(sample.captions)
            for setting, name in (("group", config.group), ("cluster", config.cluster)):
                if name:
                    json_field(
                        sample.meta,
                        name,
                        sample.key,
                        before=f"{option}{setting} {name}: {source.path}: ",
                    )
    if not select_captions(list(captions), config.kinds, config.languages):
        available = (
            ", ".join(sorted({f"{caption.kind}:{caption.language}" for caption in captions}))
            or "none"
        )
        kinds, languages = (
            " ".join(names) or "(any)" for names in (config.kinds, config.languages)
        )
        wanted = f"{option}kinds {kinds} and {option}languages {languages}"
        raise ValueError(f"no caption of {source.path} has {wanted}; known: {available}")
