"""What is kept of every bill beside the ledger: predictions, the day's budget, the dashboard's figures."""

import logging
from collections.abc import Mapping, Sequence

from energy.attribution import Coefficients
from energy.budget import EVERYONE, DailyBudgets, Standing
from energy.ledger import Ledger, LedgerUnreadable
from energy.live import Live
from energy.prediction import Predictor
from energy.types import Bills
from service.keys import Key
from service.metrics import UJ_PER_J, Metrics

_log = logging.getLogger(__name__)
LEARNED_FROM = 1000
"""Latest bills of the ledger that the predictor starts from."""


class Books:
    """The books of one service; methods may be called from any thread."""

    def __init__(
        self,
        metrics: Metrics,
        daily_budget_j: float | None = None,
        coefficients: Mapping[str, Coefficients] | None = None,
    ) -> None:
        """``daily_budget_j`` is for all requests together; None is no limit. ``coefficients`` are by model."""
        self._metrics = metrics
        self._daily_budget_j = daily_budget_j
        self.predictor = Predictor(coefficients)
        self.live = Live()
        self._daily_budgets = DailyBudgets()

    def restore(self, ledger: Ledger) -> None:
        """Take over what earlier processes have written; where that cannot be read, begin anew and say so."""
        began_s = self._daily_budgets.day_began_s
        try:
            past, spent_uj = ledger.latest(LEARNED_FROM), ledger.allocated_uj(began_s)
        except LedgerUnreadable as error:
            _log.warning("predictions and the day's budget begin anew: %s", error)
            return
        self.predictor.learn_past(reversed(past))
        for key, energy_uj in spent_uj.items():
            self._daily_budgets.spend(EVERYONE, energy_uj, began_s)
            if key is not None:
                self._daily_budgets.spend(key, energy_uj, began_s)

    def settled(self, bills: Sequence[Bills]) -> None:
        """Enter final bills."""
        self._daily_budgets.settled(bills)
        self.live.settled(bills)
        for record, relative_error in self.predictor.settled(bills):
            self._metrics.predicted(record.request, relative_error)

    def today(self) -> Standing | None:
        """Where the service stands in its daily budget; None where it has none."""
        return self._standing(EVERYONE, self._daily_budget_j)

    def today_of(self, key: Key) -> Standing | None:
        """Where a key stands in its own; None where it has none."""
        return self._standing(key.name, key.daily_budget_j)

    def _standing(self, key: str, limit_j: float | None) -> Standing | None:
        return None if limit_j is None else self._daily_budgets.standing(key, round(limit_j * UJ_PER_J))
