"""What ``llm2clip run`` refuses before its first stage, rather than hours later."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from llm2clip_plugin.data.remote import is_url
from llm2clip_plugin.data.sources import Source
from llm2clip_plugin.data.split import decide, is_held_out
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.hub import can_only_be_a_path, hub_snapshot
from llm2clip_plugin.json_files import read_json_value
from llm2clip_plugin.safetensors_header import read_header
from llm2clip_plugin.stages.pipeline_config import PipelineConfig
from llm2clip_plugin.stages.rerun import Stage
from llm2clip_plugin.stages.run_plan import PRETRAIN
from llm2clip_plugin.text.adapter import ADAPTER_WEIGHTS, adapter_sha256
from llm2clip_plugin.text.config import EncoderConfig, effective, find_card
from llm2clip_plugin.text.encoder import (
    local_folder,
    open_tokenizer,
    weight_paths,
    weights_sha256,
)
from llm2clip_plugin.text.llm import llm_config
from llm2clip_plugin.text.reading import check_reading
from llm2clip_plugin.vision.directory import (
    CONFIG_FILE,
    check_weights,
    fetch_directory,
    section,
)
from llm2clip_plugin.vision.families import (
    IMPORTED_FIRST,
    families,
    family_of_type,
)
from llm2clip_plugin.vision.towers import TIMM_PREFIX


def check_given(config: PipelineConfig) -> None:
    """Raise FileNotFoundError or ValueError for models and questions that would stop a stage, and
    for an output that holds the data or is in it."""
    check_output(config)
    encoder = encoder_config(config)
    llm_config(encoder)
    check_llm(encoder)
    check_tower(config.tower)
    if config.adapter:
        check_adapter(config, config.adapter)
    if config.reading:
        check_reading(config.reading, encoder)
    if not config.questions:
        return
    from llava_integration.evaluator.benchmarks.rules import benchmark
    from llava_integration.plug.preflight import check_model

    if not PRETRAIN.is_file() or find_spec("llava") is None:
        llava = "LLaVA (pip install --no-deps llava-torch==1.2.2.post1)"
        raise ValueError(f"--questions needs {llava} and a checkout with {PRETRAIN}")
    benchmark("questions").load(Path(config.questions))
    for problem in check_model(config.llava_llm):
        raise ValueError(problem.replace("--model", "--llava-llm"))


def encoder_config(config: PipelineConfig) -> EncoderConfig:
    """The LLM, as the stages open it."""
    return EncoderConfig(
        llm=config.llm,
        preset=config.preset,
        revision=config.revision,
        load_in_4bit=config.load_in_4bit,
        trust_remote_code=config.trust_remote_code,
    )


def check_output(config: PipelineConfig) -> None:
    """ValueError for an --output that is the data, or below a folder of tars, all of whose
    subfolders are read."""
    if is_url(config.path):
        return
    data = Path(config.path).resolve()
    output = Path(config.output).resolve()
    if data == output:
        raise ValueError(f"--output {config.output} is the data; choose another folder")
    if data.is_dir() and output.is_relative_to(data):
        raise ValueError(
            f"--output {config.output} is inside the data, whose subfolders are read; "
            "choose another"
        )
    if output.is_file():
        raise ValueError(f"--output {config.output} is a file; choose a folder")


def check_places(config: PipelineConfig, stages: Sequence[Stage]) -> None:
    """ValueError for an input inside a folder that a stage writes, and so removes."""
    inputs = {
        "DATA": config.path,
        "--image-folder": config.images,
        "--llm": config.llm,
        "--tower": config.tower,
        "--adapter": config.adapter,
        "--reading": config.reading,
        "--questions": config.questions,
        "--llava-llm": config.llava_llm,
    }
    for stage in stages:
        if stage.output is None:
            continue
        output = stage.output.resolve()
        for option, path in inputs.items():
            if (
                path
                and os.path.exists(path)
                and Path(path).resolve().is_relative_to(output)
            ):
                raise ValueError(
                    f"{option} {path} is in {stage.output}, which {stage.name!r} replaces; "
                    "choose another --output, or move it"
                )


def check_split(config: PipelineConfig, source: Source) -> None:
    """ValueError for a split that leaves a side empty, or less than a batch to train on, or a --by
    that a sample lacks."""
    hash_N = decide(source, config.validation, config.by)
    train = len(hash_N) - int(is_held_out(hash_N, config.validation).sum())
    if config.global_batch > train:
        raise ValueError(
            f"--global-batch {config.global_batch} is larger than the {train} images to train on; "
            "choose a smaller one, or leave it out"
        )


def check_llm(encoder: EncoderConfig) -> None:
    """FileNotFoundError or ContractError for an LLM's folder without tokenizer or weights, or with
    weights that are cut short. A Hub id is left to the stage that downloads it."""
    folder = Path(encoder.llm)
    if not folder.is_dir():
        return
    open_tokenizer(folder, trust_remote_code=encoder.trust_remote_code)
    weight_paths(folder)
    check_weights(folder)


def check_tower(tower: str) -> None:
    """FileNotFoundError or ValueError for what is no vision tower by its config.json, and for a
    folder without weights, or with weights that are cut short."""
    path = Path(tower).expanduser()
    if tower.startswith(TIMM_PREFIX) or path.is_file():
        return
    is_folder = path.is_dir()
    if not is_folder:
        if can_only_be_a_path(tower) or "/" not in tower:
            raise FileNotFoundError(
                f"--tower {tower} is not a directory, a checkpoint file or a Hub id (owner/name)"
            )
        try:
            path = hub_snapshot(tower, patterns=["*.json"])
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"--tower {tower} is no directory and not on the Hub: {error}"
            ) from error
    config = path / CONFIG_FILE
    if not config.is_file():
        return  # `llm2clip import` tells by the names of the tensors
    body = read_json_value(config)
    if not isinstance(body, dict):
        raise ContractError(
            f"{config} contains a {type(body).__name__}, expected a JSON object"
        )
    kinds = [
        str(part["model_type"])
        for part in (body, section(body, "vision_config"))
        if part.get("model_type")
    ]
    if not kinds or any(kind.startswith(IMPORTED_FIRST) for kind in kinds):
        return
    kinds_of_families = {
        kind for family in families().values() for kind in family.model_types
    }
    if not kinds_of_families.intersection(kinds):
        family_of_type(kinds[0], where=f"--tower {tower}")  # raises
    if is_folder:
        check_weights(path)


def check_adapter(config: PipelineConfig, adapter_path: str) -> None:
    """FileNotFoundError or ContractError for what is no adapter, or another LLM's."""
    llm = config.llm
    adapter = fetch_directory(adapter_path)
    folder = local_folder(llm, config.revision)
    adapter_sha256(adapter)
    encoder = EncoderConfig(llm=llm, preset=config.preset, adapter=adapter_path)
    effective(encoder, folder, adapter)
    card = find_card(str(adapter))
    base_sha256 = "" if card is None else card.base_sha256
    if card is not None and base_sha256:
        weights = weights_sha256(folder)
        if weights != base_sha256:
            trained = f"--adapter {adapter_path} was trained on {card.base}"
            raise ContractError(
                f"{trained} with weights {base_sha256[:12]}..., but --llm {llm} has "
                f"{weights[:12]}...; pass the LLM that it was trained on"
            )
    width = llm_config(encoder_config(config)).get_text_config().hidden_size
    for name, entry in read_header(adapter / ADAPTER_WEIGHTS).entries.items():
        if name.endswith("q_proj.lora_A.weight") and entry.shape[-1] != width:
            problem = (
                f"--adapter {adapter_path} is for an LLM of width {entry.shape[-1]}"
            )
            raise ContractError(
                f"{problem}, but --llm {llm} has {width}; pass the LLM that it was trained on"
            )
