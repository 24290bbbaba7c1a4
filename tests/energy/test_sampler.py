import threading
import time

import pytest

from energy import sampler as sampler_module
from energy.sampler import Sampler


class Counted:
    """Counts readings and samples, and has something to settle for as long as told."""

    def __init__(self) -> None:
        self.awake = threading.Event()
        self.is_continuous = False
        self.settles = False
        self.readings = 0
        self.samples = 0
        self.sampled = threading.Semaphore(0)
        self.failure: Exception | None = None

    def read(self) -> None:
        self.readings += 1

    def sample(self) -> None:
        self.samples += 1
        self.sampled.release()
        if self.failure:
            raise self.failure


def wait(account: Counted, samples: int = 1) -> None:
    for _ in range(samples):
        assert account.sampled.acquire(timeout=5)


def test_samples_again_and_again_while_there_is_something_to_settle() -> None:
    account = Counted()
    account.settles = True
    with Sampler(account, interval_s=0.001):
        wait(account, 10)
    # In between the meters are read alone.
    assert 9 * (account.samples - 1) <= account.readings <= 9 * account.samples


def test_what_has_no_steps_is_read_when_it_is_settled() -> None:
    account = Counted()
    account.settles = account.is_continuous = True
    with Sampler(account, interval_s=0.0001):
        wait(account, 10)
    assert account.readings == 0


def test_sleeps_when_there_is_nothing_and_wakes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "IDLE_INTERVAL_S", 60.0)
    account = Counted()
    with Sampler(account, interval_s=0.001):
        wait(account)
        time.sleep(0.03)
        assert account.samples == 1
        account.awake.set()
        wait(account)
        time.sleep(0.03)
        assert account.samples == 2


def test_an_idle_machine_is_sampled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "IDLE_INTERVAL_S", 0.002)
    account = Counted()
    with Sampler(account, interval_s=0.001):
        wait(account, 5)


def test_whatever_comes_in_the_interval_is_not_an_early_sample() -> None:
    account = Counted()
    with Sampler(account, interval_s=60.0):
        wait(account)
        account.awake.set()
        time.sleep(0.03)
        assert account.samples == 1


def test_a_failure_is_logged_and_the_thread_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    account = Counted()
    account.settles = True
    account.failure = OSError("the meter is on fire")
    with Sampler(account, interval_s=0.001):
        wait(account, 3)
    assert "the meter is on fire" in caplog.text
