"""What a Hugging Face folder says beside its weights: licence, languages, special ids, chat template, defaults.

Knows nothing of weights, graphs or how a tokenizer works.
"""

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from models.config import Pooling
from models.manifest import GenerationDefaults, SpecialIds
from training.errors import TrainingError

_MAX_BEAMS = 8  # what a request may ask for, too


class ForeignFolder:
    """The small files of a folder; one that is absent says nothing."""

    def __init__(self, folder: Path) -> None:
        """Raises ``TrainingError`` for a file that is no JSON object."""
        self.folder = folder
        self._config = self._json("config.json")
        self._generation = self._json("generation_config.json")
        self._tokenizer = self._json("special_tokens_map.json") | self._json("tokenizer_config.json")

    def _json(self, name: str) -> dict[str, Any]:
        try:
            document = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise TrainingError(f"{self.folder / name}: cannot be read as JSON: {error}") from error
        if not isinstance(document, dict):
            raise TrainingError(f"{self.folder / name}: holds no JSON object")
        return document

    @property
    def licence(self) -> str:
        """As the head of the model's page states it."""
        try:
            page = (self.folder / "README.md").read_text(encoding="utf-8")
        except FileNotFoundError:
            return "not stated"
        head = re.match(r"---\n(.*?)\n---", page, re.DOTALL)
        found = re.search(r"^license:\s*(\S+)", head[1], re.MULTILINE) if head else None
        return found[1] if found else "not stated"

    def language_pair(self, source: str | None, target: str | None) -> tuple[str, str]:
        """Of a translator: as asked for, else as its tokenizer says. Raises ``TrainingError``."""
        source = source or self._tokenizer.get("source_lang")
        target = target or self._tokenizer.get("target_lang")
        if not source or not target:
            raise TrainingError(
                f"{self.folder}: nothing says what it translates: give --source-language and --target-language"
            )
        return source, target

    def pooling(self) -> Pooling:
        """``mean`` or ``first``, as a sentence encoder's folder says; ``mean`` where it says nothing.

        Raises ``TrainingError`` for another one, and for layers behind it.
        """
        try:
            modules = json.loads((self.folder / "modules.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return "mean"
        for module in modules:
            kind = module["type"].rpartition(".")[2]
            if kind not in ("Transformer", "Pooling", "Normalize"):
                raise TrainingError(f"modules.json: {kind} follows the pooling; the graphs can express none")
        pooling = self._json("1_Pooling/config.json")
        found = {name.removeprefix("pooling_mode_") for name, value in pooling.items() if value is True}
        found -= {"include_prompt"}
        if isinstance(pooling.get("pooling_mode"), str):
            found = {pooling["pooling_mode"]}
        known: dict[str, Pooling] = {"mean_tokens": "mean", "mean": "mean", "cls_token": "first", "cls": "first"}
        if len(found) != 1 or not found <= known.keys():
            raise TrainingError(
                f"1_Pooling/config.json: pools by {sorted(found)}; the graphs can express mean and cls"
            )
        return known[found.pop()]

    def special_ids(self, tokenizer: Tokenizer) -> SpecialIds:
        """The ids with a meaning, by the names that the tokenizer's files give them, else by ``config.json``."""
        pad, unk, bos, eos, cls, sep = (
            self._special_id(tokenizer, kind) for kind in ("pad", "unk", "bos", "eos", "cls", "sep")
        )
        # A translator's texts begin with an id of their own; a sentence of an encoder ends with [SEP].
        start = self._config.get("decoder_start_token_id")
        eos = sep if eos is None else eos
        # Padding is masked: where no id was set aside for it, any will do.
        fallback = 0 if eos is None else eos
        return SpecialIds(
            pad=fallback if pad is None else pad,
            unk=unk,
            bos=bos if start is None else start,
            eos=eos,
            cls=cls,
            sep=sep,
        )

    def _special_id(self, tokenizer: Tokenizer, kind: str) -> int | None:
        name = self._special_name(kind)
        found = None if name is None else tokenizer.token_to_id(name)
        if found is None and kind in ("cls", "sep"):
            found = tokenizer.token_to_id(f"[{kind.upper()}]")
        if found is None:
            found = self._generation.get(f"{kind}_token_id", self._config.get(f"{kind}_token_id"))
        # Several ends of a text: the first is the checkpoint's main one.
        return found[0] if isinstance(found, list) else found

    def _special_name(self, kind: str) -> str | None:
        value = self._tokenizer.get(f"{kind}_token")
        return value["content"] if isinstance(value, dict) else value

    def chat_template(self) -> str | None:
        """The template, with the special tokens that it names as variables of its own; None where there is none."""
        template = self._tokenizer.get("chat_template")
        path = self.folder / "chat_template.jinja"
        if path.exists():
            template = path.read_text(encoding="utf-8")
        if isinstance(template, list):
            template = next((each["template"] for each in template if each["name"] == "default"), None)
        if template is None:
            return None
        for kind in ("bos", "eos", "unk", "pad"):
            if f"{kind}_token" in template:
                value = json.dumps(self._special_name(kind) or "", ensure_ascii=False)
                template = f"{{% set {kind}_token = {value} %}}{template}"
        return template

    def generation(self, max_tokens: int) -> GenerationDefaults:
        """How the model's makers would have it write."""
        said = self._config | self._generation
        sampled: dict[str, Any] = {}
        if said.get("do_sample"):
            sampled = {
                "temperature": said.get("temperature") or 1.0,
                "top_k": said.get("top_k") or 0,
                "top_p": said.get("top_p") or 1.0,
            }
        return GenerationDefaults(
            max_tokens=max_tokens,
            beams=min(said.get("num_beams") or 1, _MAX_BEAMS),
            length_penalty=said.get("length_penalty") or 1.0,
            no_repeat_ngram=said.get("no_repeat_ngram_size") or 0,
            **sampled,
        )
