import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data import batches_by_tokens, clean, read_rows, take_share
from training.errors import TrainingError


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
    assert [row["text"] for row in read_rows(path, ("text",))] == ["a", "b"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"text": "a"}', "{"], "line 2: not JSON"),
        (['{"text": "a"}', '{"other": 1}'], "line 2: no field 'text'"),
        (['{"text": "a"}', "[1]"], "line 2: no field 'text'"),
        ([], "holds no rows"),
    ],
)
def test_names_file_and_line(tmp_path, lines, said):
    path = write(tmp_path / "rows.jsonl", lines)
    with pytest.raises(TrainingError, match=said) as error:
        list(read_rows(path, ("text",)))
    assert str(path) in str(error.value)


def test_a_missing_or_broken_file_is_said(tmp_path):
    with pytest.raises(TrainingError, match="no such file"):
        list(read_rows(tmp_path / "none.jsonl.gz", ()))
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(b"not gzip")
    with pytest.raises(TrainingError, match="cannot be read"):
        list(read_rows(broken, ()))


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
