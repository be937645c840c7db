"""Who embeds captions: an LLM or a CLIP's own text tower, and the teacher that a tower's card
names; embeds data sets.

``llm2clip embed DATA --llm CLIP`` caches a CLIP's features as it caches an LLM's embeddings, for
``--heads.target clip_text``. Importable in LLaVA's environment, where texts cannot be embedded, but
cached embeddings can be encoded.

Shape letters: B captions of a batch, T tokens, D width of the features.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from llm2clip_plugin.contracts import (
    PROJECTED,
    CacheManifest,
    TeacherIdentity,
    TowerCard,
    shard_file,
)
from llm2clip_plugin.data import cache as caches
from llm2clip_plugin.data.remote import SideFolder, default_download_folder, is_url
from llm2clip_plugin.data.samples import caption_hash, map_in_order
from llm2clip_plugin.data.sources import Shard, Source, data_folder
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.hashes import files_sha256, sha256_text
from llm2clip_plugin.pretrained import KNOWN, check_vocabulary, open_pretrained
from llm2clip_plugin.progress import progress_bar
from llm2clip_plugin.text.config import IDENTITY_SETTINGS, EncoderConfig
from llm2clip_plugin.text.encoder import (
    CaptionEncoder,
    TextEncoder,
    absolute,
    adapter_sha256,
    local_folder,
    weights_sha256,
)
from llm2clip_plugin.text.identity import config_sha256, tokenizer_sha256
from llm2clip_plugin.text.llm import PROBE_TEXT, load_whole
from llm2clip_plugin.vision.directory import fetch_directory, is_local, read_json, weight_files
from llm2clip_plugin.vision.dual import LoadedDualEncoder, TextAdapter, load_dual
from llm2clip_plugin.vision.families import families, family_of_type

# settings of EncoderConfig that apply to a CLIP
MAY_DIFFER = ("llm", "revision", "max_tokens", "compute_dtype")
TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
GIVE_LLM = "pass the LLM with --llm PATH_OR_HUB_ID (in Python: teacher=)"
GIVE_ADAPTER = "pass it with --adapter DIR (in Python: adapter=)"


def open_encoder(config: EncoderConfig, device: torch.device | str | None = None) -> TextEncoder:
    """The encoder of captions at ``config.llm``: a CLIP's own text tower, else an LLM."""
    folder = clip_folder(config.llm, config.revision)
    if folder is None:
        return CaptionEncoder(config, device)
    return ClipTextEncoder(folder, config, device)


def clip_folder(llm: str, revision: str = "") -> Path | None:
    """The folder of an image-text model that has its own text tower, None for another; raises as
    ``local_folder``."""
    folder = local_folder(llm, revision)
    config = read_json(folder / "config.json")
    model_types: set[str] = set()
    for family in families().values():
        if family.image_text_class:
            model_types.update(family.model_types)
    if config.get("model_type") in model_types and isinstance(config.get("text_config"), dict):
        return folder
    return None


class ClipTextEncoder(TextEncoder):
    """The features of captions by the own text tower of a CLIP, SigLIP or another family with an
    image-text model, not normalized, as its images are compared with them. Raises ValueError for a
    setting of LLMs."""

    def __init__(
        self, folder: Path, config: EncoderConfig, device: torch.device | str | None = None
    ) -> None:
        default = vars(EncoderConfig())
        changed = [name for name, value in vars(config).items() if value != default[name]]
        not_allowed = [name for name in changed if name not in MAY_DIFFER]
        if not_allowed:
            raise ValueError(
                f"{config.llm} is a CLIP, which is read as it was trained; "
                f"omit {', '.join(not_allowed)}"
            )
        super().__init__(config, device)
        settings = open_pretrained(AutoConfig, folder, fix=KNOWN)
        self._config_sha256 = config_sha256(settings.text_config)
        family = family_of_type(settings.model_type, where=str(folder))
        image_text_class: Any = family.image_text_class
        model = load_whole(image_text_class(), folder, dtype=torch.float32)
        self.model: Any = model.requires_grad_(False).eval().to(self.device, self.dtype)
        text = settings.text_config
        self.context = text.max_position_embeddings
        # it was trained to see its padding
        self.pads_to_context = settings.model_type.startswith("siglip")
        siglip_width = getattr(text, "projection_size", text.hidden_size)
        self.width = siglip_width if self.pads_to_context else settings.projection_dim
        # transformers makes one without words
        if not any((folder / name).is_file() for name in TOKENIZERS):
            raise ValueError(
                f"{folder} has no tokenizer; copy tokenizer.json of the same model into it"
            )
        self.tokenizer: Any = open_pretrained(AutoTokenizer, folder, fix=KNOWN)
        check_vocabulary(self.tokenizer, text.vocab_size, folder, self._tokens(["a"])[0])
        self._tokenizer_sha256 = tokenizer_sha256(self.tokenizer)
        self.config = dataclasses.replace(config, max_tokens=min(config.max_tokens, self.context))
        self.folder = folder

    def identity(self) -> TeacherIdentity:
        return TeacherIdentity(
            llm=absolute(self.config.llm),
            revision=self.config.revision,
            weights_sha256=files_sha256(weight_files(self.folder)),
            adapter_sha256="",
            attention="own",
            pooling=PROJECTED,
            layer=-1,
            prompt="",
            chat_template="",
            max_tokens=self.config.max_tokens,
            width=self.width,
            tokenizer=sha256_text(json.dumps(self._tokens([PROBE_TEXT]))),
            config_sha256=self._config_sha256,
            tokenizer_sha256=self._tokenizer_sha256,
        )

    def tokenize(self, captions: Sequence[str], *, query: bool = False) -> list[list[int]]:
        rows = self._tokens(captions)
        limit = self.config.max_tokens
        self.count_truncated += sum(len(ids) > limit for ids in rows)
        # the last token marks the end, and is where a CLIP reads its feature
        return [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in rows]

    def _tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids with those of begin and end, not truncated."""
        if not captions:
            return []
        rows = self.tokenizer(list(captions), verbose=False)["input_ids"]
        return [list(ids) for ids in rows]

    def padded_length(self, ids: Sequence[int]) -> int:
        if self.pads_to_context:
            return self.context
        return min(super().padded_length(ids), self.context)

    @torch.no_grad()
    def embed_tokens(self, rows: Sequence[Sequence[int]], *, query: bool = False) -> Tensor:
        length = max(map(self.padded_length, rows))
        pad = self.tokenizer.pad_token_id
        ids_BT = torch.tensor(
            [[*ids, *[pad] * (length - len(ids))] for ids in rows], device=self.device
        )
        options = {}
        if not self.pads_to_context:
            length_B1 = torch.tensor([[len(ids)] for ids in rows], device=self.device)
            has_token_BT = torch.arange(length, device=self.device) < length_B1
            options["attention_mask"] = has_token_BT.long()
        output = self.model.get_text_features(input_ids=ids_BT, **options)
        features_BW = output if isinstance(output, Tensor) else output.pooler_output
        return features_BW.float().cpu()


def load_dual_encoder(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    teacher: str | EncoderConfig = "",
    adapter: str = "",
) -> LoadedDualEncoder:
    """A trained dual encoder for retrieval, from a tower directory or Hub id; in eval mode.

    ``encode_image(pixel_values)`` and ``encode_text(texts)`` give (B, D), L2-normalized, float32;
    ``logit_scale`` is the factor of the logits. Texts are strings, in any language, or (N, W)
    embeddings of the teacher. An imported CLIP has no text adapter: its teacher is its own text
    tower (``teacher=CLIP``), whose features are compared as they are.

    teacher: path or Hub id of the LLM that embeds strings, by default the one that the tower's card
    names; it is loaded by the first call with strings. If the card names none, an EncoderConfig
    says how the LLM embeds. adapter: folder or Hub id of its adapter, by default where the card
    says that it is.

    Raises FileNotFoundError without a card, ValueError if the directory contains only a tower.
    ``encode_text`` raises ValueError or FileNotFoundError if the teacher is not at hand,
    ContractError for another LLM than the tower's.
    """
    dual, card = load_dual(source, dtype=dtype)
    if dual.text_adapter is None:
        dual.config = dataclasses.replace(
            dual.config, llm_width=dual.config.projection_dim, adapter="none"
        )
        dual.text_adapter = TextAdapter(dual.config).eval()
        card = dataclasses.replace(card, dual=dataclasses.asdict(dual.config))
    config = teacher if isinstance(teacher, EncoderConfig) else EncoderConfig(llm=teacher)
    llm = TeacherLLM(card, dataclasses.replace(config, adapter=adapter or config.adapter))

    def embed(texts: Sequence[str]) -> torch.Tensor:
        llm.device = llm.device or next(dual.parameters()).device
        return llm.encoder.encode(texts)

    return LoadedDualEncoder(dual, card, embed).eval()


class TeacherLLM:
    """The LLM that a tower's card names: loaded on first use, and compared with the card.

    ``config``: where the LLM and its adapter are, if not where the card says; the card decides
    every other setting.
    """

    def __init__(
        self,
        card: TowerCard,
        config: EncoderConfig | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.llm_width = int(card.dual.get("llm_width", 0))
        self.config = config or EncoderConfig()
        self.device = device
        self.identity = teacher_of(card)

    @property
    def known_identity(self) -> TeacherIdentity:
        """The teacher's identity, from the card, else from the LLM."""
        return self.identity or self.encoder.identity()

    def check_given(self) -> None:
        """Compare the LLM and the adapter that ``config`` names with the card, by the hashes of
        their files: where all texts are cached, they are not loaded. Raises ContractError for
        others."""
        llm = self.config.llm
        adapter = self.config.adapter
        identity = self.identity
        if identity is None or not (llm or adapter):
            return
        wrong = []
        if adapter:
            actual = adapter_sha256(fetch_directory(adapter))
            if actual != identity.adapter_sha256:
                wrong.append(f"adapter_sha256 {identity.adapter_sha256!r} != {actual!r}")
        if llm and (is_local(llm) or llm != identity.llm):
            folder = local_folder(llm, self.config.revision)
            if identity.pooling == PROJECTED:
                weights = files_sha256(weight_files(folder))
            else:
                weights = weights_sha256(folder)
            if weights != identity.weights_sha256:
                wrong.append(f"weights_sha256 {identity.weights_sha256!r} != {weights!r}")
        if wrong:
            names = " with ".join(filter(None, (llm, adapter)))
            raise ContractError(
                f"{names} is not the tower's teacher: {'; '.join(wrong)}; omit --llm and --adapter"
            )

    @cached_property
    def encoder(self) -> TextEncoder:
        """The LLM. Raises FileNotFoundError or ValueError if it is not at hand, ContractError if it
        is another one."""
        if self.identity is None and not self.config.llm:
            raise ValueError(f"the tower's card names no teacher, which embeds texts; {GIVE_LLM}")
        config = self.config
        if self.identity is not None:
            config = encoder_config(self.identity, self.config)
        try:
            # of the caller; its loading takes gradients to see what attends to what
            with torch.inference_mode(False):
                encoder = open_encoder(config, self.device)
        except FileNotFoundError as error:
            if self.config.llm or str(config.llm) not in str(error):
                raise
            raise FileNotFoundError(
                f"the tower's teacher cannot be loaded: {error}; {GIVE_LLM}"
            ) from error
        loaded = encoder.identity()
        if self.identity is not None and not self.identity.agrees_with(loaded):
            differences = caches.differences(vars(self.identity), loaded)
            raise ContractError(
                f"{config.llm} is not the tower's teacher: {differences}; "
                "pass it with --llm and --adapter (in Python: teacher= and adapter=)"
            )
        return encoder


def teacher_of(card: TowerCard) -> TeacherIdentity | None:
    """The teacher that a tower's card names; None if it names none. Raises ContractError for a
    damaged entry."""
    try:
        return TeacherIdentity(**card.teacher) if card.teacher else None
    except TypeError as error:
        raise ContractError(
            f"{card.FILE}: its teacher has unknown or missing settings ({error})"
        ) from error


def encoder_config(identity: TeacherIdentity, config: EncoderConfig) -> EncoderConfig:
    """The settings of the card's teacher; the LLM and the adapter are where ``config`` says, else
    where the card does. Raises ValueError if the adapter's place is unknown, or empty."""
    llm = config.llm or identity.llm
    revision = config.revision or ("" if config.llm else identity.revision)
    if identity.pooling == PROJECTED:  # a CLIP's text tower has no other settings
        max_tokens = identity.max_tokens
        dtype = config.compute_dtype
        return EncoderConfig(llm=llm, revision=revision, max_tokens=max_tokens, compute_dtype=dtype)
    adapter = config.adapter or identity.adapter
    where = ""  # that an adapter is not found
    if not adapter and identity.adapter_sha256:
        where = "at a place that the card does not name"
    elif is_local(adapter) and not config.adapter and not Path(adapter).is_dir():
        where = f"no longer at {adapter}"
    if where:
        raise ValueError(f"the adapter of the tower's teacher {llm} is {where}; {GIVE_ADAPTER}")
    is_mean = (identity.pooling, identity.attention) == ("mean", "bidirectional")
    return dataclasses.replace(
        config,
        llm=llm,
        preset="mean" if is_mean else "",
        revision=revision,
        adapter=adapter,
        load_in_4bit=identity.quantization == "nf4",
        **{name: getattr(identity, name) for name in IDENTITY_SETTINGS},
    )


# Embedding a data set. Ranks share its shards and communicate only by the file system: each writes
# its own, and the one that finds all written writes the manifest. A killed run resumes: complete
# shards are skipped.

Result = TypeVar("Result")
# of embeddings kept in memory for captions that occur again in another shard
MEMORY_BYTES = 256 << 20
VERIFY_SAMPLES = 64  # captions that --verify embeds again
# of a cached embedding with a new one: int8 and another compute dtype stay above
VERIFY_COSINE = 0.999


@dataclass
class EmbedSummary:
    """Counts of one rank's run, for its report."""

    shards: int = 0  # embedded in this run
    skipped: int = 0  # shards that were complete before
    captions: int = 0  # embedded in this run, distinct within their sample
    truncated: int = 0  # captions longer than max_tokens
    empty: list[str] = field(default_factory=list)  # keys of samples without a readable caption
    seconds: float = 0.0
    # of these, seconds in which the LLM waited for captions to be read or rows to be written
    waited: float = 0.0

    def lines(self, max_tokens: int) -> list[str]:
        """The report."""
        rate = self.captions / max(self.seconds, 1e-9)
        lines = [
            f"embedded {self.captions} captions of {self.shards} shards in {self.seconds:.1f} s "
            f"({rate:.1f} captions/s), waiting {self.waited:.1f} s"
        ]
        if self.skipped:
            lines.append(f"{self.skipped} shards already complete, skipped")
        if self.truncated:
            lines.append(
                f"{self.truncated} captions truncated to {max_tokens} tokens (--max-tokens)"
            )
        if self.empty:
            keys = ", ".join(self.empty[:3])
            lines.append(
                f"{len(self.empty)} samples without a readable caption, such as {keys}; "
                "see `llm2clip data check`"
            )
        return lines


def cache_folder(source_path: str, identity: TeacherIdentity) -> Path:
    """``default_cache_folder``; the one of a cache from before config.json was part of the
    fingerprint, if there is no newer one. Raises ValueError for data at a URL."""
    folder = default_cache_folder(source_path, identity.fingerprint)
    earlier = default_cache_folder(source_path, identity.earlier().fingerprint)
    return earlier if earlier.is_dir() and not folder.is_dir() else folder


def default_cache_folder(source_path: str, fingerprint: str) -> Path:
    """``embeddings-<fingerprint>`` in the folder of the data; ValueError for data at a URL."""
    if is_url(source_path):
        raise ValueError(f"{source_path} is not a local folder; set --cache DIR")
    return data_folder(source_path) / f"embeddings-{fingerprint[:12]}"


def benchmark_cache_folder(source_path: str, identity: TeacherIdentity) -> Path:
    """``cache_folder``, or a folder next to the downloads if that one can neither be found nor
    made."""
    folder = cache_folder(source_path, identity)
    if folder.exists() or os.access(folder.parent, os.W_OK):
        return folder
    return SideFolder.of(str(folder.parent), default_download_folder()).spare / folder.name


def shards_of_rank(shards: Sequence[Shard], rank: int, world: int) -> list[Shard]:
    """The shards of one rank, dealt out by size in alternating order, so that all ranks get about
    as many samples."""
    by_size = sorted(shards, key=lambda shard: (-shard.size, shard.name))
    mine: list[Shard] = []
    for number, start in enumerate(range(0, len(by_size), world)):
        dealt = by_size[start : start + world]  # at most one for each rank
        if number % 2 == 1:
            dealt.reverse()
        if rank < len(dealt):
            mine.append(dealt[rank])
    return mine


def embed_source(
    source: Source,
    encoder: TextEncoder,
    directory: Path,
    dtype: str = "float16",
    rank: int = 0,
    world: int = 1,
    *,
    tokens_per_batch: int = 0,
    quiet: bool = False,
    overwrite: bool = False,
) -> tuple[CacheManifest | None, EmbedSummary]:
    """Embed this rank's shards of ``source`` into ``directory``; shards that are complete are
    skipped. Returns the manifest, or None while other ranks are still embedding, and a summary.
    Raises ContractError for another teacher's directory or another dtype, and, without
    ``overwrite``, as ``CacheWriter.refuse_loss``."""
    renew_cache(source, encoder, directory)
    writer = caches.CacheWriter(directory, encoder.identity(), dtype)
    summary = EmbedSummary()
    memory: dict[str, torch.Tensor] = {}
    shards = shards_of_rank(source.shards, rank, world)
    digests: dict[str, str] = {}
    started = time.monotonic()
    total = sum(shard.size for shard in shards)
    with (
        progress_bar(total=total, label="embed", unit="samples", show=not quiet) as bar,
        ThreadPoolExecutor(1, thread_name_prefix="llm2clip-read") as reader,
        ThreadPoolExecutor(1, thread_name_prefix="llm2clip-write") as saver,
    ):
        digests_before = {name: fits[0] for name, fits in source.known_digests().items()}
        read = partial(_read_shard, source, encoder, writer, digests_before, digests, overwrite)
        # while a shard is embedded, the next one is read and tokenized, and the one before is
        # quantized and written
        contents = map_in_order(reader, read, shards, ahead=2)
        written = saver.submit(lambda: None)  # nothing to wait for yet
        for shard in shards:
            content, waited = timed(partial(next, contents))
            start = int(bar.n)
            size = shard.size

            def move(done: int, total: int, start: int = start, size: int = size) -> None:
                bar.update(start + size * done // total - bar.n)

            if content is None:
                summary.skipped += 1
            else:
                keys, rows, texts, tokens, truncated, empty = content
                options = {"tokens_per_batch": tokens_per_batch, "tokens": tokens, "on_batch": move}
                embeddings = _embed(encoder, texts, memory, **options)
                waited += timed(written.result)[1]
                written = saver.submit(
                    writer.write_shard, shard.name, keys, rows, embeddings, truncated=truncated
                )
                summary.shards += 1
                summary.captions += len(rows)
                summary.truncated += truncated
                summary.empty += empty
                summary.waited += waited
            move(1, 1)
        summary.waited += timed(written.result)[1]
        if summary.shards:
            summary.seconds = time.monotonic() - started
    if digests:
        with source.lock(f"record the digests of {source.path}"):
            source.record_digests({name: (digest, digest) for name, digest in digests.items()})
    return writer.finish([shard.name for shard in source.shards]), summary


class _ShardContent(NamedTuple):
    """What is to be embedded of a shard."""

    keys: Sequence[str]
    rows: Sequence[tuple[int, int]]  # (sample, caption hash)
    texts: Sequence[str]  # of the rows
    tokens: Mapping[str, Sequence[int]]  # of each text
    truncated: int  # texts longer than max_tokens
    empty: Sequence[str]  # keys of samples without a readable caption


def timed(action: Callable[[], Result]) -> tuple[Result, float]:
    """The result, and seconds that it took."""
    start = time.monotonic()
    return action(), time.monotonic() - start


def _read_shard(
    source: Source,
    encoder: TextEncoder,
    writer: caches.CacheWriter,
    digests_before: Mapping[str, str],
    digests: dict[str, str],
    overwrite: bool,
    shard: Shard,
) -> _ShardContent | None:
    """Compare a shard with its file in the cache: None if that is complete. ``known``: recorded
    digests; ``digests`` gets that of the shard if its captions had to be read."""
    if shard.name in digests_before and writer.is_complete(shard.name, digests_before[shard.name]):
        return None
    keys, captions = caches.shard_captions(source, shard)
    rows = caches.caption_rows(captions)
    digest = caches.rows_digest(keys, rows)
    digests[shard.name] = digest
    if digest != digests_before.get(shard.name) and writer.is_complete(shard.name, digest):
        return None
    if not overwrite:
        fields = ", ".join(source.config.fields)
        writer.refuse_loss(shard.name, rows, f"{source.path} with the fields {fields}")
    text_of: dict[int, str] = {}
    empty: list[str] = []
    for key, captions_of_sample in zip(keys, captions, strict=True):
        for caption in captions_of_sample:
            text_of[caption_hash(caption.text)] = caption.text
        if not any(map(caches.has_text, captions_of_sample)):
            empty.append(key)
    texts = [text_of[value] for _, value in rows]
    distinct = list(dict.fromkeys(texts))
    before = encoder.count_truncated
    tokens = dict(zip(distinct, encoder.tokenize(distinct), strict=True))
    truncated = encoder.count_truncated - before
    return _ShardContent(keys, rows, texts, tokens, truncated, empty)


def _embed(
    encoder: TextEncoder, texts: Sequence[str], memory: dict[str, torch.Tensor], **options: Any
) -> torch.Tensor:
    """(N, W) float32 of ``texts``; ``memory``: text -> row of those that may occur again;
    ``options`` of ``encode``."""
    new = [text for text in dict.fromkeys(texts) if text not in memory]
    row_of = dict(zip(new, encoder.encode(new, **options), strict=True))
    rows = [row_of[text] if text in row_of else memory[text] for text in texts]
    free_rows = max(0, MEMORY_BYTES // (4 * encoder.width) - len(memory))
    for text in new[:free_rows]:
        memory[text] = row_of[text].clone()
    return torch.stack(rows) if rows else torch.empty(0, encoder.width)


def verify(source: Source, encoder: TextEncoder, directory: Path) -> str:
    """Read all of the cache, compare it with the data, embed a few captions again: a report, or
    ContractError."""
    cache = caches.EmbeddingCache.open(directory, expect_fingerprint=encoder.identity().fingerprint)
    cache.verify()
    cache.check(source, full=True)
    compared = embed_again(source, encoder, directory)
    manifest = cache.manifest
    return (
        f"{directory} is complete: {len(manifest.shards)} shards, {manifest.captions} captions, "
        f"{cache.width} wide, {manifest.dtype}; {compared} captions embedded again agree"
    )


class _CachedCaption(NamedTuple):
    key: str  # of its sample
    text: str
    row_W: torch.Tensor


def embed_again(source: Source, encoder: TextEncoder, directory: Path) -> int:
    """Embed up to VERIFY_SAMPLES cached captions again; how many. Raises ContractError if one
    differs from its row."""
    cached = list(_cached_sample(source, directory))
    again_NW = encoder.encode([caption.text for caption in cached])
    for caption, new_W in zip(cached, again_NW, strict=True):
        cosine = float(torch.nn.functional.cosine_similarity(caption.row_W, new_W, dim=0))
        if cosine < VERIFY_COSINE:
            raise ContractError(
                f"{directory}: the cached embedding of {caption.key!r} has cosine similarity "
                f"{cosine:.4f} with a new one, expected at least {VERIFY_COSINE}; "
                "choose another --cache, or delete this one, and embed again"
            )
    return len(cached)


def _cached_sample(source: Source, directory: Path) -> Iterator[_CachedCaption]:
    """The first captions of some random samples of ``source`` whose embeddings are in the cache,
    complete or not."""
    files: dict[str, caches.ShardFile] = {}
    for shard in source.shards:
        # not embedded yet, or damaged, which embedding finds
        with suppress(FileNotFoundError, ContractError):
            files[shard.name] = caches.ShardFile(directory / shard_file(shard.name))
    numbers: list[int] = []
    for shard in source.shards:
        if shard.name in files:
            numbers += range(shard.start, shard.start + shard.size)
    for number in random.Random(0).sample(numbers, min(len(numbers), VERIFY_SAMPLES)):
        name, index = source.locate(number)
        key, captions = source.captions(number)
        with suppress(ContractError):  # another caption than the one that was embedded
            for caption in list(filter(caches.has_text, captions))[:1]:
                rows = files[name].row_numbers(index, [caption], key)
                yield _CachedCaption(key, caption.text, files[name].embeddings(rows)[0])


def renew_cache(source: Source, encoder: TextEncoder, directory: Path) -> None:
    """Prove a cache whose record is from before config.json and tokenizer were part of the
    fingerprint, by embedding some of its captions again, and renew the record; any other is left as
    it is.

    Raises ContractError if a caption's embedding differs, or if none of the source's captions is in
    the cache.
    """
    path = directory / CacheManifest.FILE
    if not path.is_file():
        return
    teacher = caches.stored_teacher(path)
    identity = encoder.identity()
    if not teacher.is_earlier or identity.is_earlier or not teacher.agrees_with(identity):
        return
    compared = embed_again(source, encoder, directory)
    if not compared and any(directory.glob("**/*.safetensors")):
        raise ContractError(
            f"{directory} cannot be proven to be of {identity.llm}: "
            "config.json was not yet part of its fingerprint, "
            f"and none of its captions is in {source.path}; "
            "embed the data that it was made from first, or choose another --cache"
        )
    manifest = CacheManifest.read(path)
    if manifest.fingerprint != teacher.fingerprint:  # another rank was faster
        return
    earlier = teacher.fingerprint if compared else ""
    renewed = {
        "teacher": dict(vars(identity)),
        "fingerprint": identity.fingerprint,
        "earlier_fingerprint": earlier,
    }
    dataclasses.replace(manifest, **renewed).write(path)
    if compared and os.environ.get("RANK", "0") == "0":
        print(
            f"{directory}: {compared} captions embedded again agree; "
            "its fingerprint now includes config.json"
        )
