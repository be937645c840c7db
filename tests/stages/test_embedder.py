"""``--format sentence-transformers``: SentenceTransformer(DIR) embeds as load_dual_encoder and
CaptionEncoder do."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentence_transformers
import torch
from embedder_world import CAPTIONS, expected_of, opened, pictures, png, write_dual
from PIL import Image
from text_helpers import write_moved
from tiny_llm import save_tiny_llm

from llm2clip_plugin.cli import main
from llm2clip_plugin.stages.embedder import export_dual
from llm2clip_plugin.stages.embedder_parts import reads_plainly
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.post import POST_FILE, remove_components
from llm2clip_plugin.vision.towers import load_tower

SentenceTransformer = sentence_transformers.SentenceTransformer
TOLERANCE = 1e-5  # of embeddings of norm 1: float32, summed in another order
TOWERS = [
    ("clip_vision", "pooled"),
    ("clip_vision", "mean"),
    ("clip_vision", "cls"),
    ("siglip_vision", "pooled"),
    ("siglip_vision", "mean"),
    ("dinov2", "cls"),
    ("dinov2", "cls_mean"),
    ("dinov3", "pooled"),
    ("dinov3", "mean"),
    ("naflex", "pooled"),
    ("naflex", "mean"),
    ("eva02", "pooled"),
    ("eva02", "cls_mean"),
    ("aimv2", "pooled"),
    ("aimv2_lit", "pooled"),
    ("metaclip2", "pooled"),
    ("openvision", "pooled"),
    ("openvision", "cls"),
    ("radio", "pooled"),
    ("radio", "cls_mean"),
    ("dinov2_registers", "cls_mean"),
    ("tipsv2", "pooled"),
    ("tipsv2", "mean"),
    ("internvl", "pooled"),
    ("qwen25", "pooled"),
    ("timm", "pooled"),
]
HEADS = [
    {"projection": "mlp", "projection_norm": True},
    {"projection_bias": True, "input_scale": "sqrt_width", "adapter": "linear"},
    {"projection_dim": 32, "adapter": "none"},
    {"normalize_input": False, "adapter_blocks": 2, "adapter_expansion": 3},
]


def differs(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm(dim=1).max())


@pytest.mark.parametrize(("family", "pool"), TOWERS)
def test_pictures_and_texts_of_one_batch(family, pool, llama, tmp_path):
    tower = write_dual(tmp_path, llama, family=family, pool=pool)
    model = opened(export_dual(tower, tmp_path / "out", merge=True))
    images = pictures()
    mixed = [images[0], CAPTIONS[0], *images[1:], *CAPTIONS[1:]]
    expected = expected_of(tower, images, CAPTIONS)
    actual = model.encode(mixed, convert_to_tensor=True)
    order = [0, 3, 1, 2, 4, 5, 6, 7]
    assert differs(actual, expected[order]) < TOLERANCE


@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: ",".join(heads))
def test_projections_and_adapters(heads, llama, tmp_path):
    tower = write_dual(tmp_path, llama, **heads)
    model = opened(export_dual(tower, tmp_path / "out"))
    expected = expected_of(tower, pictures(), CAPTIONS)
    actual = model.encode([*pictures(), *CAPTIONS], convert_to_tensor=True)
    assert differs(actual, expected) < TOLERANCE


READINGS = {
    "plain": {},
    "last": {"pooling": "last"},
    "causal": {"attention": "causal"},
    "prompt": {"prompt": "Represent: "},
    "template": {"chat_template": "user", "prompt": "A caption. "},
    "without BOS": {"include_bos": False},
    "a block": {"layer": 1, "pooling": "last"},
    "short": {"max_tokens": 8},
}
# families that are read by sentence-transformers' own Transformer; the others' own flag decides
PLAIN = ("llama", "qwen3", "gemma3", "mistral")


@pytest.mark.parametrize("reading", READINGS.values(), ids=READINGS)
def test_readings_of_an_llm_with_an_adapter(reading, llama, tmp_path):
    """Merged, and with the LLM and its adapter apart; in batches of 1 and 32."""
    _, adapter = write_moved(llama, tmp_path / "adapter", **reading)
    config = EncoderConfig(
        llm=str(llama), adapter=str(adapter), compute_dtype="float32"
    )
    tower = write_dual(tmp_path, llama, encoder=CaptionEncoder(config, "cpu"))
    expected = expected_of(tower, pictures(1), CAPTIONS)[1:]
    for merge in (True, False):
        model = opened(export_dual(tower, tmp_path / f"merged-{merge}", merge=merge))
        for batch_size in (1, 32):
            actual = model.encode(
                CAPTIONS, batch_size=batch_size, convert_to_tensor=True
            )
            assert differs(actual, expected) < TOLERANCE


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "stablelm", "phi3", "smollm2"])
def test_llms_of_other_families_apart(family, tmp_path):
    llm = save_tiny_llm(tmp_path / "llm", family)
    tower = write_dual(tmp_path, llm)
    model = opened(export_dual(tower, tmp_path / "out"))
    expected = expected_of(tower, pictures(1), CAPTIONS)[1:]
    for batch_size in (1, 32):
        actual = model.encode(CAPTIONS, batch_size=batch_size, convert_to_tensor=True)
        assert differs(actual, expected) < TOLERANCE


@pytest.mark.parametrize("family", [*PLAIN, "stablelm", "phi3"])
def test_the_llm_alone(family, tmp_path):
    """Padded on either side. Where nothing of ours is needed, the folder has no code."""
    llm = save_tiny_llm(tmp_path / "llm", family)
    _, adapter = write_moved(llm, tmp_path / "adapter")
    expected = export_llm(llm, adapter, tmp_path / "out").encode(CAPTIONS)
    has_code = (tmp_path / "out" / "llm2clip_modules.py").is_file()
    assert has_code == (family == "stablelm")
    model = opened(tmp_path / "out", has_code=has_code)
    tolerance = TOLERANCE * float(expected.norm(dim=1).max())
    for side in ("right", "left"):
        model.tokenizer.padding_side = side
        actual = model.encode(CAPTIONS, convert_to_tensor=True)
        assert differs(actual, expected) < tolerance
    # the folder is that of `export-llm` without --format, too
    again = CaptionEncoder(
        EncoderConfig(llm=str(tmp_path / "out"), compute_dtype="float32"), "cpu"
    )
    assert differs(again.encode(CAPTIONS), expected) < tolerance


@pytest.mark.parametrize("name", READINGS)
def test_readings_that_need_code_of_ours(name, llama, tmp_path):
    """As docs/embeddings.md lists them."""
    _, adapter = write_moved(llama, tmp_path / "adapter", **READINGS[name])
    config = EncoderConfig(
        llm=str(llama), adapter=str(adapter), compute_dtype="float32"
    )
    encoder = CaptionEncoder(config, "cpu")
    is_plain = name not in ("prompt", "template", "without BOS", "a block")
    assert reads_plainly(encoder) == is_plain
    encoder.tokenizer.pad_token = None
    assert not reads_plainly(encoder)


def export_llm(llm: Path, adapter: Path, output: Path, *more: str) -> CaptionEncoder:
    """Export with the command; the encoder that it must equal."""
    where = ["--llm", str(llm), "--adapter", str(adapter)]
    command = [
        "export-llm",
        *where,
        "--output",
        str(output),
        "--format",
        "sentence-transformers",
    ]
    assert main([*command, *more]) == 0
    config = EncoderConfig(llm=str(llm), adapter=str(adapter), compute_dtype="float32")
    return CaptionEncoder(config, "cpu")


def test_components_and_the_prompt_of_queries(llama, tmp_path):
    _, adapter = write_moved(llama, tmp_path / "adapter", query_prompt="Find: ")
    config = EncoderConfig(
        llm=str(llama), adapter=str(adapter), compute_dtype="float32"
    )
    (post,) = remove_components(CaptionEncoder(config, "cpu").encode(CAPTIONS), (1,))
    post.save(tmp_path)
    export_llm(
        llama, adapter, tmp_path / "out", "--post-file", str(tmp_path / POST_FILE)
    )
    encoder = CaptionEncoder(
        replace(config, post_file=str(tmp_path / POST_FILE)), "cpu"
    )
    model = opened(tmp_path / "out")
    for query, encode in ((False, model.encode), (True, model.encode_query)):
        expected = encoder.encode(CAPTIONS, query=query)
        tolerance = TOLERANCE * float(expected.norm(dim=1).max())
        assert differs(encode(CAPTIONS, convert_to_tensor=True), expected) < tolerance


@pytest.fixture(scope="module")
def exported(llama, tmp_path_factory):
    """A tower whose texts have a prompt, its LLM and adapter, and its export without the LLM."""
    folder = tmp_path_factory.mktemp("exported")
    llm = shutil.copytree(llama, folder / "llm")
    _, adapter = write_moved(llm, folder / "adapter", prompt="Describe: ")
    config = EncoderConfig(llm=str(llm), adapter=str(adapter), compute_dtype="float32")
    write_dual(folder, llm, encoder=CaptionEncoder(config, "cpu"))
    command = ["export", str(folder / "tower"), "--output", str(folder / "out")]
    assert main([*command, "--format", "sentence-transformers"]) == 0
    return folder


def test_elsewhere_and_without_this_package(exported, tmp_path, monkeypatch):
    """Pictures are paths, bytes and images; half precision keeps its directions."""
    tower = exported / "tower"
    images = pictures()
    expected = expected_of(tower, images, CAPTIONS)
    export_dual(tower, exported / "merged", merge=True)
    for name in ("llm", "out"):
        shutil.copytree(exported / name, tmp_path / "moved" / name)
    shutil.copytree(exported / "merged", tmp_path / "else" / "merged")
    file = tmp_path / "one.png"
    file.write_bytes(png(images[0]))
    # bytes come last in their batch
    inputs = [
        str(file),
        png(images[1]),
        images[2],
        *CAPTIONS,
    ]
    for name in [name for name in sys.modules if name.startswith("llm2clip_plugin")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llm2clip_plugin", None)
    for folder in (tmp_path / "moved" / "out", tmp_path / "else" / "merged"):
        options = {"trust_remote_code": True, "device": "cpu"}
        model = SentenceTransformer(str(folder), **options)
        actual = model.encode(inputs, convert_to_tensor=True)
        assert differs(actual, expected) < TOLERANCE
        assert (
            differs(model.encode(file, convert_to_tensor=True)[None], expected[:1])
            < TOLERANCE
        )
        rough = SentenceTransformer(
            str(folder), **options, model_kwargs={"dtype": torch.bfloat16}
        ).encode(inputs, convert_to_tensor=True)
        assert (
            torch.nn.functional.cosine_similarity(rough.float(), expected).min() > 0.999
        )


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_pictures_with_transparency(mode, exported, tmp_path):
    """As image, path and bytes: without its transparency, as load_dual_encoder reads it."""
    (image,) = pictures(1)
    transparent = image.convert(mode)
    if mode == "P":
        transparent.info["transparency"] = bytes(range(256))
    if mode in ("RGBA", "LA"):
        transparent.putalpha(image.convert("L").point(lambda level: level // 2))
    file = tmp_path / "one.png"
    file.write_bytes(png(transparent))
    expected = expected_of(exported / "tower", [transparent], CAPTIONS[:1])[:1]
    inputs = [
        transparent,
        {"image": transparent},
        Image.open(file),
        file,
        png(transparent),
    ]
    actual = opened(exported / "out").encode(inputs, convert_to_tensor=True)
    assert differs(actual, expected) < TOLERANCE


def test_gray_pictures_of_16_bits_are_read_as_in_training(exported):
    gray = pictures(1)[0].convert("L")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    expected = expected_of(exported / "tower", [gray], CAPTIONS[:1])[:1]
    inputs = [deep, png(deep)]
    actual = opened(exported / "out").encode(inputs, convert_to_tensor=True)
    assert differs(actual, expected) < TOLERANCE


CODE_OF_LLM = """
from pathlib import Path

from transformers import Qwen3Config, Qwen3Model

Path({ran!r}).touch()
"""


def llm_with_code(folder: Path, ran: Path) -> Path:
    """A Qwen3, which transformers has, that also ships classes; importing them makes ``ran``."""
    llm = save_tiny_llm(folder / "llm", "qwen3")
    (llm / "modeling.py").write_text(CODE_OF_LLM.format(ran=str(ran)))
    classes = {"AutoConfig": "modeling.Qwen3Config", "AutoModel": "modeling.Qwen3Model"}
    for name in ("config.json", "tokenizer_config.json"):
        body = json.loads((llm / name).read_text())
        (llm / name).write_text(json.dumps({**body, "auto_map": classes}))
    return llm


@pytest.mark.parametrize("merge", [False, True])
def test_code_in_the_llms_folder_is_not_run(merge, tmp_path):
    """Neither by the export nor by who opens it with trust_remote_code=True."""
    llm = llm_with_code(tmp_path, tmp_path / "ran")
    tower = write_dual(tmp_path, llm)
    output = tmp_path / "out"
    command = [
        "export",
        str(tower),
        "--output",
        str(output),
        "--format",
        "sentence-transformers",
    ]
    assert main([*command, *(["--merge"] if merge else [])]) == 0
    expected = expected_of(tower, pictures(), CAPTIONS)
    model = opened(output)
    actual = model.encode([*pictures(), *CAPTIONS], convert_to_tensor=True)
    assert differs(actual, expected) < TOLERANCE
    assert not (tmp_path / "ran").exists()
    assert "No code of the LLM's own folder" in (output / "README.md").read_text()
    assert not any("auto_map" in file.read_text() for file in output.rglob("*.json"))


CONFIGURATION_OF_OWN = """
from transformers import Qwen3Config


class OwnConfig(Qwen3Config):
    model_type = "own"
"""
MODELING_OF_OWN = """
from transformers import Qwen3Model

from .configuration_own import OwnConfig


class OwnModel(Qwen3Model):
    config_class = OwnConfig
"""


def test_an_llm_that_is_code_is_exported_where_it_is_trusted(tmp_path, capsys):
    """Without --trust-remote-code the export names the flag; with it, the folder embeds as the
    tower's own encoder does, and its card says what it runs."""
    llm = save_tiny_llm(tmp_path / "llm", "qwen3")
    (llm / "configuration_own.py").write_text(CONFIGURATION_OF_OWN)
    (llm / "modeling_own.py").write_text(MODELING_OF_OWN)
    body = json.loads((llm / "config.json").read_text())
    classes = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModel": "modeling_own.OwnModel",
    }
    body |= {"model_type": "own", "auto_map": classes}
    (llm / "config.json").write_text(json.dumps(body))
    config = EncoderConfig(
        llm=str(llm), compute_dtype="float32", trust_remote_code=True
    )
    tower = write_dual(tmp_path, llm, encoder=CaptionEncoder(config, "cpu"))
    output = tmp_path / "out"
    words = ["export", str(tower), "--output", str(output)]
    words += ["--format", "sentence-transformers"]
    assert main(words) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert main([*words, "--trust-remote-code"]) == 0
    expected = expected_of(tower, pictures(), CAPTIONS, teacher=config)
    actual = opened(output).encode([*pictures(), *CAPTIONS], convert_to_tensor=True)
    assert differs(actual, expected) < TOLERANCE
    assert (
        "It also runs the code in the LLM's folder"
        in (output / "README.md").read_text()
    )


def changed_llm(folder: Path, **fields: str) -> None:
    """Set fields of the module that reads captions."""
    file = folder / "text_0_Captions" / "sentence_bert_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


BAD_INPUT = {
    "a corrupt picture": (
        b"\x89PNG\r\n\x1a\nnothing",
        "a picture of 15 bytes cannot be read",
    ),
    "a picture that is not there": (Path("no.png"), "no picture at no.png"),
    "a picture of 32 bits": (Image.new("F", (8, 8)), "has 32 bits a pixel"),
    "a blank text": ("  ", "a text is '  '"),
    "a number": (7, "Unsupported input type: int"),
    "a picture with a text": (
        {"text": "a", "image": "b.png"},
        "give texts, or pictures",
    ),
}


@pytest.mark.parametrize(("given", "problem"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_inputs_that_cannot_be_embedded(given, problem, exported):
    model = opened(exported / "out")
    with pytest.raises((ValueError, FileNotFoundError), match=problem) as raised:
        model.encode([given])
    assert "\n" not in str(raised.value)


def test_a_long_text_is_truncated(exported):
    model = opened(exported / "out")
    long = "a red bicycle " * 7000  # 100 kB
    both = model.encode([long, long[:20000]], convert_to_tensor=True)
    assert torch.equal(both[0], both[1])


def test_an_llm_that_is_missing_or_another_one(exported, tmp_path):
    folder = shutil.copytree(exported / "out", tmp_path / "out")
    with pytest.raises(
        ValueError, match=r'not at hand .*set "llm" in .*sentence_bert_config.json'
    ):
        opened(folder)
    changed_llm(folder, llm=str(save_tiny_llm(tmp_path / "other", "llama", seed=1)))
    with pytest.raises(
        ValueError, match="other has other weights than the LLM of this embedder"
    ):
        opened(folder)
    changed_llm(folder, llm=str(exported / "llm"))
    opened(folder)


def test_exports_that_are_refused(exported, tmp_path, capsys):
    command = ["export", str(exported / "tower"), "--output", str(tmp_path / "new")]
    other = save_tiny_llm(tmp_path / "other", "llama", seed=1)
    cases = [
        (
            ["--merge"],
            "--merge, --llm, --adapter and --trust-remote-code require --format",
        ),
        (["--format", "sentence-transformers", "--llm", str(other)], "was trained on"),
        (["--format", "sentence-transformers", "--llm", "no/llm"], "no/llm"),
    ]
    for words, problem in cases:
        assert main([*command, *words]) == 2
        printed = capsys.readouterr().err.strip().splitlines()
        assert problem in printed[-1]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("source", ["out", "merged"])
def test_what_was_trained_is_saved_and_opened_again(source, exported, tmp_path):
    """As sentence-transformers saves it: our code, the LLM, a tower that load_tower takes."""
    folder = exported / source
    if source == "merged" and not folder.is_dir():
        export_dual(exported / "tower", folder, merge=True)
    model = opened(folder)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(str(tmp_path / "saved"))
    moved = (tmp_path / "saved").rename(tmp_path / "moved")
    inputs = [*pictures(), *CAPTIONS]
    expected = model.encode(inputs, convert_to_tensor=True)
    assert (
        differs(expected, opened(folder).encode(inputs, convert_to_tensor=True)) > 0.01
    )
    assert (
        differs(opened(moved).encode(inputs, convert_to_tensor=True), expected)
        < TOLERANCE
    )
    tower = load_tower(moved / "image_0_Transformer")
    trained = model[0].sub_modules["image"][0].model.state_dict()
    assert tower.state_dict().keys() == trained.keys()
    assert all(torch.equal(tower.state_dict()[name], trained[name]) for name in trained)
