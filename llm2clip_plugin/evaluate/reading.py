"""``llm2clip evaluate captions --search``: how an LLM's captions are best read, without training it.

One search, the same for every LLM: chat template x attention x hidden state x pooling x post-processing (none,
centered, without the k largest components of training captions). Each reading is measured by caption retrieval on
validation captions: top-1 accuracy, the mean over the kinds of ``retrieve`` and one row for all languages. A fine-tuned
LLM keeps what its card says, and only post-processing is chosen. Report the best on other captions: it is the best of
hundreds.

Shapes: N captions, B captions of a batch, T tokens, H and W width.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip_plugin.commands import command
from llm2clip_plugin.contracts import atomic_file
from llm2clip_plugin.evaluate.captions import (
    LANGUAGES,
    Pairs,
    caption_sets,
    measure_captions,
    rank_pairs,
    score_file,
    table,
)
from llm2clip_plugin.evaluate.command_line import write_scores
from llm2clip_plugin.evaluate.options.captions import COMMAND, EvaluateCaptionsConfig
from llm2clip_plugin.progress import track
from llm2clip_plugin.text.encoder import CPU_TOKENS, CaptionEncoder
from llm2clip_plugin.text.model import pool
from llm2clip_plugin.text.post import POST_FILE, Post, first_captions, remove_components
from llm2clip_plugin.text.settings import ATTENTIONS, POOLINGS, EncoderConfig, find_card
from llm2clip_plugin.text.tokens import collate, length_batches

SHOWN = 10  # rows of the table
READINGS = "search.json"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One way of reading the LLM, and what it reached."""

    chat_template: str
    attention: str
    layer: int
    pooling: str
    components: int  # removed; 0: centered alone, -1: no post-processing
    rows: dict[str, float]  # name -> top-1 accuracy
    post: Post | None = field(repr=False, compare=False)

    @property
    def score(self) -> float:
        """The mean over the rows; all languages are one."""
        return sum(self.rows.values()) / len(self.rows)

    def record(self) -> dict[str, Any]:
        """For a JSON file."""
        kept = {name: value for name, value in vars(self).items() if name != "post"}
        return {"score": self.score, **kept}


def search(config: EvaluateCaptionsConfig) -> list[Reading]:
    """Every reading, best first. Raises ValueError without training captions, or for prompts that only queries have."""
    if not config.reading.fit_on:
        raise ValueError("--search needs training captions for its post-processing; set --fit-on DATA")
    sets, fitted = caption_sets(config.measure), first_captions(config.reading.fit_on, config.reading.fit_captions)
    texts = list(dict.fromkeys(text for pairs in sets.values() for _, *both in pairs for text in both))
    found = []
    for encoding in ways(config):
        encoder = CaptionEncoder(encoding)
        if encoder.config.query_prompt not in ("", encoder.config.prompt):
            raise ValueError("--search reads queries as all captions, but the LLM has a query_prompt")
        if not encoder.model.decoder or encoder.post is not None:
            raise ValueError(f"{encoding.adapter or encoding.llm} is read in one way; nothing to search")
        own = (encoder.config.pooling,) if has_card(encoding) else POOLINGS
        states = pooled_states(encoder, [*texts, *fitted], own)
        for (pooling, layer), state_NW in states.items():
            posts = remove_components(state_NW[len(texts) :], config.reading.components)
            for components, post in [(-1, None), *zip(config.reading.components, posts, strict=True)]:
                read_NW = state_NW[: len(texts)] if post is None else post(state_NW[: len(texts)])
                found.append(
                    Reading(
                        chat_template=encoder.config.chat_template,
                        attention=encoder.config.attention,
                        layer=layer,
                        pooling=pooling,
                        components=components,
                        rows=measure(sets, dict(zip(texts, read_NW, strict=True)), config.measure.retrieve),
                        post=post,
                    )
                )
    return sorted(found, key=lambda reading: -reading.score)


def ways(config: EvaluateCaptionsConfig) -> Iterator[EncoderConfig]:
    """The settings for which the LLM is loaded anew: templates and attentions, or those of its card."""
    if has_card(config.encoder):
        yield config.encoder
        return
    for template, attention in itertools.product(config.reading.templates or ("",), ATTENTIONS):
        yield dataclasses.replace(config.encoder, chat_template=template, attention=attention, layer=-1)


def has_card(encoding: EncoderConfig) -> bool:
    """Whether the LLM was fine-tuned to be read in one way."""
    return find_card(encoding.adapter or encoding.llm) is not None


@torch.no_grad()
def pooled_states(
    encoder: CaptionEncoder, captions: list[str], poolings: tuple[str, ...]
) -> dict[tuple[str, int], Tensor]:
    """(pooling, layer) -> (N, W): every hidden state, numbered as ``layer``, -1 the last; with one pooling the last."""
    rows, frame = encoder.tokenize(captions), encoder.frame
    found: dict[tuple[str, int], Tensor] = {}
    batches = list(length_batches([len(ids) for ids in rows], CPU_TOKENS))
    for indices in track(batches, total=len(batches), label="reading", unit="batches"):
        some = [rows[index] for index in indices]
        batch = collate(some, [frame] * len(some), pad_id=encoder.pad_id, include_bos=encoder.config.include_bos)
        batch = batch.to(encoder.device)
        options = {"position_ids": batch.position_ids, "use_cache": False, "output_hidden_states": True}
        states = encoder.model.llm(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)
        depth = len(states.hidden_states) - 1
        layers = range(depth) if len(poolings) == len(POOLINGS) else ()
        for layer, hidden_BTH in [*zip(layers, states.hidden_states, strict=False), (-1, states.last_hidden_state)]:
            for pooling in poolings:
                own = (pooling, layer if layers else encoder.config.layer)
                pooled_BW = pool(hidden_BTH, batch.pool_mask, pooling).cpu()
                found.setdefault(own, torch.empty(len(captions), pooled_BW.shape[1]))[indices] = pooled_BW
    return found


def measure(sets: dict[str, Pairs], row_of: dict[str, Tensor], retrieve: tuple[str, ...]) -> dict[str, float]:
    """Name -> top-1 accuracy of the first captions; languages together are one row."""
    accuracy = {}
    for name, pairs in sets.items():
        if pairs:
            first_NW, second_NW = (torch.stack([row_of[pair[side]] for pair in pairs]) for side in (1, 2))
            accuracy[name] = rank_pairs(name, pairs, first_NW, second_NW).cra
    home = {name: value for name, value in accuracy.items() if name.replace("->", ":") in retrieve}
    foreign = [value for name, value in accuracy.items() if name not in home]
    return {**home, **({LANGUAGES: sum(foreign) / len(foreign)} if foreign else {})}


def search_and_write(config: EvaluateCaptionsConfig) -> str:
    """Search, write ``folder`` if one is given, and return the table with the command that embeds so."""
    readings = search(config)
    best, folder = readings[0], config.reading.folder
    if folder:
        with atomic_file(Path(folder) / READINGS) as temporary:
            body = {"validation": config.measure.captions, "fit_on": config.reading.fit_on}
            text = json.dumps({**body, "readings": [one.record() for one in readings]}, indent=1, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")
        if best.post is not None:
            best.post.save(Path(folder))
    names = list(best.rows)
    lines = ["  ".join(["score", *names, "attention, pooling, layer, components removed, template"])]
    for one in readings[:SHOWN]:
        numbers = [f"{one.score:.3f}", *(f"{one.rows[name]:.3f}".rjust(len(name)) for name in names)]
        removed = {-1: "none, not centered", 0: "none, centered"}.get(one.components, str(one.components))
        way = f"{one.attention}, {one.pooling}, {one.layer}, {removed}, {one.chat_template!r}"
        lines.append("  ".join([*numbers, way]))
    lines.append(f"best of {len(readings)}, chosen on these captions; measure it on others:")
    return "\n".join([*lines, embed_command(config, best)])


def embed_command(config: EvaluateCaptionsConfig, best: Reading) -> str:
    """The command that embeds captions as ``best`` reads them."""
    words = ["--llm", config.encoder.llm, *(["--adapter", config.encoder.adapter] if config.encoder.adapter else [])]
    if not has_card(config.encoder):
        for name in ("attention", "pooling", "layer", "chat_template"):
            if (value := vars(best)[name]) != vars(EncoderConfig())[name]:
                words += [f"--{name.replace('_', '-')}", str(value)]
    if best.post is not None:
        words += ["--post-file", str(Path(config.reading.folder or "FOLDER") / POST_FILE)]
    return command("embed", "DATA", *words)


def main(argv: list[str]) -> int:
    """``llm2clip evaluate captions DATA --llm PATH_OR_HUB_ID [--adapter DIR] [--retrieve short:long] [--search]``."""
    config = COMMAND.parse(argv)
    if not config.measure.captions:
        raise ValueError("no captions given; usage: llm2clip evaluate captions DATA --llm PATH_OR_HUB_ID")
    if config.search:
        print(search_and_write(config))
        return 0
    encoder = CaptionEncoder(config.encoder)
    scores = measure_captions(encoder, config.measure)
    print(table(scores))
    if encoder.count_truncated:
        print(f"{encoder.count_truncated} captions exceed {encoder.config.max_tokens} tokens and were truncated")
    write_scores(score_file(scores, encoder, config.measure.captions), config.json, file=sys.stderr)
    return 0
