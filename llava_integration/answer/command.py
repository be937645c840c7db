"""``python -m llava_integration.evaluate``: a LLaVA model answers a question file, on any device.

Accepts the options of LLaVA's ``model_vqa_loader``, ``model_vqa_science`` and ``model_vqa_mmbench`` and writes the same
answers file. Adds batches, a choice of device, resuming, and several ranks with a GPU each (``torchrun
--nproc_per_node 8 -m llava_integration.evaluate ...`` or ``srun``). With ``--endpoint``, a served model answers it.
"""

import os
import sys
from pathlib import Path
from typing import Any

from llava_integration.answer.model import Answerer
from llava_integration.answer.options import COMMAND, AnswerConfig
from llava_integration.answer.questions import AnswersFile, Question, entry, read_questions
from llava_integration.answer.served import Endpoint, ServedModel, answer_served
from llava_integration.checkpoints import check_checkpoint
from llm2clip_plugin.contracts import sha256_file


def main(argv: list[str]) -> int:
    """Answer the questions that have no answer yet; returns 0, also when other ranks are not done.

    1 if a server refused some of the questions.
    """
    options = COMMAND.parse(argv)
    if options.model_path:
        check_checkpoint(options.model_path, options.model_base)
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
    folder = options.image_folder
    if folder and not Path(folder).is_dir() and any(item.image and not item.embedded for item in questions):
        raise FileNotFoundError(f"--image-folder {folder} is not a folder; expected that of the questions' images")
    endpoint = Endpoint(options.endpoint, timeout=options.timeout) if options.endpoint else None
    served = endpoint.choose(options.served_model_name) if endpoint else None
    settings = answer_settings(options, served)
    answers = AnswersFile(options.answers_file, settings, len(questions), overwrite=options.overwrite)
    if answers.complete:
        print(f"{answers.path} is complete: {len(questions)} answers")
        return 0
    done = answers.done()
    indices = [index for index in range(len(questions)) if index % world == rank and index not in done]
    refused: list[str] = []
    if indices and endpoint and served:
        refused = answer_served(endpoint, served.id, options, questions, indices, answers)
    elif indices:
        answer_questions(options, questions, indices, answers)
    missing = answers.finish()
    pending = ", other ranks are still running" if missing > len(refused) else ""
    print(f"{answers.path}: {len(questions) - missing} of {len(questions)} answers{pending}")
    if refused:
        print(f"error: {len(refused)} questions without an answer; rerun to ask them again", file=sys.stderr)
        print("\n".join(f"  {line}" for line in refused[:10]), file=sys.stderr)
    return int(bool(refused))


def choose_device(device: str) -> tuple[int, int]:
    """Set CUDA_VISIBLE_DEVICES before torch is imported; returns (rank, world size) of torchrun or Slurm.

    LLaVA spreads a model over all visible GPUs, so each of several ranks is given one GPU.
    """
    environment = os.environ
    slurm = "RANK" not in environment and "SLURM_PROCID" in environment
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID") if slurm else ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, world, local = (int(environment.get(name, default)) for name, default in zip(names, "010", strict=True))
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif world > 1:
        visible = environment.get("CUDA_VISIBLE_DEVICES", "")
        visible_gpus = visible.split(",") if visible else []
        if len(visible_gpus) != 1:  # Slurm may have assigned one to each task already
            environment["CUDA_VISIBLE_DEVICES"] = visible_gpus[local] if visible_gpus else str(local)
    return rank, world


def chunk(questions: list[Question], chunks: int, index: int) -> list[Question]:
    """The ``index``-th of ``chunks`` pieces, as LLaVA's ``get_chunk`` splits them; the last ones may be empty.

    Raises ValueError if there is no such chunk.
    """
    if not 0 <= index < chunks:
        raise ValueError(f"--chunk-idx {index} is out of range for --num-chunks {chunks}: 0 to {chunks - 1}")
    size = -(-len(questions) // chunks)
    return questions[index * size : (index + 1) * size]


def answer_settings(options: AnswerConfig, served: ServedModel | None) -> dict[str, Any]:
    """Every setting that an answer depends on, with the hashes of the model's configuration and the question file.

    ``served``: the model behind ``--endpoint``, whose configuration the server knows.
    """
    names = "num_chunks chunk_idx temperature top_p max_new_tokens single_pred_prompt all_rounds lang".split()
    if served is None:
        names += "model_path model_base conv_mode num_beams dtype load_8bit load_4bit".split()
    settings = {name: getattr(options, name) for name in names}
    if served is None:
        config = Path(options.model_path) / "config.json"
        settings["model_config_sha256"] = sha256_file(config) if config.is_file() else ""
    else:
        settings |= {"endpoint": options.endpoint, "served_model": served.id, "served_root": served.root}
    settings["question_file_sha256"] = sha256_file(options.question_file)
    return settings


def answer_questions(
    options: AnswerConfig, questions: list[Question], indices: list[int], answers: AnswersFile
) -> None:
    """Load the model and answer the questions of these indices, batch by batch."""
    from tqdm import tqdm

    answerer = Answerer(options)
    with tqdm(total=len(indices), unit="question", mininterval=0.5 if sys.stderr.isatty() else 10.0) as bar:
        for batch in answerer.batches(questions, indices):
            texts = answerer.generate(batch)
            answers.write(
                {
                    index: entry(questions[index], text, answerer.name)
                    for (index, *_), text in zip(batch, texts, strict=True)
                }
            )
            bar.update(len(batch))
