"""Run with vLLM: its greedy answers to one question about one image, and how likely it takes each
token to be.

    python greedy.py IMAGE QUESTION OUTPUT MODEL ...

writes OUTPUT, a JSON: for each folder MODEL its token ids and their log probabilities.
"""

import gc
import json
import os
import sys
from pathlib import Path

# one process, which imports vLLM once
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from PIL import Image
from vllm import LLM, SamplingParams

TOKENS = 16


def answer(model: str, image: Image.Image, question: str) -> dict[str, list]:
    """Token ids and log probabilities of the answer."""
    engine = LLM(
        model,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=1,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 1},
    )
    content = [
        {"type": "image_pil", "image_pil": image},
        {"type": "text", "text": question},
    ]
    greedy = SamplingParams(
        temperature=0, max_tokens=TOKENS, logprobs=0, ignore_eos=True
    )
    (result,) = engine.chat(
        [{"role": "user", "content": content}], greedy, use_tqdm=False
    )
    (completion,) = result.outputs
    ids = [*completion.token_ids]
    values = [
        step[token].logprob
        for step, token in zip(completion.logprobs, ids, strict=True)
    ]
    engine.llm_engine.engine_core.shutdown()
    return {"prompt": [*result.prompt_token_ids], "tokens": ids, "logprobs": values}


def main(image: str, question: str, output: str, models: list[str]) -> None:
    answers = {}
    with Image.open(image) as opened:
        picture = opened.convert("RGB")
    for model in models:
        answers[model] = answer(model, picture, question)
        gc.collect()
        Path(output).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:4], sys.argv[4:])
