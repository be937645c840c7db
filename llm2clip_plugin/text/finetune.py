"""What stage 1 trains: an LLM's LoRA adapter, new or an earlier one, in the module of the step."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from llm2clip_plugin.text.adapter import add_lora, autocast_adapter, merge_adapters
from llm2clip_plugin.text.config import ContrastConfig, EncoderConfig, LoraSettings
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.pair_module import PairModule
from llm2clip_plugin.train.config import TrainConfig
from llm2clip_plugin.train.model import enable_gradient_checkpointing
from llm2clip_plugin.train.optim import Trained, is_vector
from llm2clip_plugin.vision.directory import fetch_directory

HIDDEN_SIZE = 1024  # for ZeRO-3's "auto" buckets: the adapter's gradients are small


def refuse_contradictions(
    encoder: EncoderConfig,
    lora: LoraSettings,
    train: TrainConfig,
    start_adapters: Sequence[str],
    *,
    zero_stage: int,
) -> None:
    """Raise ValueError for settings that exclude each other."""
    if encoder.load_in_4bit and zero_stage == 3:
        raise ValueError(
            "ZeRO-3 cannot partition 4-bit weights; "
            "use scripts/zero2.json, or remove --load-in-4bit"
        )
    if train.torch_compile and encoder.load_in_4bit and train.gradient_checkpointing:
        raise ValueError(
            "--torch-compile cannot trace --load-in-4bit with --gradient-checkpointing; "
            "omit one of them"
        )
    if not train.has_steps:
        raise ValueError("num_train_epochs and max_steps are both 0: nothing to train")
    if start_adapters and (encoder.adapter or encoder.load_in_4bit or lora.dora):
        raise ValueError(
            "start_adapters exclude --adapter, --load-in-4bit and --lora-dora"
        )
    if train.precision != "fp32" and encoder.compute_dtype == "float32":
        problem = (
            f"train.precision {train.precision} would convert the LLM's float32 weights"
        )
        raise ValueError(
            f"{problem}; leave precision (the adapter's) at fp32, and set --compute-dtype"
        )


def trained_module(
    encoder: CaptionEncoder,
    lora: LoraSettings,
    contrast: ContrastConfig,
    train: TrainConfig,
    *,
    start_adapters: Sequence[str] = (),
) -> PairModule:
    """The encoder's LLM with an adapter, which alone trains: that of the encoder, or a new one over
    the ``start_adapters``, which are merged."""
    if not encoder.config.adapter:
        starts = [*map(fetch_directory, start_adapters)]
        llm = merge_adapters(encoder.model.llm, starts)  # type: ignore[arg-type]
        torch.manual_seed(train.seed)
        encoder.model.llm = add_lora(llm, lora, base=encoder.config.llm)
    if train.precision == "fp32":  # otherwise DeepSpeed converts the adapter
        encoder.model.autocast = autocast_adapter(encoder.model.llm, encoder.dtype)
    if train.gradient_checkpointing:
        enable_gradient_checkpointing(encoder.model.llm)
    return PairModule(encoder.model, contrast).train()


def trained_parameters(module: nn.Module, lr: float) -> list[Trained]:
    """Every parameter that trains, all at the same learning rate; vectors don't decay."""
    trained: list[Trained] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decay = not is_vector(parameter)
            trained.append(Trained(name=name, parameter=parameter, lr=lr, decay=decay))
    return trained


def load_trained(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's weights into what trains."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(weights[name])
