"""``llm2clip export-llm``: a fine-tuned LLM as merged weights, adapter or sentence-transformers folder."""

import dataclasses
import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from llm2clip_plugin.contracts import EncoderCard, atomic_directory
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.text.adapter import adapter_folder, attach_adapter, merge
from llm2clip_plugin.text.config import CARD_SETTINGS, COMMAND, MODULES, EncoderConfig, ExportConfig
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.llm import keep_layers, load_backbone

SAMPLE_CAPTIONS = ["a red bicycle leans against a wall", "two dogs", "猫が眠っている"]  # compared before and after
# of an embedding's norm: the same float32 weights, summed in another order once
TOLERANCE = 1e-4


def export_llm(config: ExportConfig) -> Path:
    """Write the folder, reload it and compare embeddings before it is moved to its place; returns the folder.

    Raises ValueError for settings that the layout does not support, ContractError if the reloaded embeddings differ.
    """
    encoding = dataclasses.replace(config.encoder, compute_dtype="float32")
    if encoding.load_in_4bit:
        raise ValueError("an adapter cannot be merged into 4-bit weights; omit --load-in-4bit")
    encoder = CaptionEncoder(encoding, "cpu")
    if config.layout == "sentence-transformers":
        refuse_unsupported(encoder)
    with atomic_directory(config.output, replace=config.overwrite) as temporary:
        write_merged(encoder, temporary)
        if config.layout == "sentence-transformers":
            write_sentence_transformers(encoder.config, encoder.width, temporary)
        reloaded = CaptionEncoder(EncoderConfig(llm=str(temporary), compute_dtype="float32"), "cpu")
        before_NW, after_NW = (each.encode(SAMPLE_CAPTIONS) for each in (encoder, reloaded))
        worst = float(((before_NW - after_NW).norm(dim=1) / before_NW.norm(dim=1)).max())
        if not worst < TOLERANCE:
            raise ContractError(f"{config.output}: reloaded embeddings differ by {worst:.2g} of their norm")
    return Path(config.output)


def write_merged(encoder: CaptionEncoder, folder: Path) -> None:
    """Write merged weights of all blocks, those above the pooled layer included, with tokenizer and card."""
    model = load_backbone(encoder.folder, dataclasses.replace(encoder.config, layer=-1), torch.float32, encoder.device)
    merge_into_all_blocks(model, encoder.config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder.folder).save_pretrained(folder)
    EncoderCard(
        base=encoder.config.llm,
        base_sha256="",  # the folder itself holds the weights
        **{name: vars(encoder.config)[name] for name in CARD_SETTINGS},
        post_sha256=encoder.post.save(folder) if encoder.post is not None else "",
        training={"adapter_sha256": encoder.identity().adapter_sha256},
    ).write(folder / EncoderCard.FILE)


def merge_into_all_blocks(model: PreTrainedModel, config: EncoderConfig) -> PreTrainedModel:
    """Merge the adapter, which may cover only the blocks up to the pooled layer, into a model with all its blocks."""
    if not config.adapter:
        return model
    blocks, norm, depth = model.get_submodule("layers"), model.get_submodule("norm"), model.config.num_hidden_layers
    keep_layers(model, config.layer)
    merged = merge(attach_adapter(model, adapter_folder(config.adapter)))
    lower = list(merged.get_submodule("layers"))  # type: ignore[call-overload]
    merged.set_submodule("layers", nn.ModuleList([*lower, *list(blocks)[len(lower) :]]))  # type: ignore[call-overload]
    merged.set_submodule("norm", norm)
    merged.config.num_hidden_layers = depth
    return merged


def refuse_unsupported(encoder: CaptionEncoder) -> None:
    """Raise ValueError for settings that sentence-transformers does not support.

    It pools the last layer, over all tokens or all but prompt and BOS, without a template.
    """
    config = encoder.config
    prompts = [prompt for prompt in (config.prompt, config.query_prompt) if prompt]
    bos = config.pooling == "mean" and encoder.frame.has_bos
    unsupported = {
        "centering": encoder.post is not None,
        "a chat template": bool(config.chat_template),
        f"layer {config.layer}": config.layer != -1,
        "pooling BOS but not the prompt": bos and config.include_bos and bool(prompts),
        "leaving BOS out without a prompt": bos and not config.include_bos and not prompts,
        "a prompt for queries or captions only (BOS would be pooled for the others)": bos and len(prompts) == 1,
        "a prompt that ends in a space (it counts the caption's first token as the prompt's)": any(
            prompt.endswith(" ") for prompt in prompts
        ),
    }
    if reasons := [name for name, applies in unsupported.items() if applies]:
        raise ValueError(f"sentence-transformers does not support {' and '.join(reasons)}; use --format merged")


def write_sentence_transformers(config: EncoderConfig, width: int, folder: Path) -> None:
    """Add the files of sentence-transformers to a folder of merged weights; ``width``: of an embedding."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    pooling = {
        "word_embedding_dimension": width,
        "pooling_mode_mean_tokens": config.pooling == "mean",
        "pooling_mode_lasttoken": config.pooling == "last",
        "include_prompt": False,
    }
    files = {
        MODULES: modules,
        "sentence_bert_config.json": {"max_seq_length": config.max_tokens, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"query": config.query_prompt, "document": config.prompt},
            "default_prompt_name": "document" if config.prompt else None,
            "similarity_fn_name": "cosine",
        },
        "1_Pooling/config.json": pooling,
    }
    for name, body in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str]) -> int:
    """``llm2clip export-llm --llm PATH_OR_HUB_ID --adapter DIR --output DIR [--format sentence-transformers]``."""
    print(f"wrote {export_llm(COMMAND.parse(argv))}; verified by reloading")
    return 0
