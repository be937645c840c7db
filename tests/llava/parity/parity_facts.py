"""What LLaVA does on the libraries of this environment: token ids and label masks, answers,
training.

    PYTHONPATH=tests/support .venv-llava/bin/python tests/llava/parity/parity_facts.py

writes golden.json; with WORLD MINE THEIRS after it, it trains into MINE and opens what is in both.

The test compares both with what it sees in its own process.
"""

# LLaVA is not installed where types are checked.
# pyright: reportMissingImports=false

import copy
import hashlib
import json
import os
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import llava_world
import parity_world
import torch
import transformers
from PIL import Image

GOLDEN = Path(__file__).with_name("golden.json")
TODAY = int(transformers.__version__.partition(".")[0]) >= 5
TALKS = {
    "image": ["<image>\nWhich colour is it?", "A warm red."],
    "rounds": [
        "<image>\nWhat?",
        "A  photo,\nof 2 red squares.",
        " And now? ",
        "Nothing",
        "Why?",
        "Über 日本 😀",
    ],
    "awkward": ["<image>\n</s> What?", "A </s> b", " ", "\tc"],
    "text": ["Say a colour.", "blue"],
}
TEXTS = [
    "",
    " ",
    "hello",
    " hello",
    "a </s> b",
    "x</s>USER: y</s>",
    "a  b   c",
    "\n\nx\n",
]
TEXTS += ["[INST] hi [/INST] é😀", "▁u", "<s>x"]
# options on top of llava_world's
KINDS = {"pretrain": [], "finetune": ["--max_steps", "6"], "lora": []}


def tokens(root: Path) -> dict[str, Any]:
    """Ids and label masks of TALKS in each of LLaVA's templates; ids and decoded text of TEXTS."""
    from llava import conversation
    from llava.model import builder
    from llava.train import train

    facts: dict[str, Any] = {}
    before = conversation.default_conversation
    for legacy in (True, False):
        tokenizer = load_tokenizer(root / f"tokenizer-{legacy}", legacy=legacy)
        # as a Mistral's is read
        fast = builder.AutoTokenizer.from_pretrained(root / f"tokenizer-{legacy}")
        for text in TEXTS:
            facts[f"{legacy} {text!r}"] = ids_and_back(tokenizer, text)
            facts[f"{legacy} fast {text!r}"] = ids_and_back(fast, text)
        tokenizer.pad_token = tokenizer.unk_token
        for version, template in sorted(conversation.conv_templates.items()):
            conversation.default_conversation = template
            for name, talk in TALKS.items():
                facts[f"{legacy} {version} {name}"] = mask_of(train, tokenizer, talk)
    conversation.default_conversation = before
    return facts


def ids_and_back(tokenizer: Any, text: str) -> list[Any]:
    """The text's ids, and what they are decoded to, with special tokens and without."""
    ids = tokenizer(text).input_ids
    return [ids, tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=True)]


def load_tokenizer(folder: Path, *, legacy: bool) -> Any:
    """As LLaVA's training loads it."""
    parity_world.save_tokenizer(folder, legacy=legacy)
    (folder / "config.json").write_text(json.dumps(parity_world.COMMON))
    return transformers.AutoTokenizer.from_pretrained(
        folder, model_max_length=2048, padding_side="right", use_fast=False
    )


def mask_of(train: Any, tokenizer: Any, talk: list[str]) -> list[Any]:
    """Number and hash of the ids, and where labels are learned: [first, last + 1] of each run; or
    the error."""
    source = [
        {"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(talk)
    ]
    try:
        made = train.preprocess(
            [copy.deepcopy(source)], tokenizer, has_image="<image>" in talk[0]
        )
    except (AssertionError, KeyError) as error:  # plain takes one round with a picture
        return [type(error).__name__]
    ids = made["input_ids"][0]
    labels = made["labels"][0]
    learned = [-1, *(labels != -100).nonzero().flatten().tolist()]
    runs = [[b, b + 1] for a, b in pairwise(learned) if b != a + 1 or a == -1]
    for run in runs:
        while run[1] in learned:
            run[1] += 1
    return [len(ids), hashlib.sha256(str(ids.tolist()).encode()).hexdigest()[:16], runs]


def load(folder: Path) -> tuple[Any, Any, Any]:
    """A checkpoint in float32, with its tokenizer and image processor."""
    from llava.model.language_model import llava_llama, llava_mistral

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model_class = getattr(llava_llama, name, None) or getattr(llava_mistral, name)
    model = model_class.from_pretrained(folder, torch_dtype=torch.float32).eval()
    model.get_vision_tower().load_model()
    return (
        transformers.AutoTokenizer.from_pretrained(folder, use_fast=False),
        model,
        model.get_vision_tower().image_processor,
    )


def prompts(tokenizer: Any) -> list[torch.Tensor]:
    """Questions about a picture, of different lengths."""
    from llava.mm_utils import tokenizer_image_token

    questions = (
        "<image>\nWhich colour is the picture? ASSISTANT:",
        "USER: <image>\nWhat is it, in a word? ASSISTANT:",
    )
    return [
        tokenizer_image_token(question, tokenizer, return_tensors="pt")
        for question in questions
    ]


def answers(root: Path, name: str) -> dict[str, Any]:
    """Generated ids: greedy, in a batch, with beams, without a picture, streamed; logits after the
    prompt."""
    from llava.mm_utils import KeywordsStoppingCriteria, process_images

    from llava_integration.evaluator.answer.command import padded

    tokenizer, model, processor = load(root / name)
    images = [
        Image.open(path).convert("RGB")
        for path in sorted((root / "images").iterdir())[:6:3]
    ]
    sizes = [image.size for image in images]
    pixels = process_images(images, processor, model.config)
    asked = prompts(tokenizer)
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    facts: dict[str, Any] = {}
    for number, ids in enumerate(asked):
        picture = {
            "images": pixels[number : number + 1],
            "image_sizes": sizes[number : number + 1],
        }
        facts[f"greedy {number}"] = model.generate(
            ids[None], **picture, **options
        ).tolist()
        facts[f"beams {number}"] = model.generate(
            ids[None], **picture, **options, num_beams=3
        ).tolist()
        stop = KeywordsStoppingCriteria(
            [tokenizer.decode(facts[f"greedy {number}"][0][4:5])], tokenizer, ids[None]
        )
        facts[f"stopped {number}"] = model.generate(
            ids[None], **picture, **options, stopping_criteria=[stop]
        ).tolist()
        with torch.no_grad():
            facts[f"logits {number}"] = (
                model(ids[None], **picture).logits[0, -1, :8].tolist()
            )
    rows, mask = padded(asked)
    both = model.generate(
        rows, images=pixels, image_sizes=sizes, attention_mask=mask, **options
    )
    facts["batch"] = both.tolist()
    facts["no picture"] = model.generate(
        torch.tensor([[1, 50, 60, 70]]), **options
    ).tolist()
    return facts


class Tokens:
    """A streamer that keeps the tokens after the prompt, as ``llava.serve.model_worker`` sends
    them."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None: ...


def with_and_without_cache(
    root: Path, name: str
) -> tuple[list[int], list[int], list[int]]:
    """Eight ids: generated with a cache; by reading the whole sequence for each; as they were
    streamed."""
    from llava.mm_utils import process_images

    tokenizer, model, processor = load(root / name)
    image = Image.open(min((root / "images").iterdir())).convert("RGB")
    pixels = process_images([image], processor, model.config)
    ids = prompts(tokenizer)[0][None]
    options: dict[str, Any] = {"images": pixels, "image_sizes": [image.size]}
    streamer = Tokens()
    output = model.generate(
        ids,
        **options,
        do_sample=False,
        min_new_tokens=8,
        max_new_tokens=8,
        streamer=streamer,
    )
    again: list[int] = []
    with torch.no_grad():
        for _ in range(8):
            row = torch.cat([ids, torch.tensor([again], dtype=torch.long)], dim=1)
            logits = model(row, **options, use_cache=False).logits[0, -1]
            # as min_new_tokens does
            logits[model.generation_config.eos_token_id] = -torch.inf
            again.append(int(logits.argmax()))
    return (
        output[0, -8:].tolist(),
        again,
        [token for step in streamer.seen[1:] for token in step],
    )


def train(world: Any, kind: str, output: Path, *options: str) -> dict[str, Any]:
    """One of LLaVA's stages in float32, in this process; the samples in the order of their use, and
    the losses."""
    from llava.train import train

    tower = f"llm2clip:{world.towers['clip']}"
    words = [
        *world.stage_options(kind, tower, output),
        "--bf16",
        "False",
        *KINDS[kind],
        *options,
    ]
    words += ["--pretrain_mm_mlp_adapter", str(world.root / "mm_projector.bin")]
    order: list[int] = []
    read = train.LazySupervisedDataset.__getitem__
    arguments = sys.argv

    def read_and_note(self: Any, index: int) -> Any:
        order.append(index)
        return read(self, index)

    train.LazySupervisedDataset.__getitem__ = read_and_note
    sys.argv = ["train.py", *words]
    try:
        torch.manual_seed(0)
        train.train()
    finally:
        train.LazySupervisedDataset.__getitem__ = read
        sys.argv = arguments
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {
        "order": order,
        "losses": [entry["loss"] for entry in history if "loss" in entry],
    }


def opened(world: Any, folder: Path) -> dict[str, Any]:
    """A checkpoint that training wrote, as ``load_pretrained_model`` opens it: sums of its weights,
    and an answer."""
    from llava.mm_utils import process_images
    from llava.model.builder import load_pretrained_model

    base = None if (folder / "model.safetensors").exists() else str(world.llm)
    tokenizer, model, processor, _ = load_pretrained_model(
        str(folder), base, folder.name, device="cpu", device_map="cpu"
    )
    image = Image.open(min(world.images.iterdir())).convert("RGB")
    pixels = process_images([image], processor, model.config)
    model.float()
    output = model.generate(
        prompts(tokenizer)[0][None],
        images=pixels.float(),
        image_sizes=[image.size],
        do_sample=False,
        max_new_tokens=8,
    )
    sums = {
        name.replace("vision_tower.vision_model.", "vision_tower."): tensor.double()
        .abs()
        .sum()
        .item()
        for name, tensor in model.state_dict().items()
    }
    ids = tokenizer(TEXTS[5]).input_ids
    theta = (
        getattr(model.config, "rope_theta", None)
        or model.config.rope_parameters["rope_theta"]
    )
    return {"answer": output.tolist(), "weights": sums, "ids": ids, "theta": theta}


def write_checkpoints(world: Any, folder: Path) -> None:
    """A full finetune and a LoRA whose towers are trained, too, and a projector alone; one step
    after the warm-up's."""
    # Not in float32, where LLaVA has its tower in float16, in which Adam's epsilon is 0
    options = [
        "--max_steps",
        "2",
        "--bf16",
        "True",
        *(["--use_cpu", "True"] if TODAY else []),
    ]
    os.environ["LLM2CLIP_UNFREEZE_TOWER"] = "1"  # pretraining ignores it
    try:
        for kind in KINDS:
            train(world, kind, folder / f"llava-{kind}", *options)
    finally:
        del os.environ["LLM2CLIP_UNFREEZE_TOWER"]


def golden(root: Path) -> dict[str, Any]:
    """All that is compared with other environments."""
    world = parity_world.make_parity_world(root / "world")
    return {
        "transformers": transformers.__version__,
        "tokens": tokens(root),
        "answers": {
            name: answers(world.root, name) for name in parity_world.CHECKPOINTS
        },
        "training": {
            kind: train(world, kind, root / f"llava-{kind}") for kind in KINDS
        },
    }


def main(arguments: list[str]) -> None:
    """See the top of this file."""
    if arguments:
        root, mine, theirs = map(Path, arguments)
        world = llava_world.places(root, ("clip",))
        write_checkpoints(world, mine)
        facts: dict[str, Any] = {
            str(made): opened(world, made)
            for made in (*mine.iterdir(), *theirs.iterdir())
        }
        print(json.dumps({**facts, "today": TODAY}))
        return
    with tempfile.TemporaryDirectory() as folder:
        made = golden(Path(folder))
    GOLDEN.write_text(
        json.dumps(made, separators=(",", ":")).replace('],"', '],\n"') + "\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
