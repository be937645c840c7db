"""The part of the Hugging Face Hub's interface that an upload uses, on this machine, and its local
cache."""

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants
import pytest

TOKEN = "hf_test"


class TinyHub(http.server.BaseHTTPRequestHandler):
    """Accepts TOKEN; takes ``.safetensors`` as the Hub takes large files (LFS), other files within
    the commit."""

    address: str
    files: dict[str, bytes]  # of the last commit
    blobs: dict[str, bytes]
    calls: list[tuple[str, str | None]]  # path, authorization
    created: list[dict]  # what repositories were asked for
    # "": all works; "lfs": refuses the weights; "blobs": breaks off when they are sent; "commit"
    broken: str

    def do_POST(self) -> None:
        self.calls.append((self.path, self.headers.get("authorization")))
        body = self._body()
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, status=401)
        elif self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            mode = {True: "lfs", False: "regular"}
            files = [
                {
                    "path": n,
                    "uploadMode": mode[n.endswith(".safetensors")],
                    "shouldIgnore": False,
                }
                for n in names
            ]
            self._answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            if self.broken == "lfs":
                full = {"code": 507, "message": "storage is full"}
                self._answer(
                    {
                        "transfer": "basic",
                        "objects": [{**o, "error": full} for o in asked],
                    }
                )
                return
            objects = [
                {
                    **o,
                    "actions": {"upload": {"href": f"{self.address}/blobs/{o['oid']}"}},
                }
                for o in asked
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path and self.broken == "commit":
            self._answer({"error": "storage is full"}, status=403)
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    self.files[value["path"]] = self.blobs[value["oid"]]
            url = f"{self.address}/o/n/commit/1"
            self._answer(
                {
                    "commitUrl": url,
                    "commitOid": "1",
                    "pullRequestUrl": None,
                    "success": True,
                }
            )
        else:
            if self.path == "/api/repos/create":
                self.created.append(json.loads(body))
            self._answer({"url": f"{self.address}/o/n", "name": "o/n", "id": "1"})

    def do_PUT(self) -> None:
        body = self._body()
        if self.broken == "blobs":
            self._answer({"error": "storage is full"}, status=403)
            return
        self.blobs[self.path.rpartition("/")[2]] = body
        self._answer({})

    def do_GET(self) -> None:
        self._answer({"id": "o/n", "siblings": [], "sha": "0"})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def _answer(self, body: dict, *, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def tiny_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[TinyHub]]:
    """A hub that huggingface_hub talks to with TOKEN; what it received is in the class's
    attributes."""
    import huggingface_hub.constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # LFS, the other way of large files
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    handler = type(
        "Handler",
        (TinyHub,),
        {"files": {}, "blobs": {}, "calls": [], "created": [], "broken": ""},
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", handler.address)
    yield handler
    server.shutdown()


def cached_repository(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    files: Path,
    commit: str,
    branches: tuple[str, ...],
) -> None:
    """A repository in the local cache, laid out as the client writes it, without a network."""
    cache = folder / "hub"
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "snapshots" / commit).symlink_to(files)
    for branch in branches:
        (repository / "refs" / branch).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
