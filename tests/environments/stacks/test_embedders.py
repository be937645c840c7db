"""An exported dual encoder with mteb, sentence-transformers' trainer and faiss."""

import json
import re
import shutil
from pathlib import Path

import faiss
import mteb
import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from embedder_world import CAPTIONS, opened, pictures, png, write_dual
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from sentence_transformers import (
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    MultipleNegativesRankingLoss,
)
from tiny_llm import save_tiny_llm

from llm2clip_plugin.cli import main
from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.vision.towers import load_tower

ROOT = Path(__file__).parents[3]
EMOJI = ROOT / "llm2clip_plugin" / "data" / "emoji" / "validation-noto.tar"
LIMIT = 60


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tower directory, and its export with the LLM."""
    folder = tmp_path_factory.mktemp("embedder")
    llm = save_tiny_llm(folder / "llm", "llama")
    write_dual(folder, llm, projection_dim=32)
    command = [
        "export",
        str(folder / "tower"),
        "--output",
        str(folder / "out"),
        "--merge",
    ]
    assert main([*command, "--format", "sentence-transformers"]) == 0
    return folder


def emoji_task(direction: str) -> AbsTaskRetrieval:
    """The first built-in emoji with their short English captions, as a task of mteb."""
    source = open_source(SourceConfig(path=str(EMOJI)))
    images = []
    texts = []
    relevant: dict[str, dict[str, int]] = {}
    for number in range(LIMIT):
        sample = source[number]
        images.append(
            {
                "id": f"image-{number}",
                "image": {"bytes": sample.read_image(), "path": None},
            }
        )
        for caption in sample.captions:
            if (caption.kind, caption.language) != ("short", "en"):
                continue
            text = f"text-{len(texts)}"
            texts.append({"id": text, "text": caption.text})
            pair = (
                (text, f"image-{number}")
                if direction == "t2i"
                else (f"image-{number}", text)
            )
            relevant.setdefault(pair[0], {})[pair[1]] = 1
    of_images = Dataset.from_list(images).cast_column("image", Image())
    of_texts = Dataset.from_list(texts)
    queries, corpus = (
        (of_texts, of_images) if direction == "t2i" else (of_images, of_texts)
    )

    class Emoji(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=f"Emoji{direction.upper()}Retrieval",
            description="Built-in emoji and their names.",
            dataset={"path": "local/emoji", "revision": "1"},
            type="Any2AnyRetrieval",
            category=direction,
            modalities=["text", "image"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="hit_rate_at_1",
        )

        def load_data(self, **_) -> None:
            split = {
                "corpus": corpus,
                "queries": queries,
                "relevant_docs": relevant,
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return Emoji()


def test_mteb_finds_what_evaluate_finds(exported, tmp_path):
    scores = tmp_path / "scores.json"
    command = [
        "evaluate",
        str(exported / "tower"),
        str(EMOJI),
        "--cache",
        str(tmp_path / "cache"),
    ]
    captions = ["--kinds", "short", "--languages", "en", "--limit", str(LIMIT)]
    more = ["--compute-dtype", "float32", "--output", str(scores)]
    assert main([*command, *captions, *more]) == 0
    expected = json.loads(scores.read_text())["metrics"]
    model = SentenceTransformerEncoderWrapper(opened(exported / "out"))
    # it looks for them in the Hub's files
    model.mteb_model_meta.modalities = [
        "image",
        "text",
    ]
    for direction in ("t2i", "i2t"):
        result = mteb.evaluate(
            model, emoji_task(direction), cache=None, show_progress_bar=False
        )
        metrics = result.task_results[0].scores["test"][0]
        for k in (1, 5, 10):
            assert (
                abs(metrics[f"hit_rate_at_{k}"] - expected[f"{direction}_r{k}"]) < 1e-4
            )


def test_the_trainer_takes_it_and_its_tower_comes_back(exported, tmp_path):
    """Ten steps on four pictures: the loss falls, and what is saved embeds as what was trained."""
    model = opened(exported / "out")
    four = [{"bytes": png(picture), "path": None} for picture in pictures(4)]
    pairs = Dataset.from_dict({"image": four * 4, "caption": CAPTIONS[:4] * 4})
    settings = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=10,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        batch_sampler="no_duplicates",
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=settings,
        train_dataset=pairs.cast_column("image", Image()),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 10
    assert losses[-1] < 0.7 * losses[0]
    model.save_pretrained(str(tmp_path / "saved"))
    again = opened(tmp_path / "saved")
    inputs = [*pictures(), *CAPTIONS]
    assert np.allclose(again.encode(inputs), model.encode(inputs), atol=1e-5)
    before = load_tower(exported / "out" / "image_0_Transformer").state_dict()
    after = load_tower(tmp_path / "saved" / "image_0_Transformer").state_dict()
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) > len(before) / 2


def program(heading: str) -> str:
    """The first program below a heading of docs/embeddings.md."""
    page = (ROOT / "docs" / "embeddings.md").read_text(encoding="utf-8")
    return (
        page.partition(f"# {heading}\n")[2]
        .partition("```python\n")[2]
        .partition("```")[0]
    )


@pytest.fixture
def page_folder(exported, tmp_path, monkeypatch):
    """A folder in which the page's programs find what they name."""
    shutil.copytree(exported / "out", tmp_path / "out" / "l14-336")
    (tmp_path / "photos").mkdir()
    rows = ["file_name,caption"]
    for number, picture in enumerate(pictures(4)):
        picture.save(tmp_path / "photos" / f"{number}.jpg")
        rows.append(f"{number}.jpg,{CAPTIONS[number]}")
    (tmp_path / "photos" / "metadata.csv").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return tmp_path


def test_the_page_searches(page_folder, capsys):
    exec(
        compile(program("Search over your own pictures"), "docs/embeddings.md", "exec"),
        {},
    )
    assert len(re.findall(r"photos/\d\.jpg", capsys.readouterr().out)) == 4
    assert faiss.read_index("photos.faiss").ntotal == 4


def test_the_page_trains(page_folder):
    """As printed, but for two steps on the CPU."""
    text = program("Further training")
    assert "learning_rate=1e-5" in text
    little = 'max_steps=2, use_cpu=True, report_to="none", learning_rate=1e-5'
    text = text.replace("learning_rate=1e-5", little)
    exec(compile(text, "docs/embeddings.md", "exec"), {})
    opened(page_folder / "out" / "tuned").encode(["a"])


def test_the_page_names_tasks_that_mteb_has():
    (names,) = re.findall(r"get_tasks\(tasks=\[(.*?)\]", program("mteb"))
    assert len(mteb.get_tasks(tasks=re.findall(r'"(\w+)"', names))) == 2
