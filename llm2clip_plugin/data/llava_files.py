"""``llm2clip llava data``: a data set as LLaVA's pretraining reads it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from llm2clip_plugin.console import track
from llm2clip_plugin.contracts import atomic_directory
from llm2clip_plugin.data.samples import BrokenImage, BrokenSample, open_header, select_captions
from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.data.sources.open import check_fields, open_source
from llm2clip_plugin.options import Command

# The options of ``llm2clip llava data``.


@dataclass(frozen=True, kw_only=True)
class LlavaDataConfig(SourceConfig):
    """Captions for LLaVA's first stage, one an image."""

    output: str  # folder to write: captions.json and images; it appears when it is complete
    overwrite: bool = False  # replace what this command wrote there


COMMAND = Command(
    name="llava data",
    example="llm2clip llava data photos-tars --output photos-llava",
    about="Write captions.json and images for scripts/llava/pretrain.sh: each image with its first caption. Samples "
    "that can't be read are left out.",
    settings=LlavaDataConfig,
    arguments="path",
    everyday="output image-folder fields kinds languages overwrite",
    hidden="weight shuffle_window",
)


# ``llm2clip llava data DATA --output DIR``: a data set as LLaVA's pretraining reads it, a JSON and picture files.

FILE, IMAGES = "captions.json", "images"  # in the output


def main(argv: list[str]) -> int:
    """Write the folder. Raises FileExistsError if it exists, ValueError if no sample can be used."""
    config = COMMAND.parse(argv)
    source, rows, output = open_source(config), [], Path(config.output)
    check_fields(source, needed=True)
    with atomic_directory(output, replace=config.overwrite and (output / FILE).is_file()) as folder:
        (folder / IMAGES).mkdir()
        for number in track(range(len(source)), total=len(source), label="llava data", unit="samples"):
            try:
                sample = source.with_image(number)
                captions = select_captions(sample.captions, config.kinds, config.languages)
                data = sample.read_image()
                name = f"{number:08d}.{(open_header(data).format or '').lower()}"
            except (BrokenSample, BrokenImage):
                continue
            if captions:
                (folder / IMAGES / name).write_bytes(data)
                turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": captions[0].text}]
                rows.append({"id": sample.key, "image": name, "conversations": turns})
        if not rows:
            raise ValueError(f"no sample of {config.path} can be used; llm2clip data check {config.path} shows why")
        (folder / FILE).write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    left_out = f", {len(source) - len(rows):,} left out" * (len(rows) < len(source))
    print(f"{config.output}: {len(rows):,} images with a caption{left_out}")
    return 0
