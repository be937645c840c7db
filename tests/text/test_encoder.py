"""A caption's embedding is its own: not its batch's, not its padding's, not the order's."""

import dataclasses
from pathlib import Path

import pytest
import torch
from text_helpers import write_moved
from transformers import AutoModel, AutoTokenizer

from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import CaptionEncoder

CAPTIONS = [
    "a red bicycle",
    "two dogs run over the wet grass while the cat sleeps in a box, and a man reads a newspaper at the window of a hut",
    "ein Hund",
    "x",
    "the lake",
    "猫が箱の中で眠る",
]
# float32, other order of the same sums: a few units in the last place of 32 numbers, through two blocks
TOLERANCE = 1e-5


def encoder(llm: Path, **settings) -> CaptionEncoder:
    return CaptionEncoder(EncoderConfig(llm=str(llm), compute_dtype="float32", **settings), device="cpu")


def close(left: torch.Tensor, right: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether rows differ by less than ``tolerance`` of their norm."""
    return bool(((left - right).norm(dim=-1) < tolerance * right.norm(dim=-1)).all())


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embedding_is_independent_of_batch_and_padding(any_llm: Path, attention: str, pooling: str) -> None:
    teacher = encoder(any_llm, attention=attention, pooling=pooling)
    rows = teacher.tokenize(CAPTIONS)
    alone = torch.cat([teacher.embed_tokens([row]) for row in rows])
    assert max(map(len, rows)) > 2 * 16  # beyond both sides of the tiny models' sliding window
    assert close(teacher.embed_tokens(rows), alone)
    assert close(teacher.embed_tokens(rows[:2]), alone[:2])
    assert close(teacher.encode(CAPTIONS, tokens_per_batch=64), alone)
    assert close(teacher.encode(CAPTIONS[::-1]), alone.flip(0))
    assert not close(alone[0], alone[2], tolerance=0.1)  # else the above would say nothing
    again = teacher.encode([CAPTIONS[4], "x", CAPTIONS[4]])
    assert torch.equal(again[0], again[2]) and teacher.encode([]).shape == (0, 32)


def test_bidirectional_sees_what_comes_later_and_causal_does_not(any_llm: Path) -> None:
    """Mean over the first tokens alone, so only attention can carry the last word to them."""
    for attention, sees in (("bidirectional", True), ("causal", False)):
        teacher = encoder(any_llm, attention=attention)
        states = []
        for caption in ("a red bicycle", "a red boat"):
            ids = torch.tensor(teacher.tokenize([caption]))
            out = teacher.model.llm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            states.append(out.last_hidden_state[0, :3])
        assert close(states[0], states[1]) is not sees, attention


def test_layer_is_the_hidden_state_of_that_number(any_llm: Path) -> None:
    model = AutoModel.from_pretrained(any_llm, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(any_llm)
    ids = torch.tensor([tokenizer("a red bicycle")["input_ids"]])
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    for layer in (0, 1, -2, -1, 2):
        found = encoder(any_llm, attention="causal", layer=layer).encode(["a red bicycle"])
        assert close(found, states[layer].mean(dim=1)), layer


def test_prompt_is_attended_but_not_pooled(llama: Path) -> None:
    plain, prompted = encoder(llama), encoder(llama, prompt="Instruct: find the picture. Query: ")
    joint = prompted.tokenizer("Instruct: find the picture. Query: a boat")["input_ids"]
    assert prompted.tokenize(["a boat"]) == [joint]  # white space goes with the caption, as in running text
    rows = prompted.tokenize(["a boat"])
    length = len(plain.tokenizer(" a boat", add_special_tokens=False)["input_ids"])
    ids = torch.tensor(rows)
    hidden = prompted.model.llm(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    pooled = torch.cat([hidden[:1], hidden[-length:]]).mean(dim=0)
    assert close(prompted.encode(["a boat"])[0], pooled)
    without_bos = encoder(llama, prompt="Instruct: find the picture. Query: ", include_bos=False)
    assert close(without_bos.encode(["a boat"])[0], hidden[-length:].mean(dim=0))
    assert not close(prompted.encode(["a boat"]), plain.encode(["a boat"]), tolerance=1e-2)
    both = encoder(llama, query_prompt="Query: ")  # for queries alone
    assert torch.equal(both.encode(["a boat"]), plain.encode(["a boat"]))
    assert close(both.encode(["a boat"], query=True), encoder(llama, prompt="Query: ").encode(["a boat"]))


def test_chat_template_is_written_out(llama: Path) -> None:
    own, literal = encoder(llama, chat_template="user"), encoder(llama, chat_template="<user>\n{caption}<end>")
    expected = own.tokenizer("<bos><user>\na boat<end>", add_special_tokens=False)["input_ids"]
    assert own.tokenize(["a boat"]) == literal.tokenize(["a boat"]) == [expected]
    assert own.identity().chat_template == "<bos><user>\n{caption}<end>"


def test_tokenizer_that_ends_with_eos_pools_it_last(make_llm, tmp_path: Path) -> None:
    teacher = encoder(make_llm(tmp_path / "eos", "llama", eos=True), pooling="last")
    (row,) = teacher.tokenize(["a boat"])
    assert row[0] == 1 and row[-1] == 2
    ids = torch.tensor([row])
    hidden = teacher.model.llm(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert close(teacher.encode(["a boat"])[0], hidden[0, -1])


def test_special_words_in_a_caption_are_text(llama: Path) -> None:
    teacher = encoder(llama)
    (row,) = teacher.tokenize(["a <eos> <bos> boat <pad>"])
    assert not set(row[1:]) & {0, 1, 2, 3, 4}
    assert teacher.tokenizer.decode(row[1:]) == "a <eos> <bos> boat <pad>"


def test_long_caption_is_cut_and_counted(llama: Path) -> None:
    teacher = encoder(llama, max_tokens=16, chat_template="user")
    long, short = teacher.tokenize(["boat " * 10_000, "a boat"])
    assert len(long) == 16 and long[-1] == teacher.tokenizer.convert_tokens_to_ids("<end>")
    assert teacher.count_truncated == 1
    assert len(short) < 16
    found = teacher.encode(["boat " * 10_000, "a boat"])
    assert torch.isfinite(found).all() and teacher.count_truncated == 2


def test_identity_follows_everything_that_changes_an_embedding(make_llm, llama: Path, tmp_path: Path) -> None:
    base = encoder(llama).identity()
    changes = [
        {"attention": "causal"},
        {"pooling": "last"},
        {"layer": 1},
        {"prompt": "Query: "},
        {"chat_template": "user"},
        {"max_tokens": 64},
        {"include_bos": False},
    ]
    prints = {encoder(llama, **change).identity().fingerprint for change in changes}
    prints |= {base.fingerprint, encoder(make_llm(tmp_path / "other", "llama", seed=1)).identity().fingerprint}
    prints.add(encoder(make_llm(tmp_path / "eos", "llama", eos=True)).identity().fingerprint)
    assert len(prints) == len(changes) + 3
    for name in ("adapter_sha256", "quantization", "post"):
        assert dataclasses.replace(base, **{name: "another"}).fingerprint != base.fingerprint, name
    moved = make_llm(tmp_path / "moved", "llama")
    assert encoder(moved).identity().fingerprint == base.fingerprint  # the same LLM in another folder


def test_bfloat16_is_close_to_float32_and_to_itself_in_a_batch(llama: Path) -> None:
    exact = encoder(llama).encode(CAPTIONS)
    rough = CaptionEncoder(EncoderConfig(llm=str(llama), compute_dtype="bfloat16"), device="cpu")
    rows = rough.tokenize(CAPTIONS)
    alone = torch.cat([rough.embed_tokens([row]) for row in rows])
    assert torch.nn.functional.cosine_similarity(alone, exact).min() > 0.999
    assert close(rough.embed_tokens(rows), alone, tolerance=2e-2)  # 8 bits of mantissa: 4e-3 a rounding


def test_an_adapter_counts_in_half_precision_as_in_float32(llama: Path, tmp_path: Path) -> None:
    _, adapter = write_moved(llama, tmp_path / "adapter")
    exact, plain = encoder(llama, adapter=str(adapter)).encode(CAPTIONS), encoder(llama).encode(CAPTIONS)
    config = EncoderConfig(llm=str(llama), adapter=str(adapter), compute_dtype="bfloat16")
    rough = CaptionEncoder(config, device="cpu").encode(CAPTIONS)
    assert torch.nn.functional.cosine_similarity(plain, exact).min() < 0.9  # the adapter changes something
    assert torch.nn.functional.cosine_similarity(rough, exact).min() > 0.999
