"""Grams of CO2e from joules, as in the SCI specification (ISO/IEC 21031). Knows nothing of meters or requests.

    operational = allocated kWh x PUE x grid intensity                                      (O = E x I)
    embodied    = carbon of making the machine x (time used / its life) x (share of it used)   (M = TE x TS x RS)

A request uses the share of the machine that its executor is, for as long as its steps last.
The zone of the grid is told by whoever runs the service, never guessed from the network.
"""

import difflib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from energy.clock import NS_PER_S
from energy.types import CarbonAssumptions

WORLD = "world average"
LIFE_YEARS = 4.0
"""Life of a server, as Cloud Carbon Footprint and Teads assume it."""
_GRID = Path(__file__).parent / "data" / "grid.tsv"
_SOURCE = "Our World in Data / Ember (CC BY 4.0), through CodeCarbon (MIT)"
_UJ_PER_KWH = 3_600_000_000_000
_S_PER_YEAR = 365.25 * 24 * 3600
Amount = TypeVar("Amount", float, NDArray[np.float64])


class UnknownZone(ValueError):
    """No grid intensity is known for a zone; the message says what to write instead."""


@dataclass(frozen=True, slots=True)
class _Country:
    iso3: str
    iso2: str
    name: str
    year: int
    gco2e_per_kwh: float
    generated_twh: float


class Carbon:
    """The carbon of a machine at one place."""

    def __init__(
        self,
        zone: str | None = None,
        pue: float = 1.0,
        embodied_kg: float | None = None,
        life_years: float = LIFE_YEARS,
        machine_share: float = 1.0,
    ) -> None:
        """``zone`` is an ISO 3166 code of two or three letters; None is the world average.

        ``embodied_kg`` is the carbon of making the whole machine, of which all executors together are
        ``machine_share``. Raises ``UnknownZone``.
        """
        label, intensity, source = _grid(zone)
        self.assumptions = CarbonAssumptions(label, intensity, source, pue, embodied_kg, life_years, machine_share)
        self._g_per_uj = pue * intensity / _UJ_PER_KWH
        self._g_per_ns = (embodied_kg or 0.0) * 1000 * machine_share / (life_years * _S_PER_YEAR * NS_PER_S)

    def gco2e(self, allocated_uj: Amount, machine_ns: Amount) -> Amount:
        """Grams for this much energy and for this much time of all executors, of one or of many at once."""
        return allocated_uj * self._g_per_uj + machine_ns * self._g_per_ns


def _grid(zone: str | None) -> tuple[str, float, str]:
    """Label, gCO2e per kWh and source."""
    countries = _countries()
    if zone is None:
        # What a kWh drawn somewhere in the world costs: the mean over countries, weighted by what they generate.
        generated = sum(country.generated_twh for country in countries)
        emitted = sum(country.gco2e_per_kwh * country.generated_twh for country in countries)
        years = sorted({country.year for country in countries if country.generated_twh >= 1})
        note = f"mean over {len(countries)} countries weighted by generation, mostly {years[-2]} and {years[-1]}"
        return WORLD, round(emitted / generated, 1), f"{_SOURCE}: {note}"
    code = zone.strip().upper()
    for country in countries:
        if code in (country.iso3, country.iso2):
            return country.iso3, country.gco2e_per_kwh, f"{_SOURCE}: {country.name}, {country.year}"
    names = {country.name.upper(): country for country in countries}
    near = [names[name] for name in difflib.get_close_matches(code, names, n=3)]
    hint = ", ".join(f"{country.iso3} for {country.name}" for country in near) or "DEU or DE for Germany"
    raise UnknownZone(f"no grid intensity for zone {zone!r}: write an ISO 3166 country code ({hint}), or none")


@cache
def _countries() -> tuple[_Country, ...]:
    with _GRID.open(encoding="utf-8") as file:
        next(file)
        rows = [line.rstrip("\n").split("\t") for line in file]
    return tuple(_Country(a, b, name, int(year), float(grams), float(twh)) for a, b, name, year, grams, twh in rows)
