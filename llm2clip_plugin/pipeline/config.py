"""The options of ``llm2clip run``."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.options import Command

PRETRAIN = Path(__file__).parents[2] / "scripts" / "llava" / "pretrain.sh"


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(SourceConfig):
    """One training, from checked data to an exported tower."""

    llm: str  # folder or Hub id of the teacher LLM
    tower: str  # vision tower to start from: a folder, a Hub id, or whatever `llm2clip import` reads
    output: str  # folder for everything that the run makes
    validation: float = 0.1  # fraction of the data that is held out and measured with
    by: str = ""  # field of the samples' JSON: samples with one value are on one side of the split
    adapter: str = ""  # of an LLM that is fine-tuned already; stage 1 is then left out
    stage1: bool = True  # fine-tune the LLM, if the images have several captions; --no-stage1: take it as it is
    num_train_epochs: float = 4.0  # passes over the data in stage 2
    global_batch: int = 0  # pairs per step of both stages; 0: 256, fewer for less than 4096 images
    micro_batch: int = 0  # pairs per forward pass on one GPU; 0: its share of the batch
    precision: Literal["", "fp32", "bf16", "fp16"] = ""  # of stage 2; "": bf16 on GPUs, fp32 without
    tower_options: str = ""  # more options of train-tower, as one text: --tower-options="--freeze-first-blocks 8"
    num_gpus: int = 1  # processes of the training stages
    questions: str = ""  # .jsonl of image, question and answer: what a LLaVA of each tower, before and after, is asked
    llava_llm: str = ""  # language model of these two LLaVAs, whose projectors are trained on the captions
    llava_options: str = ""  # more options of LLaVA's pretraining, as one text: --llava-options="--learning_rate 2e-3"
    queries: int = 24  # validation captions that the page shows, drawn at random
    dry_run: bool = False  # print the stages with their commands, and run none

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.questions or self.llava_llm:
            self._check_llava()
        if not 0 < self.validation < 1:
            raise ValueError(f"validation is {self.validation:g}, expected a fraction between 0 and 1, such as 0.1")
        if self.num_train_epochs <= 0 or self.num_gpus < 1 or self.global_batch < 0 or self.queries < 1:
            raise ValueError(
                f"num_train_epochs {self.num_train_epochs:g} must be above 0, num_gpus {self.num_gpus} and queries "
                f"{self.queries} at least 1, global_batch {self.global_batch} not negative"
            )

    def _check_llava(self) -> None:
        """What would stop LLaVA's stages, hours later."""
        from llava_integration.benchmarks.rules import benchmark
        from llava_integration.preflight import check_model

        if not self.questions or not self.llava_llm:
            raise ValueError("--questions and --llava-llm need each other: the questions, and LLaVA's language model")
        if not PRETRAIN.is_file():
            raise ValueError(f"--questions needs a checkout of this project: {PRETRAIN} is missing")
        if find_spec("llava") is None:
            raise ValueError("--questions needs LLaVA: pip install --no-deps llava-torch==1.2.2.post1")
        benchmark("questions").load(Path(self.questions))
        for problem in check_model(self.llava_llm):
            raise ValueError(problem.replace("--model", "--llava-llm"))


COMMAND = Command(
    name="run",
    example="llm2clip run photos-tars --llm meta-llama/Llama-3.2-1B-Instruct --tower openai/clip-vit-base-patch16 "
    "--output runs/photos",
    about="All stages in order: check the data, hold out a part, fine-tune the LLM on captions, embed, train the "
    "tower, measure it against the start tower, export it, and write a page about the run. Each stage is a command, "
    "which is printed. Rerun the same command to resume.",
    settings=PipelineConfig,
    arguments="path",
    everyday="llm tower output image-folder fields validation by adapter stage1 num-train-epochs questions llava-llm "
    "num-gpus dry-run",
    hidden="weight shuffle_window kinds languages",
)
