"""``--format sentence-transformers`` of ``export`` and ``export-llm``: a folder that
``SentenceTransformer(DIR)`` opens, verified by opening it.

| file                                  | contents                                               |
|---------------------------------------|--------------------------------------------------------|
| modules.json, router_config.json      | the modules, in sentence-transformers' form            |
| image_0_Transformer/                  | the tower, a plain Hugging Face vision model           |
| text_0_Transformer/, text_0_Captions/ | the LLM with its adapter merged, or where the LLM is   |
| image_1_.../, text_1_.../             | pooling, projection, text adapter, normalization       |
| llm2clip_modules.py, ...              | the modules that sentence-transformers does not have   |
| README.md                             | model card                                             |

Of the fine-tuned LLM alone, the first module lies in the folder itself.
"""

from __future__ import annotations

import importlib
import inspect
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llm2clip_plugin.contracts import TowerCard
from llm2clip_plugin.data.images import (
    ImageConfig,
    Normalize,
    as_square,
    evaluation_pixels,
)
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.folders import CONVERTED_FOLDER, output_folder
from llm2clip_plugin.quiet import quiet_transformers
from llm2clip_plugin.stages.embedder_card import dual_card, llm_card
from llm2clip_plugin.stages.embedder_parts import (
    CODE,
    Parts,
    runs_code,
    write_image_parts,
    write_text_parts,
)
from llm2clip_plugin.text import frames
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.teacher import TeacherLLM
from llm2clip_plugin.vision.directory import fetch_directory, write_json
from llm2clip_plugin.vision.dual import DualEncoder, load_dual
from llm2clip_plugin.vision.families import TowerCode, family_of
from llm2clip_plugin.vision.towers import preprocessor_config

# of one model, computed by two libraries; of an embedding's norm
TOLERANCE = 1e-4
# width and height of the pictures that verify an export
PICTURES = (
    (40, 30),
    (17, 64),
)
CAPTIONS = ["a red bicycle leans against a wall", "two dogs", "猫が眠っている", "x"]
IMPORT_TOWER = """
# AutoModel then opens its towers
from .{file} import {tower}  # noqa: E402, F401
"""


def export_dual(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    llm: str = "",
    adapter: str = "",
    trust_remote_code: bool = False,
    merge: bool = False,
    replace: bool = False,
) -> Path:
    """Write a dual encoder for sentence-transformers; returns the folder.

    ``llm``, ``adapter``: where the teacher is, if not where the tower's card says.
    ``trust_remote_code``: run the LLM's own code, here and where the folder is opened.
    ``merge``: the LLM's weights, with the adapter merged, are written, too. Raises ValueError
    without a projection, a text adapter or the teacher, ContractError if the folder
    embeds otherwise than the tower.
    """
    needs_library()
    directory = fetch_directory(source)
    dual, card = load_dual(directory)
    config = EncoderConfig(
        llm=llm,
        adapter=adapter,
        compute_dtype="float32",
        trust_remote_code=trust_remote_code,
    )
    encoder = teacher_llm(dual, card, config)
    with output_folder(output, CONVERTED_FOLDER, replace=replace) as temporary:
        from llm2clip_plugin.text.embedder_modules import PictureTextRouter

        image = Parts(temporary, "image_")
        write_image_parts(dual, image)
        text = Parts(temporary, "text_")
        write_text_parts(
            encoder, dual.text_adapter, text, merge=merge, output=Path(output)
        )
        router = f"{CODE}.{PictureTextRouter.__name__}"
        routes = {"text": list(text.types), "image": list(image.types)}
        mappings = {"(None, 'text')": "text", "(None, 'image')": "image"}
        parameters = {
            "default_route": "text",
            "allow_empty_key": True,
            "route_mappings": mappings,
        }
        body = {
            "types": text.types | image.types,
            "structure": routes,
            "parameters": parameters,
        }
        write_json(temporary / PictureTextRouter.config_file_name, body)
        write_model(temporary, {"": router})
        write_code(temporary, family_of(dual.tower).code)
        readme = dual_card(card, encoder, merge=merge, runs_code=runs_code(encoder))
        (temporary / "README.md").write_text(readme, encoding="utf-8")
        verify_dual(dual, encoder, temporary, str(output))
    return Path(output)


def export_text(
    encoder: CaptionEncoder, output: str | os.PathLike[str], *, replace: bool = False
) -> Path:
    """Write a fine-tuned LLM alone, merged, for sentence-transformers; returns the folder. Raises
    as ``export_dual``."""
    needs_library()
    with output_folder(output, CONVERTED_FOLDER, replace=replace) as temporary:
        parts = Parts(temporary, first_in_root=True)
        write_text_parts(encoder, None, parts, merge=True, output=Path(output))
        prompts: dict[str, str] = {}
        if encoder.config.query_prompt:
            prompts["query"] = encoder.config.query_prompt
        write_model(temporary, parts.types, prompts)
        if parts.has_code:
            write_code(temporary)
        readme = llm_card(
            encoder, has_code=parts.has_code, runs_code=runs_code(encoder)
        )
        (temporary / "README.md").write_text(readme, encoding="utf-8")
        model = open_folder(temporary, has_code=parts.has_code)
        expected_NW = encoder.encode(CAPTIONS)
        actual_NW = model.encode(CAPTIONS, convert_to_tensor=True)
        compare(expected_NW, actual_NW, f"{output}: embeddings of captions")
        if prompts:
            expected_NW = encoder.encode(CAPTIONS, query=True)
            actual_NW = model.encode_query(CAPTIONS, convert_to_tensor=True)
            compare(expected_NW, actual_NW, f"{output}: embeddings of queries")
    return Path(output)


def needs_library() -> None:
    """Raise ValueError without sentence-transformers 6."""
    try:
        import sentence_transformers
    except ImportError as error:
        raise ValueError(
            "--format sentence-transformers writes its modules; "
            "pip install 'sentence-transformers>=6'"
        ) from error
    if int(sentence_transformers.__version__.partition(".")[0]) < 6:
        raise ValueError(
            "--format sentence-transformers needs sentence-transformers 6 or newer, but "
            f"{sentence_transformers.__version__} is installed"
        )


def teacher_llm(
    dual: DualEncoder, card: TowerCard, config: EncoderConfig
) -> CaptionEncoder:
    """The LLM that embeds texts for the tower, in float32 on the CPU; raises ValueError if it has
    none, or a CLIP's text tower."""
    if dual.text_adapter is None or not card.teacher:
        raise ValueError(
            "--format sentence-transformers: the tower has no text adapter or no teacher, so "
            "it embeds no texts; train one with train-tower"
        )
    encoder = TeacherLLM(card, config, torch.device("cpu")).encoder
    if not isinstance(encoder, CaptionEncoder):
        raise ValueError(
            f"--format sentence-transformers: the teacher {encoder.config.llm} is a CLIP's text "
            "tower; only LLMs are exported"
        )
    return encoder


def write_model(
    folder: Path, types: dict[str, str], prompts: dict[str, str] | None = None
) -> None:
    """modules.json of modules (folder -> class), and the model's settings."""
    import sentence_transformers
    import transformers

    modules = []
    for index, (path, kind) in enumerate(types.items()):
        modules.append({"idx": index, "name": str(index), "path": path, "type": kind})
    (folder / "modules.json").write_text(
        json.dumps(modules, indent=2) + "\n", encoding="utf-8"
    )
    libraries = (sentence_transformers, transformers, torch)
    settings = {
        "__version__": {library.__name__: library.__version__ for library in libraries},
        "model_type": "SentenceTransformer",
        "prompts": prompts or {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    write_json(folder / "config_sentence_transformers.json", settings)


def write_code(folder: Path, tower: TowerCode | None = None) -> None:
    """Our modules, which import nothing of this package, and those of the tower's family."""
    from llm2clip_plugin.text import embedder_modules

    modules = inspect.getsource(embedder_modules)
    modules = modules.replace(
        "from llm2clip_plugin.text.frames import", "from .frames import"
    )
    files = {CODE: modules, "frames": inspect.getsource(frames)}
    if tower is not None and not tower.is_in_transformers:
        module = importlib.import_module(f"llm2clip_plugin.vision.{tower.file}")
        files[tower.file] = inspect.getsource(module)
        files[CODE] += IMPORT_TOWER.format(file=tower.file, tower=tower.model)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")


def open_folder(folder: Path, *, has_code: bool) -> Any:
    """The model in a folder, in float32 on the CPU."""
    from sentence_transformers import SentenceTransformer

    options = {"dtype": torch.float32}
    with quiet_transformers():
        return SentenceTransformer(
            str(folder), trust_remote_code=has_code, device="cpu", model_kwargs=options
        )


def verify_dual(
    dual: DualEncoder, encoder: CaptionEncoder, folder: Path, output: str
) -> None:
    """Open a folder, and embed pictures and captions in one batch, as the dual encoder does; raises
    ContractError."""
    model = open_folder(folder, has_code=True)
    pictures = probe_pictures()
    files = [png(picture) for picture in pictures]
    with torch.no_grad():
        image_BD = dual.encode_image(*prepared(files, dual))
        text_ND = dual.encode_text(encoder.encode(CAPTIONS))
    actual = model.encode([*pictures, *CAPTIONS], convert_to_tensor=True)
    compare(image_BD, actual[: len(pictures)], f"{output}: embeddings of pictures")
    compare(text_ND, actual[len(pictures) :], f"{output}: embeddings of captions")


def compare(expected: Tensor, actual: Tensor, what: str) -> None:
    """Raise ContractError for embeddings that differ."""
    difference = (expected - actual).norm(dim=1) / expected.norm(dim=1)
    if not difference.max() < TOLERANCE:
        raise ContractError(
            f"{what} differ by {float(difference.max()):.2g} of their norm"
        )


def probe_pictures() -> list[Image.Image]:
    """Random pictures from a fixed seed, of other sides than a tower's."""
    rng = np.random.default_rng(0)
    pictures = []
    for width, height in PICTURES:
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        pictures.append(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return pictures


def png(picture: Image.Image) -> bytes:
    """The picture as a file."""
    data = io.BytesIO()
    picture.save(data, "png")
    return data.getvalue()


def prepared(files: list[bytes], dual: DualEncoder) -> tuple[Tensor, Tensor | None]:
    """(B, 3, S, S) pixels of pictures as in evaluation, and their spatial shapes if they keep their
    aspect."""
    config = ImageConfig.from_preprocessor(preprocessor_config(dual.tower))
    squares = []
    shapes = []
    for data in files:
        square_SS3, shape = as_square(evaluation_pixels(data, config), config)
        squares.append(torch.from_numpy(square_SS3))
        shapes.append(shape)
    pixels = Normalize(config)(torch.stack(squares))
    return pixels, None if shapes[0] is None else torch.tensor(shapes)
