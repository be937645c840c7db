"""docs/first-day.md as printed, in little: its blocks "In LLaVA", with LLaVA's own stages on tiny
models.

The blocks before: tests/docs/test_first_day.py. All run in the one environment that the page makes.
"""

import json
import shutil

import pytest
from llava_world import TODAY, pope_folder
from printed_page import ROOT, blocks, run_block

pytestmark = [
    pytest.mark.both_stacks,
    pytest.mark.skipif(not TODAY, reason="the page installs today's libraries"),
]
PAGE = ROOT / "docs" / "first-day.md"
# options of the scripts, in little
SMALL = {
    "GPUS": "1",
    "MICRO_BATCH": "6",
    "GLOBAL_BATCH": "12",
}


@pytest.fixture
def folder(world, tmp_path):
    """Where the user works: LLaVA's data, the tower of the page's first part, the checkpoint to
    compare with."""
    links = {
        "scripts": ROOT / "scripts",
        "blip_laion_cc_sbu_558k.json": world.pretrain_data,
        "llava_v1_5_mix665k.json": world.finetune_data,
        "LLaVA-Pretrain/images": world.images,
        "lmsys/vicuna-7b-v1.5": world.llm,
        # is there when it is needed
        "liuhaotian/llava-v1.5-7b": tmp_path / "checkpoints" / "llava-photos",
    }
    for name, target in links.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(target)
    shutil.copytree(world.towers["clip"], tmp_path / "runs" / "photos" / "tower")
    shutil.copytree(world.images, tmp_path / "playground" / "data")
    pope_folder(tmp_path / "playground" / "data" / "eval" / "pope")
    return tmp_path


def test_the_llava_part_runs_as_printed(world, folder):
    variables = {
        "PYTHON": str(world.programs / "python"),
        "PATH": f"{world.programs}:/usr/bin:/bin",
        **SMALL,
    }

    def run(command: str) -> tuple[int, str]:
        return 0, world.run("bash", "-c", f"cd {folder} && {command}", **variables)

    steps = [block for block in blocks(PAGE) if block.heading.startswith("In LLaVA")]
    assert len(steps) == 3
    for block in steps:
        run_block(block, run)
    assert "llm2clip_tower" in json.loads(
        (folder / "checkpoints" / "llava-photos" / "config.json").read_text()
    )
