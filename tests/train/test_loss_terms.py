"""Each term of the loss against its naive form over ranks, and the weights of a sum."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_loss import contrastive_loss, naive
from torch import Tensor
from train_helpers import GOLDEN, run_ranks

from llm2clip_plugin.text.pair_step import pair_loss
from llm2clip_plugin.train.config import LossConfig, parse_terms
from llm2clip_plugin.train.losses.base import Features, heads_terms, weighted_terms
from llm2clip_plugin.train.losses.distill import structure_loss

PAIRS = 24
CAPTIONS = 3
WIDTH = 8
SCALE = 20.0
PATCHES = 5
TERMS = (
    "infonce",
    "multi_positive",
    "cosine",
    "distill",
    "patch_reference",
    "patch_captions",
)
# pairs of images share captions
HASHES = torch.stack([torch.arange(PAIRS) // 2 + 100 * k for k in range(CAPTIONS)])
IDS = torch.arange(PAIRS) % 22  # two images come twice


AUTHORS_LOSS = GOLDEN.parent / "authors_captions" / "loss.safetensors"
AUTHORS_TEXTS = ("query", "positive", "negative")


def given(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Features of a whole batch, and a reference near its images."""
    generator = torch.Generator().manual_seed(0)
    anchor = F.normalize(
        torch.randn(PAIRS, WIDTH, generator=generator, dtype=torch.float64), dim=-1
    )
    positive = F.normalize(
        torch.randn(PAIRS, CAPTIONS, WIDTH, generator=generator, dtype=torch.float64),
        dim=-1,
    )
    reference = F.normalize(
        anchor
        + 0.3 * torch.randn(PAIRS, WIDTH, generator=generator, dtype=torch.float64),
        dim=-1,
    )
    # the same image twice: a distance of 0
    anchor[22:] = anchor[:2]
    reference[22:] = reference[:2]
    patches = torch.randn(
        2, PAIRS, PATCHES, WIDTH, generator=generator, dtype=torch.float64
    )
    values = {"anchor": anchor, "positive": positive, "reference": reference}
    values |= {
        "patches": patches[0],
        "reference_patches": patches[0] + 0.3 * patches[1],
    }
    values |= {"patch_features": F.normalize(patches[1], dim=-1)}
    return {name: value.to(dtype) for name, value in values.items()}


def naive_distill(anchor: Tensor, reference: Tensor, structure: float) -> Tensor:
    """The formula over the pairs i < j."""
    i, j = torch.triu_indices(len(anchor), len(anchor), 1)

    def distances(rows: Tensor) -> Tensor:
        return (rows[i] - rows[j]).square().sum(-1).clamp(min=1e-30).sqrt()

    semantic = (anchor - reference).square().sum(-1).mean()
    structural = F.smooth_l1_loss(distances(anchor), distances(reference))
    return semantic + structure * structural


def naive_patch_captions(patches: Tensor, captions: Tensor, scale: Tensor) -> Tensor:
    """A pair at a time: caption j pools the patches of image i, at the default temperature."""
    rows = []
    for patch in patches:
        row = []
        for caption in captions:
            pooled = ((patch @ caption) / 0.1).softmax(0) @ patch
            row.append(F.normalize(pooled, dim=0) @ caption)
        rows.append(torch.stack(row))
    logits = scale * torch.stack(rows)
    ids = torch.cat([HASHES, IDS[None]])
    same = (ids[:, :, None] == ids[:, None, :]).any(0) & ~torch.eye(
        PAIRS, dtype=torch.bool
    )
    logits = logits.masked_fill(same, -torch.inf)
    labels = torch.arange(PAIRS)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def naive_terms(x: dict[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
    ids = torch.cat([HASHES, IDS[None]])
    slots = [
        naive(x["anchor"], x["positive"][:, k], scale, ids) for k in range(CAPTIONS)
    ]
    cosine = (x["anchor"][:, None] * x["positive"]).sum(-1)
    patch_cosine = F.cosine_similarity(x["patches"], x["reference_patches"], dim=-1)
    first_caption = x["positive"][:, 0]
    return {
        "infonce": slots[0],
        "multi_positive": torch.stack(slots).mean(),
        "cosine": (1 - cosine).mean(),
        "distill": naive_distill(x["anchor"], x["reference"], 255.5),
        "patch_reference": 1 - patch_cosine.mean(),
        "patch_captions": naive_patch_captions(
            x["patch_features"], first_caption, scale
        ),
    }


def features_of(
    x: dict[str, Tensor], log_scale: Tensor, hashes: Any = None, ids: Any = None
) -> Any:
    pairs = {"anchor_bD": x["anchor"], "positive_bkD": x["positive"]}
    return Features(
        **pairs,
        log_scale=log_scale,
        bias=torch.zeros(1),
        caption_hashes=hashes,
        image_ids=ids,
    )


def terms_on_ranks(rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    """Each term's loss and gradients on this rank's rows."""
    results = {}
    mine = slice(rank * PAIRS // world, (rank + 1) * PAIRS // world)
    for name in TERMS:
        x = {
            key: value[mine].clone().requires_grad_() for key, value in given().items()
        }
        log_scale = torch.tensor([SCALE]).log().requires_grad_()
        patches = {
            "patches_bTH": x["patches"],
            "reference_patches_bTH": x["reference_patches"].detach(),
        }
        patches["patch_features_bTD"] = x["patch_features"]
        features = features_of(x, log_scale, HASHES[:, mine], IDS[mine])
        features = dataclasses.replace(
            features, reference_bD=x["reference"].detach(), **patches
        )
        loss = weighted_terms(LossConfig(terms=(f"{name}=1",), block=5))[name](features)
        loss.backward()
        grads = {
            key: torch.zeros_like(value) if value.grad is None else value.grad
            for key, value in x.items()
        }
        scale_grad = torch.zeros(1) if log_scale.grad is None else log_scale.grad
        results[name] = {"loss": loss.detach(), **grads, "log_scale": scale_grad}
    return results


@pytest.fixture(scope="module")
def on_ranks() -> dict[int, list[Any]]:
    return {world: run_ranks(terms_on_ranks, world) for world in (1, 2)}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_its_formula(on_ranks: dict[int, list[Any]], name: str, world: int):
    """fp32 in blocks of 5 rows against fp64 of the whole batch: a distance near 0.3 from a cosine
    is right to 1e-6, and distill's structure weighs 255 times that."""
    x = {
        key: value.requires_grad_("reference" not in key)
        for key, value in given(torch.float64).items()
    }
    log_scale = torch.tensor([SCALE], dtype=torch.float64).log().requires_grad_()
    expected = naive_terms(x, log_scale.exp())[name]
    expected.backward()
    ranks = [result[name] for result in on_ranks[world]]
    tolerance = 1e-4 if name == "distill" else 1e-5
    actual = torch.stack([result["loss"] for result in ranks]).mean()
    torch.testing.assert_close(
        actual.double(), expected.detach(), atol=tolerance, rtol=tolerance
    )
    for key in ("anchor", "positive", "patches", "patch_features"):
        grad = x[key].grad
        # of the sum over ranks; the engine averages
        mine = torch.cat([result[key] for result in ranks]).double() / world
        torch.testing.assert_close(
            mine,
            torch.zeros_like(x[key]) if grad is None else grad,
            atol=tolerance,
            rtol=tolerance,
        )
    scale = torch.stack([result["log_scale"] for result in ranks]).mean(0).double()
    expected_scale = (
        torch.zeros_like(scale) if log_scale.grad is None else log_scale.grad
    )
    torch.testing.assert_close(scale, expected_scale, atol=1e-5, rtol=1e-5)


def authors_pairs_on_ranks(rank: int, world: int) -> dict[str, Tensor]:
    """``pair_loss`` of this rank's rows of the authors' embeddings, which are not of length 1, and
    its gradients."""
    whole = load_file(AUTHORS_LOSS)
    of_rank = {
        name: whole[name].chunk(world)[rank].clone().requires_grad_()
        for name in AUTHORS_TEXTS
    }
    loss = pair_loss(
        *(F.normalize(value, dim=1) for value in of_rank.values()),
        torch.tensor([50.0]),
        symmetric=False,
    )
    loss.backward()
    return {
        "loss": loss.detach(),
        **{name: value.grad / world for name, value in of_rank.items()},
    }


def test_pairs_in_one_direction_are_the_authors_loss():
    """LLM2Vec's HardNegativeNLLLoss on two ranks, as LLM2CLIP's stage 1 calls it
    (golden/authors_captions)."""
    golden = load_file(AUTHORS_LOSS)
    ranks = run_ranks(authors_pairs_on_ranks, 2)
    mean = torch.stack([result["loss"] for result in ranks]).mean()
    torch.testing.assert_close(mean, golden["loss"], atol=0, rtol=1e-5)
    for name in AUTHORS_TEXTS:
        grad = torch.cat([result[name] for result in ranks])
        torch.testing.assert_close(grad, golden[f"{name}_grad"], atol=1e-6, rtol=1e-5)


def test_a_text_in_common_is_no_negative_whichever_side_it_is_on():
    # of two pairs: the texts 0 and 1, 1 and 2
    text_3D = F.normalize(torch.randn(3, 8), dim=1)
    sides = (text_3D[:2], text_3D[1:])
    scale = torch.tensor([50.0])
    ids = torch.tensor([[1, 2], [0, 1]])
    assert contrastive_loss(*sides, scale, caption_hashes=ids) == 0
    assert pair_loss(*sides, text_3D[:0], scale, caption_hashes=ids) == 0


def test_distill_means_the_same_for_any_batch_and_is_proclips_sum():
    """ProCLIP: lambda x (sum of squares + sum over pairs of smooth L1) over the 512 pairs of a
    rank, for any N."""
    x = {key: value[:22] for key, value in given(torch.float64).items()}
    n = len(x["anchor"])
    lam = 4e-4
    semantic = (x["anchor"] - x["reference"]).square().sum()
    structural = F.smooth_l1_loss(
        F.pdist(x["anchor"]), F.pdist(x["reference"]), reduction="sum"
    )
    # what both sums come to in a batch of 512 of the same pairs
    published = lam * (semantic * 512 / n + structural * (512 * 511) / (n * (n - 1)))
    features = dataclasses.replace(
        features_of(x, torch.zeros(1)), reference_bD=x["reference"]
    )
    ours = weighted_terms(LossConfig(terms=("distill=0.2048",)))["distill"](features)
    assert float(ours) == pytest.approx(float(published), rel=1e-4)
    with pytest.raises(ValueError, match="distill has no reference to compare with"):
        weighted_terms(LossConfig(terms=("distill",)))["distill"](
            dataclasses.replace(features, reference_bD=None)
        )
    assert float(structure_loss(x["anchor"], x["anchor"])) == 0.0
    assert float(structure_loss(x["anchor"][:1], x["reference"][:1])) == 0.0


def test_weights_over_the_run():
    constant, falling, late = parse_terms(
        ["infonce", "cosine=2:1", "distill=0:0.5@0.25"]
    )
    assert [constant.at(p) for p in (0, 0.5, 1)] == [1, 1, 1]
    assert [falling.at(p) for p in (0, 0.5, 1)] == [2, 1.5, 1]
    assert [late.at(p) for p in (0, 0.125, 0.25, 1)] == [0, 0.25, 0.5, 0.5]
    with pytest.raises(
        ValueError, match="has no term between images and captions; add infonce=1"
    ):
        heads_terms(LossConfig(terms=("distill",)))
    terms = ("infonce=1:0", "cosine", "distill", "patch_reference", "patch_captions")
    assert list(heads_terms(LossConfig(terms=terms))) == ["infonce", "cosine"]
