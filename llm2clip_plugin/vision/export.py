"""Write a tower directory, and verify it: reload what was written and compare weights and features.

| file                           | contents                                                                   |
|--------------------------------|----------------------------------------------------------------------------|
| config.json, model.safetensors | the tower, a plain Hugging Face vision model with the Hub's tensor names   |
| preprocessor_config.json       | CLIPImageProcessor's, crop and shortest edge = the tower's image size      |
| text_adapter.safetensors       | text adapter, visual projection, logit scale (absent for a tower alone)    |
| llm2clip.json                  | the TowerCard                                                              |
| teacher-adapter/               | the adapter of the teacher LLM and its text settings (--with-adapter)      |
| README.md                      | model card                                                                 |
"""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import llm2clip_plugin
from llm2clip_plugin.console import quiet_transformers
from llm2clip_plugin.contracts import EncoderCard, TowerCard, atomic_directory, sha256_weights
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.vision.checkpoint import preprocessor_config
from llm2clip_plugin.vision.directory import (
    ADAPTER_FILE,
    PREPROCESSOR_FILE,
    WEIGHTS_FILE,
    fetch_directory,
    read_json,
    write_json,
)
from llm2clip_plugin.vision.dual import DualEncoder, heads_state, load_dual
from llm2clip_plugin.vision.families import family_of
from llm2clip_plugin.vision.family import Tower, tower_in
from llm2clip_plugin.vision.publish import TEACHER_ADAPTER, is_local, located, model_card, recorded
from llm2clip_plugin.vision.towers import load_tower, merged, resize_tower, resized_from

# The same code with the same weights: only nondeterministic kernels can differ.
RELATIVE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def export_tower(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    origin: str,
    teacher: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
    adapter: Path | None = None,
    replace: bool = False,
) -> TowerCard:
    """Write ``model`` (a DualEncoder or a tower) to ``directory``, completely or not at all; returns its card.

    ``origin``: path or Hub id that the tower started from. ``teacher``: TeacherIdentity as a dict. Local paths in them
    are recorded relative to ``directory``.
    ``training``: steps, samples, data ...; ``resized_from`` is added if positions were interpolated.
    ``adapter``: folder of the teacher's adapter, which is copied into the directory.
    LoRA layers are merged into a copy; the model itself does not change.
    Raises FileExistsError (directory not empty), ContractError (the reloaded directory differs from the model).
    """
    model = merged(model)
    tower = tower_in(model)
    family, config = family_of(tower), tower.config
    modes = {module: module.training for module in model.modules()}
    with atomic_directory(directory, replace=replace) as temporary:
        save_tower(tower, temporary)
        write_json(temporary / PREPROCESSOR_FILE, preprocessor_config(tower))
        if adapter is not None:
            copy_adapter(adapter, temporary / TEACHER_ADAPTER)
            teacher = {**(teacher or {}), "adapter": str(Path(directory).expanduser().absolute() / TEACHER_ADAPTER)}
        card = TowerCard(
            family=family.name,
            has_cls=family.has_cls,
            num_layers=config.num_hidden_layers,
            **{name: getattr(config, name) for name in ("hidden_size", "patch_size", "image_size")},
            **(save_heads(model, temporary) if isinstance(model, DualEncoder) else {}),
            origin=origin,
            weights_sha256=sha256_weights(temporary / WEIGHTS_FILE),
            teacher=teacher or {},
            training={**(training or {}), **({"resized_from": resized_from(tower)} if resized_from(tower) else {})},
            metrics=metrics or {},
            versions=library_versions(),
        )
        card = recorded(card, directory)
        card.write(temporary / TowerCard.FILE)
        (temporary / "README.md").write_text(model_card(card), encoding="utf-8")
        try:
            verify_directory(model.eval(), temporary)
        finally:
            for module, mode in modes.items():
                module.training = mode
    return card


def copy_adapter(source: Path, target: Path) -> None:
    """Copy a PEFT adapter with its encoder card; the LLM's local path in them is reduced to its name."""
    target.mkdir()
    for name in ("adapter_model.safetensors", "llm2clip_post.safetensors"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    config = read_json(source / "adapter_config.json")
    base = str(config.get("base_model_name_or_path") or "")
    config["base_model_name_or_path"] = None if is_local(base) else base  # peft would look for a name on the Hub
    write_json(target / "adapter_config.json", config)
    if (source / EncoderCard.FILE).is_file():
        card = EncoderCard.read(source / EncoderCard.FILE)
        named = Path(card.base).name if is_local(card.base) else card.base
        dataclasses.replace(card, base=named).write(target / EncoderCard.FILE)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that write a tower directory."""
    import transformers

    libraries = {library.__name__: library.__version__ for library in (torch, transformers)}
    return {"llm2clip-plugin": llm2clip_plugin.__version__, **libraries}


def save_tower(tower: Tower, directory: Path) -> None:
    """config.json and one model.safetensors, with the Hub's tensor names in every version of transformers."""
    from safetensors.torch import load_file, save_file

    tower.config._name_or_path = ""  # transformers 4 would write a path of this machine
    with quiet_transformers():
        tower.save_pretrained(directory, safe_serialization=True, max_shard_size="1000GB")  # one file, one hash
    if not (directory / WEIGHTS_FILE).is_file():
        raise ContractError(f"save_pretrained wrote {sorted(os.listdir(directory))}, expected {WEIGHTS_FILE}")
    # transformers 5 restores `vision_model.` only in a model made by from_pretrained, not in a resized one
    prefix = family_of(tower).file_prefix
    state = load_file(directory / WEIGHTS_FILE)
    if any(not name.startswith(prefix) for name in state):
        save_file({prefix + name: value for name, value in state.items()}, directory / WEIGHTS_FILE, {"format": "pt"})


def save_heads(dual: DualEncoder, directory: Path) -> dict[str, Any]:
    """text_adapter.safetensors; returns the card's fields about it."""
    from safetensors.torch import save_file

    state = {name: value.detach().contiguous().cpu() for name, value in heads_state(dual).items()}
    save_file(state, directory / ADAPTER_FILE, metadata={"format": "pt"})
    return {
        "projection_dim": dual.config.projection_dim,
        "adapter_sha256": sha256_weights(directory / ADAPTER_FILE),
        "dual": {name: value for name, value in dataclasses.asdict(dual.config).items() if value is not None},
    }


def reexport(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    adapter: Path | None = None,
    replace: bool = False,
) -> TowerCard:
    """Write a tower directory again with this release: same weights, same card except for the versions.

    ``adapter``: as for ``export_tower``; None copies the one that the directory contains, if it does.

    ``image_size``, in pixels, interpolates the positions if it is not the tower's own; the metrics are dropped then,
    because they were measured at the old size.
    """
    directory = fetch_directory(source)
    card = located(TowerCard.read(directory / TowerCard.FILE), directory)
    model = load_dual(directory)[0] if card.projection_dim else load_tower(directory)
    if adapter is None and (inside := directory / TEACHER_ADAPTER).is_dir():
        adapter = inside
    metrics = card.metrics
    if image_size is not None and image_size != card.image_size:
        metrics, resized = {}, resize_tower(tower_in(model), image_size)
        if isinstance(model, DualEncoder):
            model.tower = resized
        else:
            model = resized
    return export_tower(
        model,
        output,
        origin=card.origin,
        teacher=card.teacher,
        training=card.training,
        metrics=metrics,
        adapter=adapter,
        replace=replace,
    )


def probe_images(tower: Tower, *, count: int = 2) -> Tensor:
    """Random images from a fixed seed, (count, 3, S, S) in the tower's dtype and on its device."""
    size = tower.config.image_size
    pixels = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return pixels.to(device=tower.device, dtype=tower.dtype)


def probe_features(model: nn.Module) -> dict[str, Tensor]:
    """Everything that a tower or dual encoder computes for two random images and three random LLM embeddings."""
    tower = tower_in(model)
    pixels = probe_images(tower)
    with torch.no_grad():
        output = tower(pixel_values=pixels, output_hidden_states=True)
        features = {f"hidden_states[{i}]": state for i, state in enumerate(output.hidden_states)}
        features["last_hidden_state"] = output.last_hidden_state
        if output.pooler_output is not None:
            features["pooler_output"] = output.pooler_output
        if isinstance(model, DualEncoder):
            features["encode_image"] = model.encode_image(pixels)
            if model.text_adapter is not None:
                embeddings = torch.randn(3, model.config.llm_width, generator=torch.Generator().manual_seed(0))
                features["encode_text"] = model.encode_text(embeddings.to(tower.device))
    return features


def compare_features(expected: dict[str, Tensor], actual: dict[str, Tensor], *, where: str) -> None:
    """Raise ContractError for a difference, relative to the tensor's largest value, that exceeds the tolerance."""
    if set(expected) != set(actual):
        raise ContractError(f"{where} computes {sorted(actual)}, expected {sorted(expected)}")
    for name, value in expected.items():
        tolerance = RELATIVE_TOLERANCE[value.dtype]
        scale = max(value.float().abs().max().item(), 1e-6)
        difference = (value.float() - actual[name].float()).abs().max().item() / scale
        if not difference <= tolerance:  # NaN fails too
            raise ContractError(
                f"{where}: {name} differs by {difference:.2e} of its largest value, more than the tolerance {tolerance}"
            )


def verify_directory(model: nn.Module, directory: Path) -> None:
    """Reload a tower directory; raise ContractError unless every weight (bit by bit) and feature is ``model``'s."""
    tower = tower_in(model)
    is_dual = isinstance(model, DualEncoder)
    reloaded = load_dual(directory, dtype=tower.dtype)[0] if is_dual else load_tower(directory, dtype=tower.dtype)
    reloaded = reloaded.to(tower.device).eval()
    before, after = model.state_dict(), reloaded.state_dict()
    unequal = {name for name in before if name not in after or not torch.equal(before[name], after[name])}
    if unequal := sorted(unequal | (after.keys() - before.keys())):
        raise ContractError(f"{directory}: tensors differ after reloading: {unequal}")
    compare_features(probe_features(model), probe_features(reloaded), where=str(directory))
