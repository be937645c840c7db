"""The adapter of a run of stage 1, with its card."""

from pathlib import Path

from torch import Tensor

from llm2clip_plugin.contracts import EncoderCard
from llm2clip_plugin.data.remote import public_name
from llm2clip_plugin.stages.llm_config import FinetuneConfig
from llm2clip_plugin.text.adapter import save_adapter
from llm2clip_plugin.text.config import CARD_SETTINGS
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.train.checkpoint import TrainState, load, verify
from llm2clip_plugin.vision.directory import fetch_directory
from llm2clip_plugin.vision.export import library_versions

ADAPTER = "adapter"  # folder in a run's


def export_adapter(
    checkpoint: Path,
    folder: Path,
    encoder: CaptionEncoder,
    config: FinetuneConfig,
    state: TrainState,
) -> None:
    """Write the checkpoint's adapter with its card to ``folder``."""
    verify(checkpoint, moments=False)
    prefix = "model.llm."
    trained: dict[str, Tensor] = {}
    for name, tensor in load(checkpoint, moments=False).weights.items():
        if name.startswith(prefix):
            trained[name.removeprefix(prefix)] = tensor
    card = card_of(encoder, config, state)
    starts = [*map(fetch_directory, config.start_adapters)]
    save_adapter(encoder.model.llm, trained, card, folder, starts=starts, replace=True)


def card_of(
    encoder: CaptionEncoder, config: FinetuneConfig, state: TrainState
) -> EncoderCard:
    """How the adapter embeds, and how it was trained."""
    identity = encoder.identity()
    settings = {name: vars(encoder.config)[name] for name in CARD_SETTINGS}
    training = {
        "steps": state.step,
        "samples": state.samples,
        "global_batch": config.train.global_batch,
        "data": [public_name(path) for path in config.pairs.data],
        "start_adapters": [Path(path).name for path in config.start_adapters],
        "quantization": identity.quantization,
        "config_hash": config.hash,
    }
    return EncoderCard(
        base=config.encoder.llm,
        base_sha256=identity.weights_sha256,
        **settings,
        training=training,
        metrics=state.metrics,
        versions=library_versions(),
    )
