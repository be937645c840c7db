"""Servers that stall, refuse, are overloaded or send something else: what is retried, what is said, what remains."""

import logging
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from data_world import DroppingServer, jpeg, serving, write_shards

from llm2clip_plugin.cli import main
from llm2clip_plugin.data import remote as retry_module
from llm2clip_plugin.data.remote import Downloads, retry_after, take_retries
from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.hub import LONGEST_RETRY_AFTER, Retry, timeout

BODY = bytes(range(256)) * 400


class FailingServer(DroppingServer):
    """Answers the first requests with ``failures``, one after another, then as it should."""

    def __init__(self, files: dict[str, bytes], failures: list[Callable[[BaseHTTPRequestHandler], None]]) -> None:
        super().__init__(files)
        self.failures = failures
        self.asked = 0  # requests of all kinds

    def answer(self, handler: BaseHTTPRequestHandler, *, body: bool) -> None:
        self.asked += 1
        if self.failures:
            handler.close_connection = True
            self.failures.pop(0)(handler)
            return
        super().answer(handler, body=body)


def status(code: int, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def fail(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return fail


def sending(data: bytes, size: int = 0, stall: float = 0.0) -> Callable[[BaseHTTPRequestHandler], None]:
    """HTTP 200 with ``data``, of which ``size`` bytes are announced, and then nothing for ``stall`` seconds."""

    def fail(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(size or len(data)))
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(data)
            handler.wfile.flush()
        time.sleep(stall)

    return fail


@pytest.fixture(autouse=True)
def fresh_count(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(retry_module, "_retries", [0, 0])
    monkeypatch.setattr(retry_module, "_warned", [-1e9])
    yield


def downloads(folder: Path, tries: int = 8) -> Downloads:
    return Downloads(folder, Retry(tries=tries, first_pause=0.001))


def test_overload_is_retried_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    errors = [status(503), status(503), status(429, Retry_After="0"), status(429), status(500), status(500)]
    server = FailingServer({"/a.tar": BODY}, errors)  # the size is asked for by HEAD and, after a failure, by GET
    with serving(server) as address, caplog.at_level(logging.WARNING):
        assert downloads(tmp_path).fetch(f"{address}/a.tar").read_bytes() == BODY
    assert take_retries() == 3 and take_retries() == 0
    assert len(caplog.messages) == 1  # the first; a later one would say how many there were
    assert "ClientResponseError: 503" in caplog.text and "retrying in" in caplog.text


def test_a_server_may_say_when_to_come_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    waited: list[float] = []
    monkeypatch.setattr(retry_module.time, "sleep", waited.append)
    server = FailingServer({"/a.tar": BODY}, [status(429, Retry_After="7")] * 2)
    with serving(server) as address:
        downloads(tmp_path).fetch(f"{address}/a.tar")
    assert waited == [7.0]
    error = ConnectionError()
    error.headers = {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}  # type: ignore[attr-defined]
    assert retry_after(error) == 0.0  # a date, long past
    error.headers = {"Retry-After": "Thu, 31 Dec 2099 23:59:59 GMT"}  # type: ignore[attr-defined]
    assert retry_after(error) == LONGEST_RETRY_AFTER
    error.headers = {"Retry-After": "soon"}  # type: ignore[attr-defined]
    assert retry_after(error) == 0.0


@pytest.mark.parametrize(
    "code, error, message",
    [
        (403, PermissionError, r"access denied to http.*a\.tar \(HTTP 403\); check its permissions, token"),
        (401, PermissionError, r"access denied to http.*a\.tar \(HTTP 401\)"),
        (404, FileNotFoundError, r"no file at http.*a\.tar \(HTTP 404\)"),
        (410, FileNotFoundError, r"no file at http.*a\.tar \(HTTP 410\)"),
        (400, ConnectionError, r"the server refuses http.*a\.tar: 400"),
    ],
)
def test_a_refusal_is_said_at_once(code: int, error: type[Exception], message: str, tmp_path: Path) -> None:
    server = FailingServer({}, [status(code)] * 9)
    with serving(server) as address, pytest.raises(error, match=message):
        downloads(tmp_path).fetch(f"{address}/a.tar")
    assert server.asked <= 2 and take_retries() == 0


@pytest.mark.parametrize("sent", [None, b"x" * 100], ids=["at once", "after 100 bytes"])
def test_a_server_that_stalls_ends_in_an_error(
    sent: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It accepts and never answers, or sends 100 bytes of the file and no more."""
    monkeypatch.setenv("LLM2CLIP_TIMEOUT", "0.2")

    def never(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(2)

    failure = never if sent is None else sending(sent, len(BODY), stall=2)
    server = FailingServer({}, [failure] * 20)
    expected = r"failed 2 times in a row: http.*a\.tar.*(Timeout|timed out).*no answer within 0.2 s, LLM2CLIP_TIMEOUT"
    with serving(server) as address, pytest.raises(ConnectionError, match=expected):
        downloads(tmp_path, tries=2).fetch(f"{address}/a.tar")


def test_the_timeout_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timeout() == 30
    for text in ("soon", "0", "-1", "inf", "nan"):
        monkeypatch.setenv("LLM2CLIP_TIMEOUT", text)
        with pytest.raises(ValueError, match=f"LLM2CLIP_TIMEOUT is '{text}', expected seconds above 0"):
            timeout()


@pytest.mark.parametrize(
    "body, message",
    [
        (b"\n<!DOCTYPE html>\n<html>log in</html>".ljust(20_000), "sent a web page"),
        (bytes(20_480), r"begins with zeros.*the copy is deleted"),
        (b"\x1f\x8b" + bytes(20_000), "no tar header.*the copy is deleted"),
    ],
    ids=["a web page", "zeros", "gzip"],
)
def test_a_wrong_body_is_not_kept(
    body: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command succeeds when the server has recovered."""
    monkeypatch.setattr(retry_module.time, "sleep", lambda seconds: None)
    good = (write_shards(tmp_path / "data", [2]) / "00000.tar").read_bytes()
    files = {"/00000.tar": body}
    with serving(DroppingServer(files)) as address:
        config = SourceConfig(path=f"{address}/00000.tar", cache_folder=str(tmp_path / "cache"))
        with pytest.raises((ValueError, ConnectionError), match=message):
            open_source(config)
        files["/00000.tar"] = good
        assert open_source(config)[1].read_image() == jpeg(1)
        files["/00000.tar"] = b""
    assert main(["data", "check", config.path, "--cache-folder", config.cache_folder]) == 0
    capsys.readouterr()


def test_data_check_names_a_denied_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = (write_shards(tmp_path / "data", [2]) / "00000.tar").read_bytes()

    class Denying(DroppingServer):
        def answer(self, handler: BaseHTTPRequestHandler, *, body: bool) -> None:
            if handler.path == "/00001.tar":
                handler.close_connection = True
                return status(403)(handler)
            return super().answer(handler, body=body)

    with serving(Denying({"/00000.tar": good})) as address:
        path = f"{address}/{{00000..00001}}.tar"
        assert main(["data", "check", path, "--cache-folder", str(tmp_path / "cache")]) == 1
    text = capsys.readouterr().out
    assert "00001: access denied to http" in text and "NOT fit for training" in text
