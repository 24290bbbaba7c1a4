"""What a load test asks for: which tasks, how often, by whom, for how long. Knows nothing of HTTP."""

import math
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SHIPPED = Path(__file__).parent / "scenarios"
TaskName = Literal["translate", "generate", "answer", "sentiment", "summarize"]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class BadScenario(ValueError):
    """A scenario that cannot be run; the message says what to change."""


class Scenario(BaseModel):
    """One load test. Either ``users`` wait for their answers and think (closed loop), or requests arrive at a
    ``rate`` whatever becomes of the earlier ones (open loop)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = ""
    tasks: Annotated[dict[TaskName, Positive], Field(min_length=1)]
    """Weight of each task among the requests."""
    users: Annotated[int, Field(ge=1)] | None = None
    """Most users at once."""
    rate: Positive | None = None
    """Highest mean number of requests per second; gaps between them are exponential (Poisson arrivals)."""
    duration_s: Positive
    warm_up_s: Annotated[float, Field(ge=0)] = 2.0
    """Requests begun before are answered but not counted in the figures."""
    think_s: Annotated[float, Field(ge=0)] = 0.0
    """Mean time between an answer and the user's next request; log-normal, for people's pauses have a long tail."""
    shape: Literal["constant", "ramp", "spike"] = "constant"
    steps: Annotated[int, Field(ge=2)] = 8
    """Of a ramp: equal steps up to the peak."""
    spike_factor: Annotated[float, Field(gt=1)] = 5.0
    """Of a spike: the middle third has this many times the load of the others."""
    list_share: Share = 0.0
    """Share of the requests that hold a list of texts."""
    list_size: tuple[Annotated[int, Field(ge=2)], Annotated[int, Field(ge=2)]] = (2, 8)
    stream_share: Share = 0.0
    """Share of the single requests for written text that are streamed."""
    max_tokens: Annotated[int, Field(ge=1)] | None = 64
    """Most tokens of a generated text."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if (self.users is None) == (self.rate is None):
            raise ValueError("needs either users (closed loop) or rate (open loop)")
        if self.warm_up_s >= self.duration_s:
            raise ValueError(f"warm_up_s ({self.warm_up_s:g}) must be below duration_s ({self.duration_s:g})")
        if self.list_size[0] > self.list_size[1]:
            raise ValueError("list_size must be the least and the most texts, in this order")
        return self

    @property
    def peak(self) -> float:
        """Users, or requests per second."""
        return self.rate if self.rate is not None else float(self.users or 0)

    def level(self, at_s: float) -> float:
        """Users or requests per second at a time of the run."""
        if self.shape == "ramp":
            return self.peak * min(self.steps, 1 + math.floor(at_s * self.steps / self.duration_s)) / self.steps
        if self.shape == "spike" and not self.duration_s <= 3 * at_s < 2 * self.duration_s:
            return self.peak / self.spike_factor
        return self.peak


def read_scenario(name: str, **changes: Any) -> Scenario:
    """A shipped scenario by name or a TOML file by path, with ``changes`` that are not None over it.

    Giving users takes away a rate, and the other way round. Raises ``BadScenario``.
    """
    path = Path(name) if name.endswith(".toml") else SHIPPED / f"{name}.toml"
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        shipped = ", ".join(sorted(each.stem for each in SHIPPED.glob("*.toml")))
        raise BadScenario(f"no scenario {name!r}; shipped are {shipped}, or give the path of a .toml file") from None
    except (OSError, ValueError) as error:
        raise BadScenario(f"{path}: {error}") from error
    changes = {key: value for key, value in changes.items() if value is not None}
    for mine, other in (("users", "rate"), ("rate", "users")):
        if mine in changes:
            fields.pop(other, None)
    if "duration_s" in changes and "warm_up_s" not in changes:
        # A short run must not be eaten up by the warm-up that a long one has.
        changes["warm_up_s"] = min(fields.get("warm_up_s", 2.0), changes["duration_s"] / 5)
    try:
        return Scenario.model_validate({**fields, **changes})
    except ValidationError as error:
        complaints = (
            f"{'.'.join(map(str, each['loc']))} {each['msg'].removeprefix('Value error, ')}".strip()
            for each in error.errors()
        )
        raise BadScenario(f"scenario {name}: {'; '.join(complaints)}") from None


def read_tasks(text: str) -> dict[str, float]:
    """``translate=3,sentiment`` as weights. Raises ``BadScenario``."""
    weights = {}
    for part in text.split(","):
        task, _, weight = part.strip().partition("=")
        try:
            weights[task] = float(weight or 1)
        except ValueError:
            hint = "write, for example, translate=3,sentiment=1"
            raise BadScenario(f"--tasks: {weight!r} is no weight; {hint}") from None
    return weights
