"""An OpenAI-compatible server: the models it serves, and chat completions about an image.

Standard library only: LLaVA's environment has requests, that of training httpx, a plain installation not surely either.
"""

import http.client
import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from llm2clip_plugin.outside.pauses import seconds_of_retry_after
from llm2clip_plugin.outside.timeouts import TIMEOUT, timeout
from llm2clip_plugin.outside.values import printable

KEY = "OPENAI_API_KEY"  # environment variable, as OpenAI's client reads it
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
