"""EVA-CLIP's layout: the reference's checkpoints, every combination of its switches, other packings, timm's names.

The reference of the switches is plain arithmetic on the checkpoint's own tensors, independent of the package.
"""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from llm2clip_plugin import load_dual_encoder, load_tower
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.vision.convert import importing as command
from llm2clip_plugin.vision.convert.formats import convert
from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.convert.layouts.eva_clip import config_from_tensors, eva_state
from llm2clip_plugin.vision.eva02 import Eva02Config, Eva02VisionModel

from ..conftest import REFERENCE, golden_config, largest_difference, read
from .checkpoints import CHECKPOINT, EVA_FILES, LOGITS, TOLERANCE

TOWERS = REFERENCE / "A_vision_towers"


@pytest.mark.parametrize("file", EVA_FILES)
def test_complete_eva02_checkpoint(file, tmp_path, capsys):
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


def test_rotary_tables_of_another_architecture_are_refused(tmp_path):
    config = json.loads((CHECKPOINT / "config.json").read_text())
    config["vision_cfg"]["pt_hw_seq_len"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ContractError, match=r"freqs_cos .* differs from the table .* for grid 5, pt_hw_seq_len 16"):
        import_tower(CHECKPOINT / "checkpoint.pt", tmp_path / "tower", config=tmp_path / "config.json")


@pytest.mark.parametrize("name", ["eva02_b16", "eva02_l14", "eva02_l14_336"])
def test_rotary_tables_tell_the_architecture(name):
    """With tables in the checkpoint not even a tiny tower needs a config.json."""
    found = config_from_tensors(read(TOWERS / name, "weights.safetensors"))
    vision = golden_config(TOWERS / name)["vision_cfg"]
    assert found.rope_pretrained_grid == vision["pt_hw_seq_len"]
    assert found.hidden_size // found.num_attention_heads == vision["head_width"]
    assert (found.image_size, found.patch_size) == (vision["image_size"], vision["patch_size"])


def test_released_sizes_are_read_off_the_tensors(tmp_path):
    """One block of EVA02-CLIP-B/16 in its real width, without rotary tables: nothing has to be told."""
    config = Eva02Config(
        hidden_size=768,
        num_hidden_layers=1,
        num_attention_heads=12,
        intermediate_size=2048,
        image_size=224,
        patch_size=16,
    )
    tower = Eva02VisionModel(config).eval()
    state = {
        key: value
        for key, value in eva_state(tower.state_dict(), config).items()
        if ".rope." not in key and "visual.rope" not in key
    }
    state |= {"visual.head.weight": torch.randn(8, 768), "visual.head.bias": torch.zeros(8)}
    save_file({key: value.half().contiguous() for key, value in state.items()}, tmp_path / "eva.safetensors")
    import_tower(tmp_path / "eva.safetensors", tmp_path / "tower")
    again = load_tower(tmp_path / "tower")
    for field in ("num_attention_heads", "intermediate_size", "image_size", "rope_pretrained_grid", "rope"):
        assert getattr(again.config, field) == getattr(config, field)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert largest_difference(again.blocks[0].mlp.up_proj.weight, tower.blocks[0].mlp.up_proj.weight) < 1e-4


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


def test_eva02_under_timms_names(tmp_path):
    timm = pytest.importorskip("timm", minversion="1.0")
    folder = REFERENCE / "A_vision_towers" / "eva02_l14"
    golden, config = read(folder), json.loads((folder / "config.json").read_text())["vision_cfg"]
    trunk = timm.models.eva.Eva(
        img_size=28,
        patch_size=7,
        embed_dim=40,
        depth=3,
        num_heads=2,
        mlp_ratio=2.6667,
        qkv_fused=False,
        swiglu_mlp=True,
        scale_mlp=True,
        scale_attn_inner=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(4, 4),
        num_classes=20,
        global_pool="token",
    )
    weights = timm.models.eva.checkpoint_filter_fn(
        {k: v for k, v in read(folder, "weights.safetensors").items() if "rope" not in k}, trunk
    )
    trunk.load_state_dict(weights, strict=False)
    state = {f"visual.trunk.{key}": value for key, value in trunk.state_dict().items() if "k_bias" not in key}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "timm.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vision_cfg": config}))
    import_tower(tmp_path / "timm.safetensors", tmp_path / "tower", config=tmp_path / "config.json")
    with torch.no_grad():
        embedding = load_dual_encoder(tmp_path / "tower").encode_image(golden["pixels"])
    assert largest_difference(embedding, golden["embedding_normalized"]) < TOLERANCE


def test_big_e_under_timms_names(tmp_path):
    """timm keeps EVA-CLIP's names where q, k, v are fused; on the hub its config.json names a timm model."""
    folder = REFERENCE / "A_vision_towers" / "eva02_bige14"
    golden, state = read(folder), read(folder, "weights.safetensors")
    trunk = {key.replace("visual.", "visual.trunk.", 1): value for key, value in state.items()}
    save_file(trunk, tmp_path / "timm.safetensors")
    import_tower(tmp_path / "timm.safetensors", tmp_path / "tower", config=folder / "config.json")
    with torch.no_grad():
        embedding = load_dual_encoder(tmp_path / "tower").encode_image(golden["pixels"])
    assert largest_difference(embedding, golden["embedding_normalized"]) < TOLERANCE
    (tmp_path / "hub").mkdir()
    save_file(
        read(REFERENCE / "C_checkpoint", "checkpoint.safetensors"), tmp_path / "hub" / "open_clip_model.safetensors"
    )
    fields = {"model_cfg": {"embed_dim": 24, "vision_cfg": {"timm_model_name": "eva02_large_patch14_clip_336"}}}
    (tmp_path / "hub" / "open_clip_config.json").write_text(json.dumps(fields))
    assert import_tower(tmp_path / "hub", tmp_path / "other")[0].family == "eva02"
