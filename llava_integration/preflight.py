"""``python -m llava_integration.preflight``: what would stop one of LLaVA's training stages, before its ranks start.

``scripts/llava/*.sh`` run it first. It prints every problem in a line of its own and returns 2; without any, it prints
what the scripts need to know of the environment, a line each: LLaVA's folder, the training program, the number of
GPUs, the logger, a free port, options by which DeepSpeed's launcher is quiet.
"""

import argparse
import json
import netrc
import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llava_integration import towers as names
from llava_integration.towers import LORA, OTHERS, WORD, check_selection, model_name, option_value
from llm2clip_plugin.files import ContractError, read_json_value

STAGES = ("pretrain", "finetune", "finetune_lora")
LLAVAS_TOWERS = ("openai", "laion")  # names that LLaVA's own builder accepts, besides paths that exist
IMAGES_LOOKED_AT = 200
IMAGE_TOKEN = "<image>"
MPT = "mpt"
TRAINED = ("llama", "mistral", "llava", "llava_llama", "llava_mistral")  # types of language models


def parser() -> argparse.ArgumentParser:
    """The options of scripts/llava/*.sh that can be wrong."""
    made = argparse.ArgumentParser(prog="python -m llava_integration.preflight", description=__doc__)
    made.add_argument("stage", choices=STAGES)
    for name in ("model", "tower", "output"):
        made.add_argument(f"--{name}", required=True)
    for name in ("data", "image-folder"):
        made.add_argument(f"--{name}", required=True, type=Path)
    made.add_argument("--projector", default=None)
    return made


def main(argv: list[str]) -> int:
    """Print the problems to stderr, or the environment to stdout; returns the exit status.

    After -- come the script's options for LLaVA, which take precedence.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    options = parser().parse_args(argv[:end])
    options.llava = argv[end + 1 :]
    problems = list(find_problems(options))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return 2
    import torch

    llava = find_spec("llava")
    print(next(iter(llava.submodule_search_locations or []), "") if llava else "")
    print("train_mem.py" if find_spec("flash_attn") else "train.py")
    print(torch.cuda.device_count())
    print("wandb" if find_spec("wandb") and logged_in() else "none")
    with socket.socket() as probe:
        probe.bind(("", 0))
        print(probe.getsockname()[1])
    print(quiet_launcher())
    return 0


def quiet_launcher() -> str:
    """``--log_level warning`` if this DeepSpeed's launcher has it; else it prints ten lines of its own."""
    deepspeed = find_spec("deepspeed")
    for folder in deepspeed.submodule_search_locations or [] if deepspeed else []:
        if "--log_level" in Path(folder, "launcher", "runner.py").read_text(encoding="utf-8"):
            return "--log_level warning"
    return ""


def find_problems(options: argparse.Namespace) -> Iterator[str]:
    """What is wrong with a stage's options, a line each."""
    yield from check_model(options.model)
    yield from check_output(options.stage, options.output)
    yield from check_data(options.stage, options.data, options.image_folder)
    tower = option_value(options.llava, "--vision_tower") or options.tower
    projector = option_value(options.llava, "--pretrain_mm_mlp_adapter") or options.projector
    yield from check_tower(tower, projector, options.llava)
    yield from check_wandb(option_value(options.llava, "--report_to") or os.environ.get("REPORT_TO", ""))


def check_wandb(report_to: str) -> Iterator[str]:
    """If Weights & Biases is asked for, it is installed and has a key; else it stops the run after its models load."""
    if report_to not in ("wandb", "all"):
        return
    if not find_spec("wandb"):
        yield f"--report_to {report_to}: wandb is not installed; run `pip install wandb`, or set --report_to none"
    elif not logged_in():
        yield (
            f"--report_to {report_to}: no API key of Weights & Biases; run `wandb login`, set WANDB_MODE=offline, or "
            "set --report_to none"
        )


def logged_in() -> bool:
    """Whether Weights & Biases starts without a question: by its variables, or a key in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def check_model(model: str) -> Iterator[str]:
    """The language model is a folder with a config.json, or a name of the Hub, which is not contacted here."""
    path = Path(model)
    if MPT in model:
        yield (
            f"--model {model}: LLaVA trains a model with {MPT!r} in its path as an MPT, which its published code "
            "cannot do with any version of transformers; rename the folder if it holds another model"
        )
    elif path.is_dir():
        if not (path / "config.json").is_file():
            yield f"--model {model}: the folder has no config.json; expected a model such as lmsys/vicuna-7b-v1.5"
        else:
            yield from check_language(path)
    elif not names.HUB_ID.match(model):
        yield f"--model {model} is neither a folder nor a name of the Hub, such as lmsys/vicuna-7b-v1.5"


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON object of a model's folder; {} if there is none that can be read."""
    try:
        config = read_json_value(folder / name)
    except (OSError, ContractError):
        return {}
    return config if isinstance(config, dict) else {}


def check_language(path: Path) -> Iterator[str]:
    """LLaVA's training reads any model as a Llama or a Mistral, and pads with ``unk_token``."""
    kind = read_config(path).get("model_type")
    if kind not in TRAINED:
        yield (
            f"--model {path}: model_type is {kind!r}, which LLaVA would read as a Llama, without what a Llama does "
            "not have; expected llama or mistral, such as lmsys/vicuna-7b-v1.5"
        )
    tokens = [read_config(path, name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    if any(tokens) and not (path / "tokenizer.model").is_file() and not any(one.get("unk_token") for one in tokens):
        yield (
            f"--model {path}: its tokenizer has no unk_token, with which LLaVA pads batches; set one in "
            "tokenizer_config.json, such as its pad token"
        )


def check_output(stage: str, output: str) -> Iterator[str]:
    """The folder's name is one by which LLaVA will load what it holds; see ``checkpoint_name``."""
    path = Path(output)
    if path.exists() and not path.is_dir():
        yield f"--output {output} is a file; expected a folder"
        return
    if stage == "pretrain":  # its projector is loaded by path
        if path.name.startswith("checkpoint-"):
            yield f"--output {output}: LLaVA writes the projector of a folder named checkpoint-* elsewhere; rename it"
        for found in sorted(path.glob("checkpoint-*"), key=os.path.getmtime)[-1:]:
            yield (
                f"--output {output} contains {found.name}, from which LLaVA cannot resume: pretraining saves the "
                "projector alone. Delete the checkpoint-* folders to start over, or start from its projector with "
                f"another --output and -- --pretrain_mm_mlp_adapter {found / 'mm_projector.bin'}"
            )
        return
    name = model_name(output)
    required = (WORD, LORA) if stage == "finetune_lora" else (WORD,)
    for word in required:
        if word not in name.lower():
            kind = "a LLaVA model" if word == WORD else "a LoRA checkpoint"
            yield (
                f"--output {output}: LLaVA loads a folder as {kind} only if its name contains {word!r}, so it could "
                f"not load {name!r}; choose another name, such as {suggest(path.name, required)!r}"
            )
            return
    for word in OTHERS if stage == "finetune" else ():
        if word in name.lower():
            yield f"--output {output}: LLaVA loads a folder with {word!r} in its name as a {word} model; choose another"


def suggest(name: str, required: tuple[str, ...]) -> str:
    """``name`` behind the required words that it lacks.

    >>> suggest("run-1", ("llava", "lora"))
    'llava-lora-run-1'
    """
    return "-".join([*(word for word in required if word not in name.lower()), name])


def check_data(stage: str, data: Path, images: Path) -> Iterator[str]:
    """The first problem of LLaVA's JSON, and of the image folder."""
    if not images.is_dir():
        yield f"--image-folder {images} is not a folder; expected the folder that the JSON's image paths start in"
    if not data.is_file():
        yield f"DATA {data} does not exist; expected LLaVA's JSON"
        return
    try:
        samples = json.loads(data.read_text(encoding="utf-8"))
    except ValueError as error:
        lines = " (JSON Lines? put the samples into one list)" if "Extra data" in str(error) else ""
        yield f"{data} is not JSON: {error}{lines}"
        return
    if not isinstance(samples, list) or not samples:
        yield f"{data}: expected a list of samples, found {describe(samples)}"
        return
    for number, sample in enumerate(samples):
        if problem := sample_problem(stage, sample):
            name = f" (id {sample['id']!r})" if isinstance(sample, dict) and "id" in sample else ""
            yield f"{data}, sample {number}{name}: {problem}"
            return
    if images.is_dir():
        yield from check_images(data, images, [sample["image"] for sample in samples if "image" in sample])


def describe(value: Any) -> str:
    """What a JSON value is, for a message."""
    return "an empty list" if value == [] else f"a value of type {type(value).__name__}"


def sample_problem(stage: str, sample: Any) -> str:
    """What LLaVA's data set would stop at in a sample; '' for nothing."""
    if not isinstance(sample, dict):
        return f"expected an object with id, image and conversations, found {describe(sample)}"
    if not isinstance(sample.get("image", ""), str):
        return f"image is {describe(sample['image'])}; expected a path in the image folder"
    turns = sample.get("conversations")
    if not isinstance(turns, list) or not turns:
        return "no conversations; expected a list of turns"
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            return "a turn without a text; expected {'from': 'human' or 'gpt', 'value': TEXT}"
    speakers = [turn.get("from") for turn in turns]
    if stage == "pretrain":
        if len(turns) != 2 or IMAGE_TOKEN not in turns[0]["value"] or "image" not in sample:
            return f"pretraining needs an image and two turns, {IMAGE_TOKEN} in the first and the caption in the second"
        return ""
    speakers = speakers[1:] if speakers[0] == "gpt" else speakers  # as LLaVA skips it
    if any(speaker != ("human", "gpt")[turn % 2] for turn, speaker in enumerate(speakers)):
        return f"the turns are from {', '.join(map(str, speakers[:6]))}; expected human and gpt in turn"
    return ""


def check_images(data: Path, images: Path, paths: list[str]) -> Iterator[str]:
    """Up to IMAGES_LOOKED_AT images, evenly spaced over the samples, exist."""
    looked_at = paths[:: max(1, len(paths) // IMAGES_LOOKED_AT)]
    missing = [path for path in looked_at if not os.path.isfile(os.path.join(images, path))]
    if missing:
        yield (
            f"--image-folder {images}: {len(missing)} of {len(looked_at)} images checked are missing, the first is "
            f"{os.path.join(images, missing[0])}; {data} has its path as {missing[0]!r}"
        )


def check_tower(tower: str, projector: str | None, words: Sequence[str]) -> Iterator[str]:
    """The tower exists, has the state that LLaVA's options select and the weights of its card; the projector fits."""
    if projector is not None and not os.path.isfile(projector):
        yield f"--projector {projector} does not exist; expected the mm_projector.bin of pretrain.sh"
        projector = None
    if not names.is_ours(tower):
        if os.path.isdir(tower) and not os.path.isfile(os.path.join(tower, "config.json")):
            yield f"--tower {tower}: the folder has no config.json; expected a tower directory or a CLIP vision model"
        elif not os.path.exists(tower) and not tower.startswith(LLAVAS_TOWERS) and "ShareGPT4V" not in tower:
            yield (
                f"--tower {tower}: LLaVA knows no such vision tower; expected llm2clip, llm2clip:PATH_OR_HUB_ID, a "
                "folder that exists, or a name such as openai/clip-vit-large-patch14-336"
            )
        return
    try:
        location = names.locate(tower)
        check_selection(words, location.card.num_layers)
        location.check_weights()
        if projector is not None:
            check_projector(tower, location.card.hidden_size, projector)
    except (ValueError, FileNotFoundError) as error:
        yield str(error).replace("--vision_tower", "--tower")


def check_projector(tower: str, hidden_size: int, projector: str) -> None:
    """Raise ContractError if the projector is not a file of weights for this tower's features."""
    from llava_integration.hook import projector_width

    scales = len(re.findall(r"\d+", os.environ.get("LLM2CLIP_S2_SCALES", ""))) or 1
    width = projector_width(projector)
    if width not in (None, hidden_size * scales):
        per_scale = f" x {scales} scales" if scales > 1 else ""
        raise ContractError(
            f"the projector {projector} expects features of width {width}, but the tower {tower!r} has hidden_size "
            f"{hidden_size}{per_scale}; use the tower that it was trained with, or pretrain a projector for this one"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
