"""The options of ``llm2clip train-tower``."""

from llm2clip_plugin.options.command import Command
from llm2clip_plugin.options.declared import Extra
from llm2clip_plugin.options.shared import READ_NAMES, TRAINING_NAMES, in_section
from llm2clip_plugin.stages.tower.config import RunConfig
from llm2clip_plugin.stages.tower.recipes import DEFAULT, RECIPES

COMMAND = Command(
    name="train-tower",
    example="llm2clip train-tower /data/photos --tower facebook/dinov2-base --output runs/photos",
    about="Stage 2: train a vision tower against the cached embeddings of an LLM. A recipe or a file gives the full "
    "configuration, options override single settings. Rerun the same command to resume.",
    settings=RunConfig,
    default=RECIPES[DEFAULT],
    arguments=("data.path",),
    everyday=(
        "recipe",
        "tower.path",
        "data.cache",
        "data.read.images",
        "data.validation",
        "output_dir",
        "train.global_batch",
        "train.micro_batch",
        "optim.lr",
        "train.num_train_epochs",
        "train.max_steps",
        "train.precision",
        "deepspeed",
        "dry_run",
    ),
    shown={
        **TRAINING_NAMES,
        "data.path": "data",
        "data.cache": "cache",
        "data.weight": "data-weights",
        **in_section("data.read", READ_NAMES),
        "tower.path": "tower",
        "optim.lr": "lr",
        "optim.weight_decay": "weight-decay",
        "heads.batch": "heads.batch-size",
        "heads": "heads.",
        "loss": "loss.",
        "distill": "distill.",
        "dual": "dual.",
        "data.augment": "augment.",
        "plan.images": "assumed-samples",
    },
    extras={
        "recipe": Extra(
            metavar="NAME",
            help=f"{DEFAULT} (the default): any data and tower; quickstart: the built-in emoji alone; the paper's: "
            f"{', '.join(name for name in RECIPES if name not in (DEFAULT, 'quickstart'))}; "
            "NAME/TEACHER for caches of one of the paper's LLMs",
        ),
        "config": Extra(metavar="FILE", help="a configuration in JSON, for example the run.json of an earlier run"),
    },
)
