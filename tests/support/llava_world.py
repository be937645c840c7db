"""A tiny LLaVA world: where everything lies, and LLaVA's stages.

``tiny_llava`` makes what is in it.
"""

import dataclasses
import json
import os
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from forked import Module
from forked_python import programs
from PIL import Image

from llm2clip_plugin.installation import numbers
from llm2clip_plugin.train.distributed import free_port

# LLaVA runs in the training environment, with today's libraries
TODAY = numbers(transformers.__version__) >= (5,)


WIDTH = 32


STEPS = 3


# What a rank on a CPU says, once in some dozens, when its work is done and the interpreter ends:
# LLaVA leaves the process group open, and a C++ thread that is there still aborts the process. Such
# a run is done again, once.
ABORT_AT_EXIT = "terminate called without an active exception"


# The CPU accelerator of LLaVA's own DeepSpeed needs Intel's extension; there, "cuda" without a GPU
# trains one process.
HALF_ON_CPU = pytest.mark.skipif(
    torch.__version__.startswith("2.1."),
    reason="torch 2.1 has no float16 convolution on a CPU",
)


ACCELERATOR = (
    {} if version("deepspeed").startswith("0.12.") else {"DS_ACCELERATOR": "cpu"}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """Where everything lies."""

    root: Path
    llm: Path
    images: Path
    pretrain_data: Path
    finetune_data: Path
    questions: Path
    towers: dict[str, Path]

    def environment(self, **more: str) -> dict[str, str]:
        """For LLaVA's processes: CUDA calls harmless, no network, no registry of the user."""
        # Of this environment alone: two environments that share the folder build it anew at each
        # turn.
        ours = {"TORCH_EXTENSIONS_DIR": os.path.join(sys.prefix, "torch-extensions")}
        ours |= {
            key: value
            for key, value in os.environ.items()
            if not key.startswith("LLM2CLIP_")
        } | ACCELERATOR
        ours |= {
            "PYTHONPATH": str(Path(__file__).parent / "on_cpu"),
            "LLM2CLIP_HOME": str(self.root / "llm2clip-home"),
        }
        ours |= {
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
        }
        return {**ours, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", **more}

    def run(self, *words: str | Path, fails: bool = False, **environment: str) -> str:
        """Run a command of this environment in a folder of its own; returns stdout and stderr
        together."""
        (here := self.root / "here").mkdir(exist_ok=True)
        command = [str(word) for word in words]
        where = {"env": self.environment(**environment), "cwd": here}
        streams = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
        }
        for _ in range(2):
            done = subprocess.run(
                command, **where, **streams, text=True, timeout=1200, check=False
            )
            if fails or done.returncode == 0 or ABORT_AT_EXIT not in done.stdout:
                break
        assert (done.returncode != 0) == fails, done.stdout
        return done.stdout

    def python(
        self, *words: str | Path, fails: bool = False, **environment: str
    ) -> str:
        """Run this environment's Python."""
        return self.run(sys.executable, *words, fails=fails, **environment)

    def forked(
        self, *words: str | Path, fails: bool = False, **environment: str
    ) -> str:
        """As ``python``, without the seconds of a start."""
        return self.run(self.programs / "python", *words, fails=fails, **environment)

    @property
    def programs(self) -> Path:
        """A folder with ``python``, ``deepspeed`` and ``llm2clip`` that are forked, for scripts
        that start many."""
        os.environ.update(ACCELERATOR)  # read when DeepSpeed is imported
        return programs(on_cpu)

    def stage(
        self,
        kind: str,
        tower: str,
        output: Path,
        *options: str,
        ranks: int = 0,
        zero: int = 2,
        launched: tuple[str | Path, ...] = (),
        forked: bool = False,
        **environment: str,
    ) -> list[float]:
        """One of LLaVA's training stages; returns the loss of each step.

        ``kind``: pretrain, finetune or lora. ``ranks`` 0: without DeepSpeed. ``launched``: what
        DeepSpeed's launcher starts, such as LLaVA's script; without it, the ranks are started as it
        starts them. ``forked``: the launcher's processes are forked.
        """
        words = [*self.stage_options(kind, tower, output), *options]
        if ranks:
            words = ["--deepspeed", str(self.zero_config(zero)), *words]
        if launched:
            launcher = (
                self.programs if forked else Path(sys.executable).parent
            ) / "deepspeed"
            given = ("--num_gpus", ranks, "--master_port", free_port(), *launched)
            self.run(launcher, *map(str, given), *words, **environment)
        else:
            self.train(words, environment, ranks)
        return losses(output)

    def train(
        self, words: list[str], variables: dict[str, str], ranks: int = 0
    ) -> None:
        """``python -m llava.train.train WORDS``, by each of the ranks, forked from a process that
        has its libraries."""
        (here := self.root / "here").mkdir(exist_ok=True)
        os.environ.update(ACCELERATOR)  # read when DeepSpeed is imported
        for _ in range(2):
            common = {
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
            }
            places = [
                {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                for rank in range(ranks)
            ] or [{}]
            processes = [
                Module(
                    "llava.train.train",
                    words,
                    self.environment(**variables, **of_rank),
                    here,
                    on_cpu,
                )
                for of_rank in places
            ]
            failed = [
                process.output for process in processes if process.wait(1200) != 0
            ]
            if not any(ABORT_AT_EXIT in output for output in failed):
                break
        assert not failed, failed[0]

    def stage_options(self, kind: str, tower: str, output: Path) -> list[str]:
        """LLaVA's own options, as in its scripts, at a tiny size on a CPU."""
        data, version = (
            (self.pretrain_data, "plain")
            if kind == "pretrain"
            else (self.finetune_data, "v1")
        )
        options = f"""--model_name_or_path {self.llm} --version {version}
            --data_path {data} --image_folder {self.images}
            --vision_tower {tower} --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2
            --mm_use_im_start_end False --mm_use_im_patch_token False --bf16 True
            --output_dir {output}
            --max_steps {STEPS} --per_device_train_batch_size 4 --gradient_accumulation_steps 1
            --evaluation_strategy no --save_strategy no --learning_rate 1e-3 --warmup_ratio 0.03
            --lr_scheduler_type cosine --logging_steps 1 --model_max_length 256
            --lazy_preprocess True
            --report_to none --dataloader_num_workers 0 --seed 7""".split()
        if kind == "pretrain":
            return [*options, "--tune_mm_mlp_adapter", "True"]
        options += ["--image_aspect_ratio", "pad", "--group_by_modality_length", "True"]
        if kind == "lora":
            options += [
                "--lora_enable",
                "True",
                "--lora_r",
                "4",
                "--lora_alpha",
                "8",
                "--mm_projector_lr",
                "2e-5",
            ]
        return options

    def projector(self) -> Path:
        """A projector's weights as LLaVA's pretrain stage writes them, the same at every call."""
        # seeds 0 to 3 were tried: with 2, the margins of `checkpoint`'s answers are largest
        torch.manual_seed(2)
        layers = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, WIDTH),
            torch.nn.GELU(),
            torch.nn.Linear(WIDTH, WIDTH),
        )
        path = self.root / "mm_projector.bin"
        torch.save(
            {
                f"model.mm_projector.{name}": tensor
                for name, tensor in layers.state_dict().items()
            },
            path,
        )
        return path

    def zero_config(self, stage: int, *, offload: bool = False) -> Path:
        """DeepSpeed's configuration, as LLaVA's zero2.json, zero3.json and zero3_offload.json."""
        zero = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True}
        if stage == 3:
            # An integer: "auto" becomes a float there, which this DeepSpeed refuses.
            zero |= {
                "stage3_prefetch_bucket_size": 100000,
                "stage3_gather_16bit_weights_on_model_save": True,
            }
            zero |= {
                "stage3_param_persistence_threshold": "auto",
                "reduce_bucket_size": "auto",
            }
        if offload:
            zero |= {
                f"offload_{part}": {"device": "cpu"} for part in ("optimizer", "param")
            }
        path = self.root / f"zero{stage}{'-offload' * offload}.json"
        auto = (
            "train_micro_batch_size_per_gpu",
            "train_batch_size",
            "gradient_accumulation_steps",
        )
        body = {
            "bf16": {"enabled": "auto"},
            "zero_optimization": zero,
            **dict.fromkeys(auto, "auto"),
        }
        # the Trainer's AdamW: nothing is compiled
        body |= {"zero_force_ds_cpu_optimizer": False} if offload else {}
        path.write_text(json.dumps(body))
        return path


def losses(checkpoint: Path) -> list[float]:
    """The loss of each step of a stage."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def pope_folder(folder: Path) -> Path:
    """POPE's files with one question in 13, and a picture for each."""
    golden = Path(__file__).parents[1] / "golden" / "mllm" / "pope"
    shutil.copytree(golden / "coco", folder / "coco")
    rows = [
        json.loads(line)
        for line in (golden / "llava_pope_test.jsonl").read_text().splitlines()
    ]
    rows = [row for row in rows if row["question_id"] % 13 == 0]
    (folder / "llava_pope_test.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    (folder / "val2014").mkdir()
    for row in rows:
        Image.new("RGB", (32, 24), (len(row["image"]) * 7 % 255, 90, 160)).save(
            folder / "val2014" / row["image"]
        )
    return folder


def model_arguments(tower: str) -> SimpleNamespace:
    """What LLaVA's training passes to ``initialize_vision_modules``."""
    select = {
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
    }
    projector = {
        "mm_projector_type": "linear",
        "pretrain_mm_mlp_adapter": None,
        "tune_mm_mlp_adapter": False,
    }
    return SimpleNamespace(vision_tower=tower, **select, **projector)


def untrained(world: World, tower: str, folder: Path) -> Path:
    """What LLaVA's training does with a tower, without the steps: builds, initialises, saves."""
    from llava.model.language_model.llava_llama import (
        LlavaConfig,
        LlavaLlamaForCausalLM,
    )

    model = LlavaLlamaForCausalLM(LlavaConfig.from_pretrained(world.llm))
    model.get_model().initialize_vision_modules(model_arguments(tower))
    model.save_pretrained(folder)
    return folder


def on_cpu() -> None:
    """As the tests' ``sitecustomize`` does in a process that starts anew with it on its path."""
    folder = Path(__file__).parent / "on_cpu"
    if str(folder) in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        runpy.run_path(str(folder / "sitecustomize.py"))["complete"](torch)


def places(root: Path, towers: tuple[str, ...]) -> World:
    """Where everything will lie."""
    data = {
        f"{stage}_data": root / f"{stage}.json" for stage in ("pretrain", "finetune")
    }
    data |= {"images": root / "images", "questions": root / "questions.jsonl"}
    return World(
        root=root,
        llm=root / "tiny-vicuna",
        towers={name: root / "towers" / name for name in towers},
        **data,
    )
