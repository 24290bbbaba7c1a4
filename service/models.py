"""The models that the service offers: finds their folders, verifies and names them. Knows nothing of weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from tokenizers import Tokenizer

from models.manifest import MANIFEST_NAME, ArtefactError, Manifest, load_manifest
from service.chat import ChatTemplate
from service.errors import ModelNotFound

TOKENIZER_NAME = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Model:
    """A verified model folder, with what turns text into its token ids and back."""

    manifest: Manifest
    folder: Path
    tokenizer: Tokenizer
    """Reads what callers type: control tokens in it are plain text."""
    chat: ChatTemplate | None

    @property
    def name(self) -> str:
        """What callers call it."""
        return self.manifest.name

    @property
    def uncased(self) -> bool:
        """Whether the tokenizer drops capitals, so that what the model writes has none."""
        return bool(getattr(self.tokenizer.normalizer, "lowercase", False))


@dataclass(frozen=True, slots=True)
class Refusal:
    """A folder that is not served, and why; says nothing of where on the host it lies."""

    folder_name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Models:
    """The models served, in order of preference, and the folders refused."""

    served: Mapping[str, Model]
    refused: Sequence[Refusal] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of served models."""

    def for_task(self, task: str) -> list[Model]:
        """Models that do ``task``, the default first."""
        return [model for model in self.served.values() if task in model.manifest.tasks]

    def pick(self, task: str, name: str | None) -> Model:
        """The model called ``name``, or the default one of ``task``. Raises ``ModelNotFound``."""
        candidates = self.for_task(task)
        for model in candidates:
            if name is None or model.name == self.aliases.get(name, name):
                return model
        raise ModelNotFound(name, [model.name for model in candidates], task)

    def named(self, name: str) -> Model:
        """The model called ``name``, whatever it does. Raises ``ModelNotFound``."""
        try:
            return self.served[self.aliases.get(name, name)]
        except KeyError:
            raise ModelNotFound(name, [*self.served, *self.aliases]) from None


def load_models(
    roots: Sequence[Path], check: Callable[[Manifest], None], aliases: Mapping[str, str] | None = None
) -> Models:
    """Load every model below ``roots``; one that is damaged or fails ``check`` is refused, the others served.

    ``check`` raises ``ArtefactError`` for a manifest that a task cannot work with. ``aliases`` of models that are not
    served are left out.
    """
    served: dict[str, Model] = {}
    refused: list[Refusal] = []
    for folder in _folders(roots):
        try:
            model = load_model(folder)
            check(model.manifest)
            if model.name in served:
                raise ArtefactError(f"{MANIFEST_NAME}: the name {model.name} is taken by an earlier folder")
        except (ArtefactError, OSError) as error:
            refused.append(Refusal(folder.name, str(error).replace(f"{folder}/", "")))
        else:
            served[model.name] = model
    known = {alias: name for alias, name in (aliases or {}).items() if name in served}
    return Models(served, tuple(refused), known)


def load_model(folder: Path) -> Model:
    """Verify one model folder and load its tokenizer. Raises ``ArtefactError``, naming the file at fault."""
    manifest = load_manifest(folder)
    if TOKENIZER_NAME not in manifest.files:
        raise ArtefactError(f"{TOKENIZER_NAME}: not among the manifest's files")
    tokenizer = _tokenizer(folder)
    tokenizer.encode_special_tokens = True
    try:
        chat = ChatTemplate(manifest.chat_template, _tokenizer(folder)) if manifest.chat_template else None
    except jinja2.TemplateError as error:
        raise ArtefactError(f"{MANIFEST_NAME}: chat_template: {error}") from error
    return Model(manifest, folder, tokenizer, chat)


def _folders(roots: Sequence[Path]) -> Iterator[Path]:
    for root in roots:
        if (root / MANIFEST_NAME).is_file():
            yield root
        else:
            yield from sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] not in "._")


def _tokenizer(folder: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_NAME))
    except Exception as error:  # the library raises nothing narrower
        raise ArtefactError(f"{TOKENIZER_NAME}: cannot be read: {error}") from error
    # Lengths are for the tasks to decide; a tokenizer saved in training may bring its own.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
