"""``load_pretrained_model`` reads a Mistral's tokenizer without ``use_fast=False``: LLaVA trains with the slow one, and
answers with the fast one of transformers 4.37, which puts a space before each piece of text between special tokens and
keeps spaces that the text begins with. That of transformers 5 does not, whatever its tokenizer.json says.
"""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava_integration.compat.completion import Completion
from llava_integration.compat.llama_tokenizer import NAMES

STEPS = ("normalizer", "pre_tokenizer", "decoder")  # of tokenizer.json


def complete(module: Any) -> None:
    """Make the module's ``AutoTokenizer`` read Llama's fast tokenizers as 4.37 does; that of other programs stays."""
    original = module.AutoTokenizer.from_pretrained

    @functools.wraps(original)
    def from_pretrained(name: str, *arguments: Any, **options: Any) -> Any:
        tokenizer = original(name, *arguments, **options)
        if options.get("use_fast") is None and type(tokenizer).__name__ in NAMES:
            read_as_4(tokenizer, name)
        return tokenizer

    module.AutoTokenizer = SimpleNamespace(from_pretrained=from_pretrained)


def read_as_4(tokenizer: Any, name: str) -> None:
    """Give the tokenizer the steps of its tokenizer.json; without one, those that 4.37 makes of tokenizer.model."""
    from tokenizers import Tokenizer, normalizers
    from transformers.utils import cached_file

    backend = tokenizer.backend_tokenizer
    backend.model.unk_token = tokenizer.unk_token
    file = cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    if file is not None:
        saved = Tokenizer.from_str(Path(file).read_text(encoding="utf-8"))
        for step in STEPS:
            setattr(backend, step, getattr(saved, step))
        return
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None


COMPLETION = Completion(
    module="llava.model.builder", when="after", libraries={"transformers": ">=5"}, complete=complete
)
