"""What a start costs: opening a source of many shards and its embedding cache, the first time and later.

``real``: tiny tars, which are indexed and whose captions are compared. ``large``: indexes, digests and cache files as
1,500 shards of 10,000 samples have them, but tars and embeddings that are holes in their files; only a later start can
be measured on those. Each start is a process of its own. Prints Markdown.

    python scripts/bench_start.py --shards 1500 --samples 10000 --real-samples 100
    python scripts/bench_start.py --real-shards 200 20000 --real-samples 1 --skip-large
"""

import io
import multiprocessing
import os
import resource
import shutil
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import tyro
from bench import in_new_process, peak_growth
from PIL import Image

from llm2clip_plugin.console import raise_open_files, track
from llm2clip_plugin.contracts import TeacherIdentity
from llm2clip_plugin.data.cache import CacheWriter, EmbeddingCache, caption_rows, keep_digests, shard_captions
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.index import ABSENT, Entry
from llm2clip_plugin.data.loader import make_loader
from llm2clip_plugin.data.pairs import PairDataset
from llm2clip_plugin.data.sources.base import Source, SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.data.sources.tar_index import index_path, save_index

TEACHER = TeacherIdentity(
    llm="none", revision="", weights_sha256="0" * 64, adapter_sha256="", attention="causal", pooling="mean",
    layer=-1, prompt="", chat_template="", max_tokens=64, width=8,
)  # fmt: skip
BYTES = 100_000  # of a sample in a tar of ``large``


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Seconds, bytes read, memory, open files and maps of a start."""

    shards: int = 1500  # of ``large``
    samples: int = 10_000  # of each
    real_shards: tuple[int, ...] = (200, 1500)  # of ``real``
    real_samples: int = 20  # of each
    folder: str = ""  # for the files; "": a temporary one
    skip_large: bool = False
    skip_real: bool = False
    use: int = 2000  # samples of ``real`` that are read through the loader after the start


@dataclass(frozen=True)
class Cost:
    """Of one start."""

    seconds: float
    cpu: float
    read: int  # bytes, by all calls of this process, from disk or memory
    peak: int  # bytes of memory above the start of the process's work
    descriptors: int
    maps: int

    def row(self, name: str) -> str:
        cells = (f"{self.seconds:.2f}", f"{self.cpu:.2f}", f"{self.read / 1e6:.1f}", f"{self.peak / 1e6:.0f}")
        return f"| {name} | {' | '.join(cells)} | {self.descriptors} | {self.maps} |"


def main(config: BenchConfig) -> None:
    raise_open_files()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    print(f"{len(os.sched_getaffinity(0))} cores, at most {limit} open files in a process\n")
    print("| start | seconds | CPU seconds | MB read | MB of memory | open files | maps |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=config.folder or None) as name:
        for count in () if config.skip_real else config.real_shards:
            measure_real(Path(name) / f"real-{count}", count, config)
        if not config.skip_large:
            measure_large(Path(name) / "large", config)


def measure_real(folder: Path, count: int, config: BenchConfig) -> None:
    label = f"{count:,} x {config.real_samples:,}"
    write_tars(folder, count, config.real_samples)
    write_cache(folder)
    for path in (*folder.glob(".*.index"), *(folder / ".llm2clip").iterdir()):
        path.unlink()
    print(in_new_process(start, str(folder)).row(f"{label}, first: tars indexed, captions compared"), flush=True)
    print(in_new_process(start, str(folder)).row(f"{label}, later"), flush=True)
    print(in_new_process(start, str(folder), True).row(f"{label}, every caption compared again"), flush=True)
    print(in_new_process(start, str(folder), False, config.use).row(f"{label}, later, then {config.use:,} samples"))


def measure_large(folder: Path, config: BenchConfig) -> None:
    label = f"{config.shards:,} x {config.samples:,}"
    write_large(folder, config)
    for name in ("first with the tars' indexes and digests", "later", "later, again"):
        print(in_new_process(start, str(folder)).row(f"{label}, {name}"), flush=True)


def start(folder: str, full: bool = False, use: int = 0) -> Cost:
    """Open a source and its cache as training does; then read ``use`` samples in order of training."""
    multiprocessing.set_start_method("fork", force=True)  # as in a training process; this one was spawned
    before, wall, cpu = bytes_read(), time.perf_counter(), time.process_time()

    def open_both() -> tuple[Source, EmbeddingCache]:
        source, cache = open_source(SourceConfig(path=folder)), EmbeddingCache.open(Path(folder) / "cache")
        cache.check(source, full=full)
        return source, cache

    memory, (source, cache) = peak_growth(open_both)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, cpu = time.perf_counter() - wall, time.process_time() - cpu + children.ru_utime + children.ru_stime
    if use:
        dataset = PairDataset([source], [cache], ImageConfig(size=16), seed=0)
        for _ in islice(make_loader(dataset, local_batch=20), use // 20):
            pass
    descriptors, maps = len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())
    return Cost(seconds, cpu, bytes_read() - before, memory, descriptors, maps)


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def write_tars(folder: Path, count: int, samples: int) -> None:
    """Tars of tiny images with two captions each."""
    folder.mkdir(parents=True)
    image = io.BytesIO()
    Image.new("RGB", (16, 16)).save(image, "JPEG")
    for shard in track(range(count), total=count, label="write", unit="tars"):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for sample in range(samples):
                key = f"{shard:05d}{sample:04d}"
                text = f'{{"caption": "picture {key}", "long_caption": "a long text about {key} {"word " * 60}"}}'
                for name, data in ((f"{key}.jpg", image.getvalue()), (f"{key}.json", text.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def write_cache(folder: Path) -> None:
    """Embeddings of zeros."""
    source, writer = open_source(SourceConfig(path=str(folder))), CacheWriter(folder / "cache", TEACHER)
    for shard in track(source.shards, total=len(source.shards), label="write", unit="cache shards"):
        keys, captions = shard_captions(source, shard)
        rows = caption_rows(captions)
        writer.write_shard(shard.name, keys, rows, torch.zeros(len(rows), TEACHER.width))
    writer.finish()


def write_large(folder: Path, config: BenchConfig) -> None:
    """Tars with holes, their indexes, cache files, a manifest and digests; every shard has the same keys."""
    folder.mkdir(parents=True)
    starts, size = range(0, config.samples * BYTES, BYTES), BYTES // 2
    entries = [Entry(f"{n:09d}", (start, size), (ABSENT, 0), (start + size, 1000)) for n, start in enumerate(starts)]
    keys, rows = [entry.key for entry in entries], [(n, n) for n in range(len(entries))]
    writer, names = CacheWriter(folder / "cache", TEACHER), [f"{shard:05d}" for shard in range(config.shards)]
    writer.write_shard(names[0], keys, rows, torch.zeros(len(keys), TEACHER.width))
    save_index(folder / "index", entries, {"tar_size": config.samples * BYTES, "tar_mtime_ns": 0})
    for name in track(names, total=len(names), label="write", unit="shards"):
        tar = folder / f"{name}.tar"
        with open(tar, "wb") as file:
            file.truncate(config.samples * BYTES)
        os.utime(tar, ns=(0, 0))
        shutil.copy(folder / "index", index_path(tar))
        if name != names[0]:
            shutil.copy(writer.path(names[0]), writer.path(name))
    manifest = writer.finish(names)
    assert manifest is not None
    source = open_source(SourceConfig(path=str(folder)))
    keep_digests(source, {name: entry["rows_sha256"] for name, entry in manifest.shards.items()})
    for path in (folder / ".llm2clip").glob("shards-*"):
        path.unlink()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(tyro.cli(BenchConfig))
