"""The command line of stage 1.5: ``llm2clip embed``, in one process or under a launcher."""

from collections.abc import Sequence

from llm2clip_plugin.stages.command_line import override, rank_and_world
from llm2clip_plugin.stages.embed.config import EmbedConfig
from llm2clip_plugin.stages.embed.plan import cache_plan
from llm2clip_plugin.stages.embed.run import embed_captions, verify_cache

ABOUT = """\
llm2clip embed /data/cc3m --llm meta-llama/Llama-3.2-1B-Instruct --adapter runs/llm/adapter

Embed the captions of DATA with a frozen LLM and cache the embeddings. Rerun the same command to resume; shards that are
complete are skipped."""


def parse(argv: Sequence[str]) -> EmbedConfig:
    """The configuration of a command line; DATA may come first, without ``--path``."""
    words = list(argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--path")
    return override(EmbedConfig, words, command="embed", about=ABOUT, sections=False)


def main(argv: list[str]) -> int:
    """``llm2clip embed DATA --llm PATH_OR_HUB_ID [--cache DIR] [--dtype int8] [--verify]``."""
    config = parse(argv)
    if config.dry_run:
        if rank_and_world()[0] == 0:
            print(cache_plan(config))
    elif config.verify:
        print(verify_cache(config))
    else:
        for line in embed_captions(config):
            print(line)
    return 0
