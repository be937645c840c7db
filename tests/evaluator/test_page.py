"""The report in a real browser: plots drawn, sorting and filters work, nothing fetched, markup in
answers is text."""

import html
import json
import random
from pathlib import Path

import chromium
import pytest
from golden_mllm import MODELS, ROOT, answers
from PIL import Image

from llava_integration.evaluator.benchmarks.bench import main_score as score
from llava_integration.evaluator.benchmarks.benchmark import find_image
from llava_integration.evaluator.benchmarks.rules import benchmark
from llava_integration.evaluator.compare.command import main as compare
from llava_integration.evaluator.compare.comparison import build
from llava_integration.evaluator.compare.page import picture_folders
from llava_integration.evaluator.compare.sides import load_side
from llm2clip_plugin.contracts import ScoreFile

HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"></script>"
    "<script>document.title='owned'</script> & <b>red</b>"
)


def write_sides(folder, items_of, benchmark="our own", **about):
    """Score files of two sides; returns the words of their comparison."""
    for number, name in enumerate(("old", "new")):
        more = {field: values[number] for field, values in about.items()}
        record = ScoreFile(
            benchmark=benchmark, metrics={}, items=items_of(number), model=name, **more
        )
        record.write(folder / name / "own.scores.json")
    return [str(folder / "old"), str(folder / "new"), "--output", str(folder)]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Three benchmarks of both models, with pictures for GQA's and a hostile answer; returns the
    page's path."""
    folder = tmp_path_factory.mktemp("report")
    data = folder / "eval" / "gqa"
    (data / "data" / "images").mkdir(parents=True)
    questions = json.loads(
        (ROOT / "gqa" / "data" / "testdev_balanced_questions.json").read_text(
            encoding="utf-8"
        )
    )
    (data / "data" / "testdev_balanced_questions.json").write_text(
        json.dumps(questions)
    )
    for number, entry in enumerate(questions.values()):
        if number % 2:  # half of the pictures are there
            size = (random.Random(number).randint(40, 900), 300)
            Image.new("RGB", size, (number % 255, 80, 120)).save(
                data / "data" / "images" / f"{entry['imageId']}.jpg"
            )
    for model in MODELS:
        rows = [
            json.loads(line)
            for line in answers("gqa", model).read_text(encoding="utf-8").splitlines()
        ]
        if model == "model-a":
            # was right, so the question is one where they disagree
            rows[0]["text"] = HOSTILE
        path = folder / f"{model}.jsonl"
        path.write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
        score(
            [
                "gqa",
                "--data",
                str(data),
                "--answers",
                str(path),
                "--json",
                str(folder / model / "gqa.scores.json"),
                "--model",
                model,
            ]
        )
        for name in ("pope", "mme"):
            score(
                [
                    name,
                    "--data",
                    str(ROOT / name),
                    "--answers",
                    str(answers(name, model)),
                    "--json",
                    str(folder / model / f"{name}.scores.json"),
                ]
            )
    compare(
        [
            str(folder / "model-a"),
            str(folder / "model-b"),
            "--output",
            str(folder / "out"),
        ]
    )
    return folder / "out" / "compare.html"


def test_page_needs_nothing_from_elsewhere(report):
    text = report.read_text(encoding="utf-8")
    linked = text.replace("http://www.w3.org/2000/svg", "")
    assert not any(word in linked for word in ("http://", "https://", "//cdn"))
    assert "src=" not in text.replace("picture.src =", "").split('id="data"')[0]
    policy = html.unescape(
        text.split('Content-Security-Policy" content="')[1].split('"')[0]
    )
    assert policy.startswith(
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:;"
    )
    assert "script-src 'sha256-" in policy
    # escaped inside the data, never markup
    assert HOSTILE not in text
    assert "\\u003cimg src=x" in text


def embedded(report):
    text = report.read_text(encoding="utf-8")
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


# Elements that reach over the edge of the page, other than in a table that scrolls by itself.
CUT_OFF = """
[...document.querySelectorAll('main *')].filter(element => {
  if (element.closest('.wide')) return false;
  const box = element.getBoundingClientRect();
  return box.width > 0 && (box.left < -1 || box.right > innerWidth + 1);
}).map(element => element.tagName + ' ' + element.textContent.slice(0, 40))"""
INPUT = "document.getElementById('controls').dispatchEvent(new Event('input'))"


@pytest.mark.skipif(
    chromium.find() is None,
    reason="no Chromium here: apt-get install chromium, then this test runs",
)
@pytest.mark.parametrize("width", [390, 1280])
def test_page_in_chromium(report, width):
    data = embedded(report)
    with chromium.Chromium() as browser:
        browser.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        browser.open(report.as_uri())
        run = browser.run
        # drawings: every difference has a mark; nothing is cut off
        drawn = (
            "[...document.querySelectorAll('.interval circle')]"
            ".map(c => c.getBoundingClientRect().width > 2)"
        )
        assert run(drawn) == [True] * 3
        # and is whole without scrolling, also where names are long
        run(
            "document.querySelectorAll('#differences td:first-child').forEach("
            "cell => { cell.textContent = 'a_benchmark_with_a_long_name exact_match'; })"
        )
        right_ends = (
            "[...document.querySelectorAll('.interval')].map(i "
            "=> i.getBoundingClientRect())"
        )
        assert run(
            f"{right_ends}.every(box => box.left >= 0 && box.right <= innerWidth)"
        )
        run("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        assert run(CUT_OFF) == []
        # the hostile answer is text, in the card and nowhere as an element
        run("document.getElementById('filter-text').value = 'onerror'; " + INPUT)
        assert run("document.querySelectorAll('.card').length") == 1
        assert HOSTILE in run("document.querySelector('.card').textContent")
        assert (
            run(
                "document.querySelectorAll('.card .answer img, .card script, .card b b').length"
            )
            == 0
        )
        # filters: by benchmark, by outcome; the counts are the data's
        run("document.getElementById('filter-text').value = ''")
        run("document.getElementById('filter-benchmark').value = 'GQA'; " + INPUT)
        count = sum(question["benchmark"] == "GQA" for question in data["questions"])
        assert run("document.getElementById('shown').textContent").startswith(
            f"{count} of {len(data['questions'])}"
        )
        run("document.getElementById('filter-outcome').value = 'base'; " + INPUT)
        lost = [
            q
            for q in data["questions"]
            if q["benchmark"] == "GQA" and q["scores"][0] > q["scores"][1]
        ]
        assert run("document.getElementById('shown').textContent").startswith(
            f"{len(lost)} of"
        )
        assert run("document.querySelectorAll('.card img').length") > 0
        assert run(
            "[...document.querySelectorAll('.card img')]"
            ".every(i => i.complete && i.naturalWidth > 0)"
        )
        # pages
        run("document.getElementById('controls').reset(); " + INPUT)
        first = run("document.querySelector('.card').textContent")
        run("document.getElementById('next').click()")
        assert run("document.querySelector('.card').textContent") != first
        assert browser.errors == []
        assert [url for url in browser.requests if not url.startswith("data:")] == [
            report.as_uri()
        ]
        # and if markup did get in, the policy would not run it
        run(
            "const s = document.createElement('script'); "
            "s.textContent = 'document.title = \"owned\"';"
            "document.body.append(s)"
        )
        assert run("document.title") != "owned"
        assert any("Content Security Policy" in error for error in browser.errors)


def many_benchmarks(folder, *more):
    """The page of a comparison on 50 benchmarks, some with long names."""
    for name in ("old", "new"):
        lines = ["item,score,task"]
        for task in range(50):
            title = f"a_benchmark_with_a_long_name_{task}_exact_match_of_what_is_said"
            if task % 5:
                title = f"task {task}"
            for item in range(12):
                score = int((item + task) % 3 > 0 or (name == "new" and item < 4))
                lines.append(f"{item},{score},{title}")
        (folder / f"{name}.csv").write_text("\n".join(lines))
    tables = [str(folder / f"{name}.csv") for name in ("old", "new")]
    compare([*tables, "--output", str(folder / "out"), *more])
    return folder / "out" / "compare.html"


def test_fifty_benchmarks_are_counted_not_listed(tmp_path):
    text = many_benchmarks(tmp_path).read_text(encoding="utf-8")
    first_lines = text[text.index('class="verdict"') : text.index("<section>")]
    assert "no difference shown on 50 of 50 benchmarks" in first_lines
    # benchmarks are rows of the scores, sides columns
    scores = text[text.index('id="scores"') :]
    assert scores[: scores.index("</table>")].count("<tr>") == 51


@pytest.mark.skipif(chromium.find() is None, reason="no Chromium here")
def test_fifty_benchmarks_in_chromium(tmp_path):
    """Intervals are whole without scrolling, at 1280 pixels each row with its verdict; the page
    itself never scrolls sideways."""
    page = many_benchmarks(tmp_path, "--names", "x" * 60, "y" * 60)
    right_ends = (
        "Math.max(...[...document.querySelectorAll('{}')]"
        ".map(node => node.getBoundingClientRect().right))"
    )
    with chromium.Chromium() as browser:
        for width in (1280, 390):
            browser.call(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=900,
                deviceScaleFactor=1,
                mobile=False,
            )
            browser.open(page.as_uri())
            assert browser.run("document.querySelectorAll('.interval').length") == 50
            inside = browser.run("document.documentElement.clientWidth")
            assert browser.run(right_ends.format(".interval")) <= inside
            assert browser.run("document.documentElement.scrollWidth") <= inside
            if width == 1280:
                last = right_ends.format("#differences td:last-child")
                assert browser.run(last) <= inside


def test_names_are_text_in_markdown(tmp_path):
    """Of sides and benchmarks, in headings, tables, notes and warnings."""
    name = "_a_ *b* <img src=x> [c](http://d) `e` ~f~ g_h"
    items = [{"id": n, "score": n % 2} for n in range(12)]
    counts = [{"answered": 12, "empty": 7}] * 2
    words = write_sides(tmp_path, lambda place: items, "<i>toy</i>", counts=counts)
    compare([*words, "--names", name, f"{name}2"])
    text = (tmp_path / "compare.md").read_text()
    for line in text.splitlines():
        for markup in (" <img", "<i>toy", "](http", " *b*"):
            assert markup not in line.replace("\\" + markup.strip(), ""), line
    heading = next(line for line in text.splitlines() if line.startswith("## "))
    escaped = r"\_a\_ \*b\* \<img src=x> \[c\](http://d) \`e\` \~f\~ g_h"
    assert heading == f"## {escaped}2 (new) against {escaped} (base)"


def test_published_numbers_of_llava_are_for_its_models(tmp_path):
    """Not for a served model, whoever scored it."""
    items = [{"id": n, "score": n % 2} for n in range(12)]
    settings = {"endpoint": "http://localhost/v1"}
    for provenance, shown in (({}, True), ({"answer_settings": settings}, False)):
        sides = []
        for name in ("old", "new"):
            record = ScoreFile(
                benchmark="gqa",
                metrics={"accuracy_percent": 50.0},
                items=items,
                model=name,
                provenance=provenance,
            )
            sides.append(load_side(record.write(tmp_path / f"{name}.scores.json")))
        assert bool(build(sides).references) == shown


def test_what_makes_numbers_meaningless_comes_first(tmp_path, capsys):
    counts = [{"answered": 12, "empty": empty} for empty in (0, 7)]
    numbered = enumerate(("fp32", "bf16"))
    provenance = [
        {"precision": precision, "answer_settings": {"temperature": n}}
        for n, precision in numbered
    ]
    items = [{"id": n, "score": n % 2, "cluster": str(n)} for n in range(12)]
    compare(
        write_sides(
            tmp_path, lambda number: items, counts=counts, provenance=provenance
        )
    )
    first, *rest = capsys.readouterr().out.splitlines()
    assert "7 of the 12 answers of new" in first
    assert "old: fp32, new: bf16" in rest[0]
    assert "temperature" in rest[1]
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert text.index("7 of the 12 answers") < text.index('class="verdict"')


def test_pictures_are_found_by_option_and_never_outside(tmp_path):
    """A benchmark without a rule: its score file's word alone brings no picture into the page."""
    pictures = str(tmp_path / "pictures")
    (tmp_path / "pictures").mkdir()
    for n in range(12):
        Image.new("RGB", (64, 64), (20 * n, 0, 0)).save(
            tmp_path / "pictures" / f"{n}.png"
        )

    def items(number):  # every second question is won, the others lost
        about = {"question": "which?", "answer": "x", "truth": "x"}
        return [
            {"id": n, "score": (n + number) % 2, "image": f"{n}.png", **about}
            for n in range(12)
        ]

    arguments = write_sides(tmp_path, items, provenance=[{"data": pictures}] * 2)

    def pictured(*more):
        compare([*arguments, *more])
        return [
            bool(question["image"])
            for question in embedded(tmp_path / "compare.html")["questions"]
        ]

    assert pictured() == [False] * 12
    note = "12 of 12 pictures were not found; pass their folder with --image-folder"
    text = (tmp_path / "compare.html").read_text()
    # where they are missing
    assert (
        text.index("Where they disagree") < text.index(note) < text.index("<h2>Notes")
    )
    assert pictured("--image-folder", pictures) == [True] * 12
    assert "were not found" not in (tmp_path / "compare.html").read_text()
    assert find_image(("",), tmp_path / "pictures", "../old/own.scores.json") is None
    with pytest.raises(ValueError, match="--image-folder"):
        compare([*arguments, "--image-folder", str(tmp_path / "nowhere")])


def test_data_that_were_not_scored_bring_no_picture(tmp_path):
    """A score file's folder is looked into only if its annotations have the digest that was
    scored."""
    (tmp_path / "private").mkdir()
    right = benchmark("gqa").data_digest(ROOT / "gqa")
    nothing = benchmark("gqa").data_digest(tmp_path / "private")
    for folder, digest, expected in (
        (ROOT / "gqa", right, [ROOT / "gqa"]),
        (ROOT / "gqa", "0" * 64, []),
        (tmp_path / "private", right, []),
        (tmp_path / "private", nothing, []),
    ):
        about = {"data": str(folder), "data_sha256": digest}
        record = ScoreFile(
            benchmark="gqa", metrics={}, items=[{"id": 1, "score": 1}], provenance=about
        )
        side = load_side(record.write(tmp_path / "gqa.scores.json"))
        assert picture_folders("gqa", side.runs["gqa"], None) == expected


def test_hostile_names_and_ids_stay_text(tmp_path):
    """Markup in a model's name, a category, an id or a question reaches neither HTML nor the script
    element's end."""

    def items(number):
        about = {
            "question": HOSTILE,
            "answer": HOSTILE,
            "truth": HOSTILE,
            "cluster": "x",
        }
        return [
            {
                "id": f"{HOSTILE}{n}",
                "score": (n + number) % 2,
                "category": f"{HOSTILE}{n % 2}",
                **about,
            }
            for n in range(6)
        ]

    words = write_sides(tmp_path, items, "simulated<b>")
    compare([*words, "--names", f"{HOSTILE}old", f"{HOSTILE}new"])
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "<img" not in text
    assert "<b>red" not in text
    assert text.count("<script") == 2


def test_answers_of_other_evaluators_are_shown(tmp_path):
    """Questions on which two logs disagree, with both answers: of the harness (a text, or the most
    likely option), VLMEvalKit and inspect_ai."""
    logs = Path(__file__).parent / "logs"
    for form in ("lm_eval", "lm_eval_group", "vlmevalkit", "inspect_ai"):
        for run, *_ in load_side(logs / form).runs.values():
            assert all(item.get("answer") for item in run.items), run.benchmark
            assert all(item.get("question") for item in run.items), run.benchmark
    for name, wrong in (("old", "no"), ("new", "")):
        text = next((logs / "lm_eval_group").glob("samples_toy_a*")).read_text()
        lines = list(map(json.loads, text.splitlines()))
        for line in lines[:3]:
            line["exact_match"] = float(not wrong)
            line["filtered_resps"] = [wrong or "yes"]
        folder = tmp_path / name
        folder.mkdir()
        log = folder / "samples_toy_2026-11-28T21-57-04.1.jsonl"
        log.write_text("\n".join(map(json.dumps, lines)))
    sides = [str(tmp_path / name) for name in ("old", "new")]
    compare([*sides, "--output", str(tmp_path / "out")])
    questions = embedded(tmp_path / "out" / "compare.html")["questions"]
    assert [question["answers"] for question in questions] == [["no", "yes"]] * 3
    assert [question["question"] for question in questions] == ["a0", "a1", "a2"]
