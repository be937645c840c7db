#!/usr/bin/env python3
"""Data and scores of the LLaVA miniature, in an environment that has LLaVA; and a side of it
trained without LLaVA.

    miniature.py prepare --output DIR --llm NAME
    miniature.py train NAME --tower TOWER --output DIR
    miniature.py score NAME... --output DIR

``prepare``: pictures, texts, captions, questions; the language model. ``train``: a model of
`llm2clip vlm build`, as miniature.sh's SmolLM2. ``score``: scores of DIR/NAME.answers.jsonl, for
`llm2clip compare`.

A NAME is before or after; with -seedN, of another seed. ``train`` uses transformers' Trainer alone.
It writes DIR/vlm-NAME/stage0 (built), stage1 (projector, captions), stage2 (projector and LoRA,
conversations), and the answers.

Questions are about the group of an emoji (nine answers) and, from easy-vqa, a colored shape
(thirteen answers, half of them yes or no); a language model other than tiny is also asked for the
name of an emoji, scored by a word of its name or keywords, and by the cosine of answer and name in
a teacher's embeddings. Emoji of the test families and easy-vqa's test pictures are held out;
--held-out validation: emoji of the validation families, to choose settings.
"""

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from build_models import make_llava_llm
from miniature_data import make_data
from miniature_scores import score

from llava_integration.evaluator.benchmarks.answers import read_jsonl
from llava_integration.serve.rows import LlavaRows
from llm2clip_plugin.atomic import atomic_directory, write_text
from llm2clip_plugin.precision import fastest_dtype
from llm2clip_plugin.train.distributed import choose_device

# whose options are kept
STAGES = (
    "llava-{}-pretrain",
    "llava-{}",
    "llava-lora-{}",
    "vlm-{}/stage1",
    "vlm-{}/stage2",
)
MODELS = {
    "tiny": "a language model of 2.5 million weights, trained from scratch",
    "smollm2": "SmolLM2-135M-Instruct",
}
# options that differ between the sides
OF_TOWER = ("--vision_tower", "--pretrain_mm_mlp_adapter")


def train_side(output: Path, name: str, tower: str, steps: tuple[int, int]) -> None:
    """Build, train and answer; what is finished stays. ``steps``: on captions, on conversations."""
    from llava_integration.serve.build import register
    from llm2clip_plugin.cli import main as llm2clip

    data = output / "data"
    folder = output / f"vlm-{name}"
    built = folder / "stage0"
    aligned = folder / "stage1"
    finetuned = folder / "stage2"
    seed = name.partition("-seed")[2] or "0"
    if not built.exists():
        words = ["vlm", "build", "--tower", tower, "--llm", str(output / "llm")]
        words += ["--output", str(built), "--seed", seed]
        status = llm2clip(words)
        if status:
            sys.exit(status)
    register()
    caption_steps, conversation_steps = steps
    if not aligned.exists():
        settings: dict[str, Any] = {
            "max_steps": caption_steps,
            "per_device_train_batch_size": 16,
            "seed": int(seed),
        }
        train_stage(built, aligned, data / "captions.json", lora=False, **settings)
    if not finetuned.exists():
        settings = {
            "max_steps": conversation_steps,
            "per_device_train_batch_size": 8,
            "seed": int(seed),
        }
        train_stage(aligned, finetuned, data / "finetune.json", lora=True, **settings)
    answers = output / f"{name}.answers.jsonl"
    if not answers.exists():
        answer(finetuned, data / "questions.jsonl", answers)


def train_stage(
    source: Path,
    output: Path,
    data: Path,
    *,
    lora: bool,
    rows_type: type[LlavaRows] = LlavaRows,  # the data collator
    **settings: Any,
) -> None:
    """A stage: the projector alone, or with LoRA, which is merged into the LLM."""
    rows = open_rows(source, data.parent / "images", rows_type)
    model: Any = transformers.LlavaForConditionalGeneration.from_pretrained(
        source, dtype=torch.float32
    )
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    torch.manual_seed(settings["seed"])
    trained: Any = with_lora(model) if lora else model
    with atomic_directory(output) as folder:
        arguments = transformers.TrainingArguments(
            str(folder),
            remove_unused_columns=False,
            learning_rate=5e-4,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            bf16=fastest_dtype(choose_device()) == torch.bfloat16,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=10,
            save_strategy="no",
            **settings,
        )
        samples = json.loads(data.read_text())
        trainer = transformers.Trainer(trained, arguments, rows, samples)
        trainer.train()
        trainer.save_state()
        if lora:
            model = trained.merge_and_unload()
        model.save_pretrained(folder)
        rows.processor.save_pretrained(folder)
    # compared with the other side's
    output.with_suffix(".options").write_text("\n".join(map(str, settings.items())))


def open_rows(
    model: Path, images: Path, rows_type: type[LlavaRows] = LlavaRows
) -> LlavaRows:
    processor = transformers.AutoProcessor.from_pretrained(
        model, trust_remote_code=False
    )
    return rows_type(processor, images)


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=64,
        lora_alpha=128,
        target_modules=r".*language_model\.layers.*_proj",
        modules_to_save=["multi_modal_projector"],
    )
    return get_peft_model(model, config)


@torch.inference_mode()
def answer(folder: Path, questions: Path, output: Path) -> None:
    """Greedy answers, 64 at a time."""
    rows = open_rows(folder, questions.parent / "images")
    dtype = fastest_dtype(choose_device())
    model: Any = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype
    )
    model.eval()
    answers = ""
    all_questions = read_jsonl(questions)
    for start in range(0, len(all_questions), 64):
        some = all_questions[start : start + 64]
        chats = []
        for row in some:
            turn = {"from": "human", "value": row["text"]}
            chats.append(rows.chat({**row, "conversations": [turn]}))
        encoded = rows.encode(chats, side="left", add_generation_prompt=True)
        inputs = encoded.to(dtype)
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        answer_ids = ids[:, inputs["input_ids"].shape[1] :]
        texts = rows.processor.batch_decode(answer_ids, skip_special_tokens=True)
        for row, text in zip(some, texts, strict=True):
            answered = {"question_id": row["question_id"], "text": text}
            answers += json.dumps(answered) + "\n"
    write_text(output, answers)


def options_but_tower(path: Path) -> list[str]:
    """A stage's options, one a line in its file, without the values of OF_TOWER."""
    words = path.read_text().splitlines()
    return [word for option, word in pairwise(["", *words]) if option not in OF_TOWER]


def refuse_other_stages(output: Path, after: str) -> None:
    """Raise ValueError if a stage of ``after`` or ``after-seedN`` had other options than before's,
    the tower aside."""

    def options_file(stage: str, name: str) -> Path:
        return output / f"{stage.format(name)}.options"

    before = after.replace("after", "before")
    trained = [stage for stage in STAGES if options_file(stage, after).exists()]
    for stage in trained or STAGES[:1]:
        base = options_file(stage, before)
        new = options_file(stage, after)
        if options_but_tower(base) != options_but_tower(new):
            raise ValueError(
                f"{base} and {new} differ: the two sides were not trained alike; delete {output}"
            )


def main(args: argparse.Namespace) -> None:
    if args.part == "prepare":
        data = args.output / "data"
        in_words = args.llm != "tiny"
        make_data(data, args.concepts, in_words=in_words, split=args.held_out)
        make_llava_llm(args.llm, args.output)
    teacher = None
    if args.teacher:
        from llm2clip_plugin.text.encoder import CaptionEncoder, EncoderConfig

        adapter = str(args.adapter or "")
        teacher = CaptionEncoder(EncoderConfig(llm=str(args.teacher), adapter=adapter))
    model = MODELS.get(args.llm, Path(args.llm).name)
    for name in args.names:
        if args.part == "train":
            train_side(args.output, name, args.tower, args.steps)
            continue
        if name.startswith("after"):
            refuse_other_stages(args.output, name)
        score(args.output, name, f"a miniature: {model}", teacher)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("prepare", "train", "score"))
    parser.add_argument("names", nargs="*", help="of the sides, for train and score")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--concepts", type=int, default=0, help="training emoji; 0: all 1,068"
    )
    parser.add_argument(
        "--llm", default="tiny", help="language model: tiny, smollm2 or a directory"
    )
    parser.add_argument(
        "--held-out",
        choices=("test", "validation"),
        default="test",
        help="families of the emoji",
    )
    parser.add_argument("--tower", help="directory of a tower, for train")
    parser.add_argument(
        "--steps",
        type=int,
        nargs=2,
        default=(120, 100),
        metavar="N",
        help="captions, conversations",
    )
    parser.add_argument("--teacher", type=Path, help="an LLM that scores open answers")
    parser.add_argument("--adapter", type=Path, help="adapter of the teacher")
    args = parser.parse_args()
    try:
        main(args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
