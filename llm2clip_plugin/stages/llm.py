"""Stage 1, ``llm2clip finetune-llm``: an LLM and pairs of captions in, a trained adapter out."""

from __future__ import annotations

import copy
import dataclasses
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from llm2clip_plugin.contracts import EncoderCard
from llm2clip_plugin.data.cache import short_digest
from llm2clip_plugin.data.sampler import epoch_draws
from llm2clip_plugin.evaluate.captions import caption_sets, measure_captions
from llm2clip_plugin.progress import phase
from llm2clip_plugin.run_folder import started_by
from llm2clip_plugin.signals import stop_requests
from llm2clip_plugin.stages import run as plans
from llm2clip_plugin.stages.llm_config import FINETUNE_LLM, FinetuneConfig
from llm2clip_plugin.stages.run import TrainingRun, plan_engine, training_ranks
from llm2clip_plugin.stages.settings import plan_or_train, rank_and_world
from llm2clip_plugin.text.adapter import (
    adapter_sha256,
    add_lora,
    autocast_adapter,
    merge_adapters,
    save_adapter,
)
from llm2clip_plugin.text.config import CARD_SETTINGS, EncoderConfig, LoraSettings, effective
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.llm import (
    CaptionModel,
    keep_layers,
    llm_config,
    refuse_length_dependent_rope,
    set_attention,
    set_kernels,
)
from llm2clip_plugin.text.pair_batches import PairBatches, PairTokenizer, tokenized_batches
from llm2clip_plugin.text.pair_step import CaptionStep, PairModule, caption_terms, equal_parts
from llm2clip_plugin.text.pairs import Survey, survey
from llm2clip_plugin.train.checkpoint import TrainState, load, verify
from llm2clip_plugin.train.distributed import on_first_rank, rank, world_size
from llm2clip_plugin.train.guard import check_finite, locked
from llm2clip_plugin.train.loop import Evaluate
from llm2clip_plugin.train.model import (
    DTYPES,
    StepMemory,
    activation_bytes,
    enable_gradient_checkpointing,
)
from llm2clip_plugin.train.optim import Trained, chosen_optimizer, is_vector, zero_stage
from llm2clip_plugin.vision.directory import fetch_directory
from llm2clip_plugin.vision.export import library_versions

ASSUMED_TOKENS = 64  # of a text, template and prompt included, in the first table of a plan
TEXTS = 64  # of the passes that measure activations


def finetune_llm(config: FinetuneConfig, command: dict[str, Any] | None = None) -> Path:
    """Train an adapter contrastively on captions; returns its folder.

    The same call resumes from the newest checkpoint of ``config.output_dir``. Raises ValueError,
    FileNotFoundError or ContractError for what the user can correct, NonFiniteLossError for a loss
    that is NaN or infinite. ``command``: run_folder.started_by, for run.json.
    """
    with training_ranks(config.train) as device, locked(Path(config.output_dir)):
        return _train(config, device, command or {})


def _train(config: FinetuneConfig, device: torch.device, command: dict[str, Any]) -> Path:
    with phase("opening the data"):
        data = Data(config, rank(), world_size())
    total_steps, deepspeed = plan_stage(config, data.samples, world_size())
    folders = map(fetch_directory, config.start_adapters)
    starts = {
        f"start adapter {number}": adapter_sha256(folder)
        for number, folder in enumerate(folders, 1)
    }
    run = TrainingRun(
        config=config,
        run_settings={**dataclasses.asdict(config), "samples": data.samples},
        teacher={},
        total_steps=total_steps,
        deepspeed=deepspeed,
        data=data.digests | starts,
        command=command,
    )
    if rank() == 0:
        print("\n".join(data.lines), flush=True)
    if config.evaluation.captions:
        # fails here, not at a step
        on_first_rank(lambda: len(caption_sets(config.evaluation, config.pairs.read)))
    resumed = run.find_checkpoint()
    encoder = CaptionEncoder(config.encoder, device, trainable_adapter=True)
    for result in data.surveys:
        count_truncated(result, encoder, cut_queries=config.pairs.cut_queries)
    terms = caption_terms(config.contrast)
    module = trained_module(encoder, config)
    if resumed is not None:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(resumed.weights[name])
    if config.train.torch_compile:
        encoder.compile()
    on_first_rank(
        lambda: check_finite(module, config.encoder.llm if resumed is None else resumed.path)
    )
    engine = run.make_engine(module, trained_parameters(module, config), resumed, keep_frozen=False)
    start = run.start_state(resumed)
    evaluate = evaluation(encoder, config)
    tokenizer = PairTokenizer(encoder.tokenizer, encoder.config)
    workers = config.train.dataloader_num_workers
    with stop_requests() as stop:
        state = run.train_to_end(
            engine,
            start,
            step=CaptionStep(engine, terms, encoder, config.contrast, seed=config.train.seed),
            batches=tokenized_batches(
                data.batches, tokenizer, position=start.samples, workers=workers
            ),
            evaluate=evaluate,
            before=evaluate if config.train.eval_on_start else None,
            stop=stop,
        )
    with phase("export"):
        on_first_rank(lambda: write_adapter(run, encoder, config, state))
    return run.folder / "adapter"


def plan_stage(config: FinetuneConfig, samples: int, world: int) -> tuple[int, dict[str, Any]]:
    """Steps, and DeepSpeed's configuration; ValueError for settings that exclude each other."""
    total_steps, deepspeed = plan_engine(config, samples=samples, world=world, hidden_size=1024)
    if config.encoder.load_in_4bit and zero_stage(deepspeed) == 3:
        raise ValueError(
            "ZeRO-3 cannot partition 4-bit weights; "
            "use scripts/zero2.json, or remove --load-in-4bit"
        )
    checkpointed_4bit = config.encoder.load_in_4bit and config.train.gradient_checkpointing
    if config.train.torch_compile and checkpointed_4bit:
        raise ValueError(
            "--torch-compile cannot trace --load-in-4bit with --gradient-checkpointing; "
            "omit one of them"
        )
    if not config.train.has_steps:
        raise ValueError("num_train_epochs and max_steps are both 0: nothing to train")
    if config.start_adapters and (
        config.encoder.adapter or config.encoder.load_in_4bit or config.lora.dora
    ):
        raise ValueError("start_adapters exclude --adapter, --load-in-4bit and --lora-dora")
    if config.train.precision != "fp32" and config.encoder.compute_dtype == "float32":
        problem = (
            f"train.precision {config.train.precision} would convert the LLM's float32 weights"
        )
        raise ValueError(
            f"{problem}; leave precision (the adapter's) at fp32, and set --compute-dtype"
        )
    return total_steps, deepspeed


class Data:
    """The pairs of a run, and what the first samples of each source have."""

    def __init__(self, config: FinetuneConfig, rank: int, world: int) -> None:
        """Raises FileNotFoundError or ValueError for a data set that is missing, too small or
        without pairs."""
        pairs = config.pairs
        train = config.train
        self.batches = PairBatches(
            pairs, seed=train.seed, global_batch=train.global_batch, rank=rank, world=world
        )
        sources = self.batches.sources
        # of an epoch
        self.samples = sum(epoch_draws([*map(len, sources)], pairs.weights or [1.0] * len(sources)))
        self.surveys = [survey(source) for source in sources]
        # what is compared between ranks: the number of samples, and the texts of the first ones
        self.digests: dict[str, str] = {}
        for number, (source, result) in enumerate(zip(sources, self.surveys, strict=True), 1):
            texts = [[pair.query, pair.positive] for pair in result.pairs]
            self.digests[str(number)] = f"{len(source)} samples ({short_digest(texts)})"
        self.lines = [
            f"{result.path}: {usable} of the first {result.samples} samples have a pair {kind}"
            for result in self.surveys
            for kind, usable in result.usable.items()
        ]


def count_truncated(result: Survey, encoder: CaptionEncoder, *, cut_queries: bool) -> None:
    """Print how many of a survey's queries and positives will be truncated to max_tokens, on rank
    0.

    Raises ValueError for queries, unless ``cut_queries``: a query's end is its caption, which would
    be lost.
    """
    limit = encoder.config.max_tokens
    without_limit = dataclasses.replace(encoder.config, max_tokens=sys.maxsize)
    tokens = PairTokenizer(encoder.tokenizer, without_limit)(result.pairs)
    for side, plural in (("query", "queries"), ("positive", "positives")):
        too_long = [
            (len(ids), pair.key)
            for ids, pair in zip(tokens[side], result.pairs, strict=True)
            if len(ids) > limit
        ]
        first = f"the first {len(result.pairs)} {plural}"
        problem = f"{result.path}: {len(too_long)} of {first} are longer than max_tokens {limit}"
        if too_long and side == "query" and not cut_queries:
            length, key = max(too_long)
            raise ValueError(
                f"{problem}, the longest {length} (sample {key!r}); "
                "raise --max-tokens, or set --cut-queries"
            )
        if too_long and rank() == 0:
            print(f"{problem} and are truncated")


def trained_module(encoder: CaptionEncoder, config: FinetuneConfig) -> PairModule:
    """The encoder's LLM with an adapter, which alone trains."""
    if not config.encoder.adapter:
        starts = [*map(fetch_directory, config.start_adapters)]
        llm = merge_adapters(encoder.model.llm, starts)  # type: ignore[arg-type]
        torch.manual_seed(config.train.seed)
        encoder.model.llm = add_lora(llm, config.lora, base=config.encoder.llm)
    if config.train.precision == "fp32":  # otherwise DeepSpeed converts the adapter
        encoder.model.autocast = autocast_adapter(encoder.model.llm, encoder.dtype)
    if config.train.gradient_checkpointing:
        enable_gradient_checkpointing(encoder.model.llm)
    return PairModule(encoder.model, config.contrast).train()


def trained_parameters(module: torch.nn.Module, config: FinetuneConfig) -> list[Trained]:
    """Every parameter that trains, all at the same learning rate; vectors don't decay."""
    return [
        Trained(name=name, parameter=p, lr=config.optim.lr, decay=not is_vector(p))
        for name, p in module.named_parameters()
        if p.requires_grad
    ]


def evaluation(encoder: CaptionEncoder, config: FinetuneConfig) -> Evaluate | None:
    """Caption retrieval accuracy on the held-out captions; None without any."""
    if not config.evaluation.captions:
        return None

    def evaluate() -> dict[str, float]:
        encoder.model.eval()
        scores = measure_captions(encoder, config.evaluation, config.pairs.read)
        encoder.model.train()
        return {row.name: row.cra for row in scores}

    return evaluate


def write_adapter(
    run: TrainingRun, encoder: CaptionEncoder, config: FinetuneConfig, state: TrainState
) -> None:
    """Write the last checkpoint's adapter with its card."""
    last = run.checkpoints.path(state.step)  # the loop ends with a checkpoint
    verify(last, moments=False)
    prefix = "model.llm."
    trained = {
        name.removeprefix(prefix): tensor
        for name, tensor in load(last, moments=False).weights.items()
        if name.startswith(prefix)
    }
    card = card_of(encoder, config, state)
    starts = [*map(fetch_directory, config.start_adapters)]
    save_adapter(
        encoder.model.llm, trained, card, run.folder / "adapter", starts=starts, replace=True
    )


def card_of(encoder: CaptionEncoder, config: FinetuneConfig, state: TrainState) -> EncoderCard:
    """How the adapter embeds, and how it was trained."""
    identity = encoder.identity()
    return EncoderCard(
        base=config.encoder.llm,
        base_sha256=identity.weights_sha256,
        **{name: vars(encoder.config)[name] for name in CARD_SETTINGS},
        training={
            "steps": state.step,
            "samples": state.samples,
            "global_batch": config.train.global_batch,
            "data": [Path(path).name for path in config.pairs.data],
            "start_adapters": [Path(path).name for path in config.start_adapters],
            "quantization": identity.quantization,
            "config_hash": config.hash,
        },
        metrics=state.metrics,
        versions=library_versions(),
    )


def main(argv: list[str]) -> int:
    """Print the plan or train; exit status 0."""
    config = FINETUNE_LLM.parse(argv)
    train = partial(finetune_llm, config, started_by("finetune-llm", argv))
    return plan_or_train(config.dry_run, partial(llm_plan, config), train, "adapter")


def llm_plan(config: FinetuneConfig) -> str:
    """The plan as text. Raises what would stop the run itself."""
    _, world = rank_and_world()
    settings = llm_config(config.encoder)
    adapter = Path(config.encoder.adapter) if config.encoder.adapter else None
    encoder, _ = effective(config.encoder, Path(config.encoder.llm), adapter)
    config = dataclasses.replace(config, encoder=encoder)
    lora = config.lora
    if config.evaluation.captions:
        caption_sets(config.evaluation, config.pairs.read)
    notes = [f"assumed: {config.plan.images:,} pairs (--assumed-samples, or DATA)"]
    pairs = config.plan.images
    texts = 3 if config.pairs.random_negatives else 2  # query and positive, perhaps a hard negative
    if config.pairs.data:
        data = Data(config, rank=0, world=1)
        notes = data.lines
        pairs = data.samples
        if any(result.pairs[0].negative for result in data.surveys):
            texts = 3
    _, deepspeed = plan_stage(config, pairs, world)
    shape = shape_llm(settings, encoder, lora, config.train.precision)
    dtype = str(shape.dtype).removeprefix("torch.")
    if encoder.load_in_4bit:
        dtype = f"NF4 and {dtype}"
    starts = "".join(f"; {name} merged" for name in config.start_adapters)
    trained = trained_parameters(shape.llm, config)
    assumed = " (assumed of --adapter)" if encoder.adapter else ""
    parts = [
        *notes,
        plans.describe_run(config, deepspeed, trained, pairs, world),
        f"LLM: {encoder.llm}, {shape.kind}, {shape.blocks} blocks x {shape.width}, "
        f"{shape.parameters:,} parameters without a head, "
        f"{shape.frozen_bytes / plans.GIB:.2f} GiB in {dtype}{starts}",
        f"LoRA{assumed}: r {lora.r}, alpha {lora.alpha} on {', '.join(shape.adapted)}",
    ]
    # ZeRO-3 can't partition 4-bit weights
    stages = (0, 1, 2) if encoder.load_in_4bit else (0, 1, 2, 3)
    for tokens in sorted({min(ASSUMED_TOKENS, encoder.max_tokens), encoder.max_tokens}):
        about = f", for pairs of {texts} texts of {tokens} tokens"
        memory = step_memory(config, settings, shape, texts, tokens)
        parts.append(
            plans.describe_memory(
                memory, config.train, config.plan.gpu_gib, about=about, stages=stages
            )
        )
    return "\n".join(parts)


def step_memory(
    config: FinetuneConfig, settings: PretrainedConfig, shape: LlmShape, texts: int, tokens: int
) -> StepMemory:
    """Of pairs of ``texts`` texts, measured on a few blocks of fake tensors: memory grows linearly
    with blocks."""
    bytes_of: dict[int, float] = {}
    for blocks in {min(1, shape.blocks), min(2, shape.blocks)}:
        part = shape_llm(
            settings, config.encoder, config.lora, config.train.precision, last_blocks=blocks
        )
        bytes_of[blocks] = texts_bytes(config, part, tokens)
    few = min(bytes_of)
    more = max(bytes_of)
    slope = (bytes_of[more] - bytes_of[few]) / max(1, more - few)
    text_bytes = bytes_of[more] + slope * (shape.blocks - more)
    return StepMemory(
        precision=config.train.precision,
        trained=sum(p.numel() for p in shape.llm.parameters() if p.requires_grad),
        frozen_bytes=shape.frozen_bytes,
        parameters=shape.parameters,
        pair_bytes=texts * text_bytes / TEXTS,
        width=shape.width,
        state_bytes=chosen_optimizer(config.optim).state_bytes,
    )


def texts_bytes(config: FinetuneConfig, shape: LlmShape, tokens: int) -> float:
    """Activations of TEXTS texts of ``tokens`` tokens, in the step's groups."""
    model = CaptionModel(shape.llm, config.encoder.pooling)
    model.autocast = autocast_adapter(shape.llm, shape.dtype)
    module = PairModule(model, config.contrast).train()
    if config.train.gradient_checkpointing:
        enable_gradient_checkpointing(shape.llm)

    def make_inputs() -> list[Tensor]:
        inputs: list[Tensor] = []
        for part in equal_parts(range(TEXTS), config.contrast.length_groups):
            ids = torch.zeros(len(part), tokens, dtype=torch.int64)
            inputs += [ids, ids, ids, ids.bool()]  # ids, attention mask, positions, pooling mask
        return inputs

    return activation_bytes(module, make_inputs, lambda *inputs: module(*inputs)[0].sum())


# The LLM's shape, for plans.

# bytes of a value in bitsandbytes' NF4 with double quantization: half a byte, a byte of scale for
# 64 values, 4 bytes of a scale's scale for 256 x 64 (Dettmers et al. 2023, arXiv 2305.14314)
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (256 * 64)


@dataclass(frozen=True, kw_only=True)
class LlmShape:
    """An LLM with its adapter on the meta device, and its size."""

    llm: nn.Module  # only the adapter trains
    kind: str  # transformers' model_type
    blocks: int
    width: int
    parameters: int  # of the LLM, with its embeddings, without its language-model head
    dtype: torch.dtype  # of computation
    frozen_bytes: float
    adapted: tuple[str, ...]  # names of the layers with LoRA


def shape_llm(
    settings: PretrainedConfig,
    config: EncoderConfig,
    lora: LoraSettings,
    precision: str,
    *,
    last_blocks: int = 0,
) -> LlmShape:
    """The LLM up to the pooled layer with its adapter, reduced to its last ``last_blocks`` blocks
    if that is not 0.

    Raises ValueError for a model that isn't a decoder, and for a layer or LoRA target that it
    doesn't have.
    """
    settings = copy.deepcopy(settings)
    text = settings.get_text_config()
    refuse_length_dependent_rope(text, config.max_tokens)
    set_attention(settings, config.attention)
    # "auto" is bfloat16 on GPUs; precision is the adapter's, and bf16 and fp16 are the LLM's too
    compute = "bfloat16" if config.compute_dtype == "auto" else config.compute_dtype
    dtype = getattr(torch, compute) if precision == "fp32" else DTYPES[precision]
    with torch.device("meta"):
        llm = AutoModel.from_config(
            settings, dtype=dtype, trust_remote_code=config.trust_remote_code
        )
        llm = llm if text is settings else llm.language_model
        keep_layers(llm, config.layer)
        set_kernels(llm, config.attention)
        blocks = llm.get_submodule("layers")
        assert isinstance(blocks, nn.ModuleList)
        depth = len(blocks)
        if last_blocks:
            del blocks[: max(0, depth - last_blocks)]
        llm.requires_grad_(False)
        parameters = sum(p.numel() for p in llm.parameters())
        linear = sum(p.weight.numel() for p in llm.modules() if isinstance(p, nn.Linear))
        quantized = linear if config.load_in_4bit else 0
        wrapped = add_lora(llm, lora, base=config.llm)
    wrapped = wrapped if precision == "fp32" else wrapped.to(dtype)
    adapted = {
        n.partition(".lora_")[0].rpartition(".")[2]
        for n, p in wrapped.named_parameters()
        if p.requires_grad
    }
    return LlmShape(
        llm=wrapped,
        kind=text.model_type,
        blocks=depth,
        width=text.hidden_size,
        parameters=parameters,
        dtype=dtype,
        frozen_bytes=(parameters - quantized) * dtype.itemsize + quantized * NF4_BYTES,
        adapted=tuple(sorted(adapted)),
    )
