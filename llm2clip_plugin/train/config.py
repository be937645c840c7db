"""The settings of a training: tower, heads, loss, optimizer, loop; read without torch."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args, get_origin

from llm2clip_plugin.data.samples import PREFETCH_MB
from llm2clip_plugin.json_files import from_plain
from llm2clip_plugin.options import setting, unknown

Precision = Literal["fp32", "bf16", "fp16"]
ReductionType = Literal["", "fp32", "bf16", "fp16"]
Tf32 = Literal["auto", "on", "off"]
# seconds, as in Hugging Face's Trainer; torch's is 600 on NCCL, DeepSpeed's 600 since 0.19.6
DDP_TIMEOUT = 1800.0
STRAGGLER_SECONDS = 300.0  # without progress, after which a rank is named
Member = TypeVar("Member")
Monitor = Literal["tensorboard", "wandb", "csv"]
BELOW_1 = math.nextafter(1, 0)


def check_choices(section: str, config: Any) -> None:
    """Raise ValueError for a field whose value its Literal type does not list."""
    for field in fields(config):
        value = getattr(config, field.name)
        choices = get_args(field.type)
        if get_origin(field.type) is Literal and value not in choices:
            raise ValueError(
                unknown(f"{section}.{field.name}", value, filter(None, choices))
            )


def check_bounds(section: str, config: Any, **bounds: tuple[float, float]) -> None:
    """Raise ValueError for a field outside its lowest and highest value."""
    for name, (low, high) in bounds.items():
        if not low <= getattr(config, name) <= high:
            raise ValueError(
                f"{section}.{name} {getattr(config, name)} must be between {low} and {high}"
            )


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """The initial vision tower, and which parts of it train."""

    path: str = setting(
        "",
        help="tower directory, Hugging Face directory or Hub id",
        option="tower",
        learned=True,
        per_host=True,
    )
    architecture: str = setting(
        "",
        help="known architecture (eva02-l14-336 ...) that --dry-run uses if path is empty",
        learned=False,
        needs="not path",
    )
    image_size: int = setting(
        0,
        help="pixels per side; position embeddings are interpolated. 0: the tower's own",
        unit="pixels",
        learned=True,
    )
    freeze: bool = setting(False, help="train only the heads", learned=True)
    freeze_first_blocks: int = setting(
        0,
        help="freeze the embeddings and this many first blocks",
        learned=True,
    )
    from_scratch: bool = setting(
        False,
        help="start from random weights of the architecture; path stays empty",
        learned=True,
    )
    keep_heads: bool = setting(
        False,
        help="start from the tower directory's projection, text adapter and logit scale",
        learned=True,
    )
    lora_rank: int = setting(
        0,
        help="rank of LoRA on the blocks' Linear layers (PEFT), which freezes the tower; 0: no "
        "LoRA",
        learned=True,
    )
    lora_alpha: int = setting(
        32,
        help="LoRA updates are scaled by alpha / rank",
        learned=True,
        needs="lora_rank",
    )

    def __post_init__(self) -> None:
        pretrained = (
            self.path
            or self.freeze
            or self.freeze_first_blocks
            or self.lora_rank
            or self.keep_heads
        )
        if self.from_scratch and (pretrained or not self.architecture):
            raise ValueError(
                "tower.from_scratch takes tower.architecture, "
                "not path, freeze*, lora_rank, keep_heads"
            )
        if [bool(self.lora_rank), self.freeze, bool(self.freeze_first_blocks)].count(
            True
        ) > 1:
            raise ValueError(
                "tower.lora_rank, tower.freeze, tower.freeze_first_blocks: set only one"
            )


MAX_CAPTIONS = 64  # of an image in a step


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """The phase that fits the heads on a frozen tower."""

    target: Literal["images", "clip_text"] = setting(
        "images",
        help="images: fit projection and text adapter to each other | clip_text: fit the text "
        "adapter alone to the text features of the tower's own CLIP (ProCLIP), whose projection "
        "and logit scale are kept",
        learned=True,
    )
    steps: int = setting(
        0,
        help="updates that train only the heads; 0: skip this phase",
        learned=True,
    )
    batch: int = setting(
        256,
        help="image-caption pairs per update",
        option="batch-size",
        learned=True,
    )
    captions_per_image: int = setting(
        1,
        help="with clip_text: captions of an image in an update; the distances of all count, the "
        "structure is that of the first one drawn",
        learned=True,
    )
    lr: float = setting(
        1e-3,
        help="learning rate, constant; with clip_text the peak of a cosine decay",
        learned=True,
    )
    weight_decay: float = setting(
        0.05,
        help="weight decay, not applied to norms, biases, logit scale",
        learned=True,
    )
    max_images: int = setting(
        100_000,
        help="images used, evenly spaced in each source; features are held in memory",
        learned=True,
    )

    def __post_init__(self) -> None:
        check_choices("heads", self)
        check_bounds(
            "heads",
            self,
            steps=(0, math.inf),
            batch=(2, math.inf),
            captions_per_image=(1, MAX_CAPTIONS),
            max_images=(2, math.inf),
        )
        if self.captions_per_image > 1 and self.target != "clip_text":
            raise ValueError(
                f"heads.captions_per_image {self.captions_per_image} has no effect with "
                f"heads.target {self.target}; leave it out, or set --heads.target clip_text"
            )


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """The frozen tower that the loss terms distill and patch_reference compare with."""

    reference: Literal["ema", "start"] = setting(
        "ema",
        help="ema: a moving average of the tower | start: the tower as it was before step 1",
        learned=True,
    )
    decay: float = setting(
        0.999, help="decay of that moving average per step", learned=True
    )

    def __post_init__(self) -> None:
        check_choices("distill", self)
        check_bounds("distill", self, decay=(0, BELOW_1))


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = setting(
        "adamw",
        help="adamw | adamw_8bit (bitsandbytes: a quarter of the memory for optimizer states)",
        option="optimizer",
        learned=True,
    )
    args: tuple[str, ...] = setting(
        (),
        help="settings of this optimizer alone, as NAME=VALUE (adamw_8bit: min_8bit_size=4096)",
        option="optimizer-args",
        learned=True,
    )
    lr: float = setting(
        1e-5,
        help="peak learning rate, of the tower's last block or of the LLM's adapter",
        learned=True,
    )
    head_lr: float = setting(
        0.0,
        help="peak learning rate of projection, text adapter and logit scale; 0: same as lr",
        learned=True,
    )
    weight_decay: float = setting(
        0.05,
        help="weight decay, not applied to norms, biases, class token, positions, logit scale",
        learned=True,
    )
    layer_decay: float = setting(
        0.85,
        help="lr factor from a block to the one below it; 1: none",
        learned=True,
    )
    full_lr: tuple[str, ...] = setting(
        (),
        help="parts of the tower, if it has them, that --layer-decay does not slow down",
        learned=True,
    )
    betas: tuple[float, float] = setting(
        (0.9, 0.98),
        help="decay rates of Adam's moments",
        learned=True,
    )
    eps: float = setting(1e-8, help="Adam's epsilon", learned=True)
    max_grad_norm: float = setting(
        5.0,
        help="gradient clipping by global norm; 0: none",
        learned=True,
    )
    schedule: Literal["cosine", "linear", "constant"] = setting(
        "cosine",
        help="after the warm-up: cosine | linear (both to --min-lr-ratio) | constant",
        learned=True,
    )
    warmup_steps: int = setting(
        0,
        help="steps of linear warm-up",
        learned=True,
        replaces="warmup_ratio",
    )
    warmup_ratio: float = setting(
        0.0,
        help="warm-up as a fraction of all steps; set one of the two",
        learned=True,
        replaces="warmup_steps",
    )
    min_lr_ratio: float = setting(
        0.0,
        help="where the schedule ends, as a fraction of the peak",
        learned=True,
    )

    def __post_init__(self) -> None:
        check_choices("optim", self)
        check_bounds(
            "optim",
            self,
            layer_decay=(1e-3, 1),
            eps=(1e-20, 1),
            max_grad_norm=(0, math.inf),
        )
        check_bounds(
            "optim", self, **dict.fromkeys(("lr", "head_lr", "weight_decay"), (0, 10))
        )
        check_bounds(
            "optim", self, **dict.fromkeys(("warmup_ratio", "min_lr_ratio"), (0, 1))
        )
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"optim: set only one of warmup_steps and warmup_ratio {self.warmup_ratio}"
            )

    def warmup(self, total_steps: int) -> int:
        """Steps of warm-up in a run of ``total_steps``."""
        return self.warmup_steps or round(self.warmup_ratio * total_steps)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch size, precision, checkpoints and logging of a run."""

    global_batch: int = setting(
        4096,
        help="pairs per optimizer step, over all ranks; each pair has the others as negatives",
        learned=True,
    )
    micro_batch: int = setting(
        0,
        help="pairs per forward pass and GPU; 0: all at once. Smaller values use gradient caching",
        learned=True,
    )
    num_train_epochs: float = setting(
        4.0,
        help="passes over the data; used if --max-steps is 0",
        learned=True,
        needs="not max_steps",
        replaces="max_steps",
    )
    max_steps: int = setting(
        0,
        help="optimizer steps; 0 or -1: as many as --num-train-epochs takes",
        learned=True,
    )
    precision: Precision = setting(
        "fp32",
        help="precision of weights; optimizer state stays fp32",
        learned=True,
    )
    tf32: Tf32 = setting(
        "auto",
        help="TF32 for products of fp32 tensors on GPUs: on | off | auto (not with precision fp32)",
        learned=False,
    )
    communication_data_type: ReductionType = setting(
        "",
        help='type in which gradients are reduced; "": that of --precision, from 16 ranks on fp32',
        learned=False,
    )
    seed: int = setting(
        0,
        help="seed of the data's order, augmentation, noise, initial heads",
        learned=True,
    )
    gradient_checkpointing: bool | Literal["auto"] = setting(
        False,
        help="recompute the tower's blocks in the backward pass: less memory, slower; auto: where "
        "a GPU would not hold them",
        learned=False,
    )
    torch_compile: bool = setting(
        False,
        help="torch.compile the blocks of the tower or LLM; the first step waits for it, up to a "
        "minute",
        learned=False,
    )
    ema_decay: float = setting(
        0.0,
        help="exponential moving average of the weights, also exported; 0: none",
        learned=True,
    )
    save_steps: int = setting(
        0, help="steps between checkpoints; 0: only by time", learned=False
    )
    save_minutes: float = setting(
        15.0,
        help="minutes between checkpoints; 0: only by steps",
        unit="minutes",
        learned=False,
    )
    save_total_limit: int = setting(2, help="checkpoints kept; 0: all", learned=False)
    eval_steps: int = setting(
        0,
        help="steps between evaluations on the held-out split; 0: only at the end",
        learned=False,
    )
    eval_on_start: bool = setting(
        True,
        help="evaluate before step 1 too: the scores that the run's are compared with",
        learned=False,
    )
    logging_steps: int = setting(
        1, help="steps between lines of metrics.jsonl", learned=False
    )
    report_to: tuple[Monitor, ...] = setting(
        (),
        help="DeepSpeed's monitors: tensorboard, wandb, csv",
        learned=False,
    )
    profile_steps: int = setting(
        0,
        help="steps that torch.profiler traces into profile/ of --output, after 5 if there are "
        "more; 0: none",
        learned=False,
    )
    profile_all_ranks: bool = setting(
        False,
        help="trace every rank, not rank 0 alone",
        learned=False,
    )
    dataloader_num_workers: int = setting(
        0,
        help="processes per rank that decode images or tokenize pairs",
        option="workers",
        learned=False,
        per_host=True,
    )
    dataloader_prefetch_mb: int = setting(
        PREFETCH_MB,
        help="10^6 bytes of /dev/shm that these fill ahead, for each rank",
        unit="MB",
        learned=False,
    )
    skip_bad_batches: int = setting(
        0,
        help="batches with a non-finite loss or gradient to leave out; one more ends the run",
        learned=False,
    )
    max_broken: float = setting(
        0.01,
        help="fraction of unreadable samples above which the run stops",
        learned=True,
    )
    ddp_timeout: float = setting(
        DDP_TIMEOUT,
        help="seconds that a rank waits for the others in a collective before the run fails",
        unit="seconds",
        learned=False,
    )
    straggler_seconds: float = setting(
        STRAGGLER_SECONDS,
        help="a rank without progress for so long is named; 0: never",
        unit="seconds",
        learned=False,
    )

    def __post_init__(self) -> None:
        check_choices("train", self)
        if others := sorted(set(self.report_to) - set(get_args(Monitor))):
            raise ValueError(unknown("train.report_to", others[0], get_args(Monitor)))
        counts = (
            "micro_batch",
            "save_steps",
            "save_minutes",
            "save_total_limit",
            "eval_steps",
            "profile_steps",
            "dataloader_num_workers",
            "skip_bad_batches",
            "straggler_seconds",
        )
        check_bounds("train", self, **dict.fromkeys(counts, (0, math.inf)))
        check_bounds(
            "train",
            self,
            global_batch=(2, math.inf),
            logging_steps=(1, math.inf),
            ddp_timeout=(1, math.inf),
        )
        check_bounds(
            "train",
            self,
            ema_decay=(0, BELOW_1),
            max_broken=(0, 1),
            dataloader_prefetch_mb=(1, math.inf),
        )
        if self.max_steps <= 0 and not 0 <= self.num_train_epochs < math.inf:
            raise ValueError(
                f"train.num_train_epochs {self.num_train_epochs} must be 0 or more, and finite"
            )

    def rows(self, world: int) -> tuple[int, int, int]:
        """(local batch, micro-batch, micro-batches a step) on ``world`` ranks; ValueError suggests
        a batch."""
        local = self.global_batch // world
        micro = max(1, min(self.micro_batch or local, local))
        unit = world * micro
        if self.global_batch % unit == 0:
            return local, micro, local // micro
        shares = f"{world} ranks"
        if self.micro_batch:
            shares += f" x train.micro_batch {micro}"
        fits = max(unit, self.global_batch // unit * unit)
        raise ValueError(
            f"global_batch {self.global_batch} is not a multiple of {shares}; "
            f"try --global-batch {fits}"
        )

    @property
    def has_steps(self) -> bool:
        """Whether there is a step to make."""
        return self.max_steps > 0 or self.num_train_epochs > 0

    def steps(self, samples: int) -> int:
        """Optimizer steps of the run over ``samples`` samples; 0 for 0 epochs."""
        if self.max_steps > 0 or not self.has_steps:
            return max(0, self.max_steps)
        return max(1, round(self.num_train_epochs * samples / self.global_batch))


@dataclass(frozen=True)
class TermWeight:
    """A term's weight over the run: linear from ``start`` to ``end``, which it reaches after
    ``until`` of the run."""

    name: str
    start: float
    end: float
    until: float = 1.0  # fraction of the run's steps

    def at(self, progress: float) -> float:
        """The weight when a fraction ``progress`` of the run is done."""
        if progress >= self.until:
            return self.end
        return self.start + (self.end - self.start) * progress / self.until


def parse_terms(words: Sequence[str]) -> list[TermWeight]:
    """``NAME`` (weight 1), ``NAME=WEIGHT``, ``NAME=START:END`` or ``NAME=START:END@FRACTION`` ->
    weights.

    Raises ValueError for another form, a term that is named twice or never counts, or a moment
    without any weight.
    """
    terms: list[TermWeight] = []
    for word in words:
        name, equals, values = word.partition("=")
        schedule, at, until = values.partition("@")
        start, colon, end = schedule.partition(":")
        try:
            first = float(start) if equals else 1.0
            last = float(end) if colon else first
            term = TermWeight(name, first, last, float(until) if at else 1.0)
        except ValueError:
            term = TermWeight(name, math.nan, math.nan)
        numbers = (
            0 <= term.start < math.inf
            and 0 <= term.end < math.inf
            and 0 < term.until <= 1
        )
        if not (name and numbers and (colon or not at)):
            raise ValueError(
                f"loss.terms: {word!r} is not NAME, NAME=WEIGHT or NAME=START:END@FRACTION, "
                "weights >= 0"
            )
        if name in [other.name for other in terms]:
            raise ValueError(f"loss.terms {' '.join(words)} names {name} twice")
        terms.append(term)
    # where the sum of the weights can be lowest
    for progress in (0.0, *(term.until for term in terms)):
        if not any(term.at(progress) for term in terms):
            raise ValueError(
                f"loss.terms {' '.join(words)}: all weights are 0 after {progress:.0%} of the run"
            )
    return terms


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The training loss, a weighted sum of terms."""

    terms: tuple[str, ...] = setting(
        ("infonce",),
        help="terms of the sum as NAME=WEIGHT, or NAME=START:END@FRACTION for a weight that "
        "changes linearly over this fraction of the run: infonce (CLIP, LLM2CLIP), sigmoid "
        "(SigLIP; needs --dual.logit-bias-init), cosine (LIFT), multi_positive, distill "
        "(ProCLIP) and patch_reference (both compare with --distill.reference), patch_captions "
        "(FLAIR)",
        learned=True,
    )
    weight: float = setting(1.0, help="factor of the sum", learned=True)
    block: int = setting(
        0,
        help="rows of the logits held at once; 0: as many as fit 16 MiB on a CPU, 512 MiB on a GPU",
        learned=False,
    )
    mask_same_caption: bool = setting(
        True,
        help="pairs with equal captions are not negatives of each other",
        learned=True,
    )
    mask_same_image: bool = setting(
        True,
        help="pairs with the same image are not negatives of each other",
        learned=True,
    )
    args: tuple[str, ...] = setting(
        (),
        help="settings of a term alone, as NAME=VALUE, or TERM.NAME=VALUE if there are several "
        "terms",
        learned=True,
    )

    def __post_init__(self) -> None:
        parse_terms(self.terms)
        if self.block < 0 or not math.isfinite(self.weight):
            raise ValueError(
                f"loss.block {self.block} must be >= 0 and loss.weight {self.weight} finite"
            )


def from_named_args(
    member: type[Member], words: Sequence[str], *, where: str
) -> Member:
    """An instance of the dataclass ``member``: fields from ``words``, the others with their
    defaults.

    Raises ValueError for a word that is not NAME=VALUE, an unknown field, or a value of another
    type; ``where`` is the option, for the message.
    """
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{where}: {word!r} is not NAME=VALUE")
        try:
            values[name] = json.loads(
                text.lower() if text in ("True", "False") else text
            )
        except ValueError:
            values[name] = text
    return from_plain(member, values, where=f"{where} of {member.__name__}")


def local_world_size() -> int:
    """Number of ranks on this machine as set by DeepSpeed's or torch's launcher; 1 without a
    launcher."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
