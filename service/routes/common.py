"""What routes share: the service behind them, and what a bill looks like to a caller."""

from typing import cast

from fastapi import Request
from pydantic import BaseModel, Field

from energy.types import Bill, Quality
from service.core import Service

UJ_PER_J = 1_000_000


class Energy(BaseModel):
    """What a request cost; null is unknown, never zero."""

    active_j: float | None = Field(description="Joules above idle.")
    allocated_j: float | None = Field(description="Joules with the request's share of idle.")
    gco2e: float | None = Field(description="Grams of CO2-equivalent of the allocated energy.")
    quality: Quality = Field(description="How far to trust the figures; the weakest part names the whole.")
    settled: bool = Field(description="Whether they are final; GET /v1/energy/requests/{id} has the final ones.")


def energy_of(bill: Bill) -> Energy:
    """The bill in joules."""
    return Energy(
        active_j=_joules(bill.active_uj),
        allocated_j=_joules(bill.allocated_uj),
        gco2e=bill.gco2e,
        quality=bill.quality,
        settled=bill.settled,
    )


def service_of(request: Request) -> Service:
    """The service that the application's lifespan has built."""
    return cast(Service, request.app.state.service)


def _joules(energy_uj: int | None) -> float | None:
    return None if energy_uj is None else energy_uj / UJ_PER_J
