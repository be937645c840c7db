"""What the server of ``forked`` imports before it forks.

Without the garbage collector, which would search these libraries' half a million objects again and
again for nothing to free; later rounds leave them out (``gc.freeze``), as each would copy their
pages in a forked process.
"""

import contextlib
import gc
import importlib

LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "deepspeed.module_inject",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.engine",
    "llm2clip_plugin.stages.llm",
    "llm2clip_plugin.stages.tower",
    "peft",
    "torchvision.transforms.v2",
    "transformers.models.auto.processing_auto",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
)

gc.disable()
for library in LIBRARIES:
    with contextlib.suppress(ImportError):  # not in each environment
        importlib.import_module(library)
gc.freeze()
gc.enable()
