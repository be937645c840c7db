"""What is silenced by its message alone: the one record that is meant, and no other."""

import logging

import pytest

from llm2clip_plugin.quiet import quiet_libraries, quiet_llava, quiet_llava_loading

UNUSED = (
    "Some weights of the model checkpoint at x were not used when initializing "
    "LlavaLlamaForCausalLM: [{}]\n- This IS"
)
REPORT = """LlavaLlamaForCausalLM LOAD REPORT from: x
Key                                        | Status     |  |
-------------------------------------------+------------+--+-
model.vision_tower.vision_tower.a.{{0, 1}} | UNEXPECTED |  |
{}

Notes:
- UNEXPECTED:	can be ignored when loading from different task/architecture"""
TOWER = "'model.vision_tower.vision_tower.a', 'model.vision_tower.vision_tower.b'"


@pytest.mark.parametrize(
    "silence, name, message, heard",
    [
        (
            quiet_llava_loading,
            "transformers.modeling_utils",
            UNUSED.format(TOWER),
            False,
        ),
        (
            quiet_llava_loading,
            "transformers.modeling_utils",
            UNUSED.format(f"{TOWER}, 'lm_head.weight'"),
            True,
        ),
        (quiet_llava_loading, "transformers.modeling_utils", REPORT.format(""), False),
        (
            quiet_llava_loading,
            "transformers.modeling_utils",
            REPORT.format("lm_head.weight | UNEXPECTED | |"),
            True,
        ),
        (
            quiet_llava,
            "transformers.configuration_utils",
            "to instantiate a model of type `llava_llama`.",
            False,
        ),
        (
            quiet_llava,
            "transformers.configuration_utils",
            "to instantiate a model of type `clip`.",
            True,
        ),
        (
            quiet_libraries,
            "DeepSpeed",
            "Setting accelerator to CPU. If you have GPU",
            False,
        ),
        (quiet_libraries, "DeepSpeed", "Setting accelerator to a toaster", True),
    ],
)
def test_only_the_record_that_is_meant(silence, name, message, heard):
    logger = logging.getLogger(name)
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    before = logger.level
    filters = list(logger.filters)
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        silence()
        logger.warning(message)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        logger.filters[:] = filters
    assert [record.getMessage() for record in records] == ([message] if heard else [])
