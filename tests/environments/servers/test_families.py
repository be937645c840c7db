"""vLLM's engine on towers of every family that tests of the server leave out: the tokens are
transformers' own."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from greedy import TOKENS
from PIL import Image
from serve_checkpoints import full, tower_directory
from tiny_llm import save_tiny_llm
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from llava_integration.serve.build import register
from llava_integration.serve.export import Export, export
from llm2clip_plugin.cli import main as llm2clip

TOWERS = ("clip", "siglip", "dinov3", "eva02", "pe_core")
LLMS = ("smollm2", "qwen3", "gemma3")
# of vlm build, and saved again by transformers
TRAINED = tuple(map("+".join, itertools.product(TOWERS, LLMS)))
STOCK = ("metaclip2", *TRAINED[: 2 * len(LLMS)])  # vLLM opens them without our plugin
FAMILIES = (
    *TRAINED,
    "openvision",
    "aimv2",
    "aimv2_native",
    "dinov3",
    "radio",
    "pe_core",
    "metaclip2",
)
COLORS = ("red", "blue")
TEMPLATE = """{{ bos_token }}{% for m in messages %}<user>{{ m['role'] }}
{{ m['content'] }}<end>
{% endfor %}{% if add_generation_prompt %}<user>assistant
{% endif %}"""
# as bench-mllm asks
QUESTION = (
    "Which color is the picture?\nAnswer the question using a single word or phrase."
)
ENGINE = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An exported LLaVA for each family."""
    root = tmp_path_factory.mktemp("families")
    made = {}
    # vLLM's attention on a CPU needs 32 or wider
    one_head = {"num_attention_heads": 1, "num_key_value_heads": 1}
    for family in TRAINED:
        made[family] = trained(root / family, *family.split("+"), steps=1)
    for family in FAMILIES[len(TRAINED) :]:
        checkpoint = full(root / f"llava-{family}", tower_directory(family), **one_head)
        made[family] = root / f"hf-{family}"
        export(Export.of(checkpoint, dtype="fp32"), made[family])
    Image.effect_noise((30, 20), 80).convert("RGB").save(root / "noise.png")
    return made


def trained(folder: Path, tower: str, llm: str = "qwen3", *, steps: int = 40) -> Path:
    """A model of ``vlm build`` that has learned to answer with a color, saved by transformers'
    Trainer."""
    tiny = save_tiny_llm(folder.with_suffix(".llm"), llm, width=128)
    built = folder.with_suffix(".built")
    (folder.parent / "chat.jinja").write_text(TEMPLATE)
    words = [
        "--tower",
        str(tower_directory(tower)),
        "--llm",
        str(tiny),
        "--output",
        str(built),
    ]
    words += (
        []
        if llm == "smollm2"
        else ["--chat-template", str(folder.parent / "chat.jinja")]
    )
    assert llm2clip(["vlm", "build", *words]) == 0
    register()
    processor = AutoProcessor.from_pretrained(built)
    model = LlavaForConditionalGeneration.from_pretrained(built)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    rows = []
    for color in COLORS:
        content = [
            {"type": "image", "image": Image.new("RGB", (40, 30), color)},
            {"type": "text", "text": QUESTION},
        ]
        turns = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": color},
        ]
        row = {
            name: value[0]
            for name, value in processor.apply_chat_template(turns, **options).items()
        }
        asked = processor.apply_chat_template(
            turns[:1], add_generation_prompt=True, **options
        )["input_ids"].shape[1]
        labels = torch.cat((torch.full((asked,), -100), row["input_ids"][asked:]))
        rows.append({**row, "labels": labels})
    settings = TrainingArguments(
        str(folder),
        max_steps=steps,
        learning_rate=3e-3,
        per_device_train_batch_size=1,
        use_cpu=True,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = Trainer(model, settings, train_dataset=rows, processing_class=processor)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture(scope="module")
def served(models: dict[str, Path]) -> dict[str, dict]:
    """vLLM's answers: of stock vLLM for STOCK, with our plugin for the others."""
    answers = {}
    root = models[FAMILIES[0]].parent
    for stock in (True, False):
        names = [
            str(folder)
            for family, folder in models.items()
            if (family in STOCK) == stock
        ]
        variables = {
            **os.environ,
            **ENGINE,
            **QUIET,
            **({"VLLM_PLUGINS": ""} if stock else {}),
        }
        output = root / f"answers-{stock}.json"
        words = [
            sys.executable,
            Path(__file__).with_name("greedy.py"),
            root / "noise.png",
            QUESTION,
            output,
            *names,
        ]
        done = subprocess.run(
            words, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-6000:]
        answers |= json.loads(output.read_text())
    return {family: answers[str(folder)] for family, folder in models.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers(
    models: dict[str, Path], served: dict[str, dict], family: str
) -> None:
    """And so are their log probabilities, up to float32 sums in another order."""
    register()
    processor = AutoProcessor.from_pretrained(models[family])
    model = LlavaForConditionalGeneration.from_pretrained(
        models[family], dtype=torch.float32
    ).eval()
    content = [
        {"type": "image", "path": str(models[family].parent / "noise.png")},
        {"type": "text", "text": QUESTION},
    ]
    options = {
        "add_generation_prompt": True,
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
    }
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], **options
    )
    forced = {
        "min_new_tokens": TOKENS,
        "max_new_tokens": TOKENS,
        "eos_token_id": None,
        "do_sample": False,
    }
    generated = model.generate(
        **inputs, **forced, output_logits=True, return_dict_in_generate=True
    )
    tokens = generated.sequences[0, inputs["input_ids"].shape[1] :]
    steps = torch.stack([step[0] for step in generated.logits]).log_softmax(-1)
    expected = steps.gather(1, tokens[:, None])[:, 0]
    assert served[family]["prompt"] == inputs["input_ids"][0].tolist()
    assert served[family]["tokens"] == tokens.tolist()
    assert torch.allclose(torch.tensor(served[family]["logprobs"]), expected, atol=1e-4)
