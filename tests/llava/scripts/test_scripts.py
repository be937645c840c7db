"""The scripts a user starts: LLaVA's own command with our tower's name, on one node, several nodes,
Slurm."""

import itertools
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llava_world import TODAY, losses

from llm2clip_plugin.precision import fastest_precision

CPU = torch.device("cpu")
SCRIPTS = Path(__file__).parents[3] / "scripts"
# From LLaVA 1.5's own scripts: what must not differ but for the batch that each GPU takes.
RECIPE = {
    "pretrain": (
        "--version plain --tune_mm_mlp_adapter True --learning_rate 1e-3 "
        "--mm_projector_type mlp2x_gelu"
    ),
    "finetune": (
        "--version v1 --image_aspect_ratio pad --group_by_modality_length True --learning_rate 2e-5"
    ),
    "finetune_lora": "--version v1 --lora_enable True --lora_r 128 --lora_alpha 256 "
    "--mm_projector_lr 2e-5 "
    "--learning_rate 2e-4",
}
COMMON = (
    "--mm_vision_select_layer -2 --warmup_ratio 0.03 "
    "--lr_scheduler_type cosine --model_max_length 2048"
)


def script(world, name, *words, fails=False, **environment):
    """Run a script in LLaVA's environment, its processes forked; returns what it printed."""
    environment = {
        "LLM2CLIP_TOWER": str(world.towers["clip"]),
        "PYTHON": str(world.programs / "python"),
        **environment,
    }
    return world.run("bash", SCRIPTS / name, *words, fails=fails, **environment)


def given(world, tmp_path, stage):
    """The options that every stage needs."""
    data = world.pretrain_data if stage == "pretrain" else world.finetune_data
    words = [
        "--model",
        world.llm,
        "--data",
        data,
        "--image-folder",
        world.images,
        "--output",
        tmp_path / "llava-lora",
    ]
    return words if stage == "pretrain" else [*words, "--projector", world.projector()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="bf16 on every GPU")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variables are x86's")
def test_a_cpu_without_bf16_units_trains_in_float32(world, tmp_path):
    words = given(world, tmp_path, "pretrain")
    environment = {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "PYTHON": sys.executable,  # its libraries are not loaded yet
    }
    command = script(world, "llava/pretrain.sh", *words, "--dry-run", **environment)
    assert " --bf16 False " in command


@pytest.mark.parametrize("stage", list(RECIPE))
def test_the_command_is_llavas(world, tmp_path, stage):
    command = script(
        world,
        f"llava/{stage}.sh",
        *given(world, tmp_path, stage),
        "--dry-run",
        "--",
        "--max_steps",
        "3",
    )
    options = command.split()
    pairs = set(itertools.pairwise(options))
    for recipe in (RECIPE[stage], COMMON):
        words = recipe.split()
        assert set(zip(words[::2], words[1::2], strict=True)) <= pairs
    assert ("--vision_tower", "llm2clip") in pairs
    is_bf16 = torch.cuda.is_available() or fastest_precision(CPU) == "bf16"
    assert ("--bf16", str(is_bf16)) in pairs
    assert command.strip().endswith("--max_steps 3")
    assert options[0].endswith("deepspeed")
    assert "/llava/train/train" in command


def test_an_environment_and_an_output_with_spaces(world, tmp_path):
    """What is started, and the command that is printed for a shell."""
    environment = tmp_path / "my env"
    environment.symlink_to(world.programs)
    words = given(world, tmp_path, "pretrain")
    words[-1] = tmp_path / "my llava"
    command = script(
        world,
        "llava/pretrain.sh",
        *words,
        "--dry-run",
        PYTHON=str(environment / "python"),
    )
    options = shlex.split(command)
    assert options[0] == str(environment / "deepspeed")
    assert options[options.index("--output_dir") + 1] == str(tmp_path / "my llava")


def test_the_batch_does_not_depend_on_the_hardware(world, tmp_path):
    words = [*given(world, tmp_path, "pretrain"), "--dry-run"]
    two_gpus = script(world, "llava/pretrain.sh", *words, "--gpus", "2")
    assert "--num_gpus 2" in two_gpus
    assert "--gradient_accumulation_steps 4 " in two_gpus  # 2 x 32 x 4 = 256
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=8\n# b slots=8\nc slots=8\n")
    named = [*words, "--tower", f"llm2clip:{world.towers['clip']}"]
    several = script(
        world,
        "llava/pretrain.sh",
        *named,
        "--hostfile",
        hosts,
        MICRO_BATCH="8",
        LLM2CLIP_TOWER="",
    )
    # 16 x 8 x 2
    assert f"--hostfile {hosts}" in several
    assert "--gradient_accumulation_steps 2 " in several
    output = script(world, "llava/pretrain.sh", *words, "--gpus", "3", fails=True)
    assert "256 is not a multiple of 3 ranks x --micro-batch 32 = 96" in output
    output = script(
        world,
        "llava/pretrain.sh",
        *words,
        "--hostfile",
        hosts,
        fails=True,
        HOME=str(tmp_path),
    )
    assert f"add LLM2CLIP_TOWER={world.towers['clip']} to ~/.deepspeed_env" in output


def test_slurm(world, tmp_path):
    """With the commands of Slurm played by stand-ins: what would be started on the nodes."""
    programs = tmp_path / "bin"
    programs.mkdir()
    # as with many nodes, it still writes when the first is read
    (programs / "scontrol").write_text(
        "#!/bin/sh\necho node-7\nsleep 0.3\necho node-8\n"
    )
    (programs / "srun").write_text('#!/bin/sh\necho srun "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    job = {"ID": "123", "NUM_NODES": "2", "NODELIST": "node-[7-8]"}
    job = {f"SLURM_JOB_{name}": value for name, value in job.items()} | {
        "SLURM_GPUS_ON_NODE": "4"
    }
    job |= {
        "PATH": f"{programs}:/usr/bin:/bin",
        "PYTHON": sys.executable,
        "LLM2CLIP_TOWER": str(world.towers["clip"]),
    }

    def submitted(*words):
        options = {"cwd": SCRIPTS.parent, "env": world.environment(**job)}
        return subprocess.run(
            ["bash", *map(str, words)], **options, capture_output=True, text=True
        )

    done = submitted(
        "scripts/slurm/llava.sbatch", "pretrain", *given(world, tmp_path, "pretrain")
    )
    nodes = ("--nnodes 2", "--nproc_per_node 4", "--rdzv_endpoint node-7:20123")
    for part in (*nodes, "--gradient_accumulation_steps 1 "):
        assert part in done.stdout, done.stdout + done.stderr
    done = submitted("scripts/slurm/evaluate.sbatch", "--batch-size", "4")
    assert done.stdout.startswith(f"srun {sys.executable} -c import sys; ")
    assert done.stdout.rstrip().endswith(
        " llm2clip_plugin.cli llava evaluate --batch-size 4"
    )


def test_nothing_starts_with_a_bad_tower_and_a_name_that_will_not_load(world, tmp_path):
    words = [
        *given(world, tmp_path, "finetune"),
        "--output",
        tmp_path / "run-1",
        "--tower",
        "llm2clip:/nowhere",
    ]
    problems = script(world, "llava/finetune.sh", *words, fails=True).splitlines()
    assert len(problems) == 2, problems
    assert all(line.startswith("error: --") for line in problems), problems
    assert "choose another name, such as llava-run-1" in problems[0]
    assert "'/nowhere' is not a directory" in problems[1]


# lines of libraries, not of LLaVA
FOREIGN = ("Warning", "deprecated", "[INFO]", "You are using a model of type")


def options(
    world, tmp_path, stage, gpus, per_device, *words, more=(), name="llava-lora"
):
    """Of a script on this machine under DeepSpeed's launcher, as a user without a GPU runs it."""
    words = [
        *given(world, tmp_path, stage),
        "--output",
        tmp_path / name,
        "--gpus",
        str(gpus),
        *words,
    ]
    words += [
        "--micro-batch",
        str(per_device),
        "--global-batch",
        "16",
        "--",
        "--max_steps",
        "3",
        "--seed",
        "7",
    ]
    words += (
        "--model_max_length 128 --dataloader_num_workers 0 "
        "--gradient_checkpointing False"
    ).split()
    return [*words, *more]


def train(
    world,
    tmp_path,
    stage,
    gpus,
    per_device,
    *words,
    more=(),
    name="llava-lora",
    python=sys.executable,
):
    """A script, run; the loss of each step."""
    words = options(
        world, tmp_path, stage, gpus, per_device, *words, more=more, name=name
    )
    output = script(
        world,
        f"llava/{stage}.sh",
        *words,
        REPORT_TO="none",
        PYTHONPATH="",
        PYTHON=str(python),
    )
    _, result, following, *lines = output.splitlines()  # the command is first
    assert str(tmp_path / name) in result
    assert following.startswith(("next: scripts/llava/f", "next: llm2clip bench-mllm"))
    for word in FOREIGN:
        assert [line for line in lines if word in line] == []
    return losses(tmp_path / name)


def one_batch(world, tmp_path):
    """16 samples, so that each step takes all of them in whatever order, with equally many tokens
    in each answer, so that the mean over micro-batches of their means is that of the batch."""
    samples = [
        sample
        for sample in json.loads(world.pretrain_data.read_text())
        if not sample["image"].startswith("blue")
    ]
    path = tmp_path / "one-batch.json"
    path.write_text(json.dumps((samples + samples)[:16]))
    return path


def test_pretraining_accumulates_over_ranks_as_one_rank_takes_the_batch(
    world, tmp_path
):
    """2 ranks x 4 samples x 2 micro-batches under ZeRO-2 give the losses of 1 rank x 16, up to
    bf16."""
    words = ["--data", one_batch(world, tmp_path)]
    more = ["--pretrain_mm_mlp_adapter", world.projector()]
    more += "--learning_rate 2e-2 --lr_scheduler_type constant".split()
    dry = options(
        world, tmp_path, "pretrain", 1, 16, *words, "--dry-run", more=more, name="one"
    )
    command = shlex.split(script(world, "llava/pretrain.sh", *dry, REPORT_TO="none"))
    start = next(
        index for index, word in enumerate(command) if "/llava/train/train" in word
    )
    # needs no launcher
    world.train(
        command[start + 1 :], {"LLM2CLIP_TOWER": str(world.towers["clip"])}, ranks=1
    )
    one_rank = losses(tmp_path / "one")
    two_ranks = train(
        world,
        tmp_path,
        "pretrain",
        2,
        4,
        *words,
        more=more,
        name="two",
        python=world.programs / "python",
    )
    assert len(one_rank) == 3
    assert one_rank[0] - one_rank[2] > 0.5
    assert two_ranks == pytest.approx(one_rank, abs=0.02)
    assert (tmp_path / "two" / "mm_projector.bin").is_file()


@pytest.mark.parametrize(
    "stage, saved",
    [
        pytest.param("finetune", "model", marks=pytest.mark.both_stacks),
        ("finetune_lora", "adapter_model"),
    ],
)
def test_finetuning_without_a_gpu_keeps_its_model(world, tmp_path, stage, saved):
    """ZeRO-3 with accumulation over two ranks; nothing of the tests' own makes it run on a CPU."""
    # one start of everything is enough
    python = sys.executable if TODAY else world.programs / "python"
    assert len(train(world, tmp_path, stage, 2, 4, python=python)) == 3
    assert (tmp_path / "llava-lora" / f"{saved}.safetensors").is_file()
