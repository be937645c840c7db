"""``llm2clip finetune-llm`` and ``llm2clip pretrain-llm``: a command line into a stage 1 run."""

from __future__ import annotations

import argparse
import os

from llm2clip_plugin.stages.llm.recipes import LLM_RECIPES, llm_recipe
from llm2clip_plugin.stages.llm.run import FinetuneConfig, finetune_llm, pretrain_llm

PLAN_OPTIONS = {  # as train-tower has them -> here
    "--plan.images": "--assumed-pairs",
    "--plan.gpu-gib": "--gpu-gib",
    "--plan.gpu_gib": "--gpu-gib",
}


def parse(argv: list[str], prog: str = "llm2clip finetune-llm") -> FinetuneConfig:
    """The configuration from a command line; data sets may stand first, without ``--data``. ``--recipe NAME`` gives the
    fields that the other options override."""
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="")
    first.add_argument("--local_rank", "--local-rank", default="")  # the DeepSpeed launcher's; LOCAL_RANK says it too
    chosen, words = first.parse_known_args(argv)
    words = [PLAN_OPTIONS.get(name, name) + equals + value for name, equals, value in (w.partition("=") for w in words)]
    if words and not words[0].startswith("-"):
        words.insert(0, "--data")
    default = llm_recipe(chosen.recipe) if chosen.recipe else FinetuneConfig()
    about = (
        "Teach an LLM to tell captions apart. Usage: llm2clip finetune-llm DATA [DATA ...] --llm PATH_OR_HUB_ID, or "
        f"--recipe NAME ({', '.join(LLM_RECIPES)}) for the paper's LLMs and settings."
    )
    return tyro.cli(
        tyro.conf.OmitArgPrefixes[FinetuneConfig], args=words, default=default, prog=prog, description=about
    )


def main(argv: list[str]) -> int:
    """``llm2clip finetune-llm DATA [DATA ...] --llm PATH_OR_HUB_ID [options]``."""
    adapter = finetune_llm(parse(argv), argv)
    if adapter is not None and os.environ.get("RANK", "0") == "0":
        print(f"adapter: {adapter}")
    return 0


def main_pretrain(argv: list[str]) -> int:
    """``llm2clip pretrain-llm DATA [DATA ...] --llm PATH_OR_HUB_ID [options]``."""
    adapter = pretrain_llm(parse(argv, "llm2clip pretrain-llm"))
    if adapter is not None and os.environ.get("RANK", "0") == "0":
        print(f"adapter: {adapter}; merge it with llm2clip export-llm, then fine-tune what that wrote")
    return 0
