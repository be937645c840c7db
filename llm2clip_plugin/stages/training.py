"""`finetune-llm` and `train-tower`: a plan with --dry-run, else a run; only one is imported."""

from pathlib import Path

from llm2clip_plugin.run_folder import started_by
from llm2clip_plugin.stages.llm_config import FINETUNE_LLM
from llm2clip_plugin.stages.settings import plan_or_train, rank_and_world
from llm2clip_plugin.stages.tower_config import DEFAULT, PAPER_RECIPES, TRAIN_TOWER


def main_llm(argv: list[str]) -> int:
    """Stage 1: print the plan or train; exit status 0."""
    config = FINETUNE_LLM.parse(argv)

    def plan() -> str:
        from llm2clip_plugin.stages.llm_dry_run import llm_plan

        return llm_plan(config)

    def train() -> Path:
        from llm2clip_plugin.stages.llm import finetune_llm

        return finetune_llm(config, started_by("finetune-llm", argv))

    return plan_or_train(config.dry_run, plan, train, "adapter")


def main_tower(argv: list[str]) -> int:
    """Stage 2: print the plan or train; exit status 0."""
    config = TRAIN_TOWER.parse(argv)
    config.validate(needs_data=not config.dry_run)
    chosen = any(word.startswith(("--recipe", "--config")) for word in argv)
    if rank_and_world()[0] == 0 and not chosen:
        print(
            f"recipe: {DEFAULT} (ours, for any data and tower; --recipe NAME chooses another, such "
            f"as the paper's {PAPER_RECIPES[0]})"
        )

    def plan() -> str:
        from llm2clip_plugin.stages.tower_dry_run import tower_plan

        return tower_plan(config)

    def train() -> Path:
        from llm2clip_plugin.stages.tower import train_tower

        return train_tower(config, command=started_by("train-tower", argv))

    return plan_or_train(config.dry_run, plan, train, "tower")
