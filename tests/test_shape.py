"""What every stage has in common: it runs, gives --help without a heavy module, and shares one set of options."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[1]
STAGES = sorted(path.stem for path in (ROOT / "stages").glob("*.py") if path.stem != "__init__")
LIBRARY = sorted(
    path.relative_to(ROOT / "stages" / "lib").with_suffix("").as_posix()
    for path in (ROOT / "stages" / "lib").rglob("*.py")
    if path.stem != "__init__"
)
# grade reads rows from standard input and needs no recipe, no artifact and no option; compare reads several recipes.
WITHOUT_RECIPE = ("grade", "compare")
HEAVY = (
    "torch transformers datasets trl peft accelerate llama_cpp gguf numpy pandas pyarrow matplotlib sentencepiece "
    "tokenizers safetensors huggingface_hub math_verify sympy jinja2 tqdm unsloth vllm "
    "starlette uvicorn openai pydantic bitsandbytes"
).split()


def test_the_globs_found_the_stages_and_the_library():
    assert {"prepare_data", "sft", "grpo", "infer", "merge", "gguf", "ollama_modelfile", "base_model"} <= set(STAGES)
    assert {"artifact/folder", "errors", "answers/formats", "options", "recipe/tables"} <= set(LIBRARY)


@pytest.mark.parametrize("stage", STAGES)
def test_help_needs_no_heavy_module(stage):
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"stages.{stage}", "--help"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert result.returncode == 0, result.stderr
    assert {"click"} | ({"stages.lib.options"} if stage not in WITHOUT_RECIPE else set()) <= loaded
    assert not {name.partition(".")[0] for name in loaded} & set(HEAVY)
    assert result.stdout.startswith("Usage: ")
    assert result.stdout.count("--help") == 1


def command(stage: str) -> click.Command:
    return importlib.import_module(f"stages.{stage}").main


@pytest.mark.parametrize("stage", STAGES)
def test_every_file_in_stages_is_one_command_with_one_sentence_and_takes_a_recipe(stage):
    main = command(stage)
    assert isinstance(main, click.Command)
    assert re.fullmatch(r"[A-Z][^\n]+[.?]", main.help.strip())
    options = {name for option in main.params for name in option.opts}
    assert ("--recipe" in options) is (stage not in WITHOUT_RECIPE)
    assert all(isinstance(option, click.Option) and option.help for option in main.params)
    text = (ROOT / "stages" / f"{stage}.py").read_text()
    assert text.count('\n\n\nif __name__ == "__main__":\n') == 1
    assert text.endswith("\n    main()\n")
    assert text.count("@click.command(") == 1


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in WITHOUT_RECIPE])
def test_a_command_without_its_options_ends_with_2_and_says_which(stage):
    result = CliRunner().invoke(command(stage), [])
    assert result.exit_code == 2
    assert re.search(r"Error: Missing option '--[a-z-]+'", result.output)


def test_an_option_means_the_same_everywhere():
    spelled: dict[str, set[tuple[str, str, str]]] = {}
    for stage in STAGES:
        for option in command(stage).params:
            if option.opts[0] not in ("--question",):  # asked with a default where Ollama is, needed where it is not
                said = (option.help, str(option.type.to_info_dict()), option.name)
                spelled.setdefault(option.opts[0], set()).add(said)
    assert len(spelled) > 8
    assert {name: said for name, said in spelled.items() if len(said) > 1} == {}


@pytest.mark.parametrize("module", LIBRARY)
def test_a_file_in_the_library_is_imported_and_never_run(module):
    text = (ROOT / "stages" / "lib" / f"{module}.py").read_text()
    assert "__main__" not in text
    assert "click.command" not in text
    assert not text.startswith("#!")


FILES = [f"{stage}.py" for stage in STAGES] + [f"lib/{module}.py" for module in LIBRARY]


@pytest.mark.parametrize("file", FILES)
def test_every_module_says_what_it_is_and_imports_heavy_ones_only_where_they_are_needed(file):
    tree = ast.parse((ROOT / "stages" / file).read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        # These two are light enough for a module that is itself imported where it is needed; --help shows that it is.
        assert not {name.partition(".")[0] for name in names} & (set(HEAVY) - {"numpy", "pydantic"})


@pytest.mark.parametrize("file", FILES)
def test_modules_are_imported_in_the_two_ways_that_the_code_digest_follows(file):
    for node in ast.walk(ast.parse((ROOT / "stages" / file).read_text())):
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.partition(".")[0] == "stages"]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            if (node.module or "").partition(".")[0] == "stages":
                module = ROOT / node.module.replace(".", "/")
                files = (
                    [module.with_suffix(".py")]
                    if module.with_suffix(".py").is_file()
                    else [module / f"{alias.name}.py" for alias in node.names]
                )
                assert node.module.startswith("stages.lib")
                assert all(path.is_file() for path in files)


# These two run an answer that is a program, and the tests of its row: in the sandbox alone.
IN_SANDBOX = {"lib/answers/row_tests.py": "passes", "lib/answers/sandbox_calls.py": "serve_program"}


@pytest.mark.parametrize(("file", "function"), IN_SANDBOX.items())
def test_what_runs_a_program_is_called_in_the_sandbox_alone_once_it_is_confined(file, function):
    texts = {path: path.read_text() for path in (ROOT / "stages").rglob("*.py")}
    runs = texts[ROOT / "stages" / file].partition(f"\ndef {function}(")[2].partition("\ndef ")[0]
    assert texts[ROOT / "stages" / file].count("exec(") == runs.count("exec(") == 1
    users = [
        path.stem for path, text in texts.items() if re.search(rf"\b{function}\(", text.replace(f"def {function}", ""))
    ]
    assert users == ["sandbox_inside"]
    before = texts[ROOT / "stages/lib/answers/sandbox_inside.py"].partition(f" {function}(")[0]
    assert before.rindex("confine(libc") > before.rindex("os.fork()")


@pytest.mark.parametrize("file", FILES)
def test_every_public_function_and_class_has_a_docstring_and_no_code_is_fetched_or_evaluated(file):
    tree = ast.parse((ROOT / "stages" / file).read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and node.name != "main":
            assert ast.get_docstring(node), node.name
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", *([] if file in IN_SANDBOX else ["exec", "compile"]))
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
