"""What languages are called, and which of them a text is in. Knows nothing of models or HTTP.

Both libraries are loaded when they are first needed: who never asks pays neither their time nor their memory.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

_ENOUGH = 2000
"""Characters that tell a language; longer texts would only take longer."""


@dataclass(frozen=True, slots=True)
class Detection:
    """A text's language."""

    language: str
    """ISO 639-1 code, where there is one."""
    probability: float
    """Among all languages that the detector knows."""


def detect(text: str, among: Collection[str]) -> Detection | None:
    """The likeliest language of ``text`` of those ``among``, or of all; None where the detector knows none of them.

    By py3langid (Lui and Baldwin 2011): naive Bayes over n-grams of bytes, unsure of a few words.
    """
    ranked: list[tuple[str, float]] = _detector().rank(text[:_ENOUGH])
    return next((Detection(*each) for each in ranked if not among or each[0] in among), None)


def name_of(code: str) -> str:
    """The English name of a language, as ISO 639 has it; the code itself where it has none."""
    import iso639

    try:
        return iso639.Language.match(code).name
    except iso639.LanguageNotFoundError:
        return code


@cache
def _detector() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
