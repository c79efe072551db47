"""Whether a completion is right: the one judgement of infer and score-base."""

from typing import Any

from stages.lib import answers
from stages.lib.formats import Format


def mark(answer_format: Format, completion: str, right: str) -> dict[str, Any]:
    """Return what a completion is worth: `well_formed`, `given` (canonical, None if none can be read) and `right`."""
    read = answer_format.read(completion)
    given = answers.given(read.answer) if read else None
    return {"well_formed": read is not None, "given": given, "right": given is not None and given == right}
