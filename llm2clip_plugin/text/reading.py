"""The best reading of an LLM, in a folder: ``evaluate captions --search`` writes it, and ``llm2clip
run --reading`` uses it.

It holds an encoder card, as the folder of an adapter does, and the post-processing, if that was
best.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import EncoderCard
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.options import changed_options, command
from llm2clip_plugin.text.config import (
    CARD_SETTINGS,
    IDENTITY_SETTINGS,
    EncoderConfig,
    find_card,
)
from llm2clip_plugin.text.encoder import local_folder, weights_sha256
from llm2clip_plugin.text.llm import llm_config
from llm2clip_plugin.text.post import POST_FILE, Post, open_post
from llm2clip_plugin.vision.export import library_versions

SEARCH = (
    "search"  # of EncoderCard.training: what tells this card from that of an adapter
)
# A fine-tuned LLM is read at its last hidden state, whichever was the original one's best.
STAGE_1_SETTINGS = tuple(name for name in CARD_SETTINGS if name != "layer")


def refuse_other_card(folder: Path) -> None:
    """Raise FileExistsError for a folder whose card is that of an adapter or LLM."""
    card = find_card(str(folder))
    if card is not None and SEARCH not in card.training:
        raise FileExistsError(
            f"--folder {folder} has the {EncoderCard.FILE} of an adapter or LLM; "
            "choose another folder"
        )


def write_reading(
    folder: Path,
    way: EncoderConfig,
    post: Post | None,
    *,
    base_sha256: str,
    accuracies: dict[str, float],
    search: dict[str, Any],
) -> None:
    """Write a reading. The card comes last, with the digest of the post-processing: without it, or
    with another file next to it, the folder is refused.

    way: with a literal template. base_sha256: of the LLM's weights. search: what it was chosen on.
    """
    settings = {name: vars(way)[name] for name in CARD_SETTINGS}
    # the search reads queries as all captions
    settings["query_prompt"] = way.prompt
    folder.mkdir(parents=True, exist_ok=True)
    card = EncoderCard(
        base=way.llm,
        base_sha256=base_sha256,
        **settings,
        post_sha256="" if post is None else post.save(folder),
        training={SEARCH: search},
        metrics=accuracies,
        versions=library_versions(),
    )
    card.write(folder / EncoderCard.FILE)


def read_reading(folder: str, llm: str) -> EncoderCard:
    """The card in the folder of a search. Raises FileNotFoundError without one, with the command
    that writes it for ``llm``, ContractError for that of an adapter."""
    card = find_card(folder)
    if card is None:
        search = command(
            *("evaluate", "captions", "VALIDATION", "--llm", llm, "--search"),
            *("--fit-on", "TRAIN", "--folder", folder),
        )
        raise FileNotFoundError(
            f"--reading {folder} has no {EncoderCard.FILE}; create it with `{search}`"
        )
    if SEARCH not in card.training:
        raise ContractError(
            f"--reading {folder} has the {EncoderCard.FILE} of an adapter or LLM; "
            "expected the folder of `llm2clip evaluate captions --search`"
        )
    return card


def check_reading(folder: str, encoder: EncoderConfig) -> None:
    """Raise FileNotFoundError or ContractError for a reading that ``read_reading`` refuses, of
    another LLM than the encoder's, or whose post-processing is missing or another one."""
    card = read_reading(folder, encoder.llm)
    weights = weights_sha256(local_folder(encoder.llm, encoder.revision))
    if weights != card.base_sha256:
        raise ContractError(
            f"--reading {folder} is of {card.base} with weights {card.base_sha256[:12]}..., but "
            f"--llm {encoder.llm} has {weights[:12]}...; pass that LLM, or search again with this "
            "one"
        )
    if card.post_sha256:
        width = llm_config(encoder).get_text_config().hidden_size
        open_post(Path(folder) / POST_FILE, width, card.post_sha256)


def stage_1_options(card: EncoderCard) -> list[str]:
    """Options of ``finetune-llm`` that train the LLM in this reading, at its last hidden state and
    without post-processing."""
    return reading_options(_encoder_config(card), STAGE_1_SETTINGS)


def embed_options(card: EncoderCard, folder: Path) -> list[str]:
    """Options of ``embed`` that read the original LLM so."""
    words = reading_options(_encoder_config(card), IDENTITY_SETTINGS)
    if card.post_sha256:
        words += ["--post-file", str(folder / POST_FILE)]
    return words


def reading_options(way: EncoderConfig, names: Sequence[str]) -> list[str]:
    """Options that set the fields ``names``. The default pooling and attention are named, too: a
    sentence-transformers model is read so only if that is demanded."""
    words = changed_options(way, names)
    if (way.pooling, way.attention) == (EncoderConfig.pooling, EncoderConfig.attention):
        words = ["--preset", "mean", *words]
    return words


def summary(card: EncoderCard, *, fine_tuned: bool) -> str:
    """What ``llm2clip run`` uses of a reading, in a few words; ``fine_tuned``: by stage 1."""
    layer = "last" if fine_tuned or card.layer == -1 else str(card.layer)
    has_post = bool(card.post_sha256) and not fine_tuned
    parts = [
        f"attention {card.attention}",
        f"pooling {card.pooling}",
        f"layer {layer}",
        f"post-processing {'yes' if has_post else 'no'}",
        f"prompt {card.chat_template or card.prompt or 'none'!r}",
    ]
    return ", ".join(parts)


def _encoder_config(card: EncoderCard) -> EncoderConfig:
    settings = {name: vars(card)[name] for name in CARD_SETTINGS}
    return EncoderConfig(**settings)
