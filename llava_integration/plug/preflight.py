"""``python -m llava_integration.plug.preflight``: what would stop one of LLaVA's training stages,
before its ranks start.

``scripts/llava/*.sh`` run it first. It prints every problem in a line of its own and returns 2;
without any, it prints what the scripts need to know of the environment, a line each: LLaVA's
folder, the training program, the number of GPUs, LLaVA's ``--bf16`` (True or False), a free port,
options by which DeepSpeed's launcher is quiet.
"""

import argparse
import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava_integration.plug import towers
from llava_integration.plug.checkpoints import (
    HUB_ID,
    LORA,
    OTHERS,
    WORD,
    blocks_below,
    check_feature,
    config_of,
    model_name,
)
from llava_integration.plug.hook import check_projector, refuse_others_projector
from llava_integration.plug.resumed_data import refuse_other_data, refuse_other_model
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.json_files import read_json_value

STAGES = ("pretrain", "finetune", "finetune_lora")
LLAVAS_TOWERS = ("openai", "laion")
IMAGES_CHECKED = 200
IMAGE = "<image>"
MPT = "mpt"
# types of language models
TRAINED = ("llama", "mistral", "llava", "llava_llama", "llava_mistral")


def main(argv: list[str]) -> int:
    """Print the problems, or the environment; the exit status. After -- come options for LLaVA,
    which win."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_integration.plug.preflight", description=__doc__
    )
    parser.add_argument("stage", choices=STAGES)
    for name in ("model", "tower", "output", "data", "image-folder"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--projector", default=None)
    end = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:end])
    llava = llava_options(argv[end + 1 :])
    problems = [
        *check_model(options.model),
        *check_output(options.stage, options.output),
        *check_data(options.stage, Path(options.data), Path(options.image_folder)),
        *check_resumed(options.stage, options.output, options.data, options.model),
        *check_tower(
            llava.vision_tower or options.tower,
            llava.pretrain_mm_mlp_adapter or options.projector,
            llava,
        ),
    ]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print("\n".join(environment()))
    return 2 if problems else 0


def llava_options(words: Sequence[str]) -> argparse.Namespace:
    """Those options of LLaVA that are looked at here, "" for one that is not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    names = "vision_tower pretrain_mm_mlp_adapter mm_vision_select_layer mm_vision_select_feature"
    for name in names.split():
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", default="")
    return parser.parse_known_args(words)[0]


def environment() -> Iterator[str]:
    """What the scripts need to know, in their order."""
    import torch

    from llm2clip_plugin.precision import fastest_precision

    gpus = torch.cuda.device_count()
    yield _folder_of("llava")
    yield "train_mem.py" if find_spec("flash_attn") else "train.py"
    yield str(gpus)
    # bf16 on every GPU, as in LLaVA's scripts
    yield str(gpus > 0 or fastest_precision(torch.device("cpu")) == "bf16")
    with socket.socket() as probe:
        probe.bind(("", 0))
        yield str(probe.getsockname()[1])
    # else it prints ten lines of its own
    launcher = Path(_folder_of("deepspeed"), "launcher", "runner.py")
    quiet = launcher.is_file() and "--log_level" in launcher.read_text(encoding="utf-8")
    yield "--log_level warning" if quiet else ""


def _folder_of(package: str) -> str:
    """Where a package is installed, "" if it is not; nothing is imported."""
    spec = find_spec(package)
    return next(iter(spec.submodule_search_locations or []), "") if spec else ""


def check_model(model: str) -> Iterator[str]:
    """The language model is a folder that LLaVA's training can read, or a name of the Hub, which is
    not contacted."""
    path = Path(model)
    if MPT in model:
        yield (
            f"--model {model}: LLaVA takes a path with {MPT!r} for an MPT, "
            "which it cannot train; rename the folder"
        )
    elif (path / "config.json").is_file():
        yield from check_language(path)
    elif path.is_dir() or not HUB_ID.match(model):
        yield (
            f"--model {model}: expected a folder with config.json or a name of the Hub, "
            "as lmsys/vicuna-7b-v1.5"
        )


def check_language(path: Path) -> Iterator[str]:
    """LLaVA's training reads any model as a Llama or a Mistral, and pads with ``unk_token``."""
    kind = config_of(path).get("model_type")
    if kind not in TRAINED:
        yield (
            f"--model {path}: model_type is {kind!r}, which LLaVA would read as a Llama; "
            "expected llama or mistral"
        )
    settings = config_of(path, "tokenizer_config.json")
    tokens = config_of(path, "special_tokens_map.json")
    has_settings = bool(settings or tokens)
    has_unk = settings.get("unk_token") or tokens.get("unk_token")
    has_pieces = (path / "tokenizer.model").is_file()
    if has_settings and not has_unk and not has_pieces:
        yield (
            f"--model {path}: no unk_token, with which LLaVA pads batches; "
            "set one in its tokenizer_config.json"
        )


def check_output(stage: str, output: str) -> Iterator[str]:
    """The folder's name is one by which LLaVA will load what it holds; see ``refuse_name``."""
    path = Path(output)
    name = model_name(output)
    if path.exists() and not path.is_dir():
        yield f"--output {output} is a file; expected a folder"
    elif stage == "pretrain":  # its projector is loaded by path
        if path.name.startswith("checkpoint-"):
            yield (
                f"--output {output}: LLaVA writes the projector of a folder named checkpoint-* "
                "elsewhere; rename it"
            )
        checkpoints = sorted(path.glob("checkpoint-*"), key=os.path.getmtime)
        if checkpoints:
            newest = checkpoints[-1]
            yield (
                f"--output {output} contains {newest.name}, from which pretraining cannot resume; "
                "delete its checkpoint-* folders, or start from its projector with another "
                f"--output and -- --pretrain_mm_mlp_adapter {newest}/mm_projector.bin"
            )
    else:
        required = (WORD, LORA) if stage == "finetune_lora" else (WORD,)
        if missing := [word for word in required if word not in name.lower()]:
            yield (
                f"--output {output}: LLaVA could not load {name!r}, "
                f"which has no {' and no '.join(missing)} in it; "
                f"choose another name, such as {'-'.join([*missing, path.name])}"
            )
        for word in OTHERS if stage == "finetune" else ():
            if word in name.lower():
                yield (
                    f"--output {output}: LLaVA loads a folder with {word!r} in its name "
                    f"as a {word} model; rename it"
                )


def check_resumed(stage: str, output: str, data: str, model: str) -> Iterator[str]:
    """A checkpoint from which finetuning would resume was trained on this data, from this model."""
    if stage == "pretrain":
        return  # refused above
    try:
        if os.path.isfile(data):
            refuse_other_data(output, data)
        refuse_other_model(output, model)
    except ContractError as error:
        message = str(error).replace("--data_path", "DATA")
        message = message.replace("--model_name_or_path", "--model")
        yield message.replace("--output_dir", "--output")


def check_data(stage: str, data: Path, images: Path) -> Iterator[str]:
    """The first problem of LLaVA's JSON, and of the image folder."""
    if not images.is_dir():
        yield (
            f"--image-folder {images} is not a folder; "
            "expected the folder that the JSON's image paths start in"
        )
    try:
        samples = read_json_value(data)
    except (OSError, ContractError) as error:
        yield f"DATA {data}: expected LLaVA's JSON, a list of samples; {error}"
        return
    if not isinstance(samples, list) or not samples:
        yield f"DATA {data}: expected LLaVA's JSON, a list of samples; found {str(samples)[:80]}"
        return
    for number, sample in enumerate(samples):
        if problem := sample_problem(stage, sample):
            yield f"{data}, sample {number}: {problem}"
            return
    if not images.is_dir():
        return
    paths = [sample["image"] for sample in samples if "image" in sample]
    checked = paths[:: max(1, len(paths) // IMAGES_CHECKED)]
    missing = [path for path in checked if not (images / path).is_file()]
    if missing:
        yield (
            f"--image-folder {images}: {len(missing)} of {len(checked)} images checked are "
            f"missing, the first is {images / missing[0]}; "
            f"{data} has its path as {missing[0]!r}"
        )


def sample_problem(stage: str, sample: Any) -> str:
    """What LLaVA's data set would stop at in a sample; '' for nothing."""
    try:
        turns = [(turn["from"], turn["value"] + "") for turn in sample["conversations"]]
        os.fspath(sample.get("image", ""))
    except (TypeError, KeyError, AttributeError):
        return (
            "expected id, image and conversations, "
            "a list of {'from': 'human' or 'gpt', 'value': TEXT}"
        )
    if turns and turns[0][0] == "gpt" and stage != "pretrain":
        turns = turns[1:]  # as LLaVA skips it
    with_image = [text for _, text in turns if IMAGE in text]
    if "image" in sample and len(with_image) > 1:
        return (
            f"{IMAGE} is in {len(with_image)} turns, for each of which LLaVA looks for an image; "
            "leave it in the first one"
        )
    if stage == "pretrain":
        if len(turns) == 2 and IMAGE in turns[0][1] and "image" in sample:
            return ""
        return (
            "pretraining needs an image and two turns, "
            f"{IMAGE} in the first, the caption in the second"
        )
    speakers = [speaker for speaker, _ in turns]
    in_turn = ["gpt" if number % 2 else "human" for number in range(len(speakers))]
    if not speakers or speakers != in_turn:
        listed = ", ".join(map(str, speakers[:6])) or "nobody"
        return f"the turns are from {listed}; expected human and gpt in turn"
    return ""


def check_tower(
    tower: str, projector: str | None, llava: argparse.Namespace
) -> Iterator[str]:
    """The tower exists, has the state that LLaVA's options select and the weights of its card; the
    projector fits."""
    if projector is not None and not os.path.isfile(projector):
        yield (
            f"--projector {projector} does not exist; expected the mm_projector.bin of pretrain.sh"
        )
        projector = None
    if not towers.is_ours(tower):
        yield from check_llavas_tower(tower, projector)
        return
    try:
        location = towers.locate(tower)
        blocks_below(int(llava.mm_vision_select_layer or -1), location.card.num_layers)
        check_feature(llava.mm_vision_select_feature or "patch")
        location.check_weights()
        if projector is not None:
            scales = re.findall(r"\d+", os.environ.get("LLM2CLIP_S2_SCALES", ""))
            width = location.card.hidden_size * (len(scales) or 1)
            arguments = SimpleNamespace(pretrain_mm_mlp_adapter=projector)
            check_projector(tower, width, arguments)
            refuse_others_projector(projector, tower, location.sha256)
    except (ValueError, FileNotFoundError) as error:
        yield str(error).replace("--vision_tower", "--tower")


def check_llavas_tower(tower: str, projector: str | None) -> Iterator[str]:
    """LLaVA's own builder accepts the tower; the projector is not one of ours."""
    is_llavas = tower.startswith(LLAVAS_TOWERS) or "ShareGPT4V" in tower
    has_config = os.path.isfile(os.path.join(tower, "config.json"))
    if not has_config and (os.path.isdir(tower) or not is_llavas):
        yield (
            f"--tower {tower}: LLaVA knows no such vision tower; expected llm2clip, "
            "llm2clip:PATH_OR_HUB_ID, a folder with config.json, or a name as openai/clip-..."
        )
    if projector is not None:
        try:
            refuse_others_projector(projector, tower, "")
        except ContractError as error:
            yield str(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
