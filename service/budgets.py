"""What one request may spend: its texts as the predictor sees them, and the check that ends them in time.

Knows nothing of HTTP, nor of how a bill comes about.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from energy.prediction import Text, Written
from service.engine.types import FinishReason, Item, Output, ShouldStop, WriteItem, WriteOutput

CHECK_EVERY_TOKENS = 4
"""A look at the account costs microseconds, and a token on the smallest model hundreds."""


def to_predict(items: Sequence[Item]) -> list[Text]:
    """What the predictor knows of ``items`` before they run."""
    return [
        Text(len(item.input_ids), item.sampling.max_tokens, item.sampling.beams)
        if isinstance(item, WriteItem)
        else Text(len(item.input_ids))
        for item in items
    ]


def to_learn(outputs: Sequence[Output]) -> list[Written]:
    """What the predictor learns of them afterwards."""
    return [
        Written(len(output.output_ids), output.finish_reason == "stop")
        if isinstance(output, WriteOutput)
        else Written(0, ended=True)
        for output in outputs
    ]


def keep_within(items: Sequence[Item], budget_uj: int, spent_uj: Callable[[], int | None]) -> tuple[Item, ...]:
    """The same items, of which those that write end before the request has spent more than its budget.

    ``spent_uj`` is what it has cost so far, by all its items; None as long as that is unknown.
    """
    allowance = Allowance(budget_uj, spent_uj)
    return tuple(
        replace(item, should_stop=allowance.and_also(item.should_stop)) if isinstance(item, WriteItem) else item
        for item in items
    )


class Allowance:
    """The budget of a request that runs."""

    def __init__(self, budget_uj: int, spent_uj: Callable[[], int | None]) -> None:
        self._budget_uj, self._spent_uj = budget_uj, spent_uj
        self._last_uj: int | None = None
        self._over = False

    def and_also(self, should_stop: ShouldStop | None) -> ShouldStop:
        """A check for one of its texts: the text's own reason to end, or else the budget."""

        def check(ids: Sequence[int]) -> bool | FinishReason:
            if should_stop is not None and (reason := should_stop(ids)):
                return reason
            return "energy_budget" if self._is_over(len(ids)) else False

        return check

    def _is_over(self, written: int) -> bool:
        """Whether the budget would not last until the next look."""
        if not self._over and written % CHECK_EVERY_TOKENS == 0:
            now_uj = self._spent_uj()
            if now_uj is not None:
                stretch_uj = 0 if self._last_uj is None else now_uj - self._last_uj
                self._over = now_uj + stretch_uj > self._budget_uj
                self._last_uj = now_uj
        return self._over
