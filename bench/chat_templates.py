"""Which of llama.cpp's chat templates can be said in Go, and why the others not.

    python -m bench.chat_templates

Writes bench/results/chat-templates.md.
"""

import datetime
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from stages.lib.errors import UserError
from stages.lib.model.template import write_choices
from stages.lib.ollama.derive import derive_template, jinja_render
from stages.lib.ollama.proof import compare_renderings

TEMPLATES = Path(sys.prefix) / "llama.cpp" / "models" / "templates"
TOKENS = {"bos_token": "<bos>", "eos_token": "</s>"}
RESULT = Path(__file__).parent / "results" / "chat-templates.md"


def main() -> None:
    """Derive and compare every template, and write the table."""
    rows, taken = [], 0
    for path in sorted(TEMPLATES.glob("*.jinja")):
        verdict, system, end = judge(path.read_text(encoding="utf-8"))
        taken += verdict.startswith("the same")
        rows.append(f"| {path.stem} | {verdict} | {system} | {end} |")
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformers", "jinja2", "llama-cpp-python"))
    text = [
        "# Chat templates in Go",
        "",
        f"{taken} of the {len(rows)} chat templates that come with llama.cpp prompt through Ollama as in transformers.",
        "",
        f"`python -m bench.chat_templates`, {datetime.date.today()}, {platform.system()} {platform.machine()}, Python "
        f"{platform.python_version()}, {packages}.",
        "",
        "| chat template | Go against Jinja | system prompt | ends a turn with |",
        "| --- | --- | --- | --- |",
        *rows,
    ]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text("\n".join(text) + "\n", encoding="utf-8")
    print(f"{RESULT}: {taken} of {len(rows)}")


def judge(chat_template: str) -> tuple[str, str, str]:
    """Give three cells: the verdict, whether the template takes a system prompt, and what it ends a turn with."""
    try:
        render = jinja_render(write_choices(chat_template, {}, TOKENS), TOKENS)
        derived = derive_template(render, "<bos>")
    except UserError as error:
        return cell(f"refused: {error.message}"), "", ""
    system = "taken" if derived.takes_system else "refused"
    end = f"`{cell(derived.turn_end.strip())}`" if derived.turn_end.strip() else ""
    try:
        count = compare_renderings(Path("Modelfile"), derived.template, render, derived.bos)
    except UserError as error:
        conversation = error.message.splitlines()[1].split(":", 1)[1].strip()
        return cell(f"refused: differs on `{conversation}`"), system, end
    return f"the same on {count} conversations", system, end


def cell(text: str) -> str:
    """Give `text` as it may stand in a table."""
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    main()
