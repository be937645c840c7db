"""The teacher's fingerprint covers config.json and tokenizer; caches and towers from before are
proven, not lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_remote_code import change
from tiny_data import make_tower, write_tar
from tokenizers.normalizers import Lowercase
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm2clip_plugin import load_dual_encoder
from llm2clip_plugin.cli import main
from llm2clip_plugin.contracts import CacheManifest, TeacherIdentity, TowerCard
from llm2clip_plugin.data.cache import EmbeddingCache, cache_digest
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.towers import load_tower

CAPTIONS = [
    "a red bicycle leans against a brick wall",
    "two dogs run over the wet grass",
    "a man reads a newspaper",
]
NEW = ("config_sha256", "tokenizer_sha256")  # fields of a teacher
FLOAT32 = ("--compute-dtype", "float32")


def identity(llm: Path) -> TeacherIdentity:
    return CaptionEncoder(
        EncoderConfig(llm=str(llm), compute_dtype="float32"), "cpu"
    ).identity()


def set_rope(llm: Path) -> None:
    rope = json.loads((llm / "config.json").read_text())["rope_parameters"]
    change(llm / "config.json", rope_parameters=rope | {"rope_theta": 1e6})


def set_epsilon(llm: Path) -> None:
    change(llm / "config.json", rms_norm_eps=1e-3)


def set_normalizer(llm: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    tokenizer.save_pretrained(llm)


def add_token(llm: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.add_tokens(["bicycle"])
    tokenizer.save_pretrained(llm)
    change(llm / "config.json", vocab_size=400)


@pytest.mark.parametrize("edit", [set_rope, set_epsilon, set_normalizer, add_token])
def test_another_embedding_has_another_fingerprint(
    llama: Path, tmp_path: Path, edit: Callable[[Path], None]
) -> None:
    other = shutil.copytree(llama, tmp_path / "other")
    edit(other)
    assert identity(other).fingerprint != identity(llama).fingerprint


def test_what_changes_no_embedding_keeps_the_fingerprint(
    llama: Path, tmp_path: Path
) -> None:
    same = shutil.copytree(llama, tmp_path / "same")
    change(
        same / "config.json",
        dtype="float16",
        use_cache=False,
        attention_dropout=0.1,
        mlp_bias=False,
        eos_token_id=7,
    )
    change(same / "generation_config.json", temperature=0.5, do_sample=True)
    assert identity(same).fingerprint == identity(llama).fingerprint
    again = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(again)
    AutoTokenizer.from_pretrained(llama).save_pretrained(again)
    assert identity(again).fingerprint == identity(llama).fingerprint


@pytest.fixture
def data(tmp_path: Path) -> Path:
    members = []
    for number, caption in enumerate(CAPTIONS):
        members += [
            (f"{number}.png", b"no picture"),
            (f"{number}.json", json.dumps({"caption": caption}).encode()),
        ]
    write_tar(tmp_path / "data" / "0.tar", members)
    return tmp_path / "data"


@pytest.fixture
def earlier(llama: Path, data: Path, tmp_path: Path) -> Path:
    """A copy of the LLM, and its cache as it was written before config.json was part of the
    fingerprint."""
    llm = shutil.copytree(llama, tmp_path / "llm")
    whole = CaptionEncoder.identity
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CaptionEncoder, "identity", lambda self: whole(self).earlier())
        assert main(["embed", str(data), "--llm", str(llm), *FLOAT32]) == 0
    (manifest,) = data.glob("embeddings-*/manifest.json")
    body = json.loads(manifest.read_text())
    del body["earlier_fingerprint"]
    for name in NEW:
        del body["teacher"][name]
    manifest.write_text(json.dumps(body))
    return llm


def manifest_in(data: Path) -> CacheManifest:
    (path,) = data.glob("embeddings-*/manifest.json")
    return CacheManifest.read(path)


def test_a_cache_from_before_is_proven_and_renewed(
    earlier: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder,) = data.glob("embeddings-*")
    before = manifest_in(data)
    digest = cache_digest(EmbeddingCache.open(folder))
    with pytest.raises(
        ContractError,
        match=r"before config\.json was part of the fingerprint: rerun `llm2clip embed`",
    ):
        EmbeddingCache.open(folder, expect_fingerprint=identity(earlier).fingerprint)
    assert main(["embed", str(data), "--llm", str(earlier), *FLOAT32]) == 0
    said = capsys.readouterr().out
    assert (
        "3 captions embedded again agree; its fingerprint now includes config.json"
        in said
    )
    assert "1 shards already complete, skipped" in said
    after = manifest_in(data)  # still the only cache
    assert (
        after.fingerprint
        == identity(earlier).fingerprint
        != before.fingerprint
        == after.earlier_fingerprint
    )
    assert main(["embed", str(data), "--llm", str(earlier), *FLOAT32, "--verify"]) == 0
    # as an unfinished training asks
    renewed = EmbeddingCache.open(folder, expect_fingerprint=before.fingerprint)
    assert cache_digest(renewed) == digest
    write_tar(
        data / "1.tar",
        [("9.png", b""), ("9.json", json.dumps({"caption": "a boat"}).encode())],
    )
    assert main(["embed", str(data), "--llm", str(earlier), *FLOAT32]) == 0
    assert "embedded again" not in capsys.readouterr().out.partition("\n")[2]
    renewed = EmbeddingCache.open(folder)
    # of both fingerprints
    assert [renewed.shard(name).captions for name in renewed.manifest.shards] == [3, 1]


def test_a_cache_of_another_config_is_refused(
    earlier: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_rope(earlier)
    before = manifest_in(data)
    assert main(["embed", str(data), "--llm", str(earlier), *FLOAT32]) == 2
    assert "has cosine similarity 0." in capsys.readouterr().err
    assert manifest_in(data) == before


def test_a_new_cache_of_another_config_is_refused(
    llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = shutil.copytree(llama, tmp_path / "llm")
    cache = ("--cache", str(tmp_path / "cache"))
    words = ["embed", str(data), "--llm", str(llm), *FLOAT32]
    assert main([*words, *cache]) == 0
    set_epsilon(llm)
    assert main([*words, *cache]) == 2
    assert "config_sha256 " in capsys.readouterr().err


def test_a_cache_without_a_caption_of_the_data_cannot_be_proven(
    earlier: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder,) = data.glob("embeddings-*")
    write_tar(
        tmp_path / "other" / "7.tar",
        [("9.png", b""), ("9.json", b'{"caption": "a boat"}')],
    )
    words = [
        "embed",
        str(tmp_path / "other"),
        "--llm",
        str(earlier),
        "--cache",
        str(folder),
        *FLOAT32,
    ]
    assert main(words) == 2
    assert "none of its captions is in" in capsys.readouterr().err


def test_a_tower_from_before_opens_its_teacher(
    earlier: Path, data: Path, tmp_path: Path
) -> None:
    """Also with the cache that was renewed since."""
    teacher = manifest_in(data).teacher
    assert not set(NEW) & set(teacher)
    torch.manual_seed(0)
    settings = DualConfig(projection_dim=16, llm_width=32, adapter_blocks=1)
    export_tower(
        DualEncoder(load_tower(make_tower(tmp_path / "start")), settings),
        tmp_path / "tower",
        origin="x",
        teacher=teacher,
    )
    assert not set(NEW) & set(
        TowerCard.read(tmp_path / "tower" / TowerCard.FILE).teacher
    )
    assert load_dual_encoder(tmp_path / "tower").encode_text(CAPTIONS).shape == (3, 16)
    assert main(["embed", str(data), "--llm", str(earlier), *FLOAT32]) == 0
    assert manifest_in(data).earlier_fingerprint
    assert TeacherIdentity(**manifest_in(data).teacher).agrees_with(
        TeacherIdentity(**teacher)
    )
