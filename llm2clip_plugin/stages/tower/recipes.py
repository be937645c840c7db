"""Stage 2's named runs, each a function that returns a full configuration; the command line overrides single fields.

Published settings: LLM2CLIP's own code (arXiv 2411.04997; microsoft/LLM2CLIP, commit cba3b45, whose files are named
below). docs/fidelity.md compares each setting with it, and says where and why a recipe differs.

``base`` is for own data with any tower, and the default; what differs there from the paper is marked "ours".
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import llm2clip_plugin
from llm2clip_plugin.data.augment_config import AugmentConfig
from llm2clip_plugin.data.pool import cores
from llm2clip_plugin.data.sources.base import ReadConfig
from llm2clip_plugin.evaluate.config import RetrievalConfig
from llm2clip_plugin.options.names import joined, nearest, unknown
from llm2clip_plugin.stages.paper import TEACHERS
from llm2clip_plugin.stages.tower.config import DataConfig, RunConfig
from llm2clip_plugin.train.config import DistillConfig, HeadsConfig, OptimConfig, TowerConfig, TrainConfig
from llm2clip_plugin.train.launcher import local_world_size
from llm2clip_plugin.train.loss_config import LossConfig
from llm2clip_plugin.vision.dual_config import LOG_SCALE, DualConfig

DEFAULT = "base"
EMOJI = Path(llm2clip_plugin.__file__).parent / "data" / "emoji"
EMOJI_FIELD = "concept"  # of its samples: the same for one emoji in several styles


def base() -> RunConfig:
    """Own data with any tower: the paper's settings, with a batch that one GPU holds and heads fitted first.

    Set --tower and --data. Thousands of images to millions: the length is counted in epochs.
    """
    return RunConfig(
        # ours: heads with random weights are fitted much better at a low scale, whatever the tower's old head had
        # (docs/benchmarks.md, "Initial logit scale"); --tower.keep-heads has the scale of the heads that are kept
        dual=DualConfig(logit_scale_init=LOG_SCALE),
        optim=OptimConfig(
            lr=1e-5,
            head_lr=1e-4,  # ours: 1/16 of the paper's batch makes 16 times as many, noisier steps of fitted heads
            weight_decay=0.05,
            layer_decay=0.85,
            max_grad_norm=5.0,
            eps=1e-6,  # ours, as the betas: CLIP's own (arXiv 2103.00020)
            warmup_ratio=0.05,  # ours: the first steps of a small batch are the noisiest
        ),
        # Ours: heads with random weights distort a pretrained tower, and a tower that never saw captions (DINOv2) has
        # none. 300 x 256 pairs see 15,000 images five times; the frozen tower encodes each once.
        heads=HeadsConfig(steps=300, batch=256, lr=1e-3),
        train=TrainConfig(
            global_batch=256,  # ours: by --dry-run, a ViT-L/14 at 336 px fits a GPU of 24 GiB; the paper's is 4096 on 8
            num_train_epochs=4.0,
            precision="bf16",
            gradient_checkpointing=True,
            dataloader_num_workers=min(8, max(0, cores() // local_world_size() - 1)),  # 8 as in the paper's runs
            eval_steps=500,  # ours; the paper's runs have 1000 for 16 times as many pairs a step
        ),
    )


def quickstart() -> RunConfig:
    """The paper in miniature: DINOv2 ViT-S/14 at 56 px on the built-in emoji set, minutes on two CPU cores.

    For the emoji alone: it mirrors and rotates images, and evaluates by the field ``concept``. Set --tower (the
    quickstart makes a tower) and --cache.
    """
    return RunConfig(
        output_dir="runs/quickstart",
        data=DataConfig(
            path=(str(EMOJI / "train-*.tar"),),
            read=ReadConfig(kinds=("short", "long"), languages=("en",)),
            augment=AugmentConfig(scale=(0.6, 1.0), flip=True, rotate=10.0),
        ),
        tower=TowerConfig(architecture="facebook/dinov2-small", image_size=56),  # 4 x 4 patches
        dual=DualConfig(
            projection_dim=384,
            pool="cls_mean",
            projection_norm=True,
            input_scale="sqrt_width",
            input_noise=0.5,
            logit_scale_init=LOG_SCALE,
        ),
        optim=OptimConfig(
            lr=4e-4, head_lr=3e-4, layer_decay=0.85, weight_decay=0.05, max_grad_norm=5.0, warmup_ratio=0.15
        ),
        heads=HeadsConfig(steps=100, batch=256, lr=1e-3),
        train=TrainConfig(global_batch=128, max_steps=100, save_minutes=2.0),
        evaluation=RetrievalConfig(kinds=("short", "long"), languages=("en",), group=EMOJI_FIELD),
    )


def openai_l14_336() -> RunConfig:
    """OpenAI's CLIP ViT-L/14 at 336 px, LLaVA 1.5's own tower, with the paper's settings."""
    return _openai("openai-l14-336", "openai/clip-vit-large-patch14-336")


def openai_l14_224() -> RunConfig:
    """OpenAI's CLIP ViT-L/14 at 224 px."""
    return _openai("openai-l14-224", "openai/clip-vit-large-patch14")


def openai_b16() -> RunConfig:
    """OpenAI's CLIP ViT-B/16."""
    return _openai("openai-b16", "openai/clip-vit-base-patch16")


def _openai(name: str, hub_id: str) -> RunConfig:
    """The authors' layer-wise decay misses two of an OpenAI tower's names, class_embedding and ln_pre (optim.py:15-46).

    Its projection is new, 1280 wide, as in their code (model.py:459, 480; transformer.py:565).
    """
    paper = _paper(name, TowerConfig(path=hub_id))
    full_lr = ("embeddings.class_embedding", "pre_layrnorm")  # sic, on the Hub
    return dataclasses.replace(paper, optim=dataclasses.replace(paper.optim, full_lr=full_lr))


def eva02_l14_336() -> RunConfig:
    """EVA02-CLIP L/14 at 336 px: `llm2clip import` its .pt, then --tower the result."""
    return _eva02("eva02-l14-336")


def eva02_l14_224() -> RunConfig:
    """EVA02-CLIP L/14 at 224 px: `llm2clip import` its .pt, then --tower the result."""
    return _eva02("eva02-l14-224")


def eva02_b16() -> RunConfig:
    """EVA02-CLIP B/16: `llm2clip import` its .pt, then --tower the result."""
    return _eva02("eva02-b16")


def eva02_bige14() -> RunConfig:
    """EVA02-CLIP bigE/14 (4.3 G parameters) with the settings of the smaller ones; the paper did not train it."""
    return _eva02("eva02-bige14")


def _eva02(name: str) -> RunConfig:
    """The authors' head of an EVA02: with bias, its weights 0.02 x 0.001 (eva_vit_model.py:446-449)."""
    heads = DualConfig(projection_dim=1280, projection_bias=True, projection_init_std=2e-5)
    return dataclasses.replace(_paper(name, TowerConfig(architecture=name)), dual=heads)


def siglip2_so400m_224() -> RunConfig:
    """SigLIP 2 so400m/14 at 224 px; its own pooled output is the image's embedding, without a projection.

    The authors' code cannot decay the learning rate of this tower by depth (timm_model.py has no ``get_num_layers``),
    starts at CLIP's scale (timm's weights have none), and does not normalize the LLM's embedding (llm_model.py:31).
    """
    paper = _paper("siglip2-so400m-224", TowerConfig(path="google/siglip2-so400m-patch14-224"))
    heads = DualConfig(projection_dim=1152, projection="none", normalise_input=False, logit_scale_init=LOG_SCALE)
    return dataclasses.replace(paper, dual=heads, optim=dataclasses.replace(paper.optim, layer_decay=1.0))


def lift_b16() -> RunConfig:
    """LIFT (arXiv 2506.04209): a ViT-B/16 from random weights, its MLP head trained to meet the LLM's own embeddings.

    Settings of its 512 M samples: 2 epochs of 256 M images of Recap-DataComp-1B (Jingfeng0705/LIFT, commit b76da7b,
    configs/lift_vit_b16_512m.yaml; clipping: training/train.py:145). Not run here.
    """
    return RunConfig(
        output_dir="runs/lift-b16",
        tower=TowerConfig(architecture="openai/clip-vit-base-patch16", from_scratch=True),
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
        train=TrainConfig(
            global_batch=16384,
            num_train_epochs=2.0,
            precision="bf16",
            gradient_checkpointing=True,
            dataloader_num_workers=8,
            save_steps=1000,
            eval_steps=1000,
            eval_on_start=False,
        ),
    )


def proclip_l14_224() -> RunConfig:
    """ProCLIP over CLIP ViT-L/14: `llm2clip import` it, then --tower the result."""
    return _proclip("proclip-l14-224", TowerConfig(architecture="openai/clip-vit-large-patch14"), projection_dim=768)


def proclip_l14_336() -> RunConfig:
    """ProCLIP over CLIP ViT-L/14 at 336 px."""
    tower = TowerConfig(architecture="openai/clip-vit-large-patch14-336")
    return _proclip("proclip-l14-336", tower, projection_dim=768)


def proclip_b16() -> RunConfig:
    """ProCLIP over CLIP ViT-B/16."""
    return _proclip("proclip-b16", TowerConfig(architecture="openai/clip-vit-base-patch16"), projection_dim=512)


def _proclip(name: str, tower: TowerConfig, *, projection_dim: int) -> RunConfig:
    """ProCLIP's published settings (arXiv 2510.18795): the text adapter learns CLIP's text space from captions, then
    InfoNCE and the distance to an EMA of the tower train both sides.

    The fit's length is its four epochs of CC3M, CC12M and YFCC15M: 4 x 30 M / 1024. Its lambda 4e-4 over the sums of
    512 pairs a rank is the weight 4e-4 x 512 (losses/distill.py). Its weight decay is .2 in the text and .05 in the
    table, which is taken.
    """
    paper = _paper(name, tower, projection_dim=projection_dim)
    return dataclasses.replace(
        paper,
        heads=HeadsConfig(target="clip_text", steps=117_188, batch=1024, lr=1e-5),
        loss=LossConfig(terms=("infonce=1", "distill=0.2048")),
        distill=DistillConfig(reference="ema", decay=0.999),
        optim=dataclasses.replace(paper.optim, betas=(0.9, 0.98), eps=1e-6, layer_decay=1.0),
    )


def _paper(name: str, tower: TowerConfig, *, projection_dim: int = 1280) -> RunConfig:
    """The published stage-2 settings over a tower; data and caches are the user's.

    The paper's data are 15 M images (CC3M, CC12M) or 60 M (also YFCC15M and 30 M of Recap-DataComp-1B), with an MLLM's
    short caption or its long one, drawn evenly (DreamLIP's shortSV and longSV: data/extract_embedding.py:12,
    training/data.py:611-617).
    """
    return RunConfig(
        output_dir=f"runs/{name}",
        tower=tower,
        data=DataConfig(one_source_per_batch=True),
        dual=DualConfig(projection_dim=projection_dim),
        # params.py:4-10 has CLIP's moments for names with "vit", which none of the authors' models has
        optim=OptimConfig(
            lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05, layer_decay=0.85, max_grad_norm=5.0
        ),
        train=TrainConfig(
            global_batch=4096,
            num_train_epochs=4.0,
            precision="bf16",
            gradient_checkpointing=True,
            dataloader_num_workers=8,
            save_steps=1000,
            eval_steps=1000,
        ),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    function.__name__: function
    for function in (
        base,
        quickstart,
        openai_l14_336,
        openai_l14_224,
        openai_b16,
        eva02_l14_336,
        eva02_l14_224,
        eva02_b16,
        eva02_bige14,
        siglip2_so400m_224,
        proclip_l14_224,
        proclip_l14_336,
        proclip_b16,
        lift_b16,
    )
}


def recipe(name: str) -> RunConfig:
    """The recipe of that name; ``TOWER/TEACHER`` accepts only caches as wide as that LLM's embeddings.

    Raises ValueError listing the known names.
    """
    tower, slash, llm = name.replace("-", "_").partition("/")
    llm = llm.replace("_", "-")
    if tower not in RECIPES:
        raise ValueError(unknown("recipe", name, RECIPES, also=", each also as NAME/TEACHER"))
    config = RECIPES[tower]()
    if not slash:
        return config
    if llm not in TEACHERS:
        problem = f"unknown teacher {llm!r} in recipe {name!r}{nearest(llm, TEACHERS)}"
        raise ValueError(joined(problem, f"known: {', '.join(TEACHERS)}"))
    return dataclasses.replace(
        config,
        output_dir=f"{config.output_dir}-{llm}",
        dual=dataclasses.replace(config.dual, llm_width=TEACHERS[llm].width),
    )
