"""The options of ``llm2clip bench-mllm``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llava_integration.benchmarks.rules import benchmark_names
from llm2clip_plugin.options.command import Command


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """A model and the benchmarks to evaluate it on."""

    data: Path  # LLaVA's playground/data/eval, or a .jsonl with own questions
    model_path: str = ""  # LLaVA checkpoint: full, LoRA or projector
    model_base: str = ""  # base model of a LoRA or projector checkpoint
    endpoint: str = ""  # instead of a checkpoint: URL of an OpenAI-compatible server
    served_model_name: str = ""  # with --endpoint: the model; "": the only one
    output: Path  # folder for answers, scores and logs
    benchmarks: tuple[str, ...] = ()  # names; empty: all whose files are found
    engine: Literal["llava", "lmms-eval"] = "llava"  # program that generates the answers
    gpus: int = 1  # number of processes, one GPU each
    batch_size: int = 1  # questions per batch
    conv_mode: str = "vicuna_v1"  # conversation template
    device: Literal["auto", "cuda", "cpu"] = "auto"  # of the model
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"  # of the weights
    name: str = ""  # model name in score files; "": the checkpoint's folder, or its name on the server
    overwrite: bool = False  # generate existing answers again
    plan: bool = False  # only list the benchmarks whose files are found
    engine_options: tuple[str, ...] = ()  # after --, for the engine

    def __post_init__(self) -> None:
        if not self.endpoint and not self.model_path:
            raise ValueError("--model-path is missing: a LLaVA checkpoint; or --endpoint URL to ask a server")


LOCAL = ("model_path", "model_base", "engine", "gpus", "batch_size", "conv_mode", "device", "dtype")  # of a checkpoint

COMMAND = Command(
    name="bench-mllm",
    example="llm2clip bench-mllm playground/data/eval --model-path checkpoints/llava-7b --output runs/llava-7b",
    about="Evaluate one LLaVA checkpoint, or a served model, on every benchmark whose files are found: "
    f"{', '.join(benchmark_names())}. Answers, scores and logs are written to --output; completed ones are skipped on "
    "a rerun, and a benchmark that fails does not stop the others. Options after -- are passed to the engine "
    "(llava_integration.evaluate, or lmms_eval).",
    settings=BenchConfig,
    arguments="data",
    everyday="model-path endpoint output benchmarks engine gpus batch-size overwrite plan",
    rest="engine_options",
    needs={**dict.fromkeys(LOCAL, "not endpoint"), "served_model_name": "endpoint"},
)
