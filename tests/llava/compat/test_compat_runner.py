"""The completions of LLaVA's code: which run where, what is said of versions, how one that fails is named."""

import pkgutil
import sys
from importlib import import_module
from types import ModuleType

import pytest

from llava_integration import boot, compat
from llava_integration.compat import runner, versions
from llava_integration.compat.completion import Completion, installed_version
from llm2clip_plugin.console import numbers

pytestmark = pytest.mark.both_stacks
TODAY = numbers(installed_version("transformers")) >= (5,)


def test_nothing_is_touched_with_the_libraries_that_llava_pins():
    assert (runner.needed() == {}) == (not TODAY)
    assert runner.watched() == {member.module for member in runner.needed().values()} | versions.refused()
    assert TODAY or runner.watched() == set()


def test_each_file_says_why():
    for found in pkgutil.iter_modules(compat.__path__):
        module = import_module(f"llava_integration.compat.{found.name}")
        if member := getattr(module, "COMPLETION", None):
            assert member.name == found.name and member.module.startswith("llava.")
            assert module.__doc__ and member.complete.__doc__, found.name


def test_the_folder_costs_no_import_of_torch(world):
    code = "from llava_integration.compat import runner; runner.watched(); import sys; print('torch' in sys.modules)"
    assert world.python("-c", code, PYTHONPATH="").strip() == "False"


def test_switched_off(monkeypatch):
    monkeypatch.setenv("LLM2CLIP_LLAVA_COMPAT", "0")
    monkeypatch.setattr(runner, "needed", lambda: {"x": member("llava.model.builder", pytest.fail)})
    assert runner.watched() == set()
    runner.run(ModuleType("llava.model.builder"), "after")


def member(module, complete, when="after"):
    complete.__module__ = "llava_integration.compat.made_for_a_test"
    return Completion(module=module, when=when, libraries={"transformers": ">=4"}, complete=complete)


def test_each_completion_runs_once_and_at_its_moment(monkeypatch):
    ran = []
    late = member("llava.train.train", lambda module: ran.append(("late", module.__name__)))
    early = member("llava.train.train", lambda module: ran.append(("early", module.__name__)), when="before")
    monkeypatch.setattr(runner, "needed", lambda: {"late": late, "early": early})
    monkeypatch.setattr(runner, "done", set())
    for when in ("before", "after", "before", "after"):
        runner.run(ModuleType("llava.train.train"), when)
        runner.run(ModuleType("llava.model.builder"), when)
    assert ran == [("early", "llava.train.train"), ("late", "llava.train.train")]


FAILS = """
from llava_integration.compat import runner
from llava_integration.compat.completion import Completion
def fails(module): raise RuntimeError("broken on purpose")
fails.__module__ = "llava_integration.compat.fails"
broken = Completion(module="{module}", when="{when}", libraries={{"transformers": ">=4"}}, complete=fails)
members = {{**runner.needed(), "fails": broken}}
runner.needed = lambda: members
import {imported}
"""


@pytest.mark.parametrize(
    "module, when, imported",
    [
        ("llava.model.llava_arch", "after", "llava"),
        ("llava.train.llava_trainer", "before", "llava.train.llava_trainer"),
    ],
)
def test_a_completion_that_fails_names_itself(world, module, when, imported):
    """Also in ``llava.model``, which swallows the error that names it."""
    told = world.forked("-c", FAILS.format(module=module, when=when, imported=imported), fails=True)
    assert f"llava_integration/compat/fails.py could not complete {module} for transformers" in told.splitlines()[-1]
    assert "RuntimeError('broken on purpose')" in told and "LLM2CLIP_LLAVA_COMPAT=0" in told


def test_a_file_that_cannot_be_imported_is_named_once(monkeypatch, capsys):
    def broken():
        raise runner.CompletionError("a file of llava_integration/compat cannot be imported: SyntaxError('x.py')")

    monkeypatch.setattr(runner, "needed", broken)
    monkeypatch.setattr(boot, "broken", False)
    assert boot.watched() == boot.watched() == set(boot.WATCHED)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "x.py" in told and "LLaVA runs without completions" in told


@pytest.fixture
def installed(monkeypatch):
    """Set the versions that the libraries seem to have."""

    def set_versions(**found):
        monkeypatch.setattr(versions, "installed_version", lambda library: found.get(library, ""))
        versions.problems.cache_clear()
        versions.warn_if_untried.cache_clear()

    yield set_versions
    versions.problems.cache_clear()
    versions.warn_if_untried.cache_clear()


def test_a_version_never_tried_gets_one_line_from_the_first_rank(installed, monkeypatch, capsys):
    installed(transformers="5.24.1", deepspeed="0.19.8")
    versions.warn_if_untried()
    assert capsys.readouterr().err == ""
    installed(transformers="6.1.0", deepspeed="0.30.0")
    monkeypatch.setenv("RANK", "1")
    versions.warn_if_untried()
    versions.warn_if_untried.cache_clear()
    monkeypatch.setenv("RANK", "0")
    versions.warn_if_untried()
    versions.warn_if_untried()
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "transformers 6.1.0 (tried: 5.24)" in told and "deepspeed 0.30.0" in told


def test_a_version_that_cannot_work_is_an_error_with_one_that_does(installed):
    installed(transformers="4.50.0")
    assert versions.refused() == {"llava.train.llava_trainer"}
    with pytest.raises(ImportError, match=r"cannot run with transformers 4\.50\.0: .*install transformers==4\.37\.2"):
        runner.run(ModuleType("llava.train.llava_trainer"), "before")
    for version in ("4.36.2", "4.37.2", "4.46.3"):
        installed(transformers=version)
        assert versions.refused() == set()
    installed(transformers="5.24.0")
    with pytest.raises(ImportError, match=r"train with train\.py or train_mem\.py"):
        runner.run(ModuleType("llava.train.llama_xformers_attn_monkey_patch"), "before")
    assert versions.refused() == {"llava.train.llama_xformers_attn_monkey_patch"}


def test_modules_that_are_imported_where_a_completion_failed(monkeypatch):
    package = ModuleType("llava.model")
    monkeypatch.setitem(sys.modules, "llava.model", package)
    runner.tell_importers(package, ImportError("what happened"))
    assert not hasattr(package, "__path__")
    with pytest.raises(ImportError, match="what happened"):
        from llava.model import LlavaLlamaForCausalLM  # noqa: F401
