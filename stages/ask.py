"""Ask the finished GGUF a question, as any llama.cpp program would, and print the answer as it is written."""

import contextlib
from pathlib import Path

import click

from stages.lib import artifact, formats, llama, options
from stages.lib.errors import UserError
from stages.lib.recipe import Recipe, read_recipe


@click.command(help=__doc__)
@options.recipe
@options.reads("gguf")
@click.option("--question", required=True, help="The question, in quotes.")
def main(recipe: Path, gguf: Path, question: str) -> None:
    run_recipe = read_recipe(recipe)
    if not question.strip():
        raise UserError('--question is empty; expected one, as in: make ask Q="What is 17 + 25?"')
    artifact.read(gguf, "gguf")
    kind = run_recipe.ollama.quantization.lower()
    path = gguf / f"model.{kind}.gguf"
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; expected [ollama] quantization = {kind!r}. Run: make gguf")
    system = run_recipe.format.system_prompt or formats.get(run_recipe.format.name).system_prompt
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    ask(path, messages, run_recipe)


def ask(path: Path, messages: list[dict[str, str]], recipe: Recipe) -> None:
    """Print the greedy answer of the GGUF file `path` to `messages`, piece by piece.

    Raises `UserError` when the file can't be loaded.
    """
    llama_cpp = llama.library()
    try:
        file = llama_cpp.Llama(str(path), n_ctx=recipe.ollama.num_ctx, n_threads=llama.threads(path), verbose=False)
    except ValueError as error:  # all that llama-cpp-python says of a file it can't load
        raise UserError(
            f"{path}: llama.cpp can't load it; delete its folder and run: make gguf. llama.cpp said:\n{llama.said()}"
        ) from error
    with contextlib.closing(file):
        chunks = file.create_chat_completion(
            messages, stream=True, temperature=0.0, repeat_penalty=1.0, max_tokens=recipe.infer.max_completion_tokens
        )
        for chunk in chunks:
            click.echo(chunk["choices"][0]["delta"].get("content", ""), nl=False)
    click.echo()


if __name__ == "__main__":
    main()
