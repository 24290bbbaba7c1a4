from pathlib import Path

from loadtests.peers.records import Records


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    records = Records(path)
    records.add("sample", peer="a", round=0)
    records.add("sample", peer="b", round=0)
    with path.open("a") as file:
        file.write('{"record": "sam')  # the machine went down here
    again = Records(path)
    assert again.find("sample", peer="b") == [{"record": "sample", "peer": "b", "round": 0}]
    assert again.find("sample", peer="b", round=1) == []
