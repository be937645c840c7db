"""The options of ``llm2clip bench-mllm``."""

from pathlib import Path

from llava_integration.benchmarks.rules import benchmark_names
from llm2clip_plugin.options.parser import Parser, add_data

ABOUT = """\
Evaluate one LLaVA checkpoint, or a served model, on every benchmark whose files are found. Answers, scores and logs are
written to --output; completed ones are skipped on a rerun, and a benchmark that fails does not stop the
others. Options after -- are passed to the engine (llava_integration.evaluate, or lmms_eval)."""


def parser() -> Parser:
    """The command line."""
    parse = Parser(
        "bench-mllm",
        "llm2clip bench-mllm playground/data/eval --model-path checkpoints/llava-7b --output runs/llava-7b",
        ABOUT,
        rare=("model-base", "served-model-name", "conv-mode", "device", "dtype", "name"),
    )
    add_data(parse, "LLaVA's playground/data/eval, or a .jsonl with own questions", type=Path)
    parse.add_argument("--model-path", default="", help="LLaVA checkpoint: full, LoRA or projector")
    parse.add_argument("--model-base", default="", help="base model of a LoRA or projector checkpoint")
    parse.add_argument(
        "--endpoint", default="", metavar="URL", help="instead of a checkpoint: an OpenAI-compatible server"
    )
    parse.add_argument(
        "--served-model-name", default="", metavar="NAME", help="with --endpoint (default: the only one)"
    )
    parse.add_argument("--output", required=True, type=Path, help="folder for answers, scores and logs")
    parse.add_argument(
        "--benchmarks", nargs="+", default=[], metavar="NAME", help=f"default: all of {', '.join(benchmark_names())}"
    )
    parse.add_argument(
        "--engine", choices=("llava", "lmms-eval"), default="llava", help="program that generates the answers"
    )
    parse.add_argument("--gpus", type=int, default=1, help="number of processes, one GPU each")
    parse.add_argument("--batch-size", type=int, default=1, help="questions per batch")
    parse.add_argument("--conv-mode", default="vicuna_v1", help="conversation template")
    parse.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"), help="device of the model")
    parse.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"), help="of the weights")
    parse.add_argument(
        "--name",
        default="",
        help="model name in score files (default: the checkpoint's folder, or its name on the server)",
    )
    parse.add_argument("--overwrite", action="store_true", help="generate existing answers again")
    parse.add_argument("--plan", action="store_true", help="only list the benchmarks whose files are found")
    return parse
