"""The slow Llama tokenizer of transformers 4.37 on the classes of transformers 5.

Ids and decoded texts equal those of 4.37 (tests/llava/parity), for ``legacy`` true and false.
"""

from typing import Any, cast

from transformers import AddedToken
from transformers.tokenization_utils_sentencepiece import (
    SPIECE_UNDERLINE,
    SentencePieceBackend,
)

# transformers 5 alone has the base class.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false


def as_special(token: Any) -> Any:
    """A token given as text, as one that is not split."""
    if isinstance(token, str):
        return AddedToken(token, normalized=False, special=True)
    return token


class LlamaTokenizer(SentencePieceBackend):
    """Text <-> ids; named as in tokenizer_config.json, where transformers saves the name of the
    class."""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - declared as a list by transformers

    def __init__(
        self,
        vocab_file: str,
        unk_token: Any = "<unk>",
        bos_token: Any = "<s>",
        eos_token: Any = "</s>",
        pad_token: Any = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        clean_up_tokenization_spaces: bool = False,
        spaces_between_special_tokens: bool = False,
        legacy: bool | None = None,
        **options: Any,
    ):
        """See ``LlamaTokenizer`` of transformers 4.37; ``legacy`` None means True, as there."""
        self.add_bos_token = add_bos_token
        self.add_eos_token = add_eos_token
        options.pop("from_slow", None)
        super().__init__(
            vocab_file=vocab_file,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            spaces_between_special_tokens=spaces_between_special_tokens,
            legacy=True if legacy is None else legacy,
            unk_token=as_special(unk_token),
            bos_token=as_special(bos_token),
            eos_token=as_special(eos_token),
            pad_token=as_special(pad_token),
            **options,
        )

    def tokenize(self, text: str, **options: Any) -> list[str]:
        """Pieces; if not ``legacy``, only the text's beginning gets a space before it."""
        if self.legacy or not text:
            return super().tokenize(text, **options)
        spaced = SPIECE_UNDERLINE + text.replace(SPIECE_UNDERLINE, " ")
        tokens = super().tokenize(spaced, **options)
        if len(tokens) > 1 and tokens[0] == SPIECE_UNDERLINE:
            if tokens[1] in self.all_special_tokens:
                return tokens[1:]
        return tokens

    def build_inputs_with_special_tokens(
        self, first: list[int], second: list[int] | None = None
    ) -> list[int]:
        """Ids with <s> before and </s> after each sequence, as set."""
        bos: list[Any] = [self.bos_token_id] if self.add_bos_token else []
        eos: list[Any] = [self.eos_token_id] if self.add_eos_token else []
        ids = bos + first + eos
        if second is not None:
            ids += bos + second + eos
        return ids

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of pieces; special tokens are not decoded by sentencepiece."""
        if tokens and tokens[0].startswith(SPIECE_UNDERLINE):
            tokens = [tokens[0][1:], *tokens[1:]]
        text = ""
        pieces = []
        after_special = False
        for position, token in enumerate(tokens):
            special = token in self.all_special_tokens
            if special:
                if not after_special and position and self.legacy:
                    text += " "
                text += self.sp_model.decode(pieces) + token
                pieces = []
            else:
                pieces.append(token)
            after_special = special
        return text + self.sp_model.decode(pieces)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
        **options: Any,
    ) -> str:
        """Text of ids; tokens that were added to the vocabulary stand by themselves."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        extra = {str(token) for token in cast(list[Any], self.extra_special_tokens)}
        parts = []
        pieces = []
        tokens: Any = self.convert_ids_to_tokens(
            ids, skip_special_tokens=skip_special_tokens
        )
        for token in [*tokens, None]:
            if token is not None and not self._is_added(token, extra):
                pieces.append(token)
                continue
            text = self.convert_tokens_to_string(pieces) if pieces else ""
            parts += [part for part in (text, token) if part]
            pieces = []
        separator = " " if spaces_between_special_tokens else ""
        text = separator.join(parts)
        if clean_up_tokenization_spaces:
            return self.clean_up_tokenization(text)
        return text

    def _is_added(self, token: str, extra: set[str]) -> bool:
        """Whether the token is one of those beyond sentencepiece's vocabulary that have no role,
        such as padding."""
        if token in extra:
            return self._added_tokens_encoder[token] >= self.vocab_size
        return (
            token in self._added_tokens_encoder and token not in self.all_special_tokens
        )
