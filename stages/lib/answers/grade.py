"""Whether a completion is right: the one judgement of infer and score-base."""

from typing import Any

from stages.lib.answers.formats import Format
from stages.lib.answers.number import given_number


def mark(answer_format: Format, completion: str, right: str) -> dict[str, Any]:
    """Return what a completion is worth: `well_formed`, `given` (canonical, None if none can be read) and `right`."""
    read = answer_format.read(completion)
    given = given_number(read.answer) if read else None
    return {"well_formed": read is not None, "given": given, "right": given is not None and given == right}
