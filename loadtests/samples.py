"""What is kept of each request of a run. Knows nothing of how it was asked."""

from dataclasses import asdict, dataclass
from typing import Any

from loadtests.dialects import Reply

BILL = ("active_j", "allocated_j", "gco2e", "quality", "settled")


@dataclass(slots=True)
class Sample:
    """One request; None is what is not known of it."""

    at_s: float
    """When it was due, seconds since the run began: in an open loop a late start counts as waiting."""
    task: str
    texts: int
    streamed: bool
    latency_ms: float
    """From when it was due to the last byte of its answer."""
    status: int | None = None
    """None where no answer came."""
    error: str | None = None
    """Why it failed; None where it was answered."""
    ttft_ms: float | None = None
    """To the first piece of text of a stream."""
    request_id: str | None = None
    model: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    queue_ms: float | None = None
    compute_ms: float | None = None
    active_j: float | None = None
    allocated_j: float | None = None
    gco2e: float | None = None
    quality: str | None = None
    settled: bool = False

    def take(self, reply: Reply) -> None:
        """What the answer says of itself."""
        for name in Reply.__slots__:
            setattr(self, name, getattr(reply, name))

    def take_bill(self, energy: dict[str, Any]) -> None:
        """A later bill, in place of the one that came with the answer."""
        for name in BILL:
            setattr(self, name, energy.get(name, getattr(self, name)))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
