"""Write a tower directory, and prove it: reload what was written and compare weights and features.

| file                        | holds                                                                      |
|-----------------------------|----------------------------------------------------------------------------|
| config.json, model.safetensors | the tower, a plain Hugging Face vision model with the hub's key names   |
| preprocessor_config.json    | CLIPImageProcessor's form, crop and shortest edge = the tower's image size |
| text_adapter.safetensors    | adapter, visual projection, logit scale (absent for a tower alone)         |
| llm2clip.json               | the TowerCard                                                              |
| README.md                   | model card                                                                 |
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import llm2clip_plugin
from llm2clip_plugin.contracts import ContractError, TowerCard, sha256_weights, whole_directory
from llm2clip_plugin.vision.dual import ADAPTER_FILE, DualEncoder, beside_tower_state, load_dual
from llm2clip_plugin.vision.family import Tower, tower_in
from llm2clip_plugin.vision.lora import merged
from llm2clip_plugin.vision.model_card import model_card
from llm2clip_plugin.vision.towers import (
    PREPROCESSOR_FILE,
    family_of,
    fetch_directory,
    load_tower,
    preprocessor_config,
    resized_from,
)

WEIGHTS_FILE = "model.safetensors"
# Same code, same weights: only a kernel that is not deterministic can differ.
RELATIVE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def export_tower(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    origin: str,
    teacher: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
    preprocessor: dict[str, Any] | None = None,
    replace: bool = False,
) -> TowerCard:
    """Write ``model`` (a DualEncoder, or a tower alone) to ``directory``, whole or not at all; return its card.

    ``origin``: path or Hub id that the tower started from. ``teacher``: TeacherIdentity as a dict.
    ``training``: steps, samples, data ...; ``resized_from`` is added where positions were interpolated.
    ``preprocessor``: by default the family's; its sizes are set to the tower's image size.
    LoRA layers are merged into a copy; the model itself stays as it is.
    Raises FileExistsError (directory in use), ContractError (what was written doesn't read back the same).
    """
    model = merged(model)
    dual = model if isinstance(model, DualEncoder) else None
    tower = tower_in(model)
    modes = {module: module.training for module in model.modules()}
    with whole_directory(directory, replace=replace) as aside:
        save_tower(tower, aside)
        write_preprocessor(aside, {**preprocessor_config(tower), **_without_sizes(preprocessor or {})})
        adapter_hash = save_beside_tower(dual, aside) if dual is not None else ""
        card = TowerCard(
            **tower_facts(tower),
            origin=origin,
            weights_sha256=sha256_weights(aside / WEIGHTS_FILE),
            projection_dim=dual.config.projection_dim if dual is not None else 0,
            adapter_sha256=adapter_hash,
            dual=dataclasses.asdict(dual.config) if dual is not None else {},
            teacher=teacher or {},
            training={**(training or {}), **({"resized_from": resized_from(tower)} if resized_from(tower) else {})},
            metrics=metrics or {},
            versions=library_versions(),
        )
        card.write(aside / TowerCard.FILE)
        (aside / "README.md").write_text(model_card(card), encoding="utf-8")
        try:
            check_written(model.eval(), aside)
        finally:
            for module, mode in modes.items():
                module.training = mode
    return card


def tower_facts(tower: Tower) -> dict[str, Any]:
    """The fields of a TowerCard that the tower's own configuration decides."""
    family, config = family_of(tower), tower.config
    return {
        "family": family.name,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
        "has_cls": family.has_cls,
    }


def library_versions() -> dict[str, str]:
    """Versions of what writes a tower directory."""
    import transformers

    return {
        "llm2clip-plugin": llm2clip_plugin.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def save_tower(tower: Tower, directory: Path) -> None:
    """config.json and one model.safetensors, key names as on the hub whatever transformers' version."""
    from safetensors.torch import load_file, save_file

    tower.config._name_or_path = ""  # transformers 4 would write the path on this machine
    tower.save_pretrained(directory, safe_serialization=True, max_shard_size="1000GB")  # one file, for one hash
    if not (directory / WEIGHTS_FILE).is_file():
        raise ContractError(f"save_pretrained wrote {sorted(os.listdir(directory))}, expected {WEIGHTS_FILE}")
    # transformers 5 puts `vision_model.` back only for a model that from_pretrained made: not for a resized one
    prefix = family_of(tower).file_prefix
    state = load_file(directory / WEIGHTS_FILE)
    if any(not name.startswith(prefix) for name in state):
        save_file({prefix + name: value for name, value in state.items()}, directory / WEIGHTS_FILE, {"format": "pt"})


def save_beside_tower(dual: DualEncoder, directory: Path) -> str:
    """text_adapter.safetensors; returns the hash of its tensors."""
    from safetensors.torch import save_file

    state = {name: value.detach().contiguous().cpu() for name, value in beside_tower_state(dual).items()}
    save_file(state, directory / ADAPTER_FILE, metadata={"format": "pt"})
    return sha256_weights(directory / ADAPTER_FILE)


def _without_sizes(preprocessor: dict[str, Any]) -> dict[str, Any]:
    """The parts of a source's preprocessor that survive: sizes are the tower's own."""
    return {name: preprocessor[name] for name in ("image_mean", "image_std", "resample") if name in preprocessor}


def write_preprocessor(directory: Path, preprocessor: dict[str, Any]) -> None:
    """preprocessor_config.json."""
    import json

    text = json.dumps(preprocessor, indent=2, sort_keys=True) + "\n"
    (directory / PREPROCESSOR_FILE).write_text(text, encoding="utf-8")


def probe_images(tower: Tower, *, count: int = 2) -> Tensor:
    """Made-up images, always the same, (count, 3, S, S) of the tower's dtype and device."""
    size = tower.config.image_size
    pixels = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return pixels.to(device=tower.device, dtype=tower.dtype)


def probe_features(model: nn.Module) -> dict[str, Tensor]:
    """Everything that a tower or dual encoder computes, for two made-up images and three made-up embeddings."""
    dual = model if isinstance(model, DualEncoder) else None
    tower = tower_in(model)
    pixels = probe_images(tower)
    with torch.no_grad():
        output = tower(pixel_values=pixels, output_hidden_states=True)
        found = {f"hidden_states[{i}]": state for i, state in enumerate(output.hidden_states)}
        found["last_hidden_state"] = output.last_hidden_state
        if output.pooler_output is not None:
            found["pooler_output"] = output.pooler_output
        if dual is not None:
            found["encode_image"] = dual.encode_image(pixels)
            if dual.text_adapter is not None:
                generator = torch.Generator().manual_seed(0)
                embeddings = torch.randn(3, dual.config.llm_width, generator=generator).to(tower.device)
                found["encode_text"] = dual.encode_text(embeddings)
    return found


def compare_features(expected: dict[str, Tensor], found: dict[str, Tensor], *, where: str) -> float:
    """The largest difference relative to a tensor's largest value; ContractError if it is over the tolerance."""
    if set(expected) != set(found):
        raise ContractError(f"{where} gives {sorted(found)}, expected {sorted(expected)}")
    worst = 0.0
    for name, value in expected.items():
        tolerance = RELATIVE_TOLERANCE[value.dtype]
        scale = max(value.float().abs().max().item(), 1e-6)
        difference = (value.float() - found[name].float()).abs().max().item() / scale
        if not difference <= tolerance:  # a NaN is refused too
            raise ContractError(
                f"{where}: {name} differs by {difference:.2e} of its largest value, {tolerance} allowed"
            )
        worst = max(worst, difference)
    return worst


def check_written(model: nn.Module, directory: Path) -> float:
    """Reload a tower directory and compare every weight (bit by bit) and every feature with ``model``'s."""
    dual = model if isinstance(model, DualEncoder) else None
    tower = tower_in(model)
    again = load_dual(directory, dtype=tower.dtype)[0] if dual is not None else load_tower(directory, dtype=tower.dtype)
    again = again.to(tower.device).eval()
    before, after = model.state_dict(), again.state_dict()
    unequal = [name for name in before if name not in after or not torch.equal(before[name], after[name])]
    if unequal or set(before) != set(after):
        raise ContractError(
            f"{directory}: tensors that don't read back as written: {unequal or set(after) ^ set(before)}"
        )
    return compare_features(probe_features(model), probe_features(again), where=str(directory))


def check_card(directory: Path) -> TowerCard:
    """The card of a tower directory, its hashes compared with the files; ContractError says both."""
    card = TowerCard.read(directory / TowerCard.FILE)
    for file, expected in ((WEIGHTS_FILE, card.weights_sha256), (ADAPTER_FILE, card.adapter_sha256)):
        if expected and (found := sha256_weights(directory / file)) != expected:
            raise ContractError(
                f"{directory / file} has hash {found}, its card says {expected}; export or copy it again"
            )
    return card


def reexport(source: str | os.PathLike[str], output: str | os.PathLike[str], *, replace: bool = False) -> TowerCard:
    """A tower directory written again by this release: same weights, same card but for the versions."""
    directory = fetch_directory(source)
    card = check_card(directory)
    model = load_dual(directory)[0] if card.projection_dim else load_tower(directory)
    return export_tower(
        model,
        output,
        origin=card.origin,
        teacher=card.teacher,
        training=card.training,
        metrics=card.metrics,
        preprocessor=preprocessor_config(directory),
        replace=replace,
    )
