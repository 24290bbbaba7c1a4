"""The artefact: a folder whose manifest names every file with its size and hash.

All that training and serving share; needs only the standard library and pydantic.
"""

import hashlib
import json
import math
import os
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from models.config import TransformerConfig

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
CALIBRATION_NAME = "energy.json"
"""May stand beside a manifest and is not in it: what a model's steps cost is a fact of the machine."""
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
StageKind = Literal["pretrain", "fine-tune", "distil"]
Task = Literal["translate", "generate", "answer", "sentiment", "summarize"]


class ArtefactError(Exception):
    """A model folder that must not be loaded; the message names the file and what is wrong with it."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Part):
    """Size and SHA-256 of one file of the folder."""

    sha256: str
    size_bytes: int


class SpecialIds(_Part):
    """Token ids with a meaning; None where the tokenizer has no such token."""

    pad: int
    unk: int | None = None
    bos: int | None = None
    """Starts a written text (the decoder's first input)."""
    eos: int | None = None
    """Ends a written text."""
    cls: int | None = None
    sep: int | None = None


class GenerationDefaults(_Part):
    """What a request for written text gets where it does not say."""

    max_tokens: int
    beams: int = 1
    length_penalty: float = 1.0
    """Beam scores are divided by ``length ** length_penalty`` (Wu et al. 2016, without the constant 5)."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    no_repeat_ngram: int = 0
    """Forbid a token that would repeat an n-gram of this length; 0 forbids nothing."""


class Quantisation(_Part):
    """How the weights are stored, and what that cost."""

    scheme: Literal["none", "float16", "blockwise", "rowwise", "calibrated"]
    """As ``models.graph`` explains them."""
    bits: int = 32
    block_size: int = 0
    """Of the blockwise scheme."""
    table_bits: int = 8
    """Of embeddings, where the scheme stores them in whole numbers."""
    parity_max_error: float | None = None
    """Largest absolute difference of the logits to the fp32 graph on the parity batch."""
    parity_cosine: float | None = None


class Parent(_Part):
    """The model this one was fine-tuned or distilled from, or is in another form."""

    name: str
    relation: Literal["fine-tuned", "distilled", "imported"]
    licence: str
    note: str = ""


class TrainingData(_Part):
    """One data set that the weights have seen."""

    name: str
    licence: str
    rows: int
    where: str = ""
    """Where anybody gets it: a Hub name or a public address in words."""


class Score(_Part):
    """One figure of ``wattle evaluate``, measured on the exported model through the service's code."""

    data: str
    split: str
    metric: str
    value: float
    rows: int
    setting: str = ""


class Load(_Part):
    """How queries were asked whose energy was measured: joules per query change several-fold with it."""

    texts_per_request: int
    queries: int
    rounds: int
    """In each, every way to store every model that was measured beside this one had its turn, with the same texts."""
    cores: int
    """That the service could use, with its settings at their defaults."""
    processor: str
    foreign_cores: float | None
    """Cores that other processes kept busy meanwhile, on average; None where the kernel does not tell."""


class Variant(_Part):
    """The same model stored in another way, measured beside the others."""

    scheme: Literal["none", "float16", "blockwise", "rowwise", "calibrated"]
    bits: int
    size_mb: float
    parity_cosine: float
    """Of its logits to those of the weights that all variants were made from."""
    scores: tuple[Score, ...] = ()
    """Through the service, on as many rows as each says."""
    active_j_per_query: float | None = None
    """The median over the rounds."""
    quality: str = "unavailable"
    load: Load | None = None

    @property
    def setting(self) -> str:
        """How it was asked, where not as requests are that say nothing."""
        return self.scores[0].setting if self.scores else ""


class Confidence(_Part):
    """How likely an answer from a knowledge base is right, by the score of its span (Platt 1999)."""

    slope: float
    intercept: float
    least: float
    """An answer less likely to be right is withheld."""
    data: str
    """What it was fitted on."""
    rows: int

    def of(self, score: float) -> float:
        """The probability that an answer with this score is right."""
        return 1 / (1 + math.exp(-max(-500.0, self.slope * score + self.intercept)))


class TrainingEnergy(_Part):
    """What the training runs of this model cost; None where nothing was measured or estimated."""

    joules: float | None
    gco2e: float | None
    seconds: float
    quality: Literal["measured", "apportioned", "estimated", "unavailable"]


class Stage(_Part):
    """One training run of those that led to the weights; its file in a run's folder has the same fields."""

    name: str
    kind: StageKind
    parent: str | None = None
    """Whose weights it began with; None for random ones."""
    teacher: str | None = None
    """Who wrote its targets, where no person did."""
    data: tuple[str, ...]
    parameters: int
    steps: int
    tokens: int
    """Real ones that were trained on, an epoch's again in the next."""
    elapsed_s: float
    joules: float | None
    """Of the machine, idle included; None where nothing was measured or estimated."""
    gco2e: float | None
    quality: Literal["measured", "apportioned", "estimated", "unavailable"]
    device: str
    loss: float | None
    """At its end, an exponential mean over about 50 steps."""
    teacher_joules: float | None = None
    """What it cost to make the teacher's targets."""


class Manifest(_Part):
    """Everything a server needs to know of a model besides its weights."""

    format_version: Literal[1] = 1
    name: str = Field(pattern=NAME_PATTERN)
    revision: str
    description: str
    tasks: tuple[Task, ...]
    """Empty for a model with an embed head, whose vectors are for others to compare, and for no other."""
    languages: tuple[str, ...] = Field(min_length=1)
    """Language codes, ``und`` where nobody said; for translation the source, then the target."""
    layout: Literal["wattle", "optimum"] = "wattle"
    config: TransformerConfig
    max_input_tokens: int
    max_output_tokens: int = 0
    special_ids: SpecialIds
    labels: tuple[str, ...] = ()
    generation: GenerationDefaults | None = None
    chat_template: str | None = None
    no_answer_threshold: float | None = None
    """A question is left unanswered where the null score is above the best span's by more than this; None is 0."""
    confidence: Confidence | None = None
    quantisation: Quantisation
    licence: str = ""
    """Of the weights."""
    parent: Parent | None = None
    training_data: tuple[TrainingData, ...] = ()
    scores: tuple[Score, ...] = ()
    training_energy: TrainingEnergy | None = None
    """Of all stages of the lineage together, without what teachers cost."""
    lineage: tuple[Stage, ...] = ()
    """Every stage that led to the weights, the oldest first, the last one's included."""
    variants: tuple[Variant, ...] = ()
    """What was tried before this way to store it was chosen (``wattle quantise``)."""
    files: dict[str, FileRecord] = Field(default_factory=dict)

    @field_validator("config")
    @classmethod
    def _has_work(cls, config: TransformerConfig, info: ValidationInfo) -> TransformerConfig:
        if "tasks" in info.data and bool(info.data["tasks"]) == (config.head == "embed"):
            raise ValueError("tasks is empty for a model with an embed head, and for no other")
        if config.architecture == "encoder" and config.head == "lm":
            raise ValueError("an encoder with an lm head is only pretrained, not served")
        return config

    @property
    def size_bytes(self) -> int:
        """Bytes of all files that the manifest lists."""
        return sum(record.size_bytes for record in self.files.values())

    def stored_as(self, scheme: str, bits: int) -> Variant | None:
        """What was found of it stored like this; of several settings the first, which its recipe asks in first."""
        return next((each for each in self.variants if (each.scheme, each.bits) == (scheme, bits)), None)


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file of ``folder`` and write its manifest last, atomically.

    Returns the manifest as written. Raises ``ArtefactError`` where the folder holds a link or a subfolder.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name in (MANIFEST_NAME, CALIBRATION_NAME):
            continue
        if path.is_symlink() or not path.is_file():
            raise ArtefactError(f"{path.name}: only plain files belong into a model folder")
        files[path.name] = FileRecord(sha256=_sha256(path), size_bytes=path.stat().st_size)
    manifest = manifest.model_copy(update={"files": files})
    # Validated again: model_copy does not, and a manifest that cannot be read back must not be written.
    text = Manifest.model_validate(manifest.model_dump()).model_dump_json(indent=1) + "\n"
    partial = folder / f".{MANIFEST_NAME}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / MANIFEST_NAME)
    return manifest


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of ``folder`` and verify every file that it lists.

    Raises ``ArtefactError``, naming the file, for a missing or unreadable manifest, an unknown
    ``format_version``, a path that leaves the folder, and a missing, resized or altered file.
    """
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        path = _inside(folder, name)
        if not os.path.isfile(path):
            raise ArtefactError(f"{name}: listed in the manifest but missing")
        if path.stat().st_size != record.size_bytes:
            raise ArtefactError(f"{name}: {path.stat().st_size} bytes where the manifest says {record.size_bytes}")
        if _sha256(path) != record.sha256:
            raise ArtefactError(f"{name}: altered, its sha256 is not the manifest's")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of ``folder`` without hashing its files. Raises ``ArtefactError``."""
    try:
        document = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(f"{MANIFEST_NAME}: missing, so this is not a model folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{MANIFEST_NAME}: cannot be read as JSON: {error}") from error
    version = document.get("format_version") if isinstance(document, dict) else None
    # The type too: True == 1 == 1.0.
    if type(version) is not int or version != FORMAT_VERSION:
        raise ArtefactError(f"{MANIFEST_NAME}: format_version {version!r}; this version reads {FORMAT_VERSION}")
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtefactError(f"{MANIFEST_NAME}: {where}: {first['msg']}") from error


def _inside(folder: Path, name: str) -> Path:
    """Refuse a name that is anything but a plain file of the folder itself."""
    path = folder / name
    # os.path answers False for a name that no file system takes, where pathlib raises.
    if PurePosixPath(name).name != name or name in ("", ".", "..") or "\\" in name or os.path.islink(path):
        raise ArtefactError(f"{name}: leaves the model folder")
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
