"""Checkpoints beyond the goldens: all combinations of EVA-CLIP's switches, other packings, other nestings.

The reference here is a few lines of plain arithmetic over the checkpoint's own tensors, apart from the package's code.
"""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from llm2clip_plugin import load_dual_encoder, load_tower
from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.vision.convert.exporting import convert
from llm2clip_plugin.vision.convert.importing import import_tower

from .conftest import REFERENCE, TRANSFORMERS_TOWERS, largest_difference, read

WIDTH, HEADS, HEAD, PATCH, GRID, JOINT, DEPTH = 24, 3, 8, 4, 3, 10, 2
HIDDEN = int(WIDTH * 2.6667)
SWITCHES = ("rope", "subln", "swiglu", "postnorm", "scale", "bias")


def eva_checkpoint(*, pretrained_grid: int = 5, **on: bool) -> tuple[dict, dict]:
    """Random tensors under EVA-CLIP's names, and the config.json that goes with them."""
    state = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + GRID**2, WIDTH), "norm.weight": (WIDTH,)}
    state |= {"norm.bias": (WIDTH,), "head.weight": (JOINT, WIDTH), "head.bias": (JOINT,)}
    state |= {"patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,)}
    for i in range(DEPTH):
        shapes = {f"norm{n}.{kind}": (WIDTH,) for n in (1, 2) for kind in ("weight", "bias")}
        shapes |= {"attn.proj.weight": (WIDTH, WIDTH), "attn.proj.bias": (WIDTH,)}
        if on["subln"]:
            shapes |= {f"attn.{part}_proj.weight": (WIDTH, WIDTH) for part in "qkv"}
            shapes |= {f"attn.inner_attn_ln.{kind}": (WIDTH,) for kind in ("weight", "bias")}
            shapes |= {f"mlp.ffn_ln.{kind}": (HIDDEN,) for kind in ("weight", "bias")}
        else:
            shapes["attn.qkv.weight"] = (3 * WIDTH, WIDTH)
        if on["bias"]:
            shapes |= {"attn.q_bias": (WIDTH,), "attn.v_bias": (WIDTH,)}
        if on["scale"]:
            shapes |= {"gamma_1": (WIDTH,), "gamma_2": (WIDTH,)}
        up, down = (("w1", "w2"), "w3") if on["swiglu"] else (("fc1",), "fc2")
        for name in up:
            shapes |= {f"mlp.{name}.weight": (HIDDEN, WIDTH), f"mlp.{name}.bias": (HIDDEN,)}
        shapes |= {f"mlp.{down}.weight": (WIDTH, HIDDEN), f"mlp.{down}.bias": (WIDTH,)}
        state |= {f"blocks.{i}.{name}": shape for name, shape in shapes.items()}
    tensors = {f"visual.{name}": torch.randn(shape) * 0.3 + 0.5 * (len(shape) == 1) for name, shape in state.items()}
    vision = {"image_size": PATCH * GRID, "layers": DEPTH, "width": WIDTH, "head_width": HEAD, "mlp_ratio": 2.6667}
    vision |= {"patch_size": PATCH, "qkv_bias": on["bias"], "rope": on["rope"], "pt_hw_seq_len": pretrained_grid}
    vision |= {"intp_freq": True, "naiveswiglu": on["swiglu"], "subln": on["subln"], "postnorm": on["postnorm"]}
    vision["ls_init_value"] = 0.1 if on["scale"] else None
    return tensors, {"embed_dim": JOINT, "vision_cfg": vision}


def eva_states(state: dict, pixels: torch.Tensor, *, pretrained_grid: int = 5, **on: bool) -> list[torch.Tensor]:
    """Input of the first block, output of each, and the embedding, by loops over patches and heads."""
    s = {name.removeprefix("visual."): value for name, value in state.items()}

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], 1e-6)

    def turned(x):  # (B, T, HEAD) of one head
        out = x.clone()
        for row, column in itertools.product(range(GRID), range(GRID)):
            for pair in range(HEAD // 2):
                place = row if pair < HEAD // 4 else column
                angle = place * pretrained_grid / GRID / 10000 ** ((pair % (HEAD // 4)) * 4 / HEAD)
                cos, sin = torch.tensor(angle).cos(), torch.tensor(angle).sin()
                a, b = x[:, 1 + row * GRID + column, 2 * pair], x[:, 1 + row * GRID + column, 2 * pair + 1]
                out[:, 1 + row * GRID + column, 2 * pair] = a * cos - b * sin
                out[:, 1 + row * GRID + column, 2 * pair + 1] = b * cos + a * sin
        return out

    def attention(x, at):
        weights = [s[f"{at}{p}_proj.weight"] for p in "qkv"] if on["subln"] else s[f"{at}qkv.weight"].chunk(3)
        zero = torch.zeros(WIDTH)
        biases = (s[f"{at}q_bias"], zero, s[f"{at}v_bias"]) if on["bias"] else (zero, zero, zero)
        q, k, v = (x @ w.T + b for w, b in zip(weights, biases, strict=True))
        heads = []
        for n in range(HEADS):
            part = slice(n * HEAD, (n + 1) * HEAD)
            qn, kn = (turned(y[..., part]) if on["rope"] else y[..., part] for y in (q, k))
            heads.append((qn @ kn.mT / HEAD**0.5).softmax(-1) @ v[..., part])
        mixed = torch.cat(heads, -1)
        mixed = norm(mixed, f"{at}inner_attn_ln") if on["subln"] else mixed
        return mixed @ s[f"{at}proj.weight"].T + s[f"{at}proj.bias"]

    def mlp(x, at):
        def linear(y, name):
            return y @ s[f"{at}{name}.weight"].T + s[f"{at}{name}.bias"]

        hidden = F.silu(linear(x, "w1")) * linear(x, "w2") if on["swiglu"] else F.gelu(linear(x, "fc1"))
        hidden = norm(hidden, f"{at}ffn_ln") if on["subln"] else hidden
        return linear(hidden, "w3" if on["swiglu"] else "fc2")

    x = F.conv2d(pixels, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=PATCH).flatten(2).mT
    x = torch.cat((s["cls_token"].expand(len(x), -1, -1), x), 1) + s["pos_embed"]
    states = [x]
    for i in range(DEPTH):
        for n, branch, at in ((1, attention, "attn."), (2, mlp, "mlp.")):
            place = f"blocks.{i}.norm{n}"
            y = branch(x, f"blocks.{i}.{at}") if on["postnorm"] else branch(norm(x, place), f"blocks.{i}.{at}")
            y = norm(y, place) if on["postnorm"] else y
            x = x + (s[f"blocks.{i}.gamma_{n}"] * y if on["scale"] else y)
        states.append(x)
    return [*states, norm(x, "norm")[:, 0] @ s["head.weight"].T + s["head.bias"]]


COMBINATIONS = [
    dict(zip(SWITCHES, bits, strict=True)) for bits in itertools.product((False, True), repeat=len(SWITCHES))
]


def written(tmp_path, state, config, name="eva"):
    save_file({k: v.contiguous().clone() for k, v in state.items()}, tmp_path / f"{name}.safetensors")
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    return tmp_path / f"{name}.safetensors", tmp_path / f"{name}.json"


@pytest.mark.parametrize("on", COMBINATIONS, ids=lambda on: "-".join(k for k, v in on.items() if v) or "none")
def test_every_combination_of_eva_clips_switches(on, tmp_path):
    state, config = eva_checkpoint(**on)
    file, fields = written(tmp_path, state, config)
    import_tower(file, tmp_path / "tower", config=fields)
    pixels = torch.randn(2, 3, PATCH * GRID, PATCH * GRID)
    expected = eva_states(state, pixels, **on)
    with torch.no_grad():
        found = load_tower(tmp_path / "tower")(pixel_values=pixels, output_hidden_states=True).hidden_states
        embedding = load_dual_encoder(tmp_path / "tower").encode_image(pixels)
    scale = max(1.0, *(x.abs().max().item() for x in expected))
    for mine, theirs in zip((*found, embedding), (*expected[:-1], F.normalize(expected[-1], dim=-1)), strict=True):
        assert largest_difference(mine, theirs) < 2e-5 * scale
    convert(tmp_path / "tower", tmp_path / "out", "openclip")  # and back: compared there


ALL_ON = dict.fromkeys(SWITCHES, True) | {"postnorm": False, "scale": False}


def repacked(state: dict, how: str) -> dict:
    """The same tower as other writers pack it."""
    out = dict(state)
    for i in range(DEPTH):
        at = f"visual.blocks.{i}."
        if how == "w12":
            for kind in ("weight", "bias"):
                out[f"{at}mlp.w12.{kind}"] = torch.cat([out.pop(f"{at}mlp.w{n}.{kind}") for n in (1, 2)])
        elif how == "fused qkv":
            out[f"{at}attn.qkv.weight"] = torch.cat([out.pop(f"{at}attn.{p}_proj.weight") for p in "qkv"])
        elif how == "fused bias":
            parts = (out.pop(f"{at}attn.q_bias"), torch.zeros(WIDTH), out.pop(f"{at}attn.v_bias"))
            out[f"{at}attn.qkv.weight"] = torch.cat([out.pop(f"{at}attn.{p}_proj.weight") for p in "qkv"])
            out[f"{at}attn.qkv.bias"] = torch.cat(parts)
        elif how == "zero k bias":
            out[f"{at}attn.k_bias"] = torch.zeros(WIDTH)
        else:
            out[f"{at}attn.q_proj.bias"] = out.pop(f"{at}attn.q_bias")
            out[f"{at}attn.v_proj.bias"] = out.pop(f"{at}attn.v_bias")
    return out


@pytest.mark.parametrize("how", ["w12", "fused qkv", "fused bias", "zero k bias", "split bias"])
def test_other_packings_give_the_same_tower(how, tmp_path):
    state, config = eva_checkpoint(**ALL_ON)
    file, fields = written(tmp_path, state, config, "one")
    one, _ = import_tower(file, tmp_path / "a", config=fields)
    file, fields = written(tmp_path, repacked(state, how), config, "two")
    two, _ = import_tower(file, tmp_path / "b", config=fields)
    assert (one.weights_sha256, one.adapter_sha256) == (two.weights_sha256, two.adapter_sha256)


def test_a_bias_of_the_keys_is_refused(tmp_path):
    state, config = eva_checkpoint(**ALL_ON)
    state["visual.blocks.1.attn.k_bias"] = torch.ones(WIDTH)
    file, fields = written(tmp_path, state, config)
    with pytest.raises(ContractError, match=r"blocks.1.attn.k_bias is a nonzero key bias"):
        import_tower(file, tmp_path / "tower", config=fields)


RELEASE = REFERENCE / "F_release_directory"
OURS = "text_adapter.adaptor."


def nested(how: str) -> dict:
    """The CLIP-style release with its tensors under other names."""
    state = read(RELEASE, "model.safetensors")
    blocks = {"ln.": "norm.", "fn.0.": "mlp.fc1.", "fn.3.": "mlp.fc2."}
    ends = {"4.": "final_norm.", "5.": "proj."}
    out = {}
    for name, value in state.items():
        rest = name.removeprefix(OURS)
        if rest == name:
            out[f"model.{name}" if how == "all under model." else name] = value
            continue
        if how == "ends beside the blocks":
            for old, new in ends.items():
                rest = rest.replace(old, new, 1) if rest.startswith(old) else rest
            rest = rest if rest.startswith(tuple(ends.values())) else f"layers.{rest}"
            out[f"text_adapter.{rest}"] = value
        elif how == "other names in a block":
            for old, new in blocks.items():
                rest = rest.replace(old, new, 1)
            out[f"text_projection.net.{rest}"] = value
        elif how == "deeper":
            out[f"text_adapter.text_proj.adaptor.{rest}"] = value
        else:
            out[f"model.{name}"] = value
    return out


@pytest.mark.parametrize("how", ["ends beside the blocks", "other names in a block", "deeper", "all under model."])
def test_other_nestings_of_a_release_give_the_same_tower(how, tmp_path):
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "config.json").write_bytes((RELEASE / "config.json").read_bytes())
    save_file(nested(how), tmp_path / "release" / "model.safetensors")
    one, _ = import_tower(RELEASE, tmp_path / "one")
    two, _ = import_tower(tmp_path / "release", tmp_path / "two")
    assert (one.weights_sha256, one.adapter_sha256) == (two.weights_sha256, two.adapter_sha256)


@pytest.mark.parametrize("wrapper", ["plain", "state_dict", "model", "module prefix", "state_dict, module prefix"])
def test_wrappers_of_a_training_checkpoint(wrapper, tmp_path):
    state = read(REFERENCE / "C_checkpoint", "checkpoint.safetensors")
    if "module prefix" in wrapper:
        state = {f"module.{name}": value for name, value in state.items()}
    key = wrapper.split(",")[0]
    whole = {key: state, "epoch": 3, "name": "run"} if key in ("state_dict", "model") else state
    torch.save(whole, tmp_path / "epoch_3.pt")
    one, _ = import_tower(tmp_path / "epoch_3.pt", tmp_path / "one")
    two, _ = import_tower(REFERENCE / "C_checkpoint" / "checkpoint.safetensors", tmp_path / "two")
    assert (one.weights_sha256, one.adapter_sha256) == (two.weights_sha256, two.adapter_sha256)


@pytest.mark.parametrize("name", ["clip_vision", "siglip_vision", "dinov2"])
def test_towers_in_shards(name, tmp_path):
    source = TRANSFORMERS_TOWERS / name
    state = list(read(source, "model.safetensors").items())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((source / "config.json").read_bytes())
    files = {f"model-0000{i + 1}-of-00003.safetensors": dict(state[i::3]) for i in range(3)}
    for file, part in files.items():
        save_file(part, tmp_path / "model" / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, part in files.items() for key in part}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    one, _ = import_tower(tmp_path / "model", tmp_path / "one")
    assert one.weights_sha256 == import_tower(source, tmp_path / "two")[0].weights_sha256
    last = sorted(files)[-1]
    (tmp_path / "model" / last).unlink()
    with pytest.raises(FileNotFoundError, match=last):
        import_tower(tmp_path / "model", tmp_path / "three")
