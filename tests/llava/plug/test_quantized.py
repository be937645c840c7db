"""The language model in 4 or 8 bits, as ``load_pretrained_model(load_4bit=True)`` loads it: the
tower stays as it is.

transformers 4.37 asks for a GPU before it quantises; bitsandbytes itself computes on a CPU too, so
there the question is answered with yes while LLaVA loads.
"""

from importlib.util import find_spec

import pytest
import serve_checkpoints
import torch
from llava_world import HALF_ON_CPU

from llava_integration.plug.tower import LLM2CLIPVisionTower

pytestmark = [
    pytest.mark.both_stacks,
    pytest.mark.skipif(
        find_spec("bitsandbytes") is None,
        reason="needs bitsandbytes, as LLaVA asks for it",
    ),
    HALF_ON_CPU,  # bitsandbytes of torch 2.1's time needs a GPU, too
]
KINDS = {"load_4bit": "Linear4bit", "load_8bit": "Linear8bitLt"}


@pytest.fixture
def load(checkpoint, monkeypatch):
    """LLaVA's own loading, on the CPU."""
    from llava.model.builder import load_pretrained_model

    def load(**options):
        with monkeypatch.context() as patched:
            if options:
                import bitsandbytes  # noqa: F401 - looks for a GPU when it is imported

                patched.setattr(torch.cuda, "is_available", lambda: True)
            on_cpu = {"device": "cpu", "device_map": "cpu"}
            return load_pretrained_model(
                str(checkpoint), None, checkpoint.name, **on_cpu, **options
            )

    return load


@pytest.mark.parametrize("option, kind", KINDS.items())
def test_the_tower_is_left_as_it_is(load, option, kind):
    _, whole, _, _ = load()
    tokenizer, model, _, _ = load(**{option: True})
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert (
        kinds["model.layers.0.self_attn.q_proj"]
        == kinds["model.mm_projector.0"]
        == kind
    )
    tower = model.get_vision_tower()
    assert isinstance(tower, LLM2CLIPVisionTower)
    assert tower.is_loaded
    assert kind not in {type(module).__name__ for module in tower.modules()}
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float16}
    pixels = torch.randn(
        2, 3, 28, 28, generator=torch.Generator().manual_seed(0)
    ).half()
    assert torch.equal(tower(pixels), whole.get_vision_tower()(pixels))
    for module in model.modules():
        # its CPU kernel wants a width of 64, and the tiny model has 32
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    ids = torch.tensor(
        [[tokenizer.bos_token_id, -200, *tokenizer("Which colour?").input_ids[1:]]]
    )
    output = model.generate(
        ids,
        images=pixels[:1],
        image_sizes=[(28, 28)],
        do_sample=False,
        max_new_tokens=4,
    )
    assert 1 <= output.shape[1] <= 5


QLORA = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
QLORA |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
QLORA |= {
    "bnb_4bit_compute_dtype": "bfloat16",
    "llm_int8_skip_modules": ["mm_projector"],
}


def on_a_base(kind, root, **changes):
    """A LoRA, or a pretrained projector, and its base model."""
    tower = serve_checkpoints.tower_directory("clip")
    base = serve_checkpoints.base_model(root / "vicuna")
    folder = root / f"llava-{kind}"
    named = {**changes, "mm_vision_tower": f"llm2clip:{tower}"}
    if kind != "projector":
        return serve_checkpoints.lora(folder, tower, base, **named), base
    folder.mkdir()
    config = serve_checkpoints.llava_config(str(tower), **named)
    serve_checkpoints.write_config(folder, config)
    torch.save(serve_checkpoints.projector_weights(), folder / "mm_projector.bin")
    return folder, base


def load_onto(folder, base, **options):
    """LLaVA's own loading of a checkpoint and its base model."""
    from llava.model.builder import load_pretrained_model

    words = {"device": "cpu", "device_map": "cpu", **options}
    return load_pretrained_model(str(folder), str(base), folder.name, **words)[1]


@pytest.mark.parametrize("kind", ["lora", "projector"])
def test_qlora_opens_as_a_lora_does(tmp_path, home, kind):
    """Its config.json says that the language model was quantized while it was trained; the base's
    weights are not."""
    plain = load_onto(*on_a_base(kind, tmp_path / "plain")).state_dict()
    folder, base = on_a_base(kind, tmp_path / "qlora", quantization_config=QLORA)
    opened = load_onto(folder, base).state_dict()
    assert set(opened) == set(plain)
    for name, tensor in plain.items():
        assert torch.equal(opened[name], tensor), name


@pytest.mark.parametrize("kind", ["lora", "projector"])
@pytest.mark.parametrize("option", KINDS)
def test_onto_a_quantized_base_is_refused(tmp_path, home, kind, option):
    bits = option[-4]
    with pytest.raises(
        ValueError, match=f"{option}: .* in {bits} bits; leave it out, or merge"
    ):
        load_onto(*on_a_base(kind, tmp_path), **{option: True})
