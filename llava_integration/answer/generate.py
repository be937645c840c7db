"""``python -m llava_integration.evaluate``: a LLaVA model answers a question file, on any device.

Takes the options of LLaVA's ``model_vqa_loader``, ``model_vqa_science`` and ``model_vqa_mmbench`` and writes their
answers file. Besides: batches, any device, resuming, ranks (``torchrun --nproc_per_node 8 -m
llava_integration.evaluate ...`` or ``srun``, one GPU each).
"""

from __future__ import annotations

import argparse
import os
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_integration.answer.answer_book import AnswerBook
from llava_integration.answer.questions import Question, read_questions
from llm2clip_plugin.contracts import sha256_file

if TYPE_CHECKING:
    import torch

# A question made ready: its place in the file, token ids (T,), and the image's pixels or None without image
Prepared = tuple[int, "torch.Tensor", "torch.Tensor | None", "tuple[int, int]"]


def parser() -> argparse.ArgumentParser:
    """LLaVA's options by their names there, and ours."""
    made = argparse.ArgumentParser(prog="python -m llava_integration.evaluate", description=__doc__)
    add = made.add_argument
    add("--model-path", required=True, help="LLaVA checkpoint: full, LoRA or projector")
    add("--model-base", default=None, help="base model of a LoRA or projector checkpoint")
    add("--question-file", required=True, type=Path, help=".jsonl, .json (ScienceQA) or .tsv (MMBench)")
    add("--answers-file", required=True, type=Path, help="JSONL; what was begun there is continued")
    add("--image-folder", default="", help="where the questions' images lie")
    add("--conv-mode", default="vicuna_v1", help="conversation template")
    add("--batch-size", type=int, default=1, help="questions answered at once")
    add("--num-chunks", type=int, default=1, help="cut the questions into chunks, as LLaVA's scripts do")
    add("--chunk-idx", type=int, default=0, help="the chunk to answer")
    add("--temperature", type=float, default=0.0, help="0: the most likely token each time")
    add("--top_p", "--top-p", type=float, default=None)
    add("--num_beams", "--num-beams", type=int, default=1)
    add("--max_new_tokens", "--max-new-tokens", type=int, default=128)
    add("--single-pred-prompt", action="store_true", help="ask for the option's letter alone (ScienceQA, MMBench)")
    add("--all-rounds", action="store_true", help="every rotation of the options (MMBench)")
    add("--lang", default="en", choices=("en", "cn"), help="language of MMBench")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"))
    add("--dtype", default="float16", choices=("float16", "bfloat16", "float32"), help="float16 as LLaVA; see the docs")
    add("--load-8bit", action="store_true")
    add("--load-4bit", action="store_true")
    add("--workers", type=int, default=4, help="processes that prepare images")
    add("--overwrite", action="store_true", help="drop what is in the answers file")
    return made


def main(argv: list[str]) -> int:
    """Answer what is not answered yet; 0 also when other ranks are still at work."""
    options = parser().parse_args(argv)
    if options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size} must be at least 1")
    rank, world = choose_device(options.device)
    questions = chunk(
        read_questions(
            options.question_file,
            directly=options.single_pred_prompt,
            all_rounds=options.all_rounds,
            lang=options.lang,
        ),
        options.num_chunks,
        options.chunk_idx,
    )
    book = AnswerBook(options.answers_file, settings_of(options), len(questions), overwrite=options.overwrite)
    if book.complete:
        print(f"{book.path} is complete: {len(questions)} answers")
        return 0
    done = book.done()
    mine = [index for index in range(len(questions)) if index % world == rank and index not in done]
    if mine:
        answer(options, questions, mine, book)
    missing = book.finish()
    print(
        f"{book.path}: {len(questions) - missing} of {len(questions)} answers" + (", other ranks go on" * (missing > 0))
    )
    return 0


def choose_device(device: str) -> tuple[int, int]:
    """Decide what torch will see, before it is imported; returns (rank, ranks), by torchrun or Slurm.

    LLaVA spreads a model over all GPUs that it sees, so each of several ranks sees its own alone.
    """
    environment = os.environ
    slurm = "RANK" not in environment and "SLURM_PROCID" in environment
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID") if slurm else ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, world, local = (int(environment.get(name, default)) for name, default in zip(names, "010", strict=True))
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif world > 1:
        visible = environment.get("CUDA_VISIBLE_DEVICES", "")
        seen = visible.split(",") if visible else []
        if len(seen) != 1:  # Slurm may have given each task its own already
            environment["CUDA_VISIBLE_DEVICES"] = seen[local] if seen else str(local)
    return rank, world


def chunk(questions: list[Question], chunks: int, index: int) -> list[Question]:
    """The ``index``-th of ``chunks`` pieces, cut as LLaVA's ``get_chunk`` does; may be empty at the end."""
    if not 0 <= index < chunks:
        raise ValueError(f"--chunk-idx {index} is not one of --num-chunks {chunks} (0 to {chunks - 1})")
    size = -(-len(questions) // chunks)
    return questions[index * size : (index + 1) * size]


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """All that decides the answers."""
    decides = """model_path model_base conv_mode num_chunks chunk_idx temperature top_p num_beams max_new_tokens
        single_pred_prompt all_rounds lang dtype load_8bit load_4bit""".split()
    settings = {name: getattr(options, name) for name in decides}
    config = Path(options.model_path) / "config.json"
    settings["model_config_sha256"] = sha256_file(config) if config.is_file() else ""
    settings["question_file_sha256"] = sha256_file(options.question_file)
    return settings


def answer(options: argparse.Namespace, questions: list[Question], mine: list[int], book: AnswerBook) -> None:
    """Answer the questions ``mine``, batch by batch."""
    from tqdm import tqdm

    answerer = Answerer(options)
    with tqdm(total=len(mine), unit="question", mininterval=0.5 if sys.stderr.isatty() else 10.0) as bar:
        for batch in answerer.batches(questions, mine):
            texts = answerer.generate(batch)
            named = {
                index: answerer.record(questions[index], text) for (index, *_), text in zip(batch, texts, strict=True)
            }
            book.write(named)
            bar.update(len(batch))


class Answerer:
    """A LLaVA model with its tokenizer and image processor."""

    def __init__(self, options: argparse.Namespace):
        """Load the model as LLaVA's own evaluation does."""
        import torch
        from llava.mm_utils import get_model_name_from_path
        from llava.model.builder import load_pretrained_model

        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU here; pass --device cpu")
        path = os.path.expanduser(options.model_path)
        self.options, self.name = options, get_model_name_from_path(path)
        self.tokenizer, self.model, self.image_processor, _ = load_pretrained_model(
            path, options.model_base, self.name, options.load_8bit, options.load_4bit
        )
        if not (options.load_8bit or options.load_4bit) and options.dtype != "float16":
            self.model.to(getattr(torch, options.dtype))
        # Answers are written behind the prompt, so prompts of a batch are filled up on the left.
        self.model.config.tokenizer_padding_side = "left"

    def batches(self, questions: list[Question], mine: list[int]) -> Iterator[list[Prepared]]:
        """Batches of prepared questions; those without image in batches of their own."""
        from torch.utils.data import DataLoader

        conversation = conversation_of(self.name, self.options.conv_mode)
        pictured = [index for index in mine if questions[index].image]
        plain = [index for index in mine if not questions[index].image]
        for indices in (pictured, plain):
            prepare = Prepare(
                questions=[(index, questions[index]) for index in indices],
                folder=self.options.image_folder,
                conversation=conversation,
                tokenizer=self.tokenizer,
                image_processor=self.image_processor,
                model_config=self.model.config,
            )
            yield from DataLoader(
                prepare,  # pyright: ignore[reportArgumentType] - a map-style data set needs no base class
                batch_size=self.options.batch_size,
                num_workers=min(self.options.workers, len(indices)),
                collate_fn=list,
            )

    def generate(self, batch: list[Prepared]) -> list[str]:
        """The answers to a batch."""
        import torch

        device = self.model.device
        ids, mask = padded([tokens for _, tokens, _, _ in batch])
        arguments: dict[str, Any] = {"attention_mask": mask.to(device)}
        if batch[0][2] is not None:
            images = [p.to(device=device, dtype=self.model.dtype) for _, _, p, _ in batch if p is not None]
            alike = all(image.shape == images[0].shape for image in images)
            arguments["images"] = torch.stack(images) if alike else images
            arguments["image_sizes"] = [size for *_, size in batch]
        options = self.options
        arguments["do_sample"] = options.temperature > 0
        if options.temperature > 0:
            arguments |= {"temperature": options.temperature, "top_p": options.top_p}
        with torch.inference_mode():
            output = self.model.generate(
                ids.to(device),
                num_beams=options.num_beams,
                max_new_tokens=options.max_new_tokens,
                use_cache=True,
                pad_token_id=self.pad_token_id,
                **arguments,
            )
        return [text.strip() for text in self.tokenizer.batch_decode(output, skip_special_tokens=True)]

    @property
    def pad_token_id(self) -> int:
        """What stands behind an answer that is shorter than others of its batch; dropped when decoding."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def record(self, question: Question, text: str) -> dict[str, Any]:
        """A line of LLaVA's answers file."""
        return {
            "question_id": question.id,
            "prompt": question.shown,
            "text": text,
            **question.extra,
            "answer_id": uuid.uuid4().hex[:22],
            "model_id": self.name,
            "metadata": {},
        }


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Questions as a data set for torch's DataLoader; holds no weights, so that workers stay small."""

    questions: list[tuple[int, Question]]  # place in the file, question
    folder: str  # of the images
    conversation: Any  # LLaVA's template
    tokenizer: Any
    image_processor: Any
    model_config: Any

    def __len__(self) -> int:
        """Questions."""
        return len(self.questions)

    def __getitem__(self, item: int) -> Prepared:
        """One question, ready for the model; pixels are (3, S, S), or (tiles, 3, S, S) for anyres."""
        from llava.constants import IMAGE_TOKEN_INDEX
        from llava.mm_utils import process_images, tokenizer_image_token

        index, question = self.questions[item]
        pixels, size = None, (0, 0)
        if question.image:
            image = question.open_image(self.folder)
            pixels, size = process_images([image], self.image_processor, self.model_config)[0], image.size
        tokens = tokenizer_image_token(self.prompt(question), self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        return index, tokens, pixels, size

    def prompt(self, question: Question) -> str:
        """The whole text that the model gets."""
        from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN

        text = question.text
        if question.image:
            token = DEFAULT_IMAGE_TOKEN
            if getattr(self.model_config, "mm_use_im_start_end", False):
                token = DEFAULT_IM_START_TOKEN + token + DEFAULT_IM_END_TOKEN
            text = f"{token}\n{text}"
        conversation = self.conversation.copy()
        conversation.append_message(conversation.roles[0], text)
        conversation.append_message(conversation.roles[1], None)
        return conversation.get_prompt()


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token rows -> (B, T) filled up on the left, and a mask of what is no filling."""
    import torch

    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :] = tokens
        mask[row, width - len(tokens) :] = 1
    return ids, mask


def conversation_of(model_name: str, mode: str) -> Any:
    """LLaVA's template of that name; models pretrained on plain captions take its ``_mmtag`` form, as in LLaVA.

    Raises ValueError with the known names.
    """
    from llava.conversation import conv_templates

    if "plain" in model_name and "finetune" not in model_name.lower() and "mmtag" not in mode:
        mode = f"{mode}_mmtag"
    if mode not in conv_templates:
        raise ValueError(f"unknown conversation {mode!r}; known: {', '.join(sorted(conv_templates))}")
    return conv_templates[mode]
