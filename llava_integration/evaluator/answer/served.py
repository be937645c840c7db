"""Questions answered by a served model: several requests at a time, failed ones repeated, answers
kept as they come."""

import base64
import contextlib
import http.client
import io
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from PIL import Image

from llava_integration.evaluator.answer.questions import (
    KEY,
    AnswerConfig,
    AnswersFile,
    Question,
    entry,
)
from llm2clip_plugin.hub import TIMEOUT, Retry, seconds_of_retry_after, timeout
from llm2clip_plugin.outside import printable
from llm2clip_plugin.progress import progress_bar

# An OpenAI-compatible server: the models it serves, and chat completions about an image.

PASSING = (408, 425, 429)  # and 5xx: HTTP statuses of errors that may pass
# requests refused one after another, then the run stops: it is not about single questions
MOST_REFUSED = 10
SILENCE = 30.0  # seconds between two messages about retries
ORIENTATION = 0x0112  # EXIF tag, which some servers apply and LLaVA does not


class EndpointError(ConnectionError):
    """The server cannot be used: wrong URL, no such model, access denied, gone."""


class RefusedError(Exception):
    """The server refuses this request; others may succeed."""


class PassingError(RefusedError):
    """A request failed, but may succeed later, ``pause`` seconds from now at the earliest."""

    pause = 0.0


# the text of a chat completion, and why it ended: stop | length | ...
Reply = tuple[str, str]


class ServedModel(NamedTuple):
    """An entry of the server's list of models."""

    id: str
    # the checkpoint's path or Hub id, where a server says it (vLLM, SGLang)
    root: str = ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: urllib would send the key to the other host, and the question not at
    all."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Endpoint:
    """A server's URL, with the key and the time limit of its requests; may be used by several
    threads."""

    def __init__(self, url: str, *, timeout: float, retries: int) -> None:
        """``url``: up to /v1, which is added to a host alone; ``timeout``: seconds that an answer
        may take. Raises ValueError for what is not such a URL, and for a key that no header can
        hold."""
        self.retries = retries
        self.stopped = threading.Event()
        self._reported = -SILENCE  # time of the last message about a retry
        parts = urlsplit(url)
        if parts.username or parts.password:
            raise ValueError(
                f"--endpoint must not contain a user or password; set {KEY} instead"
            )
        is_server = parts.scheme in ("http", "https") and bool(parts.hostname)
        if not is_server or parts.query or parts.fragment:
            raise ValueError(
                f"--endpoint {url!r} is not a server's URL; "
                "expected one like http://localhost:8000/v1"
            )
        path = (
            parts.path.rstrip("/")
            .removesuffix("/chat/completions")
            .removesuffix("/models")
        )
        self.url = f"{parts.scheme}://{parts.netloc}{path or '/v1'}"
        self.timeout = timeout
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
        }
        key = os.environ.get(KEY, "").strip()
        if not (
            key.isascii() and key.isprintable()
        ):  # else http.client's error shows it
            raise ValueError(
                f"{KEY} has characters that no API key has (line breaks, non-ASCII); set it again"
            )
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._opener = urllib.request.build_opener(_NoRedirect)

    def choose(self, name: str) -> ServedModel:
        """The served model of that name, or the only one if ``name`` is empty. Raises EndpointError
        naming all."""
        try:
            rows = self._request("/models", limit=timeout(), option=TIMEOUT)["data"]
            models = [
                ServedModel(id=row["id"], root=str(row.get("root") or ""))
                for row in rows
            ]
        except PassingError as error:
            raise EndpointError(
                f"{error}; start the server, or correct --endpoint"
            ) from error
        except RefusedError as error:  # some gateways have chat completions alone
            if name:
                return ServedModel(id=name)
            raise EndpointError(
                f"{self.url}/models: {error}; set --served-model-name or --endpoint"
            ) from error
        except (KeyError, TypeError):
            raise EndpointError(
                f"{self.url}/models is not the list of an OpenAI-compatible server"
            ) from None
        chosen = [model for model in models if name in ("", model.id)]
        if len(chosen) != 1:
            ids = ", ".join(model.id for model in models[:20])
            does = (
                f"does not serve {name!r}" if name else f"serves {len(models)} models"
            )
            raise EndpointError(
                f"{self.url} {does}; choose one with --served-model-name: {ids}"
            )
        return chosen[0]

    def chat(self, body: dict[str, Any]) -> Reply:
        """A chat completion, after some retries. Raises EndpointError, PassingError or
        RefusedError."""
        retry = Retry(tries=self.retries + 1, first_pause=1.0)
        failures = 0
        while True:
            try:
                answer = self._request(
                    "/chat/completions", body, limit=self.timeout, option="--timeout"
                )
                return self._reply(answer)
            except PassingError as error:
                failures += 1
                if failures >= retry.tries or self.stopped.is_set():
                    raise
                pause = max(retry.pause(failures), error.pause)
                now = time.monotonic()
                # the first, then one now and then: all threads fail together
                if now - self._reported >= SILENCE:
                    self._reported = now
                    print(
                        f"{error}; retrying in {pause:.1f} s ({failures} of {self.retries})",
                        file=sys.stderr,
                    )
                self.stopped.wait(pause)

    def _reply(self, answer: Any) -> Reply:
        """The text of a chat completion. Raises PassingError for another value, RefusedError
        without a text."""
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"]
            reason = str(choice.get("finish_reason") or "")
        except (KeyError, IndexError, TypeError):
            raise PassingError(
                f"{self.url}: an answer without choices[0].message.content: {_short(answer)}"
            ) from None
        if not isinstance(text, str):
            raise RefusedError(
                f"the answer has no text (content: {_short(text)}, {reason})"
            )
        return text.strip(), reason

    def _request(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        limit: float,
        option: str,
    ) -> Any:
        """The JSON value that the server answers with; ``limit`` in seconds, set by ``option``."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, headers=self._headers
        )
        try:
            with self._opener.open(request, timeout=limit) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            with error:
                raise self._status_error(error, path) from None
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)  # of a URLError
            problem = _short(f"{type(cause).__name__}: {cause}")
            if isinstance(cause, TimeoutError):
                problem = f"no answer within {limit:g} s ({option})"
                problem += "; the server is overloaded or stalled"
            raise PassingError(f"{self.url}: {problem}") from error
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise PassingError(
                f"{self.url}{path}: the answer is not JSON: {_short(text)}"
            ) from None

    def _status_error(self, error: urllib.error.HTTPError, path: str) -> Exception:
        """What to raise for an HTTP status that is not 200."""
        status = error.code
        location = error.headers.get("Location")
        reply = f"HTTP {status}: {_short(location) if location else _error_text(error)}"
        if status in PASSING or status >= 500:
            passing = PassingError(f"{self.url}: {reply}")
            passing.pause = seconds_of_retry_after(
                error.headers.get("Retry-After") or ""
            )
            return passing
        if status in (401, 403):
            return EndpointError(
                f"{self.url} denies access ({reply}); set {KEY} to a key of this server"
            )
        if status < 400 or (status in (404, 405) and path != "/models"):
            return EndpointError(
                f"{self.url}{path}: {reply}; set --endpoint or --served-model-name"
            )
        return RefusedError(reply)


def _error_text(error: urllib.error.HTTPError) -> str:
    """What a server says about an error: OpenAI's ``error.message``, FastAPI's ``detail``, or its
    first words."""
    raw = b""
    with contextlib.suppress(
        OSError, http.client.HTTPException, ValueError, AttributeError
    ):
        raw = error.read(1 << 16)
        body = json.loads(raw)
        inner = body.get("error", body)
        return _short(inner.get("message") or inner.get("detail") or raw)
    return _short(raw or error.reason)


def _short(value: Any) -> str:
    """The beginning of a text or JSON value, without control characters."""
    if isinstance(value, bytes):
        text = value.decode(errors="replace")
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    return printable(" ".join(text.split())[:300])


def image_url(question: Question, folder: str, *, blind: bool = False) -> str:
    """The image as a data URL: the file's bytes if any reader sees in them what LLaVA sees,
    otherwise a PNG. A server may rotate by EXIF or put transparent images on white, which LLaVA
    does not. A gray PNG of its size if ``blind``."""
    image = question.open_image(folder, blind=blind)
    if blind:
        return data_url(as_png(image), "PNG")
    if question.embedded:
        raw = base64.b64decode(question.image)
    else:
        raw = (Path(folder) / question.image).read_bytes()
    with Image.open(io.BytesIO(raw)) as source:
        kind = source.format
        plain = source.mode == "RGB" and source.getexif().get(ORIENTATION, 1) == 1
    if kind not in ("JPEG", "PNG") or not plain:
        return data_url(as_png(image), "PNG")
    return data_url(raw, kind)


def as_png(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(raw: bytes, kind: str) -> str:
    """An image file's bytes as a data URL; ``kind``: Pillow's name of its format."""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(raw).decode()}"


def _reply(
    endpoint: Endpoint, model: str, options: AnswerConfig, question: Question
) -> Reply | Exception:
    """The server's reply to a question, or why there is none."""
    try:
        if endpoint.stopped.is_set():
            raise EndpointError("the run has stopped")
        content: Any = question.text  # the server applies the chat template
        if question.image:  # before the text, as in LLaVA's prompts
            url = image_url(question, options.image_folder, blind=options.blind)
            content = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": question.text},
            ]
        request = {
            "model": model,
            "temperature": options.temperature,
            "max_tokens": options.max_new_tokens,
            "messages": [{"role": "user", "content": content}],
        }
        if options.top_p is not None:
            request["top_p"] = options.top_p
        return endpoint.chat(request)
    except Exception as error:
        # the other threads' next questions would fail alike
        if not isinstance(error, RefusedError):
            endpoint.stopped.set()
        return error


def answer_served(
    endpoint: Endpoint,
    model: str,
    options: AnswerConfig,
    questions: list[Question],
    indices: list[int],
    answers: AnswersFile,
) -> list[str]:
    """Ask the questions of these indices and write each answer as it comes; returns a line for each
    question refused. Raises EndpointError if the server is gone or refuses request after request.
    """

    def ask(index: int) -> tuple[int, Reply | Exception]:
        return index, _reply(endpoint, model, options, questions[index])

    refused: list[str] = []
    in_a_row = 0
    done = len(questions) - len(indices)
    print(
        f"asking {model!r} at {endpoint.url}: {len(indices)} questions, {done} answered before",
        file=sys.stderr,
    )
    try:
        with (
            progress_bar(
                total=len(questions), initial=done, label="answers", unit="questions"
            ) as bar,
            ThreadPool(min(options.concurrency, len(indices))) as pool,
        ):
            for index, result in pool.imap_unordered(ask, indices):
                if isinstance(result, tuple):
                    text, reason = result
                    metadata = {"endpoint": endpoint.url, "finish_reason": reason}
                    answers.write(
                        {index: entry(questions[index], text, model, metadata)}
                    )
                    in_a_row = 0
                    bar.update()
                elif isinstance(result, RefusedError):
                    refused.append(f"question {questions[index].id!r}: {result}")
                    in_a_row += 1
                    if in_a_row >= MOST_REFUSED:
                        raise EndpointError(
                            f"no answer to {in_a_row} requests in a row, last {refused[-1]}"
                        )
                else:
                    raise result
    except EndpointError as error:
        raise EndpointError(
            f"{error}; {len(answers.done())} of {len(questions)} answers are kept, "
            "rerun the same command to resume"
        ) from error
    finally:
        endpoint.stopped.set()
    return refused
