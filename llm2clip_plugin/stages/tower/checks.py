"""What can be known to fail is checked before step 1 of stage 2: the data, the evaluation, the start weights."""

import sys

from llm2clip_plugin.data.caption_choice import check_kinds
from llm2clip_plugin.evaluate.preconditions import check_measurable
from llm2clip_plugin.stages.tower.config import RunConfig
from llm2clip_plugin.stages.tower.opening import Data
from llm2clip_plugin.train.checkpoint import Loaded
from llm2clip_plugin.train.distributed import on_first_rank
from llm2clip_plugin.train.finite import check_finite
from llm2clip_plugin.train.loss_config import LossConfig
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.towers import tower_blocks


def check_data(config: RunConfig, data: Data) -> None:
    """Raise ValueError for data on which training or the run's evaluation would fail; warn about what is unusual.

    Every rank must call this; rank 0 reads samples.
    """
    on_first_rank(lambda: _check_data(config, data))


def _check_data(config: RunConfig, data: Data) -> None:
    warnings = [repeated_samples(config, sum(map(len, data.sources)))]
    refuse_small_sources(config, data)
    check_kinds(data.sources, config.data.kind_weights)
    if data.validation is not None:
        check_measurable(data.validation, config.evaluation, option="--evaluation.")
        warnings.append(trained_on(data))
    for line in filter(None, warnings):
        print(f"warning: {line}", file=sys.stderr)


def trained_on(data: Data) -> str:
    """A line about a shard of validation whose keys and captions are those of one that is trained on; else ""."""
    assert data.validation is not None and data.validation_cache is not None
    shards = {
        cache.manifest.shards[shard.name]["rows_sha256"]: source.path
        for source, cache in zip(data.sources, data.caches, strict=True)
        for shard in source.shards
    }
    for shard in data.validation.shards:
        if same := shards.get(data.validation_cache.manifest.shards[shard.name]["rows_sha256"]):
            return (
                f"--validation {data.validation.path}: shard {shard.name!r} is also in the training data {same}, its "
                "scores say nothing about new images; hold some out with `llm2clip data split`"
            )
    return ""


def repeated_samples(config: RunConfig, samples: int) -> str:
    """A line about a batch that is larger than the data; ValueError if its samples would be their own negatives."""
    batch = config.train.global_batch
    if batch <= samples:
        return ""
    problem = f"global_batch {batch} is more than the {samples} samples of {', '.join(config.data.path)}"
    if not config.loss.mask_same_image:
        raise ValueError(
            f"{problem}: samples would be their own negatives, as loss.mask_same_image is off; lower --global-batch"
        )
    return f"{problem}: a sample comes several times in a batch, and no more than {samples} pairs are negatives"


def refuse_small_sources(config: RunConfig, data: Data) -> None:
    """Raise ValueError for a source of which a global batch would hold samples twice."""
    batch = config.train.global_batch
    small = [f"{source.path} ({len(source)} samples)" for source in data.sources if len(source) < batch]
    if config.data.one_source_per_batch and len(data.sources) > 1 and small:
        raise ValueError(
            f"global_batch {batch} is larger than {', '.join(small)}; lower --global-batch, or mix the sources with "
            "--no-one-source-per-batch"
        )


def check_patch_layers(dual: DualEncoder, loss: LossConfig) -> None:
    """Raise ValueError for a term that reads patches of a hidden state that the tower does not have."""
    blocks = len(tower_blocks(dual.tower))
    for reads, layer in loss.patch_layers.items():
        if not -blocks - 1 <= layer <= blocks:
            raise ValueError(
                f"loss.terms {' '.join(loss.terms)}: layer {layer} of {reads} is outside the tower's {blocks} blocks; "
                "change layer in --loss.args (-2: the block before the last)"
            )


def check_weights(dual: DualEncoder, config: RunConfig, resumed: Loaded | None) -> None:
    """Raise ValueError on rank 0 for weights that are NaN or infinite. Every rank must call this."""
    where = config.tower.path if resumed is None else resumed.path
    on_first_rank(lambda: check_finite(dual, where))
