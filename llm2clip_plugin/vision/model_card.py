"""The README.md of a tower directory, and a line about it for commands."""

import os

from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.vision.families import families
from llm2clip_plugin.vision.places import TEACHER_ADAPTER

BEFORE = "before"  # of a card's training: scores before step 1
LICENSE = (
    "## License",
    "",
    "Not stated. The tower inherits terms from the weights that it started from, from its teacher LLM and from its "
    "training data. Complete this section and `license` above before you publish it.",
    "",
)
PAGE = """\
---
library_name: transformers
pipeline_tag: image-feature-extraction
license: other
tags:
- llm2clip
- vision
- {family}
---

# LLM2CLIP tower ({family})

{facts}
{training}{metrics}{license}
## Use

{limits}In LLaVA 1.5, with `llm2clip-plugin` installed in the same environment:

```sh
--vision_tower llm2clip:PATH_OR_HUB_ID --mm_vision_select_layer -2
```

In Python:

```python
from llm2clip_plugin import load_dual_encoder, load_tower

tower = load_tower("PATH_OR_HUB_ID")
{dual}```
"""
DUAL = """\
dual = load_dual_encoder("PATH_OR_HUB_ID")
image_features = dual.encode_image(pixel_values)
"""
TEXT = """\
# teacher=PATH: where the LLM is, if not there
text_features = dual.encode_text(["a bird on a wire"])
"""


def model_card(card: TowerCard) -> str:
    """Markdown with the Hub's front matter: what the tower is, how it was made, its metrics, how to use it."""
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
    training = [(name, str(value)) for name, value in sorted(card.training.items()) if name != BEFORE]
    texts = f"# {texts}\n" if (texts := needs_for_texts(card)) else ""
    dual = DUAL + (texts + TEXT if card.teacher else "")
    return PAGE.format(
        family=card.family,
        facts=_table(("", ""), rows),
        training=f"## Training\n\n{_table(('', ''), training)}\n" if training else "",
        metrics=_metrics(card),
        license="\n".join(LICENSE),
        limits=f"This tower {reason}.\n\n" if (reason := beyond_llava(card)) else "",
        dual=dual if card.projection_dim else "",
    )


def _metrics(card: TowerCard) -> str:
    """The scores, next to those before training if these were measured."""
    before, metrics = card.training.get(BEFORE, {}), sorted(card.metrics.items())
    if not before or not metrics:
        rows = [(name, f"{value:.4f}") for name, value in metrics]
        return f"## Metrics\n\n{_table(('metric', 'value'), rows)}\n" if rows else ""
    text = "On held-out data. Before: the start tower, frozen, with fitted projection and text adapter."
    rows = [(name, f"{before[name]:.4f}" if name in before else "", f"{value:.4f}") for name, value in metrics]
    return f"## Metrics\n\n{text}\n\n{_table(('metric', 'before', 'after'), rows)}\n"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:], ""])


def summary(place: str | os.PathLike[str], card: TowerCard) -> str:
    """A written tower directory in one line; others if LLaVA's pinned environment cannot run it, and about texts."""
    lines = [f"{card.family} tower, {card.image_size} px, verified by reloading (sha256 {card.weights_sha256})"]
    return "\n".join(f"{place}: {line}" for line in [*lines, beyond_llava(card), needs_for_texts(card)] if line)


def beyond_llava(card: TowerCard) -> str:
    """Why LLaVA 1.5 cannot run a tower in its pinned environment; "" if it can."""
    needs = families()[card.family].needs
    pinned = "cannot run in LLaVA 1.5's pinned environment (transformers 4.37.2, timm 0.6.13)"
    return f"needs {needs}: {pinned}; LLaVA runs it in the training environment" if needs else ""


def needs_for_texts(card: TowerCard) -> str:
    """What encode_text needs in addition to the directory; "" for a tower without a teacher that has an adapter."""
    if not card.teacher.get("adapter_sha256"):
        return ""
    llm, adapter = card.teacher.get("llm", ""), card.teacher.get("adapter", "")
    if adapter == f"./{TEACHER_ADAPTER}":
        return f"texts need the LLM {llm}; the adapter is in {TEACHER_ADAPTER}/"
    where = f"the adapter {adapter}" if adapter else "its adapter"
    return f"texts need the LLM {llm} and {where}; `llm2clip export --with-adapter` puts the adapter into the directory"
