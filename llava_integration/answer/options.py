"""The options of ``llm2clip llava evaluate``, which are LLaVA's own and ours."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llm2clip_plugin.options import Command

KEY = "OPENAI_API_KEY"  # environment variable, as OpenAI's client reads it


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """A question file, and the model that answers it."""

    model_path: str = ""  # LLaVA checkpoint: full, LoRA or projector
    model_base: str | None = None  # base model of a LoRA or projector checkpoint
    endpoint: str = ""  # URL of an OpenAI-compatible server to ask instead, e.g. http://localhost:8000/v1
    question_file: Path  # .jsonl, .json (ScienceQA) or .tsv (MMBench)
    answers_file: Path  # JSONL to write; an incomplete run is resumed
    image_folder: str = ""  # folder of the questions' images
    conv_mode: str = "vicuna_v1"  # conversation template
    batch_size: int = 1  # questions per batch
    num_chunks: int = 1  # split the questions into chunks, as LLaVA's scripts do
    chunk_idx: int = 0  # chunk to answer
    temperature: float = 0.0  # sampling temperature; 0: greedy decoding
    top_p: float | None = None  # nucleus sampling: probability mass
    num_beams: int = 1  # beam search; 1: none
    max_new_tokens: int = 128  # longest answer, in tokens
    single_pred_prompt: bool = False  # ask for the option's letter only (ScienceQA, MMBench)
    all_rounds: bool = False  # ask every rotation of the options (MMBench)
    lang: Literal["en", "cn"] = "en"  # language of MMBench
    device: Literal["auto", "cuda", "cpu"] = "auto"  # of the model
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"  # of the weights; LLaVA uses float16
    load_8bit: bool = False  # quantize the language model to 8 bits
    load_4bit: bool = False  # quantize the language model to 4 bits
    workers: int = 4  # data loader processes
    served_model_name: str = ""  # with --endpoint: the model; "": the only one
    concurrency: int = 16  # with --endpoint: requests at a time
    timeout: float = 300.0  # with --endpoint: seconds that an answer may take
    retries: int = 8  # with --endpoint: of a failed request, with growing pauses
    overwrite: bool = False  # discard existing answers

    def __post_init__(self) -> None:
        if self.answers_file.resolve() == self.question_file.resolve():
            raise ValueError(f"--answers-file {self.answers_file} is the question file; choose another")
        if bool(self.model_path) == bool(self.endpoint):
            raise ValueError("--model-path and --endpoint: give one, a LLaVA checkpoint or the URL of a served model")
        for name, least in (("batch_size", 1), ("concurrency", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least {least}")
        if not 0 < self.timeout < float("inf"):
            raise ValueError(f"--timeout {self.timeout} must be seconds above 0")


COMMAND = Command(
    name="llava evaluate",
    example="llm2clip llava evaluate --model-path checkpoints/llava-7b --question-file questions.jsonl "
    "--image-folder images --answers-file answers.jsonl",
    about="Answer a question file with a LLaVA model, on any device. The options of LLaVA's model_vqa_loader, "
    "model_vqa_science and model_vqa_mmbench are accepted, and the answers file is the same; batches, resuming and "
    "several ranks are added. With --endpoint, any model behind an OpenAI-compatible server answers it (vLLM, SGLang, "
    f"llama.cpp, ...); the key is read from {KEY}.",
    settings=AnswerConfig,
    everyday="model-path model-base endpoint question-file answers-file image-folder batch-size temperature "
    "max-new-tokens device overwrite",
    also={"data": "question_file", "output": "answers_file", "model": "served_model_name"},
)
