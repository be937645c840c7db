"""A Hub that accepts and never answers ends every command that asks it within the timeout, with one
message."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ASK = """
import json, sys
from llava_integration.plug.towers import locate, locate_bundled
from llm2clip_plugin.text.encoder import local_folder
from llm2clip_plugin.vision.directory import fetch_directory

said = {}
for function, argument in (
    (fetch_directory, "someone/tower"),
    (locate, "llm2clip:someone/tower"),
    (lambda checkpoint: locate_bundled(checkpoint, ""), "someone/llava"),
    (local_folder, "someone/llm"),
):
    try:
        function(argument)
    except (ValueError, OSError) as error:
        said[f"{function.__name__} {argument} {len(said)}"] = str(error)
print(json.dumps(said))
"""


def test_a_silent_hub_is_told_within_the_timeout(tmp_path: Path):
    taken = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(
            target=lambda: [taken.append(server.accept()) for _ in range(100)],
            daemon=True,
        ).start()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        hub = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
            "LLM2CLIP_TIMEOUT": "0.2",
        }
        started = time.monotonic()
        options = {"env": {**os.environ, **hub}, "timeout": 240}
        done = subprocess.run(
            [sys.executable, "-c", ASK], **options, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert len(said) == 4
    expected = f"the Hugging Face Hub ({endpoint}) has not answered for 0.2 s (LLM2CLIP_TIMEOUT)"
    assert all(expected in text for text in said.values()), said
    assert time.monotonic() - started < 200
