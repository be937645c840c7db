"""The settings of stage 1 (pairs, adapter, loss) and of an LLM as caption encoder; read without
torch."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip_plugin.contracts import EncoderCard, TeacherIdentity
from llm2clip_plugin.data.sources import ReadConfig
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.hub import can_only_be_a_path, split_revision
from llm2clip_plugin.options import Command, command, section, setting, unknown
from llm2clip_plugin.text.frames import CAPTION

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """LoRA adapter of the LLM."""

    r: int = setting(16, help="rank", option="rank", learned=True)
    alpha: int = setting(
        32,
        help="the update is scaled by alpha / r, or by alpha / sqrt(r) with rslora",
        learned=True,
    )
    dropout: float = setting(0.05, help="dropout on the adapter's input", learned=True)
    targets: tuple[str, ...] = setting(
        (ALL_LINEAR,),
        help="names of the linear layers to adapt; all-linear: every linear layer of the blocks",
        learned=True,
    )
    dora: bool = setting(
        False, help="weight-decomposed LoRA (Liu et al. 2024)", learned=True
    )
    rslora: bool = setting(
        False, help="rank-stabilized scale (Kalajdzievski 2023)", learned=True
    )

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"r {self.r} and alpha {self.alpha} must be at least 1, "
                f"dropout {self.dropout} in [0, 1)"
            )


@dataclass(frozen=True, kw_only=True)
class ContrastConfig:
    """The loss of caption-contrastive training."""

    scale: float = setting(
        50.0,
        help="logit scale (1 / temperature), as in the paper; the initial value if it is learned",
        learned=True,
    )
    learn_scale: bool = setting(
        False, help="learn the logit scale, up to 100", learned=True
    )
    length_groups: int = setting(
        4,
        help="groups of similar length in which a micro-batch's texts are padded: less padding, "
        "same result",
        learned=False,
    )
    mask_same: bool = setting(
        True,
        help="pairs with a common text or image are not negatives of each other",
        learned=True,
    )
    symmetric: bool = setting(
        True,
        help="half of the loss retrieves queries from positives; without, all retrieves positives",
        learned=True,
    )

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 100 or self.length_groups < 1:
            raise ValueError(
                f"scale {self.scale} must be in (0, 100], "
                f"length_groups {self.length_groups} at least 1"
            )


@dataclass(frozen=True)
class PairKind:
    """Kinds of the query and the positive caption, and how often they are drawn."""

    query: str
    positive: str
    weight: float = 1.0

    @property
    def of_positive(self) -> str:
        """The kind of the positive caption."""
        return self.query if self.positive == "same" else self.positive

    def __str__(self) -> str:
        return f"{self.query}:{self.positive}"


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Training data, and which two texts form a pair."""

    data: tuple[str, ...] = setting(
        (),
        help="captioned images, as for the tower, or a .jsonl of text pairs with the fields query "
        "and positive, optionally negative (in all rows or none) and instruction (text before the "
        "query, in place of --query-prompt)",
        option="data",
        learned=True,
        per_host=True,
    )
    weights: tuple[float, ...] = setting(
        (),
        help="how often a sample of each is drawn; empty: all equal",
        option="data-weights",
        learned=True,
    )
    pair_kinds: tuple[str, ...] = setting(
        ("short:long",),
        help="kinds of captions that form pairs: QUERY:POSITIVE[=WEIGHT], or KIND:same for two "
        "of a kind",
        learned=True,
    )
    mix_kinds: bool = setting(
        False,
        help="draw a kind for each pair; without, all pairs of a batch are of one kind",
        learned=True,
    )
    instructions: tuple[str, ...] = setting(
        (),
        help="KIND=TEXT: text before the queries of this kind of caption, not pooled; other kinds "
        "have --query-prompt",
        learned=True,
    )
    random_negatives: bool = setting(
        False,
        help="add a hard negative to each pair of captions: one of the positive's kind, of a "
        "random other image",
        learned=True,
    )
    lists: tuple[str, ...] = setting(
        (),
        help="KIND=LOW:HIGH: captions of this kind are comma-separated; draw LOW to HIGH items",
        learned=True,
    )
    group: str = setting(
        "",
        help="field of a sample's JSON: samples with equal values are not used as negatives of "
        "each other",
        learned=True,
    )
    cut_queries: bool = setting(
        False,
        help="truncate queries above --max-tokens; otherwise they are an error before training",
        learned=True,
    )
    # how caption sets are read; stage 1 has an order of its own, without windows
    read: ReadConfig = section(ReadConfig(shuffle_window=0), hidden=("shuffle_window",))

    def __post_init__(self) -> None:
        if self.weights and len(self.weights) != len(self.data):
            raise ValueError(
                f"{len(self.weights)} weights for {len(self.data)} data sets; "
                "pass one for each, or none"
            )
        if any(not weight > 0 for weight in self.weights):
            raise ValueError(f"weights are {self.weights}, expected numbers above 0")
        # each raises for a wrong form
        _ = (self.kinds, self.drawn_items, self.instruction_of)

    @property
    def kinds(self) -> tuple[PairKind, ...]:
        """``pair_kinds`` as they are read; raises ValueError for another form."""
        if not self.pair_kinds:
            raise ValueError(
                "no pair kinds configured; set at least one with --pair-kinds, such as short:long"
            )
        kinds = []
        for text in self.pair_kinds:
            match = re.fullmatch(r"([^:=]+):([^:=]+)(?:=(\d+\.?\d*|\.\d+))?", text)
            if match is None or float(match[3] or 1) == 0:
                raise ValueError(
                    f"invalid pair kind {text!r}; expected QUERY:POSITIVE[=WEIGHT]: short:long=0.5"
                )
            kinds.append(PairKind(match[1], match[2], float(match[3] or 1)))
        return tuple(kinds)

    @property
    def drawn_items(self) -> dict[str, tuple[int, int]]:
        """Of ``lists``: kind -> least and most items drawn; raises ValueError for another form."""
        bounds = {}
        for text in self.lists:
            match = re.fullmatch(r"([^=]+)=(\d+):(\d+)", text)
            if match is None or not 0 < int(match[2]) <= int(match[3]):
                raise ValueError(
                    f"invalid list {text!r}; expected KIND=LOW:HIGH, such as keywords=2:6"
                )
            bounds[match[1]] = (int(match[2]), int(match[3]))
        return bounds

    @property
    def instruction_of(self) -> dict[str, str]:
        """Of ``instructions``: kind of the query -> text; raises ValueError for another form."""
        parsed: dict[str, str] = {}
        for instruction in self.instructions:
            kind, equal, text = instruction.partition("=")
            if kind and equal:
                parsed[kind] = text
        if len(parsed) != len(self.instructions):
            raise ValueError(
                f"instructions {list(self.instructions)} must be KIND=TEXT, "
                "one for each kind of query"
            )
        return parsed


# The settings that determine a caption's embedding, and where they come from: options, presets, the
# encoder card.

ATTENTIONS = ("bidirectional", "causal")
POOLINGS = ("mean", "last")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")


PRESETS: dict[str, dict[str, Any]] = {
    # microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned and ...-Llama-3.2-1B-..., which embed as
    # LLM2Vec does with a Llama 3 Instruct: one user turn, mean over the caption's tokens and the
    # end of the turn, without an instruction
    "llm2clip-llama3": {
        "attention": "bidirectional",
        "pooling": "mean",
        "chat_template": "<|start_header_id|>user<|end_header_id|>\n\n{caption}<|eot_id|>",
        "include_bos": False,
    },
    # LLM2Vec's adapters and checkpoints of base models
    "llm2vec": {"attention": "bidirectional", "pooling": "mean", "include_bos": False},
    # most LLMs that were trained to embed text, such as Qwen3-Embedding and E5-Mistral;
    # --query-prompt is their own
    "last-token": {"attention": "causal", "pooling": "last"},
    "mean": {"attention": "bidirectional", "pooling": "mean"},  # the default
}


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """An LLM as caption encoder. The card of the adapter or of the LLM's folder, if there is one,
    takes precedence."""

    llm: str = setting(
        "", help="path or Hub id of a decoder LLM", learned=True, per_host=True
    )
    preset: str = setting(
        "",
        help="settings of checkpoints without a card: llm2clip-llama3, llm2vec, last-token, mean; "
        '"" for none',
        learned=True,
    )
    revision: str = setting(
        "",
        help='commit, tag or branch on the Hub; "" for the default',
        learned=True,
    )
    adapter: str = setting(
        "",
        help='folder of a PEFT adapter; "" for none',
        learned=True,
        per_host=True,
    )
    attention: str = setting(
        "bidirectional", help="bidirectional | causal", learned=True
    )
    pooling: str = setting(
        "mean", help="mean over the tokens | last: the last token", learned=True
    )
    layer: int = setting(
        -1,
        help="hidden state to pool: 0 token embeddings, 1 after the first block, ..., -1 after the "
        "final norm",
        learned=True,
    )
    prompt: str = setting(
        "", help="text before every caption; not pooled", learned=True
    )
    query_prompt: str = setting(
        "",
        help="text before a query, in training and caption retrieval; not pooled",
        learned=True,
    )
    chat_template: str = setting(
        "",
        help='"" for none; "user": one user turn of the tokenizer\'s template; or a text with '
        "{caption}",
        learned=True,
    )
    include_bos: bool = setting(
        True,
        help="include the BOS token, if the tokenizer adds one, in mean pooling",
        learned=True,
    )
    post_file: str = setting(
        "",
        help="post-processing that `evaluate captions --search` wrote: centering, removed "
        "components",
        learned=True,
    )
    max_tokens: int = setting(
        512,
        help="tokens of an input, template and prompt included; longer captions are truncated",
        unit="tokens",
        learned=True,
    )
    compute_dtype: str = setting(
        "auto",
        help="float32 | bfloat16 | float16 | auto: bfloat16 on GPUs, the faster one on CPUs",
        learned=True,
    )
    load_in_4bit: bool = setting(
        False,
        help="NF4 with double quantization (bitsandbytes)",
        learned=True,
    )
    trust_remote_code: bool = setting(
        False,
        help="run the Python code in the folder of an LLM that transformers does not have: read it "
        "first",
        learned=False,
    )

    def __post_init__(self) -> None:
        repository, revision = split_revision(self.llm)
        if (
            revision
            and not can_only_be_a_path(self.llm)
            and not Path(self.llm).exists()
        ):
            raise ValueError(
                f"--llm {self.llm}: give the revision as --llm {repository} --revision {revision}"
            )
        if self.preset and self.preset not in PRESETS:
            raise ValueError(unknown("preset", self.preset, PRESETS))
        choices = {
            "attention": ATTENTIONS,
            "pooling": POOLINGS,
            "compute_dtype": COMPUTE_DTYPES,
        }
        for name, values in choices.items():
            value = getattr(self, name)
            if value not in values:
                raise ValueError(unknown(name, value, values))
        if self.max_tokens < 4:
            raise ValueError(f"max_tokens is {self.max_tokens}; expected at least 4")
        if (
            self.chat_template not in ("", "user")
            and self.chat_template.count(CAPTION) != 1
        ):
            raise ValueError(
                f"chat_template {self.chat_template!r} must be empty, user, "
                f"or a text with one {CAPTION}"
            )


# of EncoderConfig, in the identity of a teacher and, with query_prompt, in the encoder card
IDENTITY_SETTINGS = (
    "attention",
    "pooling",
    "layer",
    "prompt",
    "chat_template",
    "include_bos",
    "max_tokens",
)
CARD_SETTINGS = (*IDENTITY_SETTINGS, "query_prompt")


def find_card(folder: str) -> EncoderCard | None:
    """The encoder card in the folder of an adapter or LLM; None without one."""
    path = Path(folder) / EncoderCard.FILE
    return EncoderCard.read(path) if folder and path.is_file() else None


def effective(
    config: EncoderConfig, folder: Path, adapter: Path | None = None
) -> tuple[EncoderConfig, EncoderCard | None]:
    """The configuration with what its preset and the card of the adapter or LLM say, and the card.
    Raises ContractError for a setting that contradicts them, ValueError for a sentence-transformers
    model by default."""
    card = find_card(str(adapter or folder))
    unset = (config.pooling, config.attention) == ("mean", "bidirectional")
    if (
        card is None
        and not config.preset
        and unset
        and (folder / "modules.json").is_file()
    ):
        raise ValueError(
            f"{folder}: the pooling and prompts of a sentence-transformers model are not read; "
            "set --preset last-token or --preset mean, or --pooling and --attention, "
            "and its prompts"
        )
    if config.preset:
        settled = apply_settings(
            config, PRESETS[config.preset], f"preset {config.preset} sets"
        )
        config = dataclasses.replace(settled, preset="")
    if card is not None:
        settings = {name: vars(card)[name] for name in CARD_SETTINGS}
        reason = f"{config.adapter or config.llm} was trained with"
        config = apply_settings(config, settings, reason)
    return config, card


def apply_settings(
    config: EncoderConfig, settings: dict[str, Any], reason: str
) -> EncoderConfig:
    """The configuration with ``settings``, which an LLM was trained with. Raises ContractError,
    with both values and ``reason``, for an option that differs from its default and from them."""
    for name, value in settings.items():
        configured = getattr(config, name)
        default = getattr(EncoderConfig, name)
        if configured not in (default, value):
            raise ContractError(
                f"{name} is {configured!r}, but {reason} {value!r}; omit {name}"
            )
    return dataclasses.replace(config, **settings)


# The options of ``llm2clip export-llm``.


LLM_FORMATS = ("transformers", "sentence-transformers")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export a fine-tuned LLM."""

    output: str = setting(help="folder to write")
    format: str = setting(
        "transformers",
        help="transformers: for this package and AutoModel; sentence-transformers: also for "
        "SentenceTransformer(DIR)",
    )
    overwrite: bool = setting(False, help="replace an existing folder")
    encoder: EncoderConfig = section(EncoderConfig())

    def __post_init__(self) -> None:
        if self.format not in LLM_FORMATS:
            raise ValueError(unknown("--format", self.format, LLM_FORMATS))


EXPORT_LLM = Command(
    name="export-llm",
    example="llm2clip export-llm --llm meta-llama/Llama-3.2-1B-Instruct "
    "--adapter runs/llm/adapter --output llms/cc3m",
    about="Export a fine-tuned LLM: merged weights and how they embed. The folder is reloaded, and "
    "its embeddings are compared, before it counts.",
    settings=ExportConfig,
    everyday="llm adapter preset output format overwrite",
)


def embed_command(path: str, identity: TeacherIdentity | None) -> str:
    """The command that creates the cache of ``path`` with a teacher, as far as one is known."""
    words = [
        "embed",
        path,
        "--llm",
        "PATH_OR_HUB_ID" if identity is None else identity.llm,
    ]
    if identity is not None and identity.adapter_sha256:
        words += ["--adapter", identity.adapter or "ADAPTER_FOLDER"]
    return command(*words)
