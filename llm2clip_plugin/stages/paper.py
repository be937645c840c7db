"""The LLMs that the paper (LLM2CLIP, arXiv 2411.04997) trained with, for recipes and plans."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """An LLM of the paper, before and after stage 1."""

    base: str  # Hub id of the LLM that stage 1 starts from
    released: str  # Hub id of the LLM that the authors fine-tuned
    preset: str  # how the released one reads a caption (llm2clip embed --preset)
    width: int  # of an embedding, and so of a cache


TEACHERS = {
    "llama-1b": Teacher(
        base="meta-llama/Llama-3.2-1B-Instruct",
        released="microsoft/LLM2CLIP-Llama-3.2-1B-Instruct-CC-Finetuned",
        preset="llm2clip-llama3",
        width=2048,
    ),
    "llama-8b": Teacher(
        base="meta-llama/Meta-Llama-3-8B-Instruct",
        released="microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned",
        preset="llm2clip-llama3",
        width=4096,
    ),
}
