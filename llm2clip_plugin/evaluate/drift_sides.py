"""One side of ``llm2clip evaluate drift``: a tower, with whatever text side it has, and what is measured of it.

Shapes: B and N images, D projection dimension, H width of the tower.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.contracts import PROJECTED, ScoreFile, TowerCard
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.evaluate.class_prompts import class_vectors, prompt_source, read_class_names, read_templates
from llm2clip_plugin.evaluate.config import RetrievalConfig
from llm2clip_plugin.evaluate.image_features import ImageFeatures, image_features
from llm2clip_plugin.evaluate.labeled_images import LabeledImages, SomeImages
from llm2clip_plugin.evaluate.options.drift import DriftConfig
from llm2clip_plugin.evaluate.options.probe import ProbeConfig
from llm2clip_plugin.evaluate.probe import knn, linear_probe, probe_scores, weights_hash
from llm2clip_plugin.evaluate.retrieval_report import evaluate_retrieval
from llm2clip_plugin.evaluate.teacher import Teacher, open_teacher_cache
from llm2clip_plugin.evaluate.zeroshot import classification_scores
from llm2clip_plugin.text.clip_text import ClipTextEncoder, clip_folder
from llm2clip_plugin.text.settings import EncoderConfig
from llm2clip_plugin.text.teacher import load_dual_encoder
from llm2clip_plugin.train.distributed import choose_device
from llm2clip_plugin.vision.directory import fetch_directory
from llm2clip_plugin.vision.dual import DualConfig, DualEncoder, LoadedDualEncoder
from llm2clip_plugin.vision.intact import has_card
from llm2clip_plugin.vision.preprocessor import preprocessor_config
from llm2clip_plugin.vision.towers import load_tower


@dataclass(frozen=True, kw_only=True)
class Side:
    """A tower on its device."""

    path: str
    image: DualEncoder
    read: LoadedDualEncoder | None  # with a text side; None: a tower alone
    images: ImageConfig
    device: torch.device
    weights_sha256: str
    text: str  # what reads captions, for the report; "" if nothing does


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of one side."""

    scores: dict[str, ScoreFile]  # zero-shot, kNN, linear, retrieval
    predicted: dict[str, dict[str, str]] = field(default_factory=dict)  # measure -> image -> class
    layers: dict[str, Tensor] = field(default_factory=dict)  # (N, H) of each state, then of the image feature
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Labeled:
    """The images that are classified, those that the probes are fitted on, and the names of the classes."""

    test: LabeledImages
    names: list[str]
    templates: list[str]
    train: LabeledImages | None


def open_side(path: str, config: DriftConfig) -> Side:
    """Load a tower; without a text adapter it gets the text tower of ``config.clip``, else of the CLIP it came from.

    Raises what loading raises, and ValueError for a CLIP of another width.
    """
    directory, device = fetch_directory(path), choose_device(config.device)
    images = ImageConfig.from_preprocessor(preprocessor_config(directory))
    known = {"path": path, "images": images, "device": device, "weights_sha256": weights_hash(directory)}
    if not has_card(directory) or not TowerCard.read(directory / TowerCard.FILE).projection_dim:
        tower = load_tower(directory)
        pooling = DualConfig(projection="none", projection_dim=tower.config.hidden_size)
        return Side(image=DualEncoder(tower, pooling).to(device).eval(), read=None, text="", **known)
    loaded = load_dual_encoder(directory)
    of_clip = loaded.card.teacher.get("pooling") == PROJECTED
    text = f"the text tower of {loaded.card.teacher.get('llm')}" if of_clip else "its LLM and text adapter"
    if loaded.dual.text_adapter is None:
        clip = config.clip or loaded.card.origin
        own = with_own_text_tower(loaded, clip, explicit=bool(config.clip))
        if own is None:
            return Side(image=loaded.dual.to(device), read=None, text="", **known)
        loaded, text = own, f"the text tower of {clip}"
    return Side(image=loaded.to(device).dual, read=loaded, text=text, **known)


def with_own_text_tower(loaded: LoadedDualEncoder, clip: str, *, explicit: bool) -> LoadedDualEncoder | None:
    """A CLIP as a dual encoder whose teacher is its own text tower, with nothing in between.

    None if ``clip`` is no image-text model at hand, unless it is ``explicit``: then FileNotFoundError or ValueError.
    """
    try:
        folder = clip_folder(clip)
    except (FileNotFoundError, ValueError):
        if explicit:
            raise
        return None
    if folder is None:
        if explicit:
            raise ValueError(f"--clip {clip} is not an image-text model with a text tower of its own")
        return None
    encoder = ClipTextEncoder(folder, EncoderConfig(llm=clip))
    if encoder.width != loaded.dual.config.projection_dim:
        raise ValueError(
            f"the text features of {clip} have width {encoder.width}, but the tower projects to "
            f"{loaded.dual.config.projection_dim}; pass the CLIP that it was imported from with --clip"
        )
    config = dataclasses.replace(loaded.dual.config, llm_width=encoder.width, adapter="none")
    dual = DualEncoder(loaded.dual.tower, config)
    dual.load_state_dict(loaded.dual.state_dict())
    card = dataclasses.replace(
        loaded.card, teacher=dataclasses.asdict(encoder.identity()), dual=dataclasses.asdict(config)
    )
    return LoadedDualEncoder(dual, card, encoder.encode).eval()


def open_labeled(config: DriftConfig, test: LabeledImages, train: LabeledImages | None) -> Labeled:
    """The names of the classes and the prompts. Raises as read_class_names and read_templates do."""
    names = read_class_names(config.classes, config.data, test.classes)
    return Labeled(test=test, names=names, templates=read_templates(config.templates, config.data), train=train)


def measure_side(
    side: Side, config: DriftConfig, labeled: Labeled | None, *, zero_shot: bool, all_ranks: bool
) -> Measured:
    """Everything that the configuration asks of one side."""
    scores: dict[str, ScoreFile] = {}
    predicted: dict[str, dict[str, str]] = {}
    layers: dict[str, Tensor] = {}
    if labeled is not None:
        encoded = _encode(side, config, labeled.test, all_ranks)
        split = side.image.config.projection_dim
        projected, pooled = _columns(encoded, slice(0, split)), _columns(encoded, slice(split, None))
        if zero_shot:
            class_CD = _class_vectors(side, config, labeled, all_ranks)
            scores["zero-shot"] = classification_scores(projected, class_CD, labeled.names)
            nearest = (F.normalize(projected.feature_ND, dim=1) @ class_CD.T).argmax(1)
            predicted["zero-shot"] = _names(projected.keys, nearest, labeled.names)
        if labeled.train is not None:
            train = _columns(_encode(side, config, labeled.train, all_ranks), slice(split, None))
            _probes(train, pooled, config, labeled, scores, predicted)
        if config.cka_images:
            layers = _layers(side, config, labeled.test, all_ranks)
    if config.captions:
        scores["retrieval"] = _retrieval(side, config, all_ranks)
    notes = next((tuple(of.notes) for of in scores.values()), ())
    return Measured(scores=scores, predicted=predicted, layers=layers, notes=notes)


def _encode(side: Side, config: DriftConfig, images: LabeledImages, all_ranks: bool) -> ImageFeatures:
    """Of each image what the projection gives (D), then what it reads, in one pass."""

    def encode(pixels: Tensor) -> Tensor:
        pooled = side.image.pool(pixels)
        return torch.cat([side.image.project(pooled), pooled.float()], dim=1)

    settings = {"batch": config.batch, "workers": config.workers, "all_ranks": all_ranks}
    return image_features(encode, images, side.images, side.device, **settings)


def _columns(features: ImageFeatures, columns: slice) -> ImageFeatures:
    return dataclasses.replace(features, feature_ND=features.feature_ND[:, columns])


def _class_vectors(side: Side, config: DriftConfig, labeled: Labeled, all_ranks: bool) -> Tensor:
    """(C, D) by the side's teacher, whose embeddings of the prompts are cached."""
    assert side.read is not None
    prompts = prompt_source(labeled.names, labeled.templates, config.data)
    # the settings of --llm and --adapter are those of a trained text adapter's LLM
    teacher = Teacher(side.read.card, config.teacher if _has_adapter(side) else EncoderConfig(), side.device)
    folder = Path(config.cache) / f"embeddings-{teacher.fingerprint[:12]}" if config.cache else None
    cache = teacher.cache(prompts, folder, all_ranks=all_ranks)
    return class_vectors(side.read, prompts, cache, all_ranks=all_ranks)


def _has_adapter(side: Side) -> bool:
    return side.image.config.adapter != "none"


def _names(keys: list[str], number_N: Tensor, names: list[str]) -> dict[str, str]:
    return {key: names[number] for key, number in zip(keys, number_N.tolist(), strict=True)}


def _probes(
    train: ImageFeatures,
    test: ImageFeatures,
    config: DriftConfig,
    labeled: Labeled,
    scores: dict[str, ScoreFile],
    predicted: dict[str, dict[str, str]],
) -> None:
    """kNN and, if asked for, the linear probe, into ``scores`` and ``predicted``; classes are the training images'."""
    assert labeled.train is not None
    number_of = {name: number for number, name in enumerate(labeled.train.classes)}
    names = labeled.train.classes
    unseen = [name for name in labeled.test.classes if name not in number_of]
    truth_N = torch.tensor([number_of.get(name, -1) for name in labeled.test.classes])[test.label_N]
    found = {"kNN": knn(train, test.feature_ND, ProbeConfig.k, ProbeConfig.temperature)}
    if config.linear:
        found["linear"] = linear_probe(train, test.feature_ND)
    for name, number_N in found.items():
        scores[name] = probe_scores({name: number_N == truth_N}, test, labeled.test.classes, unseen)
        predicted[name] = _names(test.keys, number_N, names)


def _layers(side: Side, config: DriftConfig, images: LabeledImages, all_ranks: bool) -> dict[str, Tensor]:
    """(n, H) features of up to ``cka_images`` images: the mean patch after each block, then the image feature."""
    tower = side.image.tower
    first = int(side.image.family.has_cls)

    def encode(pixels: Tensor) -> Tensor:
        states = tower(pixel_values=pixels.to(tower.dtype), output_hidden_states=True).hidden_states
        means = [state[:, first:].float().mean(1) for state in states]
        return torch.cat([*means, side.image.encode_image(pixels)], dim=1)

    some = SomeImages(images, config.cka_images)
    settings = {"batch": config.batch, "workers": config.workers, "all_ranks": all_ranks}
    feature_NF = image_features(encode, some, side.images, side.device, **settings).feature_ND
    width = tower.config.hidden_size
    count = (feature_NF.shape[1] - side.image.config.projection_dim) // width
    parts = feature_NF[:, : count * width].split(width, dim=1)
    layers = {"embeddings" if not number else f"block {number}": part for number, part in enumerate(parts)}
    return {**layers, "image feature": feature_NF[:, count * width :]}


def _retrieval(side: Side, config: DriftConfig, all_ranks: bool) -> ScoreFile:
    if side.read is None:
        raise ValueError(f"{side.path} has no text side for --captions; {TEXT_SIDE}")
    data = SourceConfig(path=config.captions, images=config.captions_images)
    source = open_source(data)
    cache = open_teacher_cache(side.read.card, "", data)
    cache.check(source)
    settings = RetrievalConfig(group=config.group, batch=config.batch, workers=config.workers, parts=False)
    return evaluate_retrieval(side.read, source, cache, side.images, settings, all_ranks=all_ranks).scores()


TEXT_SIDE = (
    "give the CLIP that it was imported from with --clip, or fit heads on it: llm2clip train-tower TRAINING_DATA "
    "--tower TOWER --num-train-epochs 0 --output runs/baseline"
)
