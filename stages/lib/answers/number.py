r"""Numbers of answers, read by one grammar from a dataset and from a completion, with exact arithmetic.

    read_number(text)         the number and its unit, or None   "1,200"  "$18"  "1 1/2 cups"  "The answer is 18."
    canonical_number(text)    its value as a string, or None     "1200"   "18"   "3/2"         "18"
    same_number(true, given)  whether two are the same, units included

A number is digits, or a fraction in English words. Around it may be a sign, a currency, thousands in groups (by comma,
blank, apostrophe, `_`; Indian groups too), a power, `x 10^6`, a scale (`2 dozen`, `1.2k`), a unit, a lead-in (`x =`,
`The answer is`), a hedge (`about`). Decisions:

- **What the grammar does not know is not read.** Every word must stand in `words.py`, and every sign here. `not 42`,
  `less than 42`, `5 Dutzend`, `loss of 5`, `3 PM`, `May 5`, `($5)`, `18th`, `5!` and `NaN` are no answers.
- **Work left to do is no answer**: `6 * 7`, `40 + 2`, `sqrt(16)` and a division that comes out even (`84/2`). A power
  and `1.2 * 10^6` are ways to write a number.
- A whole number in words alone is no answer (`forty-two`): the formats ask for digits. `one and a half` is one.
- Two numbers are no answer (`41 or 42`, `10:30`, `2 + 2 = 4`), but for `4 dollars and 50 cents` and `42 (forty-two)`.
- Nothing is rounded. `0.333...` and `0.\overline{3}` are 1/3. `50%` has the unit `%`; `same_number` compares it.
- `decimal` is the sign before the decimals, "." or ",". With ".", `3,5` is not read; with ",", `1.234` is 1234.
- A value has at most 100 digits above and below the bar; a text over 1,000 characters is not read.
"""

import functools
import re
from fractions import Fraction
from typing import NamedTuple

from stages.lib.answers import words
from stages.lib.answers.spelling import digits_for_words, plain_text
from stages.lib.answers.words import APART, CURRENCIES, PLAIN, SCALES, SHORT_SCALES, THINGS, UNITS, Unit, find_unit

MAX_TEXT_CHARACTERS = 1000
FLOAT_TOLERANCE = Fraction(5, 1000)  # of a float that does not end, unless the source states another
_LIMIT = 10**100

_GROUPED = r"(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d{1,3}(?:[ ]\d{3})+(?![ ]?/|\d)|\d{1,3}(?:['_]\d{3})+|\d+)"
_DIGITS = rf"(?:{_GROUPED}(?:\.\d*)?|\.\d+)"
_MONEY = "|".join(sorted(map(re.escape, CURRENCIES), key=len, reverse=True))
_POWER_OF = r"\s?(?:\^|\*\*)\s?"
_QUANTITY = re.compile(
    rf"""
    (?P<signs> (?: (?: [-+] | \bminus\b | \bnegative\b | (?<![^\W\d_])(?:{_MONEY})\.? ) \s? ){{0,4}} )
    (?: (?P<whole>\d+) (?: \s+and\s+ | \s+ | - ) (?P<top>\d+) \s?/\s? (?P<bottom>\d+)
      | (?P<above>{_GROUPED}) \s?/\s? (?P<below>\d+)
      | (?P<base>\d+) {_POWER_OF} (?P<power>-?\d{{1,3}})
      | (?P<number>{_DIGITS}) (?P<repeats> (?<=[.\d])\(\d+\) | \.\.\. )? (?: [eE](?P<exponent>[+-]?\d{{1,3}}) )?
        (?: \s? [*x×] \s? 10 {_POWER_OF} (?P<ten>-?\d{{1,3}}) )? )
    (?P<scales> (?: \s+ (?:{"|".join(SCALES)})\b )+ | (?:{"|".join(SHORT_SCALES)})(?![^\W\d_]) )?
    """,
    re.VERBOSE | re.I,
)
_MINUS = re.compile(r"-|minus|negative")
_WORD = r"[^\W\d_]+(?:['-][^\W\d_]+)*"
_TOKEN = re.compile(rf"{_WORD}(?:\^?[23](?!\d))?|°\s?[CF]\b|\S")
_NAMED = re.compile(r"(?<![^\W\d_])(?:[A-Za-z]|[A-Z]{2}|m?\s?∠\s?[A-Z]{0,3}x?)(?=\s*[=~:]|\s+(?:is|equals)\b)")
_INDEX = re.compile(r"(?<=(?<![A-Za-z])[A-Za-z])(?:_\{?\w{1,3}\}?|\([a-z0-9]{1,3}\))(?=\s*[=:~])")
_BELOW_ZERO = re.compile(r"(\s*(?:°\s?[CF]?|degrees?(?:\s+(?:celsius|fahrenheit))?)?)\s+below(?:\s+0)?\b", re.I)
_SMALLER_PART = re.compile(rf"\s*(\w+)\s*(?:,|\band\b)?\s*({_DIGITS})\s*(\w+)")
_RESTATED = re.compile(rf"\s*\(\s*({_DIGITS})\s*\)")
_RAISED_WORD = re.compile(rf"\b(?:(sq)(?:uare|\.|\b)|cu(?:bic|\.|\b))\s*({'|'.join(words.LENGTHS)})\b", re.I)
_PER = re.compile(
    rf"(?:/|\bper\b|\b(?:an?|each|every)\b(?=\s+(?:second|minute|hour|day|week|month|year)\b))\s*({_WORD}(?:\^?[23])?)"
)
_ANOTHER_NAME = {"per cent": "percent", "mph": "mile/hour", "kph": "km/hour", "kmh": "km/hour", "or so": ""}
_NAMED_OTHERWISE = re.compile(r"\b(?:per\s+cent|mph|kph|kmh|or\s+so)\b", re.I)
_AROUND = frozenset(".,;:?!\"'()[]—")
_OPENING = frozenset("\"'([")
_INTEGER = re.compile(r"-?[1-9][0-9]{0,17}|0")


class Number(NamedTuple):
    """A number as read. `digits` are its decimals as written, None for a fraction or a power."""

    value: Fraction
    unit: Unit | None = None
    per: Unit | None = None  # of `km/h`: the hour
    digits: int | None = None
    bare: bool = False  # digits, with no letter beside them


@functools.lru_cache(1 << 16)
def read_number(text: str, decimal: str = ".") -> Number | None:
    """Return the number that `text` gives, or None. `decimal` is the sign before decimals, "." or ","."""
    if _INTEGER.fullmatch(text):
        return Number(Fraction(int(text)), digits=0, bare=True)
    if len(text) > MAX_TEXT_CHARACTERS:
        return None
    text = _INDEX.sub("", plain_text(text))
    if decimal == "," and ("," in text or not re.search(r"\.(?:\d{1,2}|\d{4,})(?!\d)", text)):
        text = text.rstrip(",").translate({ord(","): ".", ord("."): ","}).rstrip(",")
    in_digits = digits_for_words(text) if any(map(str.isalpha, text)) else text
    match = _QUANTITY.search(in_digits)
    number = _read_match(in_digits, match) if match else None
    if number is None or in_digits == text:
        return number
    is_in_words = number.value.denominator == 1 and not any(map(str.isdecimal, text))
    return None if is_in_words else number._replace(bare=False)


def canonical_number(text: str) -> str | None:
    """Return the value of the number that `text` gives ("1200", "-5/2"; of `50%` it is "50"), or None."""
    number = read_number(text)
    return None if number is None else str(number.value)


def _read_match(text: str, match: re.Match[str]) -> Number | None:
    """Return the number of a match; None if the text around it changes it."""
    value, before, after = _value(match), text[: match.start()], text[match.end() :]
    signs = match["signs"].lower()
    minus = len(_MINUS.findall(signs))
    money = _MINUS.sub("", signs).replace("+", "").strip(" .")
    if value is None or minus + signs.count("+") > 1 or not _leaves_alone(before, signs):
        return None
    is_loss = (before.strip(), after.strip(" ."), minus) == ("(", ")", 0)  # "($5)"
    if is_loss or (money and find_unit(money) is None):
        return None
    below = _BELOW_ZERO.match(after)
    if below and not signs:
        minus, after = 1, below[1] + after[below.end() :]
    repetition = _RESTATED.match(after)
    if repetition and _decimal_value(repetition[1]) == value:
        after = after[repetition.end() :]
    part = _SMALLER_PART.match(after)
    if part:  # "4 dollars and 50 cents"
        larger, smaller = find_unit(part[1]), find_unit(part[3])
        if not (larger and smaller and larger.kind == smaller.kind and larger.size > smaller.size):
            return None
        value += (_decimal_value(part[2]) or 0) * smaller.size / larger.size
        after = f" {part[1]}{after[part.end() :]}"
    units = _units_after(after, find_unit(money) if money else None)
    if units is None:
        return None
    exact = not match["number"] or any(match[name] for name in ("scales", "ten", "repeats", "exponent"))
    bare = not re.search(r"[^\W\d_]", re.sub(r"°\s?[CF]\b", "", before + after))
    digits = None if exact or part else len(match["number"].partition(".")[2])
    return Number(-value if minus else value, *units, digits, bare and digits is not None)


def _value(match: re.Match[str]) -> Fraction | None:
    """Return the value of the digits of a match, with its scales and without its sign; None for work left to do."""
    value = None
    if match["whole"]:
        top, bottom = int(match["top"]), int(match["bottom"])
        value = int(match["whole"]) + Fraction(top, bottom) if 0 < top < bottom else None
    elif match["above"]:
        top, bottom = int(re.sub(r"\D", "", match["above"])), int(match["below"])
        value = Fraction(top, bottom) if bottom and top % bottom else None
    elif match["base"]:
        base, power = int(match["base"]), int(match["power"])
        if base > 1 and abs(power) > 1 and abs(power) * len(match["base"]) < 400:
            value = Fraction(base) ** power
    else:
        value = _decimal_value(match["number"], match["repeats"])
        power = int(match["exponent"] or 0) + int(match["ten"] or 0)
        value = None if value is None or abs(power) > 100 else value * Fraction(10) ** power
    for scale in (match["scales"] or "").lower().split():
        has_money = _MINUS.sub("", match["signs"].lower()).strip(" +")
        if value is None or (scale not in SCALES and scale != "k" and not has_money):
            return None  # "5m" is metres or millions
        value *= SCALES.get(scale) or SHORT_SCALES[scale]
    return value if value is not None and abs(value.numerator) < _LIMIT and value.denominator < _LIMIT else None


def _decimal_value(number: str, repeats: str | None = None) -> Fraction | None:
    """Return the value of digits; `repeats` is "(3)", the digits that repeat, or "...": the last ones repeat."""
    head, _, decimals = re.sub(r"[, '_]", "", number).partition(".")
    if not repeats:
        return Fraction(int(head + decimals), 10 ** len(decimals)) if head + decimals else None
    shown = re.fullmatch(r"(\d*?)(\d{1,6}?)\2+", decimals) if repeats == "..." else None
    if not shown and (repeats == "..." or "." not in number):
        return None
    decimals, period = shown.groups() if shown else (decimals, repeats.strip("()"))
    rest = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(decimals))
    return Fraction(int(head + decimals or 0), 10 ** len(decimals)) + rest


def _leaves_alone(before: str, signs: str) -> bool:
    """Return whether the text before a number and its signs is a lead-in that changes nothing."""
    if before and ((before[-1].isalpha() and before[-1].isascii()) or before[-1] in "_-—.,"):
        return False
    tokens = [token.lower() for token in _TOKEN.findall(_NAMED.sub("", before))]
    if not tokens:
        return _NAMED.search(before) is not None or not before.strip()
    last = tokens[-1]
    follows = signs.startswith(("-", "+")) and (last[0].isalpha() or last == ":")
    if follows and (not before[-1].isspace() or signs[1:2].isspace() or (len(last) < 2 and last != ":")):
        return False  # "x - 5"; but "She pays -3"
    for place, word in enumerate(tokens):
        thing = word not in UNITS and find_unit(word) is not None
        if not (thing or any(word in known for known in (PLAIN, APART, words.HEDGES, words.NAMES, _AROUND, "=~"))):
            return False
        if word == "!" and (place + 1 == len(tokens) or tokens[place + 1] == "="):
            return False
    said = [token for token in tokens if token not in _OPENING]
    last = said[-1] if said else ""
    if last == "as" and said.count("as") > 1:  # "as many as 5"
        return False
    if last == "of":  # "the square of 5"
        return len(said) > 1 and said[-2] in ("total", "cost", "price", "amount", "answer")
    names_it = last in APART or last in words.NAMES or (last not in UNITS and find_unit(last) is not None)
    return last in PLAIN or not names_it  # "every 5", "page 5"


def _units_after(after: str, unit: Unit | None) -> tuple[Unit | None, Unit | None] | None:
    """Return the unit and its `per` in the text after a number; None if a word of it is unknown."""
    if after.lstrip()[:1] == "!" or (after[:1] == "(" and after[1:2].isdigit()):
        return None
    is_touching, per = after[:1].isalpha(), None
    after = _NAMED_OTHERWISE.sub(lambda match: _ANOTHER_NAME[" ".join(match[0].lower().split())], after)
    after = _RAISED_WORD.sub(lambda match: f"{match[2]}^{2 if match[1] else 3}", after)
    rate = _PER.search(after)
    if rate:
        per, after = _unit_of(rate[1]), after[: rate.start()] + after[rate.end() :]
        if per is None:
            return None
    tokens = _TOKEN.findall(after)
    for place, token in enumerate(tokens):
        word, token_unit = token.lower(), _unit_of(token)
        if word in ("a", "an", "i") and not "".join(tokens[place + 1 : place + 2]).isalpha() and token != "A":
            return None  # "5 a.m.", "5 i"
        if is_touching and place == 0 and token not in UNITS and word not in UNITS:
            return None
        changes_nothing = word in PLAIN or word in APART
        if token_unit and not (changes_nothing and place):
            if unit and token_unit.kind == "%":
                return None
            unit = unit or token_unit
        elif not changes_nothing and not any(
            word in known for known in (words.AFTER, words.HEDGES, words.NAMES, _AROUND)
        ):
            return None
    return unit, per


@functools.lru_cache(1 << 12)
def _unit_of(token: str) -> Unit | None:
    """Return the unit of a word, of `m^2` and `m2` that of a square."""
    raised = re.fullmatch(r"([^\W\d_]+)\^?([23])", token)
    if not raised:
        return find_unit(token.replace(" ", ""))
    unit, power = UNITS.get(raised[1]), int(raised[2])
    return Unit(f"{unit.kind}^{power}", unit.size**power) if unit and unit.kind in ("m", "s") else None


def same_number(true: Number, given: Number, tolerance: Fraction = FLOAT_TOLERANCE) -> bool:
    """Return whether `given` is the right answer `true`.

    A unit that only one of the two has changes nothing; two units must be of one kind and are converted (`450 cents` is
    `$4.50`). `25%` is also 25 and 1/4, whichever of the two has the sign; a percentage under 1 is not also the plain
    number. A `true` of 15 significant digits or more is a float that does not end: a decimal rounded to its last digit
    is right within `tolerance`, a share of the value.
    """
    if true.unit is given.unit is true.per is given.per is None:
        return _is_close(true, given, tolerance)
    percent = [number.unit == UNITS["%"] for number in (true, given)]
    if any(percent) and not all(percent):
        plain, hundredths = (given, true.value) if percent[0] else (true, given.value)
        equal = plain.value * 100 == hundredths or (plain.value == hundredths and abs(plain.value) >= 1)
        return equal and plain.unit is None
    size, per = _size_in(true.unit, given.unit), _size_in(true.per, given.per)
    if size is None or per is None:
        return False
    if (true.per is None) != (given.per is None) and true.unit and given.unit and true.unit.kind not in words.MONEY:
        return False  # "60 km" for "60 km/h"
    return _is_close(true, given._replace(value=given.value * size / per), tolerance)


def _size_in(first: Unit | None, second: Unit | None) -> Fraction | None:
    """Return the size of the second unit in the first; 1 where one is not stated, None for units of two kinds."""
    if first is None or second is None:
        return Fraction(1)
    kinds = {first.kind, second.kind}
    alike = kinds in ({"°", "°C"}, {"°", "°F"}) or ("thing" in kinds and kinds <= {*THINGS, "thing"})
    return second.size / first.size if len(kinds) == 1 or alike else None


def _is_close(true: Number, given: Number, share: Fraction) -> bool:
    """Return whether two values are equal up to the rounding of a float or of a long decimal of an endless fraction."""
    miss, digits = abs(true.value - given.value), given.digits or 0
    if not (miss and (true.digits or digits)):
        return miss == 0
    if _is_float(true) or _is_float(given):
        if miss <= abs(true.value) / 10**12:
            return True
    elif pow(10, 400, true.value.denominator) == 0 or abs(given.value) * 10**digits < 10**5:
        return False
    return digits > 0 and miss * 2 * 10**digits <= 1 + Fraction(1, 10**9) and miss <= abs(true.value) * share


def _is_float(number: Number) -> bool:
    """Return whether a number has decimals and 15 digits or more, as a float that does not end."""
    return bool(number.digits) and abs(number.value) * 10 ** (number.digits or 0) >= 10**14
