"""Code in a model's folder: never run unasked, and never by an answer at a terminal; only with
--trust-remote-code."""

import ast
import json
import os
import pty
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_data import make_tower, write_tar
from transformers import AutoConfig, dynamic_module_utils

from llm2clip_plugin.cli import main
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.pretrained import code_of, run_no_code

ROOT = Path(__file__).parents[2]
MARK = "from pathlib import Path\nPath(__file__).parent  # a cached copy\nPath({ran!r}).touch()\n"
CONFIGURATION = (
    "from transformers import LlamaConfig\n\n\nclass EvilConfig(LlamaConfig):\n"
    "    model_type = 'evil'\n"
)
MODELING = """
from transformers import LlamaModel

from .configuration_evil import EvilConfig


class EvilModel(LlamaModel):
    config_class = EvilConfig
"""
TOKENIZER = """from transformers import PreTrainedTokenizerFast


class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def evil(make_llm, tmp_path: Path) -> Path:
    """An LLM and a tokenizer whose classes are in its folder; a file ``ran`` appears once one of
    them is imported."""
    folder = make_llm(tmp_path / "evil", "llama")
    mark = MARK.format(ran=str(tmp_path / "ran"))
    for name, text in (
        ("configuration", CONFIGURATION),
        ("modeling", MODELING),
        ("tokenization", TOKENIZER),
    ):
        (folder / f"{name}_evil.py").write_text(mark + text)
    classes = {
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModel": "modeling_evil.EvilModel",
    }
    change(folder / "config.json", model_type="evil", auto_map=classes)
    tokenizer = {"AutoTokenizer": [None, "tokenization_evil.EvilTokenizer"]}
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map=tokenizer,
    )
    return folder


@pytest.fixture
def yes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A terminal at which somebody has typed "y" already."""
    master, slave = pty.openpty()
    before = os.dup(0)
    os.write(master, b"y\n" * 20)
    os.dup2(slave, 0)
    with os.fdopen(slave) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        assert sys.stdin.isatty()
        yield
    os.dup2(before, 0)
    os.close(before)
    os.close(master)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    captions = {
        "caption": "a red bicycle",
        "long_caption": "a red bicycle leans against the wall of an old house",
    }
    members = []
    for key in "01":
        members += [
            (f"{key}.png", b"no picture"),
            (f"{key}.json", json.dumps(captions).encode()),
        ]
    write_tar(tmp_path / "data" / "0.tar", members)
    return tmp_path / "data"


COMMANDS = {
    "embed": "embed {data} --llm {evil}",
    "embed --dry-run": "embed {data} --llm {evil} --dry-run",
    "finetune-llm": "finetune-llm {data} --llm {evil} --global-batch 2 --output {out}",
    "export-llm": "export-llm --llm {evil} --output {out}",
    "evaluate captions": "evaluate captions {data} --llm {evil} --retrieve short:long",
    "data check": "data check {data} --tokenizer {evil}",
    "vlm build": "vlm build --tower {tower} --llm {evil} --output {out}",
}


@pytest.mark.parametrize("line", COMMANDS.values(), ids=COMMANDS)
def test_yes_at_a_terminal_runs_nothing_of_the_folder(
    evil: Path,
    data: Path,
    yes: None,
    line: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {
        "evil": evil,
        "data": data,
        "tower": tmp_path / "tower",
        "out": tmp_path / "out",
    }
    if "{tower}" in line:
        make_tower(places["tower"])
    assert main(line.format(**places).split()) == 2
    printed = capsys.readouterr()
    assert "[y/N]" not in printed.out + printed.err
    assert printed.err.count("\n") == 1
    assert f"error: {evil} needs " in printed.err
    file = (
        "tokenization_evil.py" if line.startswith("data") else "configuration_evil.py"
    )
    assert f"{file} (auto_map in " in printed.err
    # which has no such option
    assert ("--trust-remote-code" in printed.err) is not line.startswith("vlm")
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_alone_runs_nothing_either(
    make_llm,
    evil: Path,
    data: Path,
    yes: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(evil / "config.json", model_type="llama", auto_map={})
    assert (
        main(["embed", str(data), "--llm", str(evil), "--compute-dtype", "float32"])
        == 2
    )
    assert (
        "tokenization_evil.py (auto_map in tokenizer_config.json)"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "ran").exists()


def test_code_of_a_model_that_transformers_has_is_ignored(
    evil: Path, data: Path, yes: None, tmp_path: Path
) -> None:
    """As Phi-3's folder, whose code is older than transformers' own."""
    change(evil / "config.json", model_type="llama")
    change(evil / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert (
        main(["embed", str(data), "--llm", str(evil), "--compute-dtype", "float32"])
        == 0
    )
    assert not (tmp_path / "ran").exists()


def test_trusted_code_runs(
    evil: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--llm", str(evil), "--compute-dtype", "float32", "--trust-remote-code"]
    assert main(["embed", str(data), *words]) == 0
    assert (tmp_path / "ran").exists()
    # no pictures
    assert (
        main(
            [
                "data",
                "check",
                str(data),
                "--tokenizer",
                str(evil),
                "--trust-remote-code",
            ]
        )
        == 1
    )
    assert (
        main(["export-llm", *words[:2], words[-1], "--output", str(tmp_path / "out")])
        == 0
    )
    assert not capsys.readouterr().err.count("error")


def test_what_trusts_every_folder_runs_nothing_either(
    evil: Path, yes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As LLaVA's loader does with a folder that has "mpt" in its name; others it leaves to the
    prompt."""
    for name in ("get_class_in_module", "TIME_OUT_REMOTE_CODE"):
        # restored afterwards
        monkeypatch.setattr(
            dynamic_module_utils, name, getattr(dynamic_module_utils, name)
        )
    run_no_code()
    with pytest.raises(
        ContractError,
        match=r"EvilConfig of its own file configuration_evil\.py, which is not run",
    ):
        AutoConfig.from_pretrained(evil, trust_remote_code=True)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoConfig.from_pretrained(evil)
    assert not (tmp_path / "ran").exists()


def test_the_file_of_another_repository_is_named(tmp_path: Path) -> None:
    classes = {
        "AutoConfig": "somebody/code--configuration_x.X",
        "AutoModel": "inner.modeling_x.X",
    }
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": classes}))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": ["tokenization_x.Slow", null]}'
    )
    (tmp_path / "processor_config.json").write_text("{")
    assert code_of(tmp_path) == [
        "configuration_x.py of somebody/code (auto_map in config.json)",
        "inner/modeling_x.py (auto_map in config.json)",
        "tokenization_x.py (auto_map in tokenizer_config.json)",
    ]


def calls_that_may_ask(path: Path) -> Iterator[str]:
    """Calls of transformers' Auto classes, or of its pipelines, that do not say whether they trust
    a folder's code."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        owner, _, name = called.rpartition(".")
        is_auto = name in ("from_pretrained", "from_config") and owner.rpartition(".")[
            2
        ].startswith("Auto")
        says = [keyword.arg for keyword in node.keywords]
        if (is_auto or called == "transformers.pipeline") and not {
            "trust_remote_code",
            None,
        } & {*says}:
            yield f"{path.relative_to(ROOT)}:{node.lineno}: {called}"


def test_no_call_of_an_auto_class_leaves_the_answer_to_a_prompt() -> None:
    folders = ("llm2clip_plugin", "llava_integration", "scripts")
    files = [
        path for folder in folders for path in sorted((ROOT / folder).glob("**/*.py"))
    ]
    assert [call for path in files for call in calls_that_may_ask(path)] == []
