"""docs/embeddings.md: its programs run as printed, on tiny models; its endpoint reaches no file and
no private address."""

import base64
import importlib.util
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from embedder_world import CAPTIONS, opened, pictures, png, write_dual
from PIL import Image
from tiny_llm import save_tiny_llm

from llm2clip_plugin.stages.embedder import export_dual

pytest.importorskip("sentence_transformers", minversion="6")
PAGE = (Path(__file__).parents[2] / "docs" / "embeddings.md").read_text(
    encoding="utf-8"
)
FIRST = "How do I embed pictures and texts elsewhere?"


def program(heading: str) -> str:
    """The first program below a heading of the page."""
    section = PAGE.partition(f"# {heading}\n")[2]
    return section.partition("```python\n")[2].partition("```")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the page's programs find what they name."""
    root = tmp_path_factory.mktemp("page")
    llm = save_tiny_llm(root / "llm", "llama")
    export_dual(write_dual(root, llm), root / "out" / "l14-336", merge=True)
    (root / "photos").mkdir()
    for number, picture in enumerate(pictures()):
        picture.save(root / "photos" / f"{number}.jpg")
    pictures()[0].save(root / "photo.jpg")
    return root


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_the_first_program(capsys):
    exec(compile(program(FIRST), "docs/embeddings.md", "exec"), {})
    assert "tensor" in capsys.readouterr().out


def test_classification(capsys):
    exec(
        compile(
            program("Classification without training"), "docs/embeddings.md", "exec"
        ),
        {},
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["photos/1.jpg", "photos/2.jpg"]
    assert {line.split()[1] for line in lines} <= {"cat", "dog", "bird"}


@pytest.fixture(scope="module")
def server(folder):
    """The endpoint's module."""
    os.environ["MODEL"] = str(folder / "out" / "l14-336")
    most_pixels = Image.MAX_IMAGE_PIXELS
    path = folder / "serve_embeddings.py"
    path.write_text(program("An endpoint"), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("serve_embeddings", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_embeddings"] = module
    spec.loader.exec_module(module)
    yield module
    Image.MAX_IMAGE_PIXELS = most_pixels
    del os.environ["MODEL"], sys.modules["serve_embeddings"]


@pytest.fixture(scope="module")
def client(server):
    from starlette.testclient import TestClient

    return TestClient(server.app)


def as_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def post(client, given, **more):
    return client.post("/v1/embeddings", json={"input": given, **more})


def test_the_endpoint_embeds(client, folder):
    """Texts and pictures of one request, as floats and as base64; a path is a text."""
    assert client.get("/health").json() == {"status": "ok"}
    path = str(folder / "photo.jpg")
    given = [
        CAPTIONS[0],
        {"image": as_url(png(pictures()[1]))},
        {"text": CAPTIONS[1]},
        path,
    ]
    answer = post(client, given).json()
    rows = np.array([entry["embedding"] for entry in answer["data"]])
    model = opened(folder / "out" / "l14-336")
    inputs = [CAPTIONS[0], pictures()[1], CAPTIONS[1], {"text": path}]
    assert np.abs(rows - model.encode(inputs)).max() < 1e-5
    # which is the picture
    assert np.abs(rows[3] - model.encode([path])[0]).max() > 1e-3
    encoded = post(client, given, encoding_format="base64").json()["data"][1][
        "embedding"
    ]
    assert np.allclose(
        np.frombuffer(base64.b64decode(encoded), np.float32), rows[1], atol=1e-6
    )


REFUSED = {
    "a file": ({"image": "file:///etc/passwd"}, 400, "http"),
    "a path": ({"image": "/etc/passwd"}, 400, "http"),
    "this machine": ({"image": "http://127.0.0.1/x.png"}, 400, "not a public address"),
    "this machine's name": (
        {"image": "http://localhost:80/x.png"},
        400,
        "not a public address",
    ),
    "metadata of a cloud": (
        {"image": "http://169.254.169.254/x.png"},
        400,
        "not a public",
    ),
    "a private net": ({"image": "http://10.0.0.1/x.png"}, 400, "not a public address"),
    "mapped": (
        {"image": "http://[::ffff:127.0.0.1]/x.png"},
        400,
        "not a public address",
    ),
    "a number": ({"image": "http://2130706433/x.png"}, 400, "not a public address"),
    "damaged base64": ({"image": "data:image/png;base64,@@"}, 400, "base64 is damaged"),
    "damaged": ({"image": as_url(b"nothing")}, 400, "cannot be read as a picture"),
    "many pixels": (
        {"image": as_url(png(Image.new("1", (6000, 5000))))},
        400,
        "exceeds limit",
    ),
    "a blank text": ("  ", 400, "not blank"),
    "a long text": ("a" * 100_000, 413, "characters"),
    "nothing": ([], 413, "expected 1 to"),
    "many": (["a"] * 1000, 413, "expected 1 to"),
}


@pytest.mark.parametrize(("given", "status", "problem"), REFUSED.values(), ids=REFUSED)
def test_the_endpoint_refuses(given, status, problem, client):
    answer = post(client, given)
    assert answer.status_code == status
    assert problem in answer.json()["detail"]


def test_a_large_request_is_not_read(client, server, monkeypatch):
    monkeypatch.setattr(server, "MOST_BYTES", 1000)
    assert post(client, "a" * 2000).status_code == 413


def test_the_address_that_was_checked_is_the_one_that_is_connected_to(
    client, server, monkeypatch
):
    """A name that is public first and private afterwards: nothing resolves it again."""
    asked = []

    def resolve(host, *_, **__):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 80))]

    monkeypatch.setattr(server.socket, "getaddrinfo", resolve)
    sent = []

    def answer(request):
        sent.append(request)
        return server.httpx.Response(200, content=png(pictures()[0]))

    client_of = server.httpx.Client
    transport = server.httpx.MockTransport(answer)
    monkeypatch.setattr(
        server.httpx,
        "Client",
        lambda **options: client_of(transport=transport, **options),
    )
    assert post(client, {"image": "https://pictures.example/x.png"}).status_code == 200
    assert asked == ["pictures.example"]
    (request,) = sent
    assert request.url.host == "93.184.216.34"
    assert request.headers["host"] == "pictures.example"
    assert request.extensions["sni_hostname"] == "pictures.example"
