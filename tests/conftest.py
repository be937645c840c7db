"""For tests of all folders."""

import gc
import os
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# whose modules are in no package
SHARED = (
    "support",
    "../scripts",
    "../scripts/quickstart",
)
sys.path += [str((TESTS / name).resolve()) for name in SHARED]
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Workers of xdist take the files with slow tests first, then those with many: one that starts
    last runs alone."""
    if hasattr(config, "workerinput"):
        slow = Counter(item.path for item in items if "slow" in item.keywords)
        size = Counter(item.path for item in items)
        items.sort(key=lambda item: (-slow[item.path], -size[item.path], item.path))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """The garbage collector rests while tests import their libraries, and then leaves those out."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def no_rank_variables() -> Iterator[None]:
    """A run in this process sets what a launcher would; processes that later tests start must not
    inherit it."""
    yield
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection is an error."""

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"a connection was asked for: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def pytest_terminal_summary(terminalreporter) -> None:
    """Append the seconds of each test file to the file that scripts/test.sh names."""
    target = os.environ.get("LLM2CLIP_FILE_SECONDS")
    # the reports of xdist's workers come to the main process, too
    if not target or "PYTEST_XDIST_WORKER" in os.environ:
        return
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    environment = Path(sys.prefix).name
    with open(target, "a", encoding="utf-8") as file:
        for name, took in seconds.items():
            print(f"{took:8.1f}  {name} ({environment})", file=file)
