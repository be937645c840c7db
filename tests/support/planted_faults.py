"""A fault: how it is planted into a small world, the command that meets it, and the first line of
what it says."""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llm2clip_plugin.cli import main


@dataclass(frozen=True)
class World:
    """A folder with tower/, data/ (tars and their cache) and, in some tests, run/: a finished run
    of four steps."""

    folder: Path

    @property
    def cache(self) -> Path:
        (path,) = self.folder.glob("data/embeddings-*")
        return path

    def path(self, name: str) -> Path:
        return self.folder / name

    def train(self, words: str = "") -> list[str]:
        """A short run, into a folder of its own; ``words`` override it, {w} is the world's
        folder."""
        return [
            *(
                "train-tower",
                "--recipe",
                "quickstart",
                "--tower.path",
                f"{self.folder}/tower",
            ),
            *(
                "--tower.image-size",
                "16",
                "--tower.freeze-first-blocks",
                "0",
                "--data.path",
                f"{self.folder}/data",
            ),
            *(
                "--output_dir",
                f"{self.folder}/new",
                "--max_steps",
                "4",
                "--train.global-batch",
                "8",
            ),
            *(
                "--heads.steps",
                "2",
                "--train.save-minutes",
                "0",
                "--save_steps",
                "2",
                "--evaluation.group=",
            ),
            *(word.replace("{w}", str(self.folder)) for word in words.split()),
        ]


Plant = Callable[[World], object]


def nothing(world: World) -> None:
    """The fault is in the command."""


@dataclass(frozen=True)
class Fault:
    """One row of a table."""

    name: str
    words: str  # options or, in some tables, a whole command; {w} is the world's folder
    # the first line of the error, without "error: "; {w} as above, ... stands for anything
    says: str
    plant: Plant = nothing
    status: int = 2


def rows(*faults: Fault) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "fault", faults, ids=[fault.name for fault in faults]
    )


def matches(pattern: str, line: str, world: World) -> bool:
    """Whether a line is as expected; ``...`` stands for anything."""
    parts = [
        re.escape(part)
        for part in pattern.replace("{w}", str(world.folder)).split("...")
    ]
    return re.fullmatch(".*".join(parts), line) is not None


def meet(
    fault: Fault, world: World, command: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    """Plant the fault, run the command and compare its status and the first line of its error;
    returns stderr."""
    fault.plant(world)
    capsys.readouterr()
    try:
        status = main(command)
    except SystemExit as left:  # argparse
        status = left.code
    output = capsys.readouterr().err
    assert "Traceback" not in output, output
    errors = [
        line
        for line in output.splitlines()
        if line.startswith(("error: ", "warning: "))
    ]
    first = next(
        (line for line in errors if line.startswith("error: ")),
        errors[0] if errors else "",
    )
    label, _, line = first.partition(": ")
    assert status == fault.status, output
    assert label == ("error" if status else "warning"), output
    assert matches(fault.says, line, world), f"expected: {fault.says}\nsaid:     {line}"
    return output


def contents(folder: Path) -> dict[str, bytes]:
    """The files below a folder, without indexes and kept digests."""
    files = (
        path
        for path in folder.rglob("*")
        if path.is_file() and ".llm2clip" not in path.parts
    )
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files
        if path.suffix != ".index"
    }


def copied(world: Path, to: Path) -> World:
    """A copy that keeps times, which indexes compare."""
    shutil.copytree(world, to)
    return World(to)


def flip(path: Path, at: int = -1) -> None:
    """Flip the bits of one byte; size and time stay."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 255
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def set_weight(path: Path, name: str, value: float) -> None:
    """Set the first value of the first tensor whose name contains ``name``."""
    tensors = load_file(path)
    next(tensor for key, tensor in tensors.items() if name in key).view(-1)[0] = value
    save_file(tensors, path, {"format": "pt"})
