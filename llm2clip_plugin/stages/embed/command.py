"""The command line of stage 1.5: ``llm2clip embed``, in one process or under a launcher."""

from llm2clip_plugin.run_files import started_by
from llm2clip_plugin.stages.command_line import rank_and_world
from llm2clip_plugin.stages.embed.options import COMMAND
from llm2clip_plugin.stages.embed.plan import cache_plan
from llm2clip_plugin.stages.embed.run import embed_captions, verify_cache


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
