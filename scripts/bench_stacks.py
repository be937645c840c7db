"""Images a second of LLaVA's finetuning: today's libraries against LLaVA's own, the same model, samples and order.

    python scripts/bench_stacks.py --other .venv-llava/bin/python                  # a tiny language model
    python scripts/bench_stacks.py --other .venv-llava/bin/python --model vicuna   # 4 layers of Vicuna-7B's width

Run in the training environment; ``--other`` is the Python of LLaVA's. Each round trains once in either environment,
in a new process, each round starting with the other one: LLaVA's own ``train()`` with the settings of its finetune.sh
(bf16, gradient checkpointing, AdamW), from one projector, without its last save. The first step of a training is not
counted.
On a CPU, seconds are processor time of the process. Prints JSON: images a second (median over all steps), the ratio
(smallest, median, largest over the rounds), and the losses of either, which show that both did the same work.
"""

# LLaVA may not be installed where types are checked:
# pyright: reportMissingImports=false

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from bench import argument_parser
from PIL import Image

MODELS = {  # of the language model: width, inner width, layers, heads
    "tiny": (64, 128, 2, 4),
    "vicuna": (4096, 11008, 4, 32),
}
TOWER = (192, 4, 3)  # width, layers, heads
PIECES, SAMPLES, IMAGE, PATCH = 600, 64, 112, 14  # 64 patches
TRAIN = "--train"


def make_inputs(root: Path, model: str) -> None:
    """Images, conversations, a tower directory, a projector, and a language model in bf16 with a tokenizer."""
    from llm2clip_plugin.vision.export import export_tower

    torch.manual_seed(0)
    noise = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    rows = []
    words = "a red blue green small large cat dog house tree sits stands near under bright sky".split()
    for number in range(SAMPLES):
        name = f"{number}.jpg"
        Image.fromarray(noise.integers(0, 255, (252, 336, 3), dtype=np.uint8)).save(root / "images" / name)
        asked = {"from": "human", "value": f"<image>\nWhat is there, in {number % 7 + 2} words?"}
        told = {"from": "gpt", "value": " ".join(noise.choice(words, 16))}
        rows.append({"id": str(number), "image": name, "conversations": [asked, told]})
    (root / "finetune.json").write_text(json.dumps(rows), encoding="utf-8")
    width, layers, heads = TOWER
    config = transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=IMAGE,
        patch_size=PATCH,
    )
    export_tower(transformers.CLIPVisionModel(config).eval(), root / "tower", origin="random weights")
    make_language_model(root / "llm", model)
    inner = MODELS[model][0]
    layers_of = torch.nn.Sequential(torch.nn.Linear(width, inner), torch.nn.GELU(), torch.nn.Linear(inner, inner))
    projector = {f"model.mm_projector.{name}": tensor for name, tensor in layers_of.state_dict().items()}
    torch.save(projector, root / "mm_projector.bin")


def make_language_model(folder: Path, model: str) -> None:
    """A random Llama and a sentencepiece tokenizer as Vicuna's."""
    import sentencepiece

    width, inner, layers, heads = MODELS[model]
    config = transformers.LlamaConfig(
        vocab_size=PIECES,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        pad_token_id=0,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(before)
    text = folder / "text.txt"
    license_words = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8").split()
    text.write_text("\n".join(" ".join(license_words[at : at + 12]) for at in range(len(license_words))))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def llava_options(root: Path, batch: int, steps: int, output: str) -> list[str]:
    """The settings of LLaVA's finetune.sh, but for the batch, the steps and the loader's processes."""
    return f"""--model_name_or_path {root / "llm"} --version v1 --data_path {root / "finetune.json"}
        --image_folder {root / "images"} --vision_tower llm2clip:{root / "tower"}
        --pretrain_mm_mlp_adapter {root / "mm_projector.bin"} --mm_projector_type mlp2x_gelu
        --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False
        --image_aspect_ratio pad --group_by_modality_length True --bf16 True --output_dir {output}
        --max_steps {steps} --per_device_train_batch_size {batch} --gradient_accumulation_steps 1
        --evaluation_strategy no --save_strategy no --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03
        --lr_scheduler_type cosine --logging_steps 1 --model_max_length 2048 --gradient_checkpointing True
        --dataloader_num_workers 0 --lazy_preprocess True --report_to none --seed 7""".split()


def train(root: Path, batch: int, steps: int) -> dict[str, Any]:
    """One training in this environment; seconds and loss of each step but the first."""
    from transformers import TrainerCallback, trainer

    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    times: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        """Remembers when each step ends, and its loss."""

        def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(clock())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **options: Any) -> None:
            if "loss" in (logs or {}):
                losses.append(float(logs["loss"]))

    callbacks: list[type[TrainerCallback]] = trainer.DEFAULT_CALLBACKS  # type: ignore[assignment]
    callbacks.append(Clock)
    from llava.train import train as llava_train

    llava_train.safe_save_model_for_hf_trainer = lambda *arguments, **options: None
    with tempfile.TemporaryDirectory() as output:
        sys.argv = ["train.py", *llava_options(root, batch, steps, os.path.join(output, "llava-bench"))]
        llava_train.train()
    seconds = [after - before for before, after in pairwise(times)]
    return {"transformers": transformers.__version__, "seconds": seconds, "losses": losses}


def train_in(python: str, root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """`train` in a new process of another environment."""
    folder = Path(python).absolute().parent.parent / "torch-extensions"
    command = [python, __file__, TRAIN, str(root), "--batch", str(options.batch), "--steps", str(options.steps)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TORCH_EXTENSIONS_DIR": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Alternate the two environments; the results."""
    pythons = {"today's": sys.executable, "LLaVA's own": options.other}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        root = Path(folder) / "inputs"
        make_inputs(root, options.model)
        for number in range(options.rounds):
            for name in list(pythons)[:: 1 if number % 2 else -1]:
                runs[name].append(train_in(pythons[name], root, options))
                print(name, runs[name][-1], file=sys.stderr)
    today, own = runs.values()
    pairs = zip(today, own, strict=True)
    ratios = [statistics.median(b["seconds"]) / statistics.median(a["seconds"]) for a, b in pairs]
    results: dict[str, Any] = {"ratio": [min(ratios), statistics.median(ratios), max(ratios)]}
    for name, of_name in runs.items():
        seconds = [second for run in of_name for second in run["seconds"]]
        results[f"{name} libraries, transformers {of_name[0]['transformers']}"] = {
            "images/s": options.batch / statistics.median(seconds),
            "losses": of_name[0]["losses"],
        }
    return results


def main() -> None:
    """Print the results, or train once if the first word is ``--train``."""
    parser = argument_parser(__doc__)
    parser.add_argument("--other", help="Python of the environment with LLaVA's own libraries")
    parser.add_argument("--model", choices=MODELS, default="tiny", help="shape of the random language model")
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--steps", type=int, default=9, help="steps of each training; the first is not counted")
    parser.add_argument("--rounds", type=int, default=4, help="trainings in either environment")
    parser.add_argument("--scratch", help="folder for the model: 1.6 GB of --model vicuna (default: the system's)")
    parser.add_argument(TRAIN, type=Path, metavar="INPUTS", help="train once in this environment, and print JSON")
    options = parser.parse_args()
    if options.train:
        print(json.dumps(train(options.train, options.batch, options.steps)))
        return
    if not options.other:
        parser.error("--other is required: the Python of LLaVA's own environment, such as .venv-llava/bin/python")
    print(json.dumps(compare(options), indent=2))


if __name__ == "__main__":
    main()
