"""``llm2clip score-images``: the cosine of each image and its text, also as a metric of torchmetrics' form.

Shapes: B images of a batch, D width of the features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip_plugin.bootstrap import bootstrap_mean
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.samples import select_captions
from llm2clip_plugin.data.sources import check_fields, open_source
from llm2clip_plugin.evaluate.config import SCORE_IMAGES
from llm2clip_plugin.evaluate.opening import (
    dataset_name,
    encode_images,
    open_tower,
    provenance,
    write_scores,
)
from llm2clip_plugin.vision.dual import LoadedDualEncoder


class ImageTextCosine(nn.Module):
    """The mean cosine of images and texts, over all calls of ``update``: as a metric of torchmetrics is used.

    CLIPScore (Hessel et al. 2021, arXiv 2104.08718) is 2.5 max(cosine, 0), of torchmetrics 100 max(cosine, 0).
    """

    def __init__(self, dual: LoadedDualEncoder) -> None:
        """``dual``: of ``load_dual_encoder``."""
        super().__init__()
        self.dual = dual
        self.reset()

    def reset(self) -> None:
        """Forget all pairs."""
        self.total, self.count = 0.0, 0

    @torch.inference_mode()
    def update(self, pixel_values: Tensor, texts: Sequence[str]) -> Tensor:
        """(B, 3, S, S) preprocessed images, B texts -> (B,) cosines, float64. ValueError for another number."""
        if len(pixel_values) != len(texts):
            raise ValueError(f"{len(texts)} texts for {len(pixel_values)} images; pass one text per image")
        image_BD, text_BD = self.dual.encode_image(pixel_values), self.dual.encode_text(texts)
        cosine_B = (image_BD.double() * text_BD.double()).sum(-1)
        self.total, self.count = self.total + float(cosine_B.sum()), self.count + len(texts)
        return cosine_B

    def compute(self) -> Tensor:
        """The mean over all pairs; NaN before the first."""
        return torch.tensor(self.total / self.count if self.count else float("nan"))

    def forward(self, pixel_values: Tensor, texts: Sequence[str]) -> Tensor:
        """``update``, and the mean of this batch."""
        return self.update(pixel_values, texts).mean()


def main(argv: list[str]) -> int:
    """``llm2clip score-images PAIRS --tower DIR``."""
    config = SCORE_IMAGES.parse(argv)
    source = open_source(config.data)
    check_fields(source)
    tower = open_tower(config.tower, config.device, config.teacher)
    cache = tower.cache(source, config.cache)
    options: dict[str, Any] = {"batch": config.batch, "workers": config.workers}
    found = encode_images(tower.dual.encode_image, source, tower.images, tower.device, **options)
    items = []
    for place, vector_D in enumerate(torch.cat(found.vectors).double() if found.vectors else ()):
        key, number = found.keys[place], found.numbers[place]
        captions = select_captions(source.captions(number)[1], config.data.kinds, config.data.languages)
        if not captions:
            continue
        embedding_NW = cache.rows(*source.locate(number), captions, key=key).to(tower.device)
        with torch.inference_mode():
            cosine_N = tower.dual.encode_text(embedding_NW).double().cpu() @ vector_D
        cluster = str(found.meta[place].get(config.cluster, key))
        for turn, (caption, cosine) in enumerate(zip(captions, cosine_N.tolist(), strict=True)):
            pair = {"id": f"{key}/{turn}", "score": cosine, "cluster": cluster, "category": caption.kind}
            items.append({**pair, "truth": caption.text})
    if not items:
        raise ValueError(f"{config.data.path} has no image with a text; llm2clip data check shows its fields")
    mean = bootstrap_mean([item["score"] for item in items], [item["cluster"] for item in items])
    print(f"{config.tower} on {config.data.path}: cosine {mean} over {len(items)} pairs of {mean.clusters} images")
    for error in found.broken:
        print(f"left out: {error}")
    scores = ScoreFile(
        benchmark=f"cosine:{dataset_name(config.data.path)}",
        metrics={"cosine": mean.mean},
        items=items,
        counts={"pairs": len(items), "left_out": len(found.broken)},
        model=config.tower,
        provenance=provenance(tower.dual, data=config.data.path),
    )
    write_scores(scores, config.json)
    return 0
