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
CHATML = (
    "Answer the questions.",
    "<|im_start|>system\n",
    END,
    SAYS[0],
    END,
    SAYS[1],
    END,
    SAYS[1],
)
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
    texts = (
        json.dumps(text, ensure_ascii=False) for text in CONVERSATIONS[conversation]
    )
    start = "{{- bos_token -}}\n" + ("{{- '▁' -}}\n" if space else "") if bos else ""
    return start + CHAT_TEMPLATE.substitute(dict(zip(PARTS, texts, strict=True)))


# The tokenizer

MODEL = "tokenizer.model"
FAST = "tokenizer.json"
CONFIG = "tokenizer_config.json"
USER_DEFINED = 4  # sentencepiece's ModelProto.SentencePiece.Type
BPE_TYPE = 2  # sentencepiece's TrainerSpec.ModelType
SPACE = "▁"
# ends the spelling of a user-defined piece; no character, so in no text
MARK = "\uffff"
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
        return {
            f"{name}_id": self.fast.token_to_id(token)
            for name, token in self.special.items()
        }

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


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What a checkpoint's folder says of its tokenizer."""

    path: Path  # of tokenizer.model
    model: Any  # sentencepiece's ModelProto
    config: dict[str, Any]  # tokenizer_config.json, special_tokens_map.json over it
    # id -> token, of those that transformers adds, in the order of ids
    added: dict[int, str]

    @classmethod
    def read(cls, directory: Path) -> "TokenizerFiles":
        """Raises FileNotFoundError without tokenizer.model, ContractError for one that is damaged
        or not Llama's kind."""
        path = directory / MODEL
        if not path.is_file():
            raise FileNotFoundError(f"no {MODEL} in {directory}; {FIX}")
        named = read_if_there(directory / "special_tokens_map.json")
        config = {**DEFAULTS, **read_if_there(directory / CONFIG)}
        for name, token in named.items():
            if token is not None:
                config[name] = token
        added: dict[int, str] = {}
        for number, entry in config.get("added_tokens_decoder", {}).items():
            added[int(number)] = entry["content"]
        for token, number in read_if_there(directory / "added_tokens.json").items():
            added[number] = token
        return cls(
            path=path,
            model=read_sentencepiece(path),
            config=config,
            added=dict(sorted(added.items())),
        )

    @property
    def legacy(self) -> bool:
        return bool(self.config.get("legacy", True))

    @property
    def special(self) -> dict[str, str]:
        """bos_token and the like; what the tokenizer has none of is left out."""
        tokens: dict[str, str] = {}
        for name in (*DEFAULTS, "pad_token"):
            value = self.config.get(name)
            token = value["content"] if isinstance(value, dict) else value
            if token:
                tokens[name] = token
        if "pad_token" not in tokens and "unk_token" in tokens:
            tokens["pad_token"] = tokens["unk_token"]
        return tokens

    @property
    def added_tokens(self) -> list[str]:
        """The tokens that a text is split at before sentencepiece reads it."""
        tokens = [token for name, token in self.special.items() if name in DEFAULTS]
        return [*tokens, *self.added.values()]

    @property
    def whole_pieces(self) -> list[str]:
        """The user-defined pieces, which sentencepiece finds in a text before it merges anything.

        Raises ContractError for a tokenizer that is not legacy: there the space before a text that
        begins with such a piece would be lost.
        """
        split_before = set(self.added_tokens)
        pieces = []
        for piece in self.model.pieces:
            if piece.type == USER_DEFINED and piece.piece not in split_before:
                pieces.append(piece.piece)
        if pieces and not self.legacy:
            raise ContractError(
                f"{self.path} has {len(pieces)} user-defined pieces such as {min(pieces)[:60]!r}, "
                f'which are exported with "legacy": true in {CONFIG} alone; '
                "train LLaVA with that setting"
            )
        return pieces


def read_if_there(path: Path) -> dict[str, Any]:
    """A JSON file; {} without it."""
    return read_json(path) if path.is_file() else {}


def read_sentencepiece(path: Path) -> Any:
    """The ModelProto in a tokenizer.model; ContractError if it is damaged or no BPE."""
    from transformers.convert_slow_tokenizer import import_protobuf

    # transformers' own: protobuf refuses a second description of the same message in a process
    messages: Any = import_protobuf()
    model = messages.ModelProto()
    with errors_about(path, fix=FIX):
        model.ParseFromString(path.read_bytes())
    if model.trainer_spec.model_type != BPE_TYPE:
        raise ContractError(f"{path} is not a BPE tokenizer such as Llama's; {FIX}")
    return model


def read_tokenizer(directory: Path) -> LlavaTokenizer:
    """Llama's BPE with LLaVA's spaces.

    Not legacy: the text after special tokens has no space before it, other than at the start of a
    piece of LLaVA's, which after an image begins with a line break. Raises FileNotFoundError
    without tokenizer.model, ContractError for one that is damaged or not Llama's kind.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers

    files = TokenizerFiles.read(directory)
    special = files.special
    whole = files.whole_pieces
    tokenizer: Any = Tokenizer(
        merging_model(files.model.pieces, whole, special.get("unk_token"))
    )
    tokenizer.normalizer = normalizers.Sequence(normalizing_steps(files))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.Replace(MARK, ""),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    # no post_processor: a prompt's <s> is written by the chat template, in transformers as in vLLM
    special_tokens = [
        AddedToken(token, normalized=False, special=True)
        for token in (*files.added_tokens, IMAGE)
    ]
    tokenizer.add_special_tokens(special_tokens)
    whole_tokens = [
        AddedToken(piece + MARK, normalized=True, special=False) for piece in whole
    ]
    tokenizer.add_tokens(whole_tokens)
    check_ids(tokenizer, files)
    check_pieces(tokenizer, files)
    adds_bos = bool(files.config.get("add_bos_token", True)) and "bos_token" in special
    return LlavaTokenizer(
        fast=tokenizer, special=special, legacy=files.legacy, adds_bos=adds_bos
    )


def check_ids(tokenizer: Any, files: TokenizerFiles) -> None:
    """Raise ContractError unless every added token has its id and ``<image>`` the one after the
    last: the rows of LLaVA's embedding."""
    after_added = [number + 1 for number in files.added]
    after_last = max([len(files.model.pieces), *after_added])
    expected = {**files.added, after_last: IMAGE}
    for number, token in expected.items():
        if tokenizer.token_to_id(token) != number:
            raise ContractError(
                f"{files.path.parent}: ids of its added tokens have gaps, "
                f"or {IMAGE} is one of them; {FIX}"
            )


def check_pieces(tokenizer: Any, files: TokenizerFiles) -> None:
    """Raise ContractError for a user-defined piece that normalization changes: sentencepiece finds
    it before that."""
    for piece in files.whole_pieces:
        normalized = tokenizer.normalizer.normalize_str(piece + MARK)
        if normalized != piece:
            raise ContractError(
                f"{files.path}: its normalization changes the user-defined piece {piece[:60]!r} to "
                f"{normalized[:60]!r}; train the tokenizer without it or with identity"
            )


def normalizing_steps(files: TokenizerFiles) -> list[Any]:
    """What sentencepiece does to a text before it looks for pieces, as steps of tokenizers.

    A user-defined piece is found in the text as these steps leave it, and its own spelling passes
    through them, too. It ends in MARK, by which the last two steps know it from a text: no space
    before it.
    """
    from tokenizers import Regex, normalizers

    spec = files.model.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if not files.legacy:
        steps.append(normalizers.Replace(Regex(r"\A\n"), " \n"))
        return steps
    steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    if files.whole_pieces:
        steps.append(
            normalizers.Replace(Regex(rf"\A{SPACE}(?=[^{MARK}]*{MARK}\z)"), "")
        )
        steps.append(normalizers.Replace(Regex(rf"{MARK}\z"), ""))
    return steps


def merging_model(pieces: Any, whole: list[str], unk_token: str | None) -> Any:
    """The BPE of sentencepiece's pieces. No merge makes or takes a piece of ``whole``."""
    from tokenizers.models import BPE

    vocabulary: dict[str, int] = {}
    for number, piece in enumerate(pieces):
        spelled = piece.piece + MARK if piece.piece in whole else piece.piece
        vocabulary[spelled] = number
    return BPE(
        vocabulary,
        merges_of(pieces, vocabulary),
        unk_token=unk_token,
        fuse_unk=True,
        byte_fallback=True,
    )


def merges_of(pieces: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces in ``vocabulary`` that makes one, best score first."""
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece in pieces:
        if piece.piece not in vocabulary:
            continue
        for cut in range(1, len(piece.piece)):
            left = piece.piece[:cut]
            right = piece.piece[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append(
                    (-piece.score, vocabulary[left], vocabulary[right], left, right)
                )
    return [(left, right) for *_, left, right in sorted(ranked)]
