"""Write the Ollama Modelfile beside the recommended GGUF, and prove that it prompts the model as in training."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from stages.lib import options
from stages.lib.answers import formats
from stages.lib.artifact.folder import write_artifact
from stages.lib.ends import end_ids
from stages.lib.errors import UserError
from stages.lib.gguf.tokens import Vocabulary
from stages.lib.ollama import modelfile
from stages.lib.ollama.derive import Derived, Render, of_tokenizer, refuse_unused_system
from stages.lib.ollama.go import render_by_go
from stages.lib.ollama.proof import compare_renderings, first_difference, prompts_of
from stages.lib.ollama.served import PASSTHROUGH, served_by
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Recipe
from stages.lib.report import terminal
from stages.lib.report.figures import OllamaModelfileFigures

TOKENIZER_FILES = ("model/*.jinja", "model/*.json", "model/*.model", "model/*.txt")  # in merge
PARAMETERS = ("num_ctx", "temperature", "top_p", "top_k", "min_p", "repeat_penalty")


@click.command(help=__doc__)
@options.recipe
@options.reads("merge")
@options.reads("gguf")
@options.out
def main(recipe: Path, merge: Path, gguf: Path, out: Path) -> None:
    run_recipe = read_recipe(recipe)
    kind = run_recipe.ollama.quantization
    inputs = {"merge": (merge, TOKENIZER_FILES), "gguf": (gguf, [f"*.{kind.lower()}.gguf"])}
    tables = run_recipe.tables("format", "ollama") | {"data": {"max_prompt_tokens": run_recipe.data.max_prompt_tokens}}
    room = sum(path.stat().st_size for path in recommended(gguf, kind))
    with write_artifact(out, "ollama-modelfile", tables, inputs, room_bytes=room) as run:
        figures = make(run_recipe, merge / "model", gguf, run.folder)
        run.metrics.update(figures)
    click.echo(terminal.ollama_modelfile(figures))


def make(recipe: Recipe, model: Path, gguf: Path, folder: Path) -> OllamaModelfileFigures:
    """Write `folder`/Modelfile for the merged `model`, with the recommended file of `gguf` beside it; return figures.

    And prompts.json: conversations, and the prompt without BOS that Ollama is to make of each (`make ollama` asks it).

    Raises `UserError` for a chat template that Go can't follow, and when the written Modelfile differs from tokenizer,
    generation config, format or recipe.
    """
    from transformers import AutoTokenizer, GenerationConfig

    files = recommended(gguf, recipe.ollama.quantization)
    if len(files) != 1:
        raise UserError(
            f"{gguf}: holds {len(files)} files of the type {recipe.ollama.quantization!r}; expected one. Run: make gguf"
        )
    beside = folder / files[0].name
    try:
        os.link(files[0], beside)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(files[0], beside)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    render, derived = of_tokenizer(tokenizer, model)
    architecture = check_gguf(files[0], tokenizer.chat_template, derived)

    ends = end_ids(GenerationConfig.from_pretrained(model), tokenizer)
    stops = stop_strings([tokenizer.decode([each]) for each in ends], formats.get(recipe.format.name))
    asked = render(
        [{"role": "system", "content": "1"}, {"role": "user", "content": "2"}][not derived.takes_system :], True
    )
    served = served_by(architecture, tokenizer.chat_template, asked)
    path, passthrough = folder / "Modelfile", served == PASSTHROUGH
    text = written(files[0].name, derived.template, stops, recipe, passthrough=passthrough)
    path.write_text(text, encoding="utf-8")
    prompts = prompts_of(render, derived.bos, recipe.format.system_prompt)
    asked_of_ollama = [{"messages": messages, "prompt": prompt} for messages, prompt in prompts]
    text = json.dumps({"bos": derived.bos, "prompts": asked_of_ollama}, indent=1, ensure_ascii=False)
    (folder / "prompts.json").write_text(text + "\n", encoding="utf-8")
    conversations, earlier_answers = prove(path, render, derived, stops, recipe, passthrough=passthrough)
    return {
        "file": files[0].name,
        "conversations": conversations,
        "stops": stops,
        "system_prompt": bool(recipe.format.system_prompt),
        "earlier_answers_as_trained": earlier_answers,
        "architecture": architecture,
        "prompted_by": served,
    }


def recommended(gguf: Path, quantization: str) -> list[Path]:
    """Return the files of the type `quantization` in the gguf artifact."""
    return sorted(gguf.glob(f"*.{quantization.lower()}.gguf"))


def check_gguf(file: Path, chat_template: str, derived: Derived) -> str:
    """Return the GGUF's architecture.

    Raises `UserError` unless it has this chat template, and adds BOS exactly where the template writes it.
    """
    with contextlib.closing(Vocabulary(file)) as vocabulary:
        file_template = (vocabulary.llama_cpp.llama_model_chat_template(vocabulary.model, None) or b"").decode()
        adds_bos, architecture = vocabulary.adds_bos, vocabulary.metadata("general.architecture")
    if file_template != chat_template:
        raise UserError(
            f"{file}: has another chat template than the merged model's tokenizer: one of them changed after training; "
            f"{first_difference(file_template, chat_template)}. Run: make merge gguf"
        )
    if adds_bos != bool(derived.bos):
        has = {True: "one BOS", False: "no BOS"}
        raise UserError(
            f"{file}: makes Ollama begin a prompt with {has[adds_bos]}; expected {has[bool(derived.bos)]}, as in the "
            "chat template of training. Fix add_bos_token of the tokenizer, then run: make merge gguf"
        )
    return architecture


def stop_strings(ends: Iterable[str], answers: formats.Format) -> list[str]:
    """Return the texts of the end tokens and the format's stops, without parts of an answer.

    Ollama ends the text before the stop string. With a closing tag as a stop no answer could be read; the model has
    learnt to write its end token after it.
    """
    answer = answers.write(formats.Answer("1 + 1 = 2", "2"))
    return [stop for stop in dict.fromkeys([*ends, *answers.stops]) if stop not in answer]


def written(file: str, template: str, stops: Sequence[str], recipe: Recipe, *, passthrough: bool) -> str:
    """Return the text of the Modelfile. Raises `UserError` for a value that a Modelfile can't hold.

    `passthrough` has Ollama prompt with TEMPLATE and hand over the whole text of an answer.
    """
    text = "# In this folder: ollama create NAME -f Modelfile\n"
    text += f"FROM ./{file}\n"
    text += modelfile.command("TEMPLATE", template)
    text += "PARSER passthrough\n" if passthrough else ""
    if recipe.format.system_prompt:
        text += modelfile.command("SYSTEM", recipe.format.system_prompt)
    for stop in stops:
        text += modelfile.parameter("stop", stop)
    for name, value in parameters(recipe).items():
        text += modelfile.parameter(name, value)
    if recipe.ollama.license:
        text += modelfile.command("LICENSE", recipe.ollama.license)
    return text


def parameters(recipe: Recipe) -> dict[str, int | float]:
    """Return the numbers of the Modelfile by name.

    `num_predict` ends an answer that fills the context: Ollama would generate on and drop the prompt's beginning.
    """
    knobs = {name: getattr(recipe.ollama, name) for name in PARAMETERS}
    return knobs | {"num_predict": recipe.ollama.num_ctx - recipe.data.max_prompt_tokens}


def prove(
    path: Path, render: Render, derived: Derived, stops: Sequence[str], recipe: Recipe, *, passthrough: bool
) -> tuple[int, bool]:
    """Compare the Modelfile, read back, with its sources.

    Return the number of conversations that TEMPLATE and chat template render alike, and whether earlier answers are
    among them. Raises `UserError` for a difference.
    """
    answers, system = formats.get(recipe.format.name), recipe.format.system_prompt
    commands = modelfile.read(path)
    (file,) = modelfile.values(commands, "from")
    if not (path.parent / file).is_file():
        raise UserError(f"{path}: FROM {file} names no file beside it")
    file_stops = modelfile.values(commands, "parameter stop")
    for stop in stops:
        if stop not in file_stops:
            raise UserError(
                f"{path}: the stop {stop!r} is missing, and a model in Ollama might never stop; found {file_stops}"
            )
    for stop in file_stops:
        if stop in answers.write(formats.Answer("1 + 1 = 2", "2")):
            raise UserError(f"{path}: the stop {stop!r} is a part of every answer, which Ollama would lose")
    systems = modelfile.values(commands, "system")
    if systems != ([system] if system else []):
        raise UserError(f"{path}: SYSTEM is {systems!r}; expected the format's: {system!r}")
    refuse_unused_system(derived, system, answers.name, path)
    for name, value in parameters(recipe).items():
        if modelfile.values(commands, f"parameter {name}") != [str(value)]:
            raise UserError(f"{path}: PARAMETER {name} is not {value}; expected the recipe's value")
    if (found := modelfile.values(commands, "parser")) != (wanted := ["passthrough"] * passthrough):
        raise UserError(f"{path}: PARSER is {found}; expected {wanted}, by which Ollama prompts as in training")
    (template,) = modelfile.values(commands, "template")
    conversations = compare_renderings(path, template, render, derived.bos)
    return conversations, earlier_answers_agree(template, render, derived.bos, answers)


def earlier_answers_agree(template: str, render: Render, bos: str, answers: formats.Format) -> bool:
    """Return whether an earlier answer is rendered with its reasoning, as by the chat template: Go can't drop it."""
    turns = ("1 + 1?", answers.write(formats.Answer("1 + 1 = 2", "2")), "2 + 2?")
    roles = ("user", "assistant", "user")
    conversation = [{"role": role, "content": content} for role, content in zip(roles, turns, strict=True)]
    return render_by_go(template, [conversation]) == [render(conversation, True).removeprefix(bos)]


if __name__ == "__main__":
    main()
