"""The losses against golden D (1, 2, 4 ranks), against the naive formula, and with excluded
pairs."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_data import make_all
from torch import Tensor
from tower_runs import ROOT, STEPS, losses, options
from train_helpers import GOLDEN, run_ranks

from llm2clip_plugin import load_dual_encoder
from llm2clip_plugin.stages.tower import train_tower
from llm2clip_plugin.stages.tower_config import TRAIN_TOWER
from llm2clip_plugin.train import losses as train_losses
from llm2clip_plugin.train.losses.base import Features, chosen_terms
from llm2clip_plugin.train.losses.infonce import contrastive_loss
from llm2clip_plugin.train.losses.sigmoid import sigmoid_loss

FILES = {
    kind: GOLDEN / "D_losses" / f"{kind}_loss.safetensors"
    for kind in ("clip", "siglip")
}
MODE = "local_loss__gather_with_grad"


def golden_on_ranks(rank: int, world: int) -> dict[str, Tensor]:
    """Both losses on groups of 1, 2 and 4 of the four ranks; this rank's values and gradients by
    golden name."""
    results: dict[str, Tensor] = {}
    for size in (1, 2, 4):
        group = dist.new_group(list(range(size)))
        for kind, path in FILES.items():
            given = load_file(path)
            for i in range(len(given["logit_scale"]) if rank < size else 0):
                for name, value in golden(kind, given, i, rank, size, group).items():
                    results[f"{kind}.{size}.scale{i}.{name}"] = value.detach()
    return results


def golden(
    kind: str, given: dict[str, Tensor], i: int, rank: int, size: int, group: Any
) -> dict[str, Any]:
    """At logit scale i, of this rank's part of the batch."""
    what = "raw" if kind == "clip" else "features"
    raw = [
        given[f"{side}_{what}"].chunk(size)[rank].clone().requires_grad_()
        for side in ("image", "text")
    ]
    image, text = (
        F.normalize(value, dim=-1) if kind == "clip" else value for value in raw
    )
    image.retain_grad()
    text.retain_grad()
    log = given["logit_scale"][i].clone().requires_grad_()
    values = {}
    if kind == "clip":
        loss = contrastive_loss(image, text, log.exp(), block=3, group=group)
        loss.backward()
        values |= {"grad_image_raw": raw[0].grad, "grad_text_raw": raw[1].grad}
    else:
        bias = given["logit_bias"][i].clone().requires_grad_()
        loss = sigmoid_loss(image, text, log.exp(), bias, block=3, group=group)
        loss.backward()
        values["grad_logit_bias"] = bias.grad
    values |= {
        "loss": loss,
        "grad_image_features": image.grad,
        "grad_text_features": text.grad,
    }
    return values | {"grad_logit_scale": log.grad}


def test_golden_on_one_two_and_four_ranks():
    ranks = run_ranks(golden_on_ranks, 4)
    references = {kind: load_file(path) for kind, path in FILES.items()}
    compared = 0
    for name in ranks[0]:
        kind, size, scale, what = name.split(".", 3)
        reference = references[kind]
        mode = f"{MODE}." if kind == "clip" and size != "1" else ""
        expected = reference[f"{mode}world{size}.{scale}.{what}"]
        log_scale = float(reference["logit_scale"][int(scale[-1])])
        # the golden set's own suggestion
        tolerance = 2e-5 if math.exp(log_scale) >= 60 else 1e-5
        mine = [ranks[r][name] for r in range(int(size))]
        # shares of ranks differ, their mean is the gradient
        if what in ("grad_logit_scale", "grad_logit_bias"):
            actual = torch.stack(mine).mean()
            expected = expected.mean()
        else:
            actual = torch.stack(mine) if what == "loss" else torch.cat(mine)
        torch.testing.assert_close(
            actual.reshape(expected.shape), expected, atol=tolerance, rtol=tolerance
        )
        compared += 1
    assert compared == 3 * (
        len(references["clip"]["logit_scale"]) * 6
        + len(references["siglip"]["logit_scale"]) * 5
    )


def naive(image: Tensor, text: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    """The formula with full matrices; pairs that share an id are dropped."""
    logits = scale * image @ text.T
    same = (ids[:, :, None] == ids[:, None, :]).any(0) & ~torch.eye(
        len(image), dtype=torch.bool
    )
    logits = logits.masked_fill(same, -math.inf)
    labels = torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def features(
    n: int = 24, width: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pair = F.normalize(
        torch.randn(2, n, width, generator=generator, dtype=torch.float64), dim=-1
    )
    return pair[0].to(dtype).requires_grad_(), pair[1].to(dtype).requires_grad_()


@pytest.mark.parametrize("block", [0, 5, 24])
def test_blocks_and_masks_equal_the_full_matrix(block: int):
    """fp32 sums of 24 terms in another order: 1e-6 of values near 1."""
    captions = torch.arange(24) // 2 * 2 - 2**63  # hashes use the whole int64 range
    captions[5] = captions[20]
    images = torch.arange(24) % 20
    results = []
    for masked in (False, True):
        image, text = features()
        scale = torch.tensor([20.0], requires_grad=True)
        if masked:
            loss = contrastive_loss(
                image,
                text,
                scale,
                caption_hashes=captions,
                image_ids=images,
                block=block,
            )
        else:
            loss = naive(image, text, scale, torch.stack([captions, images]))
        (2.5 * loss).backward()
        results.append([loss.detach(), image.grad, text.grad, scale.grad])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


def test_sigmoid_with_excluded_pairs_equals_the_formula():
    image, text = features()
    scale = torch.tensor([10.0], requires_grad=True)
    bias = torch.tensor([-3.0], requires_grad=True)
    ids = torch.arange(24) // 3
    sign = 2 * torch.eye(24) - 1
    kept = (ids[:, None] != ids[None]) | torch.eye(24, dtype=torch.bool)
    expected = -(F.logsigmoid(sign * (scale * image @ text.T + bias)) * kept).sum() / 24
    expected_grads = torch.autograd.grad(expected, (image, text, scale, bias))
    actual = sigmoid_loss(image, text, scale, bias, caption_hashes=ids, block=7)
    torch.testing.assert_close(actual, expected)
    for gradient, expected_gradient in zip(
        torch.autograd.grad(actual, (image, text, scale, bias)),
        expected_grads,
        strict=True,
    ):
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-5)


def documented_term() -> str:
    """The code of the loss term in docs/extending.md."""
    before, code = (
        (ROOT / "docs/extending.md").read_text().split("class HardestNegative", 1)
    )
    return (
        before.rpartition("```python\n")[2]
        + "class HardestNegative"
        + code.partition("```")[0]
    )


def documented_term_on_ranks(rank: int, world: int) -> dict[str, Tensor]:
    """The documented term on this rank's part of a batch: loss and gradients."""
    module: dict[str, Any] = {"__name__": "documented"}
    exec(documented_term(), module)
    image, text = (
        x.detach().chunk(world)[rank].clone().requires_grad_() for x in features()
    )
    unused = torch.zeros(1)
    loss = module["TERM"](margin=0.5)(
        Features(
            anchor_bD=image,
            positive_bkD=text[:, None],
            log_scale=unused,
            bias=unused,
            caption_hashes=None,
            image_ids=None,
            block=5,
        )
    )
    (loss / world).backward()  # an engine averages the gradients of ranks
    assert image.grad is not None
    assert text.grad is not None
    return {"loss": loss.detach(), "image": image.grad, "text": text.grad}


def test_the_documented_loss_term_is_the_loss_of_the_whole_batch():
    image, text = (x.detach().requires_grad_() for x in features())
    cosine = image @ text.T
    hardest = cosine.masked_fill(torch.eye(24, dtype=torch.bool), -1).amax(1)
    expected = (0.5 + hardest - cosine.diagonal()).clamp(min=0).mean()
    expected.backward()
    ranks = run_ranks(documented_term_on_ranks, 2)
    torch.testing.assert_close(
        sum(rank["loss"] for rank in ranks) / 2, expected.detach()
    )
    for name, side in (("image", image), ("text", text)):
        torch.testing.assert_close(torch.cat([rank[name] for rank in ranks]), side.grad)


def test_a_file_in_the_folder_is_a_loss_term(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The command trains with that of docs/extending.md, under its settings."""
    members = tmp_path / "members"
    run = tmp_path / "run"
    members.mkdir()
    (members / "hardest_negative.py").write_text(documented_term())
    monkeypatch.setattr(
        train_losses, "__path__", [*train_losses.__path__, str(members)]
    )
    loss = (
        "--loss.terms",
        "hardest_negative",
        "--loss.args",
        "margin=0.5",
        "--train.ema-decay",
        "0",
    )
    argv = options(
        make_all(tmp_path),
        run,
        *loss,
        "--train.micro-batch",
        "8",
        "--optim.lr",
        "0.003",
    )
    assert (
        str(chosen_terms(TRAIN_TOWER.parse(argv).loss)[0][1])
        == "HardestNegative(margin=0.5)"
    )
    train_tower(TRAIN_TOWER.parse(argv))
    values = losses(run)
    assert values[1] > 0.5
    assert values[STEPS] < values[1] - 0.02
    assert load_dual_encoder(run / "tower").logit_scale.shape == (1,)
