"""LLaVA's CLIP tower resizes images with PIL, as in transformers 4; transformers 5 would do it with torchvision, which
differs by 1/255 in some pixels. Our towers do so themselves.
"""

from typing import Any

from llava_integration.compat.completion import Completion


def complete(module: Any) -> None:
    """Give ``clip_encoder`` the image processor on PIL under its old name."""
    import transformers

    module.CLIPImageProcessor = transformers.CLIPImageProcessorPil


COMPLETION = Completion(
    module="llava.model.multimodal_encoder.clip_encoder",
    when="after",
    libraries={"transformers": ">=5"},
    complete=complete,
)
