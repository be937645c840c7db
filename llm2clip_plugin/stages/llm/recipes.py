"""Stage 1's named runs, ``llm2clip finetune-llm --recipe NAME``: the authors' settings, and ours.

``paper`` and ``paper-*`` have the settings of the authors' code (microsoft/LLM2CLIP cba3b45, llm_caption_contrastive:
train_configs/supervised/MetaLlama3_cc3m.json, run_supervised.py, dataset/E5_cc3m.py): the loss retrieves positives from
queries alone, either caption is the query, with an instruction for each, and each pair has a random negative.

``llama-1b`` and ``llama-8b`` are ours: a symmetric loss, in which a short caption is the query of a long one, and
cosine decay. Common to both: LoRA r 16, alpha 32, dropout 0.05 on every linear layer, lr 2e-4 after 300 steps of
warm-up, one epoch, batch 512 = 8 x 64, scale 50, 512 tokens. For ZeRO-2, as the authors, add --deepspeed
scripts/zero2.json.
"""

import dataclasses
from collections.abc import Callable

from llm2clip_plugin.options.names import unknown
from llm2clip_plugin.stages.llm.config import FinetuneConfig
from llm2clip_plugin.stages.paper import TEACHERS
from llm2clip_plugin.text.config import ContrastConfig, LoraSettings, PairsConfig
from llm2clip_plugin.text.settings import EncoderConfig
from llm2clip_plugin.train.config import OptimConfig, TrainConfig

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
        contrast=dataclasses.replace(common.contrast, symmetric=False, mask_same=False),
        optim=dataclasses.replace(common.optim, schedule="linear"),  # Trainer's default
    )


def _common(name: str, encoder: EncoderConfig, *, gradient_checkpointing: bool) -> FinetuneConfig:
    """What both sides have in common. Betas, clipping and no weight decay are defaults of Hugging Face's Trainer."""
    return FinetuneConfig(
        output_dir=f"runs/{name}",
        encoder=dataclasses.replace(encoder, max_tokens=512, compute_dtype="bfloat16"),
        lora=LoraSettings(r=16, alpha=32, dropout=0.05),
        contrast=ContrastConfig(scale=50.0),
        optim=OptimConfig(
            lr=2e-4, weight_decay=0.0, layer_decay=1.0, betas=(0.9, 0.999), max_grad_norm=1.0, warmup_steps=300
        ),
        train=TrainConfig(
            global_batch=512,
            num_train_epochs=1.0,
            gradient_checkpointing=gradient_checkpointing,
            save_steps=500,
            dataloader_num_workers=2,
        ),
    )


LLM_RECIPES: dict[str, Callable[[], FinetuneConfig]] = {
    "paper": paper,
    "paper-llama-8b": paper_llama_8b,
    "paper-llama-1b": paper_llama_1b,
    "llama-8b": llama_8b,
    "llama-1b": llama_1b,
}
PAPERS = [name for name in LLM_RECIPES if name.startswith("paper")]


def llm_recipe(name: str) -> FinetuneConfig:
    """The recipe of that name; ValueError lists the known ones."""
    if name not in LLM_RECIPES:
        raise ValueError(unknown("recipe", name, LLM_RECIPES))
    return LLM_RECIPES[name]()
