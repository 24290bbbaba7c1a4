"""The models that the service offers: finds their folders, verifies and names them. Knows nothing of weights."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jinja2
from tokenizers import Tokenizer

from models.manifest import MANIFEST_NAME, ArtefactError, Manifest, load_manifest, read_manifest
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
    generation: int = 0
    """Tells what was loaded from what was loaded under the same name before."""

    @property
    def key(self) -> str:
        """What the engine calls it: two revisions of one name may be in memory while one takes the other's place."""
        return f"{self.name}#{self.generation}" if self.generation else self.name

    @property
    def name(self) -> str:
        """What callers call it."""
        return self.manifest.name

    @property
    def fingerprint(self) -> str:
        """Names it by its weights and tokenizer: vectors of another model cannot be compared with its."""
        files = sorted((name, record.sha256) for name, record in self.manifest.files.items() if name != "README.md")
        return f"{self.name}:{hashlib.sha256(repr(files).encode()).hexdigest()[:12]}"

    @property
    def gives_vectors(self) -> bool:
        """Whether it turns a text into a vector."""
        config = self.manifest.config
        return bool(config.vector_layers) or config.head == "embed"

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
    names: Mapping[str, str] = field(default_factory=dict)
    """Other names of models, which need not be served."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Other names of served models."""
        return {alias: name for alias, name in self.names.items() if name in self.served}

    def for_task(self, task: str) -> list[Model]:
        """Models that do ``task``, the default first."""
        return [model for model in self.served.values() if task in model.manifest.tasks]

    def pick(self, task: str, name: str | None) -> Model:
        """The model called ``name``, or the default one of ``task``. Raises ``ModelNotFound``."""
        candidates = self.for_task(task)
        for model in candidates:
            if name is None or model.name == self.names.get(name, name):
                return model
        raise ModelNotFound(name, [model.name for model in candidates], task)

    def named(self, name: str) -> Model:
        """The model called ``name``, whatever it does. Raises ``ModelNotFound``."""
        try:
            return self.served[self.names.get(name, name)]
        except KeyError:
            raise ModelNotFound(name, [*self.served, *self.aliases]) from None

    def replacing(self, model: Model) -> "Models":
        """These with ``model``, in the place of the one that is called alike, else last; its folder is fine."""
        refused = [refusal for refusal in self.refused if refusal.folder_name != model.folder.name]
        return replace(self, served={**self.served, model.name: model}, refused=refused)

    def without(self, name: str) -> "Models":
        """These but for the model called ``name``."""
        return replace(self, served={key: model for key, model in self.served.items() if key != name})

    def refusing(self, refusal: Refusal, keep: Collection[str]) -> "Models":
        """These with one more refusal, and of the models only those whose keys are to be kept."""
        others = [each for each in self.refused if each.folder_name != refusal.folder_name]
        served = {name: model for name, model in self.served.items() if model.key in keep}
        return replace(self, served=served, refused=[*others, refusal])


def load_models(
    roots: Sequence[Path], check: Callable[[Manifest], None], aliases: Mapping[str, str] | None = None
) -> Models:
    """Load every model below ``roots``; one that is damaged or fails ``check`` is refused, the others served.

    ``check`` raises ``ArtefactError`` for a manifest that a task cannot work with. ``aliases`` are other names.
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
            refused.append(refusal_of(folder, error))
        else:
            served[model.name] = model
    return Models(served, tuple(refused), aliases or {})


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


def refusal_of(folder: Path, error: Exception) -> Refusal:
    """Why a folder was not loaded."""
    return Refusal(folder.name, str(error).replace(f"{folder}/", ""))


def find_folder(roots: Sequence[Path], name: str, models: Models) -> Path | None:
    """The folder below ``roots`` that is called ``name``, lies there, or holds the model of that name.

    What a caller asks for is only ever compared with the folders there are, so it leads nowhere else.
    """
    folders = list(_folders(roots))
    served = models.served.get(models.names.get(name, name))
    for folder in folders:
        if name in (folder.name, str(folder)):
            return folder
    if served is not None:
        return served.folder
    return next((folder for folder in folders if _name_in(folder) == name), None)


def _name_in(folder: Path) -> str | None:
    try:
        return read_manifest(folder).name
    except ArtefactError:
        return None


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
