"""The text tower of an OpenCLIP checkpoint, as Hugging Face's CLIP text model."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llm2clip_plugin.contracts import ContractError
from llm2clip_plugin.vision.convert.checkpoint_files import read_tensors, weight_files
from llm2clip_plugin.vision.convert.source_config import lift_model_cfg, section
from llm2clip_plugin.vision.convert.tensor_names import TensorNames, depth, require
from llm2clip_plugin.vision.directory import read_json

OPEN_CLIP_CONFIG = "open_clip_config.json"
# settings of text_cfg that make it another tower, and the values with which it is the one below
PLAIN = {
    "pool_type": "argmax",
    "no_causal_mask": False,
    "embed_cls": False,
    "hf_model_name": None,
    "proj_type": "linear",
}


class TextFeatures(nn.Module):
    """Hugging Face's text model under the name by which its image-text model offers it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def get_text_features(self, **inputs: Tensor) -> Tensor:
        """(B, T) token ids and mask -> (B, D)."""
        return self.model(**inputs).text_embeds


def load_open_clip_text(folder: Path) -> tuple[nn.Module, int, bool, int]:
    """The text tower of a folder with open_clip_config.json; tokens of a context, False, width of the features.

    Raises ValueError for a text tower that is not CLIP's, ContractError for missing or misshapen tensors.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = lift_model_cfg(read_json(folder / OPEN_CLIP_CONFIG))
    text = section(config, "text_cfg", where=OPEN_CLIP_CONFIG)
    if other := [f"{name} {text[name]!r}" for name, value in PLAIN.items() if text.get(name, value) != value]:
        raise ValueError(
            f"{folder}: the text tower has {', '.join(other)}; supported is CLIP's own. If this model is on the Hub "
            "for transformers too, use that"
        )
    state: dict[str, Tensor] = {}
    for file in weight_files(folder):
        state |= read_tensors(file)
    prefix = "text." if "text.token_embedding.weight" in state else ""
    tensors = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    require(tensors, "token_embedding.weight", "positional_embedding", "text_projection", "ln_final.weight")
    vocabulary, width = tensors["token_embedding.weight"].shape
    context = len(tensors["positional_embedding"])
    first = "transformer.resblocks.0.mlp.c_fc.weight"
    require(tensors, first)
    model = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=len(tensors[first]),
            num_hidden_layers=depth(tensors, "transformer.resblocks."),
            num_attention_heads=int(text.get("heads", width // 64)),
            max_position_embeddings=context,
            hidden_act="quick_gelu" if config.get("quick_gelu") else "gelu",
            projection_dim=tensors["text_projection"].shape[1],
            eos_token_id=2,  # the feature is read at the largest id, as OpenCLIP does
        )
    )
    theirs, _ = _names(model).to_ours(tensors)
    theirs["text_projection.weight"] = tensors["text_projection"].T
    own = model.state_dict()
    shapes, expected = ({name: tuple(x.shape) for name, x in tensors.items()} for tensors in (theirs, own))
    wrong = {name for name, _ in shapes.items() ^ expected.items()}
    if wrong := sorted(name for name in wrong if not name.endswith("position_ids")):
        raise ContractError(f"{folder}: tensors of the text tower are missing or misshapen: {', '.join(wrong[:5])}")
    model.load_state_dict(theirs, strict=False)
    return TextFeatures(model), context, False, tensors["text_projection"].shape[1]


def _names(model: nn.Module) -> TensorNames:
    """OpenCLIP's names and the model's, which begin with text_model. in every version of transformers but not all."""
    prefix = "text_model." if any(name.startswith("text_model.") for name in model.state_dict()) else ""
    return TensorNames(
        prefixes=("", prefix),
        outside={
            "token_embedding.weight": "embeddings.token_embedding.weight",
            "positional_embedding": "embeddings.position_embedding.weight",
            "ln_final.": "final_layer_norm.",
        },
        blocks=("transformer.resblocks.", "encoder.layers."),
        inside={
            "ln_1.": "layer_norm1.",
            "ln_2.": "layer_norm2.",
            "attn.out_proj.": "self_attn.out_proj.",
            "mlp.c_fc.": "mlp.fc1.",
            "mlp.c_proj.": "mlp.fc2.",
        },
        fused=("attn.in_proj_", "self_attn.{}_proj."),
    )


class OpenClipTokenizer:
    """CLIP's byte-pair encoding from the open_clip package, for a folder without a tokenizer of its own."""

    pad_token_id = 0

    def __init__(self, folder: Path) -> None:
        try:
            from open_clip.tokenizer import SimpleTokenizer  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(
                f"{folder} has no tokenizer: copy tokenizer.json of openai/clip-vit-base-patch32 into it, or "
                "`pip install open_clip_torch`, which contains CLIP's"
            ) from error
        self._tokenizer = SimpleTokenizer()

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        """Token ids with those of begin and end, as Hugging Face's tokenizers return them."""
        ours = self._tokenizer
        return {"input_ids": [[ours.sot_token_id, *ours.encode(text), ours.eot_token_id] for text in texts]}
