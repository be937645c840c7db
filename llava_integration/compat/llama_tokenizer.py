"""LLaVA asks for slow tokenizers (``use_fast=False``), which transformers 5 no longer has; its Llama tokenizer gives
other ids after special tokens and after spaces, so that LLaVA's label masks, which count tokens, would be off.

With ``use_fast=False``, a model with a tokenizer.model gets the tokenizer of transformers 4.37 again: sentencepiece
itself, on the classes that transformers 5 keeps for it. It is saved with its tokenizer.model, which LLaVA's own
environment needs. Other models (tokenizer.json alone) get what transformers 5 gives.
"""

import functools
from types import ModuleType
from typing import Any

from llava_integration.compat.completion import Completion

NAMES = ("LlamaTokenizer", "LlamaTokenizerFast", None)  # tokenizer_class in tokenizer_config.json


def complete(module: ModuleType) -> None:
    """Make ``AutoTokenizer.from_pretrained`` listen to ``use_fast=False``."""
    from transformers import AutoTokenizer

    tokenizers: Any = AutoTokenizer
    original = tokenizers.from_pretrained

    @functools.wraps(original)
    def from_pretrained(name: str, *arguments: Any, use_fast: bool | None = None, **options: Any) -> Any:
        if use_fast is False and is_llama(name, options):
            from llava_integration.compat.slow_tokenizer.llama import LlamaTokenizer

            return LlamaTokenizer.from_pretrained(name, *arguments, **options)
        return original(name, *arguments, **options)

    tokenizers.from_pretrained = from_pretrained


def is_llama(name: str, options: dict[str, Any]) -> bool:
    """Whether the model has a sentencepiece tokenizer of Llama's kind."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    from transformers.utils import cached_file

    places = ("cache_dir", "revision", "token", "local_files_only", "subfolder")
    where = {key: options[key] for key in places if key in options}
    if get_tokenizer_config(name, **where).get("tokenizer_class") not in NAMES:
        return False
    found = cached_file(name, "tokenizer.model", _raise_exceptions_for_missing_entries=False, **where)
    return found is not None


COMPLETION = Completion(
    module="llava.model.language_model.llava_llama",  # the first of LLaVA's modules that every program imports
    when="before",
    libraries={"transformers": ">=5"},
    complete=complete,
)
