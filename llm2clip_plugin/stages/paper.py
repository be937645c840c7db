"""What the paper (LLM2CLIP, arXiv 2411.04997) trained with: its LLMs and its data, for recipes and plans."""

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


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Data sets with their nominal sizes (part of the links is dead by now); every sample is drawn equally often."""

    sets: tuple[tuple[str, float], ...]  # name, samples in millions
    captions: str  # which captions of a sample are used

    def __str__(self) -> str:
        listed = " + ".join(f"{name} ({size:g} M)" for name, size in self.sets)
        return f"{sum(size for _, size in self.sets):g} M = {listed}; {self.captions}"


LLM_MIXTURE = Mixture(
    sets=(("CC3M", 3), ("CC12M", 12), ("YFCC15M", 15), ("E5's text pairs", 1.5)),
    captions="a pair is two captions of an image (DreamLIP's) or a text pair, every batch from one source",
)
# shortSV and longSV, both of DreamLIP's (ShareGPT4V's model): data/extract_embedding.py:12, training/data.py:611-617
_SHORT_AND_LONG = "an MLLM's short caption or its long one (DreamLIP's shortSV and longSV), drawn evenly"
TOWER_MIXTURES = (
    Mixture(sets=(("CC3M", 3), ("CC12M", 12)), captions=_SHORT_AND_LONG),
    Mixture(
        sets=(("CC3M", 3), ("CC12M", 12), ("YFCC15M", 15), ("a part of Recap-DataComp-1B", 30)),
        captions=_SHORT_AND_LONG,
    ),
)
