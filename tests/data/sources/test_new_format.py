"""A format of captioned images is one new file: it is listed, recognized, checked, embedded and trained on."""

import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from data_world import LengthEncoder, jpeg

from llm2clip_plugin.data import sources
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.loader import PairLoader
from llm2clip_plugin.data.pairs import PairDataset
from llm2clip_plugin.data.sources import SourceConfig, formats, open_source
from llm2clip_plugin.text.embed import embed_source

EXTENDING = (Path(__file__).parents[3] / "docs" / "extending.md").read_text(encoding="utf-8")
CSV = re.search(r'```python\n("""CSV .*?)```', EXTENDING, re.DOTALL)[1]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A .csv of four pictures, and the file that reads it in a folder of its own."""
    (tmp_path / "formats").mkdir()
    (tmp_path / "formats" / "csv_rows.py").write_text(CSV)
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(tmp_path / "formats")])
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    lines = ["id,image,caption", *(f'k{number},{number}.jpg,"a picture, number {number}"' for number in range(4))]
    (tmp_path / "pictures.csv").write_text("\n".join(lines))
    yield tmp_path / "pictures.csv"
    sys.modules.pop("llm2clip_plugin.data.sources.csv_rows", None)


def test_it_is_recognized_embedded_and_trained_on(table: Path) -> None:
    assert formats()["csv"].recognizes("https://host/x.csv?token=1")
    source = open_source(SourceConfig(path=str(table)))
    encoder: Any = LengthEncoder()
    manifest, _ = embed_source(source, encoder, table.parent / "cache", quiet=True)
    assert manifest is not None and manifest.captions == 4
    dataset = PairDataset([source], [EmbeddingCache.open(table.parent / "cache")], ImageConfig(size=16), seed=0)
    (batch,) = islice(PairLoader(dataset, local_batch=4, workers=1), 1)
    assert sorted(batch["keys"]) == ["k0", "k1", "k2", "k3"]
    assert batch["embeddings"][:, 0].tolist() == [float(len(caption)) for caption in batch["captions"]]
