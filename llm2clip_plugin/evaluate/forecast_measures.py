"""The measures of ``llm2clip forecast`` as values of single images: their mean is the measure, and they can be paired.

Shapes: N images, P patches, H width of a patch, W width of a caption's embedding; M rows of width F.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.contracts import sha256_text

NEIGHBORS = 0.1  # of the images; RAVEL: 100 of 1,000
FOLDS = 5
PENALTIES = tuple(10.0**power for power in range(-3, 4))  # of the probe, relative to the mean squared singular value


def neighbors(patch_NPH: Tensor, text_NW: Tensor) -> Tensor:
    """(N,) share of an image's nearest images that are also nearest by caption, among the nearest tenth; chance is .1.

    Images are compared patch by patch (the mean cosine of each patch with its best match, both ways), after whitening.
    Source: RAVEL, Yang et al. 2026, arXiv 2610.05413; whitening is `whitened`.
    """
    patch_NPH = F.normalize(whitened(patch_NPH.flatten(0, 1)), dim=1).view_as(patch_NPH)
    text_NW = F.normalize(whitened(text_NW), dim=1)
    k = max(1, round(NEIGHBORS * len(text_NW)))
    return neighbor_overlap(best_match_similarity(patch_NPH), text_NW @ text_NW.T, k)


def whitened(feature_MF: Tensor) -> Tensor:
    """(M, F) float32: centered, of unit covariance but for the shrinkage; defined up to a rotation.

    The covariance is Ledoit and Wolf's (2004, J. Multivariate Analysis 88): without shrinkage, fewer rows than columns
    end up equally far apart. Raises ValueError for rows that are all equal, or not finite.
    """
    centered_MF = feature_MF.double() - feature_MF.double().mean(0)
    rows, width = centered_MF.shape
    covariance_FF = centered_MF.T @ centered_MF / rows
    power, mean = covariance_FF.square().sum(), covariance_FF.trace() / width
    if not 0 < mean < float("inf"):
        raise ValueError("features are equal for all images, or not finite")
    noise = (centered_MF.square().sum(1).square().mean() - power) / rows
    shrinkage = (noise / (power - width * mean**2)).clamp(0, 1)
    covariance_FF = (1 - shrinkage) * covariance_FF + shrinkage * mean * torch.eye(width, device=feature_MF.device)
    root_FF = torch.linalg.cholesky(covariance_FF)
    return torch.linalg.solve_triangular(root_FF, centered_MF.T, upper=False).T.float()


def best_match_similarity(patch_NPH: Tensor) -> Tensor:
    """(N, N): mean over the patches of one image of the largest product with a patch of the other, both ways."""
    count, patches, width = patch_NPH.shape
    best_NN = torch.empty(count, count, device=patch_NPH.device)
    for image in range(count):
        product_PNP = (patch_NPH[image] @ patch_NPH.reshape(-1, width).T).view(patches, count, patches)
        best_NN[image] = product_PNP.amax(2).mean(0)
    return (best_NN + best_NN.T) / 2


def neighbor_overlap(one_NN: Tensor, other_NN: Tensor, k: int) -> Tensor:
    """(N,) share of the k most similar others in ``one_NN`` that are among the k most similar in ``other_NN``."""
    near = []
    for similarity_NN in (one_NN, other_NN):
        index_Nk = similarity_NN.clone().fill_diagonal_(-torch.inf).topk(k).indices
        near.append(torch.zeros_like(similarity_NN, dtype=torch.bool).scatter_(1, index_Nk, True))
    return (near[0] & near[1]).sum(1) / k


def cka_by_image(one_NH: Tensor, other_NW: Tensor) -> Tensor:
    """(N,) float64 whose mean is linear centered kernel alignment; each image's jackknife influence on it is added.

    CKA is HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = X X^T, L = Y Y^T: 1 for features that differ by rotation
    and scale, about 0 for unrelated ones, and NaN for features that are equal for all images. Values of images are for
    intervals: images drawn twice, as a bootstrap of CKA itself has them, are similar on both sides and raise it.

    Sources: Kornblith et al. 2019, arXiv 1905.00414; debiased as in Nguyen et al. 2021, arXiv 2010.15327; Arvesen 1969,
    Jackknifing U-statistics.
    """
    one_NN, other_NN = _gram(one_NH), _gram(other_NW)
    pairs = ((one_NN, other_NN), (one_NN, one_NN), (other_NN, other_NN))
    (both, both_N), (ones, ones_N), (others, others_N) = (_hsic(*pair) for pair in pairs)
    without_N = both_N / (ones_N * others_N).sqrt()
    return both / (ones * others).sqrt() + (len(one_NH) - 1) * (without_N.mean() - without_N)


def _gram(feature_NF: Tensor) -> Tensor:
    """(N, N) inner products of centered features, float64; the diagonal is 0."""
    centered_NF = feature_NF.double() - feature_NF.double().mean(0)
    return (centered_NF @ centered_NF.T).fill_diagonal_(0)


def _hsic(one_NN: Tensor, other_NN: Tensor) -> tuple[Tensor, Tensor]:
    """The unbiased estimator of HSIC (Song et al. 2012, equation 5), as the biased one approaches 1 where features are
    wider than images are many; and (N,) the estimator without the n-th image, for each n: only sums change."""
    product_N, one_N, other_N = (one_NN * other_NN).sum(1), one_NN.sum(1), other_NN.sum(1)

    def estimate(count: int, products: Tensor, ones: Tensor, others: Tensor, rows: Tensor) -> Tensor:
        sums = ones * others / ((count - 1) * (count - 2))
        return (products + sums - 2 * rows / (count - 2)) / (count * (count - 3))

    products, ones, others, rows = product_N.sum(), one_N.sum(), other_N.sum(), one_N @ other_N
    rows_N = rows - one_N * other_N - one_NN @ other_N - other_NN @ one_N + product_N
    products_N, ones_N, others_N = products - 2 * product_N, ones - 2 * one_N, others - 2 * other_N
    count = len(one_NN)
    return (
        estimate(count, products, ones, others, rows),
        estimate(count - 1, products_N, ones_N, others_N, rows_N),
    )


def explained(feature_NH: Tensor, text_NW: Tensor, clusters: Sequence[str]) -> Tensor:
    """(N,) whose mean is the share of the captions' variance that a ridge regression explains in held-out images.

    Five folds of whole clusters; the penalty is the best on a fold that is neither fitted nor tested. The share is
    1 - sum of squared errors / sum of squared distances from the fitted images' mean, so it can be below 0; a value is
    the share plus the image's influence on it.
    """
    fold_N = folds(clusters)
    error_N, total_N = torch.zeros(2, len(fold_N), dtype=torch.float64)
    for fold in range(FOLDS):
        test_N, choose_N = fold_N == fold, fold_N == (fold + 1) % FOLDS
        fit_N, rest_N = ~test_N & ~choose_N, ~test_N
        tried = ridge(feature_NH[fit_N], text_NW[fit_N], feature_NH[choose_N], PENALTIES)
        best = min(range(len(PENALTIES)), key=lambda one: float((tried[one] - text_NW[choose_N]).square().sum()))
        predicted = ridge(feature_NH[rest_N], text_NW[rest_N], feature_NH[test_N], PENALTIES[best : best + 1])[0]
        error_N[test_N] = (predicted - text_NW[test_N]).double().square().sum(1)
        total_N[test_N] = (text_NW[test_N] - text_NW[rest_N].mean(0)).double().square().sum(1)
    unexplained = error_N.sum() / total_N.sum()
    return 1 - unexplained - (error_N - unexplained * total_N) / total_N.mean()


def folds(clusters: Sequence[str]) -> Tensor:
    """(N,) number of each image's fold: whole clusters in the order of their names' hashes. ValueError for too few."""
    names = sorted(set(clusters), key=sha256_text)
    if len(names) < 4 * FOLDS:
        raise ValueError(f"a forecast needs at least {4 * FOLDS} images or clusters of images, got {len(names)}")
    number = {name: place % FOLDS for place, name in enumerate(names)}
    return torch.tensor([number[name] for name in clusters])


def ridge(feature_MF: Tensor, target_MW: Tensor, other_NF: Tensor, penalties: Sequence[float]) -> list[Tensor]:
    """(N, W) predictions for ``other_NF`` with each penalty; the intercept is not penalized."""
    mean_F, mean_W = feature_MF.mean(0), target_MW.mean(0)
    u_MR, s_R, v_RF = torch.linalg.svd(feature_MF - mean_F, full_matrices=False)
    target_RW, other_NR = u_MR.T @ (target_MW - mean_W), (other_NF - mean_F) @ v_RF.T
    scale = s_R.square().mean()
    return [mean_W + other_NR @ (s_R / (s_R.square() + p * scale))[:, None].mul(target_RW) for p in penalties]
