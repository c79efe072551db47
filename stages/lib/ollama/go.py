"""Go's own text/template, in the helper that set-up builds."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from stages.lib.ollama.derive import Conversation

HELPER = "temper-gotemplate"  # built from docker/gotemplate


def go_helper() -> Path | None:
    """Give the program that renders with Go's text/template: beside this Python or on PATH; None if there is none."""
    beside = Path(sys.prefix) / "bin" / HELPER
    found = str(beside) if beside.is_file() else shutil.which(HELPER)
    return Path(found) if found else None


def render_by_go(program: Path, template: str, conversations: Sequence[Conversation]) -> list[str]:
    """Render every conversation with the helper. Raises `ValueError` with Go's message if the template fails."""
    request = json.dumps({"template": template, "conversations": [list(each) for each in conversations]})
    done = subprocess.run([program], input=request, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return json.loads(done.stdout)["texts"]
