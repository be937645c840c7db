"""The command line of stage 1.5: ``llm2clip embed``, in one process or under a launcher."""

from llm2clip_plugin.options.command import Command
from llm2clip_plugin.options.shared import READ_NAMES, in_section
from llm2clip_plugin.run_files import started_by
from llm2clip_plugin.stages.command_line import rank_and_world
from llm2clip_plugin.stages.embed.config import EmbedConfig
from llm2clip_plugin.stages.embed.plan import cache_plan
from llm2clip_plugin.stages.embed.run import embed_captions, verify_cache

COMMAND = Command(
    name="embed",
    example="llm2clip embed /data/cc3m --llm meta-llama/Llama-3.2-1B-Instruct --adapter runs/llm/adapter",
    about="Stage 1.5: embed the captions of DATA with a frozen LLM and cache the embeddings. Rerun the same command to "
    "resume; shards that are complete are skipped.",
    settings=EmbedConfig,
    arguments=("source.path",),
    everyday=(
        "encoder.llm",
        "encoder.adapter",
        "encoder.preset",
        "cache",
        "source.fields",
        "source.images",
        "dtype",
        "encoder.load_in_4bit",
        "verify",
        "dry_run",
    ),
    shown={"source.path": "data", **in_section("source", READ_NAMES)},
    also={"path": "source.path"},
    hidden=("source.weight", "source.shuffle_window", "source.kinds", "source.languages"),
)


def main(argv: list[str]) -> int:
    """``llm2clip embed DATA --llm PATH_OR_HUB_ID [--cache DIR] [--dtype int8] [--verify]``."""
    config = COMMAND.parse(argv)
    if config.dry_run:
        if rank_and_world()[0] == 0:
            print(cache_plan(config))
    elif config.verify:
        print(verify_cache(config))
    else:
        for line in embed_captions(config, started_by("embed", argv)):
            print(line)
    return 0
