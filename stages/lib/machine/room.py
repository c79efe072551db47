"""The bytes that a stage writes at most, from the model's size and the recipe: looked for before it begins."""

from pathlib import Path

from stages.lib.machine.memory import ADAPTER_BYTES, adapted, adapter_parameters
from stages.lib.machine.shape import SHAPES
from stages.lib.model.files import local_model_folder, weight_shapes
from stages.lib.model.locate import locate_model
from stages.lib.recipe.tables import BaseModel, Lora, Recipe

LEAST_BYTES = 20_000_000  # figures, plots, random states, locks, and what a file system rounds up
CHECKPOINTS = 3  # two are kept, and the oldest goes when the newest is whole
ADAM_BYTES = 8  # two moments of a trained weight, in float32
LOG_BYTES = 2_000  # of a step: an entry in a checkpoint's trainer_state.json, and as much in TensorBoard's file
TOKEN_BYTES = 6  # of a completion's text; English takes 4 to 5
ROW_BYTES = 3_000  # of an answer: question, numbers, names


def training_room(recipe: Recipe, stage: str, adapter: int, tokenizer: int, rows: int = 0) -> tuple[int, int]:
    """Return the bytes that "sft" or "grpo" keeps, and those it writes besides while it works.

    `adapter` is the number of its weights, `tokenizer` and `rows` the bytes of the tokenizer's files and of the rows.
    """
    steps = recipe.sft.steps if stage == "sft" else recipe.grpo.steps
    completions = 0
    if stage == "grpo":
        sampled = recipe.grpo.prompts_per_step * recipe.grpo.completions_per_prompt * steps
        completions = sampled * (recipe.grpo.max_completion_tokens * TOKEN_BYTES + ROW_BYTES)
    kept = adapter * ADAPTER_BYTES + tokenizer + LOG_BYTES * steps + completions
    checkpoint = adapter * (ADAPTER_BYTES + ADAM_BYTES) + tokenizer + LOG_BYTES * steps
    return kept, CHECKPOINTS * checkpoint + LOG_BYTES * steps + completions + 2 * rows


def room_to_train(recipe: Recipe, stage: str, rows: Path) -> int:
    """Return the bytes that "sft" or "grpo" writes at most, on the model that is here and the rows in the file `rows`.

    Of a model that is not on this disk yet, and is none of the recipes' own, only logs and completions are counted.
    """
    folder = local_model_folder(*locate_model(recipe))
    adapter, tokenizer = 0, 0
    if folder is not None:
        files = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".safetensors"]
        tokenizer = sum(path.stat().st_size for path in files)
    if folder is not None and any(folder.glob("*.safetensors")):
        adapter = adapter_of_weights(folder, recipe.lora)
    elif shape := SHAPES.get(recipe.model.name):
        adapter = adapter_parameters(shape, recipe.lora)
    size = rows.stat().st_size if rows.is_file() else 0
    return LEAST_BYTES + sum(training_room(recipe, stage, adapter, tokenizer, size))


def adapter_of_weights(folder: Path, lora: Lora) -> int:
    """Return the number of weights of an adapter, at most, on the model in `folder`: by its matrices, of any family."""
    names = {*adapted(lora.target_modules), *lora.target_modules}
    count = 0
    for name, (_, shape) in weight_shapes(folder).items():
        module = name.removesuffix(".weight").rpartition(".")[2]
        is_end = "embed" in module or module == "lm_head"
        if len(shape) == 2 and (module in names or ("all-linear" in lora.target_modules and not is_end)):
            count += lora.rank * sum(shape)
    return count


def room_to_answer(completions: int, tokens: int) -> int:
    """Return the bytes that so many completions of at most `tokens` tokens take, kept once and once as token ids."""
    return LEAST_BYTES + completions * (tokens * (TOKEN_BYTES + 8) + ROW_BYTES)


def room_to_make(knobs: BaseModel) -> int:
    """Return the bytes that the tiny base model takes: weights in float32, its tokenizer and problems."""
    layer = 4 * knobs.hidden_size**2 + 3 * knobs.hidden_size * knobs.intermediate_size
    weights = knobs.vocabulary_size * knobs.hidden_size + knobs.layers * layer
    return LEAST_BYTES + 4 * weights + 300 * knobs.vocabulary_size + 500 * (knobs.eval_problems + knobs.train_problems)
