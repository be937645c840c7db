"""An OpenAI-compatible server in this process, which answers by what it sees and fails as often as
it is told to."""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

Failure = Callable[[BaseHTTPRequestHandler], None]


def sees(text: str, image: Image.Image | None) -> str:
    """The answer of the tests' model: it depends on every pixel and on the question."""
    if image is None:
        return f"no image, {text}"
    pixels = np.asarray(image, dtype=np.int64)
    weights = np.arange(1, pixels.size + 1).reshape(pixels.shape)
    return (
        f"{image.width}x{image.height} {(pixels * weights).sum() % 1_000_003}, {text}"
    )


class ChatServer:
    """State of the server: what it was asked, and what it does next."""

    def __init__(self, models: list[str], *, key: str = "") -> None:
        self.models = models
        self.key = key
        self.root = "/models"  # folder of the models
        self.failures: list[Failure] = []  # of the next chat requests, in order
        self.bodies: list[dict] = []  # of all chat requests
        self.answered = 0
        self.dies_after = -1  # answers, then every connection is closed without a word
        self.refuses = ""  # HTTP 400 to questions with this word
        self.in_flight = self.most_in_flight = 0
        self.gather = 1  # requests that must be there before the first one is answered
        self.arrived = threading.Condition()

    def reply(self, body: dict) -> dict:
        (message,) = body["messages"]
        parts = message["content"]
        if isinstance(parts, str):
            text = parts
            image = None
        else:
            # in LLaVA's order
            assert [part["type"] for part in parts] == [
                "image_url",
                "text",
            ]
            head, _, data = parts[0]["image_url"]["url"].partition(",")
            assert head in ("data:image/png;base64", "data:image/jpeg;base64"), head
            text = parts[1]["text"]
            image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            assert image.mode == "RGB"
            assert image.getexif().get(0x0112, 1) == 1
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": f" {sees(text, image)}\n"},
        }
        return {
            "choices": [{**choice, "finish_reason": "stop"}],
            "model": body["model"],
        }


def send(
    handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str
) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def status(code: int, message: str = "", **headers: str) -> Failure:
    """An error as OpenAI's API sends it."""
    body = json.dumps(
        {"error": {"message": message or f"status {code}", "type": "x"}}
    ).encode()
    return lambda handler: send(handler, code, body, **headers)


def raw(body: bytes, size: int = 0) -> Failure:
    """HTTP 200 with this body, of which ``size`` bytes are announced."""

    def fail(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(size or len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return fail


def close(handler: BaseHTTPRequestHandler) -> None:
    """The connection ends without an answer."""
    handler.close_connection = True


def stall(handler: BaseHTTPRequestHandler) -> None:
    """Nothing is sent until the client has lost patience."""
    handler.connection.settimeout(20)
    handler.connection.recv(1)  # b"" once the client closes the connection
    handler.close_connection = True


@contextmanager
def serving(state: ChatServer) -> Iterator[str]:
    """The server's URL while it runs; its port is closed afterwards."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            if state.key and self.headers.get("Authorization") != f"Bearer {state.key}":
                return status(401, "wrong key")(self)
            if self.path != "/v1/models":
                return status(404)(self)
            data = [
                {"id": name, "object": "model", "root": f"{state.root}/{name}"}
                for name in state.models
            ]
            return send(
                self, 200, json.dumps({"object": "list", "data": data}).encode()
            )

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions", self.path
            with state.arrived:
                state.in_flight += 1
                state.most_in_flight = max(state.in_flight, state.most_in_flight)
                state.bodies.append(body)
                state.arrived.notify_all()
                state.arrived.wait_for(
                    lambda: state.most_in_flight >= state.gather, timeout=20
                )
                failure = state.failures.pop(0) if state.failures else None
                dead = state.answered == state.dies_after
                refused = state.refuses and state.refuses in json.dumps(
                    body["messages"]
                )
                state.answered += not (failure or dead or refused)
                answer = (
                    b""
                    if failure or dead or refused
                    else json.dumps(state.reply(body)).encode()
                )
                # before the client has its answer and sends the next request
                state.in_flight -= 1
            if failure or dead:
                return (failure or close)(self)
            if refused:
                return status(400, f"cannot read {state.refuses}")(self)
            return send(self, 200, answer)

    class Server(ThreadingHTTPServer):
        # with the default, 5, a client waits a second for the sixth connection
        request_queue_size = 64

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
