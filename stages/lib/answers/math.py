r"""Equality of mathematical answers: lists, sets, tuples and intervals part by part, the parts by math-verify.

Where the right answer is a number, `number.py` decides: `6 * 7` and `84 \div 2` are no answers to 42. Elsewhere an
operation that the right answer does not have (`\int`, `\sin`, `6 \cdot 7`) is work left to do, and no answer either.
math-verify runs in a process of its own (`worker.py`).
"""

# ruff: noqa: RUF001  signs that people write

import re

from stages.lib.answers.number import canonical_number, read_number, same_number
from stages.lib.answers.spelling import SUPERSCRIPT, SUPERSCRIPTS
from stages.lib.answers.text import same_text
from stages.lib.answers.words import UNITS
from stages.lib.answers.worker import WORKER

_MAX_CHARACTERS = 500
_MAX_PARTS = 12

_TIDY = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle\b|(?<!\\)\\[!,;: ]|\\q?quad\b|~", " "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(?:mathrm|textbf|mathbf|textrm|mbox|operatorname)\b", r"\\text"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*\{([^{}]*)\}\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"(?<!\\)\bsqrt\s*\(([^()]*)\)|√\s*\(([^()]*)\)|(?:√|\\sqrt)\s*(\w)", r"\\sqrt{\1\2\3}"),
        (r"(?<!\w)(\d+)/(\d+)(?!\w)", r"\\frac{\1}{\2}"),
        (r"(?<![\\A-Za-z])pi(?![A-Za-z])|π", r"\\pi "),
        (r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])|∞", r"\\infty "),
        (r"(?<![\\A-Za-z])(sin|cos|tan|cot|sec|csc|ln|log|exp)(?![A-Za-z])", r"\\\1"),
        (r"\*\*", "^"),
        (r"\^\s*(-?\d+)", r"^{\1}"),
        (r"_\{(\w)\}", r"_\1"),
        (r"\\varnothing\b|∅|\\\{\s*\\\}|^\{\s*\}$", r"\\emptyset "),
        (r"[*×·⋅]", r"\\cdot "),
        (r"[−–]", "-"),
        (r"<=|≤|\\leq\b|\\leqslant\b", r"\\le "),
        (r">=|≥|\\geq\b|\\geqslant\b", r"\\ge "),
        (r"±", r"\\pm "),
        (r"∪|(?<=[\])])\s*U\s*(?=[\[(])", r"\\cup "),
        (r"∈", r"\\in "),
        (r"^\{(.*[,\d])\}$", r"\\{\1\\}"),
    )
]  # fmt: skip
_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("\\boxed{", "}"), ("**", "**"), ("`", "`"))
_LEAD_IN = re.compile(r"(?:(?:the|final)\s+)*(?:answer|solution|result)s?(?:\s+(?:is|are))?\s*[:=]?\s+", re.I)
_NAME = re.compile(r"(\([a-z](?:\s*,\s*[a-z])+\)|[A-Za-z](?:_\{?\w+\}?|\([a-z]\))?|\\[a-z]+)\s*(?:=|\\in\b)\s*")
_AND_OR = re.compile(r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|\b(?:and|or)\b")
_UNIT_AT_END = re.compile(r"(?:\s*\\text\s*\{\s*([^{}]*?)\s*\}|\s+([a-z]{2,}))\s*(?:\^\{?([23])\}?)?$")
_MATRIX = re.compile(r"\\begin\{[bp]matrix\}(.*)\\end\{[bp]matrix\}", re.DOTALL)
_VARIABLE = re.compile(r"\d\s*[A-Za-z]$")
_WORDS = re.compile(r"(?:\\text\s*\{[^{}]*\}|[A-Za-z]{3}[A-Za-z\s'-]*)")
_OPERATION = re.compile(
    r"\\(?:int|oint|sum|prod|lim|det|[dt]?binom|choose|max|min|sup|gcd|lcm|over|div|b?mod|pmod|lfloor|lceil|begin|circ"
    r"|lvert|sin|cos|tan|cot|sec|csc|arc\w+|log|ln|lg|exp|partial|text|overline|underline)(?![a-z])|[!÷|%:;$]|\\boxed|\\frac\s*\{d\^?\w*\}\s*\{d"
    r"|(?<![\^\d._A-Za-z\\])\d+\s*(?:\\cdot|\\times)\s*\d+|(?<![\^\d._A-Za-z])\d+\s*[+-]\s*\d+(?![\d\\A-Za-z^(.{!])"
)
_BASE = re.compile(r"(?<=\d)_\w+")  # of 101_2
_DIVISION = re.compile(r"\\frac\s*\{(\d+)\}\s*\{(\d+)\}|(?<!\w)(\d+)\s*/\s*(\d+)(?!\w)")


def is_readable_math(text: str) -> bool:
    """Return whether `text` can be an answer: not too long, and with all its braces closed."""
    return 0 < len(text.strip()) <= _MAX_CHARACTERS and text.count("{") == text.count("}")


def same_math(true: str, given: str) -> bool:
    """Return whether `given` is the right answer `true`."""
    true, given = true.strip(), given.strip()
    if len(given) > _MAX_CHARACTERS:
        return canonical_number(true) is not None and canonical_number(true) == canonical_number(given)
    number = None if _VARIABLE.search(true) else read_number(true)
    if number is not None:
        read, names = read_number(given), {match[1] for match in map(_NAME.match, (true, given)) if match}
        return read is not None and len(names) < 2 and same_number(number, read)
    if sum(map(given.count, "([{")) != sum(map(given.count, ")]}")):
        return False
    (true, unit), (given, other) = _tidy(true), _tidy(given)
    if unit and other and unit != other:
        return False
    if true.replace(" ", "") == given.replace(" ", ""):
        return True
    if _WORDS.fullmatch(true):
        return same_text(true, given)
    return _is_same(true, given)


def _tidy(text: str) -> tuple[str, str]:
    """Return `text` in LaTeX without its wrappers and without the unit at its end; and that unit."""
    text = SUPERSCRIPT.sub(lambda match: "^{" + match[0].translate(SUPERSCRIPTS) + "}", text).strip()
    while True:
        text = text.removesuffix(".").strip()
        lead = _LEAD_IN.match(text)
        wrappers = [w for w in _WRAPPERS if text.startswith(w[0]) and text.endswith(w[1]) and _is_one(text, *w)]
        if lead:
            text = text[lead.end() :]
        elif wrappers:
            text = text[len(wrappers[0][0]) : -len(wrappers[0][1])].strip()
        else:
            break
    for pattern, replacement in _TIDY:
        text = pattern.sub(replacement, text)
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        rows = [row.replace("&", ",") for row in matrix[1].split("\\\\") if row.strip()]
        text = f"({','.join(f'({row})' for row in rows)},)"
    unit = _UNIT_AT_END.search(text)
    name = (unit[1] or unit[2]) if unit and unit.start() else ""
    if unit and (name in UNITS or name.lower() in UNITS):
        return " ".join(text[: unit.start()].split()), name + (unit[3] or "")
    return " ".join(text.split()), ""


def _is_one(text: str, start: str, end: str) -> bool:
    """Return whether the mark at the end of `text` closes the one at its start, with something between."""
    inside = text[len(start) : len(text) - len(end)]
    if start == "\\boxed{":
        depths = [inside[: place + 1].count("{") - inside[: place + 1].count("}") for place in range(len(inside))]
        return bool(inside) and min(depths) >= 0
    return len(text) > len(start) + len(end) and start not in inside and end not in inside


def _is_same(true: str, given: str) -> bool:
    """Return whether two tidy answers are equal: part by part, and by math-verify where there are no parts."""
    names = _names(true), _names(given)
    if names[1] and ((names[0] and names[0] != names[1]) or (len(set(names[1])) > 1 and not names[0])):
        return False  # "x = 3, y = 4" is a point
    for separator in ("\\cup", ","):
        first, second = _split(true, separator), _split(given, separator)
        if len(first) > 1 or len(second) > 1:
            return _are_paired(first, second)
    if names[0] or names[1]:
        return _is_same(*[_NAME.sub("", text, count=1) if _names(text) else text for text in (true, given)])
    outer, other = _brackets(true), _brackets(given)
    if outer or other:
        if outer is None or other is None or outer[0] != other[0]:
            return False
        first, second = _split(outer[1], ","), _split(other[1], ",")
        if outer[0] == "\\{\\}":
            return _are_paired(first, second)
        return len(first) == len(second) and all(map(_is_same, first, second))
    number = None if _VARIABLE.search(true) else read_number(true)
    if number is not None:
        read = read_number(given)
        return read is not None and same_number(number, read)
    alike = true.replace(" ", "") == given.replace(" ", "")
    return alike or (not _has_more_to_do(true, given) and WORKER.ask(true, given) == 1.0)


def _split(text: str, separator: str) -> list[str]:
    """Return the parts of `text` between the separators outside brackets; a part with `\\pm` is two parts."""
    if separator == ",":
        text = _AND_OR.sub(",", text)
    parts, depth, start, place = [], 0, 0, 0
    while place < len(text):
        depth += (text[place] in "([{") - (text[place] in ")]}")
        if depth == 0 and text.startswith(separator, place):
            parts.append(text[start:place])
            start = place + len(separator)
        place += 1
    parts = [part.strip() for part in (*parts, text[start:]) if part.strip()]
    if separator == "," and text.count("\\pm") == 1:
        return [part.replace("\\pm", sign).strip().removeprefix("+").strip() for part in parts for sign in
                ("+-" if "\\pm" in part else "+")]  # fmt: skip
    return parts


def _names(text: str) -> list[str]:
    """Return the names that the parts of `text` give values to, sorted: of `x = 3, y = 4` x and y."""
    return sorted(match[1] for part in _split(text, ",") if (match := _NAME.match(part)))


def _brackets(text: str) -> tuple[str, str] | None:
    """Return the brackets of a set, tuple or interval, and their content; None for another text."""
    for start in ("\\{", "(", "["):
        for end in ("\\}",) if start == "\\{" else (")", "]"):
            inside = text[len(start) : -len(end)]
            if text.startswith(start) and text.endswith(end):
                depth = 0
                for character in inside:
                    depth += (character in "([{") - (character in ")]}")
                    if depth < 0:
                        return None
                if start == "\\{" or len(_split(inside, ",")) > 1:
                    return start + end, inside
    return None


def _are_paired(true: list[str], given: list[str]) -> bool:
    """Return whether the parts of two lists are equal in pairs, in any order."""
    if len(true) != len(given) or len(true) > _MAX_PARTS:
        return False
    left = list(given)
    for part in true:
        equal = next((other for other in left if _is_same(part, other)), None)
        if equal is None:
            return False
        left.remove(equal)
    return True


def _has_more_to_do(true: str, given: str) -> bool:
    """Return whether `given` has an operation or an equation that `true` has not."""
    if given.count("=") != true.count("=") or _BASE.findall(given) != _BASE.findall(true):
        return True
    undone = {match[0] for match in _DIVISION.finditer(given) if int(match[2] or match[4]) == 0 or
              int(match[1] or match[3]) % int(match[2] or match[4]) == 0}  # fmt: skip
    done = {match[0] for match in _DIVISION.finditer(true)}
    return not set(_OPERATION.findall(given)) <= set(_OPERATION.findall(true)) or not undone <= done
