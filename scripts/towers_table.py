"""How far is each tower family from the library that it comes from, and from itself?

    python -m scripts.towers_table            # print the table, as in docs/towers.md
    python -m scripts.towers_table --write    # renew it there

A tiny random model of every family is imported and compared: its hidden states and its pooled
output with the reference's, training mode with eval mode, pictures one by one with eight at once,
bfloat16 with float32, and gradients with and without gradient checkpointing. Takes a minute on a
CPU; on a GPU, numbers other than the first two would be others.
"""

import argparse
import contextlib
import io
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip_plugin.vision.convert.importing import import_tower
from llm2clip_plugin.vision.families import families
from llm2clip_plugin.vision.parts import tower_blocks
from llm2clip_plugin.vision.towers import load_tower
from scripts.towers_references import MAKERS, Reference

PAGE = Path(__file__).parents[1] / "docs" / "towers.md"
BEGIN = "<!-- written by scripts/towers_table.py -->"
END = "<!-- end of what it wrote -->"
HEAD = (
    "| family | reference | states | pooled | train/eval | 1 of 8 | bf16 | checkpointing |",
    "|---|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True, kw_only=True)
class Differences:
    """The largest difference of each comparison, as a share of the largest value."""

    states: float  # to the reference's
    pooled: float | None  # to the reference's; None: it pools nothing
    training: float  # training mode to eval mode
    batch: float  # a picture by itself to the same among eight
    half: float  # bfloat16 to float32
    checkpointing: float  # gradients of all parameters


def difference(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest difference of pairs of tensors, as a share of the largest expected value of the
    pair; 0.0 if they are bit-equal. ValueError for other shapes, and for values that are not
    finite."""
    shares = [0.0]
    for ours, theirs in zip(actual, expected, strict=True):
        if ours.shape != theirs.shape:
            raise ValueError(
                f"{tuple(ours.shape)} is compared with {tuple(theirs.shape)}, expected one shape"
            )
        if not (ours.isfinite().all() and theirs.isfinite().all()):
            raise ValueError("outputs are not finite, so they have no difference")
        gap = (ours.float() - theirs.float()).abs().max().item()
        shares.append(gap / max(theirs.float().abs().max().item(), 1e-30))
    return max(shares)


def features(tower: Any, pixels: Tensor) -> list[Tensor]:
    """All hidden states and the pooled output of a tower."""
    with torch.no_grad():
        output = tower(pixel_values=pixels, output_hidden_states=True)
    return [*output.hidden_states, output.pooler_output]


def gradients(tower: Any, pixels: Tensor, *, block_runs: int) -> list[Tensor]:
    """Of a loss of the pooled output, with respect to each parameter that it depends on.
    ValueError unless the first block's first layer runs so many times."""
    block = tower_blocks(tower)[0]
    layer = next(module for module in block.modules() if isinstance(module, nn.Linear))
    runs: list[int] = []
    # a recomputation may end before the layer does, so its starts are counted
    hook = layer.register_forward_pre_hook(lambda *_: runs.append(1))
    tower.zero_grad()
    torch.manual_seed(0)  # DINOv3 draws a scale of its positions
    tower(pixel_values=pixels).pooler_output.square().sum().backward()
    hook.remove()
    if len(runs) != block_runs:
        raise ValueError(f"a block ran {len(runs)} times, expected {block_runs}")
    values = [parameter.grad for parameter in tower.parameters()]
    return [value.clone() for value in values if value is not None]


def compare(tower: Any, reference: Reference) -> Differences:
    """All comparisons of a tower, which ``reference`` describes, too."""
    *states, pooled = features(tower, reference.pixels)
    size = tower.config.image_size
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(8, 3, size, size, generator=generator)
    expected = features(tower, pixels)
    alone = [features(tower, picture[None]) for picture in pixels]
    one_by_one = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    trained = features(tower.train(), pixels)
    plain = gradients(tower, pixels, block_runs=1)
    tower.gradient_checkpointing_enable()
    recomputed = gradients(tower, pixels, block_runs=2)
    tower.gradient_checkpointing_disable()
    half = features(tower.eval().bfloat16(), pixels.bfloat16())
    pooled_gap = None
    if reference.pooled is not None:
        pooled_gap = difference([pooled], [reference.pooled])
    return Differences(
        states=difference(states, reference.states),
        pooled=pooled_gap,
        training=difference(trained, expected),
        batch=difference(one_by_one, expected),
        half=difference(half, expected),
        checkpointing=difference(recomputed, plain),
    )


def measure(family: str, folder: Path) -> tuple[Reference, Differences]:
    """The reference of a family and the differences of its tower, made in ``folder``."""
    reference = MAKERS[family](folder / "reference")
    config = reference.config
    given = {"config": config, "image_size": reference.pixels.shape[-1]}
    with contextlib.redirect_stderr(io.StringIO()):  # notes on missing preprocessors
        card, _ = import_tower(reference.source, folder / "tower", **given)
        tower = load_tower(folder / "tower")
    if card.family != family:
        raise ValueError(f"the reference of {family} is a tower of {card.family}")
    return reference, compare(tower, reference)


def cell(value: float | None) -> str:
    """A difference in a table: 0 where bit-equal."""
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def row(family: str, reference: Reference, differences: Differences) -> str:
    """A line of the table."""
    values = [getattr(differences, field.name) for field in fields(differences)]
    cells = [family, reference.library, *map(cell, values)]
    return f"| {' | '.join(cells)} |"


def table(names: Sequence[str]) -> str:
    """The table of these families."""
    rows = []
    for family in names:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(family, *measure(family, Path(folder))))
    return "\n".join([*HEAD, *rows])


def write(text: str, page: Path = PAGE) -> None:
    """Put a table in the place of the one in a page; ValueError if the page has none."""
    whole = page.read_text(encoding="utf-8")
    if BEGIN not in whole or END not in whole:
        raise ValueError(f"{page} has no lines {BEGIN!r} and {END!r}; add them")
    before, _, rest = whole.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description="Differences of every tower family.")
    parser.add_argument("--write", action="store_true", help=f"renew {PAGE.name}")
    parser.add_argument(
        "--families", nargs="+", default=sorted(families()), choices=sorted(families())
    )
    options = parser.parse_args()
    text = table(options.families)
    print(text)
    if options.write:
        write(text)


if __name__ == "__main__":
    main()
