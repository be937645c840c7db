"""FinetuneConfig: everything that decides an LLM's training. The sections are declared where they are read."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from llm2clip_plugin.contracts import canonical_json, sha256_text
from llm2clip_plugin.evaluate.config import CaptionSetConfig
from llm2clip_plugin.options import Command, unknown
from llm2clip_plugin.stages.settings import NEEDS, REPLACES, TEACHERS, PlanConfig, TrainingConfig
from llm2clip_plugin.text.config import ContrastConfig, EncoderConfig, LoraSettings, PairsConfig
from llm2clip_plugin.train.config import OptimConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """One training run of an LLM's adapter (stage 1)."""

    output_dir: str = "runs/llm"  # checkpoints, metrics.jsonl, run.json and, at the end, adapter/
    pairs: PairsConfig = field(default_factory=PairsConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    # LoRA adapters (folders or Hub ids) that are merged into the LLM, in this order, before the new one is added
    start_adapters: tuple[str, ...] = ()
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    # betas, clipping and no weight decay are defaults of Hugging Face's Trainer
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=2e-4, weight_decay=0.0, layer_decay=1.0, betas=(0.9, 0.999), max_grad_norm=1.0, warmup_steps=300
        )
    )
    train: TrainConfig = field(default_factory=lambda: TrainConfig(global_batch=512, num_train_epochs=1.0))
    evaluation: CaptionSetConfig = field(default_factory=CaptionSetConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)

    def __post_init__(self) -> None:
        if self.encoder.post_file:
            raise ValueError(f"post_file {self.encoder.post_file} has no effect in stage 1; set it in `llm2clip embed`")

    @property
    def hash(self) -> str:
        """SHA-256 over all fields."""
        return sha256_text(canonical_json(dataclasses.asdict(self)))


# Stage 1's named runs, ``llm2clip finetune-llm --recipe NAME``: the authors' settings, and ours.

INSTRUCTION = "Given a caption of an image, find another caption of the same image: "
# E5_cc3m.py:31-34, joined to the query with "; " as in its line 131
OF_SHORT = "Given a sentence, retrieve a detailed relevant sentence; "
OF_LONG = "Given a detailed sentence, retrieve a short relevant sentence; "
# The authors merge a third one, of their own masked next-token prediction on captions, which they did not publish.
LLM2VEC_8B = (
    "McGill-NLP/LLM2Vec-Meta-Llama-3-8B-Instruct-mntp",
    "McGill-NLP/LLM2Vec-Meta-Llama-3-8B-Instruct-mntp-supervised",
)


def paper() -> FinetuneConfig:
    """The authors' settings for any instruct LLM (set --llm); a text is one user turn of its chat template."""
    return _paper("paper", EncoderConfig(chat_template="user", include_bos=False, query_prompt=OF_SHORT))


def paper_llama_8b() -> FinetuneConfig:
    """The authors' settings and LLM: Llama 3 8B Instruct with LLM2Vec's two adapters merged."""
    return dataclasses.replace(_paper("paper-llama-8b", _llama("llama-8b", OF_SHORT)), start_adapters=LLM2VEC_8B)


def paper_llama_1b() -> FinetuneConfig:
    """The authors' settings on Llama 3.2 1B Instruct, for which LLM2Vec has no adapters."""
    return _paper("paper-llama-1b", _llama("llama-1b", OF_SHORT))


def llama_1b() -> FinetuneConfig:
    """Ours on Llama 3.2 1B Instruct: embeddings 2048 wide."""
    return _common("llama-1b", _llama("llama-1b", INSTRUCTION), gradient_checkpointing=False)


def llama_8b() -> FinetuneConfig:
    """Ours on Llama 3 8B Instruct: embeddings 4096 wide."""
    return _common("llama-8b", _llama("llama-8b", INSTRUCTION), gradient_checkpointing=True)


def _llama(teacher: str, query_prompt: str) -> EncoderConfig:
    known = TEACHERS[teacher]
    return EncoderConfig(llm=known.base, preset=known.preset, query_prompt=query_prompt)


def _paper(name: str, encoder: EncoderConfig) -> FinetuneConfig:
    """The authors' settings; captions are the user's."""
    common = _common(name, encoder, gradient_checkpointing=True)
    return dataclasses.replace(
        common,
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
    """What both sides have in common, beside the default optimizer, LoRA, scale, batch and length."""
    default = FinetuneConfig()
    return dataclasses.replace(
        default,
        output_dir=f"runs/{name}",
        encoder=dataclasses.replace(encoder, max_tokens=512, compute_dtype="bfloat16"),
        train=dataclasses.replace(
            default.train, gradient_checkpointing=gradient_checkpointing, save_steps=500, dataloader_num_workers=2
        ),
    )


RECIPES: tuple[Callable[[], FinetuneConfig], ...] = (paper, paper_llama_8b, paper_llama_1b, llama_8b, llama_1b)
LLM_RECIPES = {make.__name__.replace("_", "-"): make for make in RECIPES}


def llm_recipe(name: str) -> FinetuneConfig:
    """The recipe of that name, "" for the default; ValueError lists the known ones."""
    if not name:
        return FinetuneConfig()
    if name not in LLM_RECIPES:
        raise ValueError(unknown("recipe", name, LLM_RECIPES))
    return LLM_RECIPES[name]()


FINETUNE_LLM = Command(
    name="finetune-llm",
    example="llm2clip finetune-llm /data/cc3m --llm meta-llama/Llama-3.2-1B-Instruct --output runs/llm",
    about="Stage 1: fine-tune an LLM contrastively on captions, two of an image for each pair. Rerun the same command "
    "to resume.",
    settings=FinetuneConfig,
    default=lambda extras: llm_recipe(extras.get("recipe", "")),
    arguments="pairs.data",
    everyday="recipe llm pair-kinds fields output global-batch micro-batch lr num-train-epochs max-steps load-in-4bit "
    "deepspeed dry-run",
    shown={
        "pairs.weights": "data-weights",
        "evaluation": "evaluation.",
        "evaluation.captions": "validation",
        "lora": "lora-",
        "lora.r": "lora-rank",
        "plan.images": "assumed-samples",
    },
    extras={
        "recipe": "the authors' settings: paper, paper-llama-8b, paper-llama-1b; ours on the paper's LLMs: llama-8b, "
        "llama-1b"
    },
    # the first is read by the tower's training alone, as are the others; an adapter has one learning rate
    hidden="pairs.read.shuffle_window train.max_broken train.torch_compile train.dataloader_prefetch_mb "
    "train.ema_decay optim.layer_decay optim.full_lr optim.head_lr",
    replaces=REPLACES,
    needs={
        **NEEDS,
        **dict.fromkeys(("train.eval_steps", "evaluation"), "evaluation.captions"),
        **dict.fromkeys(("lora.r", "lora.alpha", "lora.targets"), "not encoder.adapter"),
    },
)
