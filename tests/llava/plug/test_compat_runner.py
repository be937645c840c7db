"""The completions of LLaVA's code: which run where, what is said of versions, how one that fails is
named."""

from types import ModuleType

import pytest

from llava_integration.plug.compat import runner
from llava_integration.plug.compat.runner import Completion, installed_version
from llm2clip_plugin.installation import numbers

pytestmark = pytest.mark.both_stacks
TODAY = numbers(installed_version("transformers")) >= (5,)


def test_nothing_is_touched_with_the_libraries_that_llava_pins():
    assert (runner.needed() == []) == (not TODAY)
    assert runner.watched() == {member.module for member in runner.needed()}
    assert not runner.problem()
    assert TODAY or runner.watched() == set()
    for member in runner.completions:
        assert member.module.startswith("llava."), member
        assert member.complete.__doc__, member


def member(module, complete, when="after"):
    return Completion(
        module=module, when=when, libraries={"transformers": ">=4"}, complete=complete
    )


def test_switched_off(monkeypatch):
    monkeypatch.setenv("LLM2CLIP_LLAVA_COMPAT", "0")
    monkeypatch.setattr(
        runner, "needed", lambda: [member("llava.model.builder", pytest.fail)]
    )
    assert runner.watched() == set()
    runner.run(ModuleType("llava.model.builder"), "after")


def test_each_completion_runs_once_and_at_its_moment(monkeypatch):
    ran = []
    late, early = (
        lambda module, name=name: ran.append((name, module.__name__))
        for name in ("late", "early")
    )
    members = [
        member("llava.train.train", late),
        member("llava.train.train", early, when="before"),
    ]
    monkeypatch.setattr(runner, "needed", lambda: members)
    monkeypatch.setattr(runner, "done", [])
    for when in ("before", "after", "before", "after"):
        runner.run(ModuleType("llava.train.train"), when)
        runner.run(ModuleType("llava.model.builder"), when)
    assert ran == [("early", "llava.train.train"), ("late", "llava.train.train")]


FAILS = """
from llava_integration.plug.compat import runner
def fails(module): raise RuntimeError("broken on purpose")
libraries = {{"transformers": ">=4"}}
broken = runner.Completion(
    module="{module}", when="{when}", libraries=libraries, complete=fails
)
members = [*runner.needed(), broken]
runner.needed = lambda: members
import {imported}
"""


TRAINER = "llava.train.llava_trainer"


@pytest.mark.parametrize(
    "module, when, imported",
    [("llava.model.llava_arch", "after", "llava"), (TRAINER, "before", TRAINER)],
)
def test_a_completion_that_fails_names_itself(world, module, when, imported):
    """Also in ``llava.model``, which swallows the error that names it."""
    output = world.forked(
        "-c", FAILS.format(module=module, when=when, imported=imported), fails=True
    )
    assert (
        f", fails could not patch {module} for transformers" in output.splitlines()[-1]
    )
    assert "RuntimeError('broken on purpose')" in output
    assert "LLM2CLIP_LLAVA_COMPAT=0" in output


@pytest.fixture
def installed(monkeypatch):
    """Set the versions that the libraries seem to have."""

    def set_versions(**versions):
        monkeypatch.setattr(
            runner, "installed_version", lambda library: versions.get(library, "")
        )
        runner.problem.cache_clear()
        runner.warn_if_untried.cache_clear()

    yield set_versions
    runner.problem.cache_clear()
    runner.warn_if_untried.cache_clear()


def test_a_version_that_cannot_work_is_an_error_with_one_that_does(installed):
    installed(transformers="4.50.0")
    with pytest.raises(
        ImportError,
        match=r"cannot train with transformers 4\.50\.0; install transformers==4\.37\.2",
    ):
        runner.run(ModuleType("llava.train.llava_trainer"), "before")
    for version in ("4.36.2", "4.37.2", "4.46.3", "5.24.0"):
        installed(transformers=version)
        assert runner.problem() == ""
