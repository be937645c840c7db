"""A small CLIP with a text tower of its own, trained from random weights: what proclip_miniature.py starts from.

Shape letters: B images of a batch and their captions, T tokens, S pixels a side, D width of the features.
"""

import dataclasses
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "quickstart"))
from shards import read_tar

from llm2clip_plugin.contracts import atomic_directory

SIDE, PATCH, WIDTH, CONTEXT = 40, 10, 96, 24  # pixels, pixels, of both towers, tokens
BATCH, LR = 256, 1e-3


def make_tokenizer(captions: list[str]) -> Any:
    """A byte-level BPE of 2,000 entries, learned from the captions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<bos>", "<eos>"]
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def train_clip(shards: list[Path], folder: Path, seed: int, *, steps: int) -> None:
    """A CLIP with random weights, trained on every emoji of some shards: names and long captions, InfoNCE."""
    import torch
    import torch.nn.functional as F
    from transformers import CLIPConfig, CLIPModel

    from llm2clip_plugin.data.images import EvalTransform, ImageConfig
    from llm2clip_plugin.train.losses.infonce import contrastive_loss
    from llm2clip_plugin.vision.checkpoint import preprocessor_config

    torch.manual_seed(seed)
    samples = [sample for path in shards for sample in read_tar(path)]
    texts = [[c["text"] for c in about["captions"]] for _, _, about in samples]
    tokenizer = make_tokenizer(sorted({text for both in texts for text in both}))
    size = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={**size, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        vision_config={**size, "num_hidden_layers": 3, "image_size": SIDE, "patch_size": PATCH},
        projection_dim=WIDTH,
    )
    model = CLIPModel(config)
    images = ImageConfig.from_preprocessor(preprocessor_config(model.vision_model))
    transform = EvalTransform(images)
    pixels = torch.stack([torch.from_numpy(transform.pixels(png)) for _, png, _ in samples])
    pixels = pixels.permute(0, 3, 1, 2).float() / 255
    number = {concept: i for i, concept in enumerate(sorted({about["concept"] for _, _, about in samples}))}
    concept_N = torch.tensor([number[about["concept"]] for _, _, about in samples])
    ids = [[_token_ids(tokenizer, text) for text in both] for both in texts]
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}],
        lr=LR,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
    rng, order = random.Random(seed), []
    mean_3, std_3 = (torch.tensor(values)[:, None, None] for values in (images.mean, images.std))
    for step in range(steps):
        if len(order) < BATCH:
            order = rng.sample(range(len(samples)), len(samples))
        chosen, order = order[:BATCH], order[BATCH:]
        rows = [ids[i][rng.randrange(2)] for i in chosen]
        length = max(map(len, rows))
        ids_BT = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        mask_BT = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        pixel_values = (augmented(pixels[chosen]) - mean_3) / std_3
        image_BD = _features(model.get_image_features(pixel_values=pixel_values))
        text_BD = _features(model.get_text_features(input_ids=ids_BT, attention_mask=mask_BT))
        scale = model.logit_scale.exp().clamp(max=100)[None]
        loss = contrastive_loss(
            F.normalize(image_BD, dim=1), F.normalize(text_BD, dim=1), scale, image_ids=concept_N[chosen]
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 24:
            print(f"CLIP, seed {seed}: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    with atomic_directory(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    ids = tokenizer(text)["input_ids"]
    return ids if len(ids) <= CONTEXT else [*ids[: CONTEXT - 1], ids[-1]]


def _features(output: Any) -> Any:
    return getattr(output, "pooler_output", output)


def augmented(pixels_B3SS: Any) -> Any:
    """Rotated up to 15 degrees, scaled, shifted, mirrored, with other colors; the border repeats."""
    import torch
    import torch.nn.functional as F

    count = len(pixels_B3SS)
    angle_B, scale_B = (torch.rand(count) - 0.5) * 0.52, 0.75 + 0.35 * torch.rand(count)
    mirror_B = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    cos_B, sin_B = angle_B.cos() * scale_B, angle_B.sin() * scale_B
    shift_B2 = (torch.rand(count, 2) - 0.5) * 0.2
    theta_B23 = torch.stack(
        [
            torch.stack([cos_B * mirror_B, -sin_B, shift_B2[:, 0]], 1),
            torch.stack([sin_B * mirror_B, cos_B, shift_B2[:, 1]], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta_B23, list(pixels_B3SS.shape), align_corners=False)
    moved = F.grid_sample(pixels_B3SS, grid, padding_mode="border", align_corners=False)
    return (moved * (0.7 + 0.6 * torch.rand(count, 3, 1, 1))).clamp(0, 1)


def own_text_tower(clip: Path, tower: Path, output: Path) -> None:
    """The imported CLIP as a tower whose teacher is its own text tower: no adapter in between."""
    from llm2clip_plugin.text.clip_text import ClipTextEncoder
    from llm2clip_plugin.text.config import EncoderConfig
    from llm2clip_plugin.vision.dual import DualEncoder, load_dual
    from llm2clip_plugin.vision.export import export_tower

    own, _ = load_dual(tower)
    encoder = ClipTextEncoder(clip, EncoderConfig(llm=str(clip), compute_dtype="float32"))
    dual = DualEncoder(own.tower, dataclasses.replace(own.config, llm_width=encoder.width, adapter="none"))
    dual.load_state_dict(own.state_dict())
    export_tower(dual, output, origin=str(tower), teacher=dataclasses.asdict(encoder.identity()))
