"""Cards: what a tower and a fine-tuned LLM are, and what determines the embedding of a caption."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from llm2clip_plugin.contracts.hashes import canonical_json, sha256_text
from llm2clip_plugin.contracts.record import VersionedRecord


@dataclass(frozen=True, kw_only=True)
class TowerCard(VersionedRecord):
    """``llm2clip.json`` of a tower directory: what the tower is, how it was made, the hashes of its weights."""

    KIND: ClassVar[str] = "llm2clip-tower"

    family: str  # name of a vision.families member: clip, siglip, dinov2, eva02 ...
    origin: str  # path or Hub id of the weights that training or import started from
    hidden_size: int  # width of a patch state
    num_layers: int  # transformer blocks
    patch_size: int  # pixels
    image_size: int  # pixels; the position table has exactly this grid
    has_cls: bool
    weights_sha256: str  # sha256_weights(model.safetensors)
    projection_dim: int = 0  # 0: no projection, the directory contains a tower alone
    adapter_sha256: str = ""  # sha256_weights(text_adapter.safetensors); "" without one
    dual: dict[str, Any] = field(default_factory=dict)  # DualConfig: pooling, adapter kind, LLM width ...
    teacher: dict[str, Any] = field(default_factory=dict)  # TeacherIdentity as a dict; {} if never trained
    training: dict[str, Any] = field(default_factory=dict)  # steps, samples, data, config hash, resized_from
    metrics: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)  # of the libraries that wrote it

    FILE: ClassVar[str] = "llm2clip.json"

    @property
    def num_patches(self) -> int:
        """Patches of one image, without the class token."""
        return (self.image_size // self.patch_size) ** 2


PROJECTED = "projected"  # pooling of a CLIP's own text tower: the features that it compares with its images'


@dataclass(frozen=True, kw_only=True)
class TeacherIdentity:
    """Everything that determines the embedding of a caption; caches and towers record its fingerprint."""

    llm: str  # path or Hub id, for display; not part of the fingerprint
    revision: str  # Hub commit, or "" for a local folder; not part of the fingerprint
    weights_sha256: str  # over the LLM's weight files
    adapter_sha256: str  # over the PEFT adapter's weights; "" without one
    attention: str  # bidirectional | causal | own (a CLIP's text tower)
    pooling: str  # mean | last | projected
    layer: int  # hidden state that is pooled; -1 is the last
    prompt: str  # precedes every caption; not pooled
    chat_template: str  # "" for none
    max_tokens: int
    width: int  # of an embedding
    include_bos: bool = True  # pool the beginning-of-text token too
    tokenizer: str = ""  # hash of the tokens of a fixed text
    quantization: str = ""  # "" | nf4
    post: str = ""  # sha256 of the centering or whitening parameters; "" for none
    adapter: str = ""  # path or Hub id of the adapter, to find it again; not part of the fingerprint

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that changes an embedding, so not over where the weights are."""
        body = dataclasses.asdict(self)
        del body["llm"], body["revision"], body["adapter"]
        return sha256_text(canonical_json(body))


@dataclass(frozen=True, kw_only=True)
class EncoderCard(VersionedRecord):
    """``llm2clip_encoder.json`` next to an adapter or merged LLM: how to embed captions with it."""

    KIND: ClassVar[str] = "llm2clip-encoder"
    FILE: ClassVar[str] = "llm2clip_encoder.json"

    base: str  # path or Hub id of the LLM that was fine-tuned, for display
    base_sha256: str  # over its weight files; "" for a merged LLM
    attention: str  # bidirectional | causal
    pooling: str  # mean | last
    layer: int  # hidden state that is pooled; -1 is the last
    prompt: str  # precedes every caption that is embedded for the cache; not pooled
    query_prompt: str  # precedes queries in training and in caption retrieval; not pooled
    chat_template: str  # literal text around "{caption}"; "" for none
    include_bos: bool
    max_tokens: int
    post_sha256: str = ""  # sha256_weights of the centering or whitening parameters; "" for none
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
