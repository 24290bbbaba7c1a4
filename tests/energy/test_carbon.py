import pytest

from energy.carbon import Carbon, UnknownZone

KWH_UJ = 3_600_000_000_000


def test_a_zone_is_known_by_either_of_its_codes() -> None:
    for zone in ("DEU", "DE", " de "):
        assumptions = Carbon(zone).assumptions
        assert (assumptions.zone, assumptions.gco2e_per_kwh) == ("DEU", 380.95)
        assert "Germany, 2023" in assumptions.grid_source


def test_operational_carbon_is_energy_times_pue_times_intensity() -> None:
    assert Carbon("DEU", pue=1.5).gco2e(KWH_UJ // 2, machine_ns=0) == pytest.approx(0.5 * 1.5 * 380.95)


def test_without_a_zone_the_world_average_is_used_and_named() -> None:
    assumptions = Carbon().assumptions
    assert (assumptions.zone, assumptions.gco2e_per_kwh) == ("world average", 480.6)
    assert "212 countries weighted by generation" in assumptions.grid_source
    assert "CC BY 4.0" in assumptions.grid_source


def test_the_world_average_is_no_mean_of_countries() -> None:
    assert Carbon("NOR").assumptions.gco2e_per_kwh < 50 < Carbon("POL").assumptions.gco2e_per_kwh


def test_embodied_carbon_is_the_time_taken_of_the_machines_life() -> None:
    # A year and nothing else, of a machine of 1,000 kg that lives four.
    carbon = Carbon(embodied_kg=1000, life_years=4)
    assert carbon.gco2e(0, machine_ns=365.25 * 86400 * 1e9) == pytest.approx(250_000)


def test_embodied_carbon_counts_in_proportion_to_the_share_of_the_machine() -> None:
    # The SCI specification's own words: M = TE x TS x RS, here 1,000 kg x 1/4 x 1/10, beside O = E x I.
    carbon = Carbon("DEU", embodied_kg=1000, life_years=4, machine_share=0.1)
    year_ns = 365.25 * 86400 * 1e9
    assert carbon.gco2e(KWH_UJ, machine_ns=year_ns) == pytest.approx(380.95 + 25_000)
    assert carbon.assumptions.machine_share == 0.1


def test_embodied_carbon_that_nobody_stated_is_unknown_in_the_assumptions() -> None:
    assert Carbon().assumptions.embodied_kg is None
    assert Carbon().gco2e(0, machine_ns=1e9) == 0


@pytest.mark.parametrize(("zone", "hint"), [("germany", "DEU for Germany"), ("XX", "DE for Germany"), ("CAF", "ISO")])
def test_an_unknown_zone_says_what_to_write(zone: str, hint: str) -> None:
    with pytest.raises(UnknownZone, match=hint):
        Carbon(zone)
