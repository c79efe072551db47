r"""One canonical form of a numeric answer, with exact arithmetic, so that equal answers are equal strings.

    value(text)       the number that the whole text is, or None                 "1,200" "$18" "18.0" "-3" "1/2" "50%"
    find(text)        that, or the only number in a short text, or None          "The answer is 18 dollars."
    canonical(text)   `find` as a string: an integer, else a reduced fraction    "1200" "18" "18" "-3" "1/2" "50"
    given(text)       that, of what a completion answers: no division left to do  not "84/2"

`canonical` is for the answers of a dataset, `given` for what a completion answers, to be compared with one. `value` is
for asking whether a field is a bare number. Decisions:

- The form is "18" or "-5/2": `0.5`, `.50` and `1/2` are one answer. Nothing is rounded and no float is involved.
- A unit is dropped: a currency sign, `%`, the degree sign, `°C` and `°F`. `50%` is 50, as GSM8K has it, and not 0.5.
- A comma only groups thousands: `1,200` is 1200; `1,20` and `1,2` are not read.
- Digits are ASCII. Others (full-width, Arabic, superscript, Roman, `½`, `五`) are not read: what comes after would not
  read them either. A minus may be `-`, U+2212 or one of the other dashes of its length.
- LaTeX is read where the whole text is `\boxed{..}`, `$..$`, `\(..\)` or `\frac{a}{b}` with integers;
  so are `\%`, `\$` and `1{,}200`, a `\boxed{..}` among words, and `\text{..}` as its words.
- More than one number is not an answer (`42 or 43`, `10:30`, `1 1/2`, `2 + 2 = 4`). Nor is an expression (`x - 5`,
  `3x`, `f(3)`, `5!`), a number that words change (`5 million`, `not 42`, `half of 18`), one that a letter touches
  (`18k`), or `NaN`, `inf` and `1e999`: a number has at most 100 digits above and below the bar.

Time is bounded: a text over 1,000 characters is not an answer and is not looked at.
"""

import re
from fractions import Fraction

MAX_TEXT_CHARACTERS = 1000
_LIMIT = 10**100

_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"), "-")
_CURRENCY = "$€£¥₹"
_SIGN_AFTER = rf"(?: [{_CURRENCY}%] | °[CF]? )"
_INTEGER = re.compile(r"-?[1-9][0-9]{0,17}|0")
_BODY = r"""
    (?: (?P<whole> [0-9]{1,3} (?:,[0-9]{3})+ | [0-9]+ ) (?: \.(?P<decimals>[0-9]*) )?
      | \.(?P<only_decimals>[0-9]+) )
    (?: [eE](?P<exponent>[+-]?[0-9]{1,3}) )?
    (?: [ ]?/[ ]?(?P<denominator>[0-9]+) )?
"""
_WHOLE_TEXT = re.compile(
    rf"(?P<first_sign>[+-]?) \s? [{_CURRENCY}]? \s? (?P<second_sign>[+-]?) {_BODY} \s? {_SIGN_AFTER}? \s? \.?",
    re.VERBOSE,
)
_IN_A_TEXT = re.compile(
    rf"(?P<first_sign>[+-]?) (?: [{_CURRENCY}][ ]? )? (?P<second_sign>[+-]?) {_BODY} (?: [ ]?{_SIGN_AFTER} )?",
    re.VERBOSE,
)
_LATEX_FRACTION = re.compile(r"([+-]?)\s?\\[dt]?frac\s?\{([0-9]+)\}\s?\{([0-9]+)\}")
_WRAPPERS = (("**", "**"), ("`", "`"), ("$", "$"), ("\\(", "\\)"), ("\\boxed{", "}"))
_BEFORE_A_NUMBER = frozenset("([=:\"'“‘—")
_PUNCTUATION = frozenset(".,;:!?'\"()[]=‘’“”—")
_DIVISION = re.compile(r"[0-9]\s?/\s?[0-9]|\\[dt]?frac")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_UNIT = re.compile(r"\s*\\text\s?\{([^{}]*)\}")
_WORD = re.compile(r"[^\W\d_]+")
_HYPHENATED = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
_CHANGES_A_NUMBER = frozenset(
    "or nor not minus negative plus divided over squared cubed root half third quarter"
    " dozen hundred thousand million billion trillion".split()
)


def number_value(text: str) -> Fraction | None:
    """Give the number that the whole of `text` is, white space and a unit sign apart, or None."""
    if len(text) > MAX_TEXT_CHARACTERS:
        return None
    return _value(_unwrapped(text))


def find_number(text: str) -> Fraction | None:
    """Give the number that `text` is or, failing that, the only one it holds among plain words, or None."""
    if len(text) > MAX_TEXT_CHARACTERS:
        return None
    text = _unwrapped(text)
    number = _value(text)
    if number is not None:
        return number
    text = _BOXED.sub(r"\1", text.replace("**", ""))
    match = _IN_A_TEXT.search(text)
    if match is None or not _are_plain_words(text[: match.start()], text[match.end() :]):
        return None
    return _fraction(match)


def canonical_number(text: str) -> str | None:
    """Give the one form that every way to write the answer `text` has ("1200", "-5/2"), or None if it can't be read.

    Text around the number is allowed as in `find`; `canonical(canonical(text)) == canonical(text)`.
    """
    if _INTEGER.fullmatch(text):
        return text
    number = find_number(text)
    return None if number is None else str(number)


def given_number(text: str) -> str | None:
    """Give `canonical(text)` for what a completion answers; None for a division that comes out even (`84/2`).

    That is the last step of a problem left undone, as `6 * 7` is, which is no answer either. `2/4` is a fraction.
    """
    answer = canonical_number(text)
    return None if answer is not None and "/" not in answer and _DIVISION.search(text) else answer


def gsm8k_final(answer: str) -> str:
    """Give what follows the last `####` of a GSM8K answer, as written ("1,200"). Raises ValueError if there is none."""
    _, mark, final = answer.rpartition("####")
    if not mark:
        raise ValueError("a GSM8K answer ends with a line '#### N'; this one has no '####'")
    return final.strip()


def _unwrapped(text: str) -> str:
    """Take white space, typographic dashes and whatever merely wraps the whole text off it."""
    text = text.translate(_DASHES).strip()
    if "\\" in text or "{,}" in text:
        text = _UNIT.sub(r" \1", text.replace("\\%", "%").replace("\\$", "$").replace("{,}", ","))
    for start, end in _WRAPPERS:
        inside = text.removesuffix(".")
        if inside.startswith(start) and inside.endswith(end) and len(inside) > len(start) + len(end):
            text = inside[len(start) : -len(end)].strip()
    return text


def _value(text: str) -> Fraction | None:
    match = _WHOLE_TEXT.fullmatch(text)
    if match:
        return _fraction(match)
    latex = _LATEX_FRACTION.fullmatch(text)
    if latex:
        return _bounded(int(latex[1] + latex[2]), int(latex[3]))
    return None


def _fraction(match: re.Match[str]) -> Fraction | None:
    signs = match["first_sign"] + match["second_sign"]
    decimals = match["decimals"] or match["only_decimals"] or ""
    exponent = int(match["exponent"] or 0)
    denominator = match["denominator"]
    if len(signs) > 1 or abs(exponent) > 100 or (denominator and (match["exponent"] or "." in match[0].rstrip("."))):
        return None
    numerator = int(signs + (match["whole"] or "").replace(",", "") + decimals)
    exponent -= len(decimals)
    return _bounded(numerator * 10 ** max(exponent, 0), int(denominator or 1) * 10 ** max(-exponent, 0))


def _bounded(numerator: int, denominator: int) -> Fraction | None:
    if denominator == 0:
        return None
    number = Fraction(numerator, denominator)
    return number if abs(number.numerator) < _LIMIT and number.denominator < _LIMIT else None


def _are_plain_words(before: str, after: str) -> bool:
    """Say whether the text around a number leaves its meaning alone, as the module's docstring lays down."""
    if before and not (before[-1].isspace() or before[-1] in _BEFORE_A_NUMBER):
        return False
    if after and (after[0].isalpha() or after[0] == "!"):  # "18k"; "5!" is 120
        return False
    for part in (before, after):
        previous = ""
        for position, character in enumerate(part):
            if character.isnumeric():
                return False
            if character == "-":
                if not (previous.isalpha() and part[position + 1 : position + 2].isalpha()):
                    return False
            elif character in "([" and previous.isalpha():
                return False
            elif not (character.isalpha() or character.isspace() or character in _PUNCTUATION):
                return False
            previous = character
    words = _WORD.findall(f"{before} {after}".lower())
    if "times" in _WORD.findall(before.lower()):  # while "5 times" is what "how many times" asks for
        return False
    if any(word in _CHANGES_A_NUMBER or word.removesuffix("s") in _CHANGES_A_NUMBER for word in words):
        return False
    # "3 x", "10 k": one letter after the number is a variable or a factor, not a word. That of "T-shirts" is in one.
    return all(max(map(len, word.split("-"))) > 1 or word in ("a", "i") for word in _HYPHENATED.findall(after.lower()))
