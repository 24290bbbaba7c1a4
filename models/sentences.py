"""Where the sentences of a text begin and end. Rules only: no model, nothing but the standard library.

Training and serving share it, so that a model scores the same sentences that it learnt from.
"""

import re

# Each is followed by a full stop that ends no sentence; the second kind only before a number.
_ABBREVIATION = re.compile(
    r"mrs?|ms|dr|prof|[sj]r|st|gen|col|lt|sgt|capt|rev|hon|gov|sen|rep|pres|vs|etc|cf|al|approx|dept|est|fig|inc|ltd"
    r"|co|corp|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mt|ave|blvd|rd|[ap]\.m|e\.g|i\.e|u\.[skn]"
)
_BEFORE_NUMBER = re.compile(r"nos?|pp?|vol|art|ch|sec|ca")

# A line break, or a full stop with what closes after it; Chinese and Japanese put no space after theirs. A run of
# full stops is tried only at its first and never given back, so that time stays linear in any text.
_CANDIDATE = re.compile(r"""\n\s*+ | (?<![.!?…])[.!?…]++["'”’»)\]]*+(?=\s) | [。！？]++["'”’」』）]*+""", re.VERBOSE)
_OPENING = "\"'“‘«(["
_NEXT_WORD = re.compile(rf"[\s{re.escape(_OPENING)}]*(\S)")
_LONGEST_WORD = 16
"""Longer words are neither abbreviations nor numbers of a list."""


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Character offsets ``(start, end)`` of each sentence, in order, without white space around it.

    ``text[start:end]`` never overlap, and leave out nothing but white space.
    """
    sentences = []
    start = 0
    has_capitals = any(map(str.isupper, text))
    for candidate in _CANDIDATE.finditer(text):
        if _ends_sentence(text, start, candidate, has_capitals):
            sentences.append(_trim(text, start, candidate.end()))
            start = candidate.end()
    sentences.append(_trim(text, start, len(text)))
    return [(first, last) for first, last in sentences if first < last]


def _ends_sentence(text: str, start: int, candidate: re.Match[str], has_capitals: bool) -> bool:
    following = _NEXT_WORD.match(text, candidate.end())
    if following is None:
        return True
    # "Stop!" he said: a small letter goes on with the sentence, unless the writer never uses capitals.
    goes_on = has_capitals and following[1].islower()
    mark = candidate[0].strip()
    if not mark:
        blank_line = candidate[0].count("\n") > 1
        return blank_line or not goes_on
    if mark[0] in "。！？":
        return True
    if goes_on:
        return False
    if mark != ".":
        return True
    before = text[max(start, candidate.start() - _LONGEST_WORD) : candidate.start()]
    word = (before.split() or [""])[-1].lstrip(_OPENING).lower()
    if _ABBREVIATION.fullmatch(word) or (_BEFORE_NUMBER.fullmatch(word) and following[1].isdigit()):
        return False
    # J. Smith, and the number that opens an item of a list.
    is_initial = len(word) == 1 and word.isalpha() and word != "i"
    opens_list = word.isdigit() and before.strip() == word
    return not (is_initial or opens_list)


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())
