"""What each part of the quickstart reads: shards, caches, adapters; and the refusal of anything
else."""

import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import inputs
import measure
import pytest
import torch
from quickstart_folders import IDENTITY, write_adapter, write_cache, write_run

from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.errors import ContractError

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = """
set -euo pipefail
DATA=data OUT=$PWD/out LLM=llm TOWER=tower DTYPE=bfloat16 PRESET=table SEED=0
TUNE_STEPS=12 TUNE_BATCH=64 STEPS=50 LAYER=16
HALF_OF_CORES=1 HEAD_STEPS=9 SIZE=56 FREEZE=0 PRECISION=bf16 LLAVA=
. "$PARTS"
say() { :; }
shown() { printf '%s\\n' "$*"; }
llm2clip() { shown llm2clip "$@"; }
python() { shown python "$@"; }
launch() {
    shown launch "$@"
    while [ $# -gt 1 ]; do
        [ "$1" != --output ] || mkdir -p "$2/tower"
        shift
    done
}
"""


def started(folder: Path, part: str) -> list[list[str]]:
    """The commands that a part of the quickstart starts, word by word."""
    command = [
        "env",
        f"PARTS={ROOT}/scripts/quickstart/parts.sh",
        "bash",
        "-c",
        SETTINGS + part,
    ]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True
    )
    return [line.split() for line in done.stdout.splitlines()]


def value(command: list[str], option: str) -> str:
    """The last value of an option."""
    return command[len(command) - command[::-1].index(option)]


def test_stage_1_reads_training_captions_and_is_validated_on_validation(
    tmp_path,
) -> None:
    (command,) = started(tmp_path, "tune 3")
    emoji = "llm2clip_plugin/data/emoji"
    assert command[:3] == [
        "launch",
        "scripts/finetune_llm.py",
        f"{emoji}/train-noto.tar",
    ]
    assert value(command, "--validation") == f"{emoji}/validation-noto.tar"
    assert (value(command, "--output"), value(command, "--seed")) == (
        "data/llm/seed3",
        "3",
    )


def test_a_cache_is_embedded_with_the_adapter_of_its_seed(tmp_path) -> None:
    _, raw, tuned = started(tmp_path, "embed raw; embed tuned-seed3")
    assert raw[1:3] == tuned[1:3] == ["embed", "data/all/*.tar"]
    assert "--adapter" not in raw
    assert value(tuned, "--adapter") == "data/llm/seed3/adapter"
    for command, cache in ((raw, "data/cache/raw"), (tuned, "data/cache/tuned-seed3")):
        assert (
            value(command, "--cache"),
            value(command, "--llm"),
            value(command, "--compute-dtype"),
        ) == (
            cache,
            "llm",
            "bfloat16",
        )


def test_the_linear_map_is_fitted_to_the_captions_of_stage_1_read_as_the_raw_llm(
    tmp_path,
) -> None:
    (tmp_path / "data" / "reading").mkdir(parents=True)
    embed, fit = started(tmp_path, "fit_map 3")
    (raw,) = started(tmp_path, "embed raw")
    (tune,) = started(tmp_path, "tune 3")
    assert embed[2] == value(fit, "--shard") == tune[2]
    assert value(embed, "--cache") == value(fit, "--captions")
    assert " ".join(embed[3:]).replace("data/captions", "data/cache/raw") == " ".join(
        raw[3:]
    )
    assert fit[1:3] == ["scripts/quickstart/linear_map.py", "data/all"]
    assert value(fit, "--cache") == "data/cache/raw"
    assert (value(fit, "--output"), value(fit, "--seed")) == (
        "data/cache/map-seed3",
        "3",
    )
    (tmp_path / "data" / "cache" / "map-seed3").mkdir(parents=True)
    assert started(tmp_path, "fit_map 3") == []


def test_the_halves_of_a_cache_are_all_shards_once(tmp_path) -> None:
    (tmp_path / "data" / "cache" / "tuned-seed0").mkdir(parents=True)
    (tmp_path / "data" / "cache" / "tuned-seed0" / "manifest.json").write_text(
        '{"test-noto": 1, "train-noto": 1}'
    )
    halves = started(tmp_path, "embed_in_halves tuned-seed0")
    patterns = [Path(command[2]).name for command in halves]
    for split in inputs.SPLITS:
        for style in ("noto", "twemoji", "fluent", inputs.UNSEEN):
            assert (
                sum(fnmatch(f"{split}-{style}.tar", pattern) for pattern in patterns)
                == 1
            )
    first, second = (" ".join(command[3:]) for command in halves)
    assert first == second
    assert "--adapter data/llm/seed0/adapter" in first
    # a manifest in which one of them is missing: all once more, which skips what is there
    (tmp_path / "data" / "cache" / "tuned-seed0" / "manifest.json").write_text(
        '{"test-noto": 1}'
    )
    assert started(tmp_path, "embed_in_halves tuned-seed0")[-1][2] == "data/all/*.tar"


def test_the_tower_before_stage_2_has_the_same_heads_and_no_steps(tmp_path) -> None:
    # as the training would
    (tmp_path / "out" / "runs" / "start-seed0" / "tower").mkdir(parents=True)
    (start,) = started(tmp_path, "start_tower")
    (tuned,) = started(tmp_path, "train tuned 0 tuned-seed0")
    assert (value(start, "--max-steps"), value(start, "--num-train-epochs")) == (
        "0",
        "0",
    )
    assert "--validation" not in start
    for option in (
        "--data",
        "--cache",
        "--tower",
        "--image-size",
        "--heads.steps",
        "--seed",
        "--precision",
    ):
        assert value(start, option) == value(tuned, option)


def test_towers_differ_in_their_cache_alone(tmp_path) -> None:
    raw, tuned = started(tmp_path, "towers 3")
    for command, name, cache in (
        (raw, "raw-seed3", "raw"),
        (tuned, "tuned-seed3", "tuned-seed3"),
    ):
        assert (value(command, "--data"), value(command, "--validation")) == (
            "data/all/train-*.tar",
            "data/all/validation-noto.tar",
        )
        assert (
            value(command, "--cache")
            == value(command, "--validation-cache")
            == f"data/cache/{cache}"
        )
        assert (value(command, "--output"), value(command, "--seed")) == (
            f"{tmp_path}/out/runs/{name}",
            "3",
        )
        assert (tmp_path / "out" / "towers" / name).is_dir()
    alike = [
        " ".join(raw).replace("raw-seed3", "NAME").replace("cache/raw", "cache/NAME")
    ]
    assert alike == [" ".join(tuned).replace("tuned-seed3", "NAME")]


def test_the_control_sees_exchanged_pictures(tmp_path) -> None:
    # as the training would
    (tmp_path / "out" / "runs" / "shuffled-seed0" / "tower").mkdir(parents=True)
    (tower,) = started(tmp_path, "control")
    assert value(tower, "--data") == "data/shuffled/train-*.tar"
    assert value(tower, "--cache") == "data/cache/tuned-seed0"


def test_the_stronger_controls_are_the_same_training_against_other_embeddings(
    tmp_path,
) -> None:
    (tmp_path / "data" / "cache" / "map-seed3").mkdir(parents=True)
    linear, made, embed, plain, random = started(tmp_path, "controls 3")
    assert made[1:4] == ["scripts/quickstart/inputs.py", "random", "data/all"]
    assert not {"--attention", "--pooling", "--adapter", "--post-file"} & set(embed)
    fit, read = started(tmp_path, "embed raw")
    emoji = "llm2clip_plugin/data/emoji"
    assert fit[1:4] == [
        "scripts/quickstart/inputs.py",
        "components",
        f"{emoji}/train-noto.tar",
    ]
    assert "--adapter" not in read
    tuned = started(tmp_path, "tune 3")[0]
    for command in (
        fit,
        read,
        tuned,
    ):  # stage 1 fine-tunes the reading that it is compared with
        assert (value(command, "--attention"), value(command, "--pooling")) == (
            "causal",
            "last",
        )
        assert "one word" in " ".join(command)
    assert value(read, "--layer") == value(fit, "--layer") == "16"
    assert (
        value(read, "--post-file")
        == f"{value(fit, '--output')}/llm2clip_post.safetensors"
    )
    raw = " ".join(started(tmp_path, "train raw 3 raw")[0])
    caches = {"map": "map-seed3", "plain": "plain", "random": "random"}
    for command, (name, cache) in zip(
        (linear, plain, random), caches.items(), strict=True
    ):
        of_control = (
            " ".join(command)
            .replace(f"cache/{cache}", "cache/raw")
            .replace(f"{name}-seed3", "raw-seed3")
        )
        assert of_control == raw
        assert f"cache/{name}" in " ".join(command)
    # a smoke run has a tower of the raw LLM for LLaVA alone, which compares with it
    (tmp_path / "data" / "cache" / "map-seed4").mkdir()
    last = started(tmp_path, "PRESET=smoke LLAVA=yes; controls 4")[-1]
    assert value(last, "--cache") == "data/cache/raw"
    assert value(last, "--output").endswith("runs/raw-seed4")


def test_the_control_is_read_at_the_block_that_the_page_of_results_states() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    stated = re.findall(r"raw LLM at block (\d+)", " ".join(page.split()))
    script = (ROOT / "scripts" / "quickstart.sh").read_text(encoding="utf-8")
    assert stated
    assert set(stated) == set(re.findall(r"\bLAYER=(\d+)", script))


def test_random_embeddings_are_of_the_text_and_of_the_seed_alone(
    data, tmp_path
) -> None:
    for seed in (0, 0, 1):
        inputs.write_random(
            data / "all",
            data / "cache" / "tuned-seed0",
            tmp_path / f"random{seed}",
            seed,
        )
    caches = {name: EmbeddingCache.open(tmp_path / f"random{name}") for name in (0, 1)}
    source = open_source(SourceConfig(path=str(data / "all")))
    row_of: dict[str, torch.Tensor] = {}
    for number in range(len(source)):
        sample = source[number]
        rows, other = (
            c.rows(*source.locate(number), sample.captions, key=sample.key)
            for c in caches.values()
        )
        assert not torch.allclose(rows.float(), other.float())
        for caption, row in zip(sample.captions, rows, strict=True):
            # in every style, split and language
            assert torch.equal(row_of.setdefault(caption.text, row), row)
    value_NW = torch.stack(list(row_of.values())).float()
    assert value_NW.mean().abs() < 0.1
    assert 0.9 < value_NW.std() < 1.1
    cosine_NN = torch.corrcoef(value_NW)
    assert (cosine_NN - torch.eye(len(cosine_NN))).abs().max() < 1
    assert (
        caches[0].manifest.teacher["llm"],
        caches[0].manifest.teacher["adapter_sha256"],
    ) == (
        inputs.RANDOM,
        "",
    )
    assert caches[0].fingerprint != caches[1].fingerprint
    with pytest.raises(ContractError, match=r"with \{'random': True"):
        measure.check_cache(data, "raw", caches[0])
    measure.check_cache(data, "random", caches[0])
    with pytest.raises(ContractError, match=r"with .*'pooling': 'last'"):
        measure.check_cache(data, "plain", EmbeddingCache.open(data / "cache" / "raw"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Data with the caches of the LLM as it is and of one adapter."""
    folder = tmp_path_factory.mktemp("quickstart-parts")
    inputs.prepare(folder, (3, 3, 3), ("de",))
    write_cache(folder / "all", folder / "cache" / "raw")
    write_cache(folder / "all", folder / "cache" / "tuned-seed0", write_adapter(folder))
    return folder


@pytest.mark.parametrize(
    ("name", "of", "words"),
    [
        ("raw", "tuned-seed0", "expected .*'adapter': ''"),
        ("tuned-seed0", "raw", "with .*'adapter': '',.*expected"),
    ],
)
def test_a_cache_of_another_adapter_is_refused(data, tmp_path, name, of, words) -> None:
    assert {*measure.open_caches(data)} == {"raw", "tuned-seed0"}
    shutil.copytree(data / "llm", tmp_path / "llm")
    shutil.copytree(data / "cache" / of, tmp_path / "cache" / name)
    with pytest.raises(ContractError, match=words):
        measure.open_caches(tmp_path)


def test_an_adapter_of_test_captions_is_refused(data, tmp_path) -> None:
    write_cache(
        data / "all",
        tmp_path / "cache" / "tuned-seed0",
        write_adapter(tmp_path, shard="test-noto.tar"),
    )
    with pytest.raises(ContractError, match=r"tuned-seed0 .*test-noto\.tar"):
        measure.open_caches(tmp_path)


@pytest.mark.parametrize(
    ("name", "read", "words"),
    [
        ("raw-seed0", {"path": ["data/all/test-*.tar"]}, "all/test-.*, expected"),
        (
            "raw-seed0",
            {"path": ["data/shuffled/train-*.tar"]},
            "shuffled/train-.*, expected",
        ),
        (
            "shuffled-seed0",
            {"path": ["data/all/train-*.tar"]},
            "expected .*shuffled/train",
        ),
        (
            "tuned-twins-seed0",
            {"path": ["data/all/train-*.tar"]},
            "expected .*all/twins",
        ),
        ("tuned-seed1", {"validation": "data/all/test-noto.tar"}, "all/test-noto.tar'"),
    ],
)
def test_a_tower_of_other_shards_is_refused(tmp_path, name, read, words) -> None:
    write_run(tmp_path, name)
    assert measure.check_run(tmp_path / "towers" / name)["path"]
    write_run(tmp_path, name, **read)
    with pytest.raises(ContractError, match=words):
        measure.check_run(tmp_path / "towers" / name)
    with pytest.raises(FileNotFoundError, match=r"run\.json"):
        measure.check_run(tmp_path / "towers" / "raw-seed9")


def test_a_tower_against_the_other_teachers_cache_is_refused(data) -> None:
    caches = measure.open_caches(data)
    teacher = vars(IDENTITY)
    assert measure.cache_of(Path("towers/raw-seed0"), teacher, caches) is caches["raw"]
    with pytest.raises(ContractError, match="expected that of tuned-seed0"):
        measure.cache_of(Path("towers/tuned-seed0"), teacher, caches)
