"""One spelling of an answer: ASCII digits and signs, number words as digits, no LaTeX and no Markdown around them."""
# ruff: noqa: RUF001  signs that people write

import re
import unicodedata

from stages.lib.answers.words import CARDINALS, PARTS, SCALES

_SPELLED = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"), **dict.fromkeys("✕⨯·⋅∙∗", "×"),
    **dict.fromkeys("≈∼≃≅～", "~"), **dict.fromkeys("“”„«»「」", '"'), **dict.fromkeys("‘’′ʼ", "'"),
    **dict.fromkeys("º˚", "°"), **dict.fromkeys("⁄∕", "/"), "∴": " ", "⇒": "=", "→": "=",
    "。": ".", "、": ",", "٫": ".", "٬": ",", "٪": "%", "℃": "°C",
    "￥": "¥", "￡": "£", "\ufeff": "", "℉": "°F", "…": "...",
}  # fmt: skip
SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_STYLE = (
    r"\\(?:text|textbf|textit|textrm|textsf|underline|"
    r"mathrm|mathbf|mathit|mathsf|operatorname|mbox|bf|rm)\s*\{([^{}]*)\}"
)
_LATEX = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|!)|(?<=\\boxed)\s+", ""),
        (r"\{,\}", ","),
        (r"(?<=[\d}m])~|~(?=\\|cm|[a-z])|\\[,;: ]|\\q?quad\b", " "),
        (r"\\\$", "＄"),
        (r"\\([%#&])", r"\1"),
        (r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degrees?\b|\\textdegree\b", "°"),
        (_STYLE, r" \1"),
        (_STYLE, r" \1"),
        (r"\\[dtc]?frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))", r" \1\2/\3\4 "),
        (r"(\.\d*)\\overline\s*\{(\d+)\}", r"\1(\2)"),
        (r"\^\s*\{\s*(-?\d+)\s*\}", r"^\1"),
        (r"\\(?:boxed|fbox)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\boxed(\d)", r" \1"),
        (r"\\(?:times|cdot)(?![a-z])", "×"),
        (r"\\(?:approx|sim|simeq)(?![a-z])", "~"),
        (r"\\(?:alpha|beta|gamma|delta|theta|phi|lambda|mu|sigma|omega)\b", "x"),
        (r"\\(?:angle|measuredangle|triangle)\b", "∠"),
    )
]
_MATH = [
    re.compile(pattern, re.DOTALL)
    for pattern in (r"\$\$(.+?)\$\$", r"\\\((.+?)\\\)", r"\\\[(.+?)\\\]", r"(?<![\w$])\$(?=\S)([^$]*\S)\$(?!\w)")
]
# Not the `**` of a power, nor the `_` of an index.
_MARKUP = re.compile(
    r"(?<![\w)*])\*{1,3}(?=[^\s*])|(?<=[^\s*])\*{1,3}(?![\w(*]|\s*\d)|(?<=[^\s*\d])\*{1,3}(?=\s)"
    r"|(?<!\w)_{1,2}(?=\w)|(?<=\w)_{1,2}(?![\w{])|`|^#+\s+"
)
_CARDINAL = "|".join(sorted(CARDINALS, key=len, reverse=True))
_NEXT = f"{_CARDINAL}|hundred|thousand|million|billion|trillion"
_SPELLED_OUT = re.compile(rf"\b(?:{_CARDINAL})\b(?:(?:\s*-\s*|\s+and\s+|\s+)(?:{_NEXT})\b)*", re.I)
_PART_NAMES = {name + plural: size for name, size in PARTS.items() for plural in ("", "s")} | {"halves": 2}
_PART = "|".join(sorted(_PART_NAMES, key=len, reverse=True))
_PARTS_OF = re.compile(rf"(?:(?<![\d.,/])(\d+)(?:\s+|\s?-\s?)|\ban?\s+|\b(?=half\b))({_PART})\b(?!-)", re.I)


def plain_text(text: str) -> str:
    """Return `text` in one spelling: ASCII digits and signs, no LaTeX and no Markdown around the words."""
    if not text.isascii():
        text = SUPERSCRIPT.sub(lambda match: "^" + match[0].translate(SUPERSCRIPTS), text)
        text = "".join(map(_spell, text))
    for pattern in _MATH:
        text = pattern.sub(r" \1 ", text)
    if "\\" in text or "{" in text:
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
    return _MARKUP.sub("", text).strip()


def _spell(character: str) -> str:
    if character.isascii():
        return character
    if character in _SPELLED:
        return _SPELLED[character]
    kind = unicodedata.category(character)
    if kind == "Nd":
        return str(unicodedata.decimal(character))
    if kind == "Zs":
        return " "
    if kind == "No" and unicodedata.decomposition(character).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/") + " "
    return chr(ord(character) - 0xFEE0) if "！" <= character <= "～" else character


def digits_for_words(text: str) -> str:
    """Return `text` with its English number words as digits: "forty-two" as "42", "3 quarters" as "3/4"."""
    text = _SPELLED_OUT.sub(lambda match: _value_of_words(match[0]), text)
    return _PARTS_OF.sub(lambda match: f"{match[1] or 1}/{_PART_NAMES[match[2].lower()]}", text)


def _value_of_words(words: str) -> str:
    """Return number words as digits; words that are not one number each by itself ("five six")."""
    each_alone = re.sub("[a-z]+", lambda match: str(CARDINALS.get(match[0], match[0])), words.lower())
    total, current = 0, None
    for word in re.findall(r"[a-z]+", words.lower()):
        if word == "and":
            if current is None or current % 100:
                return each_alone
        elif word in CARDINALS:
            value, low = CARDINALS[word], (current or 0) % 100
            if current is not None and not (
                (low == 0 and current >= 100) or (low >= 20 and low % 10 == 0 and 0 < value < 10)
            ):
                return each_alone
            current = (current or 0) + value
        elif word == "hundred":
            current = (1 if current is None else current) * 100
        else:
            total, current = total + (current or 1) * SCALES[word], 0
    return str(total + (current or 0))
