"""What an exported model reads: LLaVA's conversation as a Jinja chat template, and its tokenizer as
a tokenizer.json.

LLaVA splits a prompt at ``<image>`` and tokenizes each piece by itself with Llama's sentencepiece
model, so that each piece begins with the space that sentencepiece puts before a text. Here
``<image>`` is a token, and the same spaces come from a normalizer, which sees the pieces between
special tokens one by one.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.vision.directory import read_json, write_json

IMAGE = "<image>"
# the system prompt, what precedes and follows it and the messages, and what ends a prompt
PARTS = "system before after user user_end assistant assistant_end generation".split()
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VICUNA = (SYSTEM, "", " ", "USER: ", " ", "ASSISTANT: ", "</s>", "ASSISTANT:")
SAYS = ("<|im_start|>user\n", "<|im_start|>assistant\n")
END = "<|im_end|>"
CHATML = ("Answer the questions.", "<|im_start|>system\n", END, SAYS[0], END, SAYS[1], END, SAYS[1])
CONVERSATIONS = {
    "vicuna_v1": VICUNA,
    "v1": VICUNA,
    "chatml_direct": CHATML,
    "mistral_direct": CHATML,
}
# for ``content`` as a string or as a list of parts (images first, as in LLaVA)
CHAT_TEMPLATE = Template("""\
{%- if messages[0]['role'] == 'system' -%}
{%- set system, turns = messages[0]['content'], messages[1:] -%}
{%- if system is not string -%}{%- set system = system[0]['text'] -%}{%- endif -%}
{%- else -%}{%- set system, turns = $system, messages -%}{%- endif -%}
{{- $before + system + $after -}}
{%- for message in turns -%}
{{- $user if message['role'] == 'user' else $assistant -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}\
{%- if part['type'] != 'text' -%}{{- "<image>\\n" -}}{%- endif -%}{%- endfor -%}
{%- for part in message['content'] -%}\
{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}
{%- endif -%}
{{- $user_end if message['role'] == 'user' else $assistant_end -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- $generation -}}{%- endif -%}
""")


def chat_template(conversation: str, *, bos: bool = False, space: bool = False) -> str:
    """``chat_template`` of a conversation of LLaVA's, with ``<s>`` first where LLaVA's tokenizer
    adds it (``bos``).

    ``space``: the tokenizer puts a space before the first word of a text, but not after ``<s>``; it
    is written as the tokenizer's own character, since some strip spaces.
    """
    texts = (json.dumps(text, ensure_ascii=False) for text in CONVERSATIONS[conversation])
    start = "{{- bos_token -}}\n" + ("{{- '▁' -}}\n" if space else "") if bos else ""
    return start + CHAT_TEMPLATE.substitute(dict(zip(PARTS, texts, strict=True)))


# The tokenizer

MODEL = "tokenizer.model"
FAST = "tokenizer.json"
CONFIG = "tokenizer_config.json"
USER_DEFINED = 4  # sentencepiece's ModelProto.SentencePiece.Type
BPE_TYPE = 2  # sentencepiece's TrainerSpec.ModelType
SPACE = "▁"
DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# The space before a text, at its start alone. tokenizers 0.15 has no such argument of Metaspace.
FIRST_SPACE = {"type": "Metaspace", "replacement": SPACE, "add_prefix_space": True}
FIRST_SPACE |= {"prepend_scheme": "first", "split": False}
FIX = "copy the checkpoint again, or its base model's tokenizer into it"


@dataclass(frozen=True, kw_only=True)
class LlavaTokenizer:
    """LLaVA's tokenizer, with ``<image>`` as its last token."""

    fast: Any  # tokenizers.Tokenizer
    special: dict[str, str]  # bos_token and the like
    # whether a space also precedes the text after special tokens; transformers 4's default
    legacy: bool
    adds_bos: bool  # whether a text begins with bos_token

    def ids(self) -> dict[str, int]:
        """bos_token_id and the like."""
        return {f"{name}_id": self.fast.token_to_id(token) for name, token in self.special.items()}

    def write(self, directory: Path, *, max_length: int | None) -> None:
        """tokenizer.json and tokenizer_config.json."""
        body = json.loads(self.fast.to_str())
        if not self.legacy:
            body["pre_tokenizer"] = FIRST_SPACE
        limits = {"model_max_length": max_length or int(1e30), "legacy": self.legacy}
        write_tokenizer(directory, body, {**self.special, **limits}, "LlavaProcessor")


def write_tokenizer(
    directory: Path, body: dict[str, Any], settings: dict[str, Any], processor: str
) -> None:
    """tokenizer.json (``body``) and tokenizer_config.json."""
    (directory / FAST).write_text(
        json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is
        "processor_class": processor,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",  # of prompts
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / CONFIG, {**config, **settings})


def read_tokenizer(directory: Path) -> LlavaTokenizer:
    """Llama's BPE with LLaVA's spaces.

    Not legacy: the text after special tokens has no space before it, other than at the start of a
    piece of LLaVA's, which after an image begins with a line break. Raises FileNotFoundError
    without tokenizer.model, ContractError for one that is damaged or not Llama's kind.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers.convert_slow_tokenizer import import_protobuf

    path = directory / MODEL
    if not path.is_file():
        raise FileNotFoundError(f"no {MODEL} in {directory}; {FIX}")
    # transformers' own: protobuf refuses a second description of the same message in a process
    messages: Any = import_protobuf()
    proto = messages.ModelProto()
    with errors_about(path, fix=FIX):
        proto.ParseFromString(path.read_bytes())
    if proto.trainer_spec.model_type != BPE_TYPE:
        raise ContractError(f"{path} is not a BPE tokenizer such as Llama's; {FIX}")
    names = (CONFIG, "special_tokens_map.json", "added_tokens.json")
    config, mapped, numbers = (
        read_json(directory / n) if (directory / n).is_file() else {} for n in names
    )
    config = {
        **DEFAULTS,
        **config,
        **{name: token for name, token in mapped.items() if token is not None},
    }
    values = {name: config.get(name) for name in (*DEFAULTS, "pad_token")}
    tokens = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in values.items()
    }
    tokens["pad_token"] = tokens["pad_token"] or tokens["unk_token"]
    special = {name: token for name, token in tokens.items() if token}
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    added = {
        int(number): entry["content"]
        for number, entry in config.get("added_tokens_decoder", {}).items()
    }
    added |= {number: token for token, number in numbers.items()}
    merges = merges_of(proto.pieces, vocabulary)
    symbols = {
        piece.piece for piece in proto.pieces if piece.type == USER_DEFINED and len(piece.piece) > 1
    }
    if split := symbols - {left + right for left, right in merges}:
        problem = f"user-defined pieces that are no merges of others, such as {min(split)[:60]!r}"
        raise ContractError(f"{path} has {problem}, which the exported tokenizer would split")
    spec = proto.normalizer_spec
    legacy = bool(config.get("legacy", True))
    steps: list[Any] = (
        [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    )
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if legacy:
        steps += [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    else:
        steps.append(normalizers.Replace(Regex(r"\A\n"), " \n"))
    tokenizer: Any = Tokenizer(
        BPE(
            vocabulary,
            merges,
            unk_token=special.get("unk_token"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    beyond = {number: token for number, token in sorted(added.items()) if number >= len(vocabulary)}
    default_tokens = [special[name] for name in DEFAULTS if name in special]
    all_special = [*default_tokens, *beyond.values(), IMAGE]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in all_special]
    )
    # no post_processor: a prompt's <s> is written by the chat template, in transformers as in vLLM
    added_ids = [tokenizer.token_to_id(token) for token in (*beyond.values(), IMAGE)]
    if added_ids != [*beyond, len(vocabulary) + len(beyond)]:  # the rows of LLaVA's embedding
        raise ContractError(
            f"{directory}: ids of its added tokens have gaps, or {IMAGE} is one of them; {FIX}"
        )
    adds_bos = bool(config.get("add_bos_token", True)) and "bos_token" in special
    return LlavaTokenizer(fast=tokenizer, special=special, legacy=legacy, adds_bos=adds_bos)


def merges_of(pieces: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best score first."""
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece in pieces:
        for left, right in (
            (piece.piece[:cut], piece.piece[cut:]) for cut in range(1, len(piece.piece))
        ):
            if left in vocabulary and right in vocabulary:
                ranked.append((-piece.score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]
