"""Questions answered by a served model: several requests at a time, failed ones repeated, answers kept as they come."""

import base64
import http.client
import io
import itertools
import json
import os
import queue
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from llava_integration.answer.questions import KEY, AnswerConfig, AnswersFile, Question, entry
from llm2clip_plugin.console import progress_bar
from llm2clip_plugin.files import TIMEOUT, Retry, printable, seconds_of_retry_after, timeout

# An OpenAI-compatible server: the models it serves, and chat completions about an image.

PASSING = (408, 425, 429)  # and 5xx: HTTP statuses of errors that may pass


class EndpointError(ConnectionError):
    """The server cannot be used: wrong URL, no such model, access denied, gone."""


class PassingError(Exception):
    """A request failed, but may succeed later."""

    def __init__(self, reason: str, *, answered: bool, pause: float = 0.0) -> None:
        """``answered``: by HTTP, so a server is there; ``pause``: seconds that it wants to be left alone for."""
        super().__init__(reason)
        self.answered, self.pause = answered, pause


class RefusedError(Exception):
    """The server refuses this request; others may succeed."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A chat completion."""

    text: str
    finish_reason: str  # stop | length | ...


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """An entry of the server's list of models."""

    id: str
    root: str = ""  # the checkpoint's path or Hub id, where a server says it (vLLM, SGLang)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: urllib would send the key to the other host, and the question not at all."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Endpoint:
    """A server's URL, with the key and the time limit of its requests; may be used by several threads."""

    def __init__(self, url: str, *, timeout: float) -> None:
        """``url``: up to /v1, which is added to a host alone; ``timeout``: seconds that an answer may take.

        Raises ValueError for what is not such a URL, and for a key that no header can hold.
        """
        self.url, self.timeout = base_url(url), timeout
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        key = os.environ.get(KEY, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"{KEY} has characters that no API key has (line breaks, non-ASCII); set it again")
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._opener = urllib.request.build_opener(_NoRedirect)

    def models(self) -> list[ServedModel] | None:
        """The models that are served; None if the server has no list. Raises EndpointError if it is no such server."""
        try:
            rows = self._request("/models", limit=timeout(), option=TIMEOUT)["data"]
            return [ServedModel(id=row["id"], root=str(row.get("root") or "")) for row in rows]
        except PassingError as error:
            raise EndpointError(f"{error}; start the server, or correct --endpoint") from error
        except RefusedError:
            return None
        except (KeyError, TypeError, AttributeError):
            message = f"{self.url}/models is not the list of an OpenAI-compatible server; correct --endpoint"
            raise EndpointError(message) from None

    def choose(self, name: str) -> ServedModel:
        """The model of that name, or the only one if ``name`` is empty. Raises EndpointError with those served."""
        models = self.models()
        if models is None:  # some gateways have chat completions alone
            if not name:
                raise EndpointError(
                    f"{self.url} has no list of models; name one with --served-model-name, or correct --endpoint"
                )
            return ServedModel(id=name)
        chosen = [model for model in models if name in ("", model.id)]
        if len(chosen) != 1:
            shown = ", ".join(model.id for model in models[:20])
            does = f"does not serve {name!r}" if name else f"serves {len(models)} models"
            raise EndpointError(f"{self.url} {does}; choose one with --served-model-name: {shown}")
        return chosen[0]

    def chat(self, body: dict[str, Any]) -> Reply:
        """A chat completion, as text. Raises EndpointError, PassingError or RefusedError."""
        answer = self._request("/chat/completions", body, limit=self.timeout, option="--timeout")
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            reason = f"{self.url}: an answer without choices[0].message.content: {_short(answer)}"
            raise PassingError(reason, answered=True) from None
        if not isinstance(text, str):
            raise RefusedError(
                f"the answer has no text (content: {_short(text)}, {_short(choice.get('finish_reason'))})"
            )
        return Reply(text=text.strip(), finish_reason=str(choice.get("finish_reason") or ""))

    def _request(self, path: str, body: dict[str, Any] | None = None, *, limit: float, option: str) -> Any:
        """The JSON value that the server answers with; ``limit`` in seconds, set by ``option``."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=self._headers)
        try:
            with self._opener.open(request, timeout=limit) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            with error:
                raise self._status_error(error, path) from None
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)  # of a URLError
            if isinstance(cause, TimeoutError):
                raise PassingError(
                    f"{self.url}: no answer within {limit:g} s ({option}); the server is overloaded or stalled",
                    answered=False,
                ) from error
            reason = f"{type(cause).__name__}: {cause}" if isinstance(cause, Exception) else str(cause)
            raise PassingError(f"{self.url}: {printable(reason)}", answered=False) from error
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            reason = f"{self.url}{path}: the answer is not JSON: {_short(text)}"
            raise PassingError(reason, answered=True) from None

    def _status_error(self, error: urllib.error.HTTPError, path: str) -> Exception:
        """What to raise for an HTTP status that is not 200."""
        status, reply = error.code, f"HTTP {error.code}: {_error_text(error)}"
        if status in PASSING or status >= 500:
            pause = seconds_of_retry_after(error.headers.get("Retry-After") or "")
            return PassingError(f"{self.url}: {reply}", answered=True, pause=pause)
        if 300 <= status < 400:
            return EndpointError(
                f"{self.url} redirects to {printable(error.headers.get('Location') or '?')}; pass that"
            )
        if status in (401, 403):
            return EndpointError(f"{self.url} denies access ({reply}); set {KEY} to a key of this server")
        if path == "/models":
            return RefusedError(reply)
        if status in (404, 405):
            return EndpointError(
                f"{self.url}{path} does not exist ({reply}); correct --endpoint or --served-model-name"
            )
        return RefusedError(reply)


def base_url(url: str) -> str:
    """The part of a server's URL that the API's paths follow: http://host:8000 -> http://host:8000/v1."""
    parts = urlsplit(url)
    if parts.username or parts.password:
        raise ValueError(f"--endpoint must not contain a user or password; set {KEY} instead")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"--endpoint {url!r} is not a server's URL; expected one like http://localhost:8000/v1")
    path = parts.path.rstrip("/").removesuffix("/chat/completions").removesuffix("/models")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def _error_text(error: urllib.error.HTTPError) -> str:
    """What a server says about an error: OpenAI's ``error.message``, FastAPI's ``detail``, or its first words."""
    try:
        raw = error.read(1 << 16)
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        body = json.loads(raw)
        inner = body.get("error", body)
        return _short(inner.get("message") or inner.get("detail") or raw)
    except (ValueError, AttributeError):
        return _short(raw or error.reason)


def _short(value: Any) -> str:
    """The beginning of a text or JSON value, without control characters."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    text = text if isinstance(text, str) else json.dumps(text)
    return printable(" ".join(text.split())[:300])


MOST_REFUSED = 10  # requests refused one after another, then the run stops: it is not about single questions
SILENCE = 30.0  # seconds between two messages about retries
ORIENTATION = 0x0112  # EXIF tag, which some servers apply and LLaVA does not


def chat_body(question: Question, image_folder: str) -> dict[str, Any]:
    """The message of a question: image, then text, as in LLaVA's prompts; the server applies the chat template."""
    content: Any = question.text
    if question.image:
        url = image_url(question, image_folder)
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.text}]
    return {"messages": [{"role": "user", "content": content}]}


def image_url(question: Question, folder: str) -> str:
    """The image as a data URL: the file's bytes if any reader sees in them what LLaVA sees, otherwise a PNG.

    A server may rotate by EXIF or put transparent images on white, which LLaVA does not.
    """
    image = question.open_image(folder)
    raw = base64.b64decode(question.image) if question.embedded else (Path(folder) / question.image).read_bytes()
    with Image.open(io.BytesIO(raw)) as source:
        kind, plain = source.format, source.mode == "RGB" and source.getexif().get(ORIENTATION, 1) == 1
    if kind not in ("JPEG", "PNG") or not plain:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        raw, kind = buffer.getvalue(), "PNG"
    return f"data:image/{kind.lower()};base64,{base64.b64encode(raw).decode()}"


class Requests:
    """Threads that ask the server; their results in the order in which they come."""

    def __init__(
        self, endpoint: Endpoint, options: AnswerConfig, request: dict[str, Any], questions: list[Question]
    ) -> None:
        """``options``: of ``llava evaluate``; ``request``: model, temperature and what else all requests have."""
        self.endpoint, self.options, self.request, self.questions = endpoint, options, request, questions
        self.todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.results: queue.SimpleQueue[tuple[int, Reply | Exception]] = queue.SimpleQueue()
        self.stopped = threading.Event()
        self.answered = 0  # questions
        self._reported = -SILENCE  # time of the last message about a retry

    def start(self, indices: list[int]) -> None:
        """Ask these questions, in threads; daemons, since an interrupted run does not wait for a server."""
        for index in indices:
            self.todo.put(index)
        for _ in range(min(self.options.concurrency, len(indices))):
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while not self.stopped.is_set():
            try:
                index = self.todo.get_nowait()
            except queue.Empty:
                return
            try:
                result: Reply | Exception = self._ask(self.questions[index])
            except (RefusedError, PassingError) as error:  # of this question
                result = error
            except Exception as error:  # of all of them; raised again in the main thread
                result = error
                self.stopped.set()
            self.results.put((index, result))

    def _ask(self, question: Question) -> Reply:
        body = {**self.request, **chat_body(question, self.options.image_folder)}
        retry, before = Retry(tries=self.options.retries + 1, first_pause=1.0), self.answered
        for failures in itertools.count(1):
            try:
                reply = self.endpoint.chat(body)
                self.answered += 1  # threads may lose a count, never all
                return reply
            except PassingError as error:
                if failures >= retry.tries or self.stopped.is_set():
                    if not error.answered and self.answered == before:
                        reason = f"{error}; {failures} attempts failed, and no question succeeded"
                        raise EndpointError(reason) from error
                    raise
                pause = max(retry.pause(failures), error.pause)
                self._report(f"{error}; retrying in {pause:.1f} s ({failures} of {retry.tries - 1})")
                self.stopped.wait(pause)
        raise AssertionError("unreachable")

    def _report(self, text: str) -> None:
        """Print the first retry, then one now and then: all threads fail together."""
        now = time.monotonic()
        if now - self._reported >= SILENCE:
            self._reported = now
            print(text, file=sys.stderr)


def answer_served(
    endpoint: Endpoint,
    model: str,
    options: AnswerConfig,
    questions: list[Question],
    indices: list[int],
    answers: AnswersFile,
) -> list[str]:
    """Ask the questions of these indices and write each answer as it comes; returns a line for each question refused.

    ``model``: its name on the server. Raises EndpointError if the server is gone or refuses request after request; the
    answers until then are written.
    """
    request = {"model": model, "temperature": options.temperature, "max_tokens": options.max_new_tokens}
    if options.top_p is not None:
        request["top_p"] = options.top_p
    requests = Requests(endpoint, options, request, questions)
    refused: list[str] = []
    in_a_row = 0
    done = len(questions) - len(indices)
    print(f"asking {model!r} at {endpoint.url}: {len(indices)} questions, {done} answered before", file=sys.stderr)
    requests.start(indices)
    try:
        with progress_bar(total=len(questions), initial=done, label="answers", unit="questions") as bar:
            for _ in indices:
                index, result = requests.results.get()
                if isinstance(result, Reply):
                    metadata = {"endpoint": endpoint.url, "finish_reason": result.finish_reason}
                    answers.write({index: entry(questions[index], result.text, model, metadata)})
                    in_a_row = 0
                    bar.update()
                elif isinstance(result, (RefusedError, PassingError)):
                    refused.append(f"question {questions[index].id!r}: {result}")
                    in_a_row += 1
                    if in_a_row >= MOST_REFUSED:
                        raise EndpointError(f"no answer to {in_a_row} requests in a row, last {refused[-1]}")
                else:
                    raise result
    except EndpointError as error:
        kept = f"{len(answers.done())} of {len(questions)} answers are kept, rerun the same command to resume"
        raise EndpointError(f"{error}; {kept}") from error
    finally:
        requests.stopped.set()
    return refused
