"""The options of ``llm2clip train-tower``."""

from collections.abc import Mapping
from pathlib import Path

from llm2clip_plugin.options.command import Command
from llm2clip_plugin.outside.values import from_plain, read_json_value
from llm2clip_plugin.stages.settings import NEEDS, REPLACES
from llm2clip_plugin.stages.tower.config import RunConfig
from llm2clip_plugin.stages.tower.recipes import DEFAULT, RECIPES, recipe


def starting_point(extras: Mapping[str, str]) -> RunConfig:
    """The configuration of --config or --recipe, which the other options override."""
    name, file = extras.get("recipe", ""), extras.get("config", "")
    if name and file:
        raise ValueError(f"--recipe {name} and --config {file} are mutually exclusive; pass one")
    if not file:
        return recipe(name or DEFAULT)
    if not Path(file).is_file():
        raise FileNotFoundError(f"no configuration at {file}")
    body = read_json_value(file)
    return from_plain(RunConfig, body.get("config", body) if isinstance(body, dict) else body, where=file)


COMMAND = Command(
    name="train-tower",
    example="llm2clip train-tower /data/photos --tower facebook/dinov2-base --output runs/photos",
    about="Stage 2: train a vision tower against the cached embeddings of an LLM. A recipe or a file gives the full "
    "configuration, options override single settings. Rerun the same command to resume.",
    settings=RunConfig,
    default=starting_point,
    arguments="data.path",
    everyday="recipe tower cache image-folder validation output global-batch micro-batch lr num-train-epochs max-steps "
    "precision deepspeed dry-run",
    shown={
        "data.weight": "data-weights",
        "tower.path": "tower",
        "evaluation": "evaluation.",
        "heads": "heads.",
        "loss": "loss.",
        "distill": "distill.",
        "dual": "dual.",
        "data.augment": "augment.",
        "plan.images": "assumed-samples",
    },
    extras={
        "recipe": f"{DEFAULT} (the default): any data and tower; quickstart: the built-in emoji alone; the paper's: "
        f"{', '.join(name for name in RECIPES if name not in (DEFAULT, 'quickstart'))}; "
        "NAME/TEACHER for caches of one of the paper's LLMs",
        "config": "a configuration in JSON, for example the run.json of an earlier run",
    },
    replaces=REPLACES,
    needs={
        **NEEDS,
        "train.eval_steps": "data.validation",
        "evaluation": "data.validation",
        "data.validation_cache": "data.validation",
        "heads": "heads.steps",
        "distill": "loss.needs_reference: without a term that compares with a reference, such as --loss.terms distill",
        "tower.lora_alpha": "tower.lora_rank",
        "tower.architecture": "not tower.path",
        "optim.lr": "trains_at_lr: with --freeze, which trains the heads alone, at --head-lr",
    },
)
