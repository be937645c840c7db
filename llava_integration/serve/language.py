"""The language model and the projector: their settings and tensors, from LLaVA's names to Hugging Face's."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_integration.serve.tensors import FIX, LazyTensor, LazyTensors, refuse_rest
from llm2clip_plugin.contracts import ContractError

# fields of a Llama's config.json, of transformers 4 and 5; the others are LLaVA's or of a file
FIELDS = """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act
    max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id eos_token_id
    tie_word_embeddings rope_theta rope_scaling rope_parameters attention_bias attention_dropout mlp_bias""".split()
PROJECTOR = {"mm_projector.0": "multi_modal_projector.linear_1", "mm_projector.2": "multi_modal_projector.linear_2"}
TOWER = "model.vision_tower."
BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$")  # computed; old versions saved it
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")  # there is no Llama without
BLOCK = """self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj
    input_layernorm post_attention_layernorm""".split()


def text_config(config: dict[str, Any], tokens: int) -> dict[str, Any]:
    """``text_config`` of the exported model: a Llama of ``tokens`` tokens."""
    text = {name: config[name] for name in FIELDS if config.get(name) is not None}
    rope = text.get("rope_parameters") or {}
    text.setdefault("rope_theta", rope.get("rope_theta", 10000.0))  # transformers 4's name
    return {**text, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": tokens}


def check_settings(config: dict[str, Any]) -> None:
    """Raise ContractError for settings without which there is no Llama."""
    for name in SIZES:
        value = config.get(name)
        if type(value) is not int or value < 1:
            raise ContractError(f"config.json: {name} is {value!r}, expected a positive whole number; {FIX}")


def hf_name(name: str) -> str:
    """The name in a file of transformers' LLaVA, which servers know, of a tensor of LLaVA's.

    >>> hf_name("model.mm_projector.2.bias"), hf_name("lm_head.weight")
    ('multi_modal_projector.linear_2.bias', 'language_model.lm_head.weight')
    """
    for ours, theirs in PROJECTOR.items():
        if name.startswith(f"model.{ours}."):
            return name.replace(f"model.{ours}", theirs)
    return f"language_model.{name}"


def expected(config: dict[str, Any]) -> list[str]:
    """The weights that every checkpoint of this configuration has, under LLaVA's names."""
    head = [] if config.get("tie_word_embeddings") else [HEAD]
    blocks = [f"model.layers.{n}.{part}.weight" for n in range(config["num_hidden_layers"]) for part in BLOCK]
    projector = [f"model.{layer}.{kind}" for layer in PROJECTOR for kind in ("weight", "bias")]
    return [EMBEDDING, *blocks, "model.norm.weight", *head, *projector]


def language_tensors(tensors: LazyTensors, config: dict[str, Any], tokens: int, where: Path) -> LazyTensors:
    """The language model's and the projector's tensors under Hugging Face's names, with a row for ``<image>``.

    ``tokens``: rows of the embedding that LLaVA uses. Raises ContractError for tensors that are missing or unknown, or
    an embedding with fewer rows.
    """
    own = {name: tensor for name, tensor in tensors.items() if not BUFFERS.search(name) and not name.startswith(TOWER)}
    wanted = expected(config)
    if missing := [name for name in wanted if name not in own]:
        raise ContractError(
            f"{where}: {len(missing)} of {len(wanted)} tensors are missing, such as {missing[0]}; {FIX}"
        )
    biases = {f"{name.removesuffix('.weight')}.bias" for name in wanted if ".layers." in name and "norm" not in name}
    refuse_rest(set(own) - set(wanted) - {HEAD} - biases, where)
    for name in {EMBEDDING, HEAD} & set(own):
        if own[name].shape[0] < tokens:
            raise ContractError(f"{where}: {name} has {own[name].shape[0]} rows, the tokenizer {tokens} tokens; {FIX}")
    out = {}
    for name in sorted(own, key=_order):
        if name == HEAD and config.get("tie_word_embeddings"):
            continue
        out[hf_name(name)] = with_image_row(own[name], tokens) if name in (EMBEDDING, HEAD) else own[name]
    return out


def _order(name: str) -> list[tuple[int, str]]:
    """Layer 2 precedes layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def with_image_row(rows: LazyTensor, tokens: int) -> LazyTensor:
    """The first ``tokens`` rows and one for ``<image>``: their mean.

    In the embedding it is replaced by the image. In the head it makes the token's logit the mean of all logits, which
    is never the largest: the model answers as without it.
    """

    def read() -> Tensor:
        kept = rows.read()[:tokens]
        return torch.cat((kept, kept.float().mean(0, keepdim=True).to(kept.dtype)))

    return LazyTensor(shape=(tokens + 1, rows.shape[1]), read=read, where=rows.where)
