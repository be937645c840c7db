"""A tokenizer with user-defined pieces, as the quickstart's LLaVA has one, reaches Hugging Face
with LLaVA's tokens."""

import json
import tarfile
from pathlib import Path

import build_models
import inputs
import pytest
import sentencepiece
import transformers
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from safetensors.torch import load_file, save_file
from serve_checkpoints import full, language_weights, projector_weights, tower_directory

from llava_integration.serve.export import Export, compare, export
from llm2clip_plugin.cli import main as llm2clip

pytestmark = pytest.mark.both_stacks
SYSTEM = conv_templates["v1"].system
# one begins as another, one is within words, some are or have spaces
PIECES = ["<x>", "<x>▁y", "ab", "▁▁", "▁of▁the", "\t"]
EDGES = [
    "",
    " ",
    "<x>",
    "<x> y",
    "<x> yab",
    "a<x>b",
    "<x> <x> y z",
    "abab cabby ab",
    "\tab\n\t",
]
EDGES += [
    SYSTEM,
    f"x{SYSTEM}",
    f" {SYSTEM}  USER",
    f"{SYSTEM}{SYSTEM}",
    "A chat between",
]
EDGES += [
    "é<x>☃ab",
    "name of the of the",
    "of the",
    "a  b   c",
    "ＡＢ <x>",
    "at its end\n",
]
EDGES += ["▁<x>▁y"]


@pytest.fixture(scope="module")
def captions() -> list[str]:
    """The emoji's captions, of which the quickstart's questions are made."""
    texts: list[str] = []
    with tarfile.open(inputs.EMOJI / "test-noto.tar") as shard:
        for member in shard:
            if member.name.endswith(".json"):
                about = json.load(shard.extractfile(member))
                texts += [caption["text"] for caption in about["captions"]]
    return texts


@pytest.fixture(scope="module")
def miniature(tmp_path_factory, captions) -> Path:
    """A checkpoint with the tokenizer of the quickstart's LLaVA."""
    root = tmp_path_factory.mktemp("miniature")
    rows = [
        {"conversations": [{"value": f"<image>\n{caption}"}]} for caption in captions
    ]
    for name in ("text", "captions", "finetune"):
        (root / f"{name}.json").write_text(json.dumps(rows))
    return with_tokenizer(
        root / "llava-tiny", lambda folder: build_models.train_tokenizer(root, folder)
    )


def with_tokenizer(folder: Path, train) -> Path:
    """A full checkpoint; ``train`` writes its tokenizer and says how many pieces it has."""
    full(folder, tower_directory("clip"), llm2clip_conversation="v1")
    pieces = train(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": pieces}))
    weights = language_weights(pieces) | projector_weights()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def llavas_ids(checkpoint: Path, texts: list[str]) -> list[list[int]]:
    """Of LLaVA's own loader and tokenizer_image_token."""
    from llava.model.builder import load_pretrained_model

    tokenizer = load_pretrained_model(
        str(checkpoint), None, checkpoint.name, device="cpu"
    )[0]
    return [tokenizer_image_token(text, tokenizer) for text in texts]


def check_tokens(checkpoint: Path, exported: Path, texts: list[str]) -> None:
    """The exported tokenizer gives LLaVA's ids, and the texts of its ids."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    image = tokenizer.convert_tokens_to_ids("<image>")
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(checkpoint / "tokenizer.model")
    )
    for text, expected in zip(texts, llavas_ids(checkpoint, texts), strict=True):
        ids = tokenizer(f"<s>{text}", add_special_tokens=False)["input_ids"]
        assert [-200 if number == image else number for number in ids] == expected, text
        if "<image>" not in text:
            assert tokenizer.decode(ids[1:]) == pieces.decode(expected[1:]), text


def test_the_quickstarts_llava_arrives(miniature, tmp_path, home, captions, capsys):
    """Token for token in all of its texts; the export compares pixels, logits and answers."""
    out = tmp_path / "hf"
    words = ["llava", "export", str(miniature), "--format", "hf", "--dtype", "fp32"]
    assert llm2clip([*words, "--output", str(out)]) == 0, capsys.readouterr().err
    prompts = [
        f"{SYSTEM} USER: <image>\n{caption} ASSISTANT:" for caption in captions[::5]
    ]
    rounds = [
        f"{SYSTEM} USER: <image>\nWhat? ASSISTANT: {caption}"
        for caption in captions[::40]
    ]
    check_tokens(miniature, out, [*captions, *prompts, *rounds, *EDGES])
    assert len(captions) > 300
    whole = load_file(out / "model.safetensors")["language_model.lm_head.weight"]
    assert (
        len(whole)
        == json.loads((miniature / "config.json").read_text())["vocab_size"] + 1
    )


def test_pieces_of_every_kind(tmp_path, home):
    """Those that begin alike, without letters, of spaces, and within words."""

    def train(folder: Path) -> int:
        model = folder / "tokenizer.model"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(
                [f"{SYSTEM} USER: the cab of the name, tab by tab"] * 50
            ),
            vocab_size=600,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            normalization_rule_name="identity",  # as Llama's
            remove_extra_whitespaces=False,
            user_defined_symbols=[SYSTEM.replace(" ", "▁"), *PIECES],
            minloglevel=2,
            model_prefix=str(model.with_suffix("")),
        )
        return sentencepiece.SentencePieceProcessor(
            model_file=str(model)
        ).get_piece_size()

    checkpoint = with_tokenizer(tmp_path / "llava-tiny", train)
    exported = Export.of(checkpoint, dtype="fp32")
    export(exported, tmp_path / "hf")
    check_tokens(checkpoint, tmp_path / "hf", EDGES)
    assert compare(exported, tmp_path / "hf").startswith("token ids equal")
