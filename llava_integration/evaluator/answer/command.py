"""``llm2clip llava evaluate``: a LLaVA model answers a question file, on any device.

Accepts the options of LLaVA's ``model_vqa_loader``, ``model_vqa_science`` and
``model_vqa_mmbench`` and writes the same answers file. Adds batches, a choice of device, resuming,
and several ranks with a GPU each (``torchrun --nproc_per_node 8 -m llm2clip_plugin.cli llava
evaluate ...`` or ``srun``).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from llava_integration.evaluator.answer.questions import (
    COMMAND,
    WEIGHTS,
    AnswerConfig,
    AnswersFile,
    Question,
    entry,
    picture_stamps,
    read_questions,
    settings_file,
)
from llava_integration.evaluator.answer.served import (
    Endpoint,
    ServedModel,
    answer_served,
)
from llava_integration.plug.checkpoints import (
    check_checkpoint,
    checkpoint_config,
    sample_sha256,
)
from llava_integration.plug.pickles import load_tensors_only
from llm2clip_plugin.hashes import sha256_file
from llm2clip_plugin.json_files import read_json_value
from llm2clip_plugin.options import unknown
from llm2clip_plugin.pretrained import run_no_code
from llm2clip_plugin.quiet import quiet_llava_loading

if TYPE_CHECKING:
    import torch


# LLaVA may be in an environment of its own, not where types are checked.
# pyright: reportMissingImports=false

# index in the question file, token ids (T,), pixels or None without image, (width, height) of the
# image
Prepared = tuple[int, "torch.Tensor", "torch.Tensor | None", "tuple[int, int]"]


class Answerer:
    """A LLaVA model with its tokenizer and image processor."""

    def __init__(self, options: AnswerConfig):
        """Load the model as LLaVA's own evaluation does."""
        import torch
        from llava.conversation import conv_templates
        from llava.mm_utils import get_model_name_from_path
        from llava.model.builder import load_pretrained_model

        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "--device cuda: no GPU is available to torch; pass --device cpu"
            )
        path = os.path.expanduser(options.model_path)
        self.options = options
        self.name = get_model_name_from_path(path)
        mode = options.conv_mode
        if (
            "plain" in self.name
            and "finetune" not in self.name.lower()
            and "mmtag" not in mode
        ):
            # of models pretrained on plain captions, as in LLaVA
            mode = f"{mode}_mmtag"
        if mode not in conv_templates:
            raise ValueError(unknown("--conv-mode", mode, sorted(conv_templates)))
        self.conversation = conv_templates[mode]
        quiet_llava_loading()
        run_no_code()
        load_tensors_only()
        self.tokenizer, self.model, self.image_processor, _ = load_pretrained_model(
            path, options.model_base, self.name, options.load_8bit, options.load_4bit
        )
        if not (options.load_8bit or options.load_4bit) and options.dtype != "float16":
            self.model.to(getattr(torch, options.dtype))
        # Generation appends to the prompt: a batch is padded on the left.
        self.model.config.tokenizer_padding_side = "left"

    def batches(
        self, questions: list[Question], indices: list[int]
    ) -> Iterator[list[Prepared]]:
        """Batches of prepared questions, with images first; a batch never mixes questions with and
        without an image."""
        from torch.utils.data import DataLoader

        collate = partial(  # no weights, so that worker processes stay small
            prepare,
            self.options.image_folder,
            self.options.blind,
            self.conversation,
            self.tokenizer,
            self.image_processor,
            self.model.config,
        )
        numbered = [(index, questions[index]) for index in indices]
        with_image: Any = [
            (index, question) for index, question in numbered if question.image
        ]
        without: Any = [
            (index, question) for index, question in numbered if not question.image
        ]
        for group in (with_image, without):
            workers = min(self.options.workers, len(group))
            if group:
                yield from DataLoader(
                    group,
                    self.options.batch_size,
                    num_workers=workers,
                    collate_fn=collate,
                )

    def generate(self, batch: list[Prepared]) -> list[str]:
        """The answers to a batch, without special tokens."""
        import torch

        device = self.model.device
        ids, mask = padded([tokens for _, tokens, _, _ in batch])
        arguments: dict[str, Any] = {"attention_mask": mask.to(device)}
        if batch[0][2] is not None:
            images = [
                pixels.to(device=device, dtype=self.model.dtype)
                for _, _, pixels, _ in batch
                if pixels is not None
            ]
            same_shape = all(image.shape == images[0].shape for image in images)
            arguments["images"] = torch.stack(images) if same_shape else images
            arguments["image_sizes"] = [size for *_, size in batch]
        options = self.options
        pad = self.tokenizer.pad_token_id
        eos = self.tokenizer.eos_token_id
        arguments.update(
            do_sample=options.temperature > 0,
            num_beams=options.num_beams,
            use_cache=True,
            max_new_tokens=options.max_new_tokens,
            pad_token_id=eos if pad is None else pad,
        )
        if options.temperature > 0:
            arguments.update(temperature=options.temperature, top_p=options.top_p)
        with torch.inference_mode():
            output = self.model.generate(ids.to(device), **arguments)
        texts = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        return [text.strip() for text in texts]


def prepare(
    folder: str,
    blind: bool,
    conversation: Any,
    tokenizer: Any,
    processor: Any,
    config: Any,
    questions: list[tuple[int, Question]],
) -> list[Prepared]:
    """Questions, each with its index, as the model reads them: the template ``conversation``, image
    token, question. ``folder``: of the images, whose pixels are (3, S, S), or (tiles, 3, S, S) for
    anyres; gray ones if ``blind``."""
    from llava.constants import (
        DEFAULT_IM_END_TOKEN,
        DEFAULT_IM_START_TOKEN,
        DEFAULT_IMAGE_TOKEN,
        IMAGE_TOKEN_INDEX,
    )
    from llava.mm_utils import process_images, tokenizer_image_token

    prepared = []
    for index, question in questions:
        text = question.text
        pixels = None
        size = (0, 0)
        if question.image:
            image = question.open_image(folder, blind=blind)
            pixels = process_images([image], processor, config)[0]
            size = image.size
            token = DEFAULT_IMAGE_TOKEN
            if getattr(config, "mm_use_im_start_end", False):
                token = DEFAULT_IM_START_TOKEN + token + DEFAULT_IM_END_TOKEN
            text = f"{token}\n{text}"
        turns = conversation.copy()
        turns.append_message(turns.roles[0], text)
        turns.append_message(turns.roles[1], None)
        tokens: Any = tokenizer_image_token(
            turns.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt"
        )
        prepared.append((index, tokens, pixels, size))
    return prepared


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token rows -> ids and attention mask, both (B, T), padded on the left with 0."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([row.flip(0) for row in rows], batch_first=True).flip(1)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).flip(
        1
    )
    return ids, mask


def main(argv: list[str]) -> int:
    """Answer the questions that have no answer yet; returns 0, or 1 if a server refused some of the
    questions."""
    options = COMMAND.parse(argv)
    if options.model_path:
        check_checkpoint(options.model_path, options.model_base)
    rank, world = choose_device(options.device)
    questions = read_questions(
        options.question_file,
        directly=options.single_pred_prompt,
        all_rounds=options.all_rounds,
        lang=options.lang,
    )
    questions = chunk(questions, options.num_chunks, options.chunk_idx)
    check_image_folder(options.image_folder, questions)
    if options.model_path:
        check_sees_images(options.model_path, questions)
    endpoint = None
    served = None
    if options.endpoint:
        endpoint = Endpoint(
            options.endpoint, timeout=options.timeout, retries=options.retries
        )
        served = endpoint.choose(options.served_model_name)
    if options.model_path:
        options = replace(options, dtype=choose_dtype(options))
    settings = answer_settings(options, served)
    answers = AnswersFile(
        options.answers_file,
        settings,
        picture_stamps(questions, options.image_folder),
        overwrite=options.overwrite,
    )
    if answers.path.is_file():
        print(f"{answers.path} is complete: {len(questions)} answers")
        return 0
    done = answers.done()
    indices = [
        index
        for index in range(len(questions))
        if index % world == rank and index not in done
    ]
    refused: list[str] = []
    if indices and endpoint and served:
        refused = answer_served(
            endpoint, served.id, options, questions, indices, answers
        )
    elif indices:
        answer_here(Answerer(options), questions, indices, answers)
    missing = answers.finish()
    pending = ", other ranks are still running" if missing > len(refused) else ""
    print(
        f"{answers.path}: {len(questions) - missing} of {len(questions)} answers{pending}"
    )
    if not refused:
        return 0
    print(
        f"error: {len(refused)} questions without an answer; rerun to ask them again",
        file=sys.stderr,
    )
    print("\n".join(f"  {line}" for line in refused[:10]), file=sys.stderr)
    return 1


def check_image_folder(folder: str, questions: list[Question]) -> None:
    """FileNotFoundError if the folder of images that questions name does not exist."""
    named = any(question.image and not question.embedded for question in questions)
    if folder and named and not Path(folder).is_dir():
        raise FileNotFoundError(
            f"--image-folder {folder} is not a folder; expected that of the questions' images"
        )


def check_sees_images(path: str, questions: list[Question]) -> None:
    """ValueError for a folder that LLaVA's code would load without a vision tower, if a question
    has an image; Hub ids are left to LLaVA."""
    folder = Path(path).expanduser()
    if not folder.is_dir() or not any(question.image for question in questions):
        return
    if "mm_vision_tower" not in checkpoint_config(folder):
        raise ValueError(
            f"--model-path {path} has no mm_vision_tower in its config.json, so it sees no images; "
            "expected a checkpoint of LLaVA's code (not a language model, nor one of llava-hf)"
        )


def answer_here(
    answerer: Answerer,
    questions: list[Question],
    indices: list[int],
    answers: AnswersFile,
) -> None:
    """Answer the questions of these indices with a model in this process, and write each batch."""
    interval = 0.5 if sys.stderr.isatty() else 10.0
    with tqdm(total=len(indices), unit="question", mininterval=interval) as bar:
        for batch in answerer.batches(questions, indices):
            entries = {}
            for (index, *_), text in zip(batch, answerer.generate(batch), strict=True):
                entries[index] = entry(questions[index], text, answerer.name)
            answers.write(entries)
            bar.update(len(batch))


def choose_device(device: str) -> tuple[int, int]:
    """Set CUDA_VISIBLE_DEVICES before torch is imported; returns (rank, world size) of torchrun or
    Slurm. LLaVA spreads a model over all visible GPUs, so each of several ranks is given one GPU.
    """
    environment = os.environ
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in environment and "SLURM_PROCID" in environment:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    rank = int(environment.get(names[0], 0))
    world = int(environment.get(names[1], 1))
    local = int(environment.get(names[2], 0))
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif world > 1:
        visible = environment.get("CUDA_VISIBLE_DEVICES", "")
        visible_gpus = visible.split(",") if visible else []
        if len(visible_gpus) != 1:  # Slurm may have assigned one to each task already
            environment["CUDA_VISIBLE_DEVICES"] = (
                visible_gpus[local] if visible_gpus else str(local)
            )
    return rank, world


def choose_dtype(options: AnswerConfig) -> Any:
    """``--dtype``; for auto that of the answers that this run resumes, else what is fast here. A
    dtype that is slow on this CPU gets a warning."""
    import torch

    from llm2clip_plugin.precision import fastest_dtype, warn_if_slow

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.dtype != "auto":
        warn_if_slow(getattr(torch, options.dtype), device, "--dtype", "an answer")
        return options.dtype
    settings = settings_file(options.answers_file)
    if settings.is_file() and not options.overwrite:
        return read_json_value(settings).get("dtype", "float16")
    if device.type == "cuda":
        return "float16"
    return str(fastest_dtype(device)).removeprefix("torch.")


def chunk(questions: list[Question], chunks: int, index: int) -> list[Question]:
    """The ``index``-th of ``chunks`` pieces, as LLaVA's ``get_chunk``: the last may be empty.
    ValueError for none."""
    if not 0 <= index < chunks:
        raise ValueError(
            f"--chunk-idx {index} is out of range for --num-chunks {chunks}: 0 to {chunks - 1}"
        )
    size = -(-len(questions) // chunks)
    return questions[index * size : (index + 1) * size]


def answer_settings(
    options: AnswerConfig, served: ServedModel | None
) -> dict[str, Any]:
    """Every setting that an answer depends on, with hashes of the model and the question file.
    ``served``: the model behind ``--endpoint``, whose configuration the server knows."""
    names = ["num_chunks", "chunk_idx", "temperature", "top_p", "max_new_tokens"]
    names += ["single_pred_prompt", "all_rounds", "lang", "blind"]
    if served:
        model = {
            "endpoint": options.endpoint,
            "served_model": served.id,
            "served_root": served.root,
        }
        # a server's folder is at hand where it runs on this machine
        if served.root and Path(served.root).is_dir():
            model[WEIGHTS] = sample_sha256(served.root)
    else:
        names += ["model_path", "model_base", "conv_mode", "num_beams", "dtype"]
        names += ["load_8bit", "load_4bit"]
        config = Path(options.model_path) / "config.json"
        model = {"model_config_sha256": sha256_file(config) if config.is_file() else ""}
        model[WEIGHTS] = sample_sha256(options.model_path)
        if options.model_base:
            model["model_base_sample_sha256"] = sample_sha256(options.model_base)
    settings = {name: getattr(options, name) for name in names}
    return {
        **settings,
        **model,
        "question_file_sha256": sha256_file(options.question_file),
    }
