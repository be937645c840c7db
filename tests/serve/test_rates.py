"""Learning rates of tower, projector and LLM in transformers' Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from llava_integration.serve.rates import with_rates

SIZE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
IMAGE = 3  # the token of an image, which has (8 / 4)^2 patches
ROW = torch.tensor([IMAGE] * 4 + [5, 6, 7])
RATE = 1e-3
RATES = {"vision_tower": 1e-5, "multi_modal_projector": 1e-4}


def tiny_llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**SIZE, image_size=8, patch_size=4)
    llm = LlamaConfig(**SIZE, vocab_size=16, tie_word_embeddings=False)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=llm,
            image_token_id=IMAGE,
            vision_feature_layer=-1,
        )
    )


def collate(rows: list[Any]) -> dict[str, Tensor]:
    """Each row a seed of its picture."""
    generator = torch.Generator().manual_seed(int(rows[0]))
    ids = ROW.expand(len(rows), -1)
    pixels = torch.randn(len(rows), 3, 8, 8, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels, "labels": ids}


def trainer(
    folder: Path, model: LlavaForConditionalGeneration, **rates: float
) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        learning_rate=RATE,
        weight_decay=0.1,
        max_steps=2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=2,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        max_grad_norm=0.0,
        logging_steps=1,
    )
    made: Trainer = with_rates(Trainer, **rates)(
        model, arguments, train_dataset=list(range(4)), data_collator=collate
    )
    return made


def module(name: str) -> str:
    """Of transformers' LLaVA; lm_head and the language model have no rate of their own here."""
    return next((part for part in RATES if part in name), "")


def test_each_module_moves_at_its_rate(tmp_path: Path) -> None:
    """Adam's first step moves a weight by its learning rate, as its eps is small; biases, norms and
    embeddings keep their weight decay of 0."""
    model = tiny_llava()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = trainer(tmp_path, model, **RATES)
    trained.args.weight_decay = 0.0
    trained.args.max_steps = 1
    trained.train()
    largest: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        step = float((parameter.detach() - before[name]).abs().max())
        largest[module(name)] = max(largest.get(module(name), 0.0), step)
    expected = {**RATES, "": RATE}
    assert largest == {
        name: pytest.approx(expected[name], rel=0.05) for name in largest
    }
    assert set(largest) == set(expected)
    # what trainers log is the settings' rate
    assert trained.state.log_history[0]["learning_rate"] == RATE


def test_groups_keep_their_weight_decay_and_hold_every_parameter_once(
    tmp_path: Path,
) -> None:
    model = tiny_llava()
    plain = trainer(tmp_path, model).create_optimizer()
    decay = {}
    for group in plain.param_groups:
        decay.update(dict.fromkeys(group["params"], group["weight_decay"]))
    seen = []
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in trainer(tmp_path, model, **RATES).create_optimizer().param_groups:
        for parameter in group["params"]:
            seen.append(parameter)
            rate = RATES.get(module(names[parameter]), RATE)
            assert group["lr"] == rate
            assert group["weight_decay"] == decay[parameter]
    assert len(seen) == len(set(seen)) == len(decay)


@pytest.mark.parametrize("own", [{}, {"lm_head": 3e-5}])
def test_the_output_layer_has_the_rate_of_its_llm(
    tmp_path: Path, own: dict[str, float]
) -> None:
    model = tiny_llava()
    rates = {"language_model": 1e-6, **own}
    optimizer = trainer(tmp_path, model, **rates).create_optimizer()
    rate_of = {}
    for group in optimizer.param_groups:
        rate_of.update(dict.fromkeys(group["params"], group["lr"]))
    assert rate_of[model.lm_head.weight] == own.get("lm_head", 1e-6)
    layer = model.model.language_model.layers[0]
    assert rate_of[layer.mlp.up_proj.weight] == 1e-6
    assert rate_of[model.model.multi_modal_projector.linear_1.weight] == RATE


def test_a_rate_without_a_trained_parameter_is_refused(tmp_path: Path) -> None:
    model = tiny_llava()
    model.model.vision_tower.requires_grad_(False)
    with pytest.raises(
        ValueError, match="learning rate for vision_tower, which has no"
    ):
        trainer(tmp_path, model, **RATES).train()


def test_a_rate_of_an_unknown_module_is_refused_before_training(tmp_path: Path) -> None:
    message = (
        "learning rate for vision_towr, which the model does not have; its modules: .*"
        "language_model, .*multi_modal_projector, vision_tower"
    )
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, tiny_llava(), vision_towr=1e-4)


@pytest.mark.parametrize("rate", ["1e-6", -1, True, None, float("nan"), float("inf")])
def test_a_rate_that_is_no_number_is_refused(rate: Any) -> None:
    with pytest.raises(
        ValueError, match=r"learning rate for vision_tower is .*expected"
    ):
        with_rates(Trainer, vision_tower=rate)


def test_the_innermost_module_with_a_rate_counts(tmp_path: Path) -> None:
    """In whichever order the rates are given."""
    inner = {"embeddings": 1e-6}
    for rates in ({**RATES, **inner}, {**inner, **RATES}):
        model = tiny_llava()
        optimizer = trainer(tmp_path, model, **rates).create_optimizer()
        rate_of = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                rate_of[parameter] = group["lr"]
        for name, parameter in model.named_parameters():
            if "embeddings" in name:
                assert rate_of[parameter] == 1e-6
            elif "vision_tower" in name:
                assert rate_of[parameter] == RATES["vision_tower"]


def test_a_scheduler_of_ones_own_is_refused(tmp_path: Path) -> None:
    """It has the groups of an optimizer that is not split; an optimizer alone is split."""
    model = tiny_llava()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    split_trainer = with_rates(Trainer, **RATES)
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"given a scheduler .*\(OPTIMIZER, None\)"):
        split_trainer(model, arguments, optimizers=(optimizer, constant))
    made = split_trainer(model, arguments, optimizers=(optimizer, None))
    assert len(made.create_optimizer().param_groups) == 3
