"""``llm2clip embed --dry-run``: the size it says is the size of what is written."""

import json
import re

import torch

from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.stages import embed
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.embed import embed_source
from llm2clip_plugin.text.encoder import CaptionEncoder


def test_the_size_is_that_of_the_tensors_written(llama, tmp_path, capsys):
    rows = [{"id": f"{n:03}", "image": "x.png", "caption": f"a dog {n}", "long_caption": "a cat"} for n in range(40)]
    data = tmp_path / "captions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert embed.main([str(data), "--llm", str(llama), "--dry-run"]) == 0
    told = capsys.readouterr().out
    width = CaptionEncoder(EncoderConfig(llm=str(llama), compute_dtype="float32"), device="cpu").width
    assert "40 samples, 80 captions to embed" in told and f"80 captions x {width}: " in told
    assert not list(tmp_path.glob("embeddings-*"))
    source = open_source(SourceConfig(path=str(data)))
    encoder = CaptionEncoder(EncoderConfig(llm=str(llama), compute_dtype="float32"), device=torch.device("cpu"))
    embed_source(source, encoder, tmp_path / "cache", quiet=True)
    file = next((tmp_path / "cache").glob("*.safetensors"))
    head = int.from_bytes(file.read_bytes()[:8], "little")
    written = file.stat().st_size - 8 - head - 16  # two tables have an entry more than there are samples
    assert float(re.search(r"float16 ([\d.]+) kB", told)[1]) == round(written / 1e3, 1)
