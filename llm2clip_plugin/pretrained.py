"""Folders of models, opened with transformers' Auto classes: Python code in them runs only where a
user trusts it.

By default transformers asks at a terminal whether to run such code. Here ``trust_remote_code``
answers, never a prompt.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.json_files import refuse_byte_order_mark

# files of a folder that may name code of its own, under AUTO_MAP
CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
AUTO_MAP = "auto_map"
TRUST = "read it first, then run it with --trust-remote-code; or use a model that transformers has"
KNOWN = "use a model that transformers has"


def open_pretrained(
    kind: Any,
    source: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    fix: str = TRUST,
    **options: Any,
) -> Any:
    """``kind.from_pretrained(source, **options)``, where ``kind`` is an Auto class such as
    ``AutoConfig``.

    Raises ContractError, which ends with ``fix``, if the model needs code of its own that is not
    trusted; also for a JSON file with a byte-order mark, which transformers does not name.
    """
    try:
        return kind.from_pretrained(
            source, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError) as error:
        for path in sorted(Path(source).glob("*.json")):
            if path.is_file():
                refuse_byte_order_mark(path)
        if isinstance(error, OSError) or "trust_remote_code" not in str(error):
            raise
        code = ", ".join(code_of(Path(source))) or "Python code of its repository"
        raise ContractError(
            f"{source} needs {code}, which is not run; {fix}"
        ) from error


def code_of(folder: Path) -> list[str]:
    """The code that a model's folder names, each as ``modeling_x.py (auto_map in config.json)``."""
    named: dict[str, str] = {}
    for config in CONFIGS:
        for reference in references(folder / config):
            named.setdefault(code_file(reference), config)
    return [f"{file} ({AUTO_MAP} in {config})" for file, config in named.items()]


def references(config: Path) -> Iterator[str]:
    """The classes under AUTO_MAP of a file, as ``module.Class`` or ``owner/name--module.Class``."""
    try:
        body = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    auto_map = body.get(AUTO_MAP) if isinstance(body, dict) else None
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    for value in values:
        for reference in value if isinstance(value, list) else [value]:
            if isinstance(reference, str):
                yield reference


def code_file(reference: str) -> str:
    """The file of a class: ``configuration_x.py``, or ``configuration_x.py of owner/name``."""
    repository, separator, name = reference.rpartition("--")
    file = name.rpartition(".")[0].replace(".", "/") + ".py"
    return f"{file} of {repository}" if separator else file


def check_vocabulary(
    tokenizer: Any, rows: int, where: object, used: Iterable[int] = ()
) -> None:
    """Raise ContractError if a text can have token ids for which an LLM has no embedding.

    ``rows``: of the LLM's embedding; ``used``: ids around every text. Special tokens that no text
    has may lie beyond, such as the one for images in Gemma 3's tokenizer.
    """
    special = {
        int(number)
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    ids = {*tokenizer.get_vocab().values()} - special
    largest = max([*ids, *used], default=0)
    if largest >= rows:
        problem = (
            f"its tokenizer has ids up to {largest}, its config.json vocab_size {rows}"
        )
        raise ContractError(
            f"{where}: {problem}; copy the tokenizer of this LLM into its folder"
        )


def run_no_code() -> None:
    """Let nothing in this process run code of a model's folder, whatever it passes to transformers:
    LLaVA's loader trusts every folder with "mpt" in its name, and lets transformers ask about the
    others."""
    from transformers import dynamic_module_utils

    def refuse(class_name: str, module: Any, *_: Any, **__: Any) -> Any:
        file = f"{Path(module).stem}.py"
        problem = (
            f"the model needs {class_name} of its own file {file}, which is not run"
        )
        raise ContractError(f"{problem}; {KNOWN}")

    dynamic_module_utils.get_class_in_module = refuse
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # an error in place of the question
