"""What decides an LLM's embeddings besides its weights: its config.json, its tokenizer, and its own
code if it is run.

The hashes are the same for a folder that was copied, saved again or given another dtype.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from llm2clip_plugin.hashes import canonical_json, sha256_file, sha256_text

DIGITS = 16  # of a hash
# settings of config.json that change no embedding: of saving, training, generation and a language
# head
UNUSED = """
architectures auto_map transformers_version torch_dtype dtype _name_or_path _commit_hash
_attn_implementation attn_implementation use_cache tie_word_embeddings vocab_size is_decoder
is_encoder_decoder is_causal pretraining_tp initializer_range initializer_factor
initializer_cutoff_factor gradient_checkpointing router_aux_loss_coef final_logit_softcapping
logit_scale logits_scaling cache_implementation quantization_config problem_type id2label label2id
num_labels finetuning_task task_specific_params prefix chunk_size_feed_forward return_dict
use_return_dict temperature top_k top_p do_sample num_beams max_length min_length repetition_penalty
""".split()
UNUSED_PREFIXES = ("output_", "unsloth", "_")
UNUSED_SUFFIXES = ("_token_id", "dropout", "_pdrop")


def config_sha256(config: PretrainedConfig, code: Path | None = None) -> str:
    """Hash of the settings that decide what a model computes. ``code``: a folder whose Python files
    are run, too."""
    body: dict[str, Any] = {"settings": embedding_settings(config)}
    if code is not None:
        body["code"] = {
            path.name: sha256_file(path) for path in sorted(code.glob("*.py"))
        }
    return sha256_text(canonical_json(body))[:DIGITS]


def embedding_settings(config: PretrainedConfig) -> dict[str, Any]:
    """The settings of a text model that decide its embeddings and differ from their defaults: a
    file that has the default written out means the same as one without it."""
    defaults = plain(type(config)().to_dict())
    settings: dict[str, Any] = {"model_type": config.model_type}
    for name, value in plain(config.to_dict()).items():
        unused = (
            name in UNUSED
            or name.startswith(UNUSED_PREFIXES)
            or name.endswith(UNUSED_SUFFIXES)
        )
        if not unused and (name not in defaults or value != defaults[name]):
            settings[name] = value
    return settings


def plain(value: Any) -> Any:
    """JSON types, every number a float: 10000 and 10000.0 are one setting."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return value if value is None or isinstance(value, (bool, str)) else str(value)


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of what makes token ids of a text: vocabulary, merges, added tokens, normalization,
    splitting of words."""
    added = {}
    for number, token in tokenizer.added_tokens_decoder.items():
        flags = (
            token.single_word,
            token.lstrip,
            token.rstrip,
            token.normalized,
            token.special,
        )
        added[str(number)] = [str(token), *flags]
    body: dict[str, Any] = {
        "added": added,
        "vocabulary": dict(sorted(tokenizer.get_vocab().items())),
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        saved = json.loads(backend.to_str())
        merges = saved["model"].get("merges") or []
        body["merges"] = [
            merge if isinstance(merge, str) else " ".join(merge) for merge in merges
        ]
        body |= {name: saved.get(name) for name in ("normalizer", "pre_tokenizer")}
    return sha256_text(canonical_json(body))[:DIGITS]
