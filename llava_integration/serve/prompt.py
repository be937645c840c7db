"""What an exported model reads: LLaVA's conversation as a Jinja chat template, and its tokenizer as a tokenizer.json.

LLaVA splits a prompt at ``<image>`` and tokenizes each piece by itself with Llama's sentencepiece model, so that each
piece begins with the space that sentencepiece puts before a text. Here ``<image>`` is a token, and the same spaces come
from a normalizer, which sees the pieces between special tokens one by one.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip_plugin.files import ContractError, errors_about
from llm2clip_plugin.options import unknown
from llm2clip_plugin.vision.directory import read_json, write_json

# Conversations

DEFAULT = "vicuna_v1"  # of LLaVA 1.5, in LLaVA's evaluation scripts
IMAGE = "<image>"

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """The text around the messages: a system sentence, what precedes and follows a message; by default Vicuna v1's."""

    system: str = VICUNA
    around_system: tuple[str, str] = ("", " ")
    user: tuple[str, str] = ("USER: ", " ")
    assistant: tuple[str, str] = ("ASSISTANT: ", "</s>")
    generation: str = "ASSISTANT:"  # ends a prompt
    image: str = f"{IMAGE}\n"  # an image, before the text of its message

    def served_template(self, *, bos: bool, space: bool) -> str:
        """``chat_template`` with ``<s>`` first, where LLaVA's tokenizer adds it (``bos``); the exported one doesn't.

        ``space``: the tokenizer puts a space before the first word of a text, but not after ``<s>``; it is written as
        the tokenizer's own character, since some strip spaces.
        """
        if not bos:
            return self.chat_template()
        begins = self.around_system[0] + self.system + self.user[0]  # "": with the image
        return "{{- bos_token -}}\n" + ("{{- '▁' -}}\n" if space and begins else "") + self.chat_template()

    def chat_template(self) -> str:
        """The Jinja template, for ``content`` as a string or as a list of parts (images first, as in LLaVA)."""

        def literal(text: str) -> str:
            return json.dumps(text, ensure_ascii=False)

        before, after = map(literal, self.around_system)
        user, user_end = map(literal, self.user)
        assistant, assistant_end = map(literal, self.assistant)
        lines = [
            "{%- if messages[0]['role'] == 'system' -%}",
            "{%- set system = messages[0]['content'] -%}",
            "{%- if system is not string -%}{%- set system = system[0]['text'] -%}{%- endif -%}",
            "{%- set turns = messages[1:] -%}",
            "{%- else -%}",
            f"{{%- set system = {literal(self.system)} -%}}",
            "{%- set turns = messages -%}",
            "{%- endif -%}",
            f"{{{{- {before} + system + {after} -}}}}",
            "{%- for message in turns -%}",
            f"{{{{- {user} if message['role'] == 'user' else {assistant} -}}}}",
            "{%- if message['content'] is string -%}",
            "{{- message['content'] -}}",
            "{%- else -%}",
            "{%- for part in message['content'] -%}",
            f"{{%- if part['type'] != 'text' -%}}{{{{- {literal(self.image)} -}}}}{{%- endif -%}}",
            "{%- endfor -%}",
            "{%- for part in message['content'] -%}",
            "{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}",
            "{%- endfor -%}",
            "{%- endif -%}",
            f"{{{{- {user_end} if message['role'] == 'user' else {assistant_end} -}}}}",
            "{%- endfor -%}",
            f"{{%- if add_generation_prompt -%}}{{{{- {literal(self.generation)} -}}}}{{%- endif -%}}",
        ]
        return "\n".join(lines) + "\n"


CHATML = Conversation(
    system="Answer the questions.",
    around_system=("<|im_start|>system\n", "<|im_end|>"),
    user=("<|im_start|>user\n", "<|im_end|>"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>"),
    generation="<|im_start|>assistant\n",
)
# pretraining: the image, then its caption
PLAIN = Conversation(system="", around_system=("", ""), user=("", ""), assistant=("", "\n"), generation="", image=IMAGE)
CONVERSATIONS: dict[str, Conversation] = {
    **dict.fromkeys(("v1", "vicuna_v1"), Conversation()),
    **dict.fromkeys(("chatml_direct", "mistral_direct"), CHATML),
    **dict.fromkeys(("plain", "v0_plain"), PLAIN),
}


def choose(given: str, recorded: str, *, where: object) -> str:
    """The conversation's name: ``given`` (--conv-mode), or the checkpoint's; ValueError if these are different ones."""
    name = given or recorded or DEFAULT
    if name not in CONVERSATIONS:
        raise ValueError(unknown("conversation", name, CONVERSATIONS))
    if recorded in CONVERSATIONS and CONVERSATIONS[name] != CONVERSATIONS[recorded]:
        raise ValueError(f"{where} was trained with the conversation {recorded!r}; leave out --conv-mode {given}")
    return name


# The tokenizer

MODEL, FAST, CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
USER_DEFINED = 4  # sentencepiece's ModelProto.SentencePiece.Type
BPE_TYPE = 2  # sentencepiece's TrainerSpec.ModelType
SPACE = "▁"
DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# The space before a text, at its start alone. tokenizers 0.15 has no such argument of Metaspace.
FIRST_SPACE = {"type": "Metaspace", "replacement": SPACE, "add_prefix_space": True}
FIRST_SPACE |= {"prepend_scheme": "first", "split": False}
FIX = "copy the checkpoint again, or its base model's tokenizer into it"


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What a folder says about LLaVA's tokenizer."""

    directory: Path
    pieces: list[tuple[str, float]]  # of the sentencepiece model, with scores
    charsmap: bytes  # its normalization; empty for Llama's
    collapses_spaces: bool  # and strips them
    config: dict[str, Any]
    added: dict[int, str]  # tokens beyond the pieces

    @property
    def legacy(self) -> bool:
        """Whether a space also precedes the text after special tokens; transformers 4's default."""
        return bool(self.config.get("legacy", True))

    @property
    def adds_bos(self) -> bool:
        """Whether a text begins with ``bos_token``."""
        return bool(self.config.get("add_bos_token", True)) and self.id_of("bos_token") is not None

    def token(self, name: str) -> str | None:
        """``bos_token`` and the like."""
        value = self.config.get(name, DEFAULTS.get(name))
        return value.get("content") if isinstance(value, dict) else value

    def id_of(self, name: str) -> int | None:
        """The id of ``bos_token`` and the like."""
        token = self.token(name)
        ids = {piece: number for number, (piece, _) in enumerate(self.pieces)}
        ids |= {added: number for number, added in self.added.items()}
        return ids.get(token or "")


def read_tokenizer(directory: Path) -> TokenizerFiles:
    """Raises FileNotFoundError without tokenizer.model, ContractError for one that is damaged or not Llama's kind."""
    path = directory / MODEL
    if not path.is_file():
        raise FileNotFoundError(f"no {MODEL} in {directory}; {FIX}")
    # transformers' own: protobuf refuses a second description of the same message in a process
    from transformers.convert_slow_tokenizer import import_protobuf

    messages: Any = import_protobuf()
    proto = messages.ModelProto()
    with errors_about(path, fix=FIX):
        proto.ParseFromString(path.read_bytes())
    if proto.trainer_spec.model_type != BPE_TYPE or not proto.pieces:
        raise ContractError(f"{path} is not a BPE tokenizer such as Llama's; {FIX}")
    names = (CONFIG, "special_tokens_map.json", "added_tokens.json")
    config, special, ids = (read_json(directory / n) if (directory / n).is_file() else {} for n in names)
    config |= {name: token for name, token in special.items() if token is not None}
    with errors_about(directory / CONFIG, fix=FIX):
        added = {int(number): entry["content"] for number, entry in config.get("added_tokens_decoder", {}).items()}
    added |= {number: token for token, number in ids.items()}
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    symbols = {piece.piece for piece in proto.pieces if piece.type == USER_DEFINED and len(piece.piece) > 1}
    if unreachable := symbols - {*added.values()} - {left + right for left, right in merges(pieces)}:
        told = f"user-defined pieces that are no merges of others, such as {min(unreachable)[:60]!r}"
        raise ContractError(f"{path} has {told}, which the exported tokenizer would split")
    return TokenizerFiles(
        directory=directory,
        pieces=pieces,
        charsmap=bytes(proto.normalizer_spec.precompiled_charsmap),
        collapses_spaces=proto.normalizer_spec.remove_extra_whitespaces,
        config=config,
        added={number: token for number, token in added.items() if number >= len(proto.pieces)},
    )


def write_tokenizer(files: TokenizerFiles, directory: Path, *, max_length: int | None) -> int:
    """Write tokenizer.json, tokenizer_config.json and a copy of tokenizer.model; the id of ``<image>``, the last."""
    if IMAGE in files.added.values():
        raise ContractError(f"{files.directory} has a token {IMAGE!r} already; this is not a LLaVA 1.5 checkpoint")
    made = _tokenizer(files)
    body = json.loads(made.to_str())
    if not files.legacy:
        body["pre_tokenizer"] = FIRST_SPACE
    (directory / FAST).write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    special = {name: files.token(name) for name in (*DEFAULTS, "pad_token")}
    special["pad_token"] = special["pad_token"] or special["unk_token"]
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is
        "processor_class": "LlavaProcessor",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length or int(1e30),
        "padding_side": "left",  # of prompts
        "clean_up_tokenization_spaces": False,
        "legacy": files.legacy,
    }
    write_json(directory / CONFIG, config)
    shutil.copyfile(files.directory / MODEL, directory / MODEL)
    image_id: int = made.token_to_id(IMAGE)
    if image_id != max([len(files.pieces) - 1, *files.added]) + 1:  # the rows of LLaVA's embedding
        raise ContractError(f"{files.directory}: ids of its added tokens have gaps; {FIX}")
    return image_id


def _tokenizer(files: TokenizerFiles) -> Any:
    """Llama's BPE with LLaVA's spaces, as a tokenizers.Tokenizer.

    Not legacy: the text after special tokens has no space before it, other than at the start of a piece of LLaVA's,
    which after an image begins with a line break.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    steps: list[Any] = [normalizers.Precompiled(files.charsmap)] if files.charsmap else []
    if files.collapses_spaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if files.legacy:
        steps += [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    else:
        steps.append(normalizers.Replace(Regex(r"\A\n"), " \n"))
    vocabulary = {piece: number for number, (piece, _) in enumerate(files.pieces)}
    made = Tokenizer(
        BPE(vocabulary, merges(files.pieces), unk_token=files.token("unk_token"), fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue] - the stubs say read-only
    made.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    known = [files.token(name) for name in DEFAULTS]
    tokens = [*filter(None, known), *(token for _, token in sorted(files.added.items())), IMAGE]
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
    # no post_processor: a prompt's <s> is written by the chat template, in transformers as in vLLM
    return made


def merges(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """The merges of a BPE sentencepiece model: every pair of pieces that makes a piece, best score first."""
    ids = {piece: number for number, (piece, _) in enumerate(pieces)}
    found: list[tuple[float, int, int, str, str]] = []
    for piece, score in pieces:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                found.append((-score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]
