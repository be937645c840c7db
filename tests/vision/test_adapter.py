"""The text adapter against the reference's TextProj."""

import pytest
import torch

from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import TextAdapter

from .conftest import REFERENCE, golden_config, largest_difference, read

# Rows of tiny variance after L2 normalisation amplify rounding; the goldens' float64 run differs by
# 2.8e-5.
TOLERANCE = 1e-4
NAMES = {"ln.": "norm.", "fn.0.": "up.", "fn.3.": "down."}


def adapter_of(width: int, projection_dim: int, **options) -> TextAdapter:
    return TextAdapter(
        DualConfig(llm_width=width, projection_dim=projection_dim, **options)
    )


def golden_adapter(folder, **options) -> TextAdapter:
    config = golden_config(folder)
    adapter = adapter_of(config["llm_embedding_dim"], config["output_dim"], **options)
    state = {}
    for key, value in read(folder, "weights.safetensors").items():
        index, rest = key.removeprefix("text.text_adaptor.").split(".", 1)
        if index == "4":
            state["norm." + rest] = value
        elif index == "5":
            state["projection." + rest] = value
        else:
            for old, new in NAMES.items():
                rest = rest.replace(old, new)
            state[f"blocks.{index}.{rest}"] = value
    adapter.load_state_dict(state)
    return adapter.eval()


@pytest.mark.parametrize("name", ["adapter_a", "adapter_b"])
@pytest.mark.parametrize("path, normalise", [("l2", True), ("raw", False)])
def test_equals_the_reference(name, path, normalise):
    folder = REFERENCE / "B_text_adapter" / name
    golden = read(folder)
    adapter = golden_adapter(folder, normalize_input=normalise)
    states = {}
    for i, block in enumerate(adapter.blocks):
        block.register_forward_hook(
            lambda _, __, output, i=i: states.update({f"block_{i}": output})
        )
    adapter.norm.register_forward_hook(
        lambda _, __, output: states.update(after_norm=output)
    )
    with torch.no_grad():
        states["after_projection"] = adapter(golden["input"])
    states["embedding_normalized"] = torch.nn.functional.normalize(
        states["after_projection"], dim=-1
    )
    assert {f"{path}.{key}" for key in states} | {f"{path}.adapter_input"} == {
        k for k in golden if k.startswith(path)
    }
    for key, state in states.items():
        assert largest_difference(state, golden[f"{path}.{key}"]) < TOLERANCE, key


def test_input_scale_and_noise():
    torch.manual_seed(1)
    x = torch.randn(5, 16)
    unit = adapter_of(16, 16, adapter="none")
    assert torch.allclose(unit(x).norm(dim=-1), torch.ones(5))
    scaled = adapter_of(
        16, 16, adapter="none", input_scale="sqrt_width", input_noise=0.5
    )
    assert torch.allclose(scaled.eval()(x), 4 * unit(x))
    torch.manual_seed(3)
    first = scaled.train()(x)
    torch.manual_seed(3)
    assert torch.equal(first, scaled(x))  # the generator's state decides the noise
    noise = torch.randn(5, 16)
    assert torch.allclose(scaled(x, noise), 4 * unit(x) + 0.5 * noise)
    assert torch.equal(scaled.eval()(x, noise), scaled(x))


def test_kinds():
    linear = [name for name, _ in adapter_of(8, 6, adapter="linear").named_parameters()]
    assert linear == [
        "norm.weight",
        "norm.bias",
        "projection.weight",
        "projection.bias",
    ]
    assert not list(adapter_of(8, 8, adapter="none").parameters())
    with pytest.raises(
        ValueError, match="embeddings have width 9, but the text adapter expects 8"
    ):
        adapter_of(8, 6)(torch.zeros(1, 9))


def test_half_precision_parameters_take_float32_embeddings():
    adapter = adapter_of(16, 8).to(torch.bfloat16)
    assert adapter(torch.randn(3, 16)).dtype == torch.bfloat16
