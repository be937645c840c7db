"""llm2clip run --reading: which stages read the LLM so, what is refused, and what runs again."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tiny_data import make_shards, make_tower
from tiny_llm import save_tiny_llm
from tiny_reading import WIDTH, make_reading

from llm2clip_plugin.cli import main as cli
from llm2clip_plugin.contracts import CacheManifest, EncoderCard, TowerCard
from llm2clip_plugin.data.sources import open_source
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.evaluate.config import PROMPT_EOL
from llm2clip_plugin.stages.embed_config import EMBED
from llm2clip_plugin.stages.llm_config import FINETUNE_LLM
from llm2clip_plugin.stages.pipeline import main
from llm2clip_plugin.stages.pipeline_config import PipelineConfig
from llm2clip_plugin.stages.rerun import RunFolder, Stage
from llm2clip_plugin.stages.run_plan import movable, plan
from llm2clip_plugin.text.config import EncoderConfig, effective
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.post import POST_FILE, Post
from llm2clip_plugin.text.teacher import TeacherLLM


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, llm/, tower/ and reading/."""
    folder = tmp_path_factory.mktemp("run-reading")
    make_shards(folder / "data")
    make_tower(folder / "tower")
    save_tiny_llm(folder / "llm", "llama")
    make_reading(folder / "reading", folder / "llm")
    return folder


def configured(folder: Path, **more: str) -> PipelineConfig:
    names = {"path": "data", "output": "out"}
    names |= {name: name for name in ("llm", "tower", "reading")}
    given = {name: str(folder / place) for name, place in names.items()}
    return PipelineConfig(**{**given, **more})  # type: ignore[arg-type]


def planned(config: PipelineConfig, pairs: str) -> dict[str, Stage]:
    return {stage.name: stage for stage in plan(config, open_source(config), pairs)}


def encoder_options(stage: Stage) -> dict[str, str]:
    """Of a stage's words, those that say how an LLM is read."""
    names = (
        "attention pooling layer prompt query-prompt chat-template post-file adapter"
    )
    words = dict(zip(stage.words, stage.words[1:], strict=False))
    return {name: words[f"--{name}"] for name in names.split() if f"--{name}" in words}


READ = {
    "attention": "causal",
    "pooling": "last",
    "prompt": "Caption: ",
    "chat-template": PROMPT_EOL,
}


def test_stage_1_trains_in_the_reading_at_the_last_layer(tiny: Path):
    stages = planned(configured(tiny), "short:long")
    assert encoder_options(stages["stage 1"]) == READ | {"query-prompt": "Caption: "}
    # whose adapter's card says the rest
    for side in ("train", "validation"):
        adapter = str(tiny / "out" / "llm" / "adapter")
        assert encoder_options(stages[f"embed {side}"]) == {"adapter": adapter}
    parsed = FINETUNE_LLM.parse(stages["stage 1"].words[2:])
    assert (parsed.encoder.layer, parsed.encoder.query_prompt) == (-1, "Caption: ")


def test_without_stage_1_embed_reads_the_llm_exactly_so(tiny: Path, tmp_path: Path):
    stages = planned(configured(tiny), "")
    post = str(tiny / "reading" / POST_FILE)
    for side in ("train", "validation"):
        options = encoder_options(stages[f"embed {side}"])
        assert options == READ | {"layer": "1", "post-file": post}
    words = list(stages["embed train"].words[1:])
    words[1] = str(tiny / "data")
    words += ["--compute-dtype", "float32"]
    words[words.index("--cache") + 1] = str(tmp_path)
    assert cli(words) == 0
    teacher = CacheManifest.read(tmp_path / CacheManifest.FILE).teacher
    assert (teacher["layer"], teacher["chat_template"]) == (1, PROMPT_EOL)
    card = EncoderCard.read(tiny / "reading" / EncoderCard.FILE)
    assert teacher["post"] == card.post_sha256


def test_a_sentence_transformers_model_may_be_read_by_the_mean(
    tiny: Path, tmp_path: Path
):
    """Whose default is refused."""
    card = EncoderCard.read(tiny / "reading" / EncoderCard.FILE)
    mean = replace(card, pooling="mean", attention="bidirectional")
    mean.write(tmp_path / EncoderCard.FILE)
    (tmp_path / "modules.json").write_text("[]")
    config = configured(tiny, reading=str(tmp_path))
    for stage in (
        planned(config, "short:long")["stage 1"],
        planned(config, "")["embed train"],
    ):
        command = FINETUNE_LLM if stage.name == "stage 1" else EMBED
        encoder = command.parse(stage.words[2:]).encoder
        read, _ = effective(replace(encoder, llm=""), tmp_path, tiny / "none")
        assert (read.pooling, read.attention) == ("mean", "bidirectional")


def test_a_reading_without_post_processing_needs_no_file(tiny: Path, tmp_path: Path):
    card = EncoderCard.read(tiny / "reading" / EncoderCard.FILE)
    replace(card, post_sha256="").write(tmp_path / EncoderCard.FILE)
    stages = planned(configured(tiny, reading=str(tmp_path)), "")
    assert "post-file" not in encoder_options(stages["embed train"])


def test_a_tower_of_post_processed_embeddings_asks_for_the_file(tiny: Path):
    """Without it the error would name another LLM, which would not help."""
    post_file = str(tiny / "reading" / POST_FILE)
    fast = EncoderConfig(compute_dtype="float32")
    config = replace(fast, llm=str(tiny / "llm"), layer=1, post_file=post_file)
    sizes = {"hidden_size": 32, "num_layers": 2, "patch_size": 8, "image_size": 16}
    card = TowerCard(
        **sizes,
        family="clip",
        origin="tiny",
        has_cls=True,
        weights_sha256="",
        dual={"llm_width": WIDTH},
        # as it was recorded before towers held the file
        teacher=asdict(CaptionEncoder(config, "cpu").identity()) | {"post_file": ""},
    )
    with pytest.raises(ContractError, match="post-processing with --post-file"):
        _ = TeacherLLM(card, fast).encoder
    given = TeacherLLM(card, replace(fast, post_file=post_file)).encoder
    assert isinstance(given, CaptionEncoder)
    assert given.post is not None


def dry_run(folder: Path, *more: str) -> None:
    words = [str(folder / "data"), "--dry-run"]
    for name, place in {"llm": "llm", "tower": "tower", "output": "out"}.items():
        if f"--{name}" not in more:
            words += [f"--{name}", str(folder / place)]
    assert main([*words, *more]) == 0


def test_a_dry_run_says_how_the_llm_is_read(
    tiny: Path, capsys: pytest.CaptureFixture[str]
):
    dry_run(tiny, "--reading", str(tiny / "reading"))
    tuned = capsys.readouterr().out
    assert "attention causal, pooling last, layer last, post-processing no" in tuned
    assert '--chat-template \'This sentence: "{caption}"' in tuned
    dry_run(tiny, "--reading", str(tiny / "reading"), "--no-stage1")
    raw = capsys.readouterr().out
    assert "attention causal, pooling last, layer 1, post-processing yes" in raw


def refusal(folder: Path, *more: str) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        dry_run(folder, *more)
    assert "\n" not in str(error.value)
    assert not (folder / "out").exists()
    return str(error.value)


def test_what_is_no_reading_of_this_llm_is_refused_before_work(
    tiny: Path, tmp_path: Path
):
    none = refusal(tiny, "--reading", str(tmp_path))
    assert f"{tmp_path} has no llm2clip_encoder.json" in none
    assert f"--search --fit-on TRAIN --folder {tmp_path}`" in none
    other = save_tiny_llm(tmp_path / "other", "llama", seed=1)
    of_other = make_reading(tmp_path / "of-other", other)
    message = refusal(tiny, "--reading", str(of_other))
    assert f"is of {other} with weights" in message
    assert f"but --llm {tiny / 'llm'} has" in message
    reading = str(tiny / "reading")
    both = refusal(tiny, "--reading", reading, "--adapter", str(tmp_path))
    assert both.endswith("omit one of them")
    for damage, problem in (
        (lambda file: file.unlink(), POST_FILE),
        (lambda file: Post(torch.zeros(WIDTH)).save(file.parent), "has SHA-256"),
    ):
        damaged = tmp_path / "damaged"
        shutil.copytree(tiny / "reading", damaged, dirs_exist_ok=True)
        damage(damaged / POST_FILE)
        assert problem in refusal(tiny, "--reading", str(damaged))


def test_the_card_of_an_adapter_is_no_reading_and_is_not_overwritten(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    card = EncoderCard.read(tiny / "reading" / EncoderCard.FILE)
    replace(card, training={"steps": 3}).write(tmp_path / EncoderCard.FILE)
    with pytest.raises(ContractError, match="expected the folder of"):
        dry_run(tiny, "--reading", str(tmp_path))
    words = ["evaluate", "captions", str(tiny / "data"), "--llm", str(tiny / "llm")]
    words += ["--search", "--fit-on", str(tiny / "data"), "--folder", str(tmp_path)]
    assert cli(words) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert EncoderCard.read(tmp_path / EncoderCard.FILE).training == {"steps": 3}


class Recorded:
    """A run all of whose stages are complete, without having made anything."""

    def __init__(self, folder: Path, pairs: str) -> None:
        self.config = configured(folder)
        self.pairs = pairs
        for stage in self.stages:
            self.folder.begin(stage, [], {})
            self.folder.end(stage, 1.0)

    @property
    def folder(self) -> RunFolder:
        places = movable(self.config, open_source(self.config))
        return RunFolder(Path(self.config.output), places)

    @property
    def stages(self) -> list[Stage]:
        return plan(self.config, open_source(self.config), self.pairs)

    def first_stale(self) -> tuple[str, str]:
        stale = self.folder.stale(self.stages)
        return next(iter(stale.items()), ("", ""))


@pytest.mark.parametrize("pairs", ["short:long", ""])
def test_another_reading_runs_again_what_it_touches(
    tiny: Path, tmp_path: Path, pairs: str
):
    folder = tmp_path / "world"
    shutil.copytree(tiny, folder)
    make_reading(folder / "reading", folder / "llm")
    run = Recorded(folder, pairs)
    assert run.first_stale() == ("", "")
    moved = folder / "moved"
    (folder / "reading").rename(moved)
    run.config = replace(run.config, reading=str(moved))
    assert run.first_stale() == ("", "")
    post = moved / POST_FILE
    make_reading(moved, folder / "llm", mean=0.75)
    of_post = ("embed train", f"{post} changed since it was made")
    assert run.first_stale() == (("", "") if pairs else of_post)
    make_reading(moved, folder / "llm", layer=2, mean=0.5)
    of_layer = ("embed train", "--layer is 2, was 1")
    assert run.first_stale() == (("", "") if pairs else of_layer)
    make_reading(moved, folder / "llm")
    card = EncoderCard.read(moved / EncoderCard.FILE)
    replace(card, pooling="mean").write(moved / EncoderCard.FILE)
    first = "stage 1" if pairs else "embed train"
    assert run.first_stale() == (first, "--pooling last is gone")
    run.config = replace(run.config, reading="")
    assert run.first_stale()[0] == first
