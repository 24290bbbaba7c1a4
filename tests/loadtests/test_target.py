"""The target: on this machine unless allowed, and asked for bills until they are final."""

import socket

import pytest

from loadtests.target import BadTarget, Target
from tests.loadtests.fakes import SETTLED_J, FakeServer, sample


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1", "127.0.0.1:1", "http://[::1]:1", "http://localhost:1/base/"]
)
def test_this_machine_is_a_target(address: str) -> None:
    assert Target(address).base.startswith("http://")


@pytest.mark.parametrize("address", ["http://192.0.2.1", "http://0.0.0.0:8000", "https://[2001:db8::1]:1"])
def test_another_machine_is_refused_unless_it_is_allowed(address: str) -> None:
    with pytest.raises(BadTarget, match="--allow-remote"):
        Target(address)
    assert Target(address, allow_remote=True).port


@pytest.mark.parametrize("address", ["ftp://127.0.0.1", "http://", "http://127.0.0.1:port"])
def test_what_is_no_address_says_so(address: str) -> None:
    with pytest.raises(BadTarget):
        Target(address)


def test_bills_are_settled_afterwards() -> None:
    fake = FakeServer()
    try:
        samples = [sample(request_id=f"req-{number}", allocated_j=9.0, settled=False) for number in range(20)]
        samples.append(sample(request_id=None, allocated_j=9.0, settled=False))
        Target(fake.address).settle(samples, patience_s=5)
        assert [each.allocated_j for each in samples] == [SETTLED_J] * 20 + [9.0]
        assert Target(fake.address).streams()
        assert Target(fake.address).models() == [{"name": "fake-en", "bits": 8}]
    finally:
        fake.close()


def test_a_server_that_is_gone_has_no_bills_and_does_not_live() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    target = Target(f"http://127.0.0.1:{port}")
    samples = [sample(request_id="req-1", allocated_j=9.0, settled=False)]
    target.settle(samples, patience_s=5)
    assert (samples[0].allocated_j, samples[0].settled) == (9.0, False)
    assert not target.is_alive() and target.scrape() is None and target.models() == [] and not target.streams()
