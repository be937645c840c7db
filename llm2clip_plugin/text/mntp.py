"""Masked next-token prediction (MNTP): an optional warm-up of a decoder for bidirectional attention.

From BehnamGhader et al. 2024 (LLM2Vec, arXiv 2404.05961, section 2.2): a fifth of the tokens is masked, and each is
predicted from the state of the token *before* it, as the LLM's head was trained. The authors of LLM2CLIP report
that it has little impact.

Shape letters: m texts of a micro-batch, T tokens, K masked tokens, H hidden width, V vocabulary.
"""

import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.files import weight_files
from llm2clip_plugin.text.model import CaptionModel
from llm2clip_plugin.text.pairs import Pair
from llm2clip_plugin.text.tokens import collate
from llm2clip_plugin.train.distributed import rank, sum_over_ranks, world_size
from llm2clip_plugin.train.engine import Engine
from llm2clip_plugin.train.errors import NonFiniteLossError
from llm2clip_plugin.train.step import Batch, first_samples, position_seed

MASKED_FRACTION = 0.2  # of the tokens
MASK_WORD = "_"  # replaces a masked token, as in LLM2Vec: decoders have no mask token
UNMASKED = -100  # label of a token that is not predicted


class MaskedModule(nn.Module):
    """The LLM and its head; forward gives the summed loss of a micro-batch."""

    def __init__(self, model: CaptionModel, head_VH: Tensor) -> None:
        super().__init__()
        self.model = model
        self.cap: float | None = getattr(model.llm.config, "final_logit_softcapping", None)  # of the logits, in Gemma 2
        self.head_VH: Tensor
        self.register_buffer("head_VH", head_VH, persistent=False)  # frozen, and stored in the LLM's files

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
        """(m, T) four times, rows padded on the right -> () sum over masked tokens of their cross-entropy.

        labels: the original token where one is masked, UNMASKED elsewhere. Token t is predicted from state t - 1.
        """
        hidden_mTH = self.model.states(input_ids, attention_mask, position_ids=position_ids, use_cache=False)
        masked_mT = labels[:, 1:] != UNMASKED
        logits_KV = (hidden_mTH[:, :-1][masked_mT].to(self.head_VH.dtype) @ self.head_VH.T).float()
        if self.cap:
            logits_KV = self.cap * torch.tanh(logits_KV / self.cap)
        return F.cross_entropy(logits_KV, labels[:, 1:][masked_mT], reduction="sum")


class MaskedStep:
    """One optimizer step on the texts of this rank's pairs; masks depend only on the seed and a pair's position."""

    def __init__(self, engine: Engine, encoder: CaptionEncoder, *, seed: int) -> None:
        self.engine = engine
        self.encoder = encoder
        self.seed = seed
        self.mask_id = mask_token(encoder)

    def __call__(self, batch: Batch) -> tuple[float, dict[str, float]]:
        """Update the parameters; returns the mean loss per masked token. Raises NonFiniteLossError on every rank."""
        pairs: list[Pair] = batch["pairs"]
        first = batch["position"] - (world_size() - rank()) * len(pairs)
        texts = [list(dict.fromkeys((pair.query, pair.positive))) for pair in pairs]
        rows = [self.encoder.tokenize(of_pair) for of_pair in texts]
        masks = [
            [choose_masked(len(ids), position_seed(self.seed, 2 * (first + i) + j)) for j, ids in enumerate(of_pair)]
            for i, of_pair in enumerate(rows)
        ]
        masked = torch.tensor([float(sum(len(mask) for of_pair in masks for mask in of_pair))])
        total = float(sum_over_ranks(masked.to(self.engine.device)))
        size = len(pairs) // self.engine.accumulation
        loss, lowers = torch.zeros((), device=self.engine.device), self.engine.can_lower_loss_scale
        for start in range(0, len(pairs), size):
            part = slice(start, start + size)
            torch.manual_seed(position_seed(self.seed, first + start))  # dropout
            summed = self.engine(*self._inputs(list(chain(*rows[part])), list(chain(*masks[part]))))
            loss += summed.detach()
            # the engine averages over ranks; `total` counts the masked tokens of all ranks
            self.engine.backward(summed * (world_size() / total))
            self.engine.step()
        mean = float(sum_over_ranks(loss)) / total
        if not (math.isfinite(mean) or lowers):  # then neither was the gradient, and the engine left the update out
            raise NonFiniteLossError(
                f"the loss is not finite in the batch that ends at sample {batch['position']}; it starts with "
                f"{first_samples(batch)}",
                "lower the learning rate, or leave such batches out with --skip-bad-batches",
            )
        return mean, {"masked_tokens": total}

    def _inputs(self, rows: Sequence[Sequence[int]], masks: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """The four inputs of MaskedModule."""
        frames = [self.encoder.frame] * len(rows)
        batch = collate(rows, frames, pad_id=self.encoder.pad_id, include_bos=True)
        labels = torch.full_like(batch.input_ids, UNMASKED)
        for index, places in enumerate(masks):
            labels[index, list(places)] = batch.input_ids[index, list(places)]
        masked = torch.where(labels == UNMASKED, batch.input_ids, self.mask_id)
        inputs = (masked, batch.attention_mask, batch.position_ids, labels)
        return tuple(tensor.to(self.engine.device) for tensor in inputs)


def choose_masked(length: int, seed: int, fraction: float = MASKED_FRACTION) -> list[int]:
    """Positions to mask in a row of ``length`` tokens: one or more, never the first, which nothing predicts.

    [] for rows shorter than two tokens.
    """
    if length < 2:
        return []
    draws = torch.rand(length - 1, generator=torch.Generator().manual_seed(seed))
    chosen = (draws < fraction).nonzero()[:, 0].tolist() or [int(draws.argmin())]
    return [place + 1 for place in chosen]


def mask_token(encoder: CaptionEncoder) -> int:
    """Id of the tokenizer's mask token, or of "_"."""
    if encoder.tokenizer.mask_token_id is not None:
        return encoder.tokenizer.mask_token_id
    return encoder.tokenizer(MASK_WORD, add_special_tokens=False)["input_ids"][-1]


def output_head(encoder: CaptionEncoder) -> Tensor:
    """(V, H) output embedding: ``lm_head`` of the LLM's files, or the input embedding if they are tied."""
    head_VH = find_tensor(encoder.folder, "lm_head.weight")
    if head_VH is None:
        head_VH = encoder.model.llm.get_input_embeddings().weight.detach().clone()  # type: ignore[operator]
    return head_VH.to(encoder.device, encoder.dtype)


def find_tensor(folder: Path, name: str) -> Tensor | None:
    """A tensor from a model folder's safetensors files, None if they don't contain it."""
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                if name in file.keys():
                    return file.get_tensor(name)
    return None
