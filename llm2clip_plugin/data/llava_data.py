"""``llm2clip llava data DATA``: a data set as LLaVA's pretraining reads it, captions.json next to
the images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from llm2clip_plugin.data.samples import BrokenSample, select_captions
from llm2clip_plugin.data.sources import SourceConfig, check_fields, open_source
from llm2clip_plugin.folders import LLAVA_FOLDER, output_folder
from llm2clip_plugin.options import Command, setting
from llm2clip_plugin.pictures import BrokenImage, load, open_header
from llm2clip_plugin.progress import track

# LLaVA's place of the image; for a caption that has it LLaVA would look for another one
IMAGE = "<image>"


@dataclass(frozen=True, kw_only=True)
class LlavaDataConfig(SourceConfig):
    """Captions for LLaVA's first stage, one an image."""

    output: str = setting(
        help="folder to write: captions.json and images; it appears when it is complete",
    )
    overwrite: bool = setting(False, help="replace what this command wrote there")


LLAVA_DATA = Command(
    name="llava data",
    example="llm2clip llava data photos-tars --output photos-llava",
    about="Write captions.json and images for scripts/llava/pretrain.sh: each image with its first "
    "caption. Samples that can't be read are left out.",
    settings=LlavaDataConfig,
    arguments="path",
    everyday="output image-folder fields kinds languages overwrite",
    hidden="weight shuffle_window",
)


def main_llava_data(argv: list[str]) -> int:
    """Write the folder. Raises FileExistsError if it exists, ValueError if no sample is usable."""
    config = LLAVA_DATA.parse(argv)
    source = open_source(config)
    rows = []
    output = Path(config.output)
    check_fields(source, needed=True)
    with output_folder(output, LLAVA_FOLDER, replace=config.overwrite) as folder:
        (folder / "images").mkdir()
        numbers = range(len(source))
        for number in track(
            numbers, total=len(source), label="llava data", unit="samples"
        ):
            try:
                sample = source[number]
                selected = select_captions(
                    sample.captions, config.kinds, config.languages
                )
                captions = [item for item in selected if IMAGE not in item.text]
                data = sample.read_image()
                image = open_header(data)
                load(image)  # a picture that is cut has a good header
                name = f"{number:08d}.{(image.format or '').lower()}"
            except (BrokenSample, BrokenImage):
                continue
            if captions:
                (folder / "images" / name).write_bytes(data)
                turns = [
                    {"from": "human", "value": IMAGE},
                    {"from": "gpt", "value": captions[0].text},
                ]
                rows.append({"id": sample.key, "image": name, "conversations": turns})
        if not rows:
            raise ValueError(
                f"no sample of {config.path} can be used; "
                f"llm2clip data check {config.path} shows why"
            )
        text = json.dumps(rows, ensure_ascii=False, indent=1)
        (folder / "captions.json").write_text(text, encoding="utf-8")
    summary = f"{config.output}: {len(rows):,} images with a caption"
    if len(rows) < len(source):
        summary += f", {len(source) - len(rows):,} left out"
    print(summary)
    return 0
