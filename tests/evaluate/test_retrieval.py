"""Recall against the reference's numbers (golden E), against a plain loop, and on bad input."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm2clip_plugin.evaluate import ranks
from llm2clip_plugin.evaluate.captions import caption_ranks
from llm2clip_plugin.evaluate.ranks import rank_both, recall, retrieve

GOLDEN = Path(__file__).parents[1] / "golden" / "reference" / "E_retrieval"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())["metrics"]
NAMES = {"i2t": "text_retrieval_recall", "t2i": "image_retrieval_recall"}


def golden(name):
    data = load_file(GOLDEN / f"{name}.safetensors")
    return (
        data["image"],
        data["text"],
        data.get("owner", torch.arange(len(data["image"]))),
    )


def reference_names(metrics):
    return {
        f"{NAMES[key[:3]]}@{key.split('_r')[1]}": value
        for key, value in metrics.items()
    }


@pytest.mark.parametrize("name", ["generic_60", "generic_150"])
@pytest.mark.parametrize("block", [1, 5000, 1 << 24])  # one query at a time, a few, all
def test_recall_equals_the_reference_where_no_score_ties(name, block, monkeypatch):
    monkeypatch.setattr(ranks, "BLOCK", block)
    assert reference_names(recall(*golden(name))) == pytest.approx(
        EXPECTED[name]["torch_topk"], abs=1e-6
    )


@pytest.mark.parametrize("name", ["ties_40", "ties_96"])
def test_half_credit_is_strictly_between_the_bounds(name):
    half = reference_names(recall(*golden(name)))
    low = EXPECTED[name]["pessimistic"]
    high = EXPECTED[name]["optimistic"]
    assert all(low[key] - 1e-9 <= half[key] <= high[key] + 1e-9 for key in half)
    assert (
        low["text_retrieval_recall@1"]
        < half["text_retrieval_recall@1"]
        < high["text_retrieval_recall@1"]
    )


def test_one_caption_an_image_equals_the_references_global_metrics():
    image, text, owner = golden("one_caption_80")
    ours = reference_names(recall(image, text, owner, ks=(1, 5, 10, 25, 50)))
    assert ours == pytest.approx(
        EXPECTED["one_caption_80"]["retrieval_global"], abs=1e-6
    )


def test_caption_retrieval_accuracy_equals_golden():
    pairs = load_file(GOLDEN / "cra_90.safetensors")
    expected = EXPECTED["cra_90"]
    ranks = caption_ranks(pairs["caption_a"], pairs["caption_b"], center=False)
    forward, backward = (float(side.hits(1).mean()) for side in ranks)
    assert forward == pytest.approx(expected["first_retrieves_second_top1"], abs=1e-6)
    assert backward == pytest.approx(expected["second_retrieves_first_top1"], abs=1e-6)


def hits_over_orders(query, item, query_label, item_label, k):
    """One query at a time, in float64: the mean over random orders of equal scores."""
    expected = []
    for q in range(len(query)):
        score = item.double() @ query[q].double()
        right = item_label == query_label[q]
        draws = []
        for seed in range(400):
            order = torch.randperm(
                len(item), generator=torch.Generator().manual_seed(seed)
            )
            ranked = order[torch.argsort(-score[order], stable=True)]
            draws.append(float(right[ranked[:k]].any()))
        expected.append(sum(draws) / len(draws))
    return torch.tensor(expected, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_hits_item_by_item_equal_a_plain_loop_with_groups_and_ties(k, monkeypatch):
    monkeypatch.setattr(ranks, "BLOCK", 100)
    generator = torch.Generator().manual_seed(3)
    # few values: many ties
    query, item = (
        torch.randint(-1, 2, (n, 4), generator=generator).float() for n in (20, 30)
    )
    query_label, item_label = (
        torch.randint(0, 6, (n,), generator=generator) for n in (20, 30)
    )
    sides = rank_both(query, item, query_label, item_label)
    inputs = (
        (query, item, query_label, item_label),
        (item, query, item_label, query_label),
    )
    for ours, (queries, items, labels, item_labels) in zip(sides, inputs, strict=True):
        queried = ours.correct_equal_Q > 0
        assert torch.equal(queried, torch.isin(labels, item_labels))
        gap = ours.select(queried).hits(k) - hits_over_orders(
            queries[queried], items, labels[queried], item_labels, k
        )
        # 4 standard errors of 400 draws
        assert gap.abs().max() <= 0.11
        assert abs(float(gap.mean())) <= 0.02


def test_a_tower_that_gives_everything_one_embedding_gets_chance():
    image = torch.ones(50, 8)
    text = torch.ones(100, 8)
    owner = torch.arange(100) // 2
    metrics = retrieve(image, text, torch.arange(50), owner).metrics()
    for k in (1, 5, 10):
        assert metrics[f"t2i_r{k}"] == pytest.approx(k / 50)
        assert metrics[f"i2t_r{k}"] == pytest.approx(
            1 - math.comb(98, k) / math.comb(100, k)
        )


def test_identical_items_tie_wherever_they_stand():
    generator = torch.Generator().manual_seed(1)
    # odd sizes: the matrix product has edges
    item = torch.randn(1, 333, generator=generator).repeat(1003, 1)
    item[::2] += 0.0 * item[::2].sign()  # -0.0 is 0.0
    ranks, _ = rank_both(
        torch.randn(7, 333, generator=generator),
        item,
        torch.arange(7),
        torch.arange(1003),
    )
    assert ranks.wrong_equal_Q.tolist() == [1002] * 7


def test_the_pool_is_the_selected_captions():
    image, text, owner = golden("generic_60")
    first = torch.tensor([int((owner == i).nonzero()[0]) for i in range(60)])
    result = retrieve(image, text, torch.arange(60), owner, captions=first)
    assert result.metrics() == recall(image, text[first], torch.arange(60))
    half = retrieve(image, text, torch.arange(60), owner, captions=owner < 30)
    assert half.sides["i2t"][1].tolist() == list(range(30))
    # the pool of images is the same, so a caption's rank is too
    whole = retrieve(image, text, torch.arange(60), owner)
    assert torch.equal(
        half.sides["t2i"][0].hits(1), whole.sides["t2i"][0].select(owner < 30).hits(1)
    )


def test_bfloat16_autocast_and_settings_do_not_reach_the_scores():
    image, text, owner = golden("generic_150")
    plain = recall(image, text, owner)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert recall(image, text, owner) == plain
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_bad_input_is_named():
    image, text, owner = golden("generic_60")
    with pytest.raises(ValueError, match="1 of 61 images"):
        recall(torch.cat([image, image[:1]]), text, owner)
    with pytest.raises(ValueError, match="1 of 276 embeddings"):
        recall(image, text.index_fill(0, torch.tensor([5]), torch.nan), owner)
