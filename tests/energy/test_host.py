import platform
from pathlib import Path

import pytest

from energy.host import Moment, Neighbours, processor
from tests.energy.fakes import HeldClock, S


def test_others_are_what_the_machine_did_and_this_process_did_not(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    # user nice system idle iowait irq softirq steal; idle and waiting are no work, stolen time is another machine's.
    stat.write_text("cpu 100 10 50 9000 70 3 2 40 0 0\ncpu0 1 2 3\n")
    neighbours = Neighbours(stat)
    assert neighbours.busy_ns(10 * S, 5 * S, S) == 0
    stat.write_text("cpu 400 20 140 9999 99 8 7 99 0 0\ncpu0 1 2 3\n")
    # 4.1 s of CPU time, 1.1 of them ours, in two seconds.
    assert neighbours.busy_ns(12 * S, int(6.1 * S), S // 2) == int(0.75 * S)
    # The rate holds until a second has passed.
    assert neighbours.busy_ns(12 * S + 1, 9 * S, 2 * S) == 3 * S


def test_a_kernel_that_does_not_tell_means_none() -> None:
    assert Neighbours(Path("/nonexistent")).busy_ns(1, 1, S) == 0


def test_cores_that_others_kept_busy_between_two_moments(tmp_path: Path) -> None:
    stat, held = tmp_path / "stat", HeldClock()
    stat.write_text("cpu 100 10 50 9000 70 3 2 40 0 0\n")
    began = Moment.now(stat, held.clock)
    assert began.foreign_cores(began) is None
    held.run(2000, cpu_ms=1100)
    stat.write_text("cpu 400 20 140 9999 99 8 7 99 0 0\n")
    assert Moment.now(stat, held.clock).foreign_cores(began) == 1.5
    assert Moment.now(tmp_path / "gone", held.clock).foreign_cores(began) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("processor\t: 0\nmodel name\t: A CPU \nflags\t\t: fpu avx512_vnni\n\nprocessor\t: 1\n", "A CPU with VNNI"),
        ("model name\t: A CPU\nflags\t\t: fpu avx2\n", "A CPU without VNNI"),
        ("Features\t: fp asimd\n", platform.machine()),
    ],
)
def test_a_processor_is_told_with_what_8_bits_cost_it(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert processor(tmp_path / "cpuinfo") == said


def test_a_system_without_cpuinfo_has_a_processor_too(tmp_path: Path) -> None:
    assert processor(tmp_path / "gone") == (platform.processor() or platform.machine())
