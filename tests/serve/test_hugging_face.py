"""An exported model in transformers' own programs: the code of docs/serving.md, run as printed."""

import json
from pathlib import Path

import pytest
import transformers
from PIL import Image
from serve_checkpoints import full, tower_directory
from serving_page import block_with, check_trained, make_folder

from llava_integration.serve.build import text_config
from llava_integration.serve.export import Export, export

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    make_folder(folder)
    return folder


def test_pipeline(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pipeline's answer is that of the model itself, given LLaVA's prompt."""
    monkeypatch.chdir(here)
    code = block_with("pipeline(").replace(
        ', dtype="auto", device_map="auto"', ', device="cpu"'
    )
    exec(code, {})
    answer = capsys.readouterr().out.strip()
    processor = transformers.AutoProcessor.from_pretrained("hf/llava-7b")
    model = transformers.LlavaForConditionalGeneration.from_pretrained("hf/llava-7b")
    prompt = f"<s>{SYSTEM} USER: <image>\nWhat is it? ASSISTANT:"
    inputs = processor(images=Image.open("cat.png"), text=prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=32)[
        0, inputs["input_ids"].shape[1] :
    ]
    assert answer == processor.decode(tokens, skip_special_tokens=True).strip() != ""


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "spaces"])
def test_the_template_begins_as_llavas_prompt(tmp_path: Path, legacy: bool) -> None:
    """One <s>, whether what the template renders is tokenized with special tokens, as by
    processors, or without."""
    checkpoint = full(
        tmp_path / "llava-tiny",
        tower_directory("clip"),
        legacy=legacy,
        llm2clip_conversation="v1",
    )
    export(Export.of(checkpoint, dtype="fp32"), tmp_path / "hf")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}]
    # compared with LLaVA
    expected = [
        1,
        *processor.tokenizer(f"{SYSTEM} USER: What is it? ASSISTANT:")["input_ids"],
    ]
    text = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == expected
    assert processor(text=text)["input_ids"][0] == expected
    whole = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert whole["input_ids"][0] == expected
    assert expected.count(1) == 1


def test_rope_theta_is_exported_from_either_versions_config() -> None:
    assert text_config({"rope_theta": 1e6}, 100)["rope_theta"] == 1e6
    assert (
        text_config(
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 100
        )["rope_theta"]
        == 5e5
    )
    assert text_config({}, 100)["rope_theta"] == 10_000


def test_trainer(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tower stays, the rest is trained; labels are the answers; servers know the saved
    names."""
    monkeypatch.chdir(here)
    code = block_with("trainer = Trainer(").replace(
        "bf16=True", "use_cpu=True, report_to='none', logging_steps=1"
    )
    names: dict = {}
    exec(
        code.replace("num_train_epochs=1", "max_steps=4").replace("2e-5", "3e-3"), names
    )
    losses = [
        entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry
    ]
    assert losses[-1] < losses[0]
    batch = names["trainer"].data_collator(
        json.loads(Path("llava_v1_5_mix665k.json").read_text())
    )
    decode = names["processor"].tokenizer.decode
    learned = [decode(row[row != -100]) for row in batch["labels"]]
    assert [text.split() for text in learned] == [
        ["red</s>", "yes</s>"],
        ["blue</s>", "yes</s>"],
        ["Hello</s>"],
    ]
    assert batch["pixel_values"].shape[0] == 2
    check_trained()
