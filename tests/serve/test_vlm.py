"""A vision-language model of any tower and any LLM: equal to its parts, trained by transformers'
Trainer, reloaded."""

import functools
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from serve_checkpoints import tower_directory
from tiny_clip import TINY
from tiny_llm import save_tiny_llm, tiny_tokenizer
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from llava_integration.plug.tower import LLM2CLIPVisionTower
from llava_integration.plug.towers import TowerLocation
from llava_integration.serve import trainers
from llava_integration.serve.build import ExportedTower, register
from llava_integration.serve.export import test_image as picture
from llava_integration.serve.rows import LlavaRows
from llm2clip_plugin.cli import main as llm2clip
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.families import family_of
from llm2clip_plugin.vision.towers import load_tower, resize_tower, timm_tower

TOWERS = ("clip", "siglip", "dinov3", "eva02", "pe_core")  # pe_core: timm's
LLMS = ("smollm2", "qwen3", "gemma3")
MADE = tempfile.TemporaryDirectory(prefix="towers-")  # removed when the process ends
BOS = 1
ASKED = [{"type": "image", "image": picture()}, {"type": "text", "text": "Which color?"}]


@pytest.fixture(scope="module")
def llms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llms")
    for name in (*LLMS, "llama", "qwen2", "mistral", "phi3", "gemma2"):
        save_tiny_llm(root / name, name)
    return root


@functools.cache
def place(name: str) -> Path:
    """The folder of a tower of that name."""
    made = Path(MADE.name) / name
    if name == "naflex":
        config = transformers.Siglip2VisionConfig(**TINY, num_patches=16, patch_size=7)
        transformers.Siglip2VisionModel(config).save_pretrained(made / "published")
        import_tower(made / "published", made / "imported")
        return made / "imported"
    if name == "qwen3_vit":
        arguments = {"depth": 2, "embed_dim": 64, "num_heads": 4}
        resize_tower(
            timm_tower("qwen3_vit_88m_enc", pretrained=False, arguments=arguments), 64
        ).save_pretrained(made)
        return made
    return tower_directory(name)


def build(tower: str, llm: Path, output: Path, *more: str) -> Path:
    words = ["--tower", str(place(tower)), "--llm", str(llm), "--output", str(output), *more]
    assert llm2clip(["vlm", "build", *words]) == 0
    return output


@pytest.fixture(scope="module")
def built(llms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP and Qwen 3."""
    return build("clip", llms / "qwen3", tmp_path_factory.mktemp("vlm") / "clip-qwen3")


def by_hand(folder: Path, tower: str, llm: Path, inputs: Any) -> torch.Tensor:
    """Logits of tower, projector and LLM as their own libraries load them."""
    vision = load_tower(place(tower))
    own = AutoModelForCausalLM.from_pretrained(llm).eval()
    state = vision(pixel_values=inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    state = state[:, 1:] if family_of(vision).has_cls else state
    weights = load_file(folder / "model.safetensors")
    for n in (1, 2):
        layer = [weights[f"multi_modal_projector.linear_{n}.{kind}"] for kind in ("weight", "bias")]
        state = torch.nn.functional.linear(
            torch.nn.functional.gelu(state) if n == 2 else state, *layer
        )
    ids = inputs["input_ids"][0]
    slot = json.loads((folder / "config.json").read_text())["image_token_index"]
    start = int((ids == slot).nonzero()[0])
    stop = int((ids == slot).nonzero()[-1]) + 1
    assert stop - start == state.shape[1] == int((ids == slot).sum())
    embed = own.get_input_embeddings()
    return own(
        inputs_embeds=torch.cat((embed(ids[:start]), state[0], embed(ids[stop:])))[None]
    ).logits


def loss_of(model: Any, batch: dict[str, Any]) -> float:
    with torch.inference_mode():
        return model.eval()(**batch).loss.item()


@pytest.mark.parametrize(
    ("tower", "llm"),
    [*itertools.product(TOWERS, LLMS), ("naflex", "qwen3"), ("qwen3_vit", "qwen3")],
)
def test_equals_its_parts_and_trains(llms: Path, tmp_path: Path, tower: str, llm: str) -> None:
    """One step of the projector alone, in which the frozen tower stays in eval mode, then one of
    everything."""
    folder = build(tower, llms / llm, tmp_path / "vlm")
    register()
    processor = AutoProcessor.from_pretrained(folder)
    chats = [
        [{"role": "user", "content": ASKED}, {"role": "assistant", "content": answer}]
        for answer in ("red", "no")
    ]
    options = {
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
        "processor_kwargs": {"padding": True},
    }
    batch = dict(processor.apply_chat_template(chats, **options))
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder)
    with torch.inference_mode():
        one = {name: value[:1] for name, value in batch.items()}
        assert one["attention_mask"].all()
        logits = model(**one).logits
        expected = by_hand(folder, tower, llms / llm, one)
    assert (logits[..., : expected.shape[-1]] - expected).abs().max() <= 1e-5 * expected.abs().max()

    batch["labels"] = batch["input_ids"].masked_fill(
        batch["input_ids"] == model.config.image_token_index, -100
    )
    rows: list[dict[str, Any]] = []
    for number in range(2):
        rows.append({name: value[number] for name, value in batch.items()})
    settings = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=1,
        learning_rate=1e-3,
        per_device_train_batch_size=2,
        use_cpu=True,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = [loss_of(model, batch)]
    for trains in (("multi_modal_projector",), ("",)):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in trains))
        Trainer(model, settings, train_dataset=rows).train()
        losses.append(loss_of(model, batch))
        changed = {
            name.split(".")[1]
            for name, value in model.state_dict().items()
            if not value.equal(before[name])
        }
        assert "multi_modal_projector" in changed
        assert ("vision_tower" in changed) == (trains == ("",))
    assert losses[0] > losses[1] > losses[2]

    model.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "trained")
    assert loss_of(again, batch) == pytest.approx(losses[2], rel=1e-6)


def test_a_frozen_tower_is_not_random(llms: Path, tmp_path: Path) -> None:
    """DINOv3 draws a scale of its positions in training mode; frozen, it computes the same
    twice."""
    folder = build("dinov3", llms / "llama", tmp_path / "vlm", "--no-compare")
    register()
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder).train()
    pixels = torch.rand(1, 3, *[model.config.vision_config.image_size] * 2)

    def features() -> torch.Tensor:
        return model.get_image_features(pixel_values=pixels).pooler_output[0]

    assert model.model.vision_tower.training
    assert not torch.equal(features(), features())
    model.model.vision_tower.requires_grad_(False)
    model.train()
    assert model.training
    assert not model.model.vision_tower.training
    assert torch.equal(features(), features())


@pytest.mark.parametrize("layer", [0, -2, -3])
@pytest.mark.parametrize("name", TOWERS)
def test_the_tower_in_llavas_own_model(name: str, layer: int) -> None:
    """As above; every hidden state can be selected, the input of the first block too."""
    location = TowerLocation.of(tower_directory(name), how="here")
    tower = LLM2CLIPVisionTower("here", location, SimpleNamespace(mm_vision_select_layer=layer))
    assert torch.nn.ModuleList([tower]).train().training
    assert not any(module.training for module in tower.modules())
    size = location.card.image_size
    pixels = torch.rand(1, 3, size, size)
    expected = load_tower(location.directory)(
        pixel_values=pixels, output_hidden_states=True
    ).hidden_states[layer]
    assert torch.equal(tower(pixels), expected[:, 1:] if location.card.has_cls else expected)
    assert tower.image_size == size  # of which LLaVA-NeXT makes grids
    assert tower.requires_grad_(True).train().vision_tower.training


@pytest.mark.parametrize("llm", ["llama", "qwen2", "mistral", "phi3"])
def test_other_llms(
    llms: Path, tmp_path: Path, llm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command compares the folder with its parts."""
    build("clip", llms / llm, tmp_path / "vlm")
    said = capsys.readouterr().out
    assert float(said.split("logits within ")[1].split()[0]) <= 1e-5


@pytest.mark.parametrize("arch", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("tower", ["siglip", "dinov3"])
def test_tiles(llms: Path, tmp_path: Path, tower: str, arch: str) -> None:
    """The command compares the folder with its parts; an image has more tokens than one tile's."""
    folder = build(tower, llms / "qwen3", tmp_path / "vlm", "--arch", arch)
    config = json.loads((folder / "config.json").read_text())
    processor = AutoProcessor.from_pretrained(folder)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batches = [processor.apply_chat_template([{"role": "user", "content": ASKED}], **options)]
    assert (batches[0]["input_ids"] == config["image_token_index"]).sum() > 2 * config[
        "image_seq_length"
    ]
    said = [
        {"from": "human", "value": "<image>"},
        {"from": "gpt", "value": "a"},
        {"from": "human", "value": "b"},
    ]
    picture().save(tmp_path / "wide.png")
    trained = LlavaRows(processor, tmp_path)([{"image": "wide.png", "conversations": said}])[
        "labels"
    ][0]
    assert processor.decode(trained[trained >= 0]).endswith("a<end>")
    if arch == "llava_onevision":
        size = config["vision_config"]["image_size"]
        frames = torch.randint(255, (3, 3, 40, 50), dtype=torch.uint8)
        chat = [
            {
                "role": "user",
                "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}],
            }
        ]
        batches += [
            processor(
                videos=[frames], text=processor.apply_chat_template(chat), return_tensors="pt"
            )
        ]
        assert batches[1]["pixel_values_videos"].shape == (1, 3, 3, size, size)
    register()
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert all(model(**batch).logits.isfinite().all() for batch in batches)


def test_code_of_the_tower_travels_with_tiles(
    llms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """trust_remote_code opens a tower where this package is not installed, with every weight of the
    file."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folders = [
        build("eva02", llms / "qwen3", tmp_path / arch, "--arch", arch)
        for arch in ("llava_next", "llava")
    ]
    program = """
import sys
sys.modules["llm2clip_plugin"] = sys.modules["llava_integration"] = None
import transformers
for folder in sys.argv[1:]:
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True)
    print(type(model).__name__, *info["missing_keys"], *info["unexpected_keys"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *folders], capture_output=True, text=True, check=False
    )
    names = ["LlavaNextTowerForConditionalGeneration", "LlavaTowerForConditionalGeneration"]
    assert done.stdout.splitlines()[-2:] == names, done.stderr


def of_llama_3(tokenizer: Any) -> None:
    """Its <s> is added by a template in a sequence; the chat template writes another."""
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), backend.post_processor]
    )


def of_a_template_without_bos(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "")


@pytest.mark.parametrize("change", [None, of_llama_3, of_a_template_without_bos])
def test_one_bos_whichever_way(llms: Path, tmp_path: Path, change: Any) -> None:
    """In transformers' two ways and in vLLM's, which adds no special tokens to what the template
    renders."""
    llm = save_tiny_llm(tmp_path / "llm", "llama")
    tokenizer = tiny_tokenizer()
    if change is not None:
        change(tokenizer)
    tokenizer.save_pretrained(llm)
    assert transformers.AutoTokenizer.from_pretrained(llm)("x")["input_ids"][0] == BOS
    processor = AutoProcessor.from_pretrained(build("clip", llm, tmp_path / "vlm", "--no-compare"))
    chat = [{"role": "user", "content": ASKED}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    whole = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    ways = [processor(images=picture(), text=text)["input_ids"][0], whole["input_ids"][0]]
    ways += [
        processor.tokenizer(text, **more)["input_ids"]
        for more in ({"add_special_tokens": False}, {})
    ]
    assert [ids.count(BOS) for ids in ways] == [1] * 4
    assert {ids[0] for ids in ways} == {BOS}
    assert ways[0] == ways[1]
    assert ways[2] == ways[3]


def test_the_template_is_the_llms_with_slots(built: Path, llms: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(llms / "qwen3")
    processor = AutoProcessor.from_pretrained(built)
    turns = [
        {"type": "image"},
        {"type": "text", "text": "One"},
        {"type": "image"},
        {"type": "text", "text": "two?"},
    ]
    chat = [{"role": "user", "content": turns}, {"role": "assistant", "content": "Yes."}]
    flat = [{"role": "user", "content": "<image>\nOne<image>\ntwo?"}, chat[1]]
    expected = tokenizer.apply_chat_template(flat, tokenize=False)
    assert processor.apply_chat_template(chat) == processor.apply_chat_template(flat) == expected


def test_image_uses_a_spare_row_or_a_new_one(built: Path, llms: Path, tmp_path: Path) -> None:
    """The tiny tokenizer has fewer tokens than the embedding rows; without the spare ones, the mean
    is added."""
    own = load_file(llms / "qwen3" / "model.safetensors")
    written = load_file(built / "model.safetensors")
    tokens = len(tiny_tokenizer())
    assert json.loads((built / "config.json").read_text())["image_token_index"] == tokens < 400
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(written[f"language_model.{name}"], own[name])
    llm: Any = AutoModelForCausalLM.from_pretrained(llms / "qwen3")
    llm.resize_token_embeddings(tokens)
    llm.save_pretrained(tmp_path / "llm")
    tiny_tokenizer().save_pretrained(tmp_path / "llm")
    folder = build("clip", tmp_path / "llm", tmp_path / "vlm")
    written = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = written[f"language_model.{name}"]
        assert torch.equal(rows[:tokens], own[name][:tokens])
        assert len(rows) == tokens + 1
        assert torch.allclose(rows[tokens], own[name][:tokens].mean(0))


def test_seed_dry_run_and_shards(
    built: Path,
    llms: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same seed gives the same projector; a plan counts what is written; shards are written one
    by one."""
    name = "multi_modal_projector.linear_1.weight"
    first = load_file(built / "model.safetensors")
    monkeypatch.setattr("llava_integration.serve.checkpoint.SHARD_BYTES", 50_000)
    sharded = build("clip", llms / "qwen3", tmp_path / "sharded")
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 3
    second = {key: value for shard in shards for key, value in load_file(shard).items()}
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    monkeypatch.undo()
    words = ("clip", llms / "qwen3", tmp_path / "other", "--seed", "1")
    count = sum(value.numel() for value in first.values())
    nothing = build(*words, "--dry-run")
    assert f"{count:,} parameters" in capsys.readouterr().out
    assert not nothing.exists()
    assert not torch.equal(load_file(build(*words) / "model.safetensors")[name], first[name])


def test_no_code_of_the_towers_folder_is_named(tmp_path: Path) -> None:
    """``auto_map`` of a tower's config.json would have a server run code that is not in the model's
    folder."""
    tower = shutil.copytree(tower_directory("clip"), tmp_path / "tower")
    fields = json.loads((tower / "config.json").read_text())
    (tower / "config.json").write_text(
        json.dumps({**fields, "auto_map": {"AutoModel": "modeling.Own"}})
    )
    assert "auto_map" not in ExportedTower.of(tower).config


def test_the_card_names_both_by_hash(built: Path) -> None:
    made = json.loads((built / "config.json").read_text())["llm2clip_vlm"]
    card = json.loads((built / "llm2clip_tower.json").read_text())
    assert "stage" not in made
    assert made["tower_sha256"] == card["weights_sha256"]
    assert len(made["llm_sha256"]) == 64
    readme = (built / "README.md").read_text()
    assert all(f"`{made[name]}`" in readme for name in ("tower_sha256", "llm_sha256"))
    assert "(stage 0)" in readme
    assert str(built.parent) not in readme + (built / "config.json").read_text()


@pytest.mark.parametrize(
    ("tower", "llm", "more", "message"),
    [
        (
            "clip",
            "base",
            (),
            "has no chat template; pass the instruction-tuned model as --llm, or --chat-template",
        ),
        (
            "clip",
            "gemma2",
            (),
            "has final_logit_softcapping 30.0, which transformers' LLaVA does not apply",
        ),
        ("clip", "vlm", (), "has a vision tower already; pass a language model"),
        ("clip", "quantized", (), "is quantized; pass the model that it was made from"),
        ("clip", "gpt2", (), "has a tensor transformer."),
        ("clip", "qwen3", ("--select-layer", "-9"), "mm_vision_select_layer -9 is out of range"),
        ("clip", "qwen3", ("--chat-template", "broken.jinja"), "cannot be used"),
        ("nowhere", "qwen3", (), "nowhere is not a directory or a Hub id"),
        ("clip", "nowhere", (), "no LLM at"),
        ("clip", ".", (), "has no config.json; expected the folder of a Hugging Face model"),
    ],
)
def test_what_does_not_fit_is_one_line(
    built: Path,
    llms: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tower: str,
    llm: str,
    more: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.jinja").write_text("{% for %}")
    folder = {"vlm": built}.get(llm, llms / llm)
    if llm in ("base", "quantized"):
        folder = save_tiny_llm(tmp_path / llm, "llama", template=llm != "base")
        config = json.loads((folder / "config.json").read_text())
        quantized = (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}}
            if llm == "quantized"
            else {}
        )
        (folder / "config.json").write_text(json.dumps(config | quantized))
    if llm == "gpt2":
        folder = tmp_path / "gpt2"
        sizes: dict[str, Any] = {"vocab_size": 400, "n_embd": 32, "n_layer": 1, "n_head": 2}
        AutoModelForCausalLM.from_config(transformers.GPT2Config(**sizes)).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    eye = str(place(tower) if tower == "clip" else tower)
    words = ["--tower", eye, "--llm", str(folder), "--output", str(tmp_path / "out"), *more]
    capsys.readouterr()
    assert llm2clip(["vlm", "build", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_tower_that_transformers_saved_has_the_names_that_servers_know(
    llms: Path, tmp_path: Path
) -> None:
    """transformers 5 saves CLIP's tower without ``vision_model.``, which vLLM then does not
    find."""
    other = shutil.ignore_patterns("*.safetensors", "llm2clip*")
    shutil.copytree(tower_directory("clip"), tmp_path / "clip", ignore=other)
    config = transformers.CLIPVisionConfig.from_pretrained(tower_directory("clip"))
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    assert "embeddings.class_embedding" in load_file(tmp_path / "clip" / "model.safetensors")
    words = [
        "--tower",
        str(tmp_path / "clip"),
        "--llm",
        str(llms / "qwen3"),
        "--output",
        str(tmp_path / "vlm"),
    ]
    assert llm2clip(["vlm", "build", *words]) == 0
    names = [
        name
        for name in load_file(tmp_path / "vlm" / "model.safetensors")
        if name.startswith("vision_tower.")
    ]
    assert names
    assert all(name.startswith("vision_tower.vision_model.") for name in names)


def test_a_users_own_swift_plugins_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("swift", "swift.cli", "swift.cli.main"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(cli_main=lambda: None))
    monkeypatch.setattr(
        sys, "argv", ["trainers", "swift", "sft", "--external_plugins", "mine.py", "--model", "vlm"]
    )
    trainers.main()
    assert sys.argv[2:5] == ["--external_plugins", trainers.__file__, "mine.py"]
    assert "--template" in sys.argv
