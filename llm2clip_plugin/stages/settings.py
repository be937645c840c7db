"""Settings and options of `run`, `finetune-llm` and `embed`, and of training: what both stages
share, and how a resumed run's are compared with its checkpoint's. Read without torch.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llm2clip_plugin.data.sources import SourceConfig
from llm2clip_plugin.evaluate.config import CaptionSetConfig
from llm2clip_plugin.hashes import canonical_json, sha256_text
from llm2clip_plugin.options import Command, unknown
from llm2clip_plugin.text.config import ContrastConfig, EncoderConfig, LoraSettings, PairsConfig
from llm2clip_plugin.train.config import OptimConfig, TrainConfig

# Fields that may differ when a run resumes: they change where, how often and on what hardware it
# runs, not what it learns.
IGNORED_ON_RESUME = """
output_dir resume allow_changed dry_run deepspeed evaluation benchmarks plan tower.architecture
data.cache data.validation data.validation_cache data.clip_cache
data.read.cache_folder data.read.cache_gb data.read.index_folder
loss.block contrast.length_groups
train.save_steps train.save_minutes train.save_total_limit
train.eval_steps train.eval_on_start train.logging_steps train.report_to
train.profile_steps train.profile_all_ranks
train.dataloader_num_workers train.dataloader_prefetch_mb train.tf32 train.skip_bad_batches
train.communication_data_type train.ddp_timeout train.straggler_seconds
train.gradient_checkpointing train.torch_compile
encoder.trust_remote_code
""".split()

# Initial values, which a resumed run takes from its checkpoint; they decide what is learned
# nevertheless.
INITIAL = ("dual.logit_scale_init", "dual.projection_init_std")

# Of the stages' commands, as options.Command takes them. An explicit length or warm-up wins over a
# recipe's.
REPLACES = {
    "train.num_train_epochs": "train.max_steps",
    "optim.warmup_ratio": "optim.warmup_steps",
    "optim.warmup_steps": "optim.warmup_ratio",
}
NEEDS = {"train.num_train_epochs": "not train.max_steps", "plan": "dry_run"}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What the configurations of both training stages share."""

    # checkpoints, metrics.jsonl, run.json and, at the end, what was trained
    output_dir: str = "runs/run"
    deepspeed: str = ""  # DeepSpeed JSON; default ZeRO-1, or ZeRO-0 with fp32
    # auto: this run's newest checkpoint, if any | never | a checkpoint or run folder
    resume: str = "auto"
    # fields that may differ from the checkpoint's, e.g. optim.lr or all of optim
    allow_changed: tuple[str, ...] = ()
    dry_run: bool = False  # print steps, memory and commands, then exit; needs no weights

    @property
    def hash(self) -> str:
        """SHA-256 over the fields that decide what is learned."""
        return sha256_text(canonical_json(flat_essentials(dataclasses.asdict(self))))


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of nested dicts; a list is a leaf, as JSON returns it,
    numbers are floats."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from flat(item, f"{path}.{name}" if path else name)
    else:
        yield path, _plain(value)


def _plain(value: Any) -> Any:
    """4 and 4.0 are the same setting."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def within(name: str, fields: Iterable[str]) -> bool:
    """Whether a dotted name is one of the fields, or in one of them."""
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def flat_essentials(config: dict[str, Any], allowed: tuple[str, ...] = ()) -> dict[str, Any]:
    """The leaves that decide what is learned, without the ``allowed`` ones."""
    return {
        name: value
        for name, value in flat(config)
        if not within(name, (*IGNORED_ON_RESUME, *allowed))
    }


def refuse_changes(
    saved: dict[str, Any], now: dict[str, Any], allowed: tuple[str, ...], *, where: str
) -> None:
    """Raise ValueError naming every field that decides what is learned and differs from the
    checkpoint's."""
    paths = {path for settings in (now, saved) for path, _ in flat(settings)}
    for name in allowed:
        if not any(within(path, [name]) for path in paths):
            raise ValueError(f"--allow-changed {name}: a run has no such field; run.json has all")
    not_compared = (*allowed, *INITIAL)
    old = flat_essentials(saved, not_compared)
    new = flat_essentials(now, not_compared)
    listed = ""
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    for name in changed:
        old_value = old.get(name, "absent")
        new_value = new.get(name, "absent")
        listed += f"\n  {name}: {old_value!r} in the checkpoint, {new_value!r} in this run"
    if changed:
        raise ValueError(
            f"{where} was saved with other settings:{listed}\n"
            "restore them, choose another --output, or accept the changes with "
            f"--allow-changed {' '.join(changed)}"
        )


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks, from the launcher's environment; (0, 1) without
    a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def plan_or_train(
    dry_run: bool, plan: Callable[[], str], train: Callable[[], Path], result: str
) -> int:
    """Print the plan, or train and print where the ``result`` is, in both cases on rank 0; returns
    exit status 0."""
    first_rank = rank_and_world()[0] == 0
    if dry_run:
        if first_rank:
            print(plan(), flush=True)
        return 0
    path = train()
    if first_rank:
        print(f"{result}: {path}")
    return 0


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What --dry-run assumes while there is no data."""

    # captioned images, or pairs of texts; the size of the paper's smaller set
    images: int = 15_000_000
    gpu_gib: float = 80.0  # a GPU's memory in GiB: the plan has the largest micro-batches that fit


class Teacher(NamedTuple):
    """An LLM that the paper (LLM2CLIP, arXiv 2411.04997) trained with, before and after stage 1."""

    base: str  # Hub id of the LLM that stage 1 starts from
    released: str  # Hub id of the LLM that the authors fine-tuned
    width: int  # of an embedding, and so of a cache


TEACHERS = {
    "llama-1b": Teacher(
        "meta-llama/Llama-3.2-1B-Instruct",
        "microsoft/LLM2CLIP-Llama-3.2-1B-Instruct-CC-Finetuned",
        2048,
    ),
    "llama-8b": Teacher(
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned",
        4096,
    ),
}


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(SourceConfig):
    """One training, from checked data to an exported tower."""

    llm: str  # folder or Hub id of the teacher LLM
    # vision tower to start from: a folder, a Hub id, or whatever `llm2clip import` reads
    tower: str
    output: str  # folder for everything that the run makes
    validation: float = 0.1  # fraction of the data that is held out and measured with
    by: str = ""  # field of the samples' JSON: samples with one value are on one side of the split
    adapter: str = ""  # existing LoRA adapter; skips stage 1
    # fine-tune the LLM; auto: if most images have several captions that do not contain one another
    stage1: bool | Literal["auto"] = "auto"
    num_train_epochs: float = 4.0  # passes over the data in stage 2
    global_batch: int = 0  # pairs per step of both stages; 0: 256, fewer for less than 4096 images
    # pairs per forward pass and GPU; 0: all at once. Smaller values use gradient caching
    micro_batch: int = 0
    # of stage 2; "": bf16 on GPUs, fp16 before Ampere, else fp32
    precision: Literal["", "fp32", "bf16", "fp16"] = ""
    # more options of train-tower, as one text: --tower-options="--freeze-first-blocks 8"
    tower_options: str = ""
    num_gpus: int = 1  # processes of the training stages
    trust_remote_code: bool = False  # run the Python code in the LLM's folder: read it first
    # .jsonl of image, question and answer: what a LLaVA of each tower, before and after, is asked
    questions: str = ""
    # language model of these two LLaVAs, whose projectors are trained on the captions
    llava_llm: str = ""
    # more options of LLaVA's pretraining, as one text: --llava-options="--learning_rate 2e-3"
    llava_options: str = ""
    dry_run: bool = False  # print the stages with their commands, and run none

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.validation < 1:
            raise ValueError(
                f"validation is {self.validation:g}, "
                "expected a fraction between 0 and 1, such as 0.1"
            )
        if not 0 < self.num_train_epochs < math.inf:
            raise ValueError(
                f"--num-train-epochs is {self.num_train_epochs:g}, expected a number above 0"
            )
        if self.num_gpus < 1:
            raise ValueError(f"--num-gpus is {self.num_gpus}, expected at least 1")
        batches = {"--global-batch": self.global_batch, "--micro-batch": self.micro_batch}
        for option, value in batches.items():
            if value < 0:
                raise ValueError(
                    f"{option} is {value}, expected at least 0 (0: chosen by the number of images)"
                )
        if self.stage1 is True and self.adapter:
            raise ValueError(
                "--stage1 trains an adapter, and --adapter gives one that is trained; "
                "omit one of them"
            )
        if bool(self.questions) != bool(self.llava_llm):
            raise ValueError(
                "--questions and --llava-llm need each other: "
                "the questions, and LLaVA's language model"
            )


RUN = Command(
    name="run",
    example="llm2clip run photos-tars --llm meta-llama/Llama-3.2-1B-Instruct "
    "--tower openai/clip-vit-base-patch16 --output runs/photos",
    about="All stages in order: check the data, hold out a part, fine-tune the LLM on captions, "
    "embed, train the tower, measure it against the start tower, export it, and write a page about "
    "the run. Each stage is a command, which is printed. Rerun the same command to resume.",
    settings=PipelineConfig,
    arguments="path",
    everyday="llm tower output image-folder fields validation by adapter stage1 num-train-epochs "
    "questions llava-llm num-gpus dry-run",
    hidden="weight shuffle_window kinds languages",
)


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """One pass of a data set's captions through a frozen LLM (stage 1.5)."""

    source: SourceConfig  # the captioned images
    encoder: EncoderConfig  # the LLM
    cache: str = ""  # folder of the cache; "": embeddings-<fingerprint> in the data's folder
    # storage; int8: with a scale for each row, half the size
    dtype: Literal["float16", "int8"] = "float16"
    tokens_per_batch: int = 0  # tokens of a batch, padding included; 0: chosen by device
    # torch.compile the LLM's blocks; the first batches wait for it, up to a minute
    torch_compile: bool = False
    dry_run: bool = False  # print the number of captions and the size of the cache, then exit
    # replace cached captions that the data, as it is read now, does not have
    overwrite: bool = False
    # write nothing: read the full cache, compare it with the data, embed a sample again
    verify: bool = False


EMBED = Command(
    name="embed",
    example="llm2clip embed /data/cc3m --llm meta-llama/Llama-3.2-1B-Instruct "
    "--adapter runs/llm/adapter",
    about="Stage 1.5: embed the captions of DATA with a frozen LLM and cache the embeddings. Rerun "
    "the same command to resume; shards that are complete are skipped.",
    settings=EmbedConfig,
    arguments="source.path",
    everyday="llm adapter preset cache fields image-folder dtype load-in-4bit overwrite verify "
    "dry-run",
    hidden="source.weight source.shuffle_window source.kinds source.languages",
)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """One training run of an LLM's adapter (stage 1)."""

    output_dir: str = "runs/llm"  # checkpoints, metrics.jsonl, run.json and, at the end, adapter/
    pairs: PairsConfig = field(default_factory=PairsConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    # LoRA adapters (folders or Hub ids) that are merged into the LLM, in this order, before the new
    # one is added
    start_adapters: tuple[str, ...] = ()
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    # betas, clipping and no weight decay are defaults of Hugging Face's Trainer
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=2e-4,
            weight_decay=0.0,
            layer_decay=1.0,
            betas=(0.9, 0.999),
            max_grad_norm=1.0,
            warmup_steps=300,
        )
    )
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(global_batch=512, num_train_epochs=1.0)
    )
    evaluation: CaptionSetConfig = field(default_factory=CaptionSetConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)

    def __post_init__(self) -> None:
        if self.encoder.post_file:
            raise ValueError(
                f"post_file {self.encoder.post_file} has no effect in stage 1; "
                "set it in `llm2clip embed`"
            )
        if self.train.gradient_checkpointing == "auto":
            raise ValueError(
                "--gradient-checkpointing auto is for train-tower; "
                "set true or false for finetune-llm"
            )


INSTRUCTION = "Given a caption of an image, find another caption of the same image: "
# E5_cc3m.py:31-34, joined to the query with "; " as in its line 131
OF_SHORT = "Given a sentence, retrieve a detailed relevant sentence; "
OF_LONG = "Given a detailed sentence, retrieve a short relevant sentence; "
# The authors merge a third one, of their own masked next-token prediction on captions, which they
# did not publish.
LLM2VEC_8B = (
    "McGill-NLP/LLM2Vec-Meta-Llama-3-8B-Instruct-mntp",
    "McGill-NLP/LLM2Vec-Meta-Llama-3-8B-Instruct-mntp-supervised",
)


def _llama(teacher: str, query_prompt: str) -> EncoderConfig:
    return EncoderConfig(
        llm=TEACHERS[teacher].base, preset="llm2clip-llama3", query_prompt=query_prompt
    )


def _paper(
    name: str, encoder: EncoderConfig, start_adapters: tuple[str, ...] = ()
) -> FinetuneConfig:
    """The authors' settings; captions are the user's."""
    common = _common(name, encoder, gradient_checkpointing=True)
    return dataclasses.replace(
        common,
        start_adapters=start_adapters,
        pairs=PairsConfig(
            pair_kinds=("short:long", "long:short"),
            mix_kinds=True,  # E5_cc3m.py:72-81, a coin for each pair
            instructions=(f"short={OF_SHORT}", f"long={OF_LONG}"),
            random_negatives=True,  # E5_cc3m.py:83-88
            cut_queries=True,  # their tokenizer truncates
        ),
        # HardNegativeNLLLoss of llm2vec: queries retrieve positives, and nothing is masked
        contrast=ContrastConfig(scale=50.0, symmetric=False, mask_same=False),
        optim=dataclasses.replace(common.optim, schedule="linear"),  # Trainer's default
    )


def _common(name: str, encoder: EncoderConfig, *, gradient_checkpointing: bool) -> FinetuneConfig:
    """What both sides have in common, beside the default optimizer, LoRA, scale, batch, length."""
    default = FinetuneConfig()
    return dataclasses.replace(
        default,
        output_dir=f"runs/{name}",
        encoder=dataclasses.replace(encoder, max_tokens=512, compute_dtype="bfloat16"),
        train=dataclasses.replace(
            default.train,
            gradient_checkpointing=gradient_checkpointing,
            save_steps=500,
            dataloader_num_workers=2,
        ),
    )


LLM_RECIPES: dict[str, Callable[[], FinetuneConfig]] = {
    # any instruct LLM (set --llm); a text is one user turn of its chat template
    "paper": partial(
        _paper,
        "paper",
        EncoderConfig(chat_template="user", include_bos=False, query_prompt=OF_SHORT),
    ),
    "paper-llama-8b": partial(_paper, "paper-llama-8b", _llama("llama-8b", OF_SHORT), LLM2VEC_8B),
    # LLM2Vec has no adapters for it
    "paper-llama-1b": partial(_paper, "paper-llama-1b", _llama("llama-1b", OF_SHORT)),
    "llama-8b": partial(
        _common, "llama-8b", _llama("llama-8b", INSTRUCTION), gradient_checkpointing=True
    ),
    "llama-1b": partial(
        _common, "llama-1b", _llama("llama-1b", INSTRUCTION), gradient_checkpointing=False
    ),
}


def llm_recipe(name: str) -> FinetuneConfig:
    """The recipe of that name, "" for the default; ValueError lists the known ones."""
    if not name:
        return FinetuneConfig()
    if name not in LLM_RECIPES:
        raise ValueError(unknown("recipe", name, LLM_RECIPES))
    return LLM_RECIPES[name]()


FINETUNE_LLM = Command(
    name="finetune-llm",
    example="llm2clip finetune-llm /data/cc3m --llm meta-llama/Llama-3.2-1B-Instruct "
    "--output runs/llm",
    about="Stage 1: fine-tune an LLM contrastively on captions, two of an image for each pair. "
    "Rerun the same command to resume.",
    settings=FinetuneConfig,
    default=lambda extras: llm_recipe(extras.get("recipe", "")),
    arguments="pairs.data",
    everyday="recipe llm pair-kinds fields output global-batch micro-batch lr num-train-epochs "
    "max-steps load-in-4bit deepspeed dry-run",
    shown={
        "pairs.weights": "data-weights",
        "evaluation": "evaluation.",
        "evaluation.captions": "validation",
        "lora": "lora-",
        "lora.r": "lora-rank",
        "plan.images": "assumed-samples",
    },
    extras={
        "recipe": "the authors' settings: paper, paper-llama-8b, paper-llama-1b; "
        "ours on the paper's LLMs: llama-8b, llama-1b"
    },
    # the first is read by the tower's training alone, as are the others; an adapter has one
    # learning rate
    hidden="pairs.read.shuffle_window train.max_broken train.dataloader_prefetch_mb "
    "train.ema_decay optim.layer_decay optim.full_lr optim.head_lr",
    replaces=REPLACES,
    needs={
        **NEEDS,
        **dict.fromkeys(("train.eval_steps", "evaluation"), "evaluation.captions"),
        **dict.fromkeys(("lora.r", "lora.alpha", "lora.targets"), "not encoder.adapter"),
    },
)
