"""Forecast: its measures against scikit-learn, loops and closed forms; the command on tiny towers
and a tiny LLM."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluate_world import tiny_dual, write_data, write_llm
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import Ridge
from torch import Tensor

from llm2clip_plugin import cli
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.sources import SourceConfig
from llm2clip_plugin.evaluate import forecast as measures
from llm2clip_plugin.evaluate.forecast import on_grid
from llm2clip_plugin.stages.caches import find_cache
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.parts import tower_blocks


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [12, 200])  # fewer than columns, and more
def test_whitening_is_by_the_covariance_of_ledoit_and_wolf(rows: int):
    feature_MF = normal(rows, 30) @ normal(30, 30, seed=1) + 5
    fitted = LedoitWolf().fit(feature_MF.double().numpy())
    centered_MF = feature_MF.double().numpy() - fitted.location_
    white_MF = measures.whitened(feature_MF).double().numpy()
    expected = centered_MF @ np.linalg.inv(fitted.covariance_) @ centered_MF.T
    np.testing.assert_allclose(white_MF @ white_MF.T, expected, rtol=1e-3, atol=1e-3)


def unbiased_cka(one_ND: Tensor, other_NE: Tensor) -> float:
    """Song et al. 2012, equation 5, as it is written."""

    def hsic(one_NN: Tensor, other_NN: Tensor) -> float:
        count = len(one_NN)
        ones_N = torch.ones(len(one_NN), dtype=torch.float64)
        sums = (
            ones_N
            @ one_NN
            @ ones_N
            * (ones_N @ other_NN @ ones_N)
            / (count - 1)
            / (count - 2)
        )
        rows = 2 / (count - 2) * (ones_N @ one_NN @ other_NN @ ones_N)
        return float((one_NN @ other_NN).trace() + sums - rows) / count / (count - 3)

    one_NN, other_NN = (
        (x @ x.T).fill_diagonal_(0) for x in (one_ND.double(), other_NE.double())
    )
    return (
        hsic(one_NN, other_NN)
        / (hsic(one_NN, one_NN) * hsic(other_NN, other_NN)) ** 0.5
    )


def test_cka_by_image_is_the_jackknife():
    one_ND = normal(40, 8)
    other_NE = normal(40, 8) + normal(40, 8, seed=1)
    rest = [
        torch.cat([torch.arange(image), torch.arange(image + 1, 40)])
        for image in range(40)
    ]
    without = [unbiased_cka(one_ND[kept], other_NE[kept]) for kept in rest]
    expected = unbiased_cka(one_ND, other_NE) + 39 * (
        np.mean(without) - np.array(without)
    )
    np.testing.assert_allclose(
        measures.cka_by_image(one_ND, other_NE), expected, rtol=1e-9, atol=1e-9
    )
    turned_ND = 2 * one_ND @ torch.linalg.qr(normal(8, 8, seed=9))[0]
    np.testing.assert_allclose(measures.cka_by_image(one_ND, turned_ND), 1, atol=1e-4)
    assert (
        abs(
            float(
                measures.cka_by_image(
                    normal(300, 8, seed=2), normal(300, 8, seed=3)
                ).mean()
            )
        )
        < 0.03
    )


def test_best_match_similarity_by_loops():
    patch_NPH = F.normalize(normal(5, 3, 4), dim=2)
    similarity_NN = measures.best_match_similarity(patch_NPH)
    for image in range(5):
        for other_image in range(5):
            cosine = (patch_NPH[image] @ patch_NPH[other_image].T).tolist()
            forward = sum(map(max, cosine)) / 3
            backward = sum(map(max, zip(*cosine, strict=True))) / 3
            assert float(similarity_NN[image, other_image]) == pytest.approx(
                (forward + backward) / 2, abs=1e-6
            )


def test_neighbor_overlap_by_sets():
    one_NN = normal(20, 20)
    other_NN = normal(20, 20, seed=1)
    for image, value in enumerate(
        measures.neighbor_overlap(one_NN, other_NN, 4).tolist()
    ):
        others = [number for number in range(20) if number != image]
        near = [
            set(sorted(others, key=lambda n, row=s[image]: -float(row[n]))[:4])
            for s in (one_NN, other_NN)
        ]
        assert value == pytest.approx(len(near[0] & near[1]) / 4)


def test_neighbors_of_the_same_and_of_unrelated_features():
    text_NW = normal(200, 12)
    turned_NPH = (3 * text_NW @ torch.linalg.qr(normal(12, 12, seed=9))[0] + 1)[:, None]
    assert measures.neighbors(turned_NPH, text_NW).tolist() == [1.0] * 200
    unrelated_N = measures.neighbors(normal(200, 5, 12, seed=1), text_NW)
    assert float(unrelated_N.mean()) == pytest.approx(20 / 199, abs=0.02)


def test_the_probe_is_a_ridge_regression_on_held_out_clusters():
    feature_NH = normal(100, 10)
    clusters = [f"family {number // 2}" for number in range(100)]
    text_NW = feature_NH @ normal(10, 6, seed=1) + 3 * normal(100, 6, seed=2)
    fold_N = measures.folds(clusters).numpy()
    assert sorted(np.bincount(fold_N)) == [20] * 5
    assert all(fold_N[::2] == fold_N[1::2])
    x = feature_NH.double().numpy()
    y = text_NW.double().numpy()
    error = 0.0
    total = 0.0
    for fold in range(5):
        test = fold_N == fold
        choose = fold_N == (fold + 1) % 5

        def predict(fit: np.ndarray, at: np.ndarray, penalty: float) -> np.ndarray:
            # mean of the squared singular values
            scale = np.square(x[fit] - x[fit].mean(0)).sum() / 10
            return Ridge(alpha=penalty * scale).fit(x[fit], y[fit]).predict(x[at])

        errors = [
            np.square(predict(~test & ~choose, choose, p) - y[choose]).sum()
            for p in measures.PENALTIES
        ]
        best = measures.PENALTIES[int(np.argmin(errors))]
        error += np.square(predict(~test, test, best) - y[test]).sum()
        total += np.square(y[test] - y[~test].mean(0)).sum()
    value = float(measures.explained(feature_NH, text_NW, clusters).mean())
    assert value == pytest.approx(1 - error / total, abs=1e-4)
    assert 0.2 < value < 0.8
    assert (
        float(
            measures.explained(feature_NH, feature_NH @ normal(10, 6), clusters).mean()
        )
        > 0.99
    )
    assert (
        abs(
            float(
                measures.explained(feature_NH, normal(100, 6, seed=5), clusters).mean()
            )
        )
        < 0.1
    )


def test_large_grids_are_averaged():
    row_S = torch.arange(16.0)
    patch_BPH = torch.stack([row_S.repeat_interleave(16), row_S.repeat(16)], dim=1)[
        None
    ]
    assert on_grid(patch_BPH)[0, :9].tolist() == [
        [0.5, 0.5 + 2 * x] for x in range(8)
    ] + [[2.5, 0.5]]
    assert on_grid(patch_BPH[:, :49]).shape == (1, 49, 2)


def test_the_state_is_the_one_that_the_layer_selects(tmp_path: Path):
    """Of two blocks, -2 is what the first one gives, the image's tokens without the class token."""
    data = write_data(tmp_path / "data", shades=tuple(range(0, 42, 7)))
    llm = write_llm(tmp_path / "llm")
    dual = tiny_dual()
    scores = {}
    for changed in ("neither", "last", "first"):
        if changed != "neither":
            block = tower_blocks(dual.tower)[-1 if changed == "last" else 0]
            torch.manual_seed(1)
            with torch.no_grad():
                for parameter in block.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
        export_tower(dual, tmp_path / changed, origin="tiny")
    towers = [str(tmp_path / name) for name in ("neither", "last", "first")]
    for layer in ("-2", "-1"):
        words = [
            "forecast",
            *towers,
            "--llm",
            str(llm),
            "--data",
            str(data),
            "--device",
            "cpu",
        ]
        assert (
            cli.main(
                [
                    *words,
                    "--select-layer",
                    layer,
                    "--output",
                    str(tmp_path / "scores.json"),
                ]
            )
            == 0
        )
        scores[layer] = [
            ScoreFile.read(tmp_path / f"scores-{number}.json").metrics
            for number in (1, 2, 3)
        ]
    assert scores["-2"][0] == scores["-2"][1] != scores["-2"][2]
    assert scores["-1"][0] != scores["-1"][1]


def test_forecasts_of_other_captions_or_llms_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = write_data(tmp_path / "data", shades=tuple(range(0, 42, 7)))
    export_tower(tiny_dual(), tmp_path / "tower", origin="tiny")

    def measured(name: str, seed: int = 0, layer: str = "-2") -> str:
        llm = write_llm(tmp_path / f"llm-{seed}", seed=seed)
        output = str(tmp_path / f"{name}.json")
        words = ["forecast", str(tmp_path / "tower"), "--llm", str(llm)]
        words += ["--data", str(data), "--select-layer", layer, "--output", output]
        assert cli.main([*words, "--device", "cpu"]) == 0
        return output

    first = measured("first")
    others = [measured("llm", seed=1), measured("layer", layer="-1")]
    text = data.read_text(encoding="utf-8")
    data.write_text(text.replace("a red square", "a red thing"), encoding="utf-8")
    others.append(measured("captions"))
    notes = (
        "their llm_fingerprint",
        "their select_layer",
        "different images, captions",
    )
    for other in others:
        capsys.readouterr()
        assert cli.main(["compare", first, other]) == 0
        printed = capsys.readouterr()
        said = [note for note in notes if note in printed.out + printed.err]
        assert said == [notes[others.index(other)]]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = write_data(tmp_path / "data", shades=tuple(range(0, 42, 7)))  # 24 images
    llm = write_llm(tmp_path / "llm")
    for name, noise in (("one", 0.0), ("other", 0.1)):
        dual = tiny_dual()
        with torch.no_grad():
            for parameter in dual.tower.parameters():
                parameter += noise * torch.randn_like(parameter)
        export_tower(dual, tmp_path / name, origin="tiny")
    towers = [str(tmp_path / name) for name in ("one", "other")]
    output = tmp_path / "scores.json"
    words = [
        "forecast",
        *towers,
        "--llm",
        str(llm),
        "--data",
        str(data),
        "--device",
        "cpu",
    ]
    assert cli.main([*words, "--output", str(output)]) == 0
    assert "less the first" in capsys.readouterr().out
    scores = [ScoreFile.read(tmp_path / f"scores-{number}.json") for number in (1, 2)]
    assert [record.model for record in scores] == towers
    assert len(scores[0].items) == 24
    assert scores[0].metrics != scores[1].metrics
    for name, value in scores[0].metrics.items():
        assert value == pytest.approx(np.mean([item[name] for item in scores[0].items]))
    # a training finds none of it
    with pytest.raises(FileNotFoundError, match="no embedding cache of an LLM"):
        find_cache(SourceConfig(path=str(data)))
    (manifest,) = (tmp_path / "data").glob("forecast-*/manifest.json")
    teacher = json.loads(manifest.read_text())["teacher"]
    assert [teacher[name] for name in ("attention", "layer", "include_bos")] == [
        "causal",
        -2,
        False,
    ]
    (shard,) = manifest.parent.glob("forecast-*.safetensors")
    written = shard.stat().st_mtime_ns
    assert cli.main([*words, "--cluster", "image"]) == 0
    assert shard.stat().st_mtime_ns == written
    assert cli.main([*words, "--cluster", "family"]) == 2
    assert "'family'" in capsys.readouterr().err
    assert cli.main([*words, "--kinds", "lng"]) == 2
    assert (
        "--kinds lng and --languages (any); known: long:en, short:de, short:en"
        in capsys.readouterr().err
    )
