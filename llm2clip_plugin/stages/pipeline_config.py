"""The settings and options of ``llm2clip run``. Read without torch."""

import math
from dataclasses import dataclass
from typing import Literal

from llm2clip_plugin.data.sources import SourceConfig
from llm2clip_plugin.options import Command, setting


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(SourceConfig):
    """One training, from checked data to an exported tower."""

    llm: str = setting(help="folder or Hub id of the teacher LLM")
    revision: str = setting(
        "",
        help='commit, tag or branch of the LLM on the Hub; "" for the default',
    )
    preset: str = setting(
        "",
        help="how an LLM without a card is read that is fine-tuned already: llm2clip-llama3 for "
        "the authors', llm2vec, last-token, mean; stage 1 then runs with --stage1 alone",
    )
    load_in_4bit: bool = setting(
        False,
        help="LLM in NF4 with double quantization (bitsandbytes), in stage 1 (QLoRA) and where it "
        "embeds",
    )
    tower: str = setting(
        help="vision tower to start from: a folder, a Hub id, or whatever `llm2clip import` reads",
    )
    output: str = setting(help="folder for everything that the run makes")
    validation: float = setting(
        0.1, help="fraction of the data that is held out and measured with"
    )
    by: str = setting(
        "",
        help="field of the samples' JSON: samples with the same value, such as photos of one "
        "product, are held out together or not at all",
    )
    adapter: str = setting("", help="existing LoRA adapter; skips stage 1")
    reading: str = setting(
        "",
        help="folder that `evaluate captions --search --folder` wrote: use the LLM with its "
        "prompt, attention and pooling, and without stage 1 also with its layer and "
        "post-processing",
    )
    stage1: bool | Literal["auto"] = setting(
        "auto",
        help="fine-tune the LLM; auto: if most images have several captions that do not contain "
        "one another",
    )
    num_train_epochs: float = setting(4.0, help="passes over the data in stage 2")
    global_batch: int = setting(
        0,
        help="pairs per step of both stages; 0: 256, fewer for less than 4096 images",
    )
    micro_batch: int = setting(
        0,
        help="pairs per forward pass and GPU; 0: all at once. Smaller values use gradient caching",
    )
    precision: Literal["", "fp32", "bf16", "fp16"] = setting(
        "",
        help='precision of stage 2; "": bf16 on GPUs, fp16 before Ampere, else fp32',
    )
    tower_options: str = setting(
        "",
        help='more options of train-tower, as one text: --tower-options="--freeze-first-blocks 8"',
    )
    num_gpus: int = setting(1, help="processes of the training stages")
    trust_remote_code: bool = setting(
        False,
        help="run the Python code in the LLM's folder: read it first",
    )
    questions: str = setting(
        "",
        help=".jsonl with image, question and answer: train a LLaVA with the tower before and one "
        "with the tower after, and compare their answers",
    )
    llava_llm: str = setting(
        "",
        help="language model of these two LLaVAs; it is frozen, and their projectors are trained "
        "on the captions",
    )
    llava_options: str = setting(
        "",
        help="more options of LLaVA's pretraining, as one text: --llava-options=\"--learning_rate "
        '2e-3"',
    )
    dry_run: bool = setting(
        False, help="print the stages with their commands, and run none"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.validation < 1:
            raise ValueError(
                f"validation is {self.validation:g}, "
                "expected a fraction between 0 and 1, such as 0.1"
            )
        if not 0 < self.num_train_epochs < math.inf:
            raise ValueError(
                f"--num-train-epochs is {self.num_train_epochs:g}, expected a number above 0"
            )
        if self.num_gpus < 1:
            raise ValueError(f"--num-gpus is {self.num_gpus}, expected at least 1")
        batches = {
            "--global-batch": self.global_batch,
            "--micro-batch": self.micro_batch,
        }
        for option, value in batches.items():
            if value < 0:
                raise ValueError(
                    f"{option} is {value}, expected at least 0 (0: chosen by the number of images)"
                )
        if self.stage1 is True and self.adapter:
            raise ValueError(
                "--stage1 trains an adapter, and --adapter gives one that is trained; "
                "omit one of them"
            )
        if self.reading and self.adapter:
            raise ValueError(
                "--reading and --adapter both say how the LLM is read; omit one of them"
            )
        if self.reading and self.preset:
            raise ValueError(
                "--reading and --preset both say how the LLM is read; omit one of them"
            )
        if bool(self.questions) != bool(self.llava_llm):
            raise ValueError(
                "--questions and --llava-llm need each other: "
                "the questions, and LLaVA's language model"
            )


RUN = Command(
    name="run",
    example="llm2clip run photos-tars --llm meta-llama/Llama-3.2-1B-Instruct "
    "--tower openai/clip-vit-large-patch14-336 --output runs/photos",
    about="All stages in order: check the data, hold out a part, fine-tune the LLM on captions, "
    "embed, train the tower, measure it against the start tower, export it, and write a page about "
    "the run. Each stage is a command, which is printed. Rerun the same command to resume.",
    settings=PipelineConfig,
    arguments="path",
    everyday="llm tower output image-folder fields validation by adapter reading stage1 "
    "num-train-epochs questions llava-llm num-gpus dry-run",
    hidden="weight shuffle_window kinds languages",
)
