"""Stage 1's recipes: the paper's settings, overridden by single options, and one of them trained on a tiny LLM."""

import json

import pytest

from llm2clip_plugin.contracts import EncoderCard
from llm2clip_plugin.stages.llm.command import parse
from llm2clip_plugin.stages.llm.recipes import INSTRUCTION, LLM_RECIPES, llm_recipe
from llm2clip_plugin.stages.llm.run import finetune_llm
from llm2clip_plugin.stages.paper import TEACHERS
from llm2clip_plugin.text.settings import PRESETS


@pytest.mark.parametrize("name", LLM_RECIPES)
def test_the_papers_settings(name):
    config = parse(["/data/cc3m", "--recipe", name, "--local_rank=0"])
    assert config.pairs.data == ("/data/cc3m",) and config.encoder.llm == TEACHERS[name].base
    assert (config.lora.r, config.lora.alpha, config.lora.dropout, config.lora.targets) == (
        16,
        32,
        0.05,
        ("all-linear",),
    )
    assert (config.optim.lr, config.optim.warmup_steps, config.train.num_train_epochs) == (2e-4, 300, 1.0)
    assert (config.train.global_batch, config.contrast.scale, config.encoder.max_tokens) == (512, 50.0, 512)
    assert config.train.rows(8) == (64, 64, 1)  # 8 GPUs x 64
    assert config.encoder.compute_dtype == "bfloat16" and config.encoder.query_prompt == INSTRUCTION


def test_options_override_a_recipe_and_unknown_names_list_the_known_ones():
    config = parse(["/data/cc3m", "--recipe", "llama-1b", "--lr", "1e-4", "--r", "8", "--llm", "/models/mine"])
    assert (config.optim.lr, config.lora.r, config.encoder.llm) == (1e-4, 8, "/models/mine")
    assert config.lora.alpha == llm_recipe("llama-1b").lora.alpha
    with pytest.raises(ValueError, match=r"unknown recipe 'llama-70b'; .*known: llama-1b, llama-8b"):
        parse(["--recipe", "llama-70b"])


def test_a_recipe_trains_a_tiny_llm_and_its_card_says_how(llama, tmp_path):
    rows = [{"query": f"a {word}", "positive": f"one {word} on a table"} for word in ("dog", "cat", "pig", "hen") * 4]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--llm", str(llama), "--global-batch", "8", "--max-steps", "2", "--compute-dtype", "float32"]
    options += ["--output-dir", str(tmp_path / "run"), "--no-mask-same"]
    adapter = finetune_llm(parse([str(tmp_path / "pairs.jsonl"), "--recipe", "llama-1b", *options]))
    card = EncoderCard.read(adapter / EncoderCard.FILE)
    assert card.query_prompt == INSTRUCTION and card.training["scale"] == 50.0
    assert card.chat_template == PRESETS["llm2clip-llama3"]["chat_template"] and not card.include_bos
