"""Answers that are words: `text`, the same words, and `choice`, the same option."""

import re
import unicodedata

from stages.lib.answers.number import canonical_number
from stages.lib.answers.spelling import plain_text

_LEAD_IN = re.compile(
    r"(?:(?:so|thus|therefore|hence)\b,?\s*)?"
    r"(?:(?:i\s+(?:think|believe|say|guess|choose|pick|select)|i'd\s+say|maybe|probably|perhaps)\b,?\s*(?:that\s+)?)?"
    r"(?:(?:(?:my|the)\s+)?(?:(?:final|correct|right|best)\s+)?(?:answer|ans|choice|option|result)\b"
    r"(?:\s+(?:is|would\s+be)\b)?\s*[:=]?|(?:it|that|this)(?:\s+is|'s)\b)?\s*:?\s*(?!not\b|\w*n't)",
    re.IGNORECASE,
)
_IS_THE_ANSWER = re.compile(
    r"\s+is\s+(?:the\s+)?(?:(?:(?:correct|right|best|final)\s+)?(?:answer|option|choice)|correct|right)[\s.!]*$", re.I
)
_SURE = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_WHO = "(?:it|he|she|they|we|you|i|there|this|that)"
_DOES = "(?:is|are|was|were|does|do|did|can|could|will|would|has|have|should)"
_YES_OR_NO = re.compile(rf"(?:(yes|true)(?:,? {_WHO} {_DOES})?|(no|false)(?:,? {_WHO} {_DOES}(?: not|n't))?)")
_QUOTES = "\"'`“”‘’«»"
_OPTION = re.compile(
    r"(?:(?:option|choice|answer|letter)\s+)?"
    r"(?:[(\[]\s*(?P<paren>[A-Za-z1-9])\s*[)\]]|(?P<capital>[A-Z1-9])(?![\w'])|(?P<small>[a-z])(?=\s*[).:]|$))"
    r"\s*[).:\]]?(?P<rest>.*)",
    re.DOTALL | re.IGNORECASE,
)
_OTHER_OPTION = re.compile(
    r"(?<![\w(])[A-J]\s*[).:]|[(\[][A-Ja-j][)\]]|\b(?:or|and|not)\s+(?:option\s+)?[A-J]\b|^\s*[A-J]\s*$"
    r"|[,;/]\s*(?:no,?\s*)?[A-J]\b|^\s*(?:is|isn't|was|can't|cannot|or|and|but|nor|seems|looks)\b"
)


def canonical_text(text: str) -> str:
    """Return the words of an answer in one spelling, without case, markup, lead-in, and quotes or signs at the ends."""
    text = unicodedata.normalize("NFKC", plain_text(text)).casefold()
    text = " ".join(text.split()).strip(_QUOTES + " .,;:!?=")
    shorter = _alone(text)
    return shorter.strip(_QUOTES + " .,;:!?()[]") or text


def _alone(text: str) -> str:
    """Return an answer without the words around it that only present it."""
    lead_in = _LEAD_IN.match(text)
    return _IS_THE_ANSWER.sub("", text[lead_in.end() :] if lead_in else text)


def same_text(true: str, given: str) -> bool:
    """Return whether two answers are the same words; for a yes or a no, also `True` and `yes, it is`."""
    true, given = canonical_text(true), canonical_text(given)
    if true in _SURE:
        match = _YES_OR_NO.fullmatch(given)
        return match is not None and _SURE[match[1] or match[2]] == _SURE[true]
    return true == given


def read_choice(text: str) -> tuple[str, str] | None:
    """Return the letter, upper case, of an option such as `(B) 18`, and the words beside it ("" if there are none).

    None for another text, for two options, and for a text that denies an option.
    """
    text = " ".join(plain_text(text).split()).strip(_QUOTES + " ")
    text = _alone(text).strip(_QUOTES + " =:").rstrip("!?")
    match = _OPTION.fullmatch(text)
    if match is None:
        return None
    letter = match["paren"] or match["capital"] or match["small"]
    rest = match["rest"]
    if _OTHER_OPTION.search(rest):
        return None
    beside = text[: len(text) - len(rest)].rstrip()
    if rest.strip(" .") and beside[-1:].isalnum() and not re.match(r"\s*(?:=|[-—]\s)", rest):  # "A cat" is no option
        return None
    return letter.upper(), canonical_text(rest) if rest.strip() else ""


def same_choice(true: str, given: str) -> bool:
    """Return whether two answers name the same option, by its letter, its words or both."""
    right, named = read_choice(true), read_choice(given)
    if right is None:
        return same_text(true, given)
    if named is None:
        return right[1] != "" and canonical_text(given) == right[1]
    same_words = right[1] == named[1] or canonical_number(right[1]) == canonical_number(named[1]) is not None
    return right[0] == named[0] and (not right[1] or not named[1] or same_words)
