"""Stage 1: an LLM and pairs of captions in, a trained adapter out."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm2clip_plugin.data.sources import ReadConfig
from llm2clip_plugin.evaluate.captions import check_captions, measure_captions
from llm2clip_plugin.evaluate.config import CaptionSetConfig
from llm2clip_plugin.progress import phase
from llm2clip_plugin.signals import stop_requests
from llm2clip_plugin.stages.llm_config import FinetuneConfig
from llm2clip_plugin.stages.llm_data import LlmData, count_truncated
from llm2clip_plugin.stages.llm_export import ADAPTER, export_adapter
from llm2clip_plugin.stages.run import CAPTIONS, open_run, training_ranks
from llm2clip_plugin.text.adapter import adapter_sha256
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.finetune import (
    HIDDEN_SIZE,
    PairModule,
    load_trained,
    refuse_contradictions,
    trained_module,
    trained_parameters,
)
from llm2clip_plugin.text.pair_batches import PairTokenizer, tokenized_batches
from llm2clip_plugin.text.pair_step import CaptionStep, caption_terms
from llm2clip_plugin.train.checkpoint import Loaded
from llm2clip_plugin.train.distributed import on_first_rank, rank, world_size
from llm2clip_plugin.train.guard import check_finite, locked
from llm2clip_plugin.train.loop import Evaluate
from llm2clip_plugin.train.optim import zero_stage
from llm2clip_plugin.vision.directory import fetch_directory


def finetune_llm(config: FinetuneConfig, command: dict[str, Any] | None = None) -> Path:
    """Train an adapter contrastively on captions; returns its folder.

    The same call resumes from the newest checkpoint of ``config.output_dir``. Raises ValueError,
    FileNotFoundError or ContractError for what the user can correct, NonFiniteLossError for a loss
    that is NaN or infinite. ``command``: run_folder.started_by, for run.json.
    """
    with training_ranks(config.train) as device, locked(Path(config.output_dir)):
        return _train(config, device, command or {})


def _train(
    config: FinetuneConfig, device: torch.device, command: dict[str, Any]
) -> Path:
    with phase("opening the data"):
        data = LlmData(config.pairs, config.train, rank=rank(), world=world_size())
        captions = on_first_rank(data.captions)
    run = open_run(
        config,
        samples=data.samples,
        hidden_size=HIDDEN_SIZE,
        learned_from={"samples": data.samples, CAPTIONS: captions},
        teacher={},
        command=command,
    )
    refuse_contradictions(
        config.encoder,
        config.lora,
        config.train,
        config.start_adapters,
        zero_stage=zero_stage(run.deepspeed),
    )
    start_digests = digests_of(config.start_adapters)
    if rank() == 0:
        print("\n".join(data.lines), flush=True)
    if config.evaluation.captions:
        # fails here, not at a step
        on_first_rank(partial(check_captions, config.evaluation, config.pairs.read))
    resumed = run.find_checkpoint(data.digests | start_digests)
    encoder, module = _start_module(config, data, resumed, device)
    trained = trained_parameters(module, config.optim.lr)
    engine = run.make_engine(module, trained, resumed, keep_frozen=False)
    start = run.start_state(resumed)
    evaluate = evaluation(encoder, config.evaluation, config.pairs.read)
    terms = caption_terms(config.contrast)
    step = CaptionStep(engine, terms, encoder, config.contrast, seed=config.train.seed)
    with stop_requests() as stop:
        batches = tokenized_batches(
            data.batches,
            PairTokenizer(encoder.tokenizer, encoder.config),
            position=start.samples,
            workers=config.train.dataloader_num_workers,
        )
        state = run.train_to_end(
            engine,
            start,
            step=step,
            batches=batches,
            evaluate=evaluate,
            before=evaluate if config.train.eval_on_start else None,
            stop=stop,
        )
    adapter = run.folder / ADAPTER
    last = run.checkpoints.path(state.step)  # the loop ends with a checkpoint
    with phase("export"):
        on_first_rank(lambda: export_adapter(last, adapter, encoder, config, state))
    return adapter


def _start_module(
    config: FinetuneConfig, data: LlmData, resumed: Loaded | None, device: torch.device
) -> tuple[CaptionEncoder, PairModule]:
    """The LLM with its adapter as the steps start from them, and the module of what is trained.
    Captions that it will cut are counted."""
    encoder = CaptionEncoder(config.encoder, device, trainable_adapter=True)
    for result in data.surveys:
        count_truncated(result, encoder, cut_queries=config.pairs.cut_queries)
    module = trained_module(
        encoder,
        config.lora,
        config.contrast,
        config.train,
        start_adapters=config.start_adapters,
    )
    if resumed is not None:
        load_trained(module, resumed.weights)
    if config.train.torch_compile:
        encoder.compile()
    start_of_weights = config.encoder.llm if resumed is None else resumed.path
    on_first_rank(lambda: check_finite(module, start_of_weights))
    return encoder, module


def digests_of(start_adapters: Sequence[str]) -> dict[str, str]:
    """What is compared between ranks of the adapters that are merged."""
    return {
        f"start adapter {number}": adapter_sha256(fetch_directory(adapter))
        for number, adapter in enumerate(start_adapters, 1)
    }


def evaluation(
    encoder: CaptionEncoder, config: CaptionSetConfig, read: ReadConfig
) -> Evaluate | None:
    """Caption retrieval accuracy on the held-out captions; None without any."""
    if not config.captions:
        return None

    def evaluate() -> dict[str, float]:
        encoder.model.eval()
        scores = measure_captions(encoder, config, read)
        encoder.model.train()
        return {row.name: row.cra for row in scores}

    return evaluate
