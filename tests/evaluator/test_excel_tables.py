"""Tables of item and score in Excel's files are read as the same tables in CSV."""

import json
import zipfile

import openpyxl
import pytest

from llava_integration.evaluator.compare.command import main
from llava_integration.evaluator.compare.readers import Choices
from llava_integration.evaluator.compare.sides import load_side
from llm2clip_plugin.errors import ContractError


def excel(path, *rows, more_sheets=()):
    book = openpyxl.Workbook()
    for row in rows:
        book.worksheets[0].append(row)
    for name, cell in more_sheets:
        book.create_sheet(name).append([cell])
    book.save(path)
    return path


def scored(scores, *head):
    return [head or ("item", "score"), *enumerate(scores)]


BASE = [0, 1, 0, 0] * 20
NEW = [1, 1, 0, 1] * 20


def test_tables_of_excel_are_compared(tmp_path, capsys):
    base = excel(tmp_path / "base.xlsx", *scored(BASE))
    new = excel(tmp_path / "new.xlsx", *scored(NEW, "ID", "Correct"))
    assert main([str(base), str(new), "--output", str(tmp_path / "out")]) == 0
    assert "+50.00" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert (row["benchmark"], row["verdict"]) == ("scores", "better")


def test_a_table_of_excel_is_that_of_csv(tmp_path):
    """Also its groups, empty cells, cells of truth values, and a chosen score."""
    rows = [
        ("item", "score", "f1", "group"),
        ("a", True, 0.5, "x"),
        ("b", False, 0.25, None),
        ("c", True, 1, "x"),
    ]
    excel(tmp_path / "t.xlsx", *rows)
    lines = []
    for row in rows:
        cells = ["" if cell is None else str(cell) for cell in row]
        lines.append(",".join(cells))
    (tmp_path / "t.csv").write_text("\n".join(lines))
    ((of_excel,),) = load_side(tmp_path / "t.xlsx").runs.values()
    ((of_csv,),) = load_side(tmp_path / "t.csv").runs.values()
    assert of_excel.ids == of_csv.ids == ["a", "b", "c"]
    assert of_excel.scores == of_csv.scores == [1, 0, 1]
    assert of_excel.clusters == of_csv.clusters == ["x", "b", "x"]


def test_both_formats_of_a_table_are_one_run(tmp_path):
    """The same scores in a table of another name are another run."""
    head = ("item", "score", "task")
    rows = [head, *((number, score, "t") for number, score in enumerate(BASE))]
    excel(tmp_path / "a.xlsx", *rows)
    excel(tmp_path / "b.xlsx", *rows, ("more", 1, "t"))
    lines = [",".join(map(str, row)) for row in rows]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    (tmp_path / "c.csv").write_text("\n".join([*lines, ""]))
    side = load_side(tmp_path)
    assert len(side.runs["t"]) == 3
    copy = f"{tmp_path / 'a.xlsx'} is a copy of {tmp_path / 'a.csv'}"
    assert side.notes == (f"{copy}: not counted as another run of t",)


def edit_sheet(path, old, new):
    """Replace a text of the first sheet's XML."""
    name = "xl/worksheets/sheet1.xml"
    with zipfile.ZipFile(path) as archive:
        files = {file: archive.read(file) for file in archive.namelist()}
    assert old.encode() in files[name], files[name]
    files[name] = files[name].replace(old.encode(), new.encode())
    with zipfile.ZipFile(path, "w") as archive:
        for file, data in files.items():
            archive.writestr(file, data)


def test_values_of_formulas_are_read(tmp_path):
    """Excel saves what it computed last."""
    path = excel(tmp_path / "a.xlsx", ("item", "score"), ("a", "=1/2"))
    edit_sheet(path, "<f>1/2</f><v />", "<f>1/2</f><v>0.5</v>")
    ((run,),) = load_side(path).runs.values()
    assert run.scores == [0.5]


def test_a_wrong_size_of_a_sheet_loses_no_cells(tmp_path):
    """Some programs say that every sheet is A1."""
    path = excel(tmp_path / "a.xlsx", *scored(BASE))
    edit_sheet(path, '<dimension ref="A1:B81" />', '<dimension ref="A1" />')
    ((run,),) = load_side(path).runs.values()
    assert run.scores == BASE


def test_sheets_that_are_not_read_are_named(tmp_path, capsys):
    sheets = [("Summary", "mean"), ("Sheet3", None)]
    base = excel(tmp_path / "base.xlsx", *scored(BASE), more_sheets=sheets)
    ((run,),) = load_side(base).runs.values()
    (note,) = run.notes
    assert note.endswith("not Summary; save each sheet as a file")
    new = excel(tmp_path / "new.xlsx", *scored(NEW))
    assert main([str(base), str(new)]) == 0
    assert "not Summary" in capsys.readouterr().out


FAULTS = {
    "a title": (
        [("Our model",), ("item", "score"), (1, 1)],
        r"line 1 was taken for the header.*\(item, score\)",
    ),
    "a column twice": ([("item", "score", "score"), (1, 1, 0)], "2 columns score"),
    "no item": ([("item", "score"), (None, 1)], "line 2: no item"),
    "no score": ([("item", "score"), (1, None)], "line 2: score is None"),
    "an error of Excel": ([("item", "score"), (1, "#N/A")], "line 2: score is '#N/A'"),
    "a cell too many": ([("item", "score"), (1, 1, "see b")], "line 2: 3 cells, not 2"),
    "no rows": ([("item", "score")], "no items below its first line"),
    "an item twice": (
        [("item", "score"), (1, 1), (1, 0)],
        "item '1' twice|item 1 twice",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_table_is_named(tmp_path, fault):
    rows, message = FAULTS[fault]
    with pytest.raises(ContractError, match=message):
        load_side(excel(tmp_path / "a.xlsx", *rows))


def test_a_file_that_is_none_of_excels_is_called_that(tmp_path):
    path = tmp_path / "a.xlsx"
    path.write_text("item,score\n1,1\n")
    with pytest.raises(ContractError, match=r"a\.xlsx.*expected an Excel file"):
        load_side(path)


def test_a_chosen_score_of_excel(tmp_path):
    path = excel(tmp_path / "a.xlsx", ("item", "f1"), (1, 0.5), (2, 1))
    ((run,),) = load_side(path, choices=Choices(metric="f1")).runs.values()
    assert run.scores == [0.5, 1]


def test_a_table_of_vlmevalkit_with_items_stays_its_own(tmp_path):
    """Its tables may have columns that ours have, and are of one form, not two."""
    head = ("index", "id", "prediction", "hit", "score")
    excel(tmp_path / "toy_result.xlsx", head, (0, 7, "A", 1, 1), (1, 8, "B", 0, 0))
    excel(tmp_path / "toy.xlsx", ("index", "id", "score"), (0, 7, 1))
    ((run,),) = load_side(tmp_path).runs.values()
    assert run.ids == ["0", "1"]
