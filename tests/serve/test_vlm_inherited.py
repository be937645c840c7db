"""Inherited words through ``vlm build``: what saves time changes no number."""

import warnings
from pathlib import Path

import inherited
import pytest
import torch
import transformers
from miniature import open_rows
from miniature_data import talk
from PIL import Image
from tiny_vlm import build

NAMES = ["a", "red square", "the house of a friend", "no"]


def make_model(llm: Path, folder: Path) -> tuple[Path, Path]:
    """A built model with the chat template of inherited words, and the folder of its image."""
    images = folder / "images"
    images.mkdir()
    Image.new("RGB", (40, 30), "red").save(images / "red.png")
    template = folder / "chat_template.jinja"
    template.write_text(inherited.TEMPLATE)
    model = build("clip", llm, folder / "model", "--chat-template", str(template))
    return model, images


def test_names_and_answers_cost_less_and_are_the_same(
    llms: Path, tmp_path: Path
) -> None:
    folder, images = make_model(llms / "smollm2", tmp_path)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    rows = open_rows(folder, images)
    samples = [talk("1", "", name, "red.png") for name in NAMES]

    # each name by a forward pass of its own
    question = {**samples[0], "conversations": samples[0]["conversations"][:1]}
    inputs = rows.encode([rows.chat(question)], add_generation_prompt=True)
    expected = []
    lengths = set()
    for name in NAMES:
        ids = rows.processor.tokenizer(name, add_special_tokens=False)["input_ids"]
        whole = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
        with torch.inference_mode():
            output = model(input_ids=whole, pixel_values=inputs["pixel_values"])
        next_TV = output.logits[0].log_softmax(dim=-1)
        start = inputs["input_ids"].shape[1] - 1
        total = torch.tensor(0.0)
        for place, token in enumerate(ids, start=start):
            total += next_TV[place, token]
        expected.append(float(total))
        lengths.add(len(ids))
    assert len(lengths) >= 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of what a later transformers takes away
        asked = inherited.log_likelihoods(model, rows, {**samples[0], "names": NAMES})
    assert asked.tolist() == pytest.approx(expected, abs=1e-4)

    whole_batch = rows(samples)
    batch = open_rows(folder, images, inherited.AnswerRows)(samples)
    with torch.inference_mode():
        whole_output = model(**whole_batch)
        output = model(**batch)
    assert output.loss == pytest.approx(float(whole_output.loss), abs=1e-5)
    assert output.logits.shape[1] < whole_output.logits.shape[1]
