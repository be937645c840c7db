"""``llm2clip evaluate captions``: caption retrieval accuracy of an LLM's embeddings, within and
across languages.

Caption retrieval accuracy (CRA, the paper's measure): N images with two captions each; every first
caption ranks the N second ones by cosine similarity, and the top one must be of the same image.
Images are not read. Ties count half. ``--search`` tries how an LLM's captions are best read,
without training it.

Shapes: N pairs of captions, W width of an embedding.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.samples import (
    BrokenSample,
    Caption,
    count_broken,
    select_captions,
)
from llm2clip_plugin.data.sources import ReadConfig, SourceConfig, open_source
from llm2clip_plugin.evaluate.commands import NOTES_SHOWN, print_table, write_scores
from llm2clip_plugin.evaluate.config import (
    EVALUATE_CAPTIONS,
    CaptionSetConfig,
    EvaluateCaptionsConfig,
)
from llm2clip_plugin.evaluate.ranks import QueryRanks, rank_both
from llm2clip_plugin.hashes import canonical_json, sha256_text
from llm2clip_plugin.options import changed_options, command
from llm2clip_plugin.outside import printable
from llm2clip_plugin.progress import track
from llm2clip_plugin.text.config import (
    ATTENTIONS,
    IDENTITY_SETTINGS,
    POOLINGS,
    EncoderConfig,
    find_card,
)
from llm2clip_plugin.text.encoder import CPU_TOKENS, CaptionEncoder, first_captions
from llm2clip_plugin.text.llm import length_batches, pool
from llm2clip_plugin.text.post import POST_FILE, Post, remove_components
from llm2clip_plugin.text.reading import (
    reading_options,
    refuse_other_card,
    write_reading,
)

# name of the row that is the mean over all languages but the home one
LANGUAGES = "languages"
ACCURACIES = ("cra", "reverse", "centred")
# distinct training captions that post-processing is fitted on, at most
FIT_CAPTIONS = 2000
TERMS = (
    "reverse: the second finds the first; centred: after subtracting each set's mean"
)
SHOWN = 10  # readings in the table of --search

Pairs = list[tuple[str, str, str]]  # key, first caption, second caption
Rows = dict[str, Tensor]  # caption -> (W,)


def main(argv: list[str]) -> int:
    """``llm2clip evaluate captions DATA --llm PATH_OR_HUB_ID [--adapter DIR] [--retrieve
    short:long] [--search]``."""
    config = EVALUATE_CAPTIONS.parse(argv)
    if not config.measure.captions:
        raise ValueError(
            "no captions given; usage: llm2clip evaluate captions DATA --llm PATH_OR_HUB_ID"
        )
    if config.search:
        search_and_report(config)
        return 0
    encoder = CaptionEncoder(config.encoder)
    broken: list[BrokenSample] = []
    sets = caption_sets(config.measure, config.read, broken)
    scores = measure_pairs(encoder, sets, config.measure.retrieve)
    rows: dict[str, dict[str, str]] = {}
    for row in scores:
        cells = {name: f"{vars(row)[name]:.3f}" for name in ACCURACIES}
        rows[row.name] = {
            **cells,
            "pairs": str(row.pairs),
            "chance": f"{1 / row.pairs:.3f}",
        }
    print_table("top-1 accuracy, the first caption finds the second", rows, TERMS)
    if encoder.count_truncated:
        limit = encoder.config.max_tokens
        print(
            f"{encoder.count_truncated} captions exceed {limit} tokens and were truncated"
        )
    print_left_out(broken)
    metrics: dict[str, float] = {}
    items: list[dict[str, Any]] = []
    for row in scores:
        for name in ACCURACIES:
            metrics[f"{row.name}/{name}"] = vars(row)[name]
        for key, hit in zip(row.keys, row.hits, strict=True):
            items.append({"id": f"{row.name}/{key}", "score": hit, "cluster": key})
    record = ScoreFile(
        benchmark=f"caption retrieval, {Path(config.measure.captions).name}",
        metrics=metrics,
        items=items,
        counts={row.name: row.pairs for row in scores},
        notes=[f"left out: {error}" for error in broken],
        model=encoder.config.adapter or encoder.config.llm,
        provenance={
            "teacher": dataclasses.asdict(encoder.identity()),
            "data_sha256": sha256_text(canonical_json(sets)),
        },
    )
    write_scores(record, config.json)
    return 0


@dataclass(frozen=True)
class CaptionScore:
    """One row of the table; accuracies are fractions."""

    name: str  # short->long, de->en ..., or languages
    cra: float  # first retrieves second, top-1
    reverse: float  # second retrieves first
    centred: float  # as cra, after subtracting each set's mean
    pairs: int  # N; chance is 1 / N
    hits: tuple[float, ...] = ()  # of each first caption, 0 to 1
    keys: tuple[str, ...] = ()  # their sample keys


def measure_captions(
    encoder: CaptionEncoder,
    config: CaptionSetConfig,
    read: ReadConfig,
    broken: list[BrokenSample] | None = None,
) -> list[CaptionScore]:
    """One row per ``retrieve``, per further language, and their mean. ``broken`` and errors as of
    ``caption_sets``."""
    sets = caption_sets(config, read, broken)
    return measure_pairs(encoder, sets, config.retrieve)


def measure_pairs(
    encoder: CaptionEncoder, sets: dict[str, Pairs], retrieve: Sequence[str]
) -> list[CaptionScore]:
    """`measure_captions` of pairs that are read already."""
    firsts: dict[str, None] = {}  # each text once, in order
    seconds: dict[str, None] = {}
    for pairs in sets.values():
        firsts |= dict.fromkeys(first for _, first, _ in pairs)
        seconds |= dict.fromkeys(second for _, _, second in pairs)
    first_NW = encoder.encode(list(firsts), query=True)
    second_NW = encoder.encode(list(seconds), query=False)
    first_of = dict(zip(firsts, first_NW, strict=True))
    second_of = dict(zip(seconds, second_NW, strict=True))
    return measure_sets(sets, first_of, second_of, retrieve)


def measure_sets(
    sets: dict[str, Pairs], first: Rows, second: Rows, retrieve: Sequence[str]
) -> list[CaptionScore]:
    """`measure_captions` of embedded captions, as first and as second ones."""
    rows: list[CaptionScore] = []
    for name, pairs in sets.items():
        keys, lefts, rights = zip(*pairs, strict=True)
        first_NW = torch.stack([first[left] for left in lefts])
        second_NW = torch.stack([second[right] for right in rights])
        # equal texts are equally correct
        group_of = {text: number for number, text in enumerate(dict.fromkeys(rights))}
        group_N = torch.tensor([group_of[right] for right in rights])
        forward, reverse = caption_ranks(first_NW, second_NW, group_N=group_N)
        centered, _ = caption_ranks(first_NW, second_NW, group_N=group_N, center=True)
        hit_N = forward.hits(1)
        row = CaptionScore(
            name=name,
            cra=float(hit_N.mean()),
            reverse=float(reverse.hits(1).mean()),
            centred=float(centered.hits(1).mean()),
            pairs=len(pairs),
            hits=tuple(hit_N.tolist()),
            keys=keys,
        )
        rows.append(row)
    foreign = [row for row in rows if row.name.replace("->", ":") not in retrieve]
    if foreign:
        rows.append(mean_score(foreign))
    return rows


def mean_score(rows: Sequence[CaptionScore]) -> CaptionScore:
    """The row ``LANGUAGES``: the means of others."""

    def mean(field: str) -> float:
        return sum(vars(row)[field] for row in rows) / len(rows)

    return CaptionScore(
        name=LANGUAGES,
        cra=mean("cra"),
        reverse=mean("reverse"),
        centred=mean("centred"),
        pairs=round(mean("pairs")),
    )


def caption_sets(
    config: CaptionSetConfig,
    read: ReadConfig,
    broken: list[BrokenSample] | None = None,
) -> dict[str, Pairs]:
    """What is retrieved: pairs of captions by row name, without an encoder. Samples that can't be
    read are left out, and added to ``broken``. ValueError if no image has both kinds."""
    how_to_read = {**vars(read), "kinds": (), "languages": ()}
    source = open_source(SourceConfig(path=config.captions, **how_to_read))
    unreadable = [] if broken is None else broken
    captions: list[tuple[str, tuple[Caption, ...]]] = []
    for number in range(min(len(source), config.limit)):
        try:
            sample = source[number]
        except BrokenSample as error:
            unreadable.append(error)
            continue
        captions.append((sample.key, sample.captions))
    every_caption: list[Caption] = []
    for _, of_sample in captions:
        every_caption += of_sample
    home = config.home
    sets: dict[str, Pairs] = {}
    for kinds in config.retrieve:
        first, second = kinds.split(":")
        sets[f"{first}->{second}"] = find_pairs(captions, (first, home), (second, home))
    if empty := [name for name, pairs in sets.items() if not pairs]:
        available = (
            ", ".join(sorted({caption.kind for caption in every_caption})) or "none"
        )
        more = ""
        if unreadable:
            more = f"; {count_broken(unreadable)}"
        problem = f"no image has captions of both kinds for {', '.join(empty)}"
        raise ValueError(
            f"{config.captions}: {problem}; available kinds: {available}{more}"
        )
    if config.across:
        kind = config.across_kind
        languages = {
            caption.language for caption in every_caption if caption.kind == kind
        }
        for language in sorted(languages - {home}):
            sets[f"{language}->{home}"] = find_pairs(
                captions, (kind, language), (kind, home)
            )
    return {name: pairs for name, pairs in sets.items() if pairs}


def check_captions(config: CaptionSetConfig, read: ReadConfig) -> None:
    """Read captions that a training will be evaluated on, and say which can't be read."""
    broken: list[BrokenSample] = []
    caption_sets(config, read, broken)
    print_left_out(broken)


def print_left_out(broken: Sequence[BrokenSample]) -> None:
    """Say which samples can't be read, as the other evaluations do."""
    for error in broken[:NOTES_SHOWN]:
        print(printable(f"left out: {error}"))


def find_pairs(
    captions: Sequence[tuple[str, Sequence[Caption]]],
    first: tuple[str, str],
    second: tuple[str, str],
) -> Pairs:
    """Distinct pairs of different captions; ``first`` and ``second`` are (kind, language), the
    first of each counts."""
    pairs: dict[tuple[str, str], str] = {}
    first_kind, first_language = first
    second_kind, second_language = second
    for key, of_sample in captions:
        lefts = select_captions(of_sample, [first_kind], [first_language])
        rights = select_captions(of_sample, [second_kind], [second_language])
        if not lefts:
            continue
        left = lefts[0].text
        others = [caption.text for caption in rights if caption.text != left]
        if left and others and others[0]:
            pairs.setdefault((left, others[0]), key)
    return [(key, left, right) for (left, right), key in pairs.items()]


def caption_ranks(
    first_NW: Tensor,
    second_NW: Tensor,
    *,
    center: bool = False,
    group_N: Tensor | None = None,
) -> tuple[QueryRanks, QueryRanks]:
    """Ranks of first -> second and second -> first, for hits item by item.

    ``center``: subtract each set's mean before normalizing. A raw LLM's embeddings share one large
    common direction; subtracting it closes much of the gap to a fine-tuned LLM, so report both.
    ``group_N``: int, pairs with the same label are also correct for each other (several items of
    one concept).
    """
    label_N = group_N
    if label_N is None:
        label_N = torch.arange(len(first_NW), device=first_NW.device)
    first_NW = first_NW.float()
    second_NW = second_NW.float()
    if center:
        first_NW = first_NW - first_NW.mean(0, keepdim=True)
        second_NW = second_NW - second_NW.mean(0, keepdim=True)
    first_NW = F.normalize(first_NW, dim=1)
    second_NW = F.normalize(second_NW, dim=1)
    return rank_both(first_NW, second_NW, label_N, label_N)


@dataclass(frozen=True)
class Reading:
    """One way of reading the LLM, and what it reached."""

    way: EncoderConfig
    components: int  # removed; 0: centered alone, -1: no post-processing
    rows: dict[str, float]  # name -> top-1 accuracy
    captions: int  # distinct ones that it was measured on
    base_sha256: str  # of the LLM's weights
    post: Post | None = field(repr=False, compare=False)

    @property
    def score(self) -> float:
        """The mean over the rows; all languages are one."""
        return sum(self.rows.values()) / len(self.rows)


def search(config: EvaluateCaptionsConfig) -> list[Reading]:
    """Every reading, best first. Raises ValueError without training captions, or for prompts that
    only queries have."""
    if not config.reading.fit_on:
        raise ValueError(
            "--search needs training captions for its post-processing; set --fit-on DATA"
        )
    broken: list[BrokenSample] = []
    sets = caption_sets(config.measure, config.read, broken)
    print_left_out(broken)
    fit_on = config.reading.fit_on
    broken_in_fit: list[BrokenSample] = []
    fitted = first_captions(fit_on, FIT_CAPTIONS, config.read, broken_in_fit)
    if broken_in_fit:
        print(printable(f"{fit_on}: {count_broken(broken_in_fit)}"))
    unique_texts: dict[str, None] = {}
    for pairs in sets.values():
        for _, first, second in pairs:
            unique_texts |= {first: None, second: None}
    texts = list(unique_texts)
    counted = [
        *(name.replace(":", "->") for name in config.measure.retrieve),
        LANGUAGES,
    ]
    components = config.reading.components
    is_fine_tuned = find_card(config.encoder.adapter or config.encoder.llm) is not None
    readings: list[Reading] = []
    for encoding in [config.encoder] if is_fine_tuned else encodings_of_raw_llm(config):
        encoder = CaptionEncoder(encoding)
        if encoder.config.query_prompt not in ("", encoder.config.prompt):
            raise ValueError(
                "--search reads queries as all captions, but the LLM has a query_prompt"
            )
        if encoder.post is not None:
            raise ValueError(
                f"{encoding.adapter or encoding.llm} is read in one way; nothing to search"
            )
        poolings = (encoder.config.pooling,) if is_fine_tuned else POOLINGS
        states = pooled_states(encoder, [*texts, *fitted], poolings)
        for (pooling, layer), state_NW in states.items():
            way = dataclasses.replace(encoder.config, layer=layer, pooling=pooling)
            posts = remove_components(state_NW[len(texts) :], config.reading.components)
            for removed, post in [(-1, None), *zip(components, posts, strict=True)]:
                read_NW = state_NW[: len(texts)]
                if post is not None:
                    read_NW = post(read_NW)
                row_of = dict(zip(texts, read_NW, strict=True))
                scores = measure_sets(sets, row_of, row_of, config.measure.retrieve)
                accuracies = {
                    row.name: row.cra for row in scores if row.name in counted
                }
                reading = Reading(
                    way=way,
                    components=removed,
                    rows=accuracies,
                    captions=len(texts),
                    base_sha256=encoder.identity().weights_sha256,
                    post=post,
                )
                readings.append(reading)
        del encoder  # before the next one is loaded
    return sorted(readings, key=lambda reading: -reading.score)


def encodings_of_raw_llm(config: EvaluateCaptionsConfig) -> list[EncoderConfig]:
    """The settings with which an LLM is loaded that was not fine-tuned to be read in one way."""
    encodings: list[EncoderConfig] = []
    for template in config.reading.templates or ("",):
        for attention in ATTENTIONS:
            # all poolings are tried, but a sentence-transformers model refuses the default
            encodings.append(
                dataclasses.replace(
                    config.encoder,
                    chat_template=template,
                    attention=attention,
                    layer=-1,
                    pooling="last",
                )
            )
    return encodings


@torch.no_grad()
def pooled_states(
    encoder: CaptionEncoder, captions: list[str], poolings: tuple[str, ...]
) -> dict[tuple[str, int], Tensor]:
    """(pooling, layer) -> (N, W): every hidden state, numbered as ``layer``, -1 the last; with one
    pooling the last."""
    rows = encoder.tokenize(captions)
    frame = encoder.frame
    states_of: dict[tuple[str, int], Tensor] = {}
    batches = list(length_batches([len(ids) for ids in rows], CPU_TOKENS))
    for indices in track(batches, total=len(batches), label="reading", unit="batches"):
        ids_of_batch = [rows[index] for index in indices]
        batch = encoder.collate(ids_of_batch, [frame] * len(indices))
        states = encoder.model.llm(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            output_hidden_states=True,
        )
        if len(poolings) == len(POOLINGS):
            layers = dict(enumerate(states.hidden_states[:-1]))
            layers[-1] = states.last_hidden_state
        else:
            layers = {encoder.config.layer: states.last_hidden_state}
        for layer, hidden_BTH in layers.items():
            for pooling in poolings:
                pooled_BW = pool(hidden_BTH, batch.pool_mask, pooling).cpu()
                empty_NW = torch.empty(len(captions), pooled_BW.shape[1])
                states_of.setdefault((pooling, layer), empty_NW)[indices] = pooled_BW
    return states_of


def search_and_report(config: EvaluateCaptionsConfig) -> None:
    """Search, write ``folder`` if one is given, and print the best with the command that embeds
    captions so."""
    folder = config.reading.folder
    if folder:
        refuse_other_card(Path(folder))
    readings = search(config)
    best = readings[0]
    if folder:
        save_best(best, len(readings), config)
    rows = {}
    names = {-1: "none, not centered", 0: "none, centered"}
    for reading in readings[:SHOWN]:
        way = reading.way
        settings = [
            way.attention,
            way.pooling,
            str(way.layer),
            names.get(reading.components, str(reading.components)),
            repr(way.chat_template),
        ]
        accuracies = {"score": reading.score, **reading.rows}
        cells = {name: f"{value:.3f}" for name, value in accuracies.items()}
        rows[", ".join(settings)] = cells
    title = "attention, pooling, layer, components removed, template"
    caption = (
        f"best of {len(readings)}, chosen on these captions; measure it on others:"
    )
    print_table(title, rows, caption)
    llm_options = ("llm", "revision", "adapter", "load_in_4bit")
    words_of_llm = changed_options(config.encoder, llm_options)
    words = list(words_of_llm)
    if find_card(config.encoder.adapter or config.encoder.llm) is None:
        words += reading_options(best.way, IDENTITY_SETTINGS)
    if best.post is not None:
        words += ["--post-file", str(Path(folder or "FOLDER") / POST_FILE)]
    print(command("embed", "DATA", *words))
    if config.encoder.adapter:  # `llm2clip run` reads it as its card says
        return
    run = ["run", "DATA", *words_of_llm, "--tower", "TOWER"]
    run += ["--output", "OUTPUT", "--reading", folder or "FOLDER"]
    needs = "" if folder else ", with the --folder of this search"
    print(f"or for all stages{needs}:")
    print(command(*run))


def save_best(best: Reading, tried: int, config: EvaluateCaptionsConfig) -> None:
    """Write the best reading of ``tried`` to ``folder``: for `llm2clip run`, or of an LLM with an
    adapter, whose card says the rest, the post-processing alone."""
    folder = Path(config.reading.folder)
    if config.encoder.adapter:
        if best.post is not None:
            folder.mkdir(parents=True, exist_ok=True)
            best.post.save(folder)
        return
    write_reading(
        folder,
        best.way,
        best.post,
        base_sha256=best.base_sha256,
        accuracies={"score": best.score, **best.rows},
        search={
            "readings": tried,
            "captions": best.captions,
            "components": best.components,
            "data": Path(config.measure.captions).name,
            "fit_on": Path(config.reading.fit_on).name,
        },
    )
