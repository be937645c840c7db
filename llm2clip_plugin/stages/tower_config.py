"""RunConfig: everything that decides a tower's training. The sections are declared where they are
read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import llm2clip_plugin
from llm2clip_plugin.data.samples import AugmentConfig, cores, parse_weights
from llm2clip_plugin.data.sources import ReadConfig, SourceConfig
from llm2clip_plugin.evaluate.config import RetrievalConfig, SuitesConfig
from llm2clip_plugin.json_files import from_plain, read_json_value
from llm2clip_plugin.options import Command, section, setting, unknown
from llm2clip_plugin.outside import expand_home
from llm2clip_plugin.stages.settings import TEACHERS, PlanConfig, TrainingConfig
from llm2clip_plugin.train.config import (
    MAX_CAPTIONS,
    DistillConfig,
    HeadsConfig,
    LossConfig,
    OptimConfig,
    TowerConfig,
    TrainConfig,
    local_world_size,
)
from llm2clip_plugin.vision.directory import LOG_SCALE, DualConfig

# what evaluations during training need, as settings declare it
EVALUATES = "evaluates: without --validation or --evaluate-suites"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Captioned images, the teacher's embeddings of their captions, and a held-out split."""

    path: tuple[str, ...] = setting(
        (),
        help="training data: folders of tars, .tar, .jsonl, LLaVA's .json, or URLs of these",
        option="data",
        learned=True,
        per_host=True,
    )
    cache: tuple[str, ...] = setting(
        (),
        help="embedding cache of each path; empty: the one embeddings-* folder next to the data",
        learned=False,
        per_host=True,
    )
    clip_cache: tuple[str, ...] = setting(
        (),
        help="with --heads.target clip_text: cache of the CLIP's text features of each path; "
        "empty: the one next to the data",
        learned=False,
        per_host=True,
    )
    weight: tuple[float, ...] = setting(
        (),
        help="how often a sample of each path is drawn, relative to weight 1; empty: 1 each",
        option="data-weights",
        learned=True,
    )
    caption_weights: tuple[str, ...] = setting(
        (),
        help="how often each kind of caption is drawn, KIND=WEIGHT; other kinds are not drawn; "
        "empty: evenly over all captions",
        learned=True,
    )
    one_source_per_batch: bool = setting(
        False,
        help="draw each global batch from one path, so that negatives are of the same source",
        learned=True,
    )
    captions_per_image: int = setting(
        1,
        help="captions of an image in a step; above 1 for the loss terms multi_positive or cosine",
        learned=True,
    )
    validation: str = setting(
        "",
        help='held-out split for recall during training; "": none',
        learned=False,
        per_host=True,
    )
    validation_cache: str = setting(
        "",
        help='embedding cache of the held-out split; "": the one embeddings-* folder next to it',
        learned=False,
        per_host=True,
        needs="validation",
    )
    # how all of them are read
    read: ReadConfig = section(ReadConfig())
    augment: AugmentConfig = section(AugmentConfig(), prefix="augment.")

    def __post_init__(self) -> None:
        for name, values in (
            ("cache", self.cache),
            ("clip_cache", self.clip_cache),
            ("weight", self.weight),
        ):
            if values and len(values) != len(self.path):
                raise ValueError(
                    f"data.{name} has {len(values)} values for {len(self.path)} paths; "
                    "pass one each"
                )
        if not 1 <= self.captions_per_image <= MAX_CAPTIONS:
            raise ValueError(
                f"data.captions_per_image {self.captions_per_image} "
                f"must be between 1 and {MAX_CAPTIONS}"
            )
        weights = self.kind_weights
        kinds = self.read.kinds
        if weights and kinds and set(weights) != set(kinds):
            raise ValueError(
                f"data.caption_weights {weights} and data.read.kinds {kinds} name different kinds"
            )

    @property
    def kind_weights(self) -> dict[str, float]:
        """How often each kind of caption is drawn; {}: evenly over all captions."""
        return parse_weights(self.caption_weights)

    @property
    def sources(self) -> list[SourceConfig]:
        """One source for each path."""
        weights = self.weight or (1.0,) * len(self.path)
        read = {**vars(self.read), "kinds": self.read.kinds or tuple(self.kind_weights)}
        return [
            SourceConfig(path=path, weight=weight, **read)
            for path, weight in zip(self.path, weights, strict=True)
        ]

    @property
    def held_out(self) -> SourceConfig | None:
        """The validation split with all its captions; ``evaluation`` selects the ones that are
        scored."""
        if not self.validation:
            return None
        read = {**vars(self.read), "kinds": (), "languages": ()}
        return SourceConfig(path=self.validation, **read)


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainingConfig):
    """One training run of a tower (stage 2)."""

    output_dir: str = setting(
        "runs/tower",
        help="output folder (checkpoints, metrics, exported tower)",
        option="output",
        learned=False,
        per_host=True,
    )
    data: DataConfig = section(DataConfig())
    tower: TowerConfig = section(TowerConfig())
    dual: DualConfig = section(DualConfig(), prefix="dual.")
    loss: LossConfig = section(LossConfig(), prefix="loss.")
    distill: DistillConfig = section(DistillConfig(), prefix="distill.")
    optim: OptimConfig = section(
        OptimConfig(),
        needs_of={
            "lr": "trains_at_lr: with --freeze, which trains the heads alone, at --head-lr",
        },
    )
    heads: HeadsConfig = section(HeadsConfig(), prefix="heads.", needs="heads.steps")
    train: TrainConfig = section(TrainConfig(), needs_of={"eval_steps": EVALUATES})
    evaluation: RetrievalConfig = section(
        RetrievalConfig(),
        prefix="evaluation.",
        learned=False,
        needs_of={
            "batch": EVALUATES,
            "workers": EVALUATES,
            # suites have their own
            **dict.fromkeys(
                ("kinds", "languages", "group", "cluster", "ks", "limit"),
                "data.validation",
            ),
        },
    )
    benchmarks: SuitesConfig = section(SuitesConfig(), learned=False)
    plan: PlanConfig = section(
        PlanConfig(), learned=False, per_host=True, needs="dry_run"
    )

    @property
    def evaluates(self) -> bool:
        """Whether evaluations have anything to measure."""
        return bool(
            self.data.validation or self.benchmarks.suites or self.benchmarks.zeroshot
        )

    @property
    def trains_at_lr(self) -> bool:
        """Whether anything is trained with ``optim.lr``; heads alone are with ``optim.head_lr``,
        where it is set."""
        return not (self.tower.freeze and self.optim.head_lr)

    @property
    def evaluated(self) -> RetrievalConfig | None:
        """``evaluation`` as it runs: by as many processes as training has, unless it names a
        number. None where there is nothing to measure."""
        if not self.evaluates:
            return None
        if self.evaluation.workers is not None:
            return self.evaluation
        return replace(self.evaluation, workers=self.train.dataloader_num_workers)

    @property
    def clip_width(self) -> int | None:
        """Of the CLIP's text features that the heads are fitted to; None for a fit to images."""
        if self.heads.target != "clip_text":
            return None
        return self.dual.projection_dim

    def validate(self, *, needs_data: bool = True) -> RunConfig:
        """Check what no single section can check; returns itself. Raises ValueError."""
        missing = ["data: add DATA"] if not self.data.path else []
        if not self.tower.path and not self.tower.from_scratch:
            missing.append("tower to train: add --tower with a directory or Hub id")
        if needs_data and missing:
            raise ValueError(
                f"no {' and no '.join(missing)}. For example: {TRAIN_TOWER.example}"
            )
        if not self.train.has_steps and not self.heads.steps:
            raise ValueError(
                "train.num_train_epochs, train.max_steps and heads.steps are all 0: "
                "nothing to train"
            )
        from llm2clip_plugin.train.losses.base import check_terms  # torch

        check_terms(self.loss, self.dual)
        fits_new = (
            self.heads.steps
            and not self.tower.keep_heads
            and self.dual.adapter != "none"
        )
        if self.heads.target == "clip_text" and not fits_new:
            raise ValueError(
                "heads.target clip_text fits a new text adapter to the CLIP's projection: "
                "set heads.steps, and leave tower.keep_heads and dual.adapter none out"
            )
        if (
            self.tower.freeze
            and self.dual.projection == "none"
            and self.dual.adapter == "none"
        ):
            raise ValueError(
                "nothing to train: tower.freeze with dual.projection none and dual.adapter none"
            )
        return self


DEFAULT = "base"
EMOJI = Path(llm2clip_plugin.__file__).parent / "data" / "emoji"
PAPER_TRAIN = TrainConfig(  # the paper's
    global_batch=4096,
    num_train_epochs=4.0,
    precision="bf16",
    gradient_checkpointing="auto",
    dataloader_num_workers=8,
    save_steps=1000,
    eval_steps=1000,
)


def base() -> RunConfig:
    """Own data with any tower: the paper's rates and decays, with ours of what is marked so: a
    batch that one GPU holds, heads fitted first.

    Set --tower and --data. Thousands of images to millions: the length is counted in epochs.
    """
    return RunConfig(
        # ours: heads with random weights are fitted much better at a low scale, whatever the
        # tower's old head had (docs/benchmarks.md, "Initial logit scale"); --tower.keep-heads has
        # the scale of the heads that are kept
        dual=DualConfig(logit_scale_init=LOG_SCALE),
        optim=OptimConfig(
            lr=1e-5,
            # ours: 1/16 of the paper's batch makes 16 times as many, noisier steps of fitted heads
            head_lr=1e-4,
            weight_decay=0.05,
            layer_decay=0.85,
            max_grad_norm=5.0,
            eps=1e-6,  # ours, as the betas: CLIP's own (arXiv 2103.00020)
            warmup_ratio=0.05,  # ours: the first steps of a small batch are the noisiest
        ),
        # Ours: heads with random weights distort a pretrained tower, and a tower that never saw
        # captions (DINOv2) has none. 300 x 256 pairs see 15,000 images five times; the frozen tower
        # encodes each once.
        heads=HeadsConfig(steps=300, batch=256, lr=1e-3),
        train=TrainConfig(
            # ours: by --dry-run, a ViT-L/14 at 336 px fits a GPU of 24 GiB; the paper's is 4096 on
            # 8
            global_batch=256,
            num_train_epochs=4.0,
            precision="bf16",
            gradient_checkpointing="auto",
            # 8 as in the paper's runs
            dataloader_num_workers=min(8, max(0, cores() // local_world_size() - 1)),
            eval_steps=500,  # ours; the paper's runs have 1000 for 16 times as many pairs a step
        ),
    )


def quickstart() -> RunConfig:
    """The paper in miniature: DINOv2 ViT-S/14 at 56 px on the built-in emoji set, minutes on two
    CPU cores.

    For the emoji alone: it mirrors and rotates images, and evaluates by the field ``concept``. Set
    --tower (the quickstart makes a tower) and --cache.
    """
    return RunConfig(
        output_dir="runs/quickstart",
        data=DataConfig(
            path=(str(EMOJI / "train-*.tar"),),
            read=ReadConfig(kinds=("short", "long"), languages=("en",)),
            augment=AugmentConfig(scale=(0.6, 1.0), flip=True, rotate=10.0),
        ),
        tower=TowerConfig(
            architecture="facebook/dinov2-small", image_size=56
        ),  # 4 x 4 patches
        dual=DualConfig(
            projection_dim=384,
            pool="cls_mean",
            projection_norm=True,
            input_scale="sqrt_width",
            input_noise=0.5,
            logit_scale_init=LOG_SCALE,
        ),
        optim=OptimConfig(
            lr=4e-4,
            head_lr=3e-4,
            layer_decay=0.85,
            weight_decay=0.05,
            max_grad_norm=5.0,
            warmup_ratio=0.15,
        ),
        heads=HeadsConfig(steps=100, batch=256, lr=1e-3),
        train=TrainConfig(global_batch=128, max_steps=100, save_minutes=2.0),
        # concept: the same for one emoji in several styles
        evaluation=RetrievalConfig(
            kinds=("short", "long"), languages=("en",), group="concept"
        ),
    )


def _openai(name: str, hub_id: str) -> RunConfig:
    """The authors' layer-wise decay misses two of an OpenAI tower's names, class_embedding and
    ln_pre (optim.py:15-46).

    Its projection is new, 1280 wide, as in their code (model.py:459, 480; transformer.py:565).
    """
    paper = _paper(name, TowerConfig(path=hub_id))
    full_lr = ("embeddings.class_embedding", "pre_layrnorm")  # sic, on the Hub
    return dataclasses.replace(
        paper, optim=dataclasses.replace(paper.optim, full_lr=full_lr)
    )


def _eva02(name: str) -> RunConfig:
    """The authors' head of an EVA02: with bias, its weights 0.02 x 0.001
    (eva_vit_model.py:446-449).

    `llm2clip import` its .pt, then --tower the result. The paper did not train bigE/14 (4.3 G
    parameters).
    """
    heads = DualConfig(
        projection_dim=1280, projection_bias=True, projection_init_std=2e-5
    )
    return dataclasses.replace(_paper(name, TowerConfig(architecture=name)), dual=heads)


def siglip2_so400m_224() -> RunConfig:
    """SigLIP 2 so400m/14 at 224 px; its own pooled output is the image's embedding, without a
    projection.

    The authors' code cannot decay the learning rate of this tower by depth (timm_model.py has no
    ``get_num_layers``), starts at CLIP's scale (timm's weights have none), and does not normalize
    the LLM's embedding (llm_model.py:31).
    """
    paper = _paper(
        "siglip2-so400m-224", TowerConfig(path="google/siglip2-so400m-patch14-224")
    )
    heads = DualConfig(
        projection_dim=1152,
        projection="none",
        normalize_input=False,
        logit_scale_init=LOG_SCALE,
    )
    return dataclasses.replace(
        paper, dual=heads, optim=dataclasses.replace(paper.optim, layer_decay=1.0)
    )


def lift_b16() -> RunConfig:
    """LIFT (arXiv 2506.04209): a ViT-B/16 from random weights, its MLP head trained to meet the
    LLM's own embeddings.

    Settings of its 512 M samples: 2 epochs of 256 M images of Recap-DataComp-1B (Jingfeng0705/LIFT,
    commit b76da7b, configs/lift_vit_b16_512m.yaml; clipping: training/train.py:145). Not run here.
    """
    return RunConfig(
        output_dir="runs/lift-b16",
        tower=TowerConfig(
            architecture="openai/clip-vit-base-patch16", from_scratch=True
        ),
        dual=DualConfig(pool="mean", projection="mlp", adapter="none"),
        optim=OptimConfig(
            lr=1e-3,
            betas=(0.9, 0.98),
            eps=1e-6,
            weight_decay=0.2,
            layer_decay=1.0,
            max_grad_norm=1.0,
            warmup_steps=500,
        ),
        train=dataclasses.replace(
            PAPER_TRAIN, global_batch=16384, num_train_epochs=2.0, eval_on_start=False
        ),
    )


def _proclip(name: str, hub_id: str, projection_dim: int) -> RunConfig:
    """ProCLIP's published settings (arXiv 2510.18795): the text adapter learns CLIP's text space
    from captions, then InfoNCE and the distance to an EMA of the tower train both sides.

    The fit's length is its four epochs of CC3M, CC12M and YFCC15M: 4 x 30 M / 1024. Its lambda 4e-4
    over the sums of 512 pairs a rank is the weight 4e-4 x 512 (losses/distill.py). Its weight decay
    is .2 in the text and .05 in the table, which is taken. Its adapter is one block of expansion 8
    in its code (VisionXLab/ProCLIP, openclip/model.py), which has as many weights as four of 2.
    """
    paper = _paper(
        name, TowerConfig(architecture=hub_id), projection_dim=projection_dim
    )
    return dataclasses.replace(
        paper,
        dual=dataclasses.replace(paper.dual, adapter_blocks=1, adapter_expansion=8),
        heads=HeadsConfig(
            target="clip_text",
            steps=117_188,
            batch=1024,
            captions_per_image=2,
            lr=1e-5,
        ),
        loss=LossConfig(terms=("infonce=1", "distill=0.2048")),
        distill=DistillConfig(reference="ema", decay=0.999),
        optim=dataclasses.replace(
            paper.optim, betas=(0.9, 0.98), eps=1e-6, layer_decay=1.0
        ),
    )


def _paper(name: str, tower: TowerConfig, *, projection_dim: int = 1280) -> RunConfig:
    """The published stage-2 settings over a tower; data and caches are the user's.

    The paper's data are 15 M images (CC3M, CC12M) or 60 M (also YFCC15M and 30 M of
    Recap-DataComp-1B), with an MLLM's short caption or its long one, drawn evenly (DreamLIP's
    shortSV and longSV: data/extract_embedding.py:12, training/data.py:611-617).
    """
    return RunConfig(
        output_dir=f"runs/{name}",
        tower=tower,
        data=DataConfig(one_source_per_batch=True),
        dual=DualConfig(projection_dim=projection_dim),
        # params.py:4-10 has CLIP's moments for names with "vit", which none of the authors' models
        # has
        optim=OptimConfig(
            lr=1e-5,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.05,
            layer_decay=0.85,
            max_grad_norm=5.0,
        ),
        train=PAPER_TRAIN,
    )


CLIP = "openai/clip-vit-"
RECIPES: dict[str, Callable[[], RunConfig]] = {
    "base": base,
    "quickstart": quickstart,
    # LLaVA 1.5's own tower
    "openai_l14_336": partial(_openai, "openai-l14-336", f"{CLIP}large-patch14-336"),
    "openai_l14_224": partial(_openai, "openai-l14-224", f"{CLIP}large-patch14"),
    "openai_b16": partial(_openai, "openai-b16", f"{CLIP}base-patch16"),
    "eva02_l14_336": partial(_eva02, "eva02-l14-336"),
    "eva02_l14_224": partial(_eva02, "eva02-l14-224"),
    "eva02_b16": partial(_eva02, "eva02-b16"),
    "eva02_bige14": partial(_eva02, "eva02-bige14"),
    "siglip2_so400m_224": siglip2_so400m_224,
    "proclip_l14_224": partial(
        _proclip, "proclip-l14-224", f"{CLIP}large-patch14", 768
    ),
    "proclip_l14_336": partial(
        _proclip, "proclip-l14-336", f"{CLIP}large-patch14-336", 768
    ),
    "proclip_b16": partial(_proclip, "proclip-b16", f"{CLIP}base-patch16", 512),
    "lift_b16": lift_b16,
}
# the authors did not train the tower of eva02_bige14
OWN_RECIPES = (DEFAULT, "quickstart", "eva02_bige14")
OF_OTHER_PAPERS = {"ProCLIP's": "proclip_", "LIFT's": "lift_"}
PAPER_RECIPES = [
    name
    for name in RECIPES
    if name not in OWN_RECIPES and not name.startswith(tuple(OF_OTHER_PAPERS.values()))
]


def recipes_text() -> str:
    """The recipes by whose settings they are, for ``--help``."""
    parts = [
        f"{DEFAULT} (the default), ours: any data and tower",
        "quickstart, ours: the built-in emoji alone",
        f"the LLM2CLIP paper's: {', '.join(PAPER_RECIPES)} (NAME/{', NAME/'.join(TEACHERS)}: only "
        "for caches of that LLM)",
        "the paper's settings for a tower that it does not use: eva02_bige14",
    ]
    for paper, prefix in OF_OTHER_PAPERS.items():
        names = [name for name in RECIPES if name.startswith(prefix)]
        parts.append(f"{paper}: {', '.join(names)}")
    return "; ".join(parts)


def recipe(name: str) -> RunConfig:
    """The recipe of that name; ``TOWER/TEACHER`` accepts only caches as wide as that LLM's
    embeddings.

    Raises ValueError listing the known names.
    """
    tower, slash, llm = name.replace("-", "_").partition("/")
    llm = llm.replace("_", "-")
    if tower not in RECIPES or (slash and llm not in TEACHERS):
        also = f", each also as NAME/TEACHER: {', '.join(TEACHERS)}"
        raise ValueError(unknown("recipe", name, RECIPES, also=also))
    config = RECIPES[tower]()
    if not slash:
        return config
    dual = dataclasses.replace(config.dual, llm_width=TEACHERS[llm].width)
    return dataclasses.replace(
        config, output_dir=f"{config.output_dir}-{llm}", dual=dual
    )


def starting_point(extras: Mapping[str, str]) -> RunConfig:
    """The configuration of --config or --recipe, which the other options override."""
    name = extras.get("recipe", "")
    file = extras.get("config", "")
    if name and file:
        raise ValueError(
            f"--recipe {name} and --config {file} are mutually exclusive; pass one"
        )
    if not file:
        return recipe(name or DEFAULT)
    body = expand_home(read_json_value(file))
    if isinstance(body, dict):
        body = body.get("config", body)
    return from_plain(RunConfig, body, where=file)


TRAIN_TOWER = Command(
    name="train-tower",
    example="llm2clip train-tower /data/photos --tower facebook/dinov2-base --output runs/photos",
    about="Stage 2: train a vision tower against the cached embeddings of an LLM. A recipe or a "
    "file gives the full configuration, options override single settings. Rerun the same command "
    "to resume.",
    settings=RunConfig,
    default=starting_point,
    arguments="data.path",
    everyday="recipe tower cache image-folder validation output global-batch micro-batch lr "
    "num-train-epochs max-steps precision deepspeed dry-run",
    extras={
        "recipe": recipes_text(),
        "config": "a configuration in JSON, for example the run.json of an earlier run",
    },
)
