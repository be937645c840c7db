"""What processes have that ``forked`` makes: imported once, in the process from which they are forked.

Without the garbage collector, which would look through half a million objects again and again to find nothing; what
exists afterwards is left out of its later rounds, each of which would copy those objects' pages in a forked process.
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
    "llm2clip_plugin.stages.llm.run",
    "llm2clip_plugin.stages.tower.command",
    "llm2clip_plugin.stages.tower.run",
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
