"""The README.md of a tower directory."""

import os

from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.vision.families import families
from llm2clip_plugin.vision.places import TEACHER_ADAPTER

LICENSE = (
    "## License",
    "",
    "Not stated. The tower inherits terms from the weights that it started from, from its teacher LLM and from its "
    "training data. Complete this section and `license` above before you publish it.",
    "",
)
BEFORE = "before"  # of a card's training: scores before step 1


def _table(rows: list[tuple[str, str]], head: tuple[str, str] = ("", "")) -> list[str]:
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]


def beyond_llava(card: TowerCard) -> str:
    """Why LLaVA 1.5 cannot run a tower in its pinned environment; "" if it can."""
    needs = families()[card.family].needs
    pinned = "cannot run in LLaVA 1.5's pinned environment (transformers 4.37.2, timm 0.6.13)"
    return f"needs {needs}: {pinned}; LLaVA runs it in the training environment" if needs else ""


def summary(place: str | os.PathLike[str], card: TowerCard) -> str:
    """A written tower directory in one line; others if LLaVA's pinned environment cannot run it, and about texts."""
    lines = [
        f"{place}: {card.family} tower, {card.image_size} px, verified by reloading (sha256 {card.weights_sha256})"
    ]
    lines += [f"{place}: {reason}"] if (reason := beyond_llava(card)) else []
    return "\n".join([*lines, *([f"{place}: {texts}"] if (texts := needs_for_texts(card)) else [])])


def needs_for_texts(card: TowerCard) -> str:
    """What encode_text needs in addition to the directory; "" for a tower without a teacher that has an adapter."""
    if not card.teacher.get("adapter_sha256"):
        return ""
    llm, adapter = card.teacher.get("llm", ""), card.teacher.get("adapter", "")
    if adapter == f"./{TEACHER_ADAPTER}":
        return f"texts need the LLM {llm}; the adapter is in {TEACHER_ADAPTER}/"
    where = f"the adapter {adapter}" if adapter else "its adapter"
    return f"texts need the LLM {llm} and {where}; `llm2clip export --with-adapter` puts the adapter into the directory"


def _metrics(card: TowerCard) -> list[str]:
    """The scores, next to those before training if these were measured."""
    before = card.training.get(BEFORE, {})
    if not card.metrics:
        return []
    if not before:
        values = [(name, f"{value:.4f}") for name, value in sorted(card.metrics.items())]
        return ["## Metrics", "", *_table(values, ("metric", "value"))]
    lines = [
        "## Metrics",
        "",
        "On held-out data. Before: the start tower, frozen, with fitted projection and text adapter.",
    ]
    lines += ["", "| metric | before | after |", "|---|---|---|"]
    for name, value in sorted(card.metrics.items()):
        start = f"{before[name]:.4f}" if name in before else ""
        lines.append(f"| {name} | {start} | {value:.4f} |")
    return [*lines, ""]


def model_card(card: TowerCard) -> str:
    """Markdown with the Hub's front matter: what the tower is, how it was made, its metrics, how to use it."""
    lines = ["---", "library_name: transformers", "pipeline_tag: image-feature-extraction", "license: other"]
    lines += ["tags:", "- llm2clip", "- vision", f"- {card.family}", "---", "", f"# LLM2CLIP tower ({card.family})", ""]
    tokens = f"{card.num_patches} patches" + (" + 1 class token" if card.has_cls else ", no class token")
    rows = [
        ("started from", f"`{card.origin}`"),
        ("image size", f"{card.image_size} px, patches of {card.patch_size} px: {tokens}"),
        ("blocks x width", f"{card.num_layers} x {card.hidden_size}"),
    ]
    if "resized_from" in card.training:
        rows.append(("positions interpolated from", f"{card.training['resized_from']} px"))
    if card.projection_dim:
        rows.append(("projection_dim", str(card.projection_dim)))
    if needs := families()[card.family].needs:
        rows.append(("additional requirement", f"`pip install '{needs}'`"))
    if card.teacher:
        name, width = card.teacher.get("llm", ""), card.teacher.get("width", "?")
        rows.append(("teacher LLM", f"`{name}`, embeddings of width {width}"))
    rows.append(("SHA-256 of the weights", f"`{card.weights_sha256}`"))
    lines += _table(rows)
    if card.training:
        facts = [(k, str(v)) for k, v in sorted(card.training.items()) if k != BEFORE]
        lines += ["## Training", "", *_table(facts)]
    lines += [*_metrics(card), *LICENSE, "## Use", ""]
    if reason := beyond_llava(card):
        lines += [f"This tower {reason}.", ""]
    lines += ["In LLaVA 1.5, with `llm2clip-plugin` installed in the same environment:", "", "```sh"]
    lines += ["--vision_tower llm2clip:PATH_OR_HUB_ID --mm_vision_select_layer -2", "```", ""]
    lines += ["In Python:", "", "```python", "from llm2clip_plugin import load_dual_encoder, load_tower", ""]
    lines += ['tower = load_tower("PATH_OR_HUB_ID")']
    if card.projection_dim:
        lines += ['dual = load_dual_encoder("PATH_OR_HUB_ID")', "image_features = dual.encode_image(pixel_values)"]
        if card.teacher:
            lines += [f"# {needs_for_texts(card)}"] * bool(needs_for_texts(card))
            lines += ["# teacher=PATH: where the LLM is, if not there"]
            lines += ['text_features = dual.encode_text(["a bird on a wire"])']
    return "\n".join([*lines, "```", ""])
