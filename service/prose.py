"""Makes prose of what an uncased WordPiece model wrote: spacing and capitals, from the source where it has them.

``the u . s . won , don ' t they ?`` becomes ``The U.S. won, don't they?``. Knows nothing of models or tokenizers.
"""

import re
import unicodedata
from collections import Counter

from models.sentences import split_sentences

_PIECE = re.compile(r"[^\W_]+|[^\w\s]|_")
_EDGE = ".,;:!?\"'“”‘’()[]…"
_LONGEST = 12
"""Most pieces of one word of the source; longer ones are web addresses and the like."""

_SPACING = [
    (re.compile(p), r)
    for p, r in (
        (r"\s+([.,;:!?%)\]}…]+)", r"\1"),
        (r"([(\[{$£€])\s+", r"\1"),
        (r"(?<=\d)([.,:])\s+(?=\d)", r"\1"),
        (r"(?i)(?<=[a-z#]) ' (?=(?:s|t|re|ve|ll|d|m)\b)", "'"),
        (r"(?<=\w) - (?=\w)", "-"),
        (r"\" ([^\"]*?) \"", r'"\1"'),
    )
]


class Restorer:
    """Writes as a person would, with the words spelt as a source spells them."""

    def __init__(self, source: str) -> None:
        self._words = _spellings(source)
        self._beginnings = {pieces[:length] for pieces in self._words for length in range(1, len(pieces))}

    def restore(self, text: str) -> str:
        """The whole of ``text``."""
        return _space(self._spell(_pieces(text)))

    def certain(self, text: str) -> str:
        """How every text that begins with ``text`` begins once it is restored.

        It ends between two words, where neither spacing nor a sentence's start depends on what follows, and before
        the first double quote, whose spacing depends on its other half.
        """
        # The last piece may be half a word.
        words = self._spell(_pieces(text)[:-1], unfinished=True)
        end = words.index('"') if '"' in words else len(words)
        for cut in range(end - 1, 0, -1):
            if words[cut - 1][-1].isalnum() and words[cut][0].isalnum():
                return _space(words[:cut])
        return ""

    def _spell(self, pieces: list[str], unfinished: bool = False) -> list[str]:
        """The words that the pieces make; of an unfinished text, those that more pieces cannot change."""
        spelt: list[str] = []
        place = 0
        while place < len(pieces):
            if unfinished and tuple(pieces[place : place + _LONGEST]) in self._beginnings:
                break
            for length in range(min(_LONGEST, len(pieces) - place), 0, -1):
                known = self._words.get(tuple(pieces[place : place + length]))
                if known is not None or length == 1:
                    spelt.append(known or pieces[place])
                    place += length
                    break
        return spelt


def _space(words: list[str]) -> str:
    """Words and marks as one text, with the spaces that belong there and a capital for each sentence."""
    prose = " ".join(words)
    for pattern, replacement in _SPACING:
        prose = pattern.sub(replacement, prose)
    # Without capitals, every full stop that is no abbreviation's counts; one letter for one, so that offsets hold.
    for start, _ in split_sentences("".join(letter.lower()[:1] for letter in prose)):
        prose = prose[:start] + prose[start].upper() + prose[start + 1 :]
    return prose


def _spellings(source: str) -> dict[tuple[str, ...], str]:
    """How the source spells each of its words, by the pieces that an uncased tokenizer makes of it."""
    seen: dict[tuple[str, ...], Counter[str]] = {}
    for start, end in split_sentences(source):
        words = source[start:end].split()
        # In "Tom: Yes" the name is one wherever it stands, and the sentence begins after it.
        first = int(words[0].endswith(":"))
        for number, raw in enumerate(words):
            # An abbreviation keeps its full stop: "U.S.," is "U.S.".
            word = raw.strip(_EDGE)
            word += "." if "." in word and raw.startswith(word + ".") else ""
            pieces = tuple(_pieces(word))
            if 0 < len(pieces) <= _LONGEST:
                # A capital at a sentence's start says nothing about the word.
                votes = 0 if number == first and word[1:].islower() else 1
                seen.setdefault(pieces, Counter())[word] += votes
    return {pieces: _likeliest(spelt) for pieces, spelt in seen.items()}


def _likeliest(spelt: Counter[str]) -> str:
    word, votes = spelt.most_common(1)[0]
    return word if votes else word.lower()


def _pieces(text: str) -> list[str]:
    """Words and single punctuation marks, lower case and without accents, as BERT's uncased tokenizer has them."""
    bare = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    return _PIECE.findall(bare)
