"""Shared by the tests of train/: several ranks in one call, and a tiny dual encoder."""

import math
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from forked import context
from torch import Tensor, nn

from llm2clip_plugin.signals import StopRequest
from llm2clip_plugin.train.averages import WeightAverage
from llm2clip_plugin.train.checkpoint import Checkpoints, Saver, TrainState, load
from llm2clip_plugin.train.config import LossConfig, OptimConfig, TrainConfig
from llm2clip_plugin.train.engine import Engine
from llm2clip_plugin.train.loop import LoopParts
from llm2clip_plugin.train.losses.base import (
    chosen_terms,
    patch_layers,
    weighted_terms,
)
from llm2clip_plugin.train.optim import Trained, complete, is_vector, parameter_groups
from llm2clip_plugin.train.step import TowerStep
from llm2clip_plugin.vision.dual import DualFeatures

GOLDEN = Path(__file__).parents[1] / "golden" / "reference"


def run_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Call ``function(rank, world, *args)`` in ``world`` gloo processes; returns their results in
    order of rank."""
    with tempfile.TemporaryDirectory() as folder:
        _start(world, folder, function, args, join=True)
        return [
            pickle.loads((Path(folder) / f"{rank}.pkl").read_bytes())
            for rank in range(world)
        ]


def start_ranks(
    function: Callable[..., Any], world: int, store: str, *args: Any
) -> list[Any]:
    """The processes of ``run_ranks``, to be killed; ``store``: an empty folder."""
    return _start(world, store, function, args, join=False).processes


def _start(
    world: int,
    folder: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    join: bool,
) -> Any:
    start = torch.multiprocessing.start_processes  # type: ignore[attr-defined]
    return start(
        _rank,
        (world, folder, function, args),
        world,
        join=join,
        start_method=context().get_start_method(),
    )


def _rank(
    rank: int,
    world: int,
    folder: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_SIZE=str(world),
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    join_group(rank, world, f"file://{folder}/store")
    result = function(rank, world, *args)
    (Path(folder) / f"{rank}.pkl").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()
    os._exit(0)  # see llm2clip_plugin.cli


def join_group(rank: int, world: int, store: str) -> None:
    """Start or replace the process group; returns when all are in it, because one that leaves
    before looks crashed."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    dist.barrier()


class TinyDual(nn.Module):
    """The surface of a dual encoder over 3 x 8 x 8 pixels and embeddings 12 wide, with dropout and
    text noise."""

    def __init__(
        self, *, dropout: float = 0.0, noise: float = 0.0, bias: bool = False
    ) -> None:
        super().__init__()
        layers = [
            nn.Conv2d(3, 16, 4, stride=4),
            nn.Flatten(),
            nn.LayerNorm(64),
            nn.Linear(64, 32),
            nn.GELU(),
        ]
        self.tower = nn.Sequential(*layers, nn.Linear(32, 32))
        self.dropout = nn.Dropout(dropout)
        self.visual_projection = nn.Linear(32, 8, bias=False)
        self.text_adapter = nn.Sequential(
            nn.Linear(12, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 8)
        )
        self.noise = noise
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.full((1,), -3.0)) if bias else None

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        return F.normalize(
            self.visual_projection(self.dropout(self.tower(pixel_values))).float(),
            dim=-1,
        )

    def forward(
        self, pixel_values: Tensor, embeddings: Tensor, noise: Tensor | None = None
    ) -> DualFeatures:
        image = self.encode_image(pixel_values)
        text = F.normalize(embeddings, dim=-1)
        if noise is not None:
            text = text + self.noise * noise
        text = self.text_adapter(text.to(self.visual_projection.weight.dtype))
        text = F.normalize(text.float(), dim=-1)
        bias = (
            torch.zeros_like(self.logit_scale)
            if self.logit_bias is None
            else self.logit_bias
        )
        return DualFeatures(image, text, self.logit_scale.float() * 1, bias.float() * 1)


def tiny_batch(
    step: int, *, rows: int = 32, rank: int = 0, world: int = 1, captions: int = 1
) -> dict[str, Any]:
    """This rank's rows of the global batch of a step: learnable pairs, some captions twice."""
    generator = torch.Generator().manual_seed(100 + step)
    pixels = torch.randn(rows, 3, 8, 8, generator=generator)
    mixing = torch.randn(12, 3 * 64, generator=torch.Generator().manual_seed(1)) / 14
    ids = torch.arange(rows) + rows * step
    batch = {
        "pixels": pixels,
        "embeddings": pixels.flatten(1) @ mixing.T,
        "caption_hashes": torch.where(ids % 7 == 0, 7, ids),
        "image_ids": ids.clone(),
    }
    if captions > 1:
        noise = torch.randn(rows, captions, 12, generator=generator)
        batch["embeddings"] = batch["embeddings"][:, None] + 0.3 * noise
        batch["caption_hashes"] = torch.stack(
            [batch["caption_hashes"] + 1000 * k for k in range(captions)], 1
        )
    local = rows // world
    mine = slice(rank * local, (rank + 1) * local)
    keys = [f"sample-{int(i)}" for i in ids[mine]]
    return {
        **{k: v[mine] for k, v in batch.items()},
        "keys": keys,
        "position": rows * (step + 1),
    }


def tiny_engine(
    *,
    stage: int,
    precision: str = "fp32",
    micro: int = 32,
    rows: int = 32,
    world: int = 1,
    offload: bool = False,
    dual: TinyDual | None = None,
    lr: float = 0.01,
    clip: float = 1.0,
    weights: Mapping[str, Tensor] | None = None,
    name: str = "adamw",
    args: tuple[str, ...] = (),
    zero: Mapping[str, Any] | None = None,
) -> Any:
    """An engine over a TinyDual with a learning rate for each of the tower's layers, and the
    heads'."""
    torch.manual_seed(0)
    module = dual or TinyDual()
    if weights:
        module.load_state_dict(weights)

    def rate(name: str) -> float:
        layer = next((int(word) for word in name.split(".") if word.isdigit()), 0)
        return 2 - layer / 8 if name.startswith("tower") else 2

    trained = [
        Trained(name=n, parameter=p, lr=lr * rate(n), decay=not is_vector(p))
        for n, p in module.named_parameters()
        if p.requires_grad
    ]
    optim = OptimConfig(
        name=name,
        args=args,
        lr=lr,
        betas=(0.9, 0.98),
        weight_decay=0.1,
        max_grad_norm=clip,
        schedule="constant",
    )
    train = TrainConfig(global_batch=rows, micro_batch=micro, precision=precision)  # type: ignore[arg-type]
    user: dict[str, Any] = {"zero_optimization": {"stage": stage, **(zero or {})}}
    if offload:
        user["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if precision == "fp16":
        user["fp16"] = {"enabled": "auto", "initial_scale_power": 8}
    config = complete(user, train, optim, world=world, hidden_size=32)
    return Engine(module, parameter_groups(trained, 0.1), optim, config)


def tiny_step(
    engine: Any,
    *,
    terms: tuple[str, ...] = ("infonce",),
    noisy: bool = False,
    reference: Any = None,
) -> Any:
    """The step over a tiny engine."""
    config = LossConfig(terms=terms)
    options = {
        "total_samples": 128,
        "reference": reference,
        "patch_layers": patch_layers(chosen_terms(config)),
    }
    # pixels are floats already
    return TowerStep(
        engine,
        weighted_terms(config),
        seed=5,
        text_noise=noisy,
        normalize=lambda x: x,
        **options,
    )


def parts_of(run: Path, engine: Any, state: Any, batches: Any, **more: Any) -> Any:
    """What run_loop needs for 8 steps, with a save after each of them."""
    train = TrainConfig(global_batch=32, save_steps=1, **more.pop("train", {}))
    defaults = {
        "step": tiny_step(engine),
        "train": train,
        "optim": OptimConfig(lr=0.01, schedule="cosine"),
    }
    defaults |= {
        "checkpoints": Checkpoints(run, keep=2),
        "evaluate": None,
        "total_steps": 8,
        "stop": StopRequest(),
    }
    return LoopParts(
        engine=engine, state=state, batches=batches, run_folder=run, **(defaults | more)
    )


def newest(run: Path, world: int = 1, **way: Any) -> tuple[Any, Any, WeightAverage]:
    """Engine, state and moving average of a run's newest checkpoint, or of a new run."""
    path = Checkpoints(run, keep=0).find("auto")
    loaded = load(path) if path else None
    engine = tiny_engine(world=world, weights=loaded.weights if loaded else None, **way)
    if loaded:
        engine.restore(loaded.weights, loaded.moments, vars(loaded.state))
    state = loaded.state if loaded else new_state()
    values = loaded.averages if loaded else None
    return (
        engine,
        state,
        WeightAverage(engine, 0.9, warmup=True, updates=state.step, values=values),
    )


def new_state(step: int = 0) -> Any:
    return TrainState(
        step=step, samples=32 * step, config={"a": (1, 0.1)}, config_hash="", seed=5
    )


def allow_fp16() -> None:
    """Run fp16 on any CPU, as torch does; DeepSpeed asks whether oneDNN has fast kernels."""
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    type(accelerator).is_fp16_supported = lambda self: True


def trainable_names(model: nn.Module) -> list[str]:
    return [
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    ]


def save_now(
    run: Path,
    state: Any,
    engine: Any,
    averages: Mapping[str, Any] | None = None,
    keep: int = 1,
) -> Path:
    """Write a checkpoint to its end."""
    with Saver(Checkpoints(run, keep=keep), engine, averages) as saver:
        saver.save(state)
        saver.finish()
    return saver.checkpoints.path(state.step)


class Engineless:
    """Weights and moments without an engine."""

    def weights(self, copy: Any) -> dict[str, Tensor]:
        return {"w": copy("w", torch.ones(3))} if copy else {}

    def moments(self, copy: Any) -> dict[str, Tensor]:
        return {"w.exp_avg": copy("w.exp_avg", torch.zeros(3))} if copy else {}

    def scaler_state(self) -> dict[str, Any]:
        return {}


class Averages:
    """A moving average without an engine."""

    def values(self, copy: Any) -> dict[str, Tensor]:
        return {"w": copy("w", torch.zeros(3))} if copy else {}
