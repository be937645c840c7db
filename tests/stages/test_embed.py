"""``llm2clip embed``: whole caches, shared by ranks, resumed, verified, and its report."""

import json
import time
from pathlib import Path

import pytest
import torch
from forked import Command, run_command
from tiny_data import write_tar
from torch._dynamo.utils import counters
from tower_runs import ROOT, environment, finish, start

from llm2clip_plugin.cli import main
from llm2clip_plugin.contracts import CacheManifest
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.samples import Caption
from llm2clip_plugin.data.sources import Shard, SourceConfig, open_source
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.stages.embed import open_all
from llm2clip_plugin.stages.embed_config import EMBED
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.embed import embed_source, shards_of_rank
from llm2clip_plugin.text.encoder import CaptionEncoder

WORDS = "a red bicycle leans against the brick wall of an old house near two sleeping dogs".split()


def write_tars(folder: Path, shards: int, samples: int) -> SourceConfig:
    """WebDataset tars with a short and a long caption each; the images are never read here."""
    for shard in range(shards):
        members = []
        for number in range(shard * samples, (shard + 1) * samples):
            words = [*WORDS[number % 7 : number % 7 + 1 + number % 5], str(number)]
            captions = {
                "caption": " ".join(words),
                "long_caption": " ".join(WORDS + words),
            }
            members += [
                (f"{number:06}.png", b"no picture"),
                (f"{number:06}.json", json.dumps(captions).encode()),
            ]
        write_tar(folder / f"{shard:05}.tar", members)
    return SourceConfig(path=str(folder))


@pytest.fixture(scope="module")
def teacher(llama: Path) -> CaptionEncoder:
    return CaptionEncoder(
        EncoderConfig(llm=str(llama), compute_dtype="float32"), device="cpu"
    )


def test_cache_holds_what_the_encoder_gives(
    teacher: CaptionEncoder, tmp_path: Path
) -> None:
    source = open_source(write_tars(tmp_path / "data", 3, 8))
    manifest, summary = embed_source(source, teacher, tmp_path / "cache", quiet=True)
    assert manifest is not None
    assert manifest.complete
    assert manifest.captions == summary.captions == 48
    cache = EmbeddingCache.open(
        tmp_path / "cache", expect_fingerprint=teacher.identity().fingerprint
    )
    cache.check(source)
    for number in (0, 9, 23):
        _, captions = source.captions(number)
        alone = torch.cat([teacher.encode([caption.text]) for caption in captions])
        stored = cache.rows(*source.locate(number), captions)
        # float16's 11 bits
        assert torch.nn.functional.cosine_similarity(stored, alone).min() > 0.99999


def test_compiled_it_embeds_the_same(
    llama: Path, tmp_path: Path, graphs: list[int]
) -> None:
    """Batches of any length and size are one graph; a batch of one caption is another."""
    source = open_source(write_tars(tmp_path / "data", 2, 12))
    embeddings = []
    for more in ((), ("--torch-compile",)):
        config = EMBED.parse(
            [source.path, "--llm", str(llama), "--compute-dtype", "float32", *more]
        )
        encoder = open_all(config)[1]
        texts = [
            caption.text
            for number in range(24)
            for caption in source.captions(number)[1]
        ]
        embeddings.append(encoder.encode(texts, tokens_per_batch=200))
    graphs_of_all = counters["stats"]["unique_graphs"]
    torch.testing.assert_close(*embeddings, atol=1e-5, rtol=1e-5)
    assert 0 < graphs_of_all <= 2
    encoder.encode(["two dogs", *texts], tokens_per_batch=300)
    assert counters["stats"]["unique_graphs"] == graphs_of_all


def test_ranks_share_the_shards_and_the_last_writes_the_manifest(
    teacher: CaptionEncoder, tmp_path: Path
) -> None:
    source = open_source(write_tars(tmp_path / "data", 5, 4))
    whole, _ = embed_source(source, teacher, tmp_path / "one", quiet=True)
    first, summary0 = embed_source(
        source, teacher, tmp_path / "two", rank=1, world=2, quiet=True
    )
    assert first is None
    with pytest.raises(ContractError, match="incomplete"):
        EmbeddingCache.open(tmp_path / "two")
    second, summary1 = embed_source(
        source, teacher, tmp_path / "two", rank=0, world=2, quiet=True
    )
    assert second == whole
    assert summary0.shards + summary1.shards == 5


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_share_gives_each_shard_to_one_rank_evenly(world: int) -> None:
    shards = [
        Shard(f"{i}", size, 0)
        for i, size in enumerate([900, 100, 500, 500, 20, 300, 300])
    ]
    shares = [shards_of_rank(shards, rank, world) for rank in range(world)]
    assert sorted(shard.name for part in shares for shard in part) == sorted(
        shard.name for shard in shards
    )
    total = sum(shard.size for shard in shards)
    for share in shares:
        assert sum(shard.size for shard in share) <= total / world + 900


def test_second_run_embeds_only_incomplete_shards(
    teacher: CaptionEncoder, tmp_path: Path
) -> None:
    source = open_source(write_tars(tmp_path / "data", 4, 4))
    embed_source(source, teacher, tmp_path / "cache", quiet=True)
    files = sorted((tmp_path / "cache").glob("*.safetensors"))
    before = {path.name: path.read_bytes() for path in files}
    files[0].unlink()
    files[1].write_bytes(before[files[1].name][:-7])
    manifest, summary = embed_source(source, teacher, tmp_path / "cache", quiet=True)
    assert summary.shards == 2
    assert summary.skipped == 2
    assert manifest is not None
    assert {path.name: path.read_bytes() for path in files} == before


def test_changed_captions_are_embedded_again(
    teacher: CaptionEncoder, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    write_tars(folder, 2, 4)
    embed_source(
        open_source(SourceConfig(path=str(folder))),
        teacher,
        tmp_path / "cache",
        quiet=True,
    )
    write_tars(tmp_path / "other", 1, 5)
    (tmp_path / "other" / "00000.tar").replace(folder / "00001.tar")
    changed = open_source(SourceConfig(path=str(folder)))
    with pytest.raises(ContractError, match="5 samples"):
        EmbeddingCache.open(tmp_path / "cache").check(changed)
    _, summary = embed_source(changed, teacher, tmp_path / "cache", quiet=True)
    assert summary.shards == 1
    assert summary.skipped == 1
    EmbeddingCache.open(tmp_path / "cache").check(changed)


def test_command_embeds_reports_and_verifies(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    texts = {"long": "boat " * 10_000, "empty": "  ", "plain": "a boat"}
    rows = [
        {"id": name, "image": f"{name}.png", "caption": text}
        for name, text in texts.items()
    ]
    (data / "pairs.jsonl").write_text("\n".join([*map(json.dumps, rows), "{no JSON"]))
    command = [
        "embed",
        str(data / "pairs.jsonl"),
        "--llm",
        str(llama),
        "--max-tokens",
        "32",
        "--dtype",
        "int8",
    ]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "1 captions truncated to 32 tokens" in said
    assert "2 samples without a readable caption, such as empty, line 4" in said
    (directory,) = data.glob("embeddings-*")
    assert (
        CacheManifest.read(directory / "manifest.json").shards["pairs"]["truncated"]
        == 1
    )
    assert EmbeddingCache.open(directory).rows(
        "pairs", 2, [Caption("a boat")]
    ).shape == (1, 32)
    assert main([*command, "--verify"]) == 0
    assert "is complete: 1 shards, 2 captions, 32 wide, int8" in capsys.readouterr().out


def words(data: Path, llm: Path, cache: Path) -> list[str]:
    return [
        str(data),
        "--llm",
        str(llm),
        "--cache",
        str(cache),
        "--compute-dtype",
        "float32",
    ]


def test_two_processes_killed_and_started_again(llama: Path, tmp_path: Path) -> None:
    """Ranks killed once some shards are there; the second start ends with the cache of an
    undisturbed run."""
    source = open_source(write_tars(tmp_path / "data", 24, 12))
    command = ["embed", *words(tmp_path / "data", llama, tmp_path / "cache")]
    variables_of_ranks = [
        environment(RANK=str(rank), WORLD_SIZE="2") for rank in range(2)
    ]
    ranks = [Command(command, variables, ROOT) for variables in variables_of_ranks]
    deadline = time.monotonic() + 300
    while (
        len(list((tmp_path / "cache").glob("*.safetensors"))) < 3
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    for process in ranks:
        process.kill()
        process.wait()
    done = len(list((tmp_path / "cache").glob("*.safetensors")))
    assert done >= 3
    if done < 24:
        with pytest.raises(ContractError, match="incomplete"):
            EmbeddingCache.open(tmp_path / "cache")
    ranks = [Command(command, variables, ROOT) for variables in variables_of_ranks]
    assert finish(ranks) == [0, 0], ranks[0].output
    alone = ["embed", *words(tmp_path / "data", llama, tmp_path / "undisturbed")]
    # with as many threads, which decide the last bit
    assert run_command(alone, environment(), ROOT)[0] == 0
    cache = EmbeddingCache.open(tmp_path / "cache")
    cache.check(source)
    cache.verify()
    assert cache.manifest == EmbeddingCache.open(tmp_path / "undisturbed").manifest


LATE = """
import os, sys, time
from llm2clip_plugin.cli import leave, run
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.train import guard
guard.STRAGGLER_SECONDS, encode = 1.0, CaptionEncoder.encode

def late(self, *arguments, **options):
    if os.environ["RANK"] == "1":
        CaptionEncoder.encode = encode
        time.sleep(5)
    return encode(self, *arguments, **options)

CaptionEncoder.encode = late
leave(run("embed", sys.argv[1:]))
"""


def test_a_late_rank_is_named_and_none_leaves_before_it(
    llama: Path, tmp_path: Path
) -> None:
    source = open_source(write_tars(tmp_path / "data", 4, 3))
    (tmp_path / "late.py").write_text(LATE)
    ranks = start(
        words(tmp_path / "data", llama, tmp_path / "cache"), 2, tmp_path / "late.py"
    )
    statuses = finish(ranks)
    said = "".join(rank.output for rank in ranks)
    assert statuses == [0, 0], said
    assert "late: rank 1 (" in said, said
    assert "has been in phase embedding for" in said, said
    assert "time.sleep(5)" in said, said
    assert "rank 0: its shards are complete; other ranks are still embedding" in said
    EmbeddingCache.open(tmp_path / "cache").check(source)
