#!/usr/bin/env python3
"""A side of the miniature without LLaVA: a model of `llm2clip vlm build`, trained by transformers' Trainer alone.

Reads DIR/data and DIR/llm of `miniature.py prepare`; writes DIR/vlm-NAME/stage0 (built), stage1 (projector, captions),
stage2 (projector and LoRA, conversations), as miniature.sh trains SmolLM2, and DIR/NAME.answers.jsonl, for scores.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoProcessor, LlavaForConditionalGeneration, Trainer, TrainingArguments

from llava_integration.benchmarks.answers import read_jsonl
from llava_integration.serve.build import register
from llava_integration.serve.rows import LlavaRows
from llm2clip_plugin.cli import main as llm2clip
from llm2clip_plugin.contracts import atomic_directory, write_text

LLM, PROJECTOR = r".*language_model\.layers.*_proj", "multi_modal_projector"
LORA = LoraConfig(r=64, lora_alpha=128, target_modules=LLM, modules_to_save=[PROJECTOR])
SETTINGS: dict[str, Any] = {"learning_rate": 5e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "bf16": True}
SETTINGS |= {"logging_steps": 10, "save_strategy": "no", "report_to": "none", "remove_unused_columns": False}


def train(source: Path, output: Path, data: Path, *, lora: bool, **settings: Any) -> None:
    """A stage: the projector alone, or with LoRA, which is merged into the LLM."""
    rows = LlavaRows(AutoProcessor.from_pretrained(source), data.parent / "images")
    model: Any = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    model.requires_grad_(False).model.multi_modal_projector.requires_grad_(True)
    torch.manual_seed(settings["seed"])
    trained: Any = get_peft_model(model, LORA) if lora else model
    with atomic_directory(output) as folder:
        arguments = TrainingArguments(str(folder), use_cpu=not torch.cuda.is_available(), **SETTINGS, **settings)
        trainer = Trainer(trained, arguments, rows, json.loads(data.read_text()))
        trainer.train()
        trainer.save_state()
        (trained.merge_and_unload() if lora else model).save_pretrained(folder)
        rows.processor.save_pretrained(folder)
    output.with_suffix(".options").write_text("\n".join(map(str, settings.items())))  # compared with the other side's


@torch.inference_mode()
def answer(folder: Path, questions: Path, output: Path) -> None:
    """Greedy answers, 64 at a time."""
    rows = LlavaRows(AutoProcessor.from_pretrained(folder), questions.parent / "images")
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    answers, asked = "", read_jsonl(questions)
    for some in (asked[start : start + 64] for start in range(0, len(asked), 64)):
        chats = [rows.chat({**row, "conversations": [{"from": "human", "value": row["text"]}]}) for row in some]
        inputs = rows.encode(chats, side="left", add_generation_prompt=True).to(torch.bfloat16)
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for row, text in zip(some, rows.processor.batch_decode(ids, skip_special_tokens=True), strict=True):
            answers += json.dumps({"question_id": row["question_id"], "text": text}) + "\n"
    write_text(output, answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tower")
    parser.add_argument("name", help="before or after; with -seedN, another seed")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, nargs=2, default=(120, 100), metavar="N", help="captions, conversations")
    args = parser.parse_args()
    seed, data = int(args.name.partition("-seed")[2] or 0), args.output / "data"
    stages = [args.output / f"vlm-{args.name}" / f"stage{stage}" for stage in range(3)]
    words = ["--tower", args.tower, "--llm", str(args.output / "llm"), "--output", str(stages[0]), "--seed", str(seed)]
    if not stages[0].exists() and (status := llm2clip(["vlm", "build", *words])):
        raise SystemExit(status)
    register()
    for stage, (name, batch) in enumerate((("captions", 16), ("finetune", 8))):
        settings = {"max_steps": args.steps[stage], "per_device_train_batch_size": batch, "seed": seed}
        if not (output := stages[stage + 1]).exists():
            train(stages[stage], output, data / f"{name}.json", lora=stage == 1, **settings)
    if not (answers := args.output / f"{args.name}.answers.jsonl").exists():
        answer(stages[2], data / "questions.jsonl", answers)


if __name__ == "__main__":
    main()
