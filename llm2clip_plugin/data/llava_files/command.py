"""``llm2clip llava data DATA --output DIR``: a data set as LLaVA's pretraining reads it, a JSON and picture files."""

from __future__ import annotations

import json
from pathlib import Path

from llm2clip_plugin.contracts import atomic_directory
from llm2clip_plugin.data.decode import BrokenImage, open_header
from llm2clip_plugin.data.llava_files.options import COMMAND
from llm2clip_plugin.data.sources.open import check_fields, open_source
from llm2clip_plugin.data.sources.records import BrokenSample, select_captions
from llm2clip_plugin.progress import track

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
