"""Pairs read and tokenized in other processes: the same batches in the same order."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from llm2clip_plugin.text.config import EncoderConfig, PairsConfig
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.pairs import Pair, PairBatches, PairTokenizer, open_pairs, tokenized_batches


@pytest.mark.parametrize("negatives", [False, True])
def test_any_number_of_processes_gives_the_same_batches(llama: Path, tmp_path: Path, negatives: bool) -> None:
    rows = [{"query": f"a boat {i}", "positive": f"the boat {i}"} for i in range(40)]
    rows = [{**row, "negative": f"no boat {i}"} for i, row in enumerate(rows)] if negatives else rows
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    encoding = EncoderConfig(llm=str(llama), compute_dtype="float32", query_prompt="Query: ", max_tokens=12)
    encoder = CaptionEncoder(encoding, "cpu")
    sources = open_pairs(PairsConfig(data=(str(tmp_path / "pairs.jsonl"),)))
    made = []
    for workers in (0, 2):
        batches = PairBatches(sources, (), seed=3, global_batch=8, rank=1, world=2)
        tokenizer = PairTokenizer(encoder.tokenizer, encoder.config)
        loaded = tokenized_batches(batches, tokenizer, position=16, workers=workers)
        made.append(list(islice(loaded, 5)))
        del loaded
    batches = PairBatches(sources, (), seed=3, global_batch=8, rank=1, world=2)
    plain = [batches.batch(position) for position in range(16, 56, 8)]
    for without, with_workers, pairs in zip(*made, plain, strict=True):
        assert without["tokens"] == with_workers["tokens"]
        assert without["pairs"] == with_workers["pairs"] == pairs["pairs"]
        assert without["position"] == with_workers["position"] == pairs["position"]
        assert torch.equal(without["caption_hashes"], with_workers["caption_hashes"])
        assert without["tokens"]["query"] == encoder.tokenize([pair.query for pair in pairs["pairs"]], query=True)
        assert without["tokens"]["positive"] == encoder.tokenize([pair.positive for pair in pairs["pairs"]])
        assert ("negative" in without["tokens"]) is negatives
    assert len(made[1]) == 5


def test_each_query_has_its_own_instruction_which_is_not_pooled(llama: Path) -> None:
    encoder = CaptionEncoder(EncoderConfig(llm=str(llama), query_prompt="Query: ", include_bos=False), "cpu")
    pairs = [Pair("a", "a boat", "the boat"), Pair("b", "a boat", "the boat", instruction="Find a long caption; ")]
    pairs.append(Pair("c", "a boat", "the boat", instruction=""))
    tokens = PairTokenizer(encoder.tokenizer, encoder.config)(pairs)
    batch = encoder.collate(tokens["query"], tokens["query_frame"])
    for row, text in enumerate(("Query: a boat", "Find a long caption; a boat", "a boat")):
        assert tokens["query"][row] == encoder.tokenizer(text)["input_ids"]
        pooled = batch.input_ids[row][batch.pool_mask[row]].tolist()
        assert encoder.tokenizer.decode(pooled).strip() == "a boat"
