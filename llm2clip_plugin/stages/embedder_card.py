"""README.md of an embedder for sentence-transformers."""

from __future__ import annotations

from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.report_text import markdown_table
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.vision.directory import is_local, published
from llm2clip_plugin.vision.export import LICENSE

FRONT = """\
---
library_name: sentence-transformers
pipeline_tag: {task}
license: other
tags:
- sentence-transformers
- llm2clip
- {tag}
---

"""
DUAL = """\
# Embedder of pictures and texts

Embeds pictures and texts in one space of width {width}. Pictures: the {family} tower, \
{size} px, of `{origin}`. Texts: the LLM `{llm}`, {where}.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH_OR_HUB_ID", trust_remote_code=True)
pictures = model.encode(["photo.jpg", "other.png"])  # paths, PIL images, bytes
texts = model.encode(["a bird on a wire", "zwei Hunde"])
print(model.similarity(texts, pictures))
```

`trust_remote_code=True` runs `llm2clip_modules.py` of this folder: what sentence-transformers does
not have (a batch of pictures and texts, captions as the LLM was trained to read them, the text
adapter). Read it first. {llm_code} It needs
sentence-transformers 6 or newer{needs}.

{metrics}"""
DUAL_LLM_CODE = (
    "It also runs the code in the LLM's folder or repository: read that, too."
)
NO_DUAL_LLM_CODE = "No code of the LLM's own folder or repository is run."
LLM = """\
# Text embedder

The LLM `{llm}`, fine-tuned to embed captions, with its adapter merged; embeddings of width {width},
not normalized.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH_OR_HUB_ID"{trust})
embeddings = model.encode(["a bird on a wire", "zwei Hunde"])
```

{code}"""
TRUST = """\
`trust_remote_code=True` runs `llm2clip_modules.py` of this folder: what sentence-transformers does
not have (captions as the LLM was trained to read them, removed components). Read it first.
{llm_code}
"""
LLM_CODE = "It also runs the LLM's own code in this folder.\n"
NO_LLM_CODE = "No code of the LLM's own is run.\n"


def name_of(place: str) -> str:
    """A Hub id, or the name of a local folder."""
    return place.rstrip("/").rpartition("/")[2] if is_local(place) else place


def dual_card(
    card: TowerCard, encoder: CaptionEncoder, *, merge: bool, runs_code: bool
) -> str:
    """Markdown of a dual encoder's folder, with the tower's metrics. ``runs_code``: of the LLM's
    own."""
    public = published(card)
    weights = "whose weights are in this folder"
    if not merge:
        weights = 'which `"llm"` in text_0_Captions/sentence_bert_config.json names'
    needs = " and peft" if encoder.config.adapter and not merge else ""
    scores = [(name, f"{value:.4f}") for name, value in sorted(public.metrics.items())]
    metrics = ""
    if scores:
        metrics = f"## Metrics\n\n{markdown_table(('metric', ''), scores)}\n"
    text = DUAL.format(
        width=card.projection_dim,
        family=card.family,
        size=card.image_size,
        origin=public.origin,
        llm=name_of(encoder.config.llm),
        where=weights,
        needs=needs,
        llm_code=DUAL_LLM_CODE if runs_code else NO_DUAL_LLM_CODE,
        metrics=metrics,
    )
    front = FRONT.format(task="sentence-similarity", tag="multimodal")
    return front + text + LICENSE


def llm_card(encoder: CaptionEncoder, *, has_code: bool, runs_code: bool) -> str:
    """Markdown of an LLM's folder. ``runs_code``: of the LLM's own."""
    code = ""
    if has_code:
        code = TRUST.format(llm_code=LLM_CODE if runs_code else NO_LLM_CODE)
    text = LLM.format(
        llm=name_of(encoder.config.llm),
        width=encoder.width,
        trust=", trust_remote_code=True" if has_code else "",
        code=code,
    )
    front = FRONT.format(task="sentence-similarity", tag="text-embeddings")
    return front + text + LICENSE
