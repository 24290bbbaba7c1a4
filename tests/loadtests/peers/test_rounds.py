from dataclasses import asdict
from pathlib import Path

from loadtests.peers.records import Records
from loadtests.peers.rounds import Contender, best_setting, turn
from loadtests.peers.table import PEERS, Setting, settings
from loadtests.peers.workloads import WORKLOADS

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


def test_every_equal_division_of_the_cores_is_tried() -> None:
    found = settings("generate", PEERS["llamacpp"], 4)
    assert [(setting.replicas, setting.threads) for setting in found] == [(4, 1), (2, 2), (1, 4)]
    assert {setting.batch_tokens for setting in settings("encode", PEERS["openvino"], 2)} == {512, 2048}
