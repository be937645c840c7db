"""Twenty steps of each of ProCLIP's stages by its own code, for stages/test_proclip_curves.py.

    python tests/golden/make_proclip.py ProCLIP    # a checkout of VisionXLab/ProCLIP at d39e872

runs ``create_model`` with a pretrained checkpoint, ``create_optimizer``, ``warmup_cosine_lr``,
``train_one_epoch_stage1`` and ``train_one_epoch_stage2`` on batches of 128, in fp32 on one gloo
rank. The published file does not run as it is. Here
    - a line of ``train_one_epoch_stage1`` is indented as its neighbors, and its first unpacking of
      the batch, into two, is left out;
    - ``eva_clip`` is the folder ``openclip``, and ``tokenize`` passes on numbers of rows;
    - ``args.distill`` and ``args.distill_loss_weight`` are set: no option sets them;
    - nothing is logged, for the log of stage 1 prints what is not computed.
The teacher of stage 1 is a table (support/proclip_pairs.py), that of stage 2 the tower at its
start. The tower's width is small, its head's that of the teacher.

Rewrites tests/golden/proclip/:
- curves.json: the settings; of each stage the loss of every step, of the second also its InfoNCE
  and the logits' factor
- weights.safetensors: ``start.NAME`` the text adapter, ``stage1.NAME`` after stage 1,
  ``stage2.NAME`` the whole model after stage 2. The tower starts as golden/authors/openai.
Needs torch, timm, einops, ftfy, pandas. Written with torch 2.13.0.
"""

import copy
import importlib
import importlib.util
import json
import logging
import math
import os
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GOLDEN = Path(__file__).parent
sys.path.insert(0, str(GOLDEN.parent / "support"))

from proclip_pairs import CAPTIONS, clip_feature, embedding, pixels  # noqa: E402

STEPS = 20
ROWS = {1: 128, 2: 128}  # of a batch, by stage; theirs on one GPU are 128 and 512
DISTILL = 4e-4  # the paper's lambda
PRETRAINED = "openai.safetensors"
NAME = "OpenaiCLIP-ViT-tiny"  # "vit" chooses the moments 0.9, 0.98 and the eps 1e-6
OPTIONS = (
    "--precision fp32 --warmup 0 --epochs 1 --wd 0.05 --grad-clip-norm 5.0 --gather-with-grad "
    "--local-loss --force-custom-clip --dist-backend gloo"
)


def import_authors(checkout: Path) -> Any:
    """``training.train`` with the corrections that are listed above."""
    sys.path.insert(0, str(checkout))
    for name in ("llm2vec", "iopath", "iopath.common", "iopath.common.file_io"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["llm2vec"].LLM2Vec = None  # type: ignore[attr-defined]
    for name in ("file_lock", "g_pathmgr"):
        setattr(sys.modules["iopath.common.file_io"], name, None)
    package = checkout / "openclip" / "__init__.py"
    spec: Any = importlib.util.spec_from_file_location("eva_clip", package)
    sys.modules["eva_clip"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["eva_clip"])
    path = checkout / "training" / "train.py"
    source = path.read_text()
    source = source.replace("\n       else:\n", "\n        else:\n")
    # the first of the two is that of stage 1
    source = source.replace("        images, texts = batch\n", "", 1)
    loop = types.ModuleType("training.train")
    loop.__package__ = "training"
    exec(compile(source, str(path), "exec"), loop.__dict__)
    loop.is_master = lambda *_: False  # type: ignore[attr-defined]
    loop.tokenize = lambda rows: rows  # type: ignore[attr-defined]
    return loop


class Batches:
    """Their loader's surface over the fixed pairs; step n on rank r of w has the rows from
    (n w + r) x batch on."""

    num_batches = num_samples = 10**6  # no evaluation in between

    def __init__(self, stage: int, normalize: Any) -> None:
        self.dataloader = self
        self.stage = stage
        self.normalize = normalize

    def set_epoch(self, epoch: int) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        size = ROWS[self.stage]
        for step in range(STEPS):
            first = (step * dist.get_world_size() + dist.get_rank()) * size
            rows = range(first, first + size)
            if self.stage == 1:
                batch = []
                for number, caption in enumerate(CAPTIONS):
                    texts = torch.tensor([[row, number] for row in rows])
                    features = [embedding(row, caption) for row in rows]
                    batch += [texts, torch.stack(features)]
                yield batch
            else:
                images = torch.stack([pixels(row) for row in rows])
                images = self.normalize(images.permute(0, 3, 1, 2) / 255)
                texts = [embedding(row, CAPTIONS[0]) for row in rows]
                yield images, torch.stack(texts)


class ClipText:
    """Stage 1's teacher: a CLIP's features of the captions, looked up."""

    def encode_text(self, texts: Tensor, normalize: bool) -> Tensor:
        features = [clip_feature(row, CAPTIONS[n]) for row, n in texts.tolist()]
        return F.normalize(torch.stack(features), dim=-1)


def create(folder: Path) -> Any:
    """The authors' model over the tower of golden/authors, its text adapter random."""
    eva_clip = importlib.import_module("eva_clip")
    described = json.loads((GOLDEN / "authors" / "openai.json").read_text())
    config = folder / f"{NAME}.json"
    config.write_text(json.dumps(described["model_config"]))
    eva_clip.add_model_config(config)
    state = load_file(GOLDEN / "authors" / PRETRAINED)
    pretrained = {"logit_scale": torch.tensor(described["pretrained_log_scale"])}
    for name, value in state.items():
        if name.startswith("start.visual."):
            pretrained[name.removeprefix("start.")] = value
    torch.save(pretrained, folder / "pretrained.pt")
    torch.manual_seed(0)
    return eva_clip.create_model(
        NAME, str(folder / "pretrained.pt"), force_custom_clip=True
    )


def train(loop: Any, model: Any, stage: int, lr: float) -> dict[str, Any]:
    """What main.py does after its options; the model trains in place."""
    optim = importlib.import_module("training.optim")
    scheduler = importlib.import_module("training.scheduler")
    params = importlib.import_module("training.params")
    args, _ = params.parse_args(["--model", NAME, *OPTIONS.split(), f"--lr={lr}"])
    args.rank = args.local_rank = dist.get_rank()
    args.world_size = dist.get_world_size()
    args.device = "cpu"
    args.wandb = False
    args.distill = True
    args.distill_loss_weight = DISTILL
    curves: dict[str, Any] = {"loss": [], "infonce": [], "scale": []}

    class Recorded(loop.ClipLoss):
        def forward(self, images: Tensor, texts: Tensor, scale: Tensor) -> Any:
            loss, accuracy = super().forward(images, texts, scale)
            curves["infonce"].append(mean_of_ranks(loss))
            curves["scale"].append(scale.item())
            return loss, accuracy

    def gather(values: list[Tensor], loss: Tensor) -> None:
        curves["loss"].append(mean_of_ranks(loss))
        all_gather(values, loss)

    authors_loss = loop.ClipLoss
    all_gather = dist.all_gather
    loop.ClipLoss = Recorded
    optimizer = optim.create_optimizer(args, model)
    schedule = scheduler.warmup_cosine_lr(optimizer, args, STEPS)
    average_gradients(model)
    visual = model.visual
    mean = torch.tensor(visual.image_mean)[:, None, None]
    std = torch.tensor(visual.image_std)[:, None, None]
    data = {"train": Batches(stage, lambda images: (images - mean) / std)}
    teacher = ClipText() if stage == 1 else copy.deepcopy(model)
    epoch = getattr(loop, f"train_one_epoch_stage{stage}")
    loop.dist = types.SimpleNamespace(**{**vars(dist), "all_gather": gather})
    epoch(model, data, 0, optimizer, None, schedule, args, teacher_model=teacher)
    loop.dist = dist
    loop.ClipLoss = authors_loss
    settings = {"betas": [args.beta1, args.beta2], "eps": args.eps, "lr": lr}
    return {**settings, **{name: values for name, values in curves.items() if values}}


def mean_of_ranks(loss: Tensor) -> float:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def average_gradients(model: nn.Module) -> None:
    """As DistributedDataParallel, whose wrapper has no ``encode_text``."""

    def average(grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    if dist.get_world_size() > 1:
        for parameter in model.parameters():
            parameter.register_hook(average)


def run(checkout: Path, lr: float) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Both stages; their curves and settings, and the weights."""
    loop = import_authors(checkout)
    with tempfile.TemporaryDirectory() as folder:
        model = create(Path(folder))
    weights: dict[str, Tensor] = {}
    keep(weights, "start", model.text)
    curves = {"stage1": train(loop, model, 1, lr)}
    keep(weights, "stage1", model.text)
    curves["stage2"] = train(loop, model, 2, lr)
    keep(weights, "stage2", model)
    assert math.isfinite(curves["stage2"]["loss"][-1])
    return curves, weights


def keep(weights: dict[str, Tensor], when: str, module: nn.Module) -> None:
    for name, value in module.state_dict().items():
        weights[f"{when}.{name}"] = value.detach().clone().contiguous()


def main(checkout: Path, folder: Path, lr: float) -> None:
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29791")
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    dist.init_process_group("gloo")
    curves, weights = run(checkout, lr)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "curves.json").write_text(json.dumps(curves, indent=1) + "\n")
        save_file(weights, folder / "weights.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), GOLDEN / "proclip", lr=1e-3)
