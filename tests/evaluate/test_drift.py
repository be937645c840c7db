"""Drift of a tower: the same measures as the single commands, paired; CKA against its definition; the page."""

import json
from pathlib import Path

import pytest
import torch
from evaluate_world import COLOURS, square, teacher, tiny_dual, write_cache, write_data, write_llm, write_tower
from tiny_clip import save_tiny_clip

from llm2clip_plugin import cli
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.sources.open import SourceConfig, open_source
from llm2clip_plugin.evaluate.similarity import linear_cka, partners
from llm2clip_plugin.text.embed import default_cache_folder
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.settings import EncoderConfig
from llm2clip_plugin.vision.export import export_tower


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labeled squares, a CLIP and its tower, two towers of an LLM, the second with other weights."""
    folder = tmp_path_factory.mktemp("drift")
    for part, shades in (("test", (0, 15, 30)), ("train", (5, 20, 40))):
        for colour in COLOURS:
            (folder / part / f"the_{colour}").mkdir(parents=True)
            for shade in shades:
                (folder / part / f"the_{colour}" / f"{shade}.png").write_bytes(square(colour, shade))
    save_tiny_clip(folder / "clip", "clip")
    assert cli.main(["import", str(folder / "clip"), "--output", str(folder / "imported")]) == 0
    llm = EncoderConfig(llm=str(write_llm(folder / "llm")), compute_dtype="float32")
    identity = vars(CaptionEncoder(llm, "cpu").identity())
    for name, noise in (("one", 0.0), ("other", 0.1)):
        dual = tiny_dual()
        with torch.no_grad():
            for parameter in dual.tower.parameters():
                parameter += noise * torch.randn_like(parameter)
        export_tower(dual, folder / name, origin="tiny", teacher=identity)
    return folder


def drift(folder: Path, before: str, after: str, *more: str) -> dict:
    """What the command writes."""
    page = folder / f"{before}-{after}.html"
    words = [str(folder / before), str(folder / after), "--data", str(folder / "test"), "--output", str(page)]
    assert cli.main(["evaluate", "drift", *words, "--cache", str(folder / "prompts"), *more]) == 0
    return json.loads(page.with_suffix(".json").read_text())


def test_it_measures_what_the_single_commands_measure(places: Path):
    train = str(places / "train")
    told = drift(places, "one", "other", "--train", train, "--linear", "--resamples", "50")
    changes = {change["measure"]: change for change in told["changes"]}
    assert list(changes) == ["zero-shot", "kNN", "linear"]
    for side, when in (("one", "before"), ("other", "after")):
        tower, scores = str(places / side), places / "scores.json"
        words = ["evaluate", "zeroshot", tower, str(places / "test"), "--output", str(scores)]
        assert cli.main([*words, "--cache", str(places / f"prompts-{side}")]) == 0
        assert changes["zero-shot"][when] == pytest.approx(ScoreFile.read(scores).metrics["acc1"])
        scores.unlink()
        assert cli.main(["evaluate", "probe", tower, train, str(places / "test"), "--output", str(scores)]) == 0
        probes = ScoreFile.read(scores).metrics
        assert [changes[name][when] for name in ("kNN", "linear")] == pytest.approx([probes["knn"], probes["linear"]])
        scores.unlink()
    for change in changes.values():
        counts = {name: change[name] for name in ("kept", "lost", "gained", "neither")}
        assert sum(counts.values()) == 12
        assert change["difference"]["mean"] * 12 == pytest.approx(counts["gained"] - counts["lost"])
        assert change["difference"]["mean"] == pytest.approx(change["after"] - change["before"])
    zero_shot = changes["zero-shot"]
    assert len(told["changed"]) == zero_shot["lost"] + zero_shot["gained"] > 0
    assert sum(one["lost"] for one in told["classes"]) == zero_shot["lost"]
    assert {one["name"] for one in told["classes"]} == {f"the {colour}" for colour in COLOURS}
    assert list(told["cka"]) == ["embeddings", "block 1", "block 2", "image feature"]
    assert all(-0.5 < value < 0.9999 for value in told["cka"].values())
    page = (places / "one-other.html").read_text()
    assert page.count("data:image/jpeg") == len(told["changed"]) and "<script" not in page


def test_a_tower_against_itself_has_not_moved(places: Path):
    told = drift(places, "one", "one", "--resamples", "50")
    change = told["changes"][0]
    assert change["difference"] | {"clusters": 0} == {"mean": 0, "low": 0, "high": 0, "level": 0.95, "clusters": 0}
    assert told["changed"] == [] and list(told["cka"].values()) == pytest.approx([1.0] * 4)


def test_a_clip_is_read_with_its_own_text_tower(places: Path):
    """The imported tower has no adapter: the CLIP's own features of prompts and images decide."""
    from PIL import Image
    from transformers import AutoTokenizer, CLIPModel

    from llm2clip_plugin.data.images import EvalTransform, ImageConfig
    from llm2clip_plugin.vision.preprocessor import preprocessor_config

    told = drift(places, "imported", "other", "--resamples", "50", "--clip", str(places / "clip"))
    assert "text tower of" in told["provenance"]["text"][0] and "LLM" in told["provenance"]["text"][1]
    model, tokenizer = CLIPModel.from_pretrained(places / "clip").eval(), AutoTokenizer.from_pretrained(places / "clip")
    transform = EvalTransform(ImageConfig.from_preprocessor(preprocessor_config(places / "imported")))
    names = sorted(f"the_{colour}" for colour in COLOURS)
    hits = 0
    with torch.no_grad():
        classes = []
        for name in names:
            ids = tokenizer(f"a photo of a {name.replace('_', ' ')}.")["input_ids"]
            ids = ids if len(ids) <= 20 else [*ids[:19], ids[-1]]
            output = model.get_text_features(input_ids=torch.tensor([ids]))
            classes.append(getattr(output, "pooler_output", output)[0])
        text = torch.nn.functional.normalize(torch.stack(classes), dim=1)
        for number, name in enumerate(names):
            for file in sorted((places / "test" / name).iterdir()):
                assert Image.open(file).size == (32, 32)
                output = model.get_image_features(pixel_values=transform(file.read_bytes())[None])
                hits += int((getattr(output, "pooler_output", output) @ text.T).argmax() == number)
    assert told["changes"][0]["before"] == pytest.approx(hits / 12)


def test_retrieval_of_both_sides_is_that_of_evaluate(tmp_path: Path):
    data, identity = write_data(tmp_path / "data"), teacher()
    write_cache(open_source(SourceConfig(path=str(data))), default_cache_folder(str(data), identity.fingerprint))
    tower, page = write_tower(tmp_path / "tower"), tmp_path / "page.html"
    words = ["evaluate", "drift", str(tower), str(tower), "--captions", str(data), "--group", "colour"]
    assert cli.main([*words, "--output", str(page), "--resamples", "50"]) == 0
    measured = {one["measure"]: one for one in json.loads(page.with_suffix(".json").read_text())["changes"]}
    scores = tmp_path / "scores.json"
    words = ["evaluate", str(tower), str(data), "--retrieval.group", "colour", "--output", str(scores)]
    assert cli.main([*words, "--resamples", "0"]) == 0
    metrics = ScoreFile.read(scores).metrics
    for measure, metric in (("image to text", "i2t_r1"), ("text to image", "t2i_r1")):
        assert measured[measure]["before"] == measured[measure]["after"] == pytest.approx(metrics[metric])


def test_cka_is_its_definition_and_ignores_rotation_and_scale():
    torch.manual_seed(0)
    one, other = torch.randn(60, 8), torch.randn(60, 200)
    rotation = torch.linalg.qr(torch.randn(8, 8))[0]
    assert linear_cka(one, 3 * one @ rotation + 5) == pytest.approx(1.0, abs=1e-5)
    assert abs(linear_cka(one, other)) < 0.1  # the biased estimator gives .3 here
    mixed = torch.cat([one, 0.5 * torch.randn(60, 8)], dim=1)
    center = torch.eye(60, dtype=torch.float64) - 1 / 60

    def off_diagonal(feature):
        gram = center @ feature.double() @ feature.double().T @ center
        return gram - torch.diag(gram.diagonal())

    def hsic(a, b):
        ones = torch.ones(60, dtype=torch.float64)
        total = (a @ b).trace() + (ones @ a @ ones) * (ones @ b @ ones) / (59 * 58) - 2 / 58 * (ones @ a @ b @ ones)
        return total / (60 * 57)

    a, b = off_diagonal(one), off_diagonal(mixed)
    assert linear_cka(one, mixed) == pytest.approx(float(hsic(a, b) / (hsic(a, a) * hsic(b, b)).sqrt()), abs=1e-9)
    assert partners(2, 4) == [0, 2, 4] and partners(3, 3) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="at least 4"):
        linear_cka(one[:3], other[:3])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to measure: add --data"),
        (["--data", "x", "--linear"], "--linear has no effect without --train"),
        (["--captions", "x", "--train", "y"], "--train y has no effect without --data"),
        (["--data", "x", "--output", "drift.txt"], "expected one that ends in .html"),
    ],
)
def test_wrong_input_is_one_error(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "xy":
        (tmp_path / name).mkdir()
    assert cli.main(["evaluate", "drift", "a", "b", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_tower_without_text_says_what_to_do(places: Path, capsys):
    words = ["evaluate", "drift", str(places / "imported"), str(places / "one"), "--data", str(places / "test")]
    assert cli.main([*words, "--clip", str(places / "llm")]) == 2
    assert "is not an image-text model" in capsys.readouterr().err
    assert cli.main(words) == 2
    assert "imported has no text side: give the CLIP that it was imported from with --clip" in capsys.readouterr().err
