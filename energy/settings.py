"""Every setting of the energy commands, and the only place of theirs that reads the environment.

Each field is at once an environment variable (``WATTLE_REPORT_SINCE``) and a flag of ``wattle energy report``.
"""

from pathlib import Path

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from energy.report import By

ENV_PREFIX = "WATTLE_REPORT_"


class Settings(BaseSettings):
    """Settings of ``wattle energy report``."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True, env_ignore_empty=True)

    since: str = Field(
        "24h", description="Requests that ended from then on: an age such as 24h or 7d, or an ISO 8601 time (UTC)."
    )
    until: str | None = Field(None, description="Requests that ended before then; unset, all of them.")
    by: By = Field("task", description="What is added up: task, model, key, hour or day.")
    ledger: Path | None = Field(None, description="The ledger to read; unset, the one that the service writes.")
    csv: Path | None = Field(None, description="File to write the table to, as CSV.")
    parquet: Path | None = Field(None, description="File to write the table to, as Parquet; needs the extra [report].")
    html: Path | None = Field(None, description="File to write a page with plots to.")


def read_settings(**flags: str) -> Settings:
    """Settings from the environment, overruled by ``flags``. Raises ``ValueError`` naming the setting."""
    try:
        return Settings(**flags)  # type: ignore[arg-type]  # pydantic reads each flag from its text
    except ValidationError as error:
        complaints = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise ValueError("; ".join(complaints)) from None
