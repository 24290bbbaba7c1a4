"""What the command hands to the process that runs Locust, as a JSON file."""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loadtests.scenario import Scenario
from loadtests.target import Target


@dataclass(frozen=True, slots=True)
class Plan:
    """One run."""

    name: str
    """Of the scenario."""
    scenario: dict[str, Any]
    target: str
    dialect: str
    out: str
    model: str | None = None
    path: str | None = None
    """Where all requests go, in place of the dialect's own paths."""
    streams: bool = True
    """Whether the server streams; else a scenario's streams are asked for in one piece."""
    allow_remote: bool = False
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; the key itself is never written."""
    seed: int = 0
    timeout_s: float = 120.0
    settle_s: float = 20.0
    notes: tuple[str, ...] = ()
    """What whoever reads the report should know of how the run was made."""

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    def without_streams(self, note: str) -> "Plan":
        """The same run with nothing streamed, and why."""
        return replace(self, streams=False, notes=(*self.notes, note))

    @property
    def api_key(self) -> str | None:
        """From the environment."""
        return os.environ.get(self.api_key_env) if self.api_key_env else None

    def read_scenario(self) -> Scenario:
        """The scenario, checked."""
        return Scenario.model_validate(self.scenario)

    def open_target(self, address: str | None = None) -> Target:
        """The server under test, or the one at ``address``. Raises ``BadTarget``."""
        return Target(address or self.target, allow_remote=self.allow_remote, api_key=self.api_key)


def read_plan(path: Path) -> Plan:
    """What ``Plan.write`` wrote."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    return Plan(**{**fields, "notes": tuple(fields["notes"])})
