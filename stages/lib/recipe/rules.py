"""The checks of a recipe that go across tables: each yields what is wrong, and the first thing ends the reading."""

import re
from collections.abc import Iterator

from stages.lib.answers.grade import SCORERS
from stages.lib.answers.gym import TASKS
from stages.lib.errors import UserError, nearest
from stages.lib.gguf.types import GGUF_TYPES, NEED_IMPORTANCE
from stages.lib.ollama import modelfile
from stages.lib.recipe.tables import GYM, MAX_VLLM_RANK, Model, Recipe, Source, is_hub_name
from stages.lib.rewards.names import check_reward_names

# Variables of a chat template that are about the conversation, or the tokenizer's.
RENDERED = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
)


def check_recipe(recipe: Recipe) -> None:
    """Raise `UserError` for the first values that contradict each other; the message names keys, not the file."""
    for check in (
        names,
        engine,
        values,
        template_kwargs,
        rewards,
        base_model,
        data,
        steps,
        score_base,
        samples,
        gguf,
        ollama,
    ):
        for wrong in check(recipe):
            raise UserError(wrong)


def names(recipe: Recipe) -> Iterator[str]:
    """Yield each name on the hub that has no commit, and a base-model that the recipe does not make."""
    pinned = [("[model]", recipe.model.name, recipe.model.revision)]
    # A dataset without a commit is refused when it is about to be fetched: a local copy of it needs none.
    pinned += [("[[data.sources]]", source.name, source.revision) for source in recipe.data.sources if source.revision]
    for where, name, revision in pinned:
        if is_hub_name(name) and not re.fullmatch(r"[0-9a-f]{40}", revision):
            yield (
                f"{where} name = {name!r} is fetched from the hub, so revision must be a commit (40 hex digits); "
                f"found {revision!r}"
            )
        if name == "base-model" and recipe.base_model is None:
            yield f"{where} name = 'base-model' asks for a [base_model] table; there is none"
    tables: list[Model | Source] = [recipe.model, *recipe.data.sources]
    for table in tables:
        if table.hub and not is_hub_name(table.name):
            yield f"hub = {table.hub!r} goes with a name on it, OWNER/NAME; found name = {table.name!r}"


def engine(recipe: Recipe) -> Iterator[str]:
    """Yield what the recipe's engine can't do."""
    model, health = recipe.model, recipe.health
    if model.engine != "unsloth":
        if model.load_in_4bit:
            yield f"[model] load_in_4bit = true needs engine = 'unsloth'; found {model.engine!r}"
        return
    if recipe.vllm is None:
        yield "[model] engine = 'unsloth' needs a [vllm] table; there is none"
    if model.dtype == "float32":
        yield "[model] dtype = 'float32' with engine = 'unsloth'; expected 'bfloat16'"
    if health.min_entropy is not None or health.max_entropy is not None:
        yield "[health] min_entropy and max_entropy: engine 'unsloth' measures no entropy. Leave them out"
    if recipe.lora.rank > MAX_VLLM_RANK:
        yield f"[lora] rank = {recipe.lora.rank}; vLLM takes at most {MAX_VLLM_RANK}"
    if recipe.grpo.loss_type == "dr_grpo" and recipe.grpo.scale_rewards == "group":
        yield (
            "[grpo] scale_rewards = 'group' with loss_type = 'dr_grpo': engine 'unsloth' takes it for 'none'. "
            "Write 'none' or 'batch'"
        )


def values(recipe: Recipe) -> Iterator[str]:
    """Yield lists that are empty or name a thing twice, and bounds of the entropy that no training run could keep."""
    if not recipe.save or len(set(recipe.save)) < len(recipe.save):
        yield f"save = {recipe.save}; expected one or more, each once"
    if not recipe.lora.target_modules:
        yield '[lora] target_modules = []; expected module names, or ["all-linear"]'
    low, high = recipe.health.min_entropy, recipe.health.max_entropy
    if low is not None and high is not None and low >= high:
        yield f"[health] min_entropy = {low} is not below max_entropy = {high}"


def template_kwargs(recipe: Recipe) -> Iterator[str]:
    """Yield variables that a chat template can't set, or that whoever renders it gives it."""
    for name, value in recipe.format.template_kwargs.items():
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) or name in RENDERED:
            yield f"[format] template_kwargs: {name!r} is none of the template's own variables, such as enable_thinking"
        if isinstance(value, str) and not value.isprintable():
            yield f"[format] template_kwargs: {name} = {value!r}; expected one line of printable characters"


def rewards(recipe: Recipe) -> Iterator[str]:
    """Yield rewards that GRPO could not find or weigh."""
    table = recipe.rewards
    if not table.functions:
        yield "[rewards] functions = []; expected one or more"
    if len(table.functions) != len(table.weights):
        yield f"[rewards] has {len(table.functions)} functions and {len(table.weights)} weights"
    if not any(table.weights):
        yield f"[rewards] weights = {table.weights}; expected one or more that are not 0"
    check_reward_names(recipe)


def base_model(recipe: Recipe) -> Iterator[str]:
    """Yield attention heads that the network's width can't be shared out to."""
    if recipe.base_model is None:
        return
    width, heads = recipe.base_model.hidden_size, recipe.base_model.attention_heads
    if width % (2 * heads):  # rotary position embeddings turn a head's columns in pairs
        yield f"[base_model] hidden_size = {width}; expected a multiple of 2 x attention_heads = {2 * heads}"
    yield from uneven("[base_model] attention_heads", heads, "key_value_heads", recipe.base_model.key_value_heads)


def data(recipe: Recipe) -> Iterator[str]:
    """Yield what keeps the sources from making the three sets."""
    for source in recipe.data.sources:
        for wrong in (*columns(source), *sets(source), *gym(source)):
            yield f"[[data.sources]] {source.name!r} {wrong}"
    seeds: dict[tuple[str, int | None], bool] = {}
    for source in recipe.data.sources:
        for task in source.tasks:
            evaluates = "eval" in source.use and not source.shares
            if seeds.setdefault((task, source.seed), evaluates) != evaluates:
                yield f"[[data.sources]] {GYM!r} seed = {source.seed} makes {task!r} to train and for eval: two seeds"
    for name in ("sft", "grpo", "eval"):
        if not any(name in source.use for source in recipe.data.sources):
            yield f"no [[data.sources]] has {name!r} in its use; sft, grpo and eval all need one"


def sets(source: Source) -> Iterator[str]:
    """Yield what is wrong with the sets that a source's rows go to, and with the rows that it takes."""
    if not source.use or len(set(source.use)) < len(source.use):
        yield f"use = {source.use}; expected one or more of sft, grpo, eval, each once"
    if source.name == "base-model" and source.split not in ("train", "eval"):
        yield f"split = {source.split!r}; base-model makes 'train' and 'eval'"
    if source.max_rows < 0:
        yield f"max_rows = {source.max_rows}; expected 0 (all) or more"
    shares = source.shares
    if shares and (len(shares) != len(source.use) or min(shares) <= 0 or sum(shares) > 1 + 1e-9):
        yield f"shares = {shares}; expected one a set in {source.use}, over 0, at most 1 in all"
    if "eval" in source.use and len(source.use) > 1 and not shares:
        yield f"would train on its own eval problems; give shares, one a set in {source.use}"


def gym(source: Source) -> Iterator[str]:
    """Yield what is wrong with the rows that reasoning-gym is to make; its tasks check their settings themselves."""
    stated = [key for key in ("tasks", "settings", "rows", "seed") if getattr(source, key) not in (None, {})]
    if source.name != GYM:
        if stated:
            yield f"{stated[0]} goes with name = {GYM!r}; found {source.name!r}"
        return
    for task in source.tasks:
        if task not in TASKS:
            yield f"tasks: {task!r} is none of those in docs/reasoning-gym.md{nearest(task, TASKS)}"
    for task in source.settings:
        if task not in source.tasks:
            yield f"settings.{task}: the source has no such task{nearest(task, source.tasks)}"
    if not source.tasks or source.seed is None or source.rows is None:
        yield f"needs tasks, rows and seed; found tasks = {source.tasks}, rows = {source.rows}, " + (
            f"seed = {source.seed}"
        )
    if (source.answers, source.scorer) != ("scored", "reasoning_gym"):
        yield f"expected answers = 'scored' and scorer = 'reasoning_gym'; found {source.answers!r}, {source.scorer!r}"


def columns(source: Source) -> Iterator[str]:
    """Yield what is wrong with a source's columns and with the kind of its answers."""
    for key, column in (("question", source.question), ("answer", source.answer)):
        if not column or ("" in column and isinstance(column, list)):
            yield f"{key} = {column!r}; expected the name of a column"
    if source.answers == "scored" and source.scorer not in SCORERS:
        scorers = ", ".join(SCORERS)
        yield f"scorer = {source.scorer!r}{nearest(source.scorer, SCORERS)}; expected one of: {scorers}"
    for key, kind in (("decimal", "number"), ("scorer", "scored")):
        if getattr(source, key) and source.answers != kind:
            yield f"{key} = {getattr(source, key)!r} goes with answers = {kind!r}; found {source.answers!r}"
    if source.choices and source.answers != "choice":
        yield f"has choices: state answers = 'choice'; found {source.answers!r}"
    if source.chosen_by and not source.choices:
        yield f"chosen_by = {source.chosen_by!r} goes with choices, the columns of the options"
    if "sft" in source.use and not source.solution and source.style not in ("gsm8k", "marked"):
        yield "goes to sft, so solution must name the column of the worked solution"
    if source.style == "gsm8k" and source.solution:
        yield "has style = 'gsm8k': the solution is in the answer column; leave solution out"
    if source.style == "think" and not source.solution:
        yield "has style = 'think', so solution must name the column with the <think> marks"


def steps(recipe: Recipe) -> Iterator[str]:
    """Yield steps of SFT or GRPO that do not divide as they must, or never log."""
    sft, grpo = recipe.sft, recipe.grpo
    yield from uneven("[sft] batch_size", sft.batch_size, "micro_batch_size", sft.micro_batch_size)
    batch = grpo.prompts_per_step * grpo.completions_per_prompt
    what = "[grpo] prompts_per_step x completions_per_prompt"
    yield from uneven(what, batch, "micro_batch_size", grpo.micro_batch_size)
    if grpo.sampled_prompts is not None and grpo.sampled_prompts < grpo.prompts_per_step:
        yield (
            f"[grpo] sampled_prompts = {grpo.sampled_prompts}; expected at least prompts_per_step = "
            f"{grpo.prompts_per_step}, out of which a step trains"
        )
    if grpo.evaluate_steps and not recipe.data.validation_rows:
        yield f"[grpo] evaluate_steps = {grpo.evaluate_steps} needs problems: state [data] validation_rows, such as 200"
    if grpo.evaluate_steps > grpo.steps:
        yield f"[grpo] evaluate_steps = {grpo.evaluate_steps}; expected at most steps = {grpo.steps}"
    if grpo.keep == "best" and not grpo.evaluate_steps:
        yield "[grpo] keep = 'best' goes by evaluations: state evaluate_steps, such as 10"
    for where, table in (("[sft]", sft), ("[grpo]", grpo)):
        if table.log_steps > table.steps:
            yield f"{where} log_steps = {table.log_steps}; expected at most steps = {table.steps}"
    least, most, cache = grpo.min_completion_tokens, grpo.max_completion_tokens, recipe.rewards.length_cache_tokens
    if least is not None and not (cache or 1) <= least <= most:
        yield (
            f"[grpo] min_completion_tokens = {least}; expected at least [rewards] length_cache_tokens = {cache} (or 1 "
            f"without) and at most max_completion_tokens = {most}"
        )
    yield from uneven("[grpo] save_steps", grpo.save_steps, "num_iterations", grpo.num_iterations)


def uneven(what: str, whole: int, by: str, part: int) -> Iterator[str]:
    """Yield that `part` does not divide `whole`, if so."""
    if whole % part:
        yield f"{what} = {whole} is not a multiple of {by} = {part}"


def score_base(recipe: Recipe) -> Iterator[str]:
    """Yield groups that don't fill batches, and two pass rates with none between them."""
    table = recipe.score_base
    if table is None:
        return
    size = table.completions_per_problem
    yield from uneven("[score_base] batch_size", table.batch_size, "completions_per_problem", size)
    low, high = table.min_pass_rate, table.max_pass_rate
    if low > high:
        yield f"[score_base] min_pass_rate = {low} is over max_pass_rate = {high}"


def samples(recipe: Recipe) -> Iterator[str]:
    """Yield how drawn answers are drawn, where that is not stated, or is stated and none is drawn."""
    for key in ("sample_temperature", "sample_top_p", "sample_seed"):
        value = getattr(recipe.infer, key)
        if recipe.infer.samples and value is None:
            yield f"[infer] samples = {recipe.infer.samples} needs {key}; there is none"
        if value is not None and not recipe.infer.samples:
            yield f"[infer] {key} = {value} goes with samples, such as 8; found samples = 0"


def gguf(recipe: Recipe) -> Iterator[str]:
    """Yield a type that llama.cpp can't make, or not without an importance matrix; and types that are none."""
    table = recipe.gguf
    for where, kinds in (("types", table.types), ("max_mean_kl", table.max_mean_kl)):
        for kind in kinds:
            if kind.lower() not in GGUF_TYPES:
                close = nearest(kind.lower(), GGUF_TYPES)
                yield f"[gguf] {where}: {kind!r} is no type of llama.cpp{close}; {', '.join(GGUF_TYPES)}"
    if not table.types or len({kind.lower() for kind in table.types}) < len(table.types):
        yield f"[gguf] types = {table.types}; expected one or more, each once"
    needy = [kind for kind in table.types if kind.lower() in NEED_IMPORTANCE]
    if needy and not table.importance_prompts:
        yield (
            f"[gguf] importance_prompts = 0; expected 1 or more: without an importance matrix llama.cpp does not make "
            f"{', '.join(needy)}"
        )


def ollama(recipe: Recipe) -> Iterator[str]:
    """Yield a file that is not made, a context too short to answer in, and text that no Modelfile holds."""
    table = recipe.ollama
    if table.quantization.lower() not in [kind.lower() for kind in recipe.gguf.types]:
        yield f"[ollama] quantization = {table.quantization!r} is not among [gguf] types {recipe.gguf.types}"
    prompt, completion = recipe.data.max_prompt_tokens, recipe.grpo.max_completion_tokens
    if table.num_ctx < prompt + completion:
        yield (
            f"[ollama] num_ctx = {table.num_ctx}; expected {prompt + completion} or more: [data] max_prompt_tokens = "
            f"{prompt} and [grpo] max_completion_tokens = {completion} together"
        )
    texts = (
        ("[format] system_prompt", "SYSTEM", recipe.format.system_prompt),
        ("[ollama] license", "LICENSE", table.license),
    )
    for where, command, text in texts:
        try:
            modelfile.command(command, text)
        except UserError as error:
            yield f"{where}: {error.message}"
