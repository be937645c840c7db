"""A tiny LLaVA world: a Llama of two layers with its tokenizer, towers, pictures, conversations;
and LLaVA's stages."""

import dataclasses
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from forked import Module
from forked_python import programs
from PIL import Image

from llm2clip_plugin.installation import numbers
from llm2clip_plugin.train.distributed import free_port
from llm2clip_plugin.vision.eva02 import Eva02Config, Eva02VisionModel
from llm2clip_plugin.vision.export import export_tower

# LLaVA runs in the training environment, with today's libraries
TODAY = numbers(transformers.__version__) >= (5,)
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (40, 60, 230),
    "white": (250, 250, 250),
}
WIDTH = 32
# 2 x 2 patches
SHAPES = {"num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
STEPS = 3
PIECES = 600  # of the tokenizer
# As in Vicuna's repository; written by hand, because each version of transformers saves another set
# of files
TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer",
    "legacy": True,
    "add_bos_token": True,
    "add_eos_token": False,
}
TOKENIZER |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
TOKENIZER |= {"clean_up_tokenization_spaces": False, "sp_model_kwargs": {}}
# What a rank on a CPU says, once in some dozens, when its work is done and the interpreter ends:
# LLaVA leaves the process group open, and a C++ thread that is there still aborts the process. Such
# a run is done again, once.
ABORT_AT_EXIT = "terminate called without an active exception"


# The CPU accelerator of LLaVA's own DeepSpeed needs Intel's extension; there, "cuda" without a GPU
# trains one process.
HALF_ON_CPU = pytest.mark.skipif(
    torch.__version__.startswith("2.1."), reason="torch 2.1 has no float16 convolution on a CPU"
)
ACCELERATOR = {} if version("deepspeed").startswith("0.12.") else {"DS_ACCELERATOR": "cpu"}


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
            key: value for key, value in os.environ.items() if not key.startswith("LLM2CLIP_")
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
        place = {"env": self.environment(**environment), "cwd": here}
        streams = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
        }
        for _ in range(2):
            done = subprocess.run(command, **place, **streams, text=True, timeout=1200, check=False)
            if fails or done.returncode == 0 or ABORT_AT_EXIT not in done.stdout:
                break
        assert (done.returncode != 0) == fails, done.stdout
        return done.stdout

    def python(self, *words: str | Path, fails: bool = False, **environment: str) -> str:
        """Run this environment's Python."""
        return self.run(sys.executable, *words, fails=fails, **environment)

    def forked(self, *words: str | Path, fails: bool = False, **environment: str) -> str:
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
            launcher = (self.programs if forked else Path(sys.executable).parent) / "deepspeed"
            given = ("--num_gpus", ranks, "--master_port", free_port(), *launched)
            self.run(launcher, *map(str, given), *words, **environment)
        else:
            self.train(words, environment, ranks)
        return losses(output)

    def train(self, words: list[str], variables: dict[str, str], ranks: int = 0) -> None:
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
                {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)
            ] or [{}]
            processes = [
                Module(
                    "llava.train.train", words, self.environment(**variables, **place), here, on_cpu
                )
                for place in places
            ]
            failed = [process.output for process in processes if process.wait(1200) != 0]
            if not any(ABORT_AT_EXIT in output for output in failed):
                break
        assert not failed, failed[0]

    def stage_options(self, kind: str, tower: str, output: Path) -> list[str]:
        """LLaVA's own options, as in its scripts, at a tiny size on a CPU."""
        data, version = (
            (self.pretrain_data, "plain") if kind == "pretrain" else (self.finetune_data, "v1")
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
            torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU(), torch.nn.Linear(WIDTH, WIDTH)
        )
        path = self.root / "mm_projector.bin"
        torch.save(
            {f"model.mm_projector.{name}": tensor for name, tensor in layers.state_dict().items()},
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
            zero |= {"stage3_param_persistence_threshold": "auto", "reduce_bucket_size": "auto"}
        if offload:
            zero |= {f"offload_{part}": {"device": "cpu"} for part in ("optimizer", "param")}
        path = self.root / f"zero{stage}{'-offload' * offload}.json"
        auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
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
        json.loads(line) for line in (golden / "llava_pope_test.jsonl").read_text().splitlines()
    ]
    rows = [row for row in rows if row["question_id"] % 13 == 0]
    (folder / "llava_pope_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

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
    data = {f"{stage}_data": root / f"{stage}.json" for stage in ("pretrain", "finetune")}
    data |= {"images": root / "images", "questions": root / "questions.jsonl"}
    return World(
        root=root,
        llm=root / "tiny-vicuna",
        towers={one: root / "towers" / one for one in towers},
        **data,
    )


def make_world(root: Path, heads: int = 4) -> World:
    """Everything, in a few seconds. ``heads``: of the language model, whose heads are 32 / heads
    wide."""
    world = places(root, ("clip", "other", "wide", "siglip", "dinov2", "eva02"))
    make_data(world, make_images(world.images))
    make_llm(world, heads)
    for seed, (name, directory) in enumerate(world.towers.items()):
        torch.manual_seed(seed)
        export_tower(make_tower(name), directory, origin=f"made for tests: {name}")
    return world


def make_images(folder: Path) -> list[str]:
    """Twelve pictures of four colours, of different shapes and sizes."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    names = []
    for number in range(12):
        colour = list(COLOURS)[number % len(COLOURS)]
        height, width = noise.integers(20, 60, 2)
        pixels = np.array(COLOURS[colour]) + noise.integers(-20, 20, (height, width, 3))
        names.append(f"{colour}-{number}.png")
        Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(folder / names[-1])
    return names


def make_data(world: World, names: list[str]) -> None:
    """Captions for pretrain, conversations for finetune (one in four without a picture),
    questions."""
    pretrain = []
    finetune = []
    questions = []
    for number, name in enumerate(names):
        colour = name.partition("-")[0]
        asked = {"from": "human", "value": "<image>\nWhat is it?"}
        told = {"from": "gpt", "value": f"a {colour} picture"}
        pretrain.append({"id": str(number), "image": name, "conversations": [asked, told]})
        question = (
            "Which colour is the picture?"
            if number % 2
            else "Tell me the colour of it, in one short word."
        )
        talk = [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": colour},
        ]
        finetune.append({"id": str(number), "image": name, "conversations": talk})
        if number % 4 == 0:
            talk = [{"from": "human", "value": "Say a colour."}, {"from": "gpt", "value": colour}]
            finetune.append({"id": f"text-{number}", "conversations": talk})
        questions.append(
            {"question_id": number, "image": name, "text": question, "category": "colour"}
        )
    world.pretrain_data.write_text(json.dumps(pretrain))
    world.finetune_data.write_text(json.dumps(finetune))
    world.questions.write_text("".join(json.dumps(question) + "\n" for question in questions))


def make_llm(world: World, heads: int) -> None:
    """A Llama of two layers and a sentencepiece tokenizer of 400 pieces; legacy, as LLaVA's masking
    expects."""
    import sentencepiece

    draw = random.Random(0)
    # words that no change of the tests changes
    license_text = (Path(__file__).parents[2] / "LICENSE").read_text()
    words = (
        world.pretrain_data.read_text() + world.finetune_data.read_text() + license_text
    ).split()
    text = world.root / "text.txt"
    text.write_text("\n".join(" ".join(draw.choices(words, k=12)) for _ in range(2000)))
    options = {
        "vocab_size": PIECES,
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 1.0,
    }
    options |= {"model_prefix": str(world.root / "pieces"), "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(input=str(text), **options)
    world.llm.mkdir()
    (world.root / "pieces.model").rename(world.llm / "tokenizer.model")
    (world.llm / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    torch.manual_seed(0)
    sizes = {
        "vocab_size": PIECES,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "pad_token_id": 0,
    }
    sizes |= {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
    }
    config = transformers.LlamaConfig(**sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(world.llm, safe_serialization=True)


def make_tower(name: str) -> torch.nn.Module:
    """A random vision model; "other" is a CLIP of the same shape, "wide" a wider one; SigLIP has no
    class token."""
    common = {"hidden_size": 48 if name == "wide" else WIDTH, **SHAPES}
    if name == "dinov2":
        return transformers.Dinov2Model(transformers.Dinov2Config(mlp_ratio=2, **common)).eval()
    common["intermediate_size"] = 64
    if name == "siglip":
        return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**common)).eval()
    if name == "eva02":
        return Eva02VisionModel(Eva02Config(**common)).eval()
    return transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(hidden_act="quick_gelu", **common)
    ).eval()
