"""What hashes and checksums cost where they are compared: loading a tower, reading a cache, training, embedding.

    OMP_NUM_THREADS=1 python scripts/bench_hashes.py --images 256 --rounds 5

Each way runs with and without, in turns: a tower directory against the same files without its card, a cache against the
same one without checksums, as version 0.1 wrote it. Prints Markdown: median processor seconds, which other programs
hardly disturb, and the median of the ratios, round by round. A run's share is that of loading a sample: a training step
takes longer than its loading, or the GPU waits.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from bench import Run, alternate, argument_parser, median_seconds
from bench_data import BenchConfig, write_tars
from bench_step import make_dual
from safetensors import safe_open
from safetensors.numpy import save_file

from llm2clip_plugin.contracts import TeacherIdentity, TowerCard
from llm2clip_plugin.data.cache.reader import EmbeddingCache
from llm2clip_plugin.data.cache.rows import caption_rows, shard_captions, shard_contents
from llm2clip_plugin.data.cache.shard_file import META, TENSORS, ShardFile
from llm2clip_plugin.data.cache.writer import CacheWriter
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.loader import PairDataset, make_loader
from llm2clip_plugin.data.sources.open import Source, SourceConfig, open_source
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.intact import TowerChecksums
from llm2clip_plugin.vision.towers import load_tower

WIDTH = 4096  # of an embedding, as of a Llama 3 8B
TEACHER = TeacherIdentity(
    llm="random", revision="", weights_sha256="0" * 64, adapter_sha256="", attention="causal", pooling="mean",
    layer=-1, prompt="", chat_template="", max_tokens=32, width=WIDTH,
)  # fmt: skip


def main() -> None:
    """Measure and print every line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--tower", default="vit-b", choices=["tiny", "vit-s", "vit-b"])
    parser.add_argument("--images", type=int, default=256, help="JPEGs of 512 pixels in two tars")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| what | without, CPU s | with, CPU s | with / without |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measure_tower(folder / "towers", options.tower, options.rounds)
        measure_data(folder / "data", options.images, options.rounds)


def measure_tower(folder: Path, name: str, rounds: int) -> None:
    """load_tower of a tower directory, and of its files without card and checksums."""
    export_tower(make_dual(name).eval(), folder / "with", origin="random")
    shutil.copytree(
        folder / "with", folder / "without", ignore=shutil.ignore_patterns(TowerCard.FILE, TowerChecksums.FILE)
    )
    size = (folder / "with" / "model.safetensors").stat().st_size
    ways = {way: lambda way=way: load_tower(folder / way).eval() for way in ("without", "with")}
    show(f"load_tower, {size / 1e6:.0f} MB of weights", ways, rounds, wall=True)


def measure_data(folder: Path, images: int, rounds: int) -> None:
    """A cache and its images: opened, read, loaded for training, embedded again."""
    (folder / "tars").mkdir(parents=True)
    write_tars(folder / "tars", BenchConfig(images=images))
    source = open_source(SourceConfig(path=str(folder / "tars")))
    write_cache(source, folder / "with")
    shutil.copytree(folder / "with", folder / "without")
    for file in (folder / "without").glob("*.safetensors"):
        strip_checks(file)
    caches = {way: EmbeddingCache.open(folder / way) for way in ("without", "with")}
    sizes = f"{images} samples"

    def opened(way: str) -> None:
        for _ in range(100):
            EmbeddingCache.open(folder / way)

    def read(way: str) -> None:
        for number in range(len(source)):
            caches[way].rows(*source.locate(number), source_captions[number])

    def load(way: str) -> None:
        dataset = PairDataset([source], [caches[way]], ImageConfig(size=224), seed=0)
        loader = iter(make_loader(dataset, local_batch=32))
        for _ in range(images // 32):
            next(loader)

    source_captions = [source.captions(number)[1] for number in range(len(source))]
    show("open a cache 100 times", in_turns(opened), rounds)
    show(f"look up the rows of {sizes} (page cache)", in_turns(read), rounds)
    show(f"load {sizes} for training: JPEG of 512 px to 224, row", in_turns(load), rounds)
    reads: dict[str, Callable[[], object]] = {
        "without": lambda: [shard_captions(source, shard) for shard in source.shards],
        "with": lambda: [shard_contents(source, shard) for shard in source.shards],
    }
    show(f"embed: read {sizes}, captions alone or with images", reads, rounds)
    files = sorted((folder / "with").glob("*.safetensors"))
    complete: dict[str, Callable[[], object]] = {
        "without": lambda: [ShardFile(file) for file in files],
        "with": lambda: [ShardFile(file).damage() for file in files],
    }
    size = sum(file.stat().st_size for file in files)
    show(f"embed again: {size / 1e6:.1f} MB that are complete", complete, rounds)


def in_turns(work: Callable[[str], None]) -> dict[str, Callable[[], object]]:
    """Both ways of ``work``."""
    return {way: lambda way=way: work(way) for way in ("without", "with")}


def write_cache(source: Source, folder: Path) -> None:
    """Random embeddings of a source."""
    writer = CacheWriter(folder, TEACHER)
    for shard in source.shards:
        keys, captions, checks = shard_contents(source, shard)
        rows = caption_rows(captions)
        writer.write_shard(shard.name, keys, rows, torch.randn(len(rows), WIDTH), image_checks=checks)
    writer.finish()


def strip_checks(path: Path) -> None:
    """Make a shard's file one of version 0.1."""
    with safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in TENSORS}
        meta = json.loads(file.metadata()[META])
    del meta["checks_sha256"]
    save_file(tensors, path, metadata={META: json.dumps(meta)})


def show(what: str, ways: dict[str, Callable[[], object]], rounds: int, *, wall: bool = False) -> None:
    """Time two ways and print a line; with ``wall`` also the seconds by the clock."""
    runs: dict[str, list[Run]] = alternate(ways, rounds)
    ratio = median(with_.cpu / without.cpu for with_, without in zip(runs["with"], runs["without"], strict=True))
    cells = []
    for way in ("without", "with"):
        clock = f" ({median_seconds(runs[way], 'wall'):.2f} by the clock)" if wall else ""
        cells.append(f"{median_seconds(runs[way], 'cpu'):.3f}{clock}")
    print(f"| {what} | {cells[0]} | {cells[1]} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
