"""What turns a question into a full-text query, and rankings into one: pure functions. Knows nothing of storage."""

import re
from collections.abc import Sequence

FUSION_CONSTANT = 60
"""Cormack et al. 2009: it keeps the first ranks of one list from outweighing the agreement of both."""

_STOPWORDS = re.compile(
    r"a|about|after|all|also|am|an|and|any|are|as|at|be|because|been|before|being|"
    r"between|both|but|by|can|could|did|do|does|doing|done|for|from|had|has|have|having|"
    r"he|her|hers|him|his|how|i|if|in|into|is|it|its|itself|just|many|me|more|most|"
    r"much|my|no|nor|not|of|off|on|once|only|or|other|our|out|over|own|s|same|she|"
    r"should|so|some|such|t|than|that|the|their|theirs|them|then|there|these|they|this|"
    r"those|through|to|too|under|until|up|very|was|we|were|what|when|where|which|while|"
    r"who|whom|whose|why|will|with|would|you|your|yours"
)
_UNQUOTABLE = re.compile(r'["\x00]')
_EDGE = re.compile(r"^\W+|\W+$")
_POSSESSIVE = re.compile(r"['’]s?$")


def match_expression(question: str) -> str | None:
    """An FTS5 query for passages with any of the question's content words; None where it has no word at all.

    Each word stands between quotes, where FTS5 knows no operators: whatever a caller types is looked for. A question
    of nothing but stopwords is looked for as it is.
    """
    words = dict.fromkeys(filter(None, map(_bare, _UNQUOTABLE.sub(" ", question.lower()).split())))
    content = [word for word in words if not _STOPWORDS.fullmatch(word)] or list(words)
    return " OR ".join(f'"{word}"' for word in content) or None


def fuse(rankings: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
    """One ranking of all that any of ``rankings`` lists, best first, each with its score (reciprocal rank fusion,
    Cormack et al. 2009). Of equal scores the one comes first that an earlier ranking lists first."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for place, passage in enumerate(ranking, start=1):
            scores[passage] = scores.get(passage, 0.0) + 1 / (FUSION_CONSTANT + place)
    return sorted(scores.items(), key=lambda scored: -scored[1])


def _bare(word: str) -> str:
    """A word without marks around it and without a possessive 's."""
    return _POSSESSIVE.sub("", _EDGE.sub("", word))
