"""``llm2clip forecast``: how well a tower is likely to serve an LLM in LLaVA, measured before any
LLaVA is trained.

The patches that LLaVA would read are compared with the LLM's embeddings of the images' captions.
Measures are values of single images, whose mean is the measure, so that they can be paired.

Shapes: B and N images, P patches, H width of the tower, W width of the LLM; M rows of width F.
"""

import dataclasses
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.bootstrap import Interval, bootstrap_mean
from llm2clip_plugin.contracts import ScoreFile, TeacherIdentity
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.remote import computed_folder, public_name
from llm2clip_plugin.data.samples import BrokenSample, select_captions
from llm2clip_plugin.data.sources import Source, check_fields, open_source
from llm2clip_plugin.evaluate import commands
from llm2clip_plugin.evaluate.classification import weights_hash
from llm2clip_plugin.evaluate.config import (
    DRAWINGS,
    FORECAST,
    ForecastConfig,
    RetrievalConfig,
)
from llm2clip_plugin.evaluate.features import encode_images, json_field
from llm2clip_plugin.evaluate.retrieval import check_measurable
from llm2clip_plugin.evaluate.suites import InMemorySource, Row
from llm2clip_plugin.hashes import canonical_json, sha256_text
from llm2clip_plugin.text.config import EncoderConfig, find_card
from llm2clip_plugin.text.embed import default_cache_folder, embed_source
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.train.distributed import choose_device
from llm2clip_plugin.vision.directory import fetch_directory
from llm2clip_plugin.vision.families import family_of
from llm2clip_plugin.vision.towers import load_tower, preprocessor_config

# patches a side that are compared, at most: the cost of neighbors grows with the square of the
# patches
GRID = 8
NEIGHBORS = 0.1  # of the images; RAVEL: 100 of 1,000
FOLDS = 5
# of the probe, relative to the mean squared singular value
PENALTIES = tuple(10.0**power for power in range(-3, 4))

Captions = tuple[dict[int, Row], Tensor, TeacherIdentity]  # of `read_captions`


def main(argv: list[str]) -> int:
    """``llm2clip forecast TOWER [TOWER ...] --llm LLM``."""
    config = FORECAST.parse(argv)
    source = open_source(config.data)
    check_fields(source)
    selected = RetrievalConfig(
        kinds=config.data.kinds, languages=config.data.languages, cluster=config.cluster
    )
    check_measurable(source, selected)
    for tower in config.towers:  # that they are there, before captions are embedded
        fetch_directory(tower)
    captions = read_captions(config, source)
    records = [forecast(tower, config, source, captions) for tower in config.towers]
    print_measures(config, records)
    if config.json:
        for number, record in enumerate(records, 1):
            path = Path(config.json)
            if len(records) > 1:
                path = path.with_stem(f"{path.stem}-{number}")
            commands.write_scores(record, str(path))
    return 0


def select_rows(config: ForecastConfig, source: Source) -> dict[int, Row]:
    """Up to ``limit`` images with captions, evenly spaced, by their numbers; a row has no image."""
    count = min(config.limit, len(source))
    rows: dict[int, Row] = {}
    for index in range(count):
        number = index * len(source) // count
        with suppress(BrokenSample):
            sample = source[number]
            used = select_captions(
                sample.captions, config.data.kinds, config.data.languages
            )
            if not used:
                continue
            cluster = sample.key
            if config.cluster:
                cluster = json_field(sample.meta, config.cluster, sample.key)
            rows[number] = Row(sample.key, None, used, {"cluster": str(cluster)})
    return rows


def read_captions(config: ForecastConfig, source: Source) -> Captions:
    """Up to ``limit`` images with captions, evenly spaced, by their numbers; the mean of each one's
    embedded captions, cached, float32 on the CPU; the LLM's identity."""
    rows = select_rows(config, source)
    # enough of them, before the work
    folds([row.meta["cluster"] for row in rows.values()])
    encoding = config.encoder
    if find_card(encoding.adapter or encoding.llm):
        # a fine-tuned LLM is read as its card says
        encoding = dataclasses.replace(
            encoding,
            attention=EncoderConfig.attention,
            layer=EncoderConfig.layer,
            include_bos=EncoderConfig.include_bos,
        )
    encoder = CaptionEncoder(encoding, choose_device(config.device))
    identity = encoder.identity()
    folder = Path(config.cache or forecast_folder(source.path, identity))
    if not config.cache and Path(source.path) == DRAWINGS:
        # the package's folder may be read-only
        folder = computed_folder(folder.name)
    name = f"forecast-{data_sha256([*rows.values()])[:12]}"
    captions = InMemorySource(name, folder, list(rows.values()))
    embed_source(captions, encoder, folder)
    cache = EmbeddingCache.open(folder, expect_fingerprint=identity.fingerprint)
    means: list[Tensor] = []
    for index, row in enumerate(captions.rows):
        text_mW = cache.rows(captions.name, index, row.captions, key=row.key)
        means.append(text_mW.mean(0))
    return rows, torch.stack(means), identity


def forecast_folder(path: str, identity: TeacherIdentity) -> Path:
    """The folder next to the data for the LLM's embeddings of a forecast, not where a training
    looks for its cache. Raises ValueError for data at a URL."""
    folder = default_cache_folder(path, identity.fingerprint)
    return folder.with_name(f"forecast-{identity.fingerprint[:12]}")


@torch.no_grad()
def forecast(
    tower: str, config: ForecastConfig, source: Source, captions: Captions
) -> ScoreFile:
    """The measures of one tower, and every readable image's values. ValueError for a layer that the
    tower lacks."""
    rows, text_NW, llm = captions
    layer = config.select_layer
    directory = fetch_directory(tower)
    device = choose_device(config.device)
    model: Any = load_tower(directory).to(device).eval()
    states = model.config.num_hidden_layers + 1
    if not -states <= layer < states:
        raise ValueError(
            f"--select-layer {layer}: {tower} has hidden states {-states} to {states - 1}"
        )
    images = ImageConfig.from_preprocessor(preprocessor_config(directory, square=True))
    first = int(family_of(model).has_cls)

    def encode(pixels: Tensor) -> Tensor:
        output = model(pixel_values=pixels.to(model.dtype), output_hidden_states=True)
        states = output.hidden_states
        return on_grid(states[layer][:, first:].float())

    encoded = encode_images(
        encode,
        source,
        images,
        device,
        label=public_name(tower),
        batch=config.batch,
        workers=config.workers,
        indices=list(rows),
    )
    patch_NPH = encoded.joined().to(device)
    image_NH = patch_NPH.mean(1).cpu()
    is_readable = torch.isin(torch.tensor([*rows]), torch.tensor(encoded.numbers))
    text_NW = text_NW[is_readable]
    clusters = [rows[number].meta["cluster"] for number in encoded.numbers]
    values = {  # of the images, whose mean is the measure
        "neighbors": neighbors(patch_NPH, text_NW.to(device)).cpu(),
        "CKA": cka_by_image(image_NH, text_NW),
        "probe": explained(image_NH, text_NW, clusters),
    }
    items: list[dict[str, Any]] = []
    for index, (key, cluster) in enumerate(zip(encoded.keys, clusters, strict=True)):
        item: dict[str, Any] = {"id": key, "cluster": cluster}
        item["score"] = float(values["neighbors"][index])
        for name, value_N in values.items():
            item[name] = float(value_N[index])
        items.append(item)
    origin = commands.provenance(
        weights_sha256=weights_hash(directory),
        data_sha256=data_sha256([rows[number] for number in encoded.numbers]),
        llm=dataclasses.asdict(llm),
        llm_fingerprint=llm.fingerprint,
        select_layer=layer,
    )
    return ScoreFile(
        benchmark=f"forecast:{public_name(config.data.path)}",
        metrics={name: float(value_N.mean()) for name, value_N in values.items()},
        items=items,
        counts={"images": len(items), "left_out": len(encoded.broken)},
        model=tower,
        provenance=origin,
        notes=[f"left out: {error}" for error in encoded.broken],
    )


def data_sha256(rows: Sequence[Row]) -> str:
    """Of the images' keys and the captions of each."""
    texts: list[list[str]] = []
    for row in rows:
        texts.append([row.key, *(caption.text for caption in row.captions)])
    return sha256_text(canonical_json(texts))


def on_grid(patch_BPH: Tensor) -> Tensor:
    """Patches averaged to at most GRID x GRID an image."""
    side = math.isqrt(patch_BPH.shape[1])
    if side <= GRID:
        return patch_BPH
    grid_BHSS = patch_BPH.transpose(1, 2).unflatten(2, (side, side))
    return F.adaptive_avg_pool2d(grid_BHSS, GRID).flatten(2).transpose(1, 2)


def print_measures(config: ForecastConfig, records: Sequence[ScoreFile]) -> None:
    """Each tower's measures with intervals, and the paired differences to the first tower."""
    rows = {}
    for record in records:
        rows[record.model] = {
            name: str(interval(record, name)) for name in record.metrics
        }
        if record is not records[0]:
            less = rows[f"{record.model} less the first"] = {}
            for name in record.metrics:
                change = interval(record, name, records[0])
                word = "cannot tell"
                if change.low > 0:
                    word = "higher"
                elif change.high < 0:
                    word = "lower"
                ends = f"[{change.low:+.3f}, {change.high:+.3f}]"
                less[name] = f"{change.mean:+.3f} {ends} {word}"
    count = records[0].counts["images"]
    llm = public_name(config.encoder.llm)
    title = f"forecast for {llm} on {count} images of {public_name(config.data.path)}"
    commands.print_table(
        title,
        rows,
        "95 % intervals over images or --cluster; chance: neighbors .1, CKA and probe 0",
    )


def interval(record: ScoreFile, name: str, base: ScoreFile | None = None) -> Interval:
    """Of a measure, or of its paired difference to ``base``, which has the same images."""
    values = [item[name] for item in record.items]
    if base is not None:
        base_values = [item[name] for item in base.items]
        pairs = zip(values, base_values, strict=True)
        values = [value - base_value for value, base_value in pairs]
    return bootstrap_mean(values, [item["cluster"] for item in record.items])


def neighbors(patch_NPH: Tensor, text_NW: Tensor) -> Tensor:
    """(N,) share of an image's nearest images that are also nearest by caption, among the nearest
    tenth; chance is .1.

    Images are compared patch by patch (the mean cosine of each patch with its best match, both
    ways), after whitening. Source: RAVEL, Yang et al. 2026, arXiv 2610.05413; whitening is
    `whitened`.
    """
    patch_NPH = F.normalize(whitened(patch_NPH.flatten(0, 1)), dim=1).view_as(patch_NPH)
    text_NW = F.normalize(whitened(text_NW), dim=1)
    k = max(1, round(NEIGHBORS * len(text_NW)))
    return neighbor_overlap(best_match_similarity(patch_NPH), text_NW @ text_NW.T, k)


def whitened(feature_MF: Tensor) -> Tensor:
    """(M, F) float32: centered, of unit covariance but for the shrinkage; defined up to a rotation.

    The covariance is Ledoit and Wolf's (2004, J. Multivariate Analysis 88): without shrinkage,
    fewer rows than columns end up equally far apart. Raises ValueError for rows that are all equal,
    or not finite.
    """
    feature_MF = feature_MF.double()
    centered_MF = feature_MF - feature_MF.mean(0)
    rows, width = centered_MF.shape
    covariance_FF = centered_MF.T @ centered_MF / rows
    power = covariance_FF.square().sum()
    mean = covariance_FF.trace() / width
    if not 0 < mean < float("inf"):
        raise ValueError("features are equal for all images, or not finite")
    squared_length_M = centered_MF.square().sum(1)
    noise = (squared_length_M.square().mean() - power) / rows
    shrinkage = (noise / (power - width * mean**2)).clamp(0, 1)
    identity_FF = torch.eye(width, device=feature_MF.device)
    isotropic_FF = shrinkage * mean * identity_FF
    root_FF = torch.linalg.cholesky((1 - shrinkage) * covariance_FF + isotropic_FF)
    return torch.linalg.solve_triangular(root_FF, centered_MF.T, upper=False).T.float()


def best_match_similarity(patch_NPH: Tensor) -> Tensor:
    """(N, N): mean over the patches of one image of the largest product with a patch of the other,
    both ways."""
    count, patches, width = patch_NPH.shape
    all_patches_MH = patch_NPH.reshape(-1, width)
    best_NN = torch.empty(count, count, device=patch_NPH.device)
    for image in range(count):
        product_PM = patch_NPH[image] @ all_patches_MH.T
        product_PNP = product_PM.view(patches, count, patches)
        best_NN[image] = product_PNP.amax(2).mean(0)
    return (best_NN + best_NN.T) / 2


def neighbor_overlap(one_NN: Tensor, other_NN: Tensor, k: int) -> Tensor:
    """(N,) share of the k most similar others in ``one_NN`` that are among the k most similar in
    ``other_NN``."""
    near = []
    for similarity_NN in (one_NN, other_NN):
        index_Nk = similarity_NN.clone().fill_diagonal_(-torch.inf).topk(k).indices
        near.append(
            torch.zeros_like(similarity_NN, dtype=torch.bool).scatter_(
                1, index_Nk, True
            )
        )
    return (near[0] & near[1]).sum(1) / k


def cka_by_image(one_NH: Tensor, other_NW: Tensor) -> Tensor:
    """(N,) float64: linear CKA (Kornblith et al. 2019, arXiv 1905.00414), debiased (Nguyen et al.
    2021, arXiv 2010.15327), plus each image's jackknife influence on it (Arvesen 1969), whose mean
    is 0.

    1 for features that differ by rotation and scale, about 0 for unrelated ones. Not CKA itself is
    bootstrapped, as images drawn twice are similar on both sides and raise it.
    """
    grams = []
    for feature_NF in (one_NH.double(), other_NW.double()):
        centered_NF = feature_NF - feature_NF.mean(0)
        grams.append((centered_NF @ centered_NF.T).fill_diagonal_(0))
    one_NN, other_NN = grams
    product = hsic(one_NN, one_NN) * hsic(other_NN, other_NN)
    cka = hsic(one_NN, other_NN) / product.sqrt()
    cka_of_all = cka[0]
    without_N = cka[1:]  # of all images but one
    influence_N = (len(one_NH) - 1) * (without_N.mean() - without_N)
    return cka_of_all + influence_N


def hsic(one_NN: Tensor, other_NN: Tensor) -> Tensor:
    """(1 + N,) the unbiased estimator of HSIC (Song et al. 2012, equation 5) of all images, then
    without each."""

    def sums_without(row_N: Tensor) -> Tensor:
        """(1 + N,) sums of all entries from sums of rows, of all images, then without each, which
        has a row and a column."""
        return row_N.sum() - 2 * F.pad(row_N, (1, 0))

    product_N = (one_NN * other_NN).sum(1)
    one_N = one_NN.sum(1)
    other_N = other_NN.sum(1)
    lost_N = one_N * other_N + one_NN @ other_N + other_NN @ one_N - product_N
    rows = one_N @ other_N - F.pad(lost_N, (1, 0))
    count = F.pad(torch.full_like(one_N, -1.0), (1, 0)) + len(one_NN)
    sums = sums_without(one_N) * sums_without(other_N) / ((count - 1) * (count - 2))
    unscaled = sums_without(product_N) + sums - 2 * rows / (count - 2)
    return unscaled / (count * (count - 3))


def explained(feature_NH: Tensor, text_NW: Tensor, clusters: Sequence[str]) -> Tensor:
    """(N,) whose mean is the share of the captions' variance that a ridge regression explains in
    held-out images.

    Five folds of whole clusters; the penalty is the best on a fold that is neither fitted nor
    tested. The share is 1 - sum of squared errors / sum of squared distances from the fitted
    images' mean, so it can be below 0; a value is the share plus the image's influence on it.
    """
    fold_N = folds(clusters)
    error_N, total_N = torch.zeros(2, len(fold_N), dtype=torch.float64)
    for fold in range(FOLDS):
        test_N = fold_N == fold
        choose_N = fold_N == (fold + 1) % FOLDS
        fit_N = ~test_N & ~choose_N
        rest_N = ~test_N
        predictions = ridge(
            feature_NH[fit_N], text_NW[fit_N], feature_NH[choose_N], PENALTIES
        )
        errors: list[float] = []
        for predicted in predictions:
            errors.append(float((predicted - text_NW[choose_N]).square().sum()))
        best = PENALTIES[errors.index(min(errors))]
        (predicted,) = ridge(
            feature_NH[rest_N], text_NW[rest_N], feature_NH[test_N], [best]
        )
        text_nW = text_NW[test_N]
        mean_W = text_NW[rest_N].mean(0)
        error_N[test_N] = (predicted - text_nW).double().square().sum(1)
        total_N[test_N] = (text_nW - mean_W).double().square().sum(1)
    unexplained = error_N.sum() / total_N.sum()
    influence_N = (error_N - unexplained * total_N) / total_N.mean()
    return 1 - unexplained - influence_N


def folds(clusters: Sequence[str]) -> Tensor:
    """(N,) number of each image's fold: whole clusters in the order of their names' hashes.
    ValueError for too few."""
    names = sorted(set(clusters), key=sha256_text)
    if len(names) < 4 * FOLDS:
        raise ValueError(
            f"a forecast needs at least {4 * FOLDS} images or clusters of images, got {len(names)}"
        )
    fold_of = {name: position % FOLDS for position, name in enumerate(names)}
    return torch.tensor([fold_of[name] for name in clusters])


def ridge(
    feature_MF: Tensor, target_MW: Tensor, other_NF: Tensor, penalties: Sequence[float]
) -> list[Tensor]:
    """(N, W) predictions for ``other_NF`` with each penalty; the intercept is not penalized."""
    mean_F = feature_MF.mean(0)
    mean_W = target_MW.mean(0)
    u_MR, s_R, v_RF = torch.linalg.svd(feature_MF - mean_F, full_matrices=False)
    target_RW = u_MR.T @ (target_MW - mean_W)
    other_NR = (other_NF - mean_F) @ v_RF.T
    scale = s_R.square().mean()
    predictions: list[Tensor] = []
    for penalty in penalties:
        shrunk_R = s_R / (s_R.square() + penalty * scale)
        predictions.append(mean_W + other_NR @ (shrunk_R[:, None] * target_RW))
    return predictions
