"""docs/vlm.md, run as printed: a model of ``vlm build`` trained in two stages by the package of
this environment."""

import importlib
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from serve_checkpoints import tower_directory
from tiny_llm import save_tiny_llm, tiny_tokenizer
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava_integration.serve.build import register
from llava_integration.serve.trainers import Prompt
from llm2clip_plugin.cli import main as llm2clip

# the first two bring TRL
TRAINER = next(name for name in ("swift", "llamafactory", "trl") if find_spec(name))
PAGE = (Path(__file__).parents[3] / "docs" / "vlm.md").read_text(encoding="utf-8")
HEADINGS = {"trl": "TRL", "swift": "ms-swift", "llamafactory": "LLaMA-Factory"}
TEMPLATE = """{{ bos_token }}{% for m in messages %}<user>{{ m['role'] }}
{{ m['content'] }}<end>
{% endfor %}{% if add_generation_prompt %}<user>assistant
{% endif %}"""
COLORS = {"red": (220, 30, 30), "blue": (40, 60, 230)}
QUESTION = "Which color?"
RATE = "1e-2"  # of both stages: the page's are for real models
LITTLE = (
    "--max_steps 12 --per_device_train_batch_size 2 --logging_steps 1 --torch_dtype float32 "
    "--report_to none"
)
YAML = "max_steps: 12\nper_device_train_batch_size: 2\nlogging_steps: 1\n"
SFT = (
    "max_steps=12, per_device_train_batch_size=2, logging_steps=1, use_cpu=True, "
    "bf16=False, report_to='none',"
)
RATES_HEADING = "A learning rate for each module"


def blocks(language: str, heading: str = HEADINGS[TRAINER]) -> list[str]:
    """The code of a section, by default the trainer's."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.M | re.S)


def run(*words: str) -> None:
    folders = [str(Path(sys.executable).parent), os.environ["PATH"]]
    variables = {**os.environ, "PATH": ":".join(folders)}
    done = subprocess.run(
        words, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def trl_script() -> str:
    (code,) = blocks("python")
    assert "num_train_epochs=1," in code
    code = code.replace("num_train_epochs=1,", SFT)
    return re.sub(r"(train\([12], .*?)(1e-3|2e-5)", rf"\g<1>{RATE}", code)


def train_with_trl() -> None:
    Path("sft.py").write_text(trl_script())
    run(sys.executable, "sft.py")


def train_with_swift() -> None:
    (code,) = blocks("bash")
    code = code[code.index("export") :].replace("1e-3", RATE).replace("2e-5", RATE)
    run("bash", "-ec", code.replace("--output_dir", f"{LITTLE} --output_dir"))


def write_llamafactory_files() -> None:
    (settings,) = blocks("yaml")
    (data,) = blocks("json")
    info = json.loads(data)["pretrain"]
    datasets = {
        name: {**info, "file_name": f"{name}.json"} for name in ("pretrain", "finetune")
    }
    Path("dataset_info.json").write_text(json.dumps(datasets))
    settings = settings.replace("1.0e-3", RATE.replace("1e", "1.0e")) + YAML
    Path("stage1.yaml").write_text(settings)
    settings = settings.replace("vlm/stage1", "vlm/stage2").replace(
        "vlm/stage0", "vlm/stage1"
    )
    Path("stage2.yaml").write_text(
        settings.replace("dataset: pretrain", "dataset: finetune").replace(
            ": true\n", ": false\n", 2
        )
    )


def train_with_llamafactory() -> None:
    write_llamafactory_files()
    (code,) = blocks("bash")
    for stage in ("stage1", "stage2"):
        run("bash", "-ec", code[code.index("python") :].replace("stage1", stage))


def rate_trl() -> None:
    """Stage 2 of the page on the model as it was built, with rates for tower and projector."""
    with_rates, _ = blocks("python", RATES_HEADING)
    script, calls = re.subn(
        r"trainer = SFTTrainer\(\n.*?\n    \)", "TRAINER", trl_script(), flags=re.S
    )
    assert calls == 1
    script = script.replace("TRAINER", indented(with_rates)).replace(
        'f"vlm/stage{stage - 1}"', '"vlm/stage0"'
    )
    Path("rates.py").write_text(re.sub(r"\ntrain\(1, .*\n", "\n", script))
    run(sys.executable, "rates.py")


def indented(code: str) -> str:
    return code.replace("\n", "\n    ").rstrip()


def rate_swift() -> None:
    (code,) = blocks("bash")
    (words,) = re.findall(r"its own `(--vit_lr .+?)`", PAGE)
    export, _, commands = code[code.index("export") :].partition("\n")
    _, _, second = commands.rpartition("python -m")
    second = f"python -m{second}".replace("vlm/stage1/checkpoint-*", "vlm/stage0")
    second = second.replace("2e-5", f"{RATE} {words}")
    second = second.replace("--output_dir", f"{LITTLE} --output_dir")
    run("bash", "-ec", f"{export}\n{second}")


def rate_llamafactory() -> None:
    write_llamafactory_files()
    settings = Path("stage2.yaml").read_text().replace("vlm/stage1", "vlm/stage0")
    Path("stage2.yaml").write_text(settings)
    _, script = blocks("python", RATES_HEADING)
    Path("stage2.py").write_text(script)
    (code,) = blocks("bash", RATES_HEADING)
    run("bash", "-ec", code)


def folder(stage: int) -> Path:
    """Where the trainer left its model."""
    made = Path(f"vlm/stage{stage}")
    return next(made.glob("checkpoint-*")) if TRAINER == "swift" and stage else made


def losses(stage: int) -> list[float]:
    states = sorted(Path(f"vlm/stage{stage}").rglob("trainer_state.json"))
    return [
        row["loss"]
        for row in json.loads(states[0].read_text())["log_history"]
        if "loss" in row
    ]


def conversation(name: str) -> list[dict[str, Any]]:
    image = {"type": "image", "path": f"images/{name}.png"}
    text = {"type": "text", "text": QUESTION}
    return [
        {"role": "user", "content": [image, text]},
        {"role": "assistant", "content": [{"type": "text", "text": name}]},
    ]


def encoded(processor: Any, turns: list[dict[str, Any]]) -> Any:
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(
        [turns], add_generation_prompt=len(turns) == 1, **options
    )


def build(folder: Path, tower: str) -> None:
    """``vlm/stage0`` and data of two images, here."""
    llm = save_tiny_llm(folder / "qwen3", "qwen3", width=128)
    Path("template.jinja").write_text(TEMPLATE)
    words = [
        "--tower",
        str(tower_directory(tower)),
        "--llm",
        str(llm),
        "--chat-template",
        "template.jinja",
    ]
    assert llm2clip(["vlm", "build", *words, "--output", "vlm/stage0"]) == 0
    Path("images").mkdir()
    rows = []
    for number, (name, color) in enumerate(COLORS.items()):
        Image.new("RGB", (80, 50 + number), color).save(f"images/{name}.png")
        # LLaVA's data has both
        question = f"<image>\n{QUESTION}" if number else f"{QUESTION}\n<image>"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": name}]
        rows.append({"id": name, "image": f"{name}.png", "conversations": turns})
    for name in ("pretrain.json", "finetune.json"):
        Path(name).write_text(json.dumps(rows))


@pytest.mark.parametrize("tower", ["clip", "eva02"])
def test_two_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tower: str
) -> None:
    """The first loss is transformers' own, losses fall, stage 1 trains the projector alone, and
    answers are learned."""
    monkeypatch.chdir(tmp_path)
    build(tmp_path, tower)
    globals()[f"train_with_{TRAINER}"]()

    register()
    processor: Any = AutoProcessor.from_pretrained("vlm/stage0")
    model: Any = LlavaForConditionalGeneration.from_pretrained("vlm/stage0").eval()
    total = 0.0
    count = 0
    for name in COLORS:
        batch = encoded(processor, conversation(name))
        length = (
            batch["input_ids"].shape[1]
            - encoded(processor, conversation(name)[:1])["input_ids"].shape[1]
        )
        labels = batch["input_ids"].clone()
        labels[:, :-length] = -100
        total = total + length * model(**batch, labels=labels).loss.item()
        count = count + length
    first = losses(1)
    second = losses(2)
    assert len(first) == len(second) == 12
    assert first[0] == pytest.approx(total / count, rel=1e-3)
    assert first[-1] < first[0]
    assert second[-1] < second[0] < first[0]

    weights = [load_file(folder(stage) / "model.safetensors") for stage in range(3)]
    assert weights[0].keys() == weights[1].keys() == weights[2].keys()
    changed = []
    for old, new in pairwise(weights):
        changed.append({name for name in old if not old[name].equal(new[name])})
    assert {name.split(".")[0] for name in changed[0]} == {"multi_modal_projector"}
    assert {name.split(".")[0] for name in changed[1]} == {
        "multi_modal_projector",
        "language_model",
        "vision_tower",
    }

    trained: Any = LlavaForConditionalGeneration.from_pretrained(
        folder(2), dtype=torch.float32
    ).eval()
    processor: Any = AutoProcessor.from_pretrained(folder(2))
    for name in COLORS:
        inputs = encoded(processor, conversation(name)[:1])
        answer = trained.generate(**inputs, max_new_tokens=8, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        assert processor.decode(answer).startswith(f"{name}<end>")


def test_each_module_has_its_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The groups of the saved optimizer: the page's rates for tower and projector, the settings'
    for the LLM, and every parameter in one of them."""
    monkeypatch.chdir(tmp_path)
    build(tmp_path, "clip")
    globals()[f"rate_{TRAINER}"]()
    (saved,) = Path("vlm/stage2").rglob("optimizer.pt")
    groups = torch.load(saved, weights_only=True)["param_groups"]
    counts: dict[float, int] = {}
    for group in groups:
        rate = group["initial_lr"]
        counts[rate] = counts.get(rate, 0) + len(group["params"])
    model: Any = LlavaForConditionalGeneration.from_pretrained("vlm/stage0")
    names = [name for name, _ in model.named_parameters()]
    tower = sum("vision_tower" in name for name in names)
    projector = sum("multi_modal_projector" in name for name in names)
    others = len(names) - tower - projector
    assert counts == {2e-6: tower, 1e-4: projector, float(RATE): others}


@pytest.mark.skipif(TRAINER != "trl", reason="TRL 1 has the chat templates")
@pytest.mark.parametrize(
    "name", ["llama3_2", "qwen2_5", "qwen3", "gemma3", "phi3", "lfm2"]
)
def test_prompts_are_those_of_real_templates(name: str) -> None:
    trl = importlib.import_module("trl")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        Path(str(trl.__file__)).parent / "chat_templates" / f"{name}.jinja"
    ).read_text()
    texts = ("What is it?", "A cat.", "Sure?")
    turns = [
        {"role": ("user", "assistant")[n % 2], "content": text}
        for n, text in enumerate(texts)
    ]
    prompt = Prompt.of(tokenizer)
    assert prompt.join(*texts) == tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )
    assert prompt.end
    assert prompt.before
    assert prompt.end not in prompt.before


def test_a_template_of_unlike_turns_is_one_line() -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ loop.index }}{{ m['content'] }}<end>{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"turns are not alike.*--chat-template FILE"):
        Prompt.of(tokenizer)
