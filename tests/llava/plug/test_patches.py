"""What single patches write and change, on made-up configurations and tensors."""

import json
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers.trainer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer_pt_utils import get_parameter_names

from llava_integration.plug.compat import patches
from llava_integration.plug.compat.runner import installed_version
from llm2clip_plugin.installation import numbers

pytestmark = pytest.mark.both_stacks
TODAY = numbers(installed_version("transformers")) >= (5,)
of_today = pytest.mark.skipif(not TODAY, reason="LLaVA's own libraries are not patched")
TOWER = "model.vision_tower.vision_tower."


def tiny_llama() -> LlamaForCausalLM:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))


def written_config(**settings: object) -> dict:
    """What a configuration of transformers 5 with these settings is saved as."""

    class Config:
        def to_json_string(self) -> str:
            return json.dumps(settings)

    class Model:
        def save_pretrained(self) -> None: ...

    patches.complete_saving(Model, Config)
    return json.loads(Config().to_json_string())


def test_a_config_is_saved_with_the_names_of_transformers_4():
    plain = written_config(
        dtype="bfloat16", rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    assert (plain["torch_dtype"], plain["rope_theta"], plain["rope_scaling"]) == (
        "bfloat16",
        5e5,
        None,
    )
    scaled = written_config(
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    )
    assert (scaled["rope_theta"], scaled["rope_scaling"]) == (
        1e4,
        {"type": "linear", "factor": 2.0},
    )


def test_only_towers_of_clip_and_siglip_get_vision_model_in_their_names():
    clip = dict.fromkeys(
        (
            f"{TOWER}embeddings.class_embedding",
            f"{TOWER}encoder.layers.0.mlp.fc1.weight",
        )
    )
    renamed = {name.replace(TOWER, f"{TOWER}vision_model.") for name in clip}
    assert set(patches.names_of_4({**clip, "lm_head.weight": None})) == {
        *renamed,
        "lm_head.weight",
    }
    dinov2 = dict.fromkeys(
        (f"{TOWER}embeddings.cls_token", f"{TOWER}encoder.layer.0.mlp.fc1.weight")
    )
    assert patches.names_of_4(dinov2) == dinov2


@of_today
def test_weights_are_trained_in_float32_and_quantized_ones_computed_in_float16():
    assert patches.options_of_5({"torch_dtype": None}) == {"dtype": torch.float32}
    assert patches.options_of_5({"torch_dtype": torch.bfloat16}) == {
        "dtype": torch.bfloat16
    }
    assert patches.options_of_5({}) == {}
    in_8_bit = patches.options_of_5({"load_in_8bit": True, "load_in_4bit": False})
    assert in_8_bit["dtype"] == torch.float16
    assert in_8_bit["quantization_config"].load_in_8bit


def test_samples_are_drawn_by_torchs_sampler():
    class Base:
        def create_accelerator_and_postprocess(self) -> None: ...

    class Trainer(Base):
        args = SimpleNamespace(
            accelerator_config=SimpleNamespace(use_seedable_sampler=True)
        )

        def _get_train_sampler(self): ...

        def _save_checkpoint(self, model, trial): ...

    patches.trainer_methods(SimpleNamespace(LLaVATrainer=Trainer))
    Trainer().create_accelerator_and_postprocess()
    assert not Trainer.args.accelerator_config.use_seedable_sampler


def test_an_adapters_settings_are_dropped_only_at_their_defaults(tmp_path):
    file = tmp_path / "adapter_config.json"
    settings = {
        "r": 8,
        "lora_alpha": 16,
        "use_new": False,
        "new_scale": 2.0,
        "unheard_of": 1,
    }
    file.write_text(json.dumps(settings))
    patches.drop_defaults(
        file, {"r": 8, "lora_alpha": 8, "use_new": False, "new_scale": 1.0}
    )
    # peft 0.10 has to refuse the one that changes the sum
    assert json.loads(file.read_text()) == {"r": 8, "lora_alpha": 16, "new_scale": 2.0}


@of_today
def test_norms_have_no_weight_decay(monkeypatch):
    # as it was, at the end
    monkeypatch.setattr(transformers.trainer, "ALL_LAYERNORM_LAYERS", [], raising=False)
    del transformers.trainer.ALL_LAYERNORM_LAYERS
    patches.trainer_imports(None)
    layers = transformers.trainer.ALL_LAYERNORM_LAYERS
    decayed = get_parameter_names(
        nn.ModuleList([tiny_llama(), nn.LayerNorm(2)]), layers
    )
    assert decayed
    assert not [name for name in decayed if "norm" in name or name.startswith("1.")]


@of_today
def test_lora_has_the_dtype_of_its_model(monkeypatch):
    # which is then put back
    monkeypatch.setattr(peft, "get_peft_model", peft.get_peft_model)
    patches.lora_dtype(None)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    wrapped = peft.get_peft_model(tiny_llama().to(torch.bfloat16), config)
    dtypes = {
        parameter.dtype
        for name, parameter in wrapped.named_parameters()
        if "lora_" in name
    }
    assert dtypes == {torch.bfloat16}
