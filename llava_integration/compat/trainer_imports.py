"""``llava.train.llava_trainer`` imports ``ALL_LAYERNORM_LAYERS``, which ``transformers.trainer`` no longer has.

The parameters of these layers get no weight decay; in 4.37 the model files appended to the list in `pytorch_utils`.
"""

from types import ModuleType

from llava_integration.compat.completion import Completion


def complete(module: ModuleType) -> None:
    """Give ``transformers.trainer`` the list again, with the layers of LLaVA's language models."""
    import transformers.trainer
    from torch import nn
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    if not hasattr(transformers.trainer, "ALL_LAYERNORM_LAYERS"):
        setattr(transformers.trainer, "ALL_LAYERNORM_LAYERS", [nn.LayerNorm, LlamaRMSNorm])  # noqa: B010 - for pyright


COMPLETION = Completion(
    module="llava.train.llava_trainer", when="before", libraries={"transformers": ">=5"}, complete=complete
)
