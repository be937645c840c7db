"""Run in LLaVA's environment: tiny LLaVAs of several towers, finetuned by LLaVA, exported, and
their answers.

    python make_served_models.py OUTPUT clip eva02 ...

writes OUTPUT/questions.jsonl and images/, and for each tower hf-NAME (the exported model) and
NAME.jsonl, what LLaVA's own code answers in float32.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

from llava_world import World
from tiny_llava import make_world

CLI = ("-m", "llm2clip_plugin.cli", "llava")


def finetuned(world: World, tower: str) -> Path:
    """A checkpoint that has learned its pictures, as ``checkpoint`` of tests/llava."""
    folder = world.root / f"llava-{tower}"
    options = (
        "--max_steps",
        "80",
        "--learning_rate",
        "1e-2",
        "--pretrain_mm_mlp_adapter",
        world.projector(),
    )
    world.stage(
        "finetune", f"llm2clip:{world.towers[tower]}", folder, *map(str, options)
    )
    return folder


def main(output: Path, towers: list[str]) -> None:
    # vLLM's attention on a CPU needs heads of 32 or more
    world = make_world(output, heads=1)
    files = ("--question-file", world.questions, "--image-folder", world.images)
    for tower in towers:
        folder = finetuned(world, tower)
        answers = output / f"{tower}.jsonl"
        options = (
            "--max-new-tokens",
            "12",
            "--workers",
            "0",
            "--dtype",
            "float32",
            "--answers-file",
            answers,
        )
        world.python(*CLI, "evaluate", "--model-path", folder, *files, *options)
        assert (
            len({json.loads(line)["text"] for line in answers.read_text().splitlines()})
            > 2
        )
        print(
            world.python(
                *CLI,
                "export",
                folder,
                "--format",
                "hf",
                "--output",
                output / f"hf-{tower}",
            )
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
