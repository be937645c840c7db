"""The projection alone, as a NumPy file."""

import numpy as np

from llm2clip_plugin.vision.convert.exporting import Format, projected_dual


def write(model, directory, preprocessor):
    """projection.npy, (projection_dim, width)."""
    dual = projected_dual(model, FORMAT.name, ("clip", "chinese_clip"))
    np.save(directory / "projection.npy", dual.visual_projection.weight.detach().numpy())


FORMAT = Format(name="numpy", help="the projection as projection.npy", write=write)
