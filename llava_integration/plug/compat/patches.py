"""What LLaVA's code needs of today's libraries, one function for each thing that has changed.

`llava_llama` is the first of LLaVA's modules that every program imports: what concerns all of them
is completed there.
"""

import contextlib
import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava_integration.plug.compat.completion import TRAINER, completes, replaces
from llm2clip_plugin.atomic import write_text

# transformers 5 alone has some of the names.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false


ARCH = "llava.model.llava_arch"
LLAMA = "llava.model.language_model.llava_llama"
MISTRAL = "llava.model.language_model.llava_mistral"

# Models: loading, generation


@completes(LLAMA, "before", transformers=">=5")
def loading_options(module: Any) -> None:
    """Options of ``from_pretrained`` whose meaning changed.

    ``torch_dtype=None`` (LLaVA trains in fp16 or fp32) meant float32; it now means the dtype of the
    file, which for Vicuna is float16: its weights could not be trained with a loss scale, and lose
    their small updates. ``load_in_8bit`` and ``load_in_4bit`` are gone: only
    ``quantization_config`` says so; other weights were float16. ``llava.train.train_mem`` asks for
    FlashAttention 2, which is hard to install with today's torch; where it is missing, torch's sdpa
    attention, which contains the same algorithm, takes its place.
    """
    from transformers import PreTrainedModel

    @replaces(PreTrainedModel, "from_pretrained")
    def from_pretrained(
        original: Any, cls: Any, *arguments: Any, **options: Any
    ) -> Any:
        return original(cls, *arguments, **options_of_5(options))


def options_of_5(options: dict[str, Any]) -> dict[str, Any]:
    """The options of ``from_pretrained`` as transformers 5 takes them."""
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_flash_attn_2_available

    if (
        options.get("attn_implementation") == "flash_attention_2"
        and not is_flash_attn_2_available()
    ):
        options["attn_implementation"] = "sdpa"
        if os.environ.get("RANK", "0") == "0":
            print(
                "llm2clip: flash-attn is not installed; using sdpa attention",
                file=sys.stderr,
            )
    bits = {
        name: options.pop(name)
        for name in ("load_in_8bit", "load_in_4bit")
        if name in options
    }
    if any(bits.values()) and options.get("quantization_config") is None:
        options["quantization_config"] = BitsAndBytesConfig(**bits)
    says_dtype = (
        options.get("torch_dtype") is not None or options.get("dtype") is not None
    )
    if not says_dtype and any(bits.values()):
        options["torch_dtype"] = torch.float16
    elif not says_dtype and "torch_dtype" in options:
        options["torch_dtype"] = torch.float32
    if "torch_dtype" in options:
        options["dtype"] = options.pop("torch_dtype")
    return options


@completes(LLAMA, "after", transformers=">=5")
@completes(MISTRAL, "after", transformers=">=5")
def language_models(module: Any) -> None:
    """LLaVA's Llama and its Mistral: see `complete_generation` and `complete_saving`."""
    kind = "Mistral" if module.__name__ == MISTRAL else "Llama"
    complete_generation(
        getattr(module, f"Llava{kind}ForCausalLM"),
        getattr(module, f"{kind}ForCausalLM"),
    )
    config = module.LlavaMistralConfig if kind == "Mistral" else module.LlavaConfig
    complete_saving(getattr(module, f"Llava{kind}ForCausalLM"), config)


def complete_generation(model_class: Any, parent: Any) -> None:
    """Give ``model_class``, LLaVA's subclass of ``parent``, the cache under the name that either
    knows.

    transformers 5.24 calls a model's cache ``cache`` instead of ``past_key_values``. And since
    4.38, what is generated from embeddings no longer begins with <s>, on which LLaVA's stopping
    criteria count.
    """
    bases = model_class.__bases__
    model_class.__bases__ = tuple(
        between(parent) if base is parent else base for base in bases
    )

    @replaces(model_class, "forward")
    def forward(
        original: Any, self: Any, *arguments: Any, cache: Any = None, **options: Any
    ) -> Any:
        if cache is not None:
            options["past_key_values"] = cache
        return original(self, *arguments, **options)


def between(parent: Any) -> Any:
    """A class between LLaVA's model and ``parent``: what LLaVA's methods pass to ``super()``."""
    import torch

    parameters = inspect.signature(parent.forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"

    def cached(values: Any) -> dict[str, Any]:
        return {} if values is None else {name: values}

    class GenerationOfToday(parent):
        def forward(
            self, *arguments: Any, past_key_values: Any = None, **options: Any
        ) -> Any:
            return super().forward(*arguments, **options, **cached(past_key_values))

        def prepare_inputs_for_generation(
            self, *arguments: Any, past_key_values: Any = None, **options: Any
        ) -> Any:
            return super().prepare_inputs_for_generation(
                *arguments, **options, **cached(past_key_values)
            )

        def generate(self, *arguments: Any, **options: Any) -> Any:
            embeddings = options.get("inputs_embeds")
            config = options.get("generation_config") or self.generation_config
            bos = options.get("bos_token_id", config.bos_token_id)
            if isinstance(bos, list):
                bos = bos[0]
            if embeddings is not None and bos is not None:
                device = embeddings.device
                begins = torch.full((len(embeddings), 1), bos, device=device)
                options.setdefault("input_ids", begins)
                # would be made as long as input_ids
                if options.get("attention_mask") is None:
                    mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
                    options["attention_mask"] = mask.to(device)
            return super().generate(*arguments, **options)

    return GenerationOfToday


# Checkpoints that LLaVA's own environment reads

PREFIX = "vision_model."
# LLaVA's module, then the Hugging Face model in it
PLACE = "vision_tower.vision_tower."
# of CLIP and SigLIP
PARTS = {"embeddings", "pre_layrnorm", "encoder", "post_layernorm", "head"}


def complete_saving(model_class: Any, config_class: Any) -> None:
    """Make ``save_pretrained`` write the names of transformers 4.

    transformers 5 has no ``vision_model.`` in the names of a CLIP or SigLIP tower's weights, and
    writes ``rope_parameters`` and ``dtype`` instead of ``rope_theta``, ``rope_scaling`` and
    ``torch_dtype``. transformers 4.37 would ignore such weights of a trained tower and such
    settings, and say nothing.
    """

    @replaces(model_class, "save_pretrained")
    def save_pretrained(
        original: Any,
        self: Any,
        *arguments: Any,
        state_dict: Any = None,
        **options: Any,
    ) -> Any:
        tensors = self.state_dict() if state_dict is None else state_dict
        return original(self, *arguments, state_dict=names_of_4(tensors), **options)

    @replaces(config_class, "to_json_string")
    def to_json_string(
        original: Any, self: Any, *arguments: Any, **options: Any
    ) -> str:
        written = json.loads(original(self, *arguments, **options))
        if "dtype" in written:
            written["torch_dtype"] = written["dtype"]
        if rope := written.get("rope_parameters"):
            kind = rope.get("rope_type", "default")
            written["rope_theta"] = rope.get("rope_theta", 10000.0)
            written["rope_scaling"] = None
            if kind != "default":
                scaling = {"type": kind, **rope}
                scaling.pop("rope_theta", None)
                scaling.pop("rope_type", None)
                written["rope_scaling"] = scaling
        return json.dumps(written, indent=2, sort_keys=True) + "\n"


def names_of_4(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors, those of a CLIP or SigLIP tower with ``vision_model.`` in their names; others
    are not renamed."""
    inside = [name.partition(PLACE)[2] for name in tensors if PLACE in name]
    # DINOv2 has encoder.layer.
    layers = any(name.startswith("encoder.layers.") for name in inside)
    if not layers or {name.partition(".")[0] for name in inside} - PARTS:
        return dict(tensors)
    return {
        name.replace(PLACE, PLACE + PREFIX): tensor for name, tensor in tensors.items()
    }


KNOWN = frozenset(  # settings of peft 0.10
    """alpha_pattern auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode
    init_lora_weights layer_replication layers_pattern layers_to_transform loftq_config lora_alpha
    lora_dropout megatron_config megatron_core modules_to_save peft_type r rank_pattern revision
    target_modules task_type use_dora use_rslora""".split()
)


@completes(TRAINER, "after", transformers=">=5", peft=">=0.11")
def lora_checkpoint(module: Any) -> None:
    """peft 0.10 refuses an adapter_config.json with settings that it does not know; newer versions
    write all of theirs, at their defaults too. And an unfrozen tower's weights in
    non_lora_trainables.bin need their old names. Changed where they are written, as
    ``llava.train.train`` runs as ``__main__``."""
    import torch
    from peft import LoraConfig

    @replaces(LoraConfig, "save_pretrained")
    def save_pretrained(
        original: Any, self: Any, save_directory: str, **options: Any
    ) -> None:
        original(self, save_directory, **options)
        defaults = type(self)().to_dict()
        drop_defaults(Path(save_directory) / "adapter_config.json", defaults)

    @replaces(torch, "save")
    def save(
        original: Any, tensors: Any, file: Any, *arguments: Any, **options: Any
    ) -> None:
        is_path = isinstance(file, (str, os.PathLike))
        if is_path and Path(file).name == "non_lora_trainables.bin":
            tensors = names_of_4(tensors)
        original(tensors, file, *arguments, **options)


def drop_defaults(file: Path, defaults: dict[str, Any]) -> None:
    """Remove settings that peft 0.10 does not know, unless they say something: then it must refuse
    them."""
    kept = {
        name: value
        for name, value in json.loads(file.read_text()).items()
        if name in KNOWN or (name in defaults and value != defaults[name])
    }
    write_text(file, json.dumps(kept, indent=2, sort_keys=True) + "\n")


# Towers


@completes("llava.model.multimodal_encoder.clip_encoder", "after", transformers=">=5")
def clip_pixels(module: Any) -> None:
    """LLaVA's CLIP tower resizes images with PIL; transformers 5 would do it with torchvision,
    which differs by 1/255 in some pixels. Our towers do so themselves.
    """
    import transformers

    module.CLIPImageProcessor = transformers.CLIPImageProcessorPil


@completes(ARCH, "after", transformers=">=5")
def tower_building(module: Any) -> None:
    """An unfrozen tower is read while LLaVA's model is made, which transformers 5 does on the meta
    device: nothing may be read there, and what is no weight of the checkpoint (the numbers of the
    positions) is emptied afterwards. And a checkpoint's names of its weights may be those of either
    version of transformers."""
    import torch
    from transformers import PreTrainedModel

    @replaces(module, "build_vision_tower")
    def build_vision_tower(original: Any, *arguments: Any, **options: Any) -> Any:
        meta = torch.get_default_device().type == "meta"
        with torch.device("cpu") if meta else contextlib.nullcontext():
            tower = original(*arguments, **options)
            tower.buffers_as_read = {
                name: buffer.clone() for name, buffer in tower.named_buffers()
            }
        tower._register_load_state_dict_pre_hook(accept_either_names)
        return tower

    @replaces(PreTrainedModel, "from_pretrained")
    def from_pretrained(
        original: Any, cls: Any, *arguments: Any, **options: Any
    ) -> Any:
        result = original(cls, *arguments, **options)
        model = result[0] if isinstance(result, tuple) else result
        for tower in [
            module for module in model.modules() if "buffers_as_read" in vars(module)
        ]:
            for name, buffer in tower.named_buffers():
                buffer.copy_(tower.buffers_as_read.get(name, buffer))
            del tower.buffers_as_read
        return result


def accept_either_names(state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename ``vision_tower.vision_model.*``, which transformers 5 calls ``vision_tower.*``."""
    old = f"{prefix}vision_tower.{PREFIX}"
    for name in [name for name in state if name.startswith(old)]:
        state[f"{prefix}vision_tower.{name.removeprefix(old)}"] = state.pop(name)


@completes(ARCH, "after", deepspeed=">=0.19.2")
def zero3_projector(module: Any) -> None:
    """LLaVA makes its projector in float32, after ZeRO-3 has partitioned the bf16 language model,
    and DeepSpeed no longer casts it: "expected m1 and m2 to have the same dtype", or an
    AssertionError without a message.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    @replaces(module.LlavaMetaModel, "initialize_vision_modules")
    def initialize_vision_modules(
        original: Any, self: Any, *arguments: Any, **options: Any
    ) -> None:
        original(self, *arguments, **options)
        if is_deepspeed_zero3_enabled():
            self.mm_projector.to(self.get_input_embeddings().weight.dtype)


# Tokenizers

# tokenizer_class in tokenizer_config.json
LLAMA_NAMES = ("LlamaTokenizer", "LlamaTokenizerFast", None)


@completes(LLAMA, "before", transformers=">=5")
def llama_tokenizer(module: Any) -> None:
    """LLaVA asks for slow tokenizers (``use_fast=False``), which transformers 5 has not; its Llama
    tokenizer gives other ids after special tokens and after spaces, so that LLaVA's label masks,
    which count tokens, would be off.

    With ``use_fast=False``, a model with a tokenizer.model gets the tokenizer of transformers 4.37
    again. It is saved with its tokenizer.model, which LLaVA's own environment needs. Others
    (tokenizer.json alone) get that of 5.
    """
    from transformers import AutoTokenizer

    original = AutoTokenizer.from_pretrained

    def from_pretrained(
        name: str, *arguments: Any, use_fast: bool | None = None, **options: Any
    ) -> Any:
        if use_fast is False and is_llama(name, options):
            from llava_integration.plug.compat.tokenizer import LlamaTokenizer

            return LlamaTokenizer.from_pretrained(name, *arguments, **options)
        return original(name, *arguments, **options)

    AutoTokenizer.from_pretrained = from_pretrained


def is_llama(name: str, options: dict[str, Any]) -> bool:
    """Whether the model has a sentencepiece tokenizer of Llama's kind."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    from transformers.utils import cached_file

    places = ("cache_dir", "revision", "token", "local_files_only", "subfolder")
    where = {key: options[key] for key in places if key in options}
    if get_tokenizer_config(name, **where).get("tokenizer_class") not in LLAMA_NAMES:
        return False
    return (
        cached_file(
            name,
            "tokenizer.model",
            _raise_exceptions_for_missing_entries=False,
            **where,
        )
        is not None
    )


@completes("llava.model.builder", "after", transformers=">=5")
def mistral_tokenizer(module: Any) -> None:
    """``load_pretrained_model`` reads a Mistral's tokenizer without ``use_fast=False``: LLaVA
    trains with the slow one, and answers with the fast one of transformers 4.37, which puts a space
    before each piece of text between special tokens and keeps spaces that the text begins with.
    That of 5 does not, whatever its tokenizer.json says.
    """
    original = module.AutoTokenizer.from_pretrained

    def from_pretrained(name: str, *arguments: Any, **options: Any) -> Any:
        tokenizer = original(name, *arguments, **options)
        if options.get("use_fast") is None and type(tokenizer).__name__ in LLAMA_NAMES:
            read_as_4(tokenizer, name)
        return tokenizer

    # that of other programs stays
    module.AutoTokenizer = SimpleNamespace(from_pretrained=from_pretrained)


def read_as_4(tokenizer: Any, name: str) -> None:
    """Give the tokenizer the steps of its tokenizer.json; without one, those that 4.37 makes of
    tokenizer.model."""
    from tokenizers import Tokenizer, normalizers
    from transformers.utils import cached_file

    backend = tokenizer.backend_tokenizer
    backend.model.unk_token = tokenizer.unk_token
    file = cached_file(
        name, "tokenizer.json", _raise_exceptions_for_missing_entries=False
    )
    if file is None:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        backend.pre_tokenizer = None
        return
    saved = Tokenizer.from_str(Path(file).read_text(encoding="utf-8"))
    for step in ("normalizer", "pre_tokenizer", "decoder"):
        setattr(backend, step, getattr(saved, step))


# Training


@completes(TRAINER, "before", accelerate=">=1")
def cpu_ranks(module: Any) -> None:
    """Without a GPU, accelerate no longer lets several ranks find each other unless ``--use_cpu``
    is set, with which it ignores DeepSpeed: each rank believes to be the only one, and DeepSpeed
    refuses the batch size.
    """
    import torch
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    if torch.accelerator.is_available():
        return

    @replaces(PartialState, "_prepare_backend")
    def _prepare_backend(
        original: Any, self: Any, *arguments: Any, **options: Any
    ) -> Any:
        backend, kind = original(self, *arguments, **options)
        if backend is None and int(os.environ.get("LOCAL_RANK", -1)) != -1:
            return "gloo", DistributedType.MULTI_CPU
        return backend, kind


@completes(TRAINER, "before", peft=">=0.12")
def lora_dtype(module: Any) -> None:
    """peft makes LoRA weights of a bf16 model in float32. LLaVA's are bf16, and ZeRO-3 takes one
    dtype alone."""
    import peft

    @replaces(peft, "get_peft_model")
    def get_peft_model(original: Any, *arguments: Any, **options: Any) -> Any:
        return original(*arguments, **{"autocast_adapter_dtype": False, **options})


@completes(TRAINER, "before", transformers=">=5")
def trainer_imports(module: Any) -> None:
    """The trainer imports ``ALL_LAYERNORM_LAYERS``, which ``transformers.trainer`` no longer has:
    layers whose parameters get no weight decay. In 4.37 the model files appended theirs to it.
    """
    import transformers.trainer
    from torch import nn
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    if not hasattr(transformers.trainer, "ALL_LAYERNORM_LAYERS"):
        transformers.trainer.ALL_LAYERNORM_LAYERS = [nn.LayerNorm, LlamaRMSNorm]


@dataclasses.dataclass
class OldNames:
    """Options of transformers 4.37 that LLaVA's scripts pass."""

    evaluation_strategy: str | None = dataclasses.field(
        default=None, metadata={"help": "old name of eval_strategy"}
    )
    warmup_ratio: float | None = dataclasses.field(
        default=None, metadata={"help": "old name of warmup_steps < 1"}
    )


@completes(TRAINER, "before", transformers=">=5")
def trainer_options(module: Any) -> None:
    """LLaVA's scripts pass ``--evaluation_strategy no --warmup_ratio 0.03``; transformers 5 has
    other names.

    ``--warmup_ratio r`` is ``--warmup_steps r`` with 0 < r < 1 there, rounded up alike.
    ``local_rank``, by which LLaVA decides which rank writes the projector, stays -1 on every rank
    of ``torchrun`` there. And ``--bf16 True`` is refused without a GPU, where 4.37 trains.
    """
    import torch
    from transformers import training_args

    # in place: a module of LLaVA may have bound the class already
    for field in dataclasses.fields(OldNames):
        setattr(training_args.TrainingArguments, field.name, field.default)
        training_args.TrainingArguments.__annotations__[field.name] = (
            OldNames.__annotations__[field.name]
        )
        training_args.TrainingArguments.__dataclass_fields__[field.name] = field

    @replaces(training_args.TrainingArguments, "__post_init__")
    def post_init(original: Any, self: Any) -> None:
        translate(self)
        original(self)

    if not torch.cuda.is_available():
        training_args.is_torch_bf16_gpu_available = lambda: True


def translate(options: Any) -> None:
    """Move old names' values to the new ones, set ``local_rank`` as 4.37; ValueError for a ratio
    outside 0 to 1."""
    if (ratio := options.warmup_ratio) is not None:
        if not 0 <= ratio <= 1:
            raise ValueError(
                f"--warmup_ratio {ratio}: expected a fraction of the steps, from 0 to 1"
            )
        if not options.warmup_steps:  # takes precedence in 4.37, too
            options.warmup_steps = min(ratio, 1 - 2**-53)  # 1 would be one step
    if options.evaluation_strategy is not None:
        options.eval_strategy = options.evaluation_strategy
    options.local_rank = int(os.environ.get("LOCAL_RANK", max(0, options.local_rank)))


@completes(TRAINER, "after", transformers=">=5")
def trainer_methods(module: Any) -> None:
    """Methods of ``LLaVATrainer`` whose arguments changed in transformers 5, and its order of
    samples.

    ``tokenizer=`` is called ``processing_class=`` there; ``_get_train_sampler`` is given the data
    set, which is always the trainer's; ``_save_checkpoint`` takes no ``metrics``, and no longer
    makes the folder into which pretraining writes its projector. Samples are drawn in the order of
    4, by torch's ``RandomSampler``, which the seed of the run governs: accelerate would draw them
    with a seed of its own.
    """
    trainer = module.LLaVATrainer
    base = trainer.__mro__[1]
    trainer.tokenizer = property(lambda self: self.processing_class)

    @replaces(trainer, "__init__")
    def init(original: Any, self: Any, *arguments: Any, **options: Any) -> None:
        if "tokenizer" in options:
            options["processing_class"] = options.pop("tokenizer")
        original(self, *arguments, **options)

    @replaces(trainer, "_get_train_sampler")
    def _get_train_sampler(original: Any, self: Any, train_dataset: Any = None) -> Any:
        return original(self)

    @replaces(trainer, "_save_checkpoint")
    def _save_checkpoint(
        original: Any, self: Any, model: Any, trial: Any = None, metrics: Any = None
    ) -> None:
        if not getattr(self.args, "tune_mm_mlp_adapter", False):
            base._save_checkpoint(self, model, trial)
            return
        folder = os.path.join(
            self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}"
        )
        os.makedirs(folder, exist_ok=True)
        original(self, model, trial)

    @replaces(trainer, "create_accelerator_and_postprocess")
    def create_accelerator_and_postprocess(original: Any, self: Any) -> None:
        self.args.accelerator_config.use_seedable_sampler = False
        original(self)
