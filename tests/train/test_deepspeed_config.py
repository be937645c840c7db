"""DeepSpeed's JSON with the run's values, contradictions, schedules."""

import json
import socket
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from llm2clip_plugin.errors import lost_rank
from llm2clip_plugin.train.config import LossConfig, OptimConfig, TrainConfig
from llm2clip_plugin.train.distributed import set_single_process_environment, set_tf32
from llm2clip_plugin.train.engine import check_deepspeed
from llm2clip_plugin.train.losses.base import check_terms, chosen_terms
from llm2clip_plugin.train.optim import (
    SCHEDULES,
    chosen_optimizer,
    complete,
    lr_factor,
    read_deepspeed_json,
)
from llm2clip_plugin.vision.directory import DualConfig

SCRIPTS = Path(__file__).parents[2] / "scripts"

OPTIM = OptimConfig(
    lr=1e-5, eps=1e-8, weight_decay=0.05, max_grad_norm=5.0, warmup_steps=10
)


def completed(user: dict[str, Any], *, world: int = 2, **train: Any) -> dict[str, Any]:
    """On ranks of four micro-batches of 64 each."""
    settings = {
        "global_batch": world * 4 * 64,
        "micro_batch": 64,
        "precision": "bf16",
        **train,
    }
    return complete(user, TrainConfig(**settings), OPTIM, world=world, hidden_size=1024)


BATCH = (
    "train_micro_batch_size_per_gpu",
    "train_batch_size",
    "gradient_accumulation_steps",
)
# the layout of LLaVA's scripts/zero3_offload.json
LLAVA_ZERO3_OFFLOAD: dict[str, Any] = {
    **{
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "bf16": {"enabled": "auto"},
        **dict.fromkeys(BATCH, "auto"),
    },
    "optimizer": {
        "type": "AdamW",
        "params": {
            "lr": "auto",
            "betas": "auto",
            "eps": "auto",
            "weight_decay": "auto",
        },
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        **dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size"), "auto"),
        "stage3_param_persistence_threshold": "auto",
        "gather_16bit_weights_on_model_save": True,
    },
}


def test_auto_values_are_filled():
    config = completed(LLAVA_ZERO3_OFFLOAD)
    assert config["train_batch_size"] == 512
    assert config["train_micro_batch_size_per_gpu"] == 64
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 5.0
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert config["fp16"]["enabled"] is False
    zero = config["zero_optimization"]
    assert zero["reduce_bucket_size"] == 1024**2
    assert zero["stage3_param_persistence_threshold"] == 10240
    assert "optimizer" not in config
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert "auto" not in json.dumps(config)
    assert not config["timers"]["throughput"]["enabled"]  # it would wait for the GPU
    # the user's own is left alone
    assert LLAVA_ZERO3_OFFLOAD["train_batch_size"] == "auto"


@pytest.mark.parametrize(
    ("user", "named"),
    [
        ({"train_batch_size": 256}, r"256.* 512 \(--global-batch\)"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            "optimizer.params.lr is 0.001.*--lr",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}},
            "warmup_num_steps.*--warmup-steps",
        ),
        ({"optimizer": {"type": "Lamb"}}, "Lamb.*--optimizer"),
        ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow"),
        ({"zero_optimisation": {"stage": 2}}, "zero_optimization"),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "nvme"},
                }
            },
            "use the device cpu",
        ),
    ],
)
def test_contradictions_are_refused(user: dict[str, Any], named: str):
    with pytest.raises(ValueError, match=named):
        completed(user)


def test_fp32_keeps_its_one_check_for_non_finite_gradients():
    user = {"zero_optimization": {"stage": 1, "compute_grad_norm": False}}
    # bf16 has another
    assert not completed(user)["zero_optimization"]["compute_grad_norm"]
    with pytest.raises(ValueError, match="compute_grad_norm"):
        completed(user, precision="fp32")


@pytest.mark.parametrize(
    "user", [{"zero_optimization": {"stage": 7}}, {"sparse_gradients": True}]
)
def test_what_deepspeed_refuses_is_refused_before_a_model_is_loaded(
    user: dict[str, Any],
):
    with pytest.raises(ValueError, match=r"mine\.json: DeepSpeed refuses it"):
        check_deepspeed(completed(user, world=1), "mine.json")


def test_gradients_are_reduced_in_the_type_of_the_option():
    key = "communication_data_type"
    assert key not in completed({})
    assert completed({}, communication_data_type="fp32")[key] == "fp32"
    assert completed({key: "auto"}, world=16)[key] == "fp32"
    assert completed({key: "bf16"}, world=16)[key] == "bf16"
    assert completed({}, world=16, communication_data_type="bf16")[key] == "bf16"
    assert key not in completed({}, world=16, precision="fp32")
    with pytest.raises(ValueError, match=key):
        completed({key: "bf16"}, communication_data_type="fp32")


@pytest.mark.parametrize(
    ("tf32", "precision", "expected"),
    [
        ("auto", "fp32", False),
        ("auto", "bf16", True),
        ("on", "fp32", True),
        ("off", "bf16", False),
    ],
)
def test_tf32_is_for_half_precision_unless_asked_for(
    monkeypatch, tf32: Any, precision: str, expected: bool
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not expected)
    chosen: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    set_tf32(tf32, precision, torch.device("cpu"))
    set_tf32(tf32, precision, torch.device("cuda"))
    assert chosen == ["high" if expected else "highest"]
    assert torch.backends.cudnn.allow_tf32 is expected


def test_equal_values_and_a_scheduler_without_values_are_accepted():
    user = {
        "train_batch_size": 512,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    }
    assert "scheduler" not in completed(user)
    # half precision without ZeRO: see train.optim
    assert completed({})["zero_optimization"]["stage"] == 1
    assert completed({}, precision="fp32")["zero_optimization"] == {"stage": 0}


def test_gradients_are_sent_during_the_backward_pass_unless_the_file_says_otherwise():
    for path in (None, *sorted(SCRIPTS.glob("zero[1-3]*.json"))):
        zero = completed(read_deepspeed_json(str(path)) if path else {})[
            "zero_optimization"
        ]
        assert zero["overlap_comm"] is True
        assert zero["reduce_bucket_size"] == 50_000_000
    of_file = {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 1000}
    assert completed({"zero_optimization": of_file})["zero_optimization"] == of_file


@pytest.mark.parametrize(
    "path", sorted(SCRIPTS.glob("zero*.json")), ids=lambda path: path.name
)
def test_our_own_files_are_complete(path: Path):
    config = completed(read_deepspeed_json(str(path)))
    assert "auto" not in json.dumps(config)
    assert str(config["zero_optimization"]["stage"]) in path.name.replace(
        "zero0", "zero1"
    )


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: OptimConfig(schedule="cosin"), "optim.schedule 'cosin'"),  # type: ignore[arg-type]
        (lambda: OptimConfig(warmup_steps=5, warmup_ratio=0.1), "warmup_ratio 0.1"),
        (lambda: TrainConfig(max_steps=0, num_train_epochs=-1), "num_train_epochs"),
        (lambda: chosen_optimizer(OptimConfig(name="lamb")), "lamb"),
        (lambda: chosen_terms(LossConfig(args=("margin=1",))), "margin"),
        (lambda: LossConfig(terms=("infonce=1", "infonce")), "infonce twice"),
        (lambda: LossConfig(terms=("infonce=1:0",)), "100%"),
        (
            lambda: check_terms(LossConfig(terms=("sigmoid",)), DualConfig()),
            "--dual.logit-bias-init",
        ),
        (
            lambda: check_terms(LossConfig(), DualConfig(logit_bias_init=-10.0)),
            "logit-bias-init",
        ),
    ],
)
def test_settings_that_cannot_be_are_named(make: Any, named: str):
    with pytest.raises(ValueError, match=named):
        make()


def test_schedules():
    cosine = OptimConfig(warmup_steps=2, min_lr_ratio=0.1)
    factors = [lr_factor(step, 12, cosine) for step in range(13)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[7] == pytest.approx(0.55)
    assert factors[12] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(factors[1:]))
    assert lr_factor(9, 10, OptimConfig(schedule="constant")) == 1.0
    assert lr_factor(5, 10, OptimConfig(schedule="linear")) == 0.5
    assert OptimConfig(warmup_ratio=0.25).warmup(40) == 10
    assert set(get_args(OptimConfig.__annotations__["schedule"])) == set(SCHEDULES)


@pytest.mark.parametrize(
    "variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]
)
def test_tasks_that_would_train_alone_are_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str
):
    monkeypatch.setenv(variable, "1")
    # of the whole job, also in the batch script
    monkeypatch.setenv("SLURM_NTASKS", "16")
    set_single_process_environment()
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, "16")
    with pytest.raises(ValueError, match=variable):
        set_single_process_environment()


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(RuntimeError) as failed:
            torch.distributed.TCPStore("127.0.0.1", port, 2, is_master=True)
    assert lost_rank(failed.value).startswith(f"port {port} is in use")
