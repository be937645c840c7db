"""Stage 1's recipes: the authors' settings and ours, overridden by single options, trained on a tiny LLM."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from llm2clip_plugin.contracts import EncoderCard
from llm2clip_plugin.stages.llm import finetune_llm, open_data
from llm2clip_plugin.stages.llm_config import FINETUNE_LLM, INSTRUCTION, LLM_RECIPES, OF_LONG, OF_SHORT
from llm2clip_plugin.stages.settings import TEACHERS
from llm2clip_plugin.text.encoder import CaptionEncoder


@pytest.mark.parametrize("name", LLM_RECIPES)
def test_the_settings_that_ours_and_the_papers_have_in_common(name):
    config = FINETUNE_LLM.parse(["/data/cc3m", "--recipe", name, "--local_rank=0"])
    assert config.pairs.data == ("/data/cc3m",)
    assert config.encoder.llm == (TEACHERS[name.removeprefix("paper-")].base if name != "paper" else "")
    lora = (config.lora.r, config.lora.alpha, config.lora.dropout, config.lora.targets)
    assert lora == (16, 32, 0.05, ("all-linear",))
    assert (config.optim.lr, config.optim.warmup_steps, config.train.num_train_epochs) == (2e-4, 300, 1.0)
    assert (config.train.global_batch, config.contrast.scale, config.encoder.max_tokens) == (512, 50.0, 512)
    assert config.train.rows(8) == (64, 64, 1)  # 8 GPUs x 64
    assert config.encoder.compute_dtype == "bfloat16"
    ours = name in TEACHERS
    assert (config.contrast.symmetric, config.contrast.mask_same) == (ours, ours)
    assert config.optim.schedule == ("cosine" if ours else "linear")
    assert config.pairs.random_negatives is config.pairs.mix_kinds is not ours
    assert (config.encoder.query_prompt == INSTRUCTION) is ours
    assert bool(config.start_adapters) is (name == "paper-llama-8b")


def test_the_papers_recipe_trains_a_tiny_llm(llama, tmp_path):
    """Either caption as query, its instruction, a negative: what a step has, and the loss that it starts with."""
    words = "red bicycle brick wall old house two dogs boat lake green hill".split()
    rows = [
        {"id": f"k{i}", "image": "x.png", "caption": f"{words[i % 12]} {i}", "long_caption": f"{words[i % 5]} the {i}"}
        for i in range(32)
    ]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [str(tmp_path / "captions.jsonl"), "--recipe", "paper", "--llm", str(llama), "--global-batch", "8"]
    options += ["--compute-dtype", "float32", "--max-steps", "2", "--output", str(tmp_path / "run"), "--dropout", "0"]
    adapter = finetune_llm(FINETUNE_LLM.parse(options))
    card = EncoderCard.read(adapter / EncoderCard.FILE)
    assert card.query_prompt == OF_SHORT and card.chat_template == "<bos><user>\n{caption}<end>"
    assert card.training["instructions"] == [f"short={OF_SHORT}", f"long={OF_LONG}"] and not card.training["symmetric"]
    config = FINETUNE_LLM.parse(options)
    batch = open_data(config, rank=0, world=1).batches.batch(0)
    encoder = CaptionEncoder(config.encoder, "cpu")
    loss = 0.0
    for i, pair in enumerate(batch["pairs"]):
        prompt = OF_LONG if " the " in pair.query else OF_SHORT
        asked = CaptionEncoder(dataclasses.replace(config.encoder, prompt=prompt), "cpu").encode([pair.query])
        texts = [*(p.positive for p in batch["pairs"]), *(p.negative for p in batch["pairs"])]
        cosines = F.cosine_similarity(asked, encoder.encode(texts))
        loss += float(F.cross_entropy(50 * cosines[None], torch.tensor([i]))) / 8
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert next(line["loss"] for line in lines if line.get("step") == 1) == pytest.approx(loss, rel=1e-4)
