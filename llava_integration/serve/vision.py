"""The vision tower of a checkpoint, as ``vision_config``, tensors and image processor of the exported model."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_integration.serve.checkpoint import LlavaCheckpoint
from llava_integration.serve.language import TOWER
from llava_integration.serve.tensors import FIX, LazyTensors, open_file, refuse_rest
from llava_integration.serve.tower_code import vision_config
from llava_integration.towers import names
from llava_integration.towers.bundle import locate_tower
from llava_integration.towers.location import TowerLocation
from llava_integration.towers.provenance import loading
from llm2clip_plugin.contracts import ContractError, TowerCard
from llm2clip_plugin.vision.directory import WEIGHTS_FILE, fetch_directory
from llm2clip_plugin.vision.families import read_config
from llm2clip_plugin.vision.family import Family
from llm2clip_plugin.vision.places import published
from llm2clip_plugin.vision.preprocessor import preprocessor_config

SIZES = ("hidden_size", "image_size", "patch_size", "num_hidden_layers")  # kept where they equal a class's defaults
MORE_SIZES = ("num_attention_heads", "intermediate_size")


@dataclass(frozen=True, kw_only=True)
class ExportedTower:
    """A tower directory, or for a stock checkpoint the Hugging Face directory that it names."""

    directory: Path
    family: Family
    config: dict[str, Any]  # ``vision_config``
    location: TowerLocation | None  # None: not a tower of this package

    @property
    def patches(self) -> int:
        """Patches of an image, without the class token."""
        return (self.config["image_size"] // self.config["patch_size"]) ** 2

    @property
    def card(self) -> TowerCard | None:
        """The tower's card without paths of this machine."""
        return published(self.location.card) if self.location else None


def find(checkpoint: LlavaCheckpoint, tower: str = "") -> ExportedTower:
    """The tower that loading the checkpoint finds, or ``tower`` (path, registered name or Hub id).

    Raises FileNotFoundError or ContractError without that tower, or if its files are damaged.
    """
    name = str(checkpoint.config["mm_vision_tower"])
    location = None
    if names.is_ours(name) or tower:
        with loading(str(checkpoint.directory)):
            location = locate_tower(checkpoint.directory, name, checkpoint.config, tower)
        location.check_weights()
        directory = location.directory
    else:
        directory = fetch_directory(name)
    family, config = read_config(directory)
    fields = vision_config(family, config, where=directory)
    sizes = {name: getattr(config, name) for name in SIZES}
    sizes |= {name: getattr(config, name) for name in MORE_SIZES if hasattr(config, name)}
    dropped = {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "architectures"}
    fields = {key: value for key, value in fields.items() if key not in dropped}
    found = ExportedTower(
        directory=directory,
        family=family,
        config={**fields, **sizes},
        location=location,
    )
    check_state(checkpoint.config, "mm_vision_select_layer", sizes["num_hidden_layers"], checkpoint.directory)
    feature = checkpoint.config.get("mm_vision_select_feature", "patch")
    if feature not in ("patch", "cls_patch"):
        raise ContractError(
            f"{checkpoint.directory}: mm_vision_select_feature is {feature!r}, expected 'patch' or 'cls_patch'; {FIX}"
        )
    width = checkpoint.config.get("mm_hidden_size")
    if width != sizes["hidden_size"]:
        raise ContractError(
            f"the projector of {checkpoint.directory} expects features of width {width}, but the tower in {directory} "
            f"has hidden_size {sizes['hidden_size']}; pass the tower that it was trained with as --tower"
        )
    return found


def check_state(config: dict[str, Any], name: str, blocks: int, where: Path) -> None:
    """Raise ContractError unless the setting ``name`` is a hidden state of a tower of so many blocks."""
    state = config.get(name)
    if type(state) is not int or not -blocks - 1 <= state <= blocks:
        raise ContractError(
            f"{where}: {name} is {state!r}, expected a hidden state of the tower, {-blocks - 1} to {blocks}; {FIX}"
        )


def tower_tensors(tower: ExportedTower, trained: LazyTensors, *, unfrozen: bool, files: ExitStack) -> LazyTensors:
    """The tower's tensors under Hugging Face's names.

    Those of the tower's directory, as LLaVA reads them; ``unfrozen``: those that LLaVA has trained take their place,
    ``trained`` being the tensors of its checkpoint. Blocks that LLaVA never runs are in the directory alone.
    """
    from llm2clip_plugin.vision.convert.checkpoint_files import weight_files

    prefix, own = tower.family.file_prefix, {}
    for path in [tower.directory / WEIGHTS_FILE] if tower.location else weight_files(tower.directory):
        own |= open_file(path, files)
    own = {name: tensor for name, tensor in own.items() if not name.startswith(tower.family.not_tower or ("\0",))}
    own = {name: tensor for name, tensor in own.items() if not name.endswith("position_ids")}
    if unfrozen:
        inside = f"{TOWER}vision_tower."
        new = {name.removeprefix(inside): tensor for name, tensor in trained.items() if name.startswith(inside)}
        new = {prefix + name.removeprefix(prefix): tensor for name, tensor in new.items()}
        if not new:
            raise ContractError(f"unfreeze_mm_vision_tower is set, but the checkpoint has no tensors {inside}*; {FIX}")
        refuse_rest(set(new) - set(own), tower.directory)
        own |= new
    return {f"vision_tower.{name}": tensor for name, tensor in own.items()}


def image_processor(tower: ExportedTower, *, pads: bool) -> dict[str, Any]:
    """preprocessor_config.json: the tower's own; ``pads``: images are padded to squares, as LLaVA trained."""
    own = preprocessor_config(tower.directory)
    if not pads:
        return {**own, "processor_class": "LlavaProcessor"}
    return {**own, "image_processor_type": "LlavaImageProcessor", "do_pad": True, "processor_class": "LlavaProcessor"}


def strategy(tower: ExportedTower, config: dict[str, Any]) -> dict[str, Any]:
    """Which tokens of the tower become image tokens: the settings of the model and of its processor."""
    drops_class = tower.family.has_cls and config.get("mm_vision_select_feature", "patch") == "patch"
    return {
        "vision_feature_select_strategy": "default" if drops_class else "full",
        "num_additional_image_tokens": int(tower.family.has_cls),
        "image_seq_length": tower.patches + int(tower.family.has_cls and not drops_class),
    }
