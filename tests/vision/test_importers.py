"""Checkpoints that people have: the same features as the reference, every tensor accounted for, damage refused."""

import argparse
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm2clip_plugin import load_dual_encoder, load_tower
from llm2clip_plugin.contracts import ContractError, TowerCard
from llm2clip_plugin.vision.convert import checkpoint_files, command
from llm2clip_plugin.vision.convert.adapter_match import candidate_prefixes, match_adapter
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.convert.layouts import open_clip

from .conftest import REFERENCE, TRANSFORMERS_TOWERS, largest_difference, read

CHECKPOINT = REFERENCE / "C_checkpoint"
RELEASE = REFERENCE / "F_release_directory"
EVA_FILES = ["checkpoint.pt", "checkpoint_training_layout.pt", "checkpoint.safetensors"]
TOLERANCE, LOGITS = 2e-5, 1e-4  # the goldens' own


@pytest.mark.parametrize("file", EVA_FILES)
def test_whole_eva02_checkpoint(file, tmp_path, capsys):
    argv = [str(CHECKPOINT / file), "--output", str(tmp_path / "tower"), "--config", str(CHECKPOINT / "config.json")]
    assert command.main(argv) == 0
    assert "text.text_adaptor.0.fn.0.weight -> text_adapter.blocks.0.up.weight" in capsys.readouterr().out
    golden, dual = read(CHECKPOINT), load_dual_encoder(tmp_path / "tower")
    with torch.no_grad():
        image, text = dual.encode_image(golden["pixels"]), dual.encode_text(golden["text_input"])
    assert largest_difference(image, golden["image_embeddings_normalized"]) < TOLERANCE
    assert largest_difference(text, golden["text_embeddings_normalized"]) < TOLERANCE
    assert largest_difference(dual.logit_scale.squeeze(), golden["logit_scale_exp"]) < TOLERANCE
    assert largest_difference(dual.logit_scale * image @ text.T, golden["logits_per_image"]) < LOGITS


def test_eva02_checkpoint_needs_no_config(tmp_path):
    told, _ = import_tower(CHECKPOINT / "checkpoint.pt", tmp_path / "told", config=CHECKPOINT / "config.json")
    found, _ = import_tower(CHECKPOINT / "checkpoint.pt", tmp_path / "found")
    assert (found.weights_sha256, found.adapter_sha256) == (told.weights_sha256, told.adapter_sha256)
    assert (tmp_path / "found" / "config.json").read_text() == (tmp_path / "told" / "config.json").read_text()


def test_clip_release(tmp_path):
    card, report = import_tower(RELEASE, tmp_path / "tower")
    assert (card.family, card.projection_dim, card.dual["llm_width"]) == ("clip", 20, 30)
    assert any("text_adapter.adaptor.5.weight -> text_adapter.projection.weight" in line for line in report)
    golden, dual = read(RELEASE), load_dual_encoder(tmp_path / "tower")
    with torch.no_grad():
        image, text = dual.encode_image(golden["pixels"]), dual.encode_text(golden["text_input"])
        output = load_tower(tmp_path / "tower")(pixel_values=golden["pixels"], output_hidden_states=True)
    assert largest_difference(image, golden["image_embeds_normalized"]) < TOLERANCE
    assert largest_difference(text, golden["text_embeds_normalized"]) < TOLERANCE
    assert largest_difference(dual.logit_scale * image @ text.T, golden["logits_per_image"]) < LOGITS
    for i, state in enumerate(output.hidden_states):
        assert largest_difference(state, golden[f"vision_hidden_states_{i:02d}"]) < TOLERANCE


def test_clip_release_as_a_pickle(tmp_path):
    (tmp_path / "release").mkdir()
    shutil.copy(RELEASE / "config.json", tmp_path / "release")
    torch.save(read(RELEASE, "model.safetensors"), tmp_path / "release" / "pytorch_model.bin")
    one, _ = import_tower(tmp_path / "release", tmp_path / "one")
    two, _ = import_tower(RELEASE, tmp_path / "two")
    assert (one.weights_sha256, one.adapter_sha256) == (two.weights_sha256, two.adapter_sha256)


def test_release_in_shards(tmp_path):
    (tmp_path / "release").mkdir()
    shutil.copy(RELEASE / "config.json", tmp_path / "release")
    state = read(RELEASE, "model.safetensors")
    halves = {"a.safetensors": dict(list(state.items())[::2]), "b.safetensors": dict(list(state.items())[1::2])}
    for name, half in halves.items():
        save_file(half, tmp_path / "release" / name)
    index = {"weight_map": {key: name for name, half in halves.items() for key in half}}
    (tmp_path / "release" / "model.safetensors.index.json").write_text(json.dumps(index))
    one, _ = import_tower(tmp_path / "release", tmp_path / "one")
    assert one.adapter_sha256 == import_tower(RELEASE, tmp_path / "two")[0].adapter_sha256


def test_an_adapter_trained_with_the_llm_in_the_loop_takes_embeddings_as_they_are(tmp_path):
    state = {
        name.replace("text.text_adaptor.", "text.text_proj.text_adaptor."): value
        for name, value in read(CHECKPOINT, "checkpoint.safetensors").items()
    }
    save_file(state, tmp_path / "live.safetensors")
    card, report = import_tower(tmp_path / "live.safetensors", tmp_path / "tower")
    assert card.dual["normalise_input"] is False
    assert any("with the LLM in the loop" in line for line in report)
    golden, dual = read(CHECKPOINT), load_dual_encoder(tmp_path / "tower")
    embeddings = torch.nn.functional.normalize(golden["text_input"], dim=-1)
    with torch.no_grad():
        text, longer = dual.encode_text(embeddings), dual.encode_text(2 * embeddings)
    assert largest_difference(text, golden["text_embeddings_normalized"]) < TOLERANCE
    assert largest_difference(text, longer) > TOLERANCE


@pytest.mark.parametrize("prefix", ["", "model."])
def test_siglip_release_by_structure(prefix, tmp_path):
    """Key names of the siglip2 release are not public: another nesting of the adapter must do as well."""
    source = TRANSFORMERS_TOWERS / "siglip_full"
    state = {k: v for k, v in read(source, "model.safetensors").items() if not k.startswith("text_model.")}
    width, joint = 20, 24
    for i in range(2):
        part = f"text_proj.net.{i}."
        state |= {f"{part}norm.weight": torch.rand(width), f"{part}norm.bias": torch.rand(width)}
        state |= {f"{part}ff.0.weight": torch.randn(3 * width, width), f"{part}ff.0.bias": torch.rand(3 * width)}
        state |= {f"{part}ff.2.weight": torch.randn(width, 3 * width), f"{part}ff.2.bias": torch.rand(width)}
    state |= {"text_proj.net.2.weight": torch.rand(width), "text_proj.net.2.bias": torch.rand(width)}
    state |= {"text_proj.net.3.weight": torch.randn(joint, width)}
    (tmp_path / "release").mkdir()
    shutil.copy(source / "config.json", tmp_path / "release")
    save_file({prefix + key: value for key, value in state.items()}, tmp_path / "release" / "model.safetensors")
    card, report = import_tower(tmp_path / "release", tmp_path / "tower")
    assert (card.dual["adapter_blocks"], card.dual["adapter_expansion"], card.dual["projection"]) == (2, 3, "none")
    assert any("has no bias: filled with zeros" in line for line in report)
    dual, golden = load_dual_encoder(tmp_path / "tower"), read(source)
    x = torch.nn.functional.normalize(torch.randn(4, width), dim=-1)
    expected = x
    for i in range(2):
        g = {
            key: state[f"text_proj.net.{i}.{key}"]
            for key in ("norm.weight", "norm.bias", "ff.0.weight", "ff.0.bias", "ff.2.weight", "ff.2.bias")
        }
        h = torch.nn.functional.layer_norm(expected, (width,), g["norm.weight"], g["norm.bias"])
        h = torch.nn.functional.gelu(h @ g["ff.0.weight"].T + g["ff.0.bias"])
        expected = expected + h @ g["ff.2.weight"].T + g["ff.2.bias"]
    expected = torch.nn.functional.layer_norm(
        expected, (width,), state["text_proj.net.2.weight"], state["text_proj.net.2.bias"]
    )
    expected = torch.nn.functional.normalize(expected @ state["text_proj.net.3.weight"].T, dim=-1)
    with torch.no_grad():
        assert largest_difference(dual.encode_text(x * 7), expected) < TOLERANCE
        pooled = torch.nn.functional.normalize(golden["pooler_output"], dim=-1)
        assert largest_difference(dual.encode_image(golden["pixels"]), pooled) < TOLERANCE


@pytest.mark.parametrize(
    "name", ["clip_vision", "clip_full", "siglip_vision", "siglip_full", "dinov2", "dinov2_swiglu"]
)
def test_plain_hugging_face_models(name, tmp_path):
    import_tower(TRANSFORMERS_TOWERS / name, tmp_path / "tower")
    golden, tower = read(TRANSFORMERS_TOWERS / name), load_tower(tmp_path / "tower")
    with torch.no_grad():
        output = tower(pixel_values=golden["pixels"], output_hidden_states=True)
    assert (
        largest_difference(output.hidden_states[-2], golden[f"hidden_states_{len(output.hidden_states) - 2:02d}"])
        < TOLERANCE
    )
    assert largest_difference(output.pooler_output, golden["pooler_output"]) < TOLERANCE
    original = read(TRANSFORMERS_TOWERS / name, "model.safetensors")
    written = read(tmp_path / "tower", "model.safetensors")
    assert written and all(torch.equal(value, original[key]) for key, value in written.items())


def test_a_file_takes_its_config_from_the_option(tmp_path):
    source = TRANSFORMERS_TOWERS / "clip_vision"
    one, _ = import_tower(source / "model.safetensors", tmp_path / "one", config=source / "config.json")
    assert one.weights_sha256 == import_tower(source, tmp_path / "two")[0].weights_sha256
    with pytest.raises(ValueError, match=r"needs its config.json, in the same folder or as --config"):
        import_tower(source / "model.safetensors", tmp_path / "three")


SOURCES = {
    "eva02": (CHECKPOINT / "checkpoint.safetensors", CHECKPOINT / "config.json"),
    "release": (RELEASE, None),
    "clip": (TRANSFORMERS_TOWERS / "clip_full", None),
    "siglip": (TRANSFORMERS_TOWERS / "siglip_full", None),
    "dinov2": (TRANSFORMERS_TOWERS / "dinov2", None),
}


@pytest.mark.parametrize("name", SOURCES)
def test_import_export_import_is_identical(name, tmp_path):
    from llm2clip_plugin.stages.tower.export import main as export_main

    source, config = SOURCES[name]
    import_tower(source, tmp_path / "one", config=config)
    assert export_main([str(tmp_path / "one"), "--output", str(tmp_path / "two")]) == 0
    assert command.main([str(tmp_path / "two"), "--output", str(tmp_path / "three")]) == 0
    first = TowerCard.read(tmp_path / "one" / "llm2clip.json")
    for again in ("two", "three"):
        assert TowerCard.read(tmp_path / again / "llm2clip.json") == first
        assert (tmp_path / again / "model.safetensors").read_bytes() == (
            tmp_path / "one" / "model.safetensors"
        ).read_bytes()


def test_own_directory_resized_on_import(tmp_path):
    import_tower(RELEASE, tmp_path / "one")
    card, _ = import_tower(tmp_path / "one", tmp_path / "two", image_size=42)
    assert (card.image_size, card.training["resized_from"]) == (42, 28)
    assert load_dual_encoder(tmp_path / "two").encode_image(torch.randn(1, 3, 42, 42)).shape == (1, 20)


def test_a_foreign_source_resized_on_import_says_so(tmp_path):
    card, report = import_tower(RELEASE, tmp_path / "one", image_size=42)
    assert card.training["resized_from"] == 28 and report[-1] == "positions interpolated from 28 to 42 px"
    assert not any("interpolated" in line for line in import_tower(RELEASE, tmp_path / "two")[1])


# one tensor of every role in each layout
DAMAGED = {
    "eva02": [
        "visual.blocks.1.mlp.w1.weight",
        "visual.blocks.0.attn.inner_attn_ln.bias",
        "visual.pos_embed",
        "visual.head.weight",
        "text.text_adaptor.2.fn.0.weight",
        "text.text_adaptor.4.weight",
        "text.text_adaptor.5.bias",
        "visual.cls_token",
        "visual.blocks.0.norm1.weight",
        "visual.blocks.1.attn.rope.freqs_cos",
        "visual.rope.freqs_sin",
        "logit_scale",
    ],
    "release": [
        "vision_model.encoder.layers.1.mlp.fc1.weight",
        "vision_model.post_layernorm.weight",
        "visual_projection.weight",
        "text_adapter.adaptor.3.fn.3.weight",
        "text_adapter.adaptor.5.weight",
        "text_adapter.adaptor.5.bias",
        "logit_scale",
    ],
    "clip": [
        "visual_projection.weight",
        "logit_scale",
        "text_projection.weight",
        "text_model.final_layer_norm.weight",
        "text_model.encoder.layers.0.self_attn.q_proj.bias",
    ],
    "siglip": ["logit_scale", "logit_bias", "vision_model.head.probe", "text_model.head.bias"],
    "openclip": [
        "visual.class_embedding",
        "visual.conv1.weight",
        "visual.positional_embedding",
        "visual.transformer.resblocks.0.mlp.c_fc.weight",
        "visual.transformer.resblocks.1.attn.in_proj_bias",
        "visual.proj",
        "text.text_adaptor.5.bias",
        "logit_scale",
    ],
}


def open_clip_state_of_the_release() -> dict:
    """The CLIP-style release under OpenCLIP's names, without a folder."""
    state = read(RELEASE, "model.safetensors")
    tower = {name: value for name, value in state.items() if name.startswith("vision_model.")}
    names = {"text_adapter.adaptor.": "text.text_adaptor."}
    other = {n.replace(*next(iter(names.items()))): v for n, v in state.items() if n.startswith("text_adapter.")}
    visual = open_clip.NAMES.to_theirs(tower) | {"visual.proj": state["visual_projection.weight"].T.contiguous()}
    return {**visual, **other, "logit_scale": state["logit_scale"]}


def whole_state(layout: str) -> dict:
    """Every tensor of a layout."""
    if layout == "openclip":
        return open_clip_state_of_the_release()
    source = SOURCES[layout][0]
    return load_file(source / "model.safetensors" if source.is_dir() else source)


def damaged(state: dict, key: str, how: str) -> dict:
    state = dict(state)
    value = state.pop(key)
    if how == "renamed":
        head, _, tail = key.rpartition(".")
        state[f"{head}_x.{tail}" if head else f"{tail}_x"] = value
    if how == "transposed":
        state[key] = value.transpose(0, 1).contiguous()
    if how == "cut":
        state[key] = value[:-1].contiguous()
    return state


def damages() -> list[tuple[str, str, str]]:
    """Layout, tensor, damage; a square or a vector can be transposed without a trace, so those are left out."""
    cases = []
    for layout, keys in DAMAGED.items():
        state = whole_state(layout)
        for key in keys:
            oblong = state[key].dim() > 1 and state[key].shape[0] != state[key].shape[1]
            hows = ["missing", "renamed", *(["transposed"] if oblong else []), *(["cut"] if state[key].dim() else [])]
            cases += [(layout, key, how) for how in hows]
    return cases


@pytest.mark.parametrize("layout, key, how", damages())
def test_one_damaged_tensor_is_refused(layout, key, how, tmp_path):
    (tmp_path / "damaged").mkdir()
    save_file(damaged(whole_state(layout), key, how), tmp_path / "damaged" / "model.safetensors")
    place, config = tmp_path / "damaged", None
    if layout == "openclip":
        fields = {"model_cfg": {"vision_cfg": open_clip_vision(), "quick_gelu": True}}
        (place / "open_clip_config.json").write_text(json.dumps(fields))
    elif SOURCES[layout][0].is_dir():
        shutil.copy(SOURCES[layout][0] / "config.json", place)
    else:
        place, config = place / "model.safetensors", SOURCES[layout][1]
    with pytest.raises(ContractError) as refusal:
        import_tower(place, tmp_path / "tower", config=config)
    assert re.search(
        r"lacks|no place|don't match|missing|misshapen|rows|expected|says|but the|differs from the table",
        str(refusal.value),
    )
    assert not (tmp_path / "tower").exists() and not list(tmp_path.glob(".import-*"))


def test_a_clip_is_not_imported_without_its_projection(tmp_path):
    """Its features would be another space's; one that says no word of texts is a tower alone."""
    shutil.copytree(TRANSFORMERS_TOWERS / "clip_full", tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["text_projection.weight"] = state.pop("visual_projection.weight")
    save_file(state, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ContractError, match=r"lacks \['visual_projection.weight'\]"):
        import_tower(tmp_path / "model", tmp_path / "tower")
    alone = {name: value for name, value in state.items() if name.startswith("vision_model.")}
    save_file(alone, tmp_path / "model" / "model.safetensors")
    assert import_tower(tmp_path / "model", tmp_path / "tower")[0].projection_dim == 0
    save_file(alone | {"logit_scale": torch.zeros(())}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ContractError, match=r"lacks \['visual_projection.weight'\]"):
        import_tower(tmp_path / "model", tmp_path / "other")
    save_file(alone, tmp_path / "model" / "model.safetensors")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["architectures"] = ["CLIPVisionModelWithProjection"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ContractError, match=r"lacks \['visual_projection.weight'\]"):
        import_tower(tmp_path / "model", tmp_path / "other")


@pytest.mark.parametrize("layout, lost", [("release", "adaptor.5.bias"), ("eva02", "text_adaptor.5.bias")])
def test_what_an_error_says_to_do_helps(layout, lost, tmp_path):
    """The JSON that each refusal prints, written to a file and given as --config, and nothing else."""
    state = {k: v for k, v in whole_state(layout).items() if k != "logit_scale" and not k.endswith(lost)}
    (tmp_path / "source").mkdir()
    save_file(state, tmp_path / "source" / "model.safetensors")
    if layout == "release":
        shutil.copy(RELEASE / "config.json", tmp_path / "source")
    told, refusals = {}, 0
    while True:
        (tmp_path / "told.json").write_text(json.dumps(told))
        try:
            import_tower(tmp_path / "source", tmp_path / "tower", config=tmp_path / "told.json" if told else None)
            break
        except ContractError as error:
            advice = re.search(r"--config with (\{.*\})", str(error))
            assert advice and refusals < 2, str(error)
            told, refusals = told | json.loads(advice[1]), refusals + 1
    assert refusals == 2
    dual = load_dual_encoder(tmp_path / "tower")
    assert dual.logit_scale.log().item() == pytest.approx(2.6592, abs=1e-4)
    assert not dual.dual.text_adapter.projection.bias.any()
    whole, _ = import_tower(SOURCES[layout][0], tmp_path / "whole", config=SOURCES[layout][1])
    assert whole.weights_sha256 == TowerCard.read(tmp_path / "tower" / "llm2clip.json").weights_sha256


def test_a_users_config_goes_over_the_one_beside(tmp_path):
    """Keys inside objects too; a whole model's config.json stands alone."""
    shutil.copytree(TRANSFORMERS_TOWERS / "clip_vision", tmp_path / "model")
    (tmp_path / "part.json").write_text('{"hidden_act": "gelu"}')
    import_tower(tmp_path / "model", tmp_path / "one", config=tmp_path / "part.json")
    written = json.loads((tmp_path / "one" / "config.json").read_text())
    beside = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["hidden_act"] == "gelu" and written["hidden_size"] == beside["hidden_size"]
    (tmp_path / "whole.json").write_text(json.dumps(beside | {"vision_config": None}))
    (tmp_path / "model" / "config.json").write_text('{"model_type": "clip", "hidden_act": "gelu"}')
    import_tower(tmp_path / "model", tmp_path / "two", config=tmp_path / "whole.json")
    written = json.loads((tmp_path / "two" / "config.json").read_text())
    assert written["hidden_act"] == beside.get("hidden_act", "quick_gelu")


def test_a_release_that_never_had_them_says_so_in_its_config(tmp_path):
    state = read(RELEASE, "model.safetensors")
    del state["logit_scale"], state["text_adapter.adaptor.5.bias"]
    (tmp_path / "release").mkdir()
    save_file(state, tmp_path / "release" / "model.safetensors")
    fields = json.loads((RELEASE / "config.json").read_text()) | {"text_cfg": {"proj_bias": False}}
    (tmp_path / "told.json").write_text(json.dumps(fields))
    import_tower(tmp_path / "release", tmp_path / "tower", config=tmp_path / "told.json")
    dual = load_dual_encoder(tmp_path / "tower")
    assert dual.logit_scale.log().item() == pytest.approx(2.6592, abs=1e-4)
    assert not dual.dual.text_adapter.projection.bias.any()


@pytest.mark.parametrize("file", EVA_FILES)
def test_truncated_files_are_refused(file, tmp_path):
    whole = (CHECKPOINT / file).read_bytes()
    for part in (len(whole) // 2, 100):
        (tmp_path / file).write_bytes(whole[:part])
        with pytest.raises(ContractError, match="is not a complete"):
            import_tower(tmp_path / file, tmp_path / "tower")
    assert not (tmp_path / "tower").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("{}", r"model.safetensors.index.json has no .weight_map."),
        ('{"weight_map": []}', r"model.safetensors.index.json: .weight_map. is \[\], expected an object"),
        ('{"weight_map"', r"model.safetensors.index.json is not valid JSON"),
    ],
)
def test_a_broken_index_of_shards_is_named(text, message, tmp_path):
    shutil.copy(RELEASE / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ContractError, match=message):
        import_tower(tmp_path, tmp_path / "tower")


def test_null_in_a_config_is_as_good_as_absent(tmp_path):
    shutil.copytree(TRANSFORMERS_TOWERS / "clip_vision", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"vision_config": None}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    card, _ = import_tower(tmp_path / "model", tmp_path / "tower")
    plain, _ = import_tower(TRANSFORMERS_TOWERS / "clip_vision", tmp_path / "plain")
    assert card.weights_sha256 == plain.weights_sha256
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"vision_config": 3}))
    with pytest.raises(ContractError, match=r"vision_config. is 3, expected an object"):
        import_tower(tmp_path / "model", tmp_path / "other")


class Trap:
    """A pickle of this writes a file when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "ran"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", ["zip", "bare"])
def test_a_pickle_with_code_is_refused_and_not_run(protocol, tmp_path):
    trap = tmp_path / "ran.txt"
    if protocol == "zip":
        torch.save({"logit_scale": torch.zeros(()), "x": Trap(trap)}, tmp_path / "checkpoint.pt")
    else:
        (tmp_path / "checkpoint.pt").write_bytes(pickle.dumps({"x": Trap(trap)}))
    with pytest.raises(ContractError, match=r"; nothing in it was run. .* convert it to .safetensors") as said:
        import_tower(tmp_path / "checkpoint.pt", tmp_path / "tower")
    assert not trap.exists()
    assert ("would run or construct getattr" if protocol == "zip" else "contains code or objects") in str(said.value)
    assert "weights_only" not in str(said.value) and "\x1b" not in str(said.value)
    pickle.loads(pickle.dumps(Trap(trap)))
    assert trap.exists()  # the trap does work


@pytest.mark.parametrize(
    "value, name", [(argparse.Namespace(a=1), "argparse.Namespace"), (os.system, f"{os.system.__module__}.system")]
)
def test_a_refused_pickle_says_what_it_would_make(value, name, tmp_path):
    torch.save({"x": value}, tmp_path / "checkpoint.pt")
    with pytest.raises(ContractError, match=rf"would run or construct {name}; nothing in it was run"):
        import_tower(tmp_path / "checkpoint.pt", tmp_path / "tower")


@pytest.mark.parametrize("text", ["hello world\n", "version https://git-lfs.github.com/spec/v1\n", "<html>"])
def test_a_text_that_is_called_pt_is_refused(text, tmp_path):
    (tmp_path / "checkpoint.pt").write_text(text)
    with pytest.raises(ContractError, match=r"is not a complete torch checkpoint|or is not a torch checkpoint"):
        import_tower(tmp_path / "checkpoint.pt", tmp_path / "tower")


def test_pickles_are_refused_where_torch_cannot_read_them_safely(monkeypatch):
    monkeypatch.setattr(checkpoint_files.torch, "__version__", "2.1.2+cu121")
    with pytest.raises(ContractError, match="CVE-2025-32434"):
        checkpoint_files.read_tensors(CHECKPOINT / "checkpoint.pt")


@pytest.mark.parametrize("model_type", ["siglip2", "llm2clip_siglip"])
def test_fixed_resolution_siglip_under_other_names(model_type, tmp_path):
    """A release may name its model type as it likes: the vision part and the tensors decide."""
    shutil.copytree(TRANSFORMERS_TOWERS / "siglip_full", tmp_path / "release")
    config = json.loads((tmp_path / "release" / "config.json").read_text())
    config["model_type"] = model_type
    (tmp_path / "release" / "config.json").write_text(json.dumps(config))
    card, _ = import_tower(tmp_path / "release", tmp_path / "tower")
    assert (
        card.weights_sha256 == import_tower(TRANSFORMERS_TOWERS / "siglip_full", tmp_path / "plain")[0].weights_sha256
    )
    if model_type == "siglip2":
        state = load_file(tmp_path / "release" / "model.safetensors")
        name = "vision_model.embeddings.patch_embedding.weight"
        save_file(state | {name: state[name].flatten(1)}, tmp_path / "release" / "model.safetensors")
        with pytest.raises(ValueError, match="NaFlex models are not supported"):
            import_tower(tmp_path / "release", tmp_path / "other")


def test_a_foreign_config_beside_an_eva_checkpoint_does_no_harm(tmp_path):
    (tmp_path / "hub").mkdir()
    shutil.copy(CHECKPOINT / "checkpoint.pt", tmp_path / "hub" / "LLM2CLIP-EVA02.pt")
    (tmp_path / "hub" / "config.json").write_text('{"model_type": "clip"}')
    card, _ = import_tower(tmp_path / "hub", tmp_path / "tower")
    assert card.weights_sha256 == import_tower(CHECKPOINT / "checkpoint.pt", tmp_path / "plain")[0].weights_sha256
    with pytest.raises(ValueError, match=r"--config: an EVA-CLIP tower needs vision_cfg.width"):
        import_tower(CHECKPOINT / "checkpoint.pt", tmp_path / "x", config=tmp_path / "hub" / "config.json")


def test_other_files_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1), "b": 3}, tmp_path / "mixed.pt")
    torch.save(torch.zeros(1), tmp_path / "one.pt")
    torch.save({}, tmp_path / "empty.pt")
    (tmp_path / "notes.txt").write_text("x")
    for name, message in [
        ("mixed.pt", r"values of \['b'\] are not tensors"),
        ("one.pt", "expected a dict of tensors"),
        ("empty.pt", "contains no tensors"),
        ("notes.txt", "is not a checkpoint; supported: .safetensors"),
    ]:
        with pytest.raises(ContractError, match=message):
            import_tower(tmp_path / name, tmp_path / "tower")
    with pytest.raises(ContractError, match=r"several checkpoints; choose one of empty.pt"):
        import_tower(tmp_path, tmp_path / "tower")
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        import_tower(tmp_path / "none", tmp_path / "tower")


def test_rotary_tables_of_another_architecture_are_refused(tmp_path):
    config = json.loads((CHECKPOINT / "config.json").read_text())
    config["vision_cfg"]["pt_hw_seq_len"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ContractError, match=r"freqs_cos .* differs from the table .* for grid 5, pt_hw_seq_len 16"):
        import_tower(CHECKPOINT / "checkpoint.pt", tmp_path / "tower", config=tmp_path / "config.json")


def test_adapter_structure():
    state = read(CHECKPOINT, "checkpoint.safetensors")
    assert "text.text_adaptor." in candidate_prefixes(state)
    found = match_adapter(state, "text.text_adaptor.")
    assert (found.llm_width, found.projection_dim, found.blocks, found.expansion) == (26, 24, 4, 2)
    assert match_adapter(state, "visual.blocks.") is None
    # expansion 1: both Linears are square, the order of their names decides
    square = {
        f"a.0.fn.{i}.{kind}": torch.full((4, 4) if kind == "weight" else (4,), float(i))
        for i in (0, 3)
        for kind in ("weight", "bias")
    }
    square |= {f"a.{i}.{kind}": torch.zeros(4) for i in (1,) for kind in ("weight", "bias")}
    square |= {f"a.0.ln.{kind}": torch.zeros(4) for kind in ("weight", "bias")} | {"a.2.weight": torch.zeros(3, 4)}
    found = match_adapter(square, "a.")
    assert (
        found.expansion == 1
        and found.state["blocks.0.up.weight"][0, 0] == 0
        and found.state["blocks.0.down.bias"][0] == 3
    )


def test_preprocessor_of_the_source_survives(tmp_path):
    shutil.copytree(RELEASE, tmp_path / "release")
    own = {"image_mean": [0.4, 0.5, 0.6], "resample": 2, "size": {"shortest_edge": 30}, "crop_size": 30}
    (tmp_path / "release" / "preprocessor_config.json").write_text(json.dumps(own))
    import_tower(tmp_path / "release", tmp_path / "tower")
    written = json.loads((tmp_path / "tower" / "preprocessor_config.json").read_text())
    assert written["image_mean"] == [0.4, 0.5, 0.6] and written["resample"] == 2
    assert written["size"] == {"shortest_edge": 28}


def test_text_towers_are_left_out_by_name_alone(tmp_path):
    """A tensor that belongs to nothing known is refused even beside a text tower that is left out."""
    shutil.copytree(TRANSFORMERS_TOWERS / "clip_full", tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    save_file({**state, "extra.weight": torch.zeros(2)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ContractError, match=r"1 of \d+ tensors have no place in a hub-clip model: \['extra.weight'\]"):
        import_tower(tmp_path / "model", tmp_path / "tower")


def open_clip_vision(**fields) -> dict:
    """OpenCLIP's configuration of the release's tower, ``fields`` over it."""
    return {"layers": 2, "width": 32, "head_width": 16, "patch_size": 7, "image_size": 28} | fields


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"layers": 3}, "vision_cfg.layers is 3, but the tensors have 2"),
        ({"width": 48}, "vision_cfg.width is 48, but the tensors have 32"),
        ({"patch_size": 14}, "vision_cfg.patch_size is 14, but the tensors have 7"),
        ({"image_size": 56}, "vision_cfg.image_size is 56, but the tensors have 28.*--image-size 56"),
        ({"pool_type": "avg"}, "pool_type is 'avg'"),
        ({"act_kwargs": {"approximate": "tanh"}}, "has act_kwargs {'approximate': 'tanh'}"),
        ({"norm_kwargs": {"eps": 1e-6}}, "has norm_kwargs"),
        ({"final_ln_after_pool": True}, "has final_ln_after_pool True"),
        ({"attentional_pool": True}, "has attentional_pool True"),
    ],
)
def test_an_open_clip_configuration_of_another_tower_is_refused(fields, message, tmp_path):
    save_file(open_clip_state_of_the_release(), tmp_path / "open_clip_model.safetensors")
    for name, vision in (("right", open_clip_vision(image_size=[28, 28])), ("wrong", open_clip_vision(**fields))):
        (tmp_path / f"{name}.json").write_text(json.dumps({"quick_gelu": True, "vision_cfg": vision}))
    source = tmp_path / "open_clip_model.safetensors"
    with pytest.raises(ValueError, match=message):
        import_tower(source, tmp_path / "tower", config=tmp_path / "wrong.json")
    import_tower(source, tmp_path / "tower", config=tmp_path / "right.json")


def test_a_truncated_open_clip_tower_is_refused(tmp_path):
    state = {k: v for k, v in open_clip_state_of_the_release().items() if ".resblocks.1." not in k}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": open_clip_vision()}}))
    with pytest.raises(ContractError, match=r"vision_cfg.layers is 2, but the tensors have 1"):
        import_tower(tmp_path, tmp_path / "tower")


def test_a_repository_that_holds_a_model_twice(tmp_path):
    """As OpenCLIP's and as Hugging Face's, each with its configuration: that of the tensors that are read counts."""
    shutil.copytree(RELEASE, tmp_path / "hub")
    save_file(open_clip_state_of_the_release(), tmp_path / "hub" / "open_clip_model.safetensors")
    fields = {"model_cfg": {"vision_cfg": open_clip_vision(), "quick_gelu": True}}
    (tmp_path / "hub" / "open_clip_config.json").write_text(json.dumps(fields))
    card, _ = import_tower(tmp_path / "hub", tmp_path / "tower")
    assert card.training["imported_as"] == "hub-clip"
    (tmp_path / "hub" / "model.safetensors").unlink()
    again, _ = import_tower(tmp_path / "hub", tmp_path / "again")
    assert again.training["imported_as"] == "open_clip" and again.adapter_sha256 == card.adapter_sha256
    (tmp_path / "hub" / "open_clip_config.json").unlink()  # Hugging Face's own doesn't say OpenCLIP's activation
    with pytest.raises(ValueError, match="doesn't say its activation"):
        import_tower(tmp_path / "hub", tmp_path / "other")


def test_a_timm_model_by_name(tmp_path, monkeypatch, capsys):
    pytest.importorskip("timm", minversion="1.0", reason="LLaVA's environment has timm 0.6")
    from llm2clip_plugin.vision import timm_tower

    named = timm_tower.timm_tower
    monkeypatch.setattr(timm_tower, "timm_tower", lambda name: named(name, pretrained=False))  # no Hub in tests
    argv = ["timm:vit_tiny_patch16_224", "--output", str(tmp_path / "tower"), "--image-size", "32"]
    assert command.main(argv) == 0
    assert "positions interpolated from 224 to 32 px" in capsys.readouterr().out
    card = TowerCard.read(tmp_path / "tower" / "llm2clip.json")
    assert (card.family, card.image_size, card.origin) == ("timm", 32, "timm:vit_tiny_patch16_224")
    assert load_tower(tmp_path / "tower").config.timm_name == "vit_tiny_patch16_224"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="remove --config"):
        command.main([*argv, "--overwrite", "--config", str(tmp_path / "config.json")])
