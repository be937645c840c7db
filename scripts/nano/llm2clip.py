"""LLM2CLIP in one file of plain PyTorch and transformers: read this, then the package.

An LLM learns to tell captions apart (stage 1), is frozen, and its embeddings of all captions are
cached. A vision tower is then trained against them as CLIP's is against a text tower (stage 2;
arXiv 2411.04997). On the built-in emoji, five minutes on two cores:

    scripts/quickstart.sh --smoke    # makes the two models, once
    MODELS=quickstart-output/models
    python scripts/nano/llm2clip.py --llm $MODELS/gemma-3-270m --tower $MODELS/dinov2-vits14-56px

The package adds towers, LLMs, data of any size, GPUs, resuming, exports, LLaVA; its losses are the
same to 1e-5 (tests/scripts/test_nano.py). Shape letters: B pairs of a batch, N captions or images,
T tokens, H width of the LLM, W width of an embedding (= H), P width of an image's pooled feature,
D width of the space that images and captions share.
"""

import argparse
import io
import json
import math
import random
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

EMOJI = Path(__file__).parents[2] / "llm2clip_plugin" / "data" / "emoji"
# PromptEOL (arXiv 2307.16645): the hidden state of the last token is the LLM's one word for the
# caption
BEFORE = 'This sentence: "'
AFTER = '" means in one word: "'
MAX_LOG_SCALE = math.log(100)  # as CLIP clamps it


# --------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Sample:
    """A picture and its English captions."""

    image: bytes
    captions: dict[str, str]  # kind (short, long, keywords) -> text
    concept: str  # the same in every drawing style
    family: str  # concepts that look or read alike: never negatives of each other in stage 1


def read_tars(pattern: str) -> list[Sample]:
    """The samples of WebDataset tars: NAME.png and NAME.json next to each other."""
    samples = []
    for path in sorted(EMOJI.glob(pattern)):
        with tarfile.open(path) as tar:
            files: dict[str, bytes] = {}
            for member in tar:
                opened = tar.extractfile(member)
                assert opened, f"{path}: {member.name} is no file"
                files[member.name] = opened.read()
        for name in files:
            if name.endswith(".json"):
                about = json.loads(files[name])
                picture = files[name.removesuffix("json") + "png"]
                captions: dict[str, str] = {}
                for caption in about["captions"]:
                    if caption["language"] == "en":
                        captions[caption["kind"]] = caption["text"]
                sample = Sample(picture, captions, about["concept"], about["family"])
                samples.append(sample)
    return samples


def batches(count: int, size: int, rng: random.Random) -> Iterator[list[int]]:
    """Endless batches of ``size`` different numbers below ``count``; each number once a pass."""
    queue: list[int] = []
    while True:
        if len(queue) < size:
            queue = rng.sample(range(count), count)
        yield queue[:size]
        queue = queue[size:]


def open_image(data: bytes) -> Image.Image:
    """RGB on white."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def pixels(images: Sequence[Image.Image], side: int) -> Tensor:
    """(B, 3, side, side) float32, normalized with ImageNet's mean and deviation, as DINOv2's
    processor does."""
    arrays = []
    for image in images:
        square = image.resize((side, side), Image.Resampling.BICUBIC)
        arrays.append(np.asarray(square))
    mean = torch.tensor([0.485, 0.456, 0.406])
    std = torch.tensor([0.229, 0.224, 0.225])
    pixels_BSS3 = torch.from_numpy(np.stack(arrays)) / 255
    return ((pixels_BSS3 - mean) / std).permute(0, 3, 1, 2)


def augment(image: Image.Image, rng: random.Random) -> Image.Image:
    """A crop of 60 to 100 % of the area, mirrored half of the time, rotated by up to 10 degrees."""
    side = math.sqrt(rng.uniform(0.6, 1.0))
    left = rng.uniform(0, 1 - side)
    top = rng.uniform(0, 1 - side)
    box = (
        left * image.width,
        top * image.height,
        (left + side) * image.width,
        (top + side) * image.height,
    )
    image = image.resize(image.size, Image.Resampling.BICUBIC, box=box)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    angle = rng.uniform(-10, 10)
    return image.rotate(angle, Image.Resampling.BILINEAR, fillcolor="white")


# ---------------------------------------------------------------------------------- loss, optimizer


def contrastive_loss(
    anchor_BD: Tensor,
    positive_BD: Tensor,
    scale: Tensor | float,
    *ids_B: Sequence[object],
) -> Tensor:
    """CLIP's symmetric InfoNCE (arXiv 2103.00020, figure 3) of L2-normalized features.

    Pairs that share an id of any sequence (a text, a picture) are not negatives of each other.
    """
    logits_BB = scale * anchor_BD @ positive_BD.T
    for ids in ids_B:
        number_of = {value: number for number, value in enumerate(dict.fromkeys(ids))}
        number_B = torch.tensor([number_of[value] for value in ids])
        same_BB = (number_B[:, None] == number_B).fill_diagonal_(False)
        logits_BB = logits_BB.masked_fill(same_BB, -math.inf)
    target_B = torch.arange(len(logits_BB))
    anchor_loss = F.cross_entropy(logits_BB, target_B)
    positive_loss = F.cross_entropy(logits_BB.T, target_B)
    return 0.5 * (anchor_loss + positive_loss)


def rate(step: int, steps: int, warmup: int) -> float:
    """Fraction of the peak learning rate at ``step`` (the first is 0): linear warm-up, then a
    cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def update(
    loss: Tensor, optimizer: torch.optim.Optimizer, factor: float, max_norm: float
) -> None:
    """One step at ``factor`` times each group's peak rate, the global norm of gradients clipped to
    ``max_norm``."""
    optimizer.zero_grad()
    loss.backward()
    parameters: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        parameters += group["params"]
        group["lr"] = factor * group["peak"]
    nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()


# -------------------------------------------------------------------------------------- the teacher


class LoRA(nn.Module):
    """A frozen linear layer and a trained update of low rank: W x + (alpha / r) B A x (arXiv
    2106.09685)."""

    def __init__(self, frozen: nn.Linear, r: int = 16, alpha: int = 32) -> None:
        super().__init__()
        self.frozen = frozen
        self.factor = alpha / r
        self.a = nn.Parameter(torch.empty(r, frozen.in_features))
        # 0: training starts at the LLM as it is
        self.b = nn.Parameter(torch.zeros(frozen.out_features, r))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.factor * (x @ self.a.T @ self.b.T)


class Teacher(nn.Module):
    """An LLM without its language head: captions in, one embedding each out."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.llm = AutoModel.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        )
        self.llm.eval().requires_grad_(False)

    def add_lora(self) -> list[nn.Parameter]:
        """A trained update of every linear layer of the blocks; returns its parameters."""
        for name, module in list(self.llm.layers.named_modules()):
            if isinstance(module, nn.Linear):
                self.llm.layers.set_submodule(name, LoRA(module))
        return [
            parameter for parameter in self.llm.parameters() if parameter.requires_grad
        ]

    def forward(self, captions: Sequence[str]) -> Tensor:
        """(B, W) embeddings, not normalized: the last token's last hidden state. Padding on the
        right."""
        head = self.tokenizer(BEFORE)["input_ids"]  # with the token that begins a text
        tail = self.tokenizer(AFTER, add_special_tokens=False)["input_ids"]
        tokens = self.tokenizer(list(captions), add_special_tokens=False)
        rows = [torch.tensor([*head, *ids, *tail]) for ids in tokens["input_ids"]]
        ids_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths_B = torch.tensor([len(row) for row in rows])
        mask_BT = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
        hidden_BTH = self.llm(
            input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False
        ).last_hidden_state
        return hidden_BTH[torch.arange(len(rows)), lengths_B - 1]

    @torch.no_grad()
    def embed(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The cache of stage 2: each distinct caption -> (W,). The LLM is not needed after this."""
        distinct = sorted(set(captions), key=len)
        parts = []
        for start in range(0, len(distinct), 32):
            parts.append(self(distinct[start : start + 32]))
        return dict(zip(distinct, torch.cat(parts), strict=True))


def caption_step(
    teacher: Teacher,
    optimizer: torch.optim.Optimizer,
    pairs: Sequence[tuple[str, str]],
    families: Sequence,
    factor: float,
) -> float:
    """Stage 1's step: of all captions in the batch, each is nearest to the other caption of its own
    picture."""
    queries = [query for query, _ in pairs]
    positives = [positive for _, positive in pairs]
    query_BW = F.normalize(teacher(queries), dim=1)
    positive_BW = F.normalize(teacher(positives), dim=1)
    loss = contrastive_loss(query_BW, positive_BW, 20.0, families, queries, positives)
    update(loss, optimizer, factor, max_norm=1.0)
    return float(loss.detach())


def caption_optimizer(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW of stage 1."""
    return torch.optim.AdamW(
        [{"params": parameters, "peak": 1e-3}],
        lr=1e-3,
        betas=(0.9, 0.999),
        weight_decay=0.0,
    )


def fine_tune(
    teacher: Teacher,
    samples: Sequence[Sample],
    *,
    steps: int,
    batch: int,
    rng: random.Random,
) -> None:
    """Stage 1: a batch pairs names with long captions, or (four times as often) with a few of the
    keywords."""
    optimizer = caption_optimizer(teacher.add_lora())
    kinds: dict[str, list[Sample]] = {}
    for kind in ("long", "keywords"):
        kinds[kind] = [s for s in samples if {"short", kind} <= s.captions.keys()]
    orders = {
        kind: batches(len(of_kind), batch, rng) for kind, of_kind in kinds.items()
    }
    for step in range(steps):
        (kind,) = rng.choices(("long", "keywords"), (1, 4))
        pairs = []
        families = []
        for number in next(orders[kind]):
            sample = kinds[kind][number]
            positive = some_of(sample.captions[kind], kind, rng)
            pairs.append((sample.captions["short"], positive))
            families.append(sample.family)
        factor = rate(step, steps, warmup=round(0.1 * steps))
        loss = caption_step(teacher, optimizer, pairs, families, factor)
        print(f"stage 1, step {step + 1} of {steps}: loss {loss:.3f}", flush=True)


def some_of(caption: str, kind: str, rng: random.Random) -> str:
    """Two to six of a list of keywords, in random order; any other caption as it is."""
    if kind != "keywords":
        return caption
    words = caption.split(", ")
    rng.shuffle(words)
    count = rng.randint(min(2, len(words)), min(6, len(words)))
    return ", ".join(words[:count])


# --------------------------------------------------------------------------------- the dual encoder


class Block(nn.Module):
    """A residual MLP block of the text adapter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class DualEncoder(nn.Module):
    """A DINOv2 tower with a projection, and a text adapter over the LLM's embeddings; both give
    unit vectors."""

    def __init__(
        self, folder: str, llm_width: int, dim: int = 384, noise: float = 0.5
    ) -> None:
        super().__init__()
        self.tower = AutoModel.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        )
        # deviation of what is added to an embedding in training: with few captions, it regularizes
        self.noise = noise
        width = 2 * self.tower.config.hidden_size  # class token and mean of the patches
        self.visual_norm = nn.LayerNorm(width)
        self.visual_projection = nn.Linear(width, dim, bias=False)
        nn.init.normal_(self.visual_projection.weight, std=width**-0.5)
        self.blocks = nn.ModuleList(Block(llm_width) for _ in range(4))
        self.norm = nn.LayerNorm(llm_width)
        self.projection = nn.Linear(llm_width, dim)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def pool(self, pixels_B3SS: Tensor) -> Tensor:
        """(B, P) of images."""
        tokens = self.tower(pixel_values=pixels_B3SS).last_hidden_state
        return torch.cat((tokens[:, 0], tokens[:, 1:].mean(1)), dim=-1)

    def project(self, pooled_BP: Tensor) -> Tensor:
        """(B, D), unit length."""
        return F.normalize(self.visual_projection(self.visual_norm(pooled_BP)), dim=-1)

    def encode_text(
        self, embedding_NW: Tensor, noise_NW: Tensor | None = None
    ) -> Tensor:
        """(N, D), unit length. The embedding is scaled to entries of unit variance first."""
        x_NW = F.normalize(embedding_NW, dim=-1) * embedding_NW.shape[1] ** 0.5
        if noise_NW is not None:
            x_NW = x_NW + self.noise * noise_NW
        for block in self.blocks:
            x_NW = block(x_NW)
        return F.normalize(self.projection(self.norm(x_NW)), dim=-1)

    def heads(self) -> list[tuple[str, nn.Parameter]]:
        """What is not the tower."""
        heads = []
        for name, parameter in self.named_parameters():
            if not name.startswith("tower."):
                heads.append((name, parameter))
        return heads


def head_optimizer(model: DualEncoder) -> torch.optim.AdamW:
    """AdamW of the heads alone, which are new."""
    groups = []
    for _, parameter in model.heads():
        decay = 0.05 if parameter.ndim > 1 else 0.0
        groups.append({"params": [parameter], "peak": 1e-3, "weight_decay": decay})
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))


def tower_optimizer(
    model: DualEncoder, *, lr: float = 4e-4, head_lr: float = 3e-4
) -> torch.optim.AdamW:
    """AdamW of stage 2. A block of the tower learns at .85 of the rate of the one above it: low
    ones change least.

    No weight decay for vectors (norms, biases, the logit scale) and for the tower's table of
    positions.
    """
    depth = model.tower.config.num_hidden_layers
    groups = []
    for name, parameter in model.named_parameters():
        peak = head_lr
        if name.startswith("tower."):
            peak = lr * 0.85 ** blocks_above(name, depth)
        is_table = ".embeddings." in name and parameter.ndim != 4
        is_vector = parameter.numel() == max(parameter.shape, default=1)
        decay = 0.0 if is_table or is_vector else 0.05
        groups.append({"params": [parameter], "peak": peak, "weight_decay": decay})
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def blocks_above(name: str, depth: int) -> int:
    """How far below the top a parameter of the tower is, of ``depth`` blocks: the last norm is 0,
    the embeddings depth + 1."""
    if ".embeddings." in name:
        return depth + 1
    for part in name.split("."):
        if part.isdigit():  # the block's number
            return depth - int(part)
    return 0


def tower_step(
    model: DualEncoder,
    optimizer: torch.optim.Optimizer,
    image_BP: Tensor,
    embedding_BW: Tensor,
    noise_BW: Tensor,
    texts: Sequence[object],
    images: Sequence[object],
    factor: float,
) -> float:
    """A step on pooled features of images (with a gradient into the tower, or of a frozen one) and
    their captions."""
    image_BD = model.project(image_BP)
    text_BD = model.encode_text(embedding_BW, noise_BW)
    loss = contrastive_loss(image_BD, text_BD, model.logit_scale.exp(), texts, images)
    update(loss, optimizer, factor, max_norm=5.0)
    model.logit_scale.data.clamp_(0, MAX_LOG_SCALE)
    return float(loss.detach())


def train_tower(
    model: DualEncoder,
    samples: Sequence[Sample],
    cache: dict[str, Tensor],
    *,
    side: int,
    steps: int,
    batch: int,
    rng: random.Random,
) -> None:
    """Stage 2: first the heads on the frozen tower's features, since new heads would spoil the
    tower; then all."""
    opened = [open_image(sample.image) for sample in samples]

    def step_on(chosen: list[int], image_BP: Tensor | None, factor: float) -> float:
        """On chosen samples; image_BP: None for augmented pictures through the tower."""
        texts = []
        for number in chosen:
            kind = rng.choice(("short", "long"))
            texts.append(samples[number].captions[kind])
        embedding_BW = torch.stack([cache[text] for text in texts])
        if image_BP is None:
            seen = [augment(opened[number], rng) for number in chosen]
            image_BP = model.pool(pixels(seen, side))
        noise_BW = torch.randn(embedding_BW.shape)
        return tower_step(
            model, optimizer, image_BP, embedding_BW, noise_BW, texts, chosen, factor
        )

    optimizer = head_optimizer(model)
    pooled_NP = pooled_features(model, opened, side)
    order = batches(len(samples), 256, rng)
    for step in range(100):
        chosen = next(order)
        loss = step_on(chosen, pooled_NP[chosen], 1.0)
        if (step + 1) % 20 == 0:
            print(
                f"stage 2, heads, step {step + 1} of 100: loss {loss:.3f}", flush=True
            )

    optimizer = tower_optimizer(model)
    order = batches(len(samples), batch, rng)
    for step in range(steps):
        factor = rate(step, steps, warmup=round(0.15 * steps))
        loss = step_on(next(order), None, factor)
        print(
            f"stage 2, tower, step {step + 1} of {steps}: loss {loss:.3f}", flush=True
        )


@torch.no_grad()
def pooled_features(
    model: DualEncoder, opened: Sequence[Image.Image], side: int
) -> Tensor:
    """(N, P) of images as they are."""
    parts = []
    for start in range(0, len(opened), 64):
        parts.append(model.pool(pixels(opened[start : start + 64], side)))
    return torch.cat(parts)


# --------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def recall(
    model: DualEncoder,
    samples: Sequence[Sample],
    cache: dict[str, Tensor],
    *,
    side: int,
) -> dict[str, float]:
    """R@1 and R@10 from caption to image and back; every drawing of a concept counts as a hit."""
    captions: dict[tuple[str, str], None] = {}  # each once, in order
    for sample in samples:
        captions[sample.captions["short"], sample.concept] = None
        captions[sample.captions["long"], sample.concept] = None
    texts = list(captions)
    opened = [open_image(sample.image) for sample in samples]
    image_ND = model.project(pooled_features(model, opened, side))
    text_MD = model.encode_text(torch.stack([cache[text] for text, _ in texts]))
    hits = []
    for _, concept in texts:
        hits.append([concept == sample.concept for sample in samples])
    hit_MN = torch.tensor(hits)
    similar_MN = text_MD @ image_ND.T
    recalls = {}
    for name, similar, hit in (
        ("caption -> image", similar_MN, hit_MN),
        ("image -> caption", similar_MN.T, hit_MN.T),
    ):
        best_hit = similar.masked_fill(~hit, -2).amax(1, keepdim=True)
        # wrong ones in front of the best hit
        rank = ((similar > best_hit) & ~hit).sum(1)
        for k in (1, 10):
            recalls[f"{name} R@{k}"] = float((rank < k).float().mean())
    return recalls


def main() -> None:
    """All stages on the built-in emoji."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--llm",
        required=True,
        help="folder of a decoder LLM, such as the quickstart's Gemma 3 270M",
    )
    parser.add_argument(
        "--tower",
        required=True,
        help="folder of a DINOv2, such as the quickstart's ViT-S/14",
    )
    parser.add_argument(
        "--side", type=int, default=56, help="pixels along a side of the tower's images"
    )
    parser.add_argument(
        "--llm-steps", type=int, default=12, help="steps of stage 1, with 64 pairs each"
    )
    parser.add_argument(
        "--steps", type=int, default=50, help="steps of stage 2, with 128 pairs each"
    )
    parser.add_argument(
        "--raw", action="store_true", help="leave out stage 1: the LLM teaches as it is"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    started = time.time()
    teacher = Teacher(options.llm)
    if not options.raw:
        fine_tune(
            teacher,
            read_tars("train-noto.tar"),
            steps=options.llm_steps,
            batch=64,
            rng=rng,
        )
    train = read_tars("train-*.tar")
    test = read_tars("test-*.tar")
    captions = []
    for sample in train + test:
        captions += [sample.captions["short"], sample.captions["long"]]
    cache = teacher.embed(captions)
    print(f"{len(cache)} captions embedded, {time.time() - started:.0f} s", flush=True)

    width = teacher.llm.config.get_text_config().hidden_size
    model = DualEncoder(options.tower, width)
    train_tower(
        model, train, cache, side=options.side, steps=options.steps, batch=128, rng=rng
    )
    for name, value in recall(model, test, cache, side=options.side).items():
        print(f"{name}: {value:.3f}, {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
