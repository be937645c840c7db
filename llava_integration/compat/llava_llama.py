"""LLaVA's Llama names a model's cache as transformers 4 does (see `generation`), and LLaVA's own environment reads its
checkpoints (see `saving`)."""

from types import ModuleType

from llava_integration.compat.completion import Completion
from llava_integration.compat.generation import complete_generation
from llava_integration.compat.saving import complete_config, complete_saving


def complete(module: ModuleType) -> None:
    """Complete the model and its configuration."""
    complete_generation(module.LlavaLlamaForCausalLM, module.LlamaForCausalLM)
    complete_saving(module.LlavaLlamaForCausalLM)
    complete_config(module.LlavaConfig)


COMPLETION = Completion(
    module="llava.model.language_model.llava_llama",
    when="after",
    libraries={"transformers": ">=5"},
    complete=complete,
)
