"""Every setting of the service, and the only place that reads the environment; plain values go inward.

Each field is at once an environment variable (``WATTLE_PORT``) and a flag of ``wattle serve`` (``--port``).
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import DirectoryPath, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from energy.carbon import LIFE_YEARS, Carbon
from service.gate import Page

ENV_PREFIX = "WATTLE_"
_OTHERS_PREFIXES = ("WATTLE_TRAIN_", "WATTLE_REPORT_")
"""Settings of other commands, which may stand in the same environment."""
STARTERS = Path(__file__).resolve().parent.parent / "models" / "starters"


def _state_folder() -> Path:
    """Where programs keep a user's state (XDG base directory specification)."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "wattle"


class Settings(BaseSettings):
    """Settings of ``wattle serve``; raises ``ValueError`` for a wrong value or an unknown name."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="forbid", frozen=True, env_ignore_empty=True, validate_default=True
    )

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 is every interface.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one.")
    models: Annotated[tuple[DirectoryPath, ...], NoDecode] = Field(
        (STARTERS,),
        min_length=1,
        description=f"Folders of models, or models themselves, separated by {os.pathsep!r}; earlier ones are "
        "preferred as defaults.",
    )
    model_aliases: Annotated[dict[str, str], NoDecode] = Field(
        {},
        description="Other names for models, as `gpt-4o-mini=generate-en`, separated by commas: for clients whose "
        "model is fixed.",
    )
    max_concurrent_requests: int = Field(
        default_factory=lambda: 24 * max(2, len(os.sched_getaffinity(0))),
        ge=1,
        description="Texts accepted at once, waiting or running, before the answer is 429; by default 24 for each "
        "core. More fill no batch much better, and wait longer.",
    )
    max_batch_tokens: int = Field(512, ge=1, description="Tokens of one forward pass, counted with padding.")
    max_model_mb: int = Field(
        8000,
        ge=1,
        description="Memory of one model in megabytes, weights and buffers; a larger one writes fewer texts at once, "
        "or is refused.",
    )
    max_models_mb: int | None = Field(
        None,
        ge=1,
        description="Memory of all models together in megabytes, counted like `max_model_mb`; those beyond it are "
        "loaded by the first request that needs them, in place of those idle longest. Unset, all are kept in memory.",
    )
    reuse_mb: int = Field(
        0,
        ge=0,
        description="Memory in megabytes for the outputs of texts that come again exactly alike; such a text is "
        "billed what it cost to find it. 0 computes every text.",
    )
    max_client_batch_size: int = Field(
        32,
        ge=1,
        description="Texts in one request; of texts to embed and of the examples of a classifier, how many are "
        "computed at once.",
    )
    max_queue_tokens: int = Field(
        262_144,
        ge=1,
        description="Tokens accepted at once before the answer is 429: at the door a token is four bytes of a "
        "request's body, in the queue it is one of the model's.",
    )
    max_key_share: float = Field(
        0.5, gt=0, le=1, description="Of what is accepted at once, the most that may be of one API key."
    )
    max_body_bytes: int = Field(2_000_000, ge=1, description="Size of a request's body before the answer is 413.")
    max_header_bytes: int = Field(
        16_384, ge=1024, description="Size of a request's headers, path and query before the answer is 431."
    )
    max_json_depth: int = Field(
        64, ge=8, description="Lists and objects inside each other in a request's body before the answer is 400."
    )
    request_timeout_s: float = Field(
        120.0,
        gt=0,
        description="Seconds that a request may take, waiting included, before the answer is 504; a request may ask "
        "for less.",
    )
    api_keys_file: Path | None = Field(
        None,
        description="TOML file of API keys, which `wattle add-key` writes; read again when it changes. Unset, nobody "
        "needs a key.",
    )
    public_pages: Annotated[tuple[Page, ...], NoDecode] = Field(
        (), description="Of `docs`, `dashboard` and `metrics`, those that need no key, separated by commas."
    )
    insecure: bool = Field(
        False, description="Listen on an address that others can reach although there are no API keys."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins whose pages may call the service from a browser, as `https://example.org`, separated by "
        "commas; `*` is every one.",
    )
    drain_timeout_s: float = Field(30.0, ge=0, description="Seconds that running requests get to finish at shutdown.")
    threads: int = Field(
        1,
        ge=1,
        description="Threads of each executor, pinned to as many cores. More write one text sooner, and serve fewer "
        "together.",
    )
    executors: int = Field(
        default_factory=lambda settings: max(1, len(os.sched_getaffinity(0)) // settings["threads"]),
        ge=1,
        description="Groups of cores that compute side by side; by default as many as the cores allow.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="Where models run: `cuda` is GPUs, `auto` those models that are stored as float16 on GPUs where "
        "there are any, and the others on the processor.",
    )
    gpus: Annotated[tuple[int, ...], NoDecode] = Field(
        (0,),
        min_length=1,
        description="Which GPUs, as `0,1`, in the order in which NVIDIA's driver counts them; one executor each.",
    )
    meter: Literal["auto", "nvml", "powercap", "estimate", "none"] = Field(
        "auto",
        description="Where joules are read from; auto takes the best that this machine lets us read. With `none` "
        "bills are unknown, and nothing is spent on sharing and foretelling them.",
    )
    powercap_root: Path = Field(
        Path("/sys/class/powercap"), description="Linux powercap tree (RAPL); in Docker, mount it and say where."
    )
    watts_per_core: float | None = Field(
        None, gt=0, description="Power of a busy core for the estimate; unset, the processor is looked up."
    )
    sample_interval_ms: int = Field(
        100, ge=20, le=100, description="Milliseconds between two readings of the meters while anything is computed."
    )
    grid_zone: str | None = Field(
        None,
        description="Electricity grid, as an ISO 3166 code such as DEU; unset, bills name the world average.",
    )
    pue: float = Field(1.0, ge=1.0, description="Power usage effectiveness of the site: total over computing energy.")
    embodied_kg: float | None = Field(
        None, ge=0, description="Kilograms of CO2e that making this machine cost; unset, no bill includes any."
    )
    life_years: float = Field(
        LIFE_YEARS, gt=0, description="Years that this machine lives; its embodied carbon is spread over them."
    )
    machine_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of this machine that the service has reserved; as much of its embodied carbon counts.",
    )
    daily_budget_j: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Joules that all requests together may cost in a day (UTC) before the answer is 429; unset, no "
        "limit.",
    )
    state: Path = Field(
        default_factory=_state_folder,
        description="Folder of what outlives the process: the ledger, who meters this machine, and calibrations of "
        "models in read-only folders.",
    )
    ledger: Path = Field(
        default_factory=lambda settings: settings["state"] / "ledger.sqlite",
        description="SQLite file with one record per request; where it cannot be written the service runs without.",
    )
    ledger_max_days: float = Field(90.0, gt=0, description="Days after which the ledger forgets a request.")
    ledger_max_mb: float = Field(
        1000.0, ge=1, description="Size of the ledger beyond which it forgets its oldest requests."
    )
    knowledge: Path = Field(
        default_factory=lambda settings: settings["state"] / "knowledge",
        description="Folder of the knowledge bases, one file each.",
    )
    max_documents: int = Field(100_000, ge=1, description="Documents in one knowledge base.")
    classifiers: Path = Field(
        default_factory=lambda settings: settings["state"] / "classifiers",
        description="Folder of the classifiers that callers make, one file each.",
    )
    log_texts: bool = Field(
        False,
        description="Log what is asked and answered, texts and all, in lines of JSON; otherwise no log holds any.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severity to log.")

    @field_validator("models", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(filter(None, value.split(os.pathsep))) if isinstance(value, str) else value

    @field_validator("public_pages", "cors_origins", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @field_validator("gpus", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        numbers = [number.strip() for number in value.split(",")]
        if not all(number.isdecimal() for number in numbers) or len(set(numbers)) < len(numbers):
            raise ValueError("must be the numbers of GPUs, each once, separated by commas")
        return tuple(map(int, numbers))

    @field_validator("model_aliases", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        pairs = [pair.partition("=") for pair in value.split(",")]
        if not all(alias.strip() and name.strip() for alias, _, name in pairs):
            raise ValueError("must be pairs alias=model, separated by commas")
        return {alias.strip(): name.strip() for alias, _, name in pairs}

    @field_validator("grid_zone")
    @classmethod
    def _is_known(cls, zone: str | None) -> str | None:
        Carbon(zone)
        return zone

    @model_validator(mode="after")
    def _a_full_request_fits(self) -> Self:
        if self.max_client_batch_size > self.max_concurrent_requests:
            raise ValueError("max_client_batch_size exceeds max_concurrent_requests: such a request could never run")
        return self


def read_settings(**flags: str) -> Settings:
    """Settings from the environment, overruled by ``flags``.

    Raises ``ValueError`` naming the setting; unknown ``WATTLE_`` variables are an error too, for a misspelt
    one would be ignored in silence.
    """
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    ours = [name.upper() for name in os.environ if name.upper().startswith(ENV_PREFIX)]
    unknown = sorted(name for name in ours if name not in known and not name.startswith(_OTHERS_PREFIXES))
    if unknown:
        raise ValueError(f"unknown environment variable {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    try:
        return Settings(**flags)  # type: ignore[arg-type]  # pydantic reads each flag from its text
    except ValidationError as error:
        raise ValueError("; ".join(_complaints(error))) from None


def _complaints(error: ValidationError) -> list[str]:
    """What is wrong with each setting, without what follows from that for others."""
    found = [each for each in error.errors() if each["type"] != "default_factory_not_called"]
    places = [each["loc"] for each in found]
    complaints = []
    for each in found:
        place, given = each["loc"], each["input"]
        if any(other != place and other[: len(place)] == place for other in places if place):
            continue  # a list is said to be too short where one of its entries is wrong
        name = f"{'.'.join(map(str, place))}: " if place else ""
        complaints.append(f"{name}{each['msg']}" + (f" ({given!r})" if isinstance(given, str) else ""))
    return complaints


def wants_traces() -> bool:
    """Whether OpenTelemetry's own variables ask for traces over OTLP."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "")
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return exporter == "otlp" or (not exporter and any(os.environ.get(name) for name in endpoints))
