"""The command line of stage 2: ``llm2clip train-tower``; under a launcher, scripts/train_tower.py.

A recipe or a file gives the full configuration, options override fields. Options of Hugging Face's Trainer and of
LLaVA's scripts keep their names.
"""

import json
from pathlib import Path

from llm2clip_plugin.stages.command_line import override, plan_or_train, rank_and_world, split_options
from llm2clip_plugin.stages.settings import RENAMED, from_plain
from llm2clip_plugin.stages.tower.config import RunConfig
from llm2clip_plugin.stages.tower.plan import tower_plan
from llm2clip_plugin.stages.tower.recipes import DEFAULT, RECIPES, recipe
from llm2clip_plugin.stages.tower.run import train_tower
from llm2clip_plugin.stages.tower.unused import UNUSED

ABOUT = f"""\
llm2clip train-tower --tower.path facebook/dinov2-base --data.path /data/photos --output-dir runs/photos

Train a vision tower against the cached embeddings of an LLM. --recipe NAME or --config FILE (a JSON, for example the
run.json of an earlier run) gives the full configuration; the options below override single fields. Rerun the same
command to resume. Recipes: {DEFAULT}, for any data and tower, is the default; quickstart is for the built-in emoji
alone; the others are the paper's: {", ".join(name for name in RECIPES if name not in (DEFAULT, "quickstart"))};
NAME/TEACHER for caches of one of the paper's LLMs."""
ALIASES = {  # option of the Trainer or of LLaVA's scripts, or one of an earlier version -> ours
    "vision_tower": "tower.path",
    "data_path": "data.path",
    "image_folder": "data.read.images",
    "learning_rate": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "warmup_ratio": "optim.warmup_ratio",
    "warmup_steps": "optim.warmup_steps",
    "max_grad_norm": "optim.max_grad_norm",
    "lr_scheduler_type": "optim.schedule",
    "per_device_train_batch_size": "train.micro_batch",
    "num_train_epochs": "train.num_train_epochs",
    "max_steps": "train.max_steps",
    "save_steps": "train.save_steps",
    "save_total_limit": "train.save_total_limit",
    "eval_steps": "train.eval_steps",
    "logging_steps": "train.logging_steps",
    "report_to": "train.report_to",
    "seed": "train.seed",
    "dataloader_num_workers": "train.dataloader_num_workers",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "torch_compile": "train.torch_compile",
    "resume_from_checkpoint": "resume",
    **RENAMED,
}
TRUTH = {"true": True, "false": False}


def main(argv: list[str]) -> int:
    """Print the plan or train; exit status 0, also after a SIGTERM that saved."""
    config = read_command(argv)
    config.validate(needs_data=not config.dry_run)
    if rank_and_world()[0] == 0 and not any(word.startswith(("--recipe", "--config")) for word in argv):
        print(f"recipe: {DEFAULT} (the paper's settings for any data and tower; --recipe NAME chooses another)")
    return plan_or_train(config.dry_run, lambda: tower_plan(config, argv), lambda: train_tower(config), "tower: {}")


def read_command(argv: list[str]) -> RunConfig:
    """The configuration of a command line. Raises ValueError or exits with status 2 for an unknown option."""
    first, words = split_options(argv, "recipe", "config")
    if first["recipe"] and first["config"]:
        raise ValueError(f"--recipe {first['recipe']} and --config {first['config']} are mutually exclusive; pass one")
    default = from_file(Path(first["config"])) if first["config"] else recipe(first["recipe"] or DEFAULT)
    words = translate(words)
    return override(RunConfig, words, command="train-tower", about=ABOUT, default=default, unused=UNUSED)


def from_file(path: Path) -> RunConfig:
    """A configuration file, or the run.json of an earlier run."""
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return from_plain(RunConfig, body.get("config", body) if isinstance(body, dict) else body, where=str(path))


def translate(argv: list[str]) -> list[str]:
    """The Trainer's option names replaced by ours; ``--bf16 True`` becomes the precision, ``--flag True`` the flag."""
    out: list[str] = []
    half: set[str] = set()
    words = [part for word in argv for part in _split(word)]
    i = 0
    while i < len(words):
        name = words[i].removeprefix("--").replace("-", "_") if words[i].startswith("--") else ""
        following = words[i + 1] if i + 1 < len(words) else ""
        truth = TRUTH.get(following.lower())
        if name in ("bf16", "fp16"):
            out += ["--train.precision", name] if truth is not False else []
            half |= {name} if truth is not False else set()
        elif name == "report_to" and following.lower() == "none":
            out.append("--train.report_to")  # an empty list
            truth = False
        elif name and truth is not None:
            section, _, leaf = ALIASES.get(name, name).rpartition(".")
            out.append(f"--{section}{'.' if section else ''}{'' if truth else 'no-'}{leaf}")
        else:
            out.append(f"--{ALIASES[name]}" if name in ALIASES else words[i])
            truth = None
        i += 1 if truth is None else 2
    if len(half) > 1:
        raise ValueError("--bf16 and --fp16 exclude each other; give one")
    return out


def _split(word: str) -> list[str]:
    """``--name=value`` as two words."""
    return word.split("=", 1) if word.startswith("--") and "=" in word else [word]
