"""Generation of LLaVA's language models, shared by the files that complete one each.

transformers 5.24 calls a model's cache ``cache`` instead of ``past_key_values``. And since 4.38, what is generated from
embeddings no longer begins with <s>, on which LLaVA's stopping criteria count.
"""

import functools
from typing import Any


def complete_generation(model_class: Any, parent: Any) -> None:
    """Give ``model_class``, LLaVA's subclass of ``parent``, the cache under the name that either knows."""
    bases = model_class.__bases__
    model_class.__bases__ = tuple(between(parent) if base is parent else base for base in bases)
    original = model_class.forward

    @functools.wraps(original)
    def forward(self: Any, *arguments: Any, cache: Any = None, **options: Any) -> Any:
        if cache is not None:
            options["past_key_values"] = cache
        return original(self, *arguments, **options)

    model_class.forward = forward


def between(parent: Any) -> Any:
    """A class between LLaVA's model and ``parent``, for what LLaVA's methods pass to ``super()``."""
    import inspect

    import torch

    name = "cache" if "cache" in inspect.signature(parent.forward).parameters else "past_key_values"

    class GenerationOfToday(parent):
        def forward(self, *arguments: Any, past_key_values: Any = None, **options: Any) -> Any:
            if past_key_values is not None:
                options[name] = past_key_values
            return super().forward(*arguments, **options)

        def prepare_inputs_for_generation(self, *arguments: Any, past_key_values: Any = None, **options: Any) -> Any:
            if past_key_values is not None:
                options[name] = past_key_values
            return super().prepare_inputs_for_generation(*arguments, **options)

        def generate(self, *arguments: Any, **options: Any) -> Any:
            embeddings = options.get("inputs_embeds")
            bos = first_token(self, options)
            if embeddings is not None and bos is not None:
                options.setdefault("input_ids", torch.full((len(embeddings), 1), bos, device=embeddings.device))
                if options.get("attention_mask") is None:  # would be made as long as input_ids
                    options["attention_mask"] = torch.ones(embeddings.shape[:2], dtype=torch.long).to(embeddings.device)
            return super().generate(*arguments, **options)

    return GenerationOfToday


def first_token(model: Any, options: dict[str, Any]) -> int | None:
    """Id of the token that transformers 4.37 begins an answer with; None if the model has none."""
    config = options.get("generation_config") or model.generation_config
    bos = options.get("bos_token_id", config.bos_token_id)
    return bos[0] if isinstance(bos, list) else bos
