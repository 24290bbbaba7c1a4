import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data import batches_by_tokens, clean, draw, mixed, read_rows, read_set, take_share
from training.errors import TrainingError
from training.formats import read_file
from training.recipe import SetRecipe

TEXT, LABELLED = (("text",),), (("text", "label"),)


def write(path, lines):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
    return path


def test_cleaning_keeps_lines_and_drops_what_nobody_sees():
    assert clean(" a\u0000b\u00a0 c\r\nd<br />e\u0301 ") == "ab c\nd\n\u00e9"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_reads_rows_and_skips_blank_lines(tmp_path, name):
    path = write(tmp_path / name, [json.dumps({"text": "a"}), "", json.dumps({"text": "b"})])
    assert [row["text"] for row in read_rows(path, TEXT)] == ["a", "b"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"text": "a"}', "{"], "line 2: not JSON"),
        (['{"text": "a"}', '{"other": 1}'], "line 2: no field 'text'"),
        (['{"text": "a"}', "[1]"], "line 2: not a JSON object"),
        (['{"text": null}'], "line 1: 'text' is null, not a text"),
        ([], "holds no rows"),
    ],
)
def test_names_file_and_line(tmp_path, lines, said):
    path = write(tmp_path / "rows.jsonl", lines)
    with pytest.raises(TrainingError, match=said) as error:
        list(read_rows(path, TEXT))
    assert str(path) in str(error.value)


def test_a_missing_or_broken_file_is_said(tmp_path):
    with pytest.raises(TrainingError, match="no such file"):
        list(read_rows(tmp_path / "none.jsonl.gz", TEXT))
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(b"not gzip")
    with pytest.raises(TrainingError, match="cannot be read"):
        list(read_rows(broken, TEXT))
    broken.write_bytes(gzip.compress(json.dumps({"text": "cut short " * 99}).encode())[:-20])
    with pytest.raises(TrainingError, match=r"jsonl\.gz, after line 0: cannot be read"):
        list(read_rows(broken, TEXT))


TABLE = [("text", "label"), ('he said, "fine"\nand left', "1"), ("sad", "0")]
STARS = {"path": "reviews", "split": "train", "labels": {"0": "negative", "1": "positive"}}


def write_table(path, rows, delimiter=","):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows(rows)


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("name", ["train.csv", "train.csv.gz", "train.tsv", "train.parquet", "train.jsonl"])
def test_every_format_reads_alike(tmp_path, name):
    folder = tmp_path / "reviews"
    folder.mkdir()
    names, *cells = TABLE
    rows = [dict(zip(names, row, strict=True)) for row in cells]
    if ".csv" in name:
        write_table(folder / name, TABLE)
    elif ".tsv" in name:
        rows[0]["text"] = 'he said, "fine" and left'
        (folder / name).write_text("".join("\t".join(row) + "\n" for row in [names, *(row.values() for row in rows)]))
    elif "parquet" in name:
        write_parquet(folder / name, [{**row, "label": int(row["label"])} for row in rows])
    else:
        write(folder / name, [json.dumps({**row, "label": int(row["label"])}) for row in rows])
    found = list(read_set(tmp_path, SetRecipe(**STARS), LABELLED, ("negative", "positive")))
    assert found == [{**rows[0], "label": "positive"}, {**rows[1], "label": "negative"}]


def test_labels_may_be_numbers_as_tables_with_gaps_have_them(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 5}\n{"text": "b", "label": 5.0}\n')
    assert [row["label"] for row in read_rows(tmp_path / "a.jsonl", LABELLED)] == ["5", "5"]


def test_columns_are_renamed_and_may_change_places(tmp_path):
    write_table(tmp_path / "own.csv", [("review", "text"), ("good", "positive")])
    part = SetRecipe(path="own.csv", split="train", columns={"text": "review", "label": "text"})
    assert list(read_set(tmp_path, part, LABELLED)) == [{"review": "good", "text": "good", "label": "positive"}]
    wrong = part.model_copy(update={"columns": {"text": "reviews"}})
    with pytest.raises(TrainingError, match=r"own\.csv, line 2: no field 'reviews'; it has review, text: name"):
        list(read_set(tmp_path, wrong, LABELLED))


def test_a_split_may_be_cut_into_files(tmp_path):
    for number, text in enumerate(["first", "second"]):
        write_parquet(tmp_path / f"train-0000{number}-of-00002.parquet", [{"text": text}])
    (tmp_path / "train_phrases.csv").write_text("text\nanother split\n")
    part = SetRecipe(path=".", split="train")
    assert [row["text"] for row in read_set(tmp_path, part, TEXT)] == ["first", "second"]
    (tmp_path / "train.csv").write_text("text\nagain\n")
    with pytest.raises(TrainingError, match=r"train\.csv; keep one of them"):
        list(read_set(tmp_path, part, TEXT))
    with pytest.raises(TrainingError, match=r"nor a folder with a test\.jsonl, \.csv, \.tsv, \.parquet"):
        list(read_set(tmp_path, SetRecipe(path=".", split="test"), TEXT))


def test_a_row_has_one_of_the_sets_of_fields(tmp_path):
    either = (("text",), ("prompt", "response"))
    path = write(tmp_path / "rows.jsonl", ['{"prompt": "a", "response": "b"}', '{"prompt": "a"}'])
    rows = read_rows(path, either)
    assert next(rows)["response"] == "b"
    with pytest.raises(TrainingError, match="line 2: no field 'text'; it has prompt"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"", "holds no rows"),
        ("a.csv", b"text\n", "holds no rows"),
        ("a.csv", b"text,text\na,b\n", "line 1: two columns have the same name"),
        ("a.csv", b"text,label\na,b\nc\n", "line 3: 1 cells, but 2 columns"),
        ("a.csv", b'text,label\n"a\nb",c\n"d,e\nf,g\n', "begins at line 4: unexpected end .*; is a quote not closed"),
        ("a.csv", b"text\ngut\nsch\xf6n\n", "line 3: byte 0xf6 is not UTF-8"),
        ("a.jsonl", b"\xff\xfe{\x00", "line 1: byte 0xff is not UTF-8"),
        ("a.tsv", b"title\tbody\na\tb\n", "line 2: no field 'text'; it has title, body"),
        ("a.parquet", b"PAR1 is not all", "cannot be read as Parquet"),
        ("a.xlsx", b"PK", "unknown format; known are .jsonl, .csv, .tsv, .parquet"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingError, match=said) as error:
        list(read_set(tmp_path, SetRecipe(path=name, split="train"), TEXT))
    assert name in str(error.value)


def test_parquet_without_its_library_is_said(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", [{"text": "a"}])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(TrainingError, match=r"Parquet needs pyarrow: pip install -e '\.\[train\]'"):
        list(read_file(tmp_path / "a.parquet"))


def test_a_spreadsheet_s_byte_order_mark_is_no_part_of_a_name(tmp_path):
    (tmp_path / "a.csv").write_bytes("text\nschön\n".encode("utf-8-sig"))
    assert list(read_rows(tmp_path / "a.csv", TEXT)) == [{"text": "schön"}]


def test_an_unknown_label_names_file_line_and_labels(tmp_path):
    path = write(tmp_path / "rows.jsonl", ['{"text": "a", "label": "good"}', '{"text": "b", "label": 3}'])
    with pytest.raises(
        TrainingError, match=r"rows\.jsonl, line 2: label '3' is none of good, bad; map it in `labels`"
    ):
        list(read_rows(path, LABELLED, known_labels=("good", "bad")))


@pytest.mark.parametrize(
    "answers",
    [
        [{"text": "sea", "start": 4}],
        [{"text": "sea", "answer_start": 4}],
        {"text": ["sea"], "answer_start": [4]},
        '[{"text": "sea", "start": 4}]',
    ],
)
def test_answers_come_in_every_form_of_squad(tmp_path, answers):
    path = write(tmp_path / "rows.jsonl", [json.dumps({"context": "the sea", "answers": answers})])
    (row,) = read_rows(path, (("context", "answers"),))
    assert row["answers"] == [{"text": "sea", "start": 4}]


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([{"text": "sea", "start": 3}], "the answer 'sea' does not stand at character 3 of its context"),
        ("somewhere", "'answers' is no list of"),
        ([{"text": "sea"}], "'answers' is no list of"),
    ],
)
def test_answers_must_be_in_their_context(tmp_path, answers, said):
    path = write(tmp_path / "rows.jsonl", [json.dumps({"context": "the sea", "answers": answers})])
    with pytest.raises(TrainingError, match=f"line 1: {said}"):
        list(read_rows(path, (("context", "answers"),)))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 200), st.integers(0, 3))
def test_every_sample_comes_once_within_the_budget(lengths, batch_tokens, epoch):
    batches = batches_by_tokens(lengths, batch_tokens, seed=1, epoch=epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[index] for index in batch) <= batch_tokens for batch in batches)
    assert batches == batches_by_tokens(lengths, batch_tokens, seed=1, epoch=epoch)


def test_epochs_differ_and_lengths_keep_company():
    lengths = [index % 40 + 1 for index in range(4000)]
    first, second = (batches_by_tokens(lengths, 400, seed=0, epoch=epoch) for epoch in (0, 1))
    assert first != second
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in first)
    assert padded < 1.1 * sum(lengths)


def test_shares():
    rows = [{"n": n} for n in range(10)]
    assert take_share(rows, 1.0, 0) == rows
    assert len(take_share(rows, 0.3, 0)) == 3
    more = take_share(rows, 2.5, 0)
    assert len(more) == 25
    assert more[:20] == rows * 2


def test_a_temperature_evens_sets_out_and_keeps_their_sum():
    assert mixed([900, 90, 10], 1.0) == [900, 90, 10]
    # Square roots are 30, 9.49 and 3.16.
    assert mixed([900, 90, 10], 2.0) == [703, 222, 74]
    assert mixed([900, 90, 10], 1e9) == [333, 333, 333]


@given(st.integers(1, 20), st.integers(1, 50), st.integers(0, 5))
def test_over_the_epochs_all_come_once_before_any_comes_twice(size, count, seed):
    drawn = [index for epoch in range(4) for index in draw(size, count, (seed,), epoch).tolist()]
    assert len(drawn) == 4 * count
    for begin in range(0, len(drawn) - size + 1, size):
        assert sorted(drawn[begin : begin + size]) == list(range(size))
