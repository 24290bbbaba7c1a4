"""Every setting of the training commands, and the only place of theirs that reads the environment.

Each field is at once an environment variable (``WATTLE_TRAIN_RUNS``) and a flag (``--runs``).
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.graph import Scheme, check_bits
from models.manifest import NAME_PATTERN, Task
from training.errors import TrainingError, complaints

ENV_PREFIX = "WATTLE_TRAIN_"
DeviceKind = Literal["auto", "cpu", "cuda"]


class Settings(BaseSettings):
    """Settings of the training commands; each uses those that concern it."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True, env_ignore_empty=True)

    data: Path = Field(Path("data"), description="Folder of the data sets that recipes name.")
    runs: Path = Field(Path("runs"), description="Folder where each run keeps its tokenizer and checkpoint.")
    out: Path = Field(
        Path(__file__).parent.parent / "models" / "starters", description="Folder that exported models are put into."
    )
    max_parameters: int | None = Field(None, gt=0, description="Size the model to this many parameters.")
    max_mb: float | None = Field(None, gt=0, description="Size the model to this many megabytes of exported weights.")
    max_joules: float | None = Field(None, gt=0, description="Plan a training of at most this many joules.")
    hours: float | None = Field(None, gt=0, description="Plan a training of at most this many hours.")
    task: Task | None = Field(None, description="What a planned model is for.")
    threads: int = Field(0, ge=0, description="Threads of the training; 0 takes every core.")
    teacher_key: str | None = Field(None, description="Key for the endpoint whose model writes targets.")
    device: DeviceKind = Field("auto", description="Where to train: cpu, cuda, or auto: a GPU where there is one.")
    micro_batch_tokens: int | None = Field(
        None,
        gt=0,
        description="Padded tokens that are computed at once; a larger step is computed in parts, and the same.",
    )
    recompute: bool = Field(False, description="Save memory: compute activations again for the gradients.")
    compile: bool = Field(False, description="Compile the layers before training; for GPUs.")
    fsdp: bool = Field(False, description="Under torchrun, share the weights out instead of copying them (FSDP2).")
    recipe: str | None = Field(None, description="Recipe that lists the sets; the shipped one of the model's name.")
    limit: int | None = Field(
        None, ge=1, description="Score only the first rows of each set; have a teacher answer so many."
    )
    passages: int = Field(100_000, ge=1, description="Passages of the knowledge base that is searched for speed.")
    write: bool = Field(False, description="Write the scores into the model's manifest and card.")
    name: str | None = Field(
        None,
        pattern=NAME_PATTERN,
        description="What an imported model is called; by default what its source is, in small letters.",
    )
    scheme: Scheme = Field(
        "rowwise",
        description="How weights are stored: rowwise (8 or 7 bits), calibrated (the same, faster, with --texts), "
        "blockwise (8 or 4 bits), float16 (for GPUs) or none (32 bits).",
    )
    texts: Path | None = Field(
        None, description="Texts of the kind that an imported model will read, one a line, for the calibrated scheme."
    )
    bits: Literal["8", "7", "4"] = Field(
        "8",
        description="Bits of a weight: 4 are for the blockwise scheme, 7 for rowwise and calibrated ones, faster on "
        "processors without VNNI.",
    )
    block_size: Literal["16", "32", "64"] = Field(
        "64", description="Weights of the blockwise scheme that share a scale."
    )
    max_positions: int | None = Field(
        None, ge=2, description="Tokens of a text that an imported model holds, if it can; unset, 2048."
    )
    source_language: str | None = Field(None, description="Language that an imported model reads.")
    target_language: str | None = Field(None, description="Language that an imported translator writes.")

    @model_validator(mode="after")
    def _check_bits(self) -> Self:
        check_bits(self.scheme, int(self.bits))
        return self


def read_settings(**flags: str) -> Settings:
    """Settings from the environment, overruled by ``flags``. Raises ``TrainingError`` naming the setting."""
    try:
        return Settings(**flags)  # type: ignore[arg-type]  # pydantic reads each flag from its text
    except ValidationError as error:
        raise TrainingError(complaints(error)) from None
