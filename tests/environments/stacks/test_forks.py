"""Forks of LLaVA with our towers (``scripts/test.sh --stacks``): llavaction, a fork of LLaVA-NeXT
that is on the index.

``LLAVA_NEXT=CHECKOUT`` tests LLaVA-NeXT's own code, too, which is not on it (seen: b42941c).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llava_world import World, free_port, losses
from tiny_llava import make_world
from transformers import Qwen2Config, Qwen2ForCausalLM

RANKS = 2
ANNOTATIONS = (
    "EPIC_100_train.csv EPIC_100_validation.csv EPIC_100_verb_classes.csv "
    "EPIC_100_noun_classes_v2.csv"
)
# called when a model is saved
ON_CPU = "import torch\ntorch.cuda.synchronize = lambda device=None: None\n"
WHOLE = "mm_vision_tower,mm_mlp_adapter,mm_language_model"
# "unpad" draws a parameter after the tower is built
ANYRES = """--image_aspect_ratio anyres --image_grid_pinpoints [(28,56),(56,28),(56,56)]
    --mm_patch_merge_type spatial --mm_vision_tower_lr 1e-4"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """The tiny world, with pictures as videos of two frames, and a Qwen 2: llavaction's code trains
    nothing else."""
    world = make_world(tmp_path_factory.mktemp("forks"))
    for data in (world.pretrain_data, world.finetune_data):
        rows = [row for row in json.loads(data.read_text()) if "image" in row]
        for row in rows:
            frames = (
                world.root
                / "videos"
                / "sharegpt4video"
                / Path(image := row.pop("image")).stem
            )
            frames.mkdir(parents=True, exist_ok=True)
            for number in range(2):
                shutil.copy(world.images / image, frames / f"{number}.png")
            row |= {"video": frames.name, "dataset_name": "sharegpt4video"}
        data.with_suffix(".video.json").write_text(json.dumps(rows))
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = Qwen2Config(
        vocab_size=600,
        num_key_value_heads=4,
        pad_token_id=0,
        initializer_range=0.1,
        **shape,
    )
    Qwen2ForCausalLM(config).save_pretrained(world.root / "tiny-qwen")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(world.llm / name, world.root / "tiny-qwen" / name)
    # LLaVA-NeXT chooses the class by the name
    world.llm.rename(world.root / "tiny-llama")
    (world.root / "sitecustomize.py").write_text(ON_CPU)
    for name in ANNOTATIONS.split():  # read by llavaction whatever it trains on
        (world.root / name).write_text(
            "id,key\n0,take\n" if "classes" in name else "narration_id\n"
        )
    return world


def train(
    world: World, package: str, paths: list[str], tower: str, kind: str, options: str
) -> list[float]:
    """The loss of each step of a stage on two ranks under ZeRO-2, from a fixed projector."""
    video = package != "llava"
    output = world.root / f"{package}-{kind}-{tower[:8].replace('/', '-')}"
    data = world.pretrain_data if kind == "pretrain" else world.finetune_data
    llm = world.root / ("tiny-qwen" if video else "tiny-llama")
    version = "plain" if kind == "pretrain" else "v1"
    if video:
        data = data.with_suffix(".video.json")
    words = f"""-m {package}.train.train --model_name_or_path {llm} --version {version}
        --vision_tower {tower} --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2
        --data_path {data} --image_folder {world.images}
        --video_folder {world.root / "videos"} --frames_upbound 2 --force_sample True
        --pretrain_mm_mlp_adapter {world.projector()} --output_dir {output} --max_steps 3
        --per_device_train_batch_size 2 --evaluation_strategy no --save_strategy no
        --learning_rate 1e-3 --mm_use_im_start_end False --mm_use_im_patch_token False
        --model_max_length 256 --logging_steps 1 --lazy_preprocess True --report_to none
        --dataloader_num_workers 0 --seed 7 --bf16 True
        --attn_implementation eager --deepspeed {world.zero_config(2)} {options}""".split()
    common = {
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    common["PYTHONPATH"] = os.pathsep.join([str(world.root), *paths, *sys.path])
    variables_of_ranks = [
        world.environment(RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in range(RANKS)
    ]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [
        subprocess.Popen(
            [sys.executable, *words], env=variables, cwd=world.root, **streams
        )
        for variables in variables_of_ranks
    ]
    outputs = [rank.communicate(timeout=1800)[0] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), (
        outputs[0][-3000:] + outputs[1][-3000:]
    )
    return losses(output)


@pytest.mark.parametrize(
    ("package", "kind", "options"),
    [
        ("llavaction", "pretrain", "--mm_tunable_parts mm_mlp_adapter"),
        (
            "llavaction",
            "finetune",
            f"--mm_tunable_parts {WHOLE} --image_aspect_ratio pad",
        ),
        ("llava", "pretrain", "--mm_tunable_parts mm_mlp_adapter"),
        ("llava", "finetune", f"--mm_tunable_parts {WHOLE} {ANYRES}"),
    ],
)
def test_losses_are_those_of_its_own_clip_tower(world, package, kind, options):
    paths = [os.environ.get("LLAVA_NEXT", "")] if package == "llava" else []
    if paths == [""]:
        pytest.skip(
            "LLaVA-NeXT is not on the package index; LLAVA_NEXT=CHECKOUT names its code"
        )
    tower = world.towers["clip"]
    theirs, ours = (
        train(world, package, paths, name, kind, options)
        for name in (str(tower), f"llm2clip:{tower}")
    )
    assert theirs == ours
    assert theirs[-1] < theirs[0]
