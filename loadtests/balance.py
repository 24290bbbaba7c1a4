"""Conservation seen from outside: bills, idle and named rest held against the meter. Pure arithmetic on scrapes."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from loadtests.samples import Sample

TOLERANCE = 0.01
"""A residual above this share of the meter is an alarm."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """A server's energy account at one time, in joules, all devices together."""

    settled_j: float
    """What the meter has counted and the server has assigned."""
    open_j: float
    """Counted but not assigned yet."""
    attributed_j: float
    unattributed_j: dict[str, float]
    """By reason."""
    sources: tuple[str, ...]

    @property
    def meter_j(self) -> float:
        """What the meter has counted."""
        return self.settled_j + self.open_j


@dataclass(frozen=True, slots=True)
class Balance:
    """What the server has assigned between two scrapes, in joules.

    ``meter_j`` = ``bills_j`` + the sum of ``rest_j`` + ``residual_j``.
    """

    meter_j: float
    bills_j: float
    """Of the requests of this run."""
    rest_j: dict[str, float]
    """Energy on no bill, by the server's reasons."""
    residual_j: float
    """What neither a bill of this run nor a named rest accounts for."""
    residual_share: float | None
    """Of the meter; None where the meter has not moved."""
    sources: tuple[str, ...]
    open_j: float
    """Of the energy until the load ended, what the server had still to assign: it is not in ``meter_j``."""

    @property
    def holds(self) -> bool:
        """Whether the residual is small enough."""
        return self.residual_share is not None and abs(self.residual_share) <= TOLERANCE


def read_scrape(exposition: str) -> Scrape | None:
    """The energy account in Prometheus' text format; None where the server shows none.

    Raises ``ValueError`` for a text that is not in that format.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    reasons: defaultdict[str, float] = defaultdict(float)
    sources = set()
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            sums[sample.name] += sample.value
            if sample.name == "wattle_unattributed_energy_joules_total":
                reasons[sample.labels["reason"]] += sample.value
            elif sample.name == "wattle_meter_energy_joules_total":
                sources.add(sample.labels["source"])
    if "wattle_meter_energy_joules_total" not in sums:
        return None
    return Scrape(
        settled_j=sums["wattle_meter_energy_joules_total"],
        open_j=sums["wattle_energy_residual_joules"],
        attributed_j=sums["wattle_attributed_energy_joules_total"],
        unattributed_j=dict(reasons),
        sources=tuple(sorted(sources)),
    )


def balance(before: Scrape, ended: Scrape, after: Scrape, samples: Sequence[Sample]) -> Balance:
    """Hold the bills of a run against the meter, between the scrapes before it and after it was settled.

    ``ended`` is the scrape when the load ended. Failed requests are billed too, where their bill was found.
    """
    meter_j = after.settled_j - before.settled_j
    bills_j = sum(sample.allocated_j for sample in samples if sample.allocated_j is not None)
    rest_j = {
        reason: after.unattributed_j[reason] - before.unattributed_j.get(reason, 0.0)
        for reason in sorted(after.unattributed_j)
    }
    residual_j = meter_j - bills_j - sum(rest_j.values())
    return Balance(
        meter_j=meter_j,
        bills_j=bills_j,
        rest_j=rest_j,
        residual_j=residual_j,
        residual_share=residual_j / meter_j if meter_j > 0 else None,
        sources=after.sources,
        open_j=max(0.0, ended.meter_j - after.settled_j),
    )
