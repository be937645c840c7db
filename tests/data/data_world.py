"""Small data sets for the tests of this folder: photo-like images, tars with any members, a server
that drops."""

import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from chat_server import Failure
from PIL import Image
from tiny_data import encoded, made_up, write_tar

from llm2clip_plugin.contracts import TeacherIdentity

TEACHER = replace(made_up("tiny"), max_tokens=32, width=4)


class LengthEncoder:
    """Embeds a text as its length."""

    width = TEACHER.width
    count_truncated = 0
    config = SimpleNamespace(max_tokens=TEACHER.max_tokens)

    def identity(self) -> TeacherIdentity:
        return TEACHER

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return [[] for _ in texts]

    def encode(self, texts: list[str], **options: object) -> torch.Tensor:
        return torch.tensor(
            [[float(len(text))] * self.width for text in texts]
        ).reshape(-1, self.width)


def picture(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Colour gradients with a disc: smooth as photographs are, unlike for each seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    waves = [
        np.sin(
            x * rng.uniform(0.02, 0.2) + y * rng.uniform(0.02, 0.2) + rng.uniform(0, 6)
        )
        for _ in range(3)
    ]
    pixels = np.stack(waves, axis=-1) * 100 + 128
    radius = min(size) / 4
    pixels[(x - size[0] / 2) ** 2 + (y - size[1] / 2) ** 2 < radius**2] = rng.integers(
        0, 255, 3
    )
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(seed: int, size: tuple[int, int] = (64, 48)) -> bytes:
    return encoded(picture(seed, size), quality=95)


def img2dataset_members(first: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Samples as img2dataset writes them: .jpg, .txt and .json, the caption in both."""
    for number in range(first, first + count):
        key = f"{number:09d}"
        caption = f"picture number {number}"
        meta = {
            "caption": caption,
            "url": f"https://host/{number}.jpg",
            "key": key,
            "status": "success",
        }
        meta["long_caption"] = f"a longer text about the picture with number {number}"
        yield f"{key}.jpg", jpeg(number)
        yield f"{key}.json", json.dumps(meta).encode()
        yield f"{key}.txt", caption.encode()


def write_shards(folder: Path, counts: Iterable[int]) -> Path:
    first = 0
    for number, count in enumerate(counts):
        write_tar(folder / f"{number:05d}.tar", img2dataset_members(first, count))
        first += count
    return folder


class DroppingServer:
    """Serves files; closes the connection after ``drop_after`` bytes of an answer, ``drops``
    times."""

    def __init__(
        self,
        files: dict[str, bytes],
        *,
        drop_after: int = 0,
        drops: int = 0,
        ranges: bool = False,
    ) -> None:
        self.files = files
        self.drop_after = drop_after
        self.drops = drops
        self.ranges = ranges
        # the first requests are answered by these, one after another
        self.failures: list[Failure] = []
        self.asked = self.sent = 0  # requests, and bytes of contents
        self.lock = threading.Lock()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked += 1
        if self.failures:
            handler.close_connection = True
            self.failures.pop(0)(handler)
            return
        data = self.files.get(handler.path)
        if data is None:
            handler.send_error(404)
            return
        asked = handler.headers.get("Range", "") if self.ranges else ""
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            data = data[int(first) : int(last) + 1]
        handler.send_response(206 if asked else 200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        with self.lock:
            drop = self.drops > 0 and len(data) > self.drop_after
            self.drops -= drop
            part = data[: self.drop_after] if drop else data
            self.sent += len(part)
        handler.wfile.write(part)
        handler.wfile.flush()
        handler.close_connection = handler.close_connection or drop


@contextmanager
def serving(server: DroppingServer) -> Iterator[str]:
    """The address of ``server`` on loopback, on a free port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.answer(self)

        do_HEAD = do_GET

        def log_message(self, *words: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}"
    finally:
        http.shutdown()
        http.server_close()
