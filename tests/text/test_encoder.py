"""A caption's embedding is its own: not its batch's, not its padding's; an LLM that is called
bidirectional is."""

import dataclasses
from pathlib import Path

import pytest
import torch
from text_helpers import moved, write_moved
from tiny_llm import HYBRIDS
from tokenizers.normalizers import Prepend, Replace, Sequence
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from llm2clip_plugin.stages.llm_config import FinetuneConfig
from llm2clip_plugin.text import llm as llms
from llm2clip_plugin.text.config import EncoderConfig, LoraSettings
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.frames import build_frame, tokenize
from llm2clip_plugin.text.llm import check_attention, set_attention, set_kernels

LONG = (
    "two dogs run over the wet grass while a cat sleeps in a box, "
    "and a man reads a newspaper at the window of a hut"
)
CAPTIONS = ["a red bicycle", LONG, "ein Hund", "x", "the lake", "猫が箱の中で眠る"]
# float32, other order of the same sums: a few units in the last place of 32 numbers, through two
# blocks
TOLERANCE = 1e-5


def encoder(llm: Path, **settings) -> CaptionEncoder:
    return CaptionEncoder(
        EncoderConfig(llm=str(llm), compute_dtype="float32", **settings), device="cpu"
    )


def close(
    left: torch.Tensor, right: torch.Tensor, tolerance: float = TOLERANCE
) -> bool:
    """Whether rows differ by less than ``tolerance`` of their norm."""
    return bool(((left - right).norm(dim=-1) < tolerance * right.norm(dim=-1)).all())


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embedding_is_independent_of_batch_and_padding(
    any_llm: Path, attention: str, pooling: str
) -> None:
    teacher = encoder(any_llm, attention=attention, pooling=pooling)
    rows = teacher.tokenize(CAPTIONS)
    alone = torch.cat([teacher.embed_tokens([row]) for row in rows])
    # beyond both sides of the tiny models' sliding window
    assert max(map(len, rows)) > 2 * 16
    assert close(teacher.embed_tokens(rows), alone)
    assert close(teacher.embed_tokens(rows[:2]), alone[:2])
    assert close(teacher.encode(CAPTIONS, tokens_per_batch=64), alone)
    assert close(teacher.encode(CAPTIONS[::-1]), alone.flip(0))
    # else the above would say nothing
    assert not close(alone[0], alone[2], tolerance=0.1)
    again = teacher.encode([CAPTIONS[4], "x", CAPTIONS[4]])
    assert torch.equal(again[0], again[2])
    assert teacher.encode([]).shape == (0, 32)


def test_bidirectional_sees_what_comes_later_and_causal_does_not(any_llm: Path) -> None:
    """Mean over the first tokens alone, so only attention can carry the last word to them."""
    for attention, sees in (("bidirectional", True), ("causal", False)):
        teacher = encoder(any_llm, attention=attention)
        states = []
        for caption in ("a red bicycle", "a red boat"):
            ids = torch.tensor(teacher.tokenize([caption]))
            out = teacher.model.llm(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            )
            states.append(out.last_hidden_state[0, :3])
        assert close(states[0], states[1]) is not sees, attention


def test_layer_is_the_hidden_state_of_that_number(any_llm: Path) -> None:
    model = AutoModel.from_pretrained(any_llm, dtype=torch.float32).eval()
    ids = torch.tensor(
        [AutoTokenizer.from_pretrained(any_llm)("a red bicycle")["input_ids"]]
    )
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    for layer in (0, 1, -2, -1, 2):
        of_layer = encoder(any_llm, attention="causal", layer=layer)
        assert close(of_layer.encode(["a red bicycle"]), states[layer].mean(dim=1)), (
            layer
        )


def test_prompt_is_attended_but_not_pooled(llama: Path) -> None:
    plain = encoder(llama)
    prompted = encoder(llama, prompt="Instruct: find the picture. Query: ")
    joint = prompted.tokenizer("Instruct: find the picture. Query: a boat")["input_ids"]
    # white space goes with the caption, as in running text
    assert prompted.tokenize(["a boat"]) == [joint]
    length = len(plain.tokenizer(" a boat", add_special_tokens=False)["input_ids"])
    ids = torch.tensor([joint])
    hidden = prompted.model.llm(
        input_ids=ids, attention_mask=torch.ones_like(ids)
    ).last_hidden_state[0]
    pooled = torch.cat([hidden[:1], hidden[-length:]]).mean(dim=0)
    assert close(prompted.encode(["a boat"])[0], pooled)
    without_bos = encoder(
        llama, prompt="Instruct: find the picture. Query: ", include_bos=False
    )
    assert close(without_bos.encode(["a boat"])[0], hidden[-length:].mean(dim=0))
    assert not close(
        prompted.encode(["a boat"]), plain.encode(["a boat"]), tolerance=1e-2
    )
    both = encoder(llama, query_prompt="Query: ")  # for queries alone
    assert torch.equal(both.encode(["a boat"]), plain.encode(["a boat"]))
    assert close(
        both.encode(["a boat"], query=True),
        encoder(llama, prompt="Query: ").encode(["a boat"]),
    )


def test_chat_template_is_written_out(llama: Path) -> None:
    templated = encoder(llama, chat_template="user")
    literal = encoder(llama, chat_template="<user>\n{caption}<end>")
    expected = templated.tokenizer(
        "<bos><user>\na boat<end>", add_special_tokens=False
    )["input_ids"]
    assert templated.tokenize(["a boat"]) == literal.tokenize(["a boat"]) == [expected]
    assert templated.identity().chat_template == "<bos><user>\n{caption}<end>"
    # as SmolLM3's
    templated.tokenizer.chat_template = (
        "{{ strftime_now('%d %B') }}<user>{{ messages[0]['content'] }}<end>"
    )
    assert (
        llms.literal_template(templated.tokenizer, "user")
        == "26 Jul 2024<user>{caption}<end>"
    )
    # as Mistral's
    templated.tokenizer.backend_tokenizer.normalizer = Sequence(
        [Prepend("▁"), Replace(" ", "▁")]
    )
    frame = build_frame(templated.tokenizer, "", "Query: ")
    assert tokenize(templated.tokenizer, [frame], ["a boat"], 64)[0] == [
        templated.tokenizer("Query: a boat")["input_ids"]
    ]


def test_tokenizer_that_ends_with_eos_pools_it_last(make_llm, tmp_path: Path) -> None:
    teacher = encoder(make_llm(tmp_path / "eos", "llama", eos=True), pooling="last")
    ids = torch.tensor(teacher.tokenize(["a boat"]))
    assert ids[0, 0] == 1
    assert ids[0, -1] == 2
    hidden = teacher.model.llm(
        input_ids=ids, attention_mask=torch.ones_like(ids)
    ).last_hidden_state
    assert close(teacher.encode(["a boat"])[0], hidden[0, -1])


def test_special_words_in_a_caption_are_text(llama: Path) -> None:
    teacher = encoder(llama)
    (row,) = teacher.tokenize(["a <eos> <bos> boat <pad>"])
    assert not set(row[1:]) & {0, 1, 2, 3, 4}
    assert teacher.tokenizer.decode(row[1:]) == "a <eos> <bos> boat <pad>"


def test_long_caption_is_cut_and_counted(llama: Path) -> None:
    teacher = encoder(llama, max_tokens=16, chat_template="user")
    long, short = teacher.tokenize(["boat " * 10_000, "a boat"])
    assert len(long) == 16
    assert long[-1] == teacher.tokenizer.convert_tokens_to_ids("<end>")
    assert teacher.count_truncated == 1
    assert len(short) < 16
    embeddings = teacher.encode(["boat " * 10_000, "a boat"])
    assert torch.isfinite(embeddings).all()
    assert teacher.count_truncated == 2


def test_a_long_caption_keeps_its_beginning(llama: Path) -> None:
    (whole,) = encoder(llama, chat_template="user").tokenize([LONG])
    (cut,) = encoder(llama, max_tokens=16, chat_template="user").tokenize([LONG])
    assert len(whole) > 30
    assert len(cut) == 16
    assert cut[:-1] == whole[:15]
    assert cut[-1] == whole[-1]  # the template's end stays


def test_identity_follows_everything_that_changes_an_embedding(
    make_llm, llama: Path, tmp_path: Path
) -> None:
    base = encoder(llama).identity()
    changes = {
        "attention": "causal",
        "pooling": "last",
        "layer": 1,
        "prompt": "Query: ",
        "chat_template": "user",
    }
    changes |= {"max_tokens": 64, "include_bos": False}
    prints = {
        encoder(llama, **{name: value}).identity().fingerprint
        for name, value in changes.items()
    }
    prints |= {
        base.fingerprint,
        encoder(make_llm(tmp_path / "other", "llama", seed=1)).identity().fingerprint,
    }
    prints.add(
        encoder(make_llm(tmp_path / "eos", "llama", eos=True)).identity().fingerprint
    )
    assert len(prints) == len(changes) + 3
    for name in ("adapter_sha256", "quantization", "post"):
        assert (
            dataclasses.replace(base, **{name: "another"}).fingerprint
            != base.fingerprint
        ), name
    moved = make_llm(tmp_path / "moved", "llama")
    # the same LLM in another folder
    assert encoder(moved).identity().fingerprint == base.fingerprint


def test_bfloat16_is_close_to_float32_and_to_itself_in_a_batch(llama: Path) -> None:
    rough = CaptionEncoder(
        EncoderConfig(llm=str(llama), compute_dtype="bfloat16"), device="cpu"
    )
    rows = rough.tokenize(CAPTIONS)
    alone = torch.cat([rough.embed_tokens([row]) for row in rows])
    assert (
        torch.nn.functional.cosine_similarity(
            alone, encoder(llama).encode(CAPTIONS)
        ).min()
        > 0.999
    )
    # 8 bits of mantissa: 4e-3 a rounding
    assert close(rough.embed_tokens(rows), alone, tolerance=2e-2)


def test_an_adapter_counts_in_half_precision_as_in_float32(
    llama: Path, tmp_path: Path
) -> None:
    _, adapter = write_moved(llama, tmp_path / "adapter")
    exact = encoder(llama, adapter=str(adapter)).encode(CAPTIONS)
    plain = encoder(llama).encode(CAPTIONS)
    config = EncoderConfig(
        llm=str(llama), adapter=str(adapter), compute_dtype="bfloat16"
    )
    rough = CaptionEncoder(config, device="cpu").encode(CAPTIONS)
    # the adapter changes something
    assert torch.nn.functional.cosine_similarity(plain, exact).min() < 0.9
    assert torch.nn.functional.cosine_similarity(rough, exact).min() > 0.999


def load(
    folder: Path, *, attention: str, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The LLM with the attention of its configuration set, but not of its layers."""
    settings = AutoConfig.from_pretrained(folder)
    set_attention(settings, attention)
    return AutoModel.from_pretrained(folder, config=settings, dtype=dtype).eval()


@pytest.mark.parametrize("family", ["stablelm", "nemotron"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_configuration_alone_leaves_some_families_causal(
    make_llm, tmp_path: Path, family: str, dtype
) -> None:
    model = load(
        make_llm(tmp_path / family, family), attention="bidirectional", dtype=dtype
    )
    with pytest.raises(ValueError, match="blocks 0, 1 cannot attend"):
        check_attention(model, "bidirectional", where=family)
    set_kernels(model, "bidirectional")
    check_attention(model, "bidirectional", where=family)


def test_what_else_is_refused(make_llm, llama: Path, tmp_path: Path) -> None:
    """Layers that are bidirectional only without padding, linear attention unless causal."""
    model = load(make_llm(tmp_path / "stablelm", "stablelm"), attention="causal")
    set_kernels(model, "bidirectional")
    with pytest.raises(ValueError, match="padding"):
        check_attention(model, "bidirectional", where="stablelm")
    for family in (
        HYBRIDS
    ):  # the first state does depend on the last token, through the other block
        llm = str(make_llm(tmp_path / family, family))
        for dtype in ("float32", "bfloat16"):
            with pytest.raises(ValueError, match="blocks 0 cannot attend"):
                CaptionEncoder(EncoderConfig(llm=llm, compute_dtype=dtype), "cpu")
            CaptionEncoder(
                EncoderConfig(llm=llm, compute_dtype=dtype, attention="causal"), "cpu"
            )
    # no blocks to check
    CaptionEncoder(
        EncoderConfig(llm=str(llama), compute_dtype="float32", layer=0), "cpu"
    )


FOUR = [
    "two dogs run over the wet grass",
    "a red bicycle leans against a brick wall",
    "a boat",
    "the lake",
]


def pass_through(
    llm: Path, dtype: str, *, autocast: bool, dora: bool = False
) -> tuple[torch.Tensor, ...]:
    """Embeddings, all gradients of the adapter, and the bytes that the forward pass kept for
    them."""
    encoding = EncoderConfig(llm=str(llm), compute_dtype=dtype)
    config = FinetuneConfig(
        encoder=encoding, lora=LoraSettings(r=4, dropout=0.0, dora=dora)
    )
    encoder = CaptionEncoder(encoding, "cpu", trainable_adapter=True)
    module = moved(encoder, config)
    assert (encoder.model.autocast is torch.bfloat16) is (
        dtype == "bfloat16" and not dora
    )
    if not autocast:
        encoder.model.autocast = None
        for layer in module.modules():
            layer.cast_input_dtype_enabled = True
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = encoder.collate(encoder.tokenize(FOUR), [encoder.frame] * len(FOUR))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        embeddings = encoder.model(batch)
    (embeddings * torch.linspace(-1, 1, embeddings.shape[1])).sum().backward()
    grads = [
        p.grad for p in module.parameters() if p.requires_grad and p.grad is not None
    ]
    assert grads
    assert all(grad.dtype == torch.float32 for grad in grads)
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    bytes_kept = sum(size for pointer, size in kept.items() if pointer not in weights)
    return (
        embeddings.detach(),
        torch.cat([grad.flatten() for grad in grads]),
        bytes_kept,
    )


def test_products_in_bfloat16_give_the_gradients_of_float32(llama: Path) -> None:
    """bf16 rounds to 2^-9: the LLM's own rounding is as large as the adapter's."""
    exact, exact_grad, _ = pass_through(llama, "float32", autocast=True)
    mixed, mixed_grad, mixed_bytes = pass_through(llama, "bfloat16", autocast=False)
    half, half_grad, half_bytes = pass_through(llama, "bfloat16", autocast=True)

    def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
        return float((actual - expected).norm() / expected.norm())

    assert error(half, exact) < 1.5 * error(mixed, exact) + 1e-3 < 0.05
    assert (
        error(half_grad, exact_grad) < 1.5 * error(mixed_grad, exact_grad) + 1e-3 < 0.1
    )
    assert half_bytes < 0.8 * mixed_bytes


def test_dora_keeps_its_products(llama: Path) -> None:
    pass_through(llama, "bfloat16", autocast=True, dora=True)
