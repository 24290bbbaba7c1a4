from dataclasses import asdict
from pathlib import Path

import pytest

from loadtests.peers import weights
from loadtests.peers.records import Records
from loadtests.peers.rounds import Contender, Plan, _contenders, best_setting, turn
from loadtests.peers.table import PEERS, Setting, settings
from loadtests.peers.workloads import SHAPES, WORKLOADS

CONTENDERS = [Contender(peer, peer.variants[0]) for peer in PEERS.values()][:3]


def test_everybody_computes_once_a_round_and_another_one_first() -> None:
    rounds = [turn(CONTENDERS, number) for number in range(4)]
    a, b, c = CONTENDERS
    assert rounds == [[a, b, c], [b, c, a], [c, a, b], [a, b, c]]
    assert turn([], 2) == []


def test_the_fastest_setting_counts_for_each_workload(tmp_path: Path) -> None:
    records = Records(tmp_path / "results.jsonl")
    contender, (one, other) = CONTENDERS[0], WORKLOADS[:2]
    times = {one.name: (1.0, 2.0), other.name: (2.0, 1.0)}
    choices = (Setting(2, 1, 512), Setting(1, 2, 512))
    for name, seconds in times.items():
        for setting, each in zip(choices, seconds, strict=True):
            records.add("try", workload=name, **contender.fields, setting=asdict(setting), seconds=each)
    assert [best_setting(records, contender, workload) for workload in (one, other)] == list(choices)


@pytest.mark.parametrize(
    ("shape", "bf16", "count"), [("minilm", 1e9, 1), ("minilm", 90e9, 2), ("generate-25m", 1e9, 2)]
)
def test_large_products_are_not_timed_in_imitated_bfloat16(
    shape: str, bf16: float, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "convert", lambda *_: None)
    records = Records(tmp_path / "results.jsonl")
    records.add("machine", rates={"fp32": 100e9, "bf16": bf16})
    plan = Plan(tmp_path, [], [], rounds=1, least_s=0.1, all_settings=True)
    found = _contenders(plan, [PEERS["huggingface"]], SHAPES[shape], records)
    assert [contender.variant.name for contender in found] == ["fp32", "bf16"][:count]
    assert len(records.find("absent", peer="huggingface", variant="bf16", shape=shape)) == 2 - count


def test_every_equal_division_of_the_cores_is_tried() -> None:
    found = settings("generate", PEERS["llamacpp"], 4)
    assert [(setting.replicas, setting.threads) for setting in found] == [(4, 1), (2, 2), (1, 4)]
    assert {setting.batch_tokens for setting in settings("encode", PEERS["openvino"], 2)} == {512, 2048}
