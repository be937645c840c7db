"""What is learned of LLaVA's JSON, whatever a chat template writes around the last answer."""

from itertools import groupby
from typing import Any

import pytest
import torch
from tiny_llm import CHATML, chatml_tokenizer

from llava_integration.serve.rows import LlavaRows
from llava_integration.serve.trainers import Prompt, image_first

SAID = (
    ("human", "What color?"),
    ("gpt", "red"),
    ("human", "Which shape?"),
    ("gpt", "a square"),
)
# Qwen 3
THOUGHT = (
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
)
TEMPLATES = {
    "alike": CHATML,
    "thought": CHATML.replace("'\\n' + m", "'\\n' }}" + THOUGHT + "{{ m"),
    "end": CHATML + "{% if not add_generation_prompt %}<eos>{% endif %}",  # Phi 3
}
# GLM 4: an answer ends where the next question begins
NO_END = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
NO_END += "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
ENDS = {
    "thought": "<think>\n\n</think>\n\na square<|im_end|>\n",
    "end": "a square<|im_end|>\n<eos>",
}


class TextProcessor:
    """Of texts alone, with the arguments of transformers' processors."""

    def __init__(self, template: str) -> None:
        self.tokenizer = chatml_tokenizer()
        self.tokenizer.chat_template = template
        self.decode = self.tokenizer.decode

    def apply_chat_template(
        self, chats: list[Any], *, processor_kwargs: Any = (), **options: Any
    ) -> Any:
        flat = []
        for chat in chats:
            flat.append(
                [{**turn, "content": turn["content"][-1]["text"]} for turn in chat]
            )
        return self.tokenizer.apply_chat_template(
            flat, **dict(processor_kwargs), **options
        )


def learned(template: str, *said: tuple[str, str]) -> list[str]:
    """The stretches of a row, padded next to a longer one, that have labels."""
    rows = []
    for turns in (said, 3 * SAID):
        rows.append(
            {"conversations": [{"from": who, "value": text} for who, text in turns]}
        )
    batch = LlavaRows(TextProcessor(template), "")(rows)
    has_label = batch["labels"] >= 0
    assert torch.equal(batch["labels"].clamp_min(0), batch["input_ids"] * has_label)
    tokenizer = chatml_tokenizer()
    labels = batch["labels"][0].tolist()
    stretches = [
        [*ids]
        for is_learned, ids in groupby(labels, lambda label: label >= 0)
        if is_learned
    ]
    return [str(tokenizer.decode(ids)) for ids in stretches]


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_alone_are_learned(name: str) -> None:
    expected = ["red<|im_end|>\n", ENDS.get(name, "a square<|im_end|>\n")]
    assert (
        learned(TEMPLATES[name], *SAID)
        == learned(TEMPLATES[name], ("gpt", "Hello"), *SAID)
        == expected
    )


@pytest.mark.parametrize("question", ["<image>\nWhat color?", "What color?\n<image>"])
def test_the_image_is_before_the_first_question(question: str) -> None:
    turns = [
        {"from": "human", "value": question},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "Sure?"},
    ]
    first, _, last = LlavaRows(TextProcessor(CHATML), "photos").chat(
        {"image": "a.png", "conversations": turns}
    )
    text = {"type": "text", "text": "What color?"}
    assert first == {
        "role": "user",
        "content": [{"type": "image", "path": "photos/a.png"}, text],
    }
    assert last == {"role": "user", "content": [{"type": "text", "text": "Sure?"}]}


@pytest.mark.parametrize(
    "text", ["<image>\nWhat color?", "What color?\n<image>", "<image>What color?"]
)
def test_trainers_have_the_image_before_the_question(text: str) -> None:
    assert image_first(text) == "<image>\nWhat color?"
    assert image_first("What color?") == "What color?"
    assert image_first("<image> or <image>?") == "<image> or <image>?"


@pytest.mark.parametrize("longer", [SAID, SAID[:2]])
def test_an_answer_without_an_end_learns_the_token_of_the_next_question(
    longer: tuple[tuple[str, str], ...],
) -> None:
    processor = TextProcessor(NO_END)
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|user|>", "<|assistant|>"]}
    )
    rows = []
    for turns in (SAID, longer):
        rows.append(
            {"conversations": [{"from": who, "value": text} for who, text in turns]}
        )
    batch = LlavaRows(processor, "")(rows)
    for number, answers in enumerate((2, len(longer) // 2)):
        labels = batch["labels"][number]
        learned_text = tokenizer.decode(labels[labels >= 0])
        assert learned_text == "".join(["red<|user|>", "a square<|user|>"][:answers])
        seen = batch["input_ids"][number][batch["attention_mask"][number] == 1]
        assert tokenizer.decode(seen).count("<|user|>") == answers + 1
        assert (
            labels[labels >= 0].tolist()
            == batch["input_ids"][number][labels >= 0].tolist()
        )


def test_other_trainers_refuse_a_template_without_an_end_of_an_answer() -> None:
    tokenizer = chatml_tokenizer()
    assert Prompt.of(tokenizer).end == "<|im_end|>\n"
    tokenizer.chat_template = NO_END
    with pytest.raises(ValueError, match=r"would not learn to stop; .*--chat-template"):
        Prompt.of(tokenizer)


def test_a_template_without_any_end_of_an_answer_is_refused() -> None:
    plain = NO_END.replace("<|", "").replace("|>", ": ")
    with pytest.raises(
        ValueError, match=r"no token that ends an answer .*--chat-template"
    ):
        learned(plain, *SAID)


def test_a_template_that_begins_an_answer_otherwise_is_refused() -> None:
    with pytest.raises(ValueError, match="--chat-template"):
        learned(
            CHATML.replace(
                "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"
            ),
            *SAID,
        )
