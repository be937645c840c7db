"""Training in ChatML: LLaVA's own code ignores every label; with the hook each answer is learned to
its end."""

# LLaVA is not installed where types are checked.
# pyright: reportMissingImports=false

import importlib.util
import sys
from itertools import groupby

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llava_integration.plug import training as chatml

pytestmark = pytest.mark.both_stacks
IMAGE = -200
IGNORED = -100


@pytest.fixture
def tokenizer():
    """A byte a token, the two newlines of "\\n\\n" one, ChatML's words whole."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = next(
        iter(pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\n"))
    )[0]
    vocabulary = {
        letter: number for number, letter in enumerate([*alphabet, newline * 2])
    }
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[(newline, newline)]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )


@pytest.fixture(params=["chatml_direct", "mpt"])
def template(request, monkeypatch):
    from llava import conversation

    monkeypatch.setattr(
        conversation, "default_conversation", conversation.conv_templates[request.param]
    )


def talk(*texts):
    return [
        {"from": ("human", "gpt")[number % 2], "value": text}
        for number, text in enumerate(texts)
    ]


def learned(made, tokenizer):
    """The texts of the runs of labels that are learned."""
    ids = made["input_ids"][0].tolist()
    labels = made["labels"][0].tolist()
    assert len(ids) == len(labels)
    assert all(
        label in (IGNORED, token) for label, token in zip(labels, ids, strict=True)
    )
    runs = groupby(labels, lambda label: label != IGNORED)
    return [tokenizer.decode(list(run)) for is_learned, run in runs if is_learned]


TALKS = [
    ("<image>\nWhat?", "a red hat"),
    ("<image>\nWhat?", "a hat", "And now?", "two"),
    ("Say it.", "blue"),
]


@pytest.mark.parametrize("texts", [*TALKS, ("<image>\nWhat?", "\nnext line")])
def test_answers_are_learned_to_their_end(template, tokenizer, texts):
    made = chatml.preprocess([talk(*texts)], tokenizer, has_image="<image>" in texts[0])
    answers = [f"{text}<|im_end|>" for text in texts[1::2]]
    # the prompt's joins it
    assert learned(made, tokenizer) == [
        "\n" * text.startswith("\n") + text for text in answers
    ]
    assert made["input_ids"][0].tolist().count(IMAGE) == texts[0].count("<image>")


def llavas_own_program():
    """LLaVA's training program under another name: earlier tests may have given the real one this
    package's labels."""
    installed = importlib.util.find_spec("llava.train.train")
    spec = importlib.util.spec_from_file_location("llavas_own_train", installed.origin)
    program = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = program  # its dataclasses look themselves up there
    spec.loader.exec_module(program)
    return program


def test_the_ids_are_those_of_llava(template, tokenizer):
    train = llavas_own_program()
    tokenizer.pad_token = tokenizer.bos_token
    turns = talk("<image>\nWhat?", "a hat", "And now?", "two")
    theirs = train.preprocess_mpt([turns], tokenizer, has_image=True)
    assert set(theirs["labels"][0].tolist()) == {IGNORED}
    ours = chatml.preprocess([turns], tokenizer, has_image=True)
    assert ours["input_ids"][0].tolist() == theirs["input_ids"][0].tolist()
