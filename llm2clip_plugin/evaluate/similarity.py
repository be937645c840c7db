"""How similar two sets of features of the same images are.

Shapes: N images, D and E widths of their features in the two towers.
"""

from torch import Tensor

LEAST_IMAGES = 4  # the estimator divides by N - 3


def linear_cka(one_ND: Tensor, other_NE: Tensor) -> float:
    """Linear centered kernel alignment: 1 for features that differ by rotation and scale, about 0 for unrelated ones.

    HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = X X^T, L = Y Y^T and the unbiased estimator of HSIC (Song et al.
    2012, equation 5), as the biased one approaches 1 where features are wider than images are many. So it can be a
    little below 0. NaN for features that are equal for all images.

    Source: Kornblith et al. 2019, arXiv 1905.00414; debiased as in Nguyen et al. 2021, arXiv 2010.15327.
    Raises ValueError for fewer than 4 images, or another number of them on each side.
    """
    if len(one_ND) != len(other_NE) or len(one_ND) < LEAST_IMAGES:
        raise ValueError(f"CKA needs the same images on both sides, at least 4; got {len(one_ND)} and {len(other_NE)}")
    one_NN, other_NN = _gram(one_ND), _gram(other_NE)
    scale = _hsic(one_NN, one_NN) * _hsic(other_NN, other_NN)
    return _hsic(one_NN, other_NN) / scale**0.5 if scale > 0 else float("nan")


def _gram(feature_ND: Tensor) -> Tensor:
    """(N, N) inner products of centered features, float64; the diagonal is 0."""
    centered_ND = feature_ND.double() - feature_ND.double().mean(0)
    return (centered_ND @ centered_ND.T).fill_diagonal_(0)


def _hsic(one_NN: Tensor, other_NN: Tensor) -> float:
    count = len(one_NN)
    sums = float(one_NN.sum()) * float(other_NN.sum()) / ((count - 1) * (count - 2))
    rows = float(one_NN.sum(1) @ other_NN.sum(1)) * 2 / (count - 2)
    return (float((one_NN * other_NN).sum()) + sums - rows) / (count * (count - 3))


def partners(blocks: int, others: int) -> list[int]:
    """For each of the states 0 (embeddings) to ``blocks`` the state at the same depth among ``others`` blocks."""
    return [round(number * others / blocks) for number in range(blocks + 1)]
