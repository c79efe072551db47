"""Multiple choice: the options of a row, in whatever columns they stand, and the one that is right."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from stages.lib.answers.text import canonical_text, read_choice
from stages.lib.data.shapes import Unusable, shown

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# The names of the fields that hold an option's label and its text, where an option is a struct.
LABELS, TEXTS = ("label", "labels", "key", "id"), ("text", "texts", "content", "value")
Options = list[tuple[str, str, str]]  # letter, the dataset's own label ("" if it has none), text


def with_options(question: str, answer: Any, values: Sequence[Any], names: Sequence[str], by: str) -> tuple[str, str]:
    """Return the question with its options below, a line each, and the right one as letter and text: "B) 7".

    `values` are those of the source's columns `choices`, `names`; `by` is its `chosen_by`. The answer is the letter
    alone where its text would not be read as that option. Raises `Unusable` for a row without two options, and for an
    answer that is none of them or reads two ways.
    """
    options = options_of(values[0]) if len(names) == 1 else lettered(names, values)
    if len(options) < 2:
        raise Unusable("no options", f"expected two options or more in choices; found {shown(values[0])}")
    letter, _, text = options[chosen(answer, options, by)]
    lines = [f"{each}) {words}" for each, _, words in options]
    is_alone = sum(canonical_text(words) == canonical_text(text) for _, _, words in options) == 1
    is_read = read_choice(f"{letter}) {text}") == (letter, canonical_text(text))
    return "\n".join([question, *lines]), f"{letter}) {text}" if is_alone and is_read else letter


def shuffled(question: str, options: Sequence[Any]) -> list[Any]:
    """Return the options in an order that hangs on the question and their texts alone."""
    return sorted(options, key=lambda each: hashlib.sha256(f"{question}\0{each}".encode(errors="replace")).digest())


def options_of(value: Any) -> Options:
    """Return the options in one column: a list, a struct of two lists, a list of structs, texts by letter, or JSON."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Unusable("no options", f"choices hold a text that is no JSON ({error}): {value[:80]!r}") from error
    if isinstance(value, dict):
        labels, texts = field_of(value, LABELS), field_of(value, TEXTS)
        if isinstance(labels, list) and isinstance(texts, list) and len(labels) == len(texts):
            return lettered(labels, texts)
        return lettered(list(value), list(value.values()))
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return lettered([field_of(each, LABELS) for each in value], [field_of(each, TEXTS) for each in value])
    return lettered([""] * len(value), value) if isinstance(value, list) else []


def field_of(struct: dict[str, Any], names: Sequence[str]) -> Any:
    """Return the first field of a struct that has one of `names`; None without one."""
    return next((struct[name] for name in names if name in struct), None)


def lettered(labels: Sequence[Any], texts: Sequence[Any]) -> Options:
    """Return options with their letters: the labels, if all are letters, else by place. Empty texts are left out."""
    own = [str(label).strip() if isinstance(label, str | int) else "" for label in labels]
    letters = [label.upper() for label in own]
    if len(set(letters)) < len(letters) or not all(len(letter) == 1 and letter in LETTERS for letter in letters):
        letters = list(LETTERS)
    words = [" ".join(str(text).split()) if isinstance(text, str | int | float) else "" for text in texts]
    return [each for each in zip(letters, own, words, strict=False) if each[2]]


def chosen(answer: Any, options: Options, by: str) -> int:
    """Return the place of the right option, which `answer` gives as letter or label, as text, or as a number from 0.

    `by` says which it is: "letter", "text", "from 0", "from 1", or "" where what reads two ways is refused.
    """
    given = str(answer).strip() if isinstance(answer, str | int | float) and not isinstance(answer, bool) else ""
    if not given:
        raise Unusable("no answer", f"no answer: {answer!r}")
    given = given.removesuffix(".0") if isinstance(answer, float) else given
    labels = [{letter.casefold(), label.casefold()} - {""} for letter, label, _ in options]
    bare = given.strip("().:[] ").casefold()
    option = read_choice(given)
    ways = {
        "letter": [place for place, own in enumerate(labels) if bare in own],
        "text": [place for place, (_, _, text) in enumerate(options) if canonical_text(text) == canonical_text(given)],
    }
    if not ways["letter"] and option and option[1]:  # "B) 7"
        ways["letter"] = [place for place, own in enumerate(labels) if option[0].casefold() in own]
    numbered = any(label.isdigit() for _, label, _ in options)
    for name, first in (("from 0", 0), ("from 1", 1)):
        if bare.isdigit() and (by == name or name == "from 0") and not (numbered and not by):
            ways[name] = [place for place in (int(bare) - first,) if 0 <= place < len(options)]
    found = {name: places[0] for name, places in ways.items() if places and by in ("", name)}
    if len(set(found.values())) > 1:
        read = ", ".join(f"{options[place][0]}) by {name!r}" for name, place in found.items())
        raise Unusable("unreadable answer", f'{given!r} reads two ways: {read}. State chosen_by = "{next(iter(found))}"'
                       " or the other")  # fmt: skip
    if not found:
        hint = '. Numbers from 1? State chosen_by = "from 1"' if bare == str(len(options)) and not by else ""
        texts = ", ".join(f"{letter}) {text[:30]}" for letter, _, text in options)
        raise Unusable("unreadable answer", f"{given[:80]!r} is none of the options {texts}{hint}")
    return next(iter(found.values()))
