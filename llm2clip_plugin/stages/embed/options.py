"""The options of ``llm2clip embed``."""

from llm2clip_plugin.options.command import Command
from llm2clip_plugin.stages.embed.config import EmbedConfig

COMMAND = Command(
    name="embed",
    example="llm2clip embed /data/cc3m --llm meta-llama/Llama-3.2-1B-Instruct --adapter runs/llm/adapter",
    about="Stage 1.5: embed the captions of DATA with a frozen LLM and cache the embeddings. Rerun the same command to "
    "resume; shards that are complete are skipped.",
    settings=EmbedConfig,
    arguments="source.path",
    everyday="llm adapter preset cache fields image-folder dtype load-in-4bit overwrite verify dry-run",
    hidden="source.weight source.shuffle_window source.kinds source.languages",
)
