"""Twenty steps of the authors' stage 2 on tiny towers, for stages/test_authors_curves.py.

    python tests/golden/make_authors_curves.py LLM2CLIP    # a checkout of microsoft/LLM2CLIP, commit cba3b45

runs what its training/main.py runs without DeepSpeed (whose fp32 it turns into fp16): create_model with a pretrained
checkpoint, create_optimizer, warmup_cosine_lr and train_one_epoch with run.sh's options, in fp32 on two gloo ranks
under DistributedDataParallel, which averages gradients over ranks. Needs torch, timm, transformers < 5, einops, ftfy,
peft, iopath, webdataset, pandas; written with torch 2.13.0, timm 1.0.9, transformers 4.44.2.

Rewrites tests/golden/authors/:
- inputs.safetensors: ``pixels`` (320, 16, 16, 3) uint8 and ``embeddings`` (320, 24), float16 values; row 16 n + 8 r + i
  is pair i of rank r in step n
- TOWER.safetensors: ``start.NAME``, the model's state as training starts, and ``end.NAME`` after 20 steps at lr 1e-3
- TOWER.json: for lr 1e-3 (``fast``) and 1e-5 (``slow``) the loss of every step (mean over ranks), the factor of the
  logits in its forward pass and the schedule's factor; the optimizer's settings, a factor of the learning rate and the
  weight decay of every parameter, the model's configuration
- heads.json: spread of the authors' initial heads at real widths
"""

import json
import logging
import math
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.transforms.functional import normalize

FOLDER = Path(__file__).parent / "authors"
STEPS, WORLD, LOCAL = 20, 2, 8
SIZE, LLM_WIDTH, JOINT = 16, 24, 16
VISION = {"image_size": SIZE, "layers": 3, "width": 32, "head_width": 16, "patch_size": 4}
EVA = {"mlp_ratio": 2.6667, "eva_model_name": "eva-clip-tiny", "drop_path_rate": 0, "rope": True, "pt_hw_seq_len": 2}
EVA |= {"intp_freq": True, "naiveswiglu": True, "subln": True}
TEXT = {"use_embedding": True, "llm_embedding_dim": LLM_WIDTH}
TOWERS = {"eva02": "EVA02-CLIP-tiny", "openai": "OpenaiCLIP-tiny"}  # the optimizer's defaults depend on the name
LOG_SCALES = {"eva02": math.log(90), "openai": math.log(99.9)}  # of the pretrained checkpoints
RATES = {"fast": 1e-3, "slow": 1e-5}
RUN_SH = (  # llm2clip/run.sh without DeepSpeed, logging, data and fp16
    "--precision fp32 --warmup 0 --epochs 1 --wd 0.05 --visual-wd 0.05 --text-wd 0.05 --ld 1.0 --text-ld 1.01 "
    "--visual-ld 0.85 --grad-clip-norm 5.0 --smoothing 0. --seed 4096 --gather-with-grad --local-loss "
    "--force-custom-clip --optimizer ap_adamw --dist-backend gloo"
)


def make_inputs() -> None:
    """Blocky random images, and embeddings that depend on them."""
    generator = torch.Generator().manual_seed(1)
    count = STEPS * WORLD * LOCAL
    blocks = torch.rand(count, 3, 4, 4, generator=generator)
    pixels = torch.nn.functional.interpolate(blocks, SIZE) + 0.1 * torch.randn(
        count, 3, SIZE, SIZE, generator=generator
    )
    mixing = torch.randn(48, LLM_WIDTH, generator=generator)
    embeddings = blocks.flatten(1) @ mixing + torch.randn(count, LLM_WIDTH, generator=generator)
    bytes_ = (255 * pixels.clamp(0, 1)).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    save_file({"pixels": bytes_, "embeddings": embeddings.half()}, FOLDER / "inputs.safetensors")


def pretrained_eva(clip: Any) -> dict[str, Tensor]:
    """Random tensors as EVA02-CLIP's file has them: separate q and v biases, a text tower, the scale below ``text``."""
    state = randomized({n: p for n, p in clip.named_parameters() if n.startswith("visual.")})
    for name in [name for name in state if name.endswith(("q_proj.bias", "v_proj.bias"))]:
        state[name.replace("_proj.bias", "_bias")] = state.pop(name)
    return state | {
        "text.logit_scale": torch.tensor(LOG_SCALES["eva02"]),
        "text.token_embedding.weight": torch.zeros(4, 32),
    }


def pretrained_openai(clip: Any) -> dict[str, Tensor]:
    """Random tensors as OpenAI's file has them, with a text tower of one block."""
    state = randomized({n: p for n, p in clip.named_parameters() if n.startswith("visual.")})
    return state | {
        "logit_scale": torch.tensor(LOG_SCALES["openai"]),
        "positional_embedding": torch.zeros(77, 64),
        "token_embedding.weight": torch.zeros(4, 64),
        "ln_final.weight": torch.ones(64),
        "text_projection": torch.zeros(64, 24),
        "transformer.resblocks.0.ln_1.weight": torch.ones(64),
    }


def randomized(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights like a trained tower's: norms near 1, biases that are not 0."""
    torch.manual_seed(2)
    state = {}
    for name, value in parameters.items():
        is_norm = value.ndim == 1 and name.endswith("weight")
        spread = value.shape[1] ** -0.5 if value.ndim == 2 and "embed" not in name else 0.2
        state[name] = (1 if is_norm else 0) + spread * torch.randn(value.shape)
    return state


def create(tower: str) -> Any:
    """The authors' model over a pretrained checkpoint, by the factory that their main.py calls."""
    import eva_clip
    from eva_clip import model as models

    name = TOWERS[tower]
    vision = VISION | (EVA if tower == "eva02" else {})
    Path(f"{name}.json").write_text(json.dumps({"embed_dim": JOINT, "vision_cfg": vision, "text_cfg": TEXT}))
    eva_clip.add_model_config(Path(f"{name}.json"))
    bare = eva_clip.create_model(name, force_custom_clip=True)
    torch.manual_seed(4096)
    if tower == "eva02":
        torch.save(pretrained_eva(bare), "pretrained.pt")
        return eva_clip.create_model(name, "pretrained.pt", force_custom_clip=True)
    # "openai" builds 1280 and 4096 wide heads of 64: their sizes alone are ours
    original = models.CustomCLIP, models.CLIPTextCfg, models.CLIPVisionCfg
    models.CustomCLIP = lambda embed_dim, **more: original[0](JOINT, **more)
    models.CLIPTextCfg = partial(original[1], llm_embedding_dim=LLM_WIDTH)
    models.CLIPVisionCfg = partial(original[2], head_width=VISION["head_width"])
    torch.save(pretrained_openai(bare), name)  # a name without a URL is a file's
    model = eva_clip.create_model(name, "openai", force_custom_clip=True)
    models.CustomCLIP, models.CLIPTextCfg, models.CLIPVisionCfg = original
    return model


def train(tower: str, lr: float) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """What main.py does after its options; returns the curves, the settings, the model's state before and after."""
    from training import train as loop
    from training.optim import create_optimizer
    from training.params import parse_args
    from training.scheduler import warmup_cosine_lr

    rates = [f"--{name}={lr}" for name in ("lr", "visual-lr", "text-lr")]
    args, _ = parse_args(["--model", TOWERS[tower], *RUN_SH.split(), *rates])
    args.rank = args.local_rank = dist.get_rank()
    args.world_size, args.distributed, args.device, args.wandb = WORLD, True, "cpu", False
    model = create(tower)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    curves: dict[str, list[Any]] = {"loss": [], "scale": []}

    class Recorded(loop.ClipLoss):
        def forward(self, images: Tensor, texts: Tensor, scale: Tensor) -> Any:
            loss, accuracy = super().forward(images, texts, scale)
            total = loss.detach().clone()
            dist.all_reduce(total)
            curves["loss"].append(total.item() / WORLD)
            curves["scale"].append(scale.item())
            return loss, accuracy

    loop.ClipLoss, original = Recorded, loop.ClipLoss
    optimizer = create_optimizer(args, model)
    schedule = warmup_cosine_lr(optimizer, args, STEPS)
    names = {id(p): name for name, p in model.named_parameters()}
    settings = {
        names[id(p)]: {"lr_scale": group["lr_scale"], "weight_decay": group["weight_decay"]}
        for group in optimizer.param_groups
        for p in group["params"]
    }
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    loop.train_one_epoch(ddp, {"train": Batches()}, 0, optimizer, None, schedule, args)
    loop.ClipLoss = original
    curves["lr_factor"] = [schedule(step) / lr for step in range(STEPS)]
    hyper = {"betas": [args.beta1, args.beta2], "eps": args.eps}
    described = {**hyper, "parameters": settings, "model_config": json.loads(Path(f"{TOWERS[tower]}.json").read_text())}
    described["model_config"]["quick_gelu"] = tower == "openai"
    return {"lr": lr, **curves}, described, start, model.state_dict()


class Batches:
    """Their loader's surface over the fixed inputs."""

    num_batches, num_samples = STEPS, STEPS * WORLD * LOCAL

    def __init__(self) -> None:
        self.dataloader = self

    def set_epoch(self, epoch: int) -> None:
        pass

    def __iter__(self) -> Any:
        from eva_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        inputs = load_file(FOLDER / "inputs.safetensors")
        for step in range(STEPS):
            first = (step * WORLD + dist.get_rank()) * LOCAL
            pixels = inputs["pixels"][first : first + LOCAL].permute(0, 3, 1, 2) / 255
            yield (
                normalize(pixels, list(OPENAI_DATASET_MEAN), list(OPENAI_DATASET_STD)),
                inputs["embeddings"][first : first + LOCAL].float(),
            )


def head_spreads() -> dict[str, Any]:
    """Standard deviations of the initial heads at widths near the large towers'."""
    from eva_clip import model as models
    from eva_clip.eva_vit_model import EVAVisionTransformer
    from eva_clip.transformer import VisionTransformer

    torch.manual_seed(3)
    eva = EVAVisionTransformer(14, 14, num_classes=1280, embed_dim=1024, depth=1, num_heads=16, use_mean_pooling=False)
    openai = VisionTransformer(14, 14, width=1024, layers=1, heads=16, mlp_ratio=4.0, output_dim=1280)
    adapter = models.TextProj(embedding_dim=1024, output_dim=1280)
    text = {name: value.std().item() for name, value in adapter.named_parameters() if value.ndim == 2}
    heads = {"eva02.weight": eva.head.weight, "eva02.bias": eva.head.bias, "openai.weight": openai.proj}
    return {name: value.std().item() for name, value in heads.items()} | {f"text.{n}": std for n, std in text.items()}


def rank_main(rank: int, authors: str, folder: str) -> None:
    sys.path.insert(0, f"{authors}/llm2clip")
    Path(folder, str(rank)).mkdir()
    os.chdir(Path(folder, str(rank)))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for tower in TOWERS:
        slow, *_ = train(tower, RATES["slow"])
        fast, described, start, end = train(tower, RATES["fast"])
        if rank == 0:
            tensors = {f"start.{n}": v for n, v in start.items()} | {f"end.{n}": v for n, v in end.items()}
            tensors = {name: value.contiguous() for name, value in tensors.items() if "rope" not in name}
            save_file(tensors, FOLDER / f"{tower}.safetensors")
            curves = {"fast": fast, "slow": slow, "pretrained_log_scale": LOG_SCALES[tower], **described}
            (FOLDER / f"{tower}.json").write_text(json.dumps(curves, indent=1) + "\n")
    if rank == 0:
        (FOLDER / "heads.json").write_text(json.dumps(head_spreads(), indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    make_inputs()
    with tempfile.TemporaryDirectory() as temporary:
        torch.multiprocessing.spawn(rank_main, (str(Path(sys.argv[1]).resolve()), temporary), WORLD)
