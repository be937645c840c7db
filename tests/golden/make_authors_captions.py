"""The authors' stage 1 on a tiny Llama, for stages/test_authors_captions.py.

    python tests/golden/make_authors_captions.py LLM2CLIP    # a checkout of microsoft/LLM2CLIP, commit cba3b45

runs its llm_caption_contrastive/run_supervised.py with the settings of train_configs/supervised, in fp32 on two gloo
ranks: LLM2Vec's loss, pooling and data order, Hugging Face's Trainer. They run under ZeRO-2, which averages the
gradients over ranks; here a subclass of their trainer does, because compute_loss calls the model without its
DistributedDataParallel. LoRA dropout is 0. Needs torch, transformers 4.44.2, accelerate 0.34.2, peft 0.12.0,
llm2vec 0.2.3, pandas.

Rewrites tests/golden/authors_captions/:
- loss.safetensors: ``query``, ``positive``, ``negative`` (8, 12), rows 4 r to 4 r + 4 of rank r, ``loss`` and the
  gradients of their loss at scale 50, averaged over ranks
- llm/: a Llama of two blocks with its tokenizer; adapter_start/ and adapter_end/: the LoRA before and after training
- curve.json: the texts of every step (row 4 r + i of a batch of 8 is pair i of rank r), losses, learning rates, and
  the learning rates of HF's schedule with a warm-up
- sampler.json: counts over their data set of 4,000 caption pairs and some text pairs
"""

import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parent / "authors_captions"
WORLD, LOCAL, LR = 2, 4, 2e-3
WORDS = (
    "red bicycle leans against brick wall old house near two sleeping dogs in rain a man reads newspaper at the window "
    "boat on lake green hill with small tree under cloud"
).split()
SPECIAL = ["<unk>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
ROWS = {"nq": 16, "allnli": 20, "squad": 8}  # text pairs of E5's sets; of the others 3, less than a batch
CAPTIONS = 92  # image captions
SETTINGS = {  # train_configs/supervised/MetaLlama3_cc3m.json, but for sizes, precision and warm-up
    "bidirectional": True,
    "pooling_mode": "mean",
    "dataset_name": "E5",
    "remove_unused_columns": False,
    "learning_rate": LR,
    "num_train_epochs": 1,
    "warmup_steps": 0,
    "per_device_train_batch_size": LOCAL,
    "gradient_accumulation_steps": 1,
    "max_seq_length": 512,
    "lora_r": 4,
    "lora_dropout": 0.0,
    "torch_dtype": "float32",
    "attn_implementation": "sdpa",
    "seed": 42,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "ddp_backend": "gloo",
}


def sentence(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def write_data(folder: Path, captions: int, rows: dict[str, int], rest: int = 3) -> None:
    """Their two kinds of files, with random sentences."""
    from dataset.E5_cc3m import E5_EMBEDDING_PROMPTS

    rng = random.Random(5)
    folder.mkdir()
    for name in E5_EMBEDDING_PROMPTS:
        if name == "cc3m":
            continue
        texts = [
            {part: sentence(rng, 3, 8) for part in ("query", "positive", "negative")}
            for _ in range(rows.get(name, rest))
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    pairs = []
    for number in range(captions):
        short = sentence(rng, 2, 4)
        pairs.append(f"{short} s{number},{short} {sentence(rng, 4, 10)} l{number}")
    (folder / "cc3m.csv").write_text("\n".join(["short_caption,long_caption", *pairs]) + "\n")


def write_llm(folder: Path) -> None:
    """A random Llama that run_supervised.py takes for Llama 3 8B Instruct, whose chat template it then uses."""
    from dataset.E5_cc3m import E5_EMBEDDING_PROMPTS
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    prompts = [p for value in E5_EMBEDDING_PROMPTS.values() for p in ([value] if isinstance(value, str) else value)]
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in [*prompts, *WORDS, "user ;"] for word, _ in split.pre_tokenize_str(text)})
    words += [f"{kind}{number}" for kind in "sl" for number in range(CAPTIONS)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split  # a word is the same token with and without a space before it
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        unk_token=SPECIAL[0],
        additional_special_tokens=SPECIAL[3:],
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words) + len(SPECIAL),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    fields["_name_or_path"] = "meta-llama/Meta-Llama-3-8B-Instruct"
    (folder / "config.json").write_text(json.dumps(fields, indent=2))


def gathers_on_cpu() -> None:
    """LLM2Vec's gather puts the sizes on "cuda"; the device alone is ours."""
    from llm2vec.loss import loss_utils

    def tensor(values: Any, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Tensor:
        return torch.tensor(values, dtype=dtype)

    loss_utils.torch = SimpleNamespace(**{**vars(torch), "tensor": tensor})


def fixed_loss() -> dict[str, Tensor]:
    """Their loss and its gradients on fixed embeddings, averaged over ranks."""
    from llm2vec.loss.utils import load_loss

    generator = torch.Generator().manual_seed(7)
    whole = {name: torch.randn(WORLD * LOCAL, 12, generator=generator) for name in ("query", "positive", "negative")}
    whole["positive"] = whole["query"] + whole["positive"]
    rows = slice(dist.get_rank() * LOCAL, (dist.get_rank() + 1) * LOCAL)
    own = [value[rows].clone().requires_grad_() for value in whole.values()]
    loss = load_loss("HardNegativeNLLLoss", scale=50.0)(*own)
    loss.backward()
    result = {**whole, "loss": loss.detach().clone()}
    for name, value in zip(whole, own, strict=True):
        grads = [torch.zeros_like(value) for _ in range(WORLD)]
        dist.all_gather(grads, value.grad / WORLD)
        result[f"{name}_grad"] = torch.cat(grads)
    return result


def train(folder: Path) -> None:
    """run_supervised.main over the files in ``folder``; rank 0 writes what came of it."""
    import run_supervised

    record: dict[str, Any] = {"loss": [], "lr": []}

    class Recorded(run_supervised.LLM2VecSupervisedTrainer):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            record["trainer"] = self
            if dist.get_rank() == 0:
                save_adapter(self.model.model, FOLDER / "adapter_start")

        def compute_loss(self, *args: Any, **more: Any) -> Any:
            loss = super().compute_loss(*args, **more)
            record["loss"].append(loss.item())  # of the global batch, on every rank
            record["lr"].append(self.lr_scheduler.get_last_lr()[0])
            return loss

        def training_step(self, *args: Any, **more: Any) -> Any:
            loss = super().training_step(*args, **more)
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= WORLD
            return loss

    run_supervised.LLM2VecSupervisedTrainer = Recorded
    paths = {"dataset_file_path": folder / "data", "cc3m": folder / "data/cc3m.csv", "output_dir": folder / "out"}
    settings = (
        SETTINGS | {name: str(path) for name, path in paths.items()} | {"model_name_or_path": str(FOLDER / "llm")}
    )
    (folder / f"settings-{dist.get_rank()}.json").write_text(json.dumps(settings))
    sys.argv = ["run_supervised.py", str(folder / f"settings-{dist.get_rank()}.json")]
    run_supervised.main()
    trainer = record.pop("trainer")
    if dist.get_rank() == 0:
        save_adapter(trainer.model.model, FOLDER / "adapter_end")
        texts = [sample.texts for sample in trainer.train_dataset]
        steps = [texts[i : i + WORLD * LOCAL] for i in range(0, len(texts), WORLD * LOCAL)]
        curve = {"learning_rate": LR, "loss_scale": 50.0, **record, "warmup": warmup_rates(), "texts": steps}
        (FOLDER / "curve.json").write_text(json.dumps(curve, indent=0) + "\n")


def save_adapter(model: Any, folder: Path) -> None:
    """PEFT's folder, without this machine's path and the model card's template."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": ""}, indent=1) + "\n")


def warmup_rates() -> dict[str, Any]:
    """Learning rates, as factors, of the Trainer's default schedule."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=4, num_training_steps=12)
    rates = []
    for _ in range(12):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return {"steps": 4, "total": 12, "factors": rates}


def sampler_facts(folder: Path) -> dict[str, Any]:
    """What a batch holds: counts over their data set, for batches of 32."""
    from dataset.E5_cc3m import E5_EMBEDDING_PROMPTS, E5Data

    write_data(folder, 4000, {"nq": 500, "allnli": 100}, rest=40)
    random.seed(42)
    data = E5Data(split="train", file_path=str(folder), effective_batch_size=32, extra_cc3m=str(folder / "cc3m.csv"))
    sources = [sample.task_name for sample in data.data]
    batches = [set(sources[i : i + 32]) for i in range(0, len(sources), 32)]
    captions = [sample for sample in data.data if sample.task_name == "cc3m"]
    prompts = E5_EMBEDDING_PROMPTS["cc3m"]
    short = [sample for sample in captions if sample.query.startswith(prompts[0])]
    kinds = Counter((sample.query.split()[-1][0], sample.positive.split()[-1][0]) for sample in captions)
    negatives = Counter((s.positive.split()[-1][0] == s.negative.split()[-1][0]) for s in captions)
    own = sum(sample.positive == sample.negative for sample in captions)
    return {
        "batch": 32,
        "batches": len(batches),
        "batches_of_one_source": sum(len(batch) == 1 for batch in batches),
        "samples": {"nq": 500, "allnli": 100, "cc3m": 4000},
        "batches_of_source": {n: sum(b == {n} for b in batches) for n in ("nq", "allnli", "cc3m", "fever")},
        "caption_pairs": len(captions),
        "short_to_long": len(short),
        "query_and_positive": {f"{query}->{positive}": count for (query, positive), count in kinds.items()},
        "negatives_of_the_positives_kind": negatives[True],
        "negatives_of_another_kind": negatives[False],
        "negatives_that_are_the_positive": own,
        "separate_instructions": len({s.query.split("!@#$%^&*()")[0] for s in captions}),
        "instructions_before_passages": sum(not s.positive.startswith("!@#$%^&*()") for s in captions),
    }


def rank_main(rank: int, authors: str, folder: str) -> None:
    sys.path.insert(0, f"{authors}/llm_caption_contrastive")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29541", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    from accelerate import PartialState

    PartialState(cpu=True, backend="gloo")  # before run_supervised makes one without these
    gathers_on_cpu()
    if rank == 0:
        write_data(Path(folder) / "data", CAPTIONS, ROWS)
        write_llm(FOLDER / "llm")
        (FOLDER / "sampler.json").write_text(json.dumps(sampler_facts(Path(folder) / "many"), indent=1) + "\n")
    dist.barrier()
    tensors = fixed_loss()
    if rank == 0:
        save_file(tensors, FOLDER / "loss.safetensors")
    train(Path(folder))
    dist.destroy_process_group()


if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    with tempfile.TemporaryDirectory() as temporary:
        torch.multiprocessing.spawn(rank_main, (str(Path(sys.argv[1]).resolve()), temporary), WORLD)
