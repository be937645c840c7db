"""Caption-contrastive training of an LLM: pairs (two captions of an image, or rows of a text-pair
file), step and loss.

A batch is drawn from one source and, from a caption set, with one kind of pair (short and long,
say), so that its negatives are alike. The order is a function of (seed, samples consumed), as in
data.sampler. The step is the tower's; both sides of a pair are texts.

Shape letters: b this rank's pairs, m pairs of a micro-batch, N pairs over all ranks, R texts of a
micro-batch, G texts of one length group, T tokens, W embedding width.
"""

import dataclasses
import json
import math
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from llm2clip_plugin.data.pairs import leave_signals_to_the_run
from llm2clip_plugin.data.sampler import Draw, Mixture, hash_words, rank_rows, sample_rng
from llm2clip_plugin.data.samples import BrokenSample, Caption, caption_hash, select_captions
from llm2clip_plugin.data.sources import Source, SourceConfig, check_fields, open_source
from llm2clip_plugin.outside import refuse_encoding
from llm2clip_plugin.text.config import ContrastConfig, EncoderConfig, PairKind, PairsConfig
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.frames import Frame, build_frame, tokenize
from llm2clip_plugin.text.llm import CaptionModel, TokenBatch, literal_template
from llm2clip_plugin.train.distributed import gather_rows, rank, world_size
from llm2clip_plugin.train.engine import Engine
from llm2clip_plugin.train.losses.base import EXCLUDED, Features, Terms, stack_ids
from llm2clip_plugin.train.losses.infonce import contrastive_loss
from llm2clip_plugin.train.step import Batch, ContrastiveStep, Encoded

SURVEYED = 5000  # samples read before training, to detect a wrong configuration
NEGATIVES_TRIED = 100  # random images in which a negative is searched
SUBSTITUTES = 100  # samples tried in place of one without a pair of the batch's kind
PREFETCH = 2  # batches that each process reads ahead


@dataclass(frozen=True)
class Pair:
    """Two texts with the same meaning, and optionally a hard negative."""

    key: str
    query: str
    positive: str
    negative: str = ""
    group: str = ""  # pairs of one group are not used as negatives of each other
    instruction: str | None = None  # text before the query; None: the encoder's query prompt


class CaptionPairs:
    """Two captions of one image."""

    def __init__(self, source: Source, config: PairsConfig) -> None:
        self.source = source
        self.config = config
        self.path = source.path
        self.sizes = [shard.size for shard in source.shards]  # samples of each shard
        self.kinds = config.kinds
        self.drawn_items = config.drawn_items
        self.instruction_of = config.instruction_of

    def __len__(self) -> int:
        return sum(self.sizes)

    def pair(self, number: int, kind: PairKind, rng: random.Random) -> Pair | None:
        """A pair of one sample, chosen by ``rng``; None if it has none of this kind."""
        try:
            sample = self.source[number]
        except BrokenSample:
            return None
        captions = select_captions(
            sample.captions, self.source.config.kinds, self.source.config.languages
        )
        query = self._text(captions, kind.query, rng, "")
        positive = self._text(captions, kind.of_positive, rng, query)
        if not query or not positive:
            return None
        group = str(sample.meta.get(self.config.group, "")) if self.config.group else ""
        return Pair(
            sample.key,
            query,
            positive,
            group=group,
            instruction=self.instruction_of.get(kind.query),
        )

    def with_negative(self, pair: Pair, kind: PairKind, rng: random.Random) -> Pair:
        """Adds a caption of the positive's kind, of a random image of another key and group;
        ValueError without one."""
        for _ in range(NEGATIVES_TRIED):
            other = self.pair(rng.randrange(len(self)), kind, rng)
            if other is None or other.key == pair.key or (pair.group and other.group == pair.group):
                continue
            if other.positive not in (pair.query, pair.positive):
                return dataclasses.replace(pair, negative=other.positive)
        raise ValueError(
            f"{self.path}: {NEGATIVES_TRIED} random images have no negative for {pair.key!r}; "
            "omit --random-negatives"
        )

    def _text(self, captions: Sequence[Caption], kind: str, rng: random.Random, other: str) -> str:
        """A caption of a kind other than the text ``other``; "" if there is none."""
        texts = [
            caption.text for caption in select_captions(captions, (kind,)) if caption.text != other
        ]
        if not texts:
            return ""
        text = rng.choice(texts)
        if kind not in self.drawn_items:
            return text
        items = [item.strip() for item in text.split(",") if item.strip()]
        low, high = self.drawn_items[kind]
        rng.shuffle(items)
        count = rng.randint(min(low, len(items)), min(high, len(items)))
        return ", ".join(items[:count])


class TextPairs:
    """Rows of a JSON Lines file: query, positive, and optionally a hard negative and an
    instruction."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError naming the line for a row without a text, and for a negative that not
        all rows have."""
        data = path.read_bytes()
        refuse_encoding(path, data)
        lines = data.decode("utf-8-sig", "replace").split("\n")
        self.rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        self.path = str(path)
        self.kinds = (PairKind("query", "positive"),)
        self.sizes = [len(self.rows)]
        with_negative = [bool(self.read(index).negative) for index in range(len(self.rows))]
        if any(with_negative) and not all(with_negative):
            line = self.rows[with_negative.index(False)][0]
            raise ValueError(
                f"{path}, line {line}: no 'negative', which other lines have; "
                "set it in all or in none"
            )

    def read(self, index: int) -> Pair:
        """A row. Raises ValueError naming the file, the line and the field."""
        line, data = self.rows[index]
        try:
            row = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}, line {line}: not valid JSON ({error})") from error
        texts: dict[str, str] = {}
        if isinstance(row, dict):
            texts = {name: text for name, text in row.items() if isinstance(text, str)}
        query = texts.get("query", "").strip()
        positive = texts.get("positive", "").strip()
        negative = texts.get("negative", "").strip()
        if not query or not positive:
            missing = "positive" if query else "query"
            raise ValueError(
                f"{self.path}, line {line}: no text in field {missing!r}; texts: {', '.join(texts)}"
            )
        return Pair(str(line), query, positive, negative, instruction=texts.get("instruction"))

    def __len__(self) -> int:
        return len(self.rows)

    def pair(self, number: int, kind: PairKind, rng: random.Random) -> Pair:
        return self.read(number)


PairSource = CaptionPairs | TextPairs


def open_pairs(config: PairsConfig) -> list[PairSource]:
    """Every data set of the configuration. Raises FileNotFoundError or ValueError, naming the data
    set."""
    if not config.data:
        raise ValueError(
            "no training data; pass captions or text pairs: llm2clip finetune-llm DATA ..."
        )
    opened: list[PairSource] = []
    for path in config.data:
        if path.endswith(".jsonl") and Path(path).is_file() and _has_queries(path):
            opened.append(TextPairs(Path(path)))
        else:
            source = open_source(SourceConfig(path=path, **vars(config.read)))
            opened.append(CaptionPairs(source, config))
    check_fields(*(pairs.source for pairs in opened if isinstance(pairs, CaptionPairs)))
    return opened


def _has_queries(path: str) -> bool:
    """Whether the first row of a JSON Lines file is a text pair; what is wrong with a file,
    JsonlSource says."""
    with open(path, encoding="utf-8", errors="replace") as file:
        first = next((line for line in file if line.strip()), "")
    return re.search(r'"query"\s*:', first) is not None


@dataclass(frozen=True)
class Survey:
    """What a source's first samples have."""

    path: str
    samples: int
    usable: dict[str, int]  # kind of pair -> samples that have one
    pairs: tuple[Pair, ...]  # of these samples


def survey(source: PairSource) -> Survey:
    """Read the first samples of a source. Raises ValueError if none of them has a pair of some
    kind."""
    samples = min(len(source), SURVEYED)
    usable: dict[str, int] = {}
    pairs: list[Pair] = []
    for kind in source.kinds:
        of_kind: list[Pair] = []
        for number in range(samples):
            pair = source.pair(number, kind, sample_rng(0, 0, 0, number))
            if pair is not None:
                of_kind.append(pair)
        if not of_kind:
            assert isinstance(source, CaptionPairs)  # every row of a text-pair file has a pair
            kinds_seen: set[str] = set()
            for number in range(samples):
                _, captions = source.source.captions(number)
                kinds_seen.update(caption.kind for caption in captions)
            raise ValueError(
                f"{source.path}: none of the first {samples} samples "
                f"has two different captions {kind}; "
                f"known kinds: {', '.join(sorted(kinds_seen)) or 'none'}. "
                "Set --fields and --pair-kinds"
            )
        usable[str(kind)] = len(of_kind)
        pairs += of_kind
    return Survey(source.path, samples, usable, tuple(pairs))


class PairBatches:
    """``batch(position)`` gives this rank's rows of the global batch that starts there."""

    def __init__(
        self, config: PairsConfig, *, seed: int, global_batch: int, rank: int, world: int
    ) -> None:
        """Raises as ``open_pairs``; ValueError for a source that is smaller than a batch."""
        self.sources = open_pairs(config)
        self.mix_kinds = config.mix_kinds
        self.seed = seed
        self.global_batch = global_batch
        self.rank = rank
        self.world = world
        sizes = [source.sizes for source in self.sources]
        weights = config.weights or [1.0] * len(self.sources)
        self.mixture = Mixture(sizes, weights, hash_words("pairs", seed, 0), batch=global_batch)
        small = [
            f"{source.path} ({len(source)})"
            for source in self.sources
            if len(source) < global_batch
        ]
        if small:
            raise ValueError(
                f"global_batch {global_batch} is larger than {', '.join(small)}; "
                "a batch has one source"
            )

    def batch(self, position: int) -> dict[str, Any]:
        """``pairs``, ``keys``, ``caption_hashes`` (2, b) of positives and queries, ``image_ids``
        (b,), ``position``."""
        step, rest = divmod(position, self.global_batch)
        assert rest == 0, f"position {position} is not at a batch's start"
        first, count = rank_rows(position, self.rank, self.global_batch // self.world)
        draws = self.mixture.batch_indices(first, count)
        number = draws[0].source
        kinds = self.sources[number].kinds
        kind = choose_kind(kinds, self.seed, step)
        pairs: list[Pair] = []
        for draw in draws:
            if self.mix_kinds:
                kind = choose_kind(kinds, self.seed, *draw)
            pairs.append(self._pair(draw, kind))
        images = [hash_words(number, pair.group or pair.key) >> 1 for pair in pairs]
        positives = [caption_hash(pair.positive) for pair in pairs]
        queries = [caption_hash(pair.query) for pair in pairs]
        return {
            "pairs": pairs,
            "keys": [pair.key for pair in pairs],
            "caption_hashes": torch.tensor([positives, queries], dtype=torch.int64),
            "image_ids": torch.tensor(images, dtype=torch.int64),
            "position": position + self.global_batch,
        }

    def _pair(self, draw: Draw, kind: PairKind) -> Pair:
        """The pair of a draw; a sample without one is replaced by the next sample with one."""
        source = self.sources[draw.source]
        for offset in range(min(SUBSTITUTES, len(source))):
            chosen = (draw.index + offset) % len(source)
            rng = sample_rng(self.seed, draw.epoch, draw.source, chosen)
            pair = source.pair(chosen, kind, rng)
            if pair is None:
                continue
            if isinstance(source, CaptionPairs) and source.config.random_negatives:
                return source.with_negative(pair, kind, rng)
            return pair
        raise ValueError(
            f"{source.path}: no pair {kind} in {SUBSTITUTES} samples from number {draw.index} on"
        )


def choose_kind(kinds: Sequence[PairKind], *words: int) -> PairKind:
    """A kind drawn by weight, a function of ``words``."""
    rng = random.Random(hash_words("kind", *words))
    return rng.choices(list(kinds), [kind.weight for kind in kinds])[0]


class PairTokenizer:
    """Pairs to token ids, as an LLM with these settings reads them; without the LLM."""

    def __init__(self, tokenizer: Any, config: EncoderConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.template = literal_template(tokenizer, config.chat_template)

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, list[Any]]:
        """Token ids of the queries, the positives and, if the pairs have them, the hard negatives;
        queries' frames."""
        query_prompt = self.config.query_prompt
        prompt = self.config.prompt
        prompts = [query_prompt if pair.instruction is None else pair.instruction for pair in pairs]
        frames = {
            text: build_frame(self.tokenizer, self.template, text) for text in {*prompts, prompt}
        }
        query_frames = [frames[text] for text in prompts]
        positive_frames = [frames[prompt]] * len(pairs)
        tokens: dict[str, list[Any]] = {}
        tokens["query"] = self._tokenize(query_frames, [pair.query for pair in pairs])
        tokens["positive"] = self._tokenize(positive_frames, [pair.positive for pair in pairs])
        if pairs[0].negative:
            tokens["negative"] = self._tokenize(positive_frames, [pair.negative for pair in pairs])
        tokens["query_frame"] = query_frames
        return tokens

    def _tokenize(self, frames: Sequence[Frame], texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text in its frame."""
        rows, _ = tokenize(self.tokenizer, frames, texts, self.config.max_tokens)
        return rows


class TokenizedPairs(IterableDataset):
    """Endless batches of one rank from ``position`` on, with their ``tokens``; processes take
    turns."""

    def __init__(self, batches: PairBatches, tokenizer: PairTokenizer, position: int) -> None:
        self.batches = batches
        self.tokenizer = tokenizer
        self.position = position

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number = 0 if worker is None else worker.id
        count = 1 if worker is None else worker.num_workers
        position = self.position + number * self.batches.global_batch
        while True:
            batch = self.batches.batch(position)
            yield {**batch, "tokens": self.tokenizer(batch["pairs"])}
            position += count * self.batches.global_batch


def tokenized_batches(
    batches: PairBatches, tokenizer: PairTokenizer, *, position: int, workers: int
) -> Iterator[dict[str, Any]]:
    """This rank's batches from ``position`` (samples consumed) on; the same for any number of
    ``workers``."""
    loader = DataLoader(
        TokenizedPairs(batches, tokenizer, position),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_start_worker,
    )
    return iter(loader)


def _start_worker(number: int) -> None:
    """The tokenizer's own threads would deadlock in a forked process, and each process is one of
    several already."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    leave_signals_to_the_run(number)


# The step and the loss.


class PairModule(nn.Module):
    """An LLM's pooled embeddings of several groups of texts, and the logit scale."""

    def __init__(self, model: CaptionModel, config: ContrastConfig) -> None:
        super().__init__()
        self.model = model
        # shape (1,): DeepSpeed does not support 0-d parameters
        self.logit_scale = nn.Parameter(
            torch.tensor([math.log(config.scale)]), requires_grad=config.learn_scale
        )

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Token batches of G texts each, four tensors a batch -> (R, W) embeddings of length 1, log
        scale (1,)."""
        groups = [TokenBatch(*tensors[i : i + 4]) for i in range(0, len(tensors), 4)]
        embeddings_RW = torch.cat([self.model(group) for group in groups])
        return F.normalize(embeddings_RW, dim=1), self.logit_scale.float() * 1


class CaptionStep(ContrastiveStep):
    """A step of the LLM: ``batch["tokens"]`` holds this rank's b pairs (see PairTokenizer).
    The positives' features are (m, 1, W), or (m, 2, W) with the hard negatives second."""

    def __init__(
        self,
        engine: Engine,
        terms: Terms,
        encoder: CaptionEncoder,
        config: ContrastConfig,
        *,
        seed: int,
    ) -> None:
        super().__init__(engine, terms, seed=seed)
        self.encoder = encoder
        self.config = config

    def _on_device(self, batch: Batch) -> Batch:
        """The batch on the module's device, longest pairs first: a micro-batch of like lengths has
        less padding."""
        sides = [rows for side, rows in batch["tokens"].items() if side != "query_frame"]

        def length(row: int) -> int:
            return sum(len(side[row]) for side in sides)

        order = sorted(range(len(batch["keys"])), key=lambda row: -length(row))
        tokens: dict[str, list[Any]] = {}
        for side, rows in batch["tokens"].items():
            tokens[side] = [rows[row] for row in order]
        return {
            **batch,
            "keys": [batch["keys"][row] for row in order],
            "tokens": tokens,
            "caption_hashes": batch["caption_hashes"][..., order].to(self.engine.device),
            "image_ids": batch["image_ids"][..., order].to(self.engine.device),
        }

    def _rows(self, batch: Batch, rows: slice) -> Batch:
        return {"tokens": {side: ids[rows] for side, ids in batch["tokens"].items()}}

    def _forward(self, micro: Batch) -> Encoded:
        queries: list[list[int]] = micro["tokens"]["query"]
        targets: list[list[int]] = list(micro["tokens"]["positive"])
        targets += micro["tokens"].get("negative", ())
        frames = [*micro["tokens"]["query_frame"], *[self.encoder.frame] * len(targets)]
        rows = [*queries, *targets]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        tensors: list[Tensor] = []
        for part in equal_parts(order, self.config.length_groups):
            rows_of_part = [rows[index] for index in part]
            frames_of_part = [frames[index] for index in part]
            group = self.encoder.collate(rows_of_part, frames_of_part)
            tensors += vars(group).values()
        # before the forward pass: a copy waits for what the GPU has begun
        sorted_index_R = torch.tensor(order).argsort().to(self.encoder.device)
        sorted_RW, log_scale = self.engine(*tensors)
        features_RW = sorted_RW[sorted_index_R]
        size = len(queries)
        query_mW = features_RW[:size]
        positive_mkW = features_RW[size:].unflatten(0, (-1, size)).transpose(0, 1)
        return Encoded(query_mW, positive_mkW, log_scale, torch.zeros_like(log_scale))


def equal_parts(items: Sequence[int], parts: int) -> list[Sequence[int]]:
    """Split ``items`` into at most ``parts`` contiguous parts of like length. Their number follows
    from that of the items alone: all ranks call the module equally often, as ZeRO-3 requires."""
    size = -(-len(items) // parts)
    return [items[start : start + size] for start in range(0, len(items), size)]


def caption_terms(config: ContrastConfig) -> Terms:
    """The loss: InfoNCE, with hard negatives if the batch has them."""

    def infonce(x: Features) -> Tensor:
        ids: dict[str, Any] = {}
        if config.mask_same:
            ids = {"caption_hashes": x.caption_hashes, "image_ids": x.image_ids}
        positive_bW = x.positive_bkD[:, 0]
        scale = x.log_scale.exp()
        if config.symmetric and x.positive_bkD.shape[1] == 1:
            return contrastive_loss(x.anchor_bD, positive_bW, scale, **ids)
        negative_nW = x.positive_bkD[:, 1:].flatten(0, 1)
        return pair_loss(
            x.anchor_bD, positive_bW, negative_nW, scale, symmetric=config.symmetric, **ids
        )

    return {"infonce": infonce}


def pair_loss(
    query_bW: Tensor,
    positive_bW: Tensor,
    negative_nW: Tensor,
    scale: Tensor,
    *,
    symmetric: bool = True,
    caption_hashes: Tensor | None = None,
    image_ids: Tensor | None = None,
) -> Tensor:
    """InfoNCE of pairs of texts, in which the hard negatives of all N pairs are negatives of each
    query.

    there_i = log(sum_j e^(s q_i.p_j) + sum_j e^(s q_i.n_j)) - s q_i.p_i
    back_i  = log sum_j e^(s p_i.q_j) - s p_i.q_i
    loss_r  = 1/b sum_i there_i, or with ``symmetric`` 1/(2b) sum_i (there_i + back_i);
    i over this rank's pairs, j over all ranks'. One-directional: supervised SimCSE (Gao et al.
    2021, arXiv 2104.08821) as LLM2Vec and LLM2CLIP train with; both: E5 (Wang et al. 2022).

    query, positive: (b, W) of length 1; negative: (n, W), n a multiple of b or 0; scale: (1,); ids
    as in ``contrastive_loss``: pairs that share one are excluded from the sums over positives. The
    mean over ranks is the loss of the whole batch, in its gradient, too. Not for batches whose (b,
    3 N) logits are too large to hold.
    """
    b = len(query_bW)
    first = rank() * len(query_bW)
    s = scale.float()
    there_bM = s * query_bW.float() @ gather_with_gradient(positive_bW).float().T
    target_b = torch.arange(first, first + b, device=query_bW.device)
    ids_kb = stack_ids(caption_hashes, image_ids)
    excluded_bN = None
    if ids_kb is not None:
        ids_kN = gather_rows(ids_kb.T.contiguous()).T
        excluded_bN = (ids_kb[:, None, :, None] == ids_kN[:, None]).flatten(0, 1).any(0)
        excluded_bN.diagonal(first)[:b].fill_(False)
        there_bM = there_bM.masked_fill(excluded_bN, EXCLUDED)
    if len(negative_nW):
        all_negative_W = gather_with_gradient(negative_nW).float()
        there_bM = torch.cat([there_bM, s * query_bW.float() @ all_negative_W.T], dim=1)
    there = F.cross_entropy(there_bM, target_b)
    if not symmetric:
        return there
    back_bN = s * positive_bW.float() @ gather_with_gradient(query_bW).float().T
    if excluded_bN is not None:
        back_bN = back_bN.masked_fill(excluded_bN, EXCLUDED)
    return 0.5 * (there + F.cross_entropy(back_bN, target_b))


def gather_with_gradient(local: Tensor) -> Tensor:
    """(b, W) on each rank -> (N, W), differentiable with respect to every rank's rows."""
    if world_size() == 1:
        return local
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(local.contiguous()))
