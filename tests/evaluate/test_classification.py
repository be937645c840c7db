"""Zero-shot classification, kNN and linear probe, from each layout of labelled images."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from evaluate_world import (
    COLOURS,
    square,
    tiny_dual,
    write_data,
    write_llm_and_tower,
    write_tower,
)
from tiny_clip import save_tiny_clip
from tiny_data import WIDTH, write_tar
from transformers import AutoTokenizer

from llm2clip_plugin.cli import main as cli
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.images import ImageConfig, Normalize, evaluation_pixels
from llm2clip_plugin.evaluate import classification as probes
from llm2clip_plugin.evaluate import labeled_images, zeroshot
from llm2clip_plugin.vision.towers import preprocessor_config

IMAGES = ImageConfig(size=32)
CPU = torch.device("cpu")


def write_folders(folder, shades=(0, 20, 40)):
    for colour in COLOURS:
        (folder / f"the_{colour}").mkdir(parents=True)
        for shade in shades:
            (folder / f"the_{colour}" / f"{shade}.png").write_bytes(
                square(colour, shade)
            )
    return folder


def write_tars(folder):
    members = []
    for number, colour in enumerate(COLOURS):
        for shade in (0, 30):
            name = f"s{number}{shade}"
            members += [
                (f"{name}.png", square(colour, shade)),
                (f"{name}.cls", str(number).encode()),
            ]
    write_tar(folder / "test" / "0.tar", members)
    (folder / "classnames.txt").write_text("\n".join(COLOURS) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text(
        "a {c} thing.\nall of it is {c}\n"
    )
    return folder / "test"


def colour_of(pixels):
    mean = (
        pixels.mean((2, 3)) * torch.tensor(IMAGES.std) + torch.tensor(IMAGES.mean)
    ) * 255
    return torch.cdist(mean, torch.tensor(list(COLOURS.values())).float()).argmin(1)


def test_classes_that_are_numbers_are_in_the_order_of_their_numbers(tmp_path):
    """So that the lines of a file of class names, which lists them so, fit."""
    for number in range(12):
        (tmp_path / "data" / str(number)).mkdir(parents=True)
        picture = tmp_path / "data" / str(number) / "a.png"
        picture.write_bytes(square("red", number))
    names = [f"name {number}" for number in range(12)]
    (tmp_path / "classnames.txt").write_text("\n".join(names))
    images = labeled_images.open_labeled_images(str(tmp_path / "data"))
    assert images.classes == [str(number) for number in range(12)]
    data = str(tmp_path / "data")
    assert zeroshot.read_class_names("", data, images.classes) == names
    rows = [
        json.dumps({"image": f"{number}/a.png", "caption": "a", "label": number})
        for number in range(12)
    ]
    (tmp_path / "data" / "rows.jsonl").write_text("\n".join(rows))
    from_field = labeled_images.open_labeled_images(f"{data}/rows.jsonl", "label")
    assert from_field.classes == images.classes
    assert labeled_images.in_order(["b", "10", "2"]) == ["10", "2", "b"]


def test_names_of_classes_in_another_order_are_refused(tmp_path):
    """As `ls` sorts them; other names than the classes' own are taken in the order of the file."""
    file = tmp_path / "classnames.txt"
    classes = ["Zebra", "ant_eater", "bear"]
    file.write_text("ant eater\nbear\nZebra\n")
    with pytest.raises(
        ValueError, match="name 1 is 'ant eater', but class 1 is 'Zebra'"
    ):
        zeroshot.read_class_names(str(file), str(tmp_path), classes)
    for names in (["zebra", "ant eater", "bear"], ["horse", "ant eater", "panda"]):
        file.write_text("\n".join(names))
        assert zeroshot.read_class_names(str(file), str(tmp_path), classes) == names
    file.write_text("1\n0\n")  # what the classes 0 and 1 show, as of digits
    assert zeroshot.read_class_names(str(file), "", ["0", "1"]) == ["1", "0"]


def features(feature, label):
    keys = [str(number) for number in range(len(label))]
    return labeled_images.ImageFeatures(
        feature_ND=feature, label_N=label, keys=keys, clusters=keys, broken=[]
    )


def test_each_layout_gives_the_same_images_and_labels(tmp_path):
    folders = labeled_images.open_labeled_images(
        str(write_folders(tmp_path / "folders"))
    )
    assert folders.classes == ["the_blue", "the_green", "the_red", "the_white"]
    assert len(folders.source) == 12
    assert (
        zeroshot.read_class_names("", str(tmp_path / "folders"), folders.classes)[2]
        == "the red"
    )
    tars = write_tars(tmp_path / "wds")
    from_tars = labeled_images.open_labeled_images(str(tars))
    assert [row.meta["class"] for row in from_tars.source.rows] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert zeroshot.read_class_names("", str(tars), from_tars.classes) == list(COLOURS)
    assert zeroshot.read_templates("", str(tars)) == [
        "a {c} thing.",
        "all of it is {c}",
    ]
    from_field = labeled_images.open_labeled_images(
        str(write_data(tmp_path / "data")), "colour", "colour"
    )
    assert from_field.classes == sorted(COLOURS)
    for images in (folders, from_tars, from_field):
        embedded = labeled_images.image_features(
            lambda pixels: F.one_hot(colour_of(pixels), 4), images, IMAGES, CPU, batch=5
        )
        colours = [
            list(COLOURS)[int(position)] for position in embedded.feature_ND.argmax(1)
        ]
        names = (
            list(COLOURS)
            if images is from_tars
            else [name.removeprefix("the_") for name in images.classes]
        )
        assert colours == [names[int(label)] for label in embedded.label_N]
    assert set(embedded.clusters) == set(COLOURS)


def test_names_by_class_or_in_order(tmp_path):
    classes = ["n01", "n02"]
    (tmp_path / "mapped.txt").write_text("n02\tcar\nn01\tten pence\nn03\tnothing\n")
    assert zeroshot.read_class_names(
        str(tmp_path / "mapped.txt"), str(tmp_path), classes
    ) == [
        "ten pence",
        "car",
    ]
    (tmp_path / "lacking.txt").write_text("n02\tcar\n")
    with pytest.raises(ValueError, match=r"lacking.txt .*'n01'"):
        zeroshot.read_class_names(str(tmp_path / "lacking.txt"), str(tmp_path), classes)


def test_a_class_is_the_mean_of_its_normalized_prompts(tmp_path):
    dual = tiny_dual()
    table = {
        text: torch.randn(WIDTH) * size
        for size, text in enumerate(("a x", "b x", "a y", "b y"), 1)
    }
    prompts = zeroshot.prompt_source(["x", "y"], ["a {c}", "b {}"], str(tmp_path))
    cache = SimpleNamespace(
        rows=lambda _, __, captions, key: torch.stack(
            [table[caption.text] for caption in captions]
        )
    )
    vectors = zeroshot.class_vectors(dual, prompts, cache)
    with torch.no_grad():
        for row, name in enumerate("xy"):
            both = dual.encode_text(
                torch.stack([table[f"a {name}"], table[f"b {name}"]])
            )
            assert torch.allclose(
                vectors[row], F.normalize(both.mean(0), dim=0), atol=1e-6
            )
    assert (
        zeroshot.prompt_source(["x", "z"], ["a {c}"], str(tmp_path)).name
        != prompts.name
    )


def test_accuracy_counts_each_class_the_same_in_the_mean_over_classes():
    classes = torch.eye(6)
    label = torch.tensor([0, 0, 0, 1, 2])
    image = torch.eye(6)[torch.tensor([0, 0, 0, 2, 2])] + 0.1 * torch.eye(6)[label]
    scores = zeroshot.classification_scores(features(image, label), classes, "abcdef")
    assert scores.metrics["acc1"] == pytest.approx(4 / 5)
    assert scores.metrics["acc5"] == 1.0
    assert scores.metrics["mean_per_class_recall"] == pytest.approx(2 / 3)
    assert [item["score"] for item in scores.items] == [1, 1, 1, 0, 1]
    assert scores.items[3]["part"] == "b"
    blind = zeroshot.classification_scores(
        features(torch.ones(5, 6), label), classes, "abcdef"
    )
    assert blind.metrics["acc1"] == pytest.approx(1 / 6)
    assert (
        "acc5"
        not in zeroshot.classification_scores(
            features(image[:, :3], label), classes[:3, :3], "abc"
        ).metrics
    )


def test_zero_shot_from_the_command_line(tmp_path, capsys):
    llm, tower = write_llm_and_tower(tmp_path)
    data = write_tars(tmp_path / "wds")
    out = tmp_path / "scores.json"
    words = ["evaluate", "zeroshot", str(tower), str(data), "--json", str(out)]
    assert cli(words) == 0, capsys.readouterr().err
    assert "8 images" in capsys.readouterr().out
    scores = ScoreFile.read(out)
    assert scores.counts == {"images": 8, "left_out": 0, "classes": 4}
    assert "acc5" not in scores.metrics
    assert scores.metrics["acc1"] == sum(item["score"] for item in scores.items) / 8
    llm.rename(tmp_path / "gone")  # the prompts are cached
    assert cli(words) == 0


def test_an_imported_clip_is_read_with_its_own_text_tower(tmp_path, capsys):
    """It has no adapter: the CLIP's own features of prompts and images decide, as in
    transformers."""
    model = save_tiny_clip(tmp_path / "clip", "clip")
    clip = tmp_path / "clip"
    imported = str(tmp_path / "imported")
    data = write_folders(tmp_path / "folders")
    before = tmp_path / "before.json"
    assert cli(["import", str(clip), "--output", imported]) == 0
    (tmp_path / "templates.txt").write_text("{c}\n")
    words = [
        "evaluate",
        "zeroshot",
        imported,
        str(data),
        "--cache",
        str(tmp_path / "prompts"),
        "--output",
        str(before),
    ]
    words += ["--templates", str(tmp_path / "templates.txt")]
    assert cli(words) == 2
    assert "--llm" in capsys.readouterr().err  # its card names no teacher
    assert cli([*words, "--llm", str(clip)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(clip)
    images = ImageConfig.from_preprocessor(preprocessor_config(Path(imported)))

    def normalized(output):
        return F.normalize(getattr(output, "pooler_output", output)[0], dim=0)

    with torch.no_grad():
        text_CD = []
        for name in sorted(COLOURS):
            ids = tokenizer(f"the {name}")["input_ids"]
            # the model's context: longer prompts would be cut alike
            assert len(ids) <= 20
            text_CD.append(
                normalized(model.get_text_features(input_ids=torch.tensor([ids])))
            )
        hits = {}
        for number, name in enumerate(sorted(COLOURS)):
            for file in sorted((data / f"the_{name}").iterdir()):
                pixels = torch.from_numpy(evaluation_pixels(file.read_bytes(), images))[
                    None
                ]
                image_D = normalized(
                    model.get_image_features(pixel_values=Normalize(images)(pixels))
                )
                hits[f"the_{name}/{file.name}"] = float(
                    (torch.stack(text_CD) @ image_D).argmax() == number
                )
    assert {item["id"]: item["score"] for item in ScoreFile.read(before).items} == hits


def test_knn_equals_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    train = features(
        torch.randn(60, 8, generator=generator),
        torch.randint(0, 5, (60,), generator=generator),
    )
    test = torch.randn(33, 8, generator=generator)
    expected = []
    for row in test:
        similarity = [
            float(F.cosine_similarity(row, other, dim=0)) for other in train.feature_ND
        ]
        nearest = sorted(range(60), key=lambda i: -similarity[i])[:7]
        votes = [0.0] * 5
        for i in nearest:
            votes[int(train.label_N[i])] += math.exp(similarity[i] / 0.07)
        expected.append(votes.index(max(votes)))
    assert probes.knn(train, test, 7).tolist() == expected
    assert len(probes.knn(train, test, 1000)) == 33


def test_the_linear_probe_is_at_the_optimum_and_generalizes():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (300,), generator=generator)
    centre = torch.randn(3, 10, generator=generator)
    feature = centre[label] + torch.randn(300, 10, generator=generator)
    weight = probes.fit_logistic(feature, label, 3, 0.01).requires_grad_()
    padded = F.pad(feature, (0, 1), value=1.0)
    (
        F.cross_entropy(padded @ weight, label) + 0.005 * weight[:-1].square().sum()
    ).backward()
    assert float(weight.grad.abs().max()) < 1e-4
    predicted = probes.linear_probe(
        features(100 + 1000 * feature[:200], label[:200]), 100 + 1000 * feature[200:]
    )
    bayes = probes.predict(weight.detach(), feature[200:])
    assert (
        float((predicted == label[200:]).float().mean())
        >= float((bayes == label[200:]).float().mean()) - 0.05
    )
    shuffled = label[torch.randperm(300, generator=generator)]
    blind = probes.linear_probe(features(feature[:200], shuffled[:200]), feature[200:])
    assert float((blind == shuffled[200:]).float().mean()) < 0.5


def test_a_prediction_of_the_linear_probe_depends_on_no_other_test_image():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (100,), generator=generator)
    feature = F.one_hot(label, 6) + torch.randn(100, 6, generator=generator)
    train = features(feature[:80], label[:80])
    test = feature[80:]
    together = probes.linear_probe(train, test).tolist()
    for predicted in (0, 1, 2):
        image = together.index(predicted)
        assert int(probes.linear_probe(train, test[image : image + 1])) == predicted


def test_penalties_are_compared_on_images_that_are_not_fitted(monkeypatch):
    fitted = []
    original = probes.fit_logistic

    def fit(feature_ND, label_N, classes, penalty):
        fitted.append(len(label_N))
        return original(feature_ND, label_N, classes, penalty)

    monkeypatch.setattr(probes, "fit_logistic", fit)
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(100, 4, generator=generator)
    label = torch.randint(0, 2, (100,), generator=generator)
    probes.linear_probe(features(feature, label), feature)
    *tried, last = fitted
    assert len(tried) == len(probes.PENALTIES)
    assert len(set(tried)) == 1
    assert 70 < tried[0] < 90  # a fifth is held out
    assert last == 100  # then all are fitted


def test_probe_from_the_command_line(tmp_path, capsys):
    tower = write_tower(tmp_path / "tower")
    train = write_folders(tmp_path / "train", (0, 5, 10))
    test = write_folders(tmp_path / "test", (15,))
    (test / "the_purple").mkdir()
    # taken for the first class
    (test / "the_purple" / "1.png").write_bytes(square("blue", 15))
    out = tmp_path / "scores.json"
    words = [
        "evaluate",
        "probe",
        str(tower),
        str(train),
        str(test),
        "--k",
        "3",
        "--json",
        str(out),
    ]
    assert cli(words) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "knn" in printed
    assert "linear" in printed
    assert "the_purple" in printed
    scores = ScoreFile.read(out)
    assert scores.counts == {"images": 5, "left_out": 0, "unseen_classes": 1}
    (unseen,) = [item for item in scores.items if item["part"] == "the_purple"]
    assert unseen["knn"] == unseen["linear"] == 0  # always wrong
    # flat colours: even a random tower tells them apart
    assert scores.metrics["knn"] >= 3 / 5
