"""Classification by labels of the caller's own: makes classifiers of a few examples, and asks them.

Neither is in the tuple of tasks: what there is to ask is made by callers. Each is an encoder's work like any other, so
that making one is billed, limited and refused as a task is.
"""

import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import BaseModel, Field, PlainSerializer, PlainValidator, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

from models.heads import Floats, features_of, fit
from models.manifest import Manifest
from service.classifiers.store import NAME_PATTERN, Classifier, Classifiers, LabelledText
from service.engine.types import EncodeItem, Output
from service.errors import ClassifierModelGone, InvalidValue, ModelNotFound
from service.models import Model, Models
from service.tasks.base import Encoded, Task, TaskRequest, TextRequest, encode_text, read_texts, scored

MAX_EXAMPLES = 512
MAX_LABELS = 64
MAX_LABEL_CHARACTERS = 64
EXAMPLES_PER_LABEL = 2
"""At least: one that is left out must not be the only one."""
_NAME_RULE = "a to z, 0 to 9, dot, dash and underscore, a letter or digit first, 64 characters at most"
_EXAMPLES: list[dict[str, str]] = [
    {"text": "My card was charged twice.", "label": "billing"},
    {"text": "Where do I find the invoice for March?", "label": "billing"},
    {"text": "The app crashes when I open it.", "label": "bug"},
    {"text": "Nothing happens when I press save.", "label": "bug"},
]


def read_examples(value: Any) -> list[LabelledText]:
    """A list of objects with ``text`` and ``label``; says which of them is wrong, and in what."""
    if not isinstance(value, list):
        raise PydanticCustomError("examples", 'must be a list of {"text": ..., "label": ...}')
    if len(value) > MAX_EXAMPLES:
        raise PydanticCustomError("examples", f"holds {len(value)} examples; at most {MAX_EXAMPLES} are allowed")
    examples = [_read_example(place, each) for place, each in enumerate(value)]
    counts = Counter(example.label for example in examples)
    if not 2 <= len(counts) <= MAX_LABELS:
        raise PydanticCustomError("examples", f"must have 2 to {MAX_LABELS} different labels, not {len(counts)}")
    for label, count in counts.items():
        if count < EXAMPLES_PER_LABEL:
            problem = {"label": repr(label), "least": EXAMPLES_PER_LABEL}
            raise PydanticCustomError("examples", "the label {label} needs at least {least} examples", problem)
    return examples


def _read_example(place: int, value: Any) -> LabelledText:
    which: dict[str, Any] = {"which": f"example number {place + 1}"}
    if not isinstance(value, dict) or value.keys() != {"text", "label"}:
        raise PydanticCustomError("examples", "{which} is not an object with text and label, and no more", which)
    for part in ("text", "label"):
        try:
            (_,) = read_texts([value[part]])
        except PydanticCustomError:
            problem = {**which, "part": part}
            raise PydanticCustomError("examples", "the {part} of {which} is empty or not a text", problem) from None
    if len(value["label"]) > MAX_LABEL_CHARACTERS:
        problem = {**which, "most": MAX_LABEL_CHARACTERS}
        raise PydanticCustomError("examples", "the label of {which} has more than {most} characters", problem)
    return LabelledText(**value)


_TEXT = {"type": "string", "minLength": 1}
Examples = Annotated[
    list[LabelledText],
    PlainValidator(read_examples),
    PlainSerializer(lambda examples: [asdict(example) for example in examples]),
    WithJsonSchema(
        {
            "type": "array",
            "minItems": 2 * EXAMPLES_PER_LABEL,
            "maxItems": MAX_EXAMPLES,
            "items": {
                "type": "object",
                "properties": {"text": _TEXT, "label": _TEXT | {"maxLength": MAX_LABEL_CHARACTERS}},
                "required": ["text", "label"],
                "additionalProperties": False,
            },
        }
    ),
]


class MakeRequest(TaskRequest):
    """A classifier to make."""

    name: str = Field(
        json_schema_extra={"pattern": NAME_PATTERN},
        description=f"{_NAME_RULE}; a classifier of this name is replaced.",
    )
    examples: Examples = Field(
        description=f"Up to {MAX_EXAMPLES} texts of up to {MAX_LABELS} labels, at least {EXAMPLES_PER_LABEL} of each; "
        "8 of each are a good beginning."
    )

    @field_validator("name")
    @classmethod
    def _is_name(cls, name: str) -> str:
        if not re.fullmatch(NAME_PATTERN, name):
            raise PydanticCustomError("name", "must be made of {rule}", {"rule": _NAME_RULE})
        return name


class Made(BaseModel):
    """A classifier that is ready to be asked."""

    classifier: str
    labels: dict[str, int] = Field(description="How many examples each label has.")
    accuracy: float = Field(
        description="Share of the examples that get the right label from a classifier made without them: about what "
        "to expect of texts like them, unless some of the examples are the same text."
    )


class ClassifyRequest(TextRequest):
    """Texts to classify."""

    classifier: str = Field(description="Name of a classifier that was made by `POST /v1/classifiers`.")


class ClassifyResult(BaseModel):
    """The label of one text."""

    label: str = Field(description="The likeliest of the classifier's labels.")
    score: float = Field(description="Its probability.")
    scores: dict[str, float] = Field(description="The probability of every label; they sum to 1.")


class Make(Task[MakeRequest, MakeRequest]):
    """Makes a classifier of examples, or makes one anew."""

    name = "make_classifier"
    summary = "Make a classifier of labelled examples, or replace one"
    request = MakeRequest
    result = Made
    texts = "examples"
    says = "classifier"
    most_texts = MAX_EXAMPLES
    in_groups = True
    example: ClassVar[Mapping[str, Any]] = {"name": "tickets", "examples": _EXAMPLES}

    def __init__(self, classifiers: Classifiers) -> None:
        self._classifiers = classifiers

    def check(self, manifest: Manifest) -> None:
        """Nothing to add to what every manifest is checked for."""

    def letters(self, request: MakeRequest) -> int:
        """Too many for the event loop, however short they are: a file is written too."""
        return sys.maxsize

    def choose(self, request: MakeRequest, models: Models) -> Model:
        if request.model is None:
            return _default(models)
        model = models.named(request.model)
        if not model.gives_vectors:
            raise InvalidValue("model", f"the model {model.name} gives no vectors to make a classifier on")
        return model

    def encode(self, request: MakeRequest, model: Model, request_id: str) -> Encoded[MakeRequest]:
        texts = [example.text for example in request.examples]
        names = [f"examples[{place}].text" for place in range(len(texts))]
        return Encoded(_items(model, texts, names, request.truncate, request_id), request)

    def decode(self, plan: MakeRequest, model: Model, outputs: Sequence[Output]) -> list[BaseModel]:
        classifier = make(plan.name, plan.examples, model, _features(model, outputs))
        self._classifiers.put(classifier)
        return [made(classifier)]


@dataclass(frozen=True, slots=True)
class ClassifyPlan:
    """What decoding needs to know of a request."""

    classifier: Classifier
    texts: int
    """How many items are the request's; the others are the classifier's examples, where it must be made anew."""


class Classify(Task[ClassifyRequest, ClassifyPlan]):
    """Asks a classifier. Where its model has changed since, it is made anew of its examples first."""

    name = "classify"
    summary = "Classify a text by labels of your own"
    request = ClassifyRequest
    result = ClassifyResult
    says = "label"
    in_groups = True
    example: ClassVar[Mapping[str, Any]] = {"classifier": "tickets", "input": ["I was billed for two months."]}

    def __init__(self, classifiers: Classifiers) -> None:
        self._classifiers = classifiers

    def check(self, manifest: Manifest) -> None:
        """Nothing to add to what every manifest is checked for."""

    def letters(self, request: ClassifyRequest) -> int:
        """Too many for the event loop, however short they are: the classifier may have to be made anew."""
        return sys.maxsize

    def choose(self, request: ClassifyRequest, models: Models) -> Model:
        """The classifier's own model. Raises ``ClassifierNotFound`` and ``ClassifierModelGone``."""
        classifier = self._classifiers.find(request.classifier)
        if request.model is not None and models.named(request.model).name != classifier.model:
            raise InvalidValue("model", f"the classifier {classifier.name!r} was made on {classifier.model}")
        model = models.served.get(classifier.model)
        if model is None or not model.gives_vectors:
            raise ClassifierModelGone(classifier.name, classifier.model)
        return model

    def encode(self, request: ClassifyRequest, model: Model, request_id: str) -> Encoded[ClassifyPlan]:
        classifier = self._classifiers.find(request.classifier)
        items = _items(model, request.input, ["input"] * len(request.input), request.truncate, request_id)
        plan = ClassifyPlan(classifier, len(items))
        if classifier.fingerprint != model.fingerprint:
            examples = [example.text for example in classifier.examples]
            # What the model that was there before could read whole, this one may have to cut.
            items += _items(model, examples, ["classifier"] * len(examples), True, request_id)
        return Encoded(items, plan)

    def decode(self, plan: ClassifyPlan, model: Model, outputs: Sequence[Output]) -> list[BaseModel]:
        classifier, features = plan.classifier, _features(model, outputs)
        if len(outputs) > plan.texts:
            renewed = make(classifier.name, classifier.examples, model, features[plan.texts :])
            renewed = replace(renewed, created_s=classifier.created_s)
            self._classifiers.renew(classifier, renewed)
            classifier = renewed
        results: list[BaseModel] = []
        for row in classifier.head.probabilities(features[: plan.texts]).tolist():
            scores = dict(zip(classifier.labels, row, strict=True))
            label = max(scores, key=lambda name: scores[name])
            results.append(ClassifyResult(label=label, score=scores[label], scores=scores))
        return results


def make(name: str, examples: Sequence[LabelledText], model: Model, features: Floats) -> Classifier:
    """A classifier of ``examples``, whose ``features`` (n, f) ``model`` has given."""
    labels = sorted({example.label for example in examples})
    numbers = np.array([labels.index(example.label) for example in examples])
    head, accuracy = fit(features, numbers, len(labels))
    return Classifier(
        name=name,
        model=model.name,
        revision=model.manifest.revision,
        fingerprint=model.fingerprint,
        labels=labels,
        examples=examples,
        head=head,
        accuracy=accuracy,
        created_s=time.time(),
    )


def made(classifier: Classifier) -> Made:
    """A classifier in figures."""
    counts = Counter(example.label for example in classifier.examples)
    labels = {label: counts[label] for label in classifier.labels}
    return Made(classifier=classifier.name, labels=labels, accuracy=classifier.accuracy)


def _default(models: Models) -> Model:
    """The model to make classifiers on. Raises ``ModelNotFound``."""
    able = [model for model in models.served.values() if model.gives_vectors]
    # Means of several layers know more of a text than what an embedding model was trained for (docs/LOG.md).
    able.sort(key=lambda model: not model.manifest.config.vector_layers)
    if not able:
        raise ModelNotFound(None, [], Classify.name)
    return able[0]


def _items(
    model: Model, texts: Sequence[str], names: Sequence[str], truncate: bool, request_id: str
) -> tuple[EncodeItem, ...]:
    """Each text as the model reads it; ``names`` blames the texts."""
    return tuple(
        EncodeItem(request_id, encode_text(model, text, param=name, truncate=truncate), wants_vector=True)
        for text, name in zip(texts, names, strict=True)
    )


def _features(model: Model, outputs: Sequence[Output]) -> Floats:
    return features_of(np.stack([scored(output) for output in outputs]), model.manifest.config.d_model)
