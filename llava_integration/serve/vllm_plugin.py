"""The entry point ``vllm.general_plugins``: where this package is installed, ``vllm serve DIR`` knows its towers.

vLLM calls ``register`` in every process, whatever it serves, so nothing large is imported before a LLaVA is loaded.
"""

# vLLM is installed in an environment of its own, not where types are checked.
# pyright: reportMissingImports=false

ARCHITECTURE = "LlavaForConditionalGeneration"  # of transformers' LLaVA 1.5, in config.json
MODEL = f"llava_integration.serve.vllm_model:{ARCHITECTURE}"


def register() -> None:
    """Let vLLM load LLaVA through ``vllm_model``, and transformers read the configurations of our towers."""
    from vllm import ModelRegistry

    from llava_integration.serve import build as tower_code

    tower_code.register()
    ModelRegistry.register_model(ARCHITECTURE, MODEL)
