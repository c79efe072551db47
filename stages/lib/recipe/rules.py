"""The checks of a recipe that go across tables."""

import re
from pathlib import Path

from stages.lib.answers.grade import SCORERS
from stages.lib.errors import UserError, nearest
from stages.lib.gguf.types import GGUF_TYPES, NEED_IMPORTANCE
from stages.lib.ollama import modelfile
from stages.lib.recipe.tables import (
    MAX_VLLM_RANK,
    BaseModel,
    Gguf,
    Health,
    Recipe,
    ScoreBase,
    is_hub_name,
)
from stages.lib.rewards.names import check_reward_names


def check_recipe(recipe: Recipe) -> None:
    """Raise `UserError` for values that contradict each other."""
    path = recipe.path
    check_names(recipe)
    check_engine(recipe)
    if not recipe.save or len(set(recipe.save)) < len(recipe.save):
        raise UserError(f"{path}: save = {recipe.save}; expected one or more, each once")
    check_rewards(recipe)
    check_health(path, recipe.health)
    if recipe.base_model is not None:
        check_base_model(path, recipe.base_model)
    check_data(recipe)
    if not recipe.lora.target_modules:
        raise UserError(f'{path}: [lora] target_modules = []; expected module names, or ["all-linear"]')
    check_steps(recipe)
    if recipe.score_base is not None:
        check_score_base(path, recipe.score_base)
    check_gguf(path, recipe.gguf)
    check_ollama(recipe)


def check_names(recipe: Recipe) -> None:
    """Raise `UserError` for a name on the hub without a commit, and for a base-model that the recipe does not make."""
    pinned = [("[model]", recipe.model.name, recipe.model.revision)]
    # A dataset without any is refused when it is about to be fetched: a local copy of it needs none.
    pinned += [("[[data.sources]]", source.name, source.revision) for source in recipe.data.sources if source.revision]
    for where, name, revision in pinned:
        if is_hub_name(name) and not re.fullmatch(r"[0-9a-f]{40}", revision):
            raise UserError(
                f"{recipe.path}: {where} name = {name!r} is fetched from the hub, so revision must be a commit "
                f"(40 hex digits); found {revision!r}"
            )
        if name == "base-model" and recipe.base_model is None:
            raise UserError(f"{recipe.path}: {where} name = 'base-model' asks for a [base_model] table; there is none")


def check_engine(recipe: Recipe) -> None:
    """Raise `UserError` for what the recipe's engine can't do."""
    path = recipe.path
    if recipe.model.engine != "unsloth":
        if recipe.model.load_in_4bit:
            raise UserError(
                f"{path}: [model] load_in_4bit = true needs engine = 'unsloth'; found {recipe.model.engine!r}"
            )
        return
    if recipe.vllm is None:
        raise UserError(f"{path}: [model] engine = 'unsloth' needs a [vllm] table; there is none")
    if recipe.model.dtype == "float32":
        raise UserError(f"{path}: [model] dtype = 'float32' is nothing for engine 'unsloth'; expected 'bfloat16'")
    if recipe.health.min_entropy is not None or recipe.health.max_entropy is not None:
        raise UserError(
            f"{path}: [health] min_entropy and max_entropy are without effect with engine 'unsloth', which measures no "
            f"entropy. Leave them out"
        )
    if recipe.lora.rank > MAX_VLLM_RANK:
        raise UserError(f"{path}: [lora] rank = {recipe.lora.rank}; vLLM takes at most {MAX_VLLM_RANK}")
    if recipe.grpo.loss_type == "dr_grpo" and recipe.grpo.scale_rewards == "group":
        raise UserError(
            f"{path}: [grpo] scale_rewards = 'group' with loss_type = 'dr_grpo': engine 'unsloth' takes it for 'none'. "
            f"Write 'none' or 'batch'"
        )


def check_steps(recipe: Recipe) -> None:
    """Raise `UserError` for steps of SFT or GRPO that do not divide as they must, or never log."""
    path, sft, grpo = recipe.path, recipe.sft, recipe.grpo
    require_divides(path, "[sft] batch_size", sft.batch_size, "micro_batch_size", sft.micro_batch_size)
    what, batch = (
        "[grpo] prompts_per_step x completions_per_prompt",
        grpo.prompts_per_step * grpo.completions_per_prompt,
    )
    require_divides(path, what, batch, "micro_batch_size", grpo.micro_batch_size)
    for where, table in (("[sft]", sft), ("[grpo]", grpo)):
        if table.log_steps > table.steps:
            raise UserError(f"{path}: {where} log_steps = {table.log_steps}; expected at most steps = {table.steps}")
    least, most = grpo.min_completion_tokens, grpo.max_completion_tokens
    if least is not None and not (recipe.rewards.length_cache_tokens or 1) <= least <= most:
        raise UserError(
            f"{path}: [grpo] min_completion_tokens = {least}; expected at least [rewards] length_cache_tokens = "
            f"{recipe.rewards.length_cache_tokens} (or 1 without) and at most max_completion_tokens = {most}"
        )
    require_divides(path, "[grpo] save_steps", grpo.save_steps, "num_iterations", grpo.num_iterations)


def check_health(path: Path, health: Health) -> None:
    """Raise `UserError` for bounds of the entropy that no training run could keep."""
    low, high = health.min_entropy, health.max_entropy
    if low is not None and high is not None and low >= high:
        raise UserError(f"{path}: [health] min_entropy = {low} is not below max_entropy = {high}")


def check_base_model(path: Path, table: BaseModel) -> None:
    """Raise `UserError` for heads that the network's width can't be shared out to."""
    heads = table.attention_heads
    if table.hidden_size % (2 * heads):  # rotary position embeddings turn a head's columns in pairs
        raise UserError(
            f"{path}: [base_model] hidden_size = {table.hidden_size}; expected a multiple of 2 x attention_heads = "
            f"{2 * heads}"
        )
    require_divides(path, "[base_model] attention_heads", heads, "key_value_heads", table.key_value_heads)


def check_ollama(recipe: Recipe) -> None:
    """Raise `UserError` for a file that is not made, a context too short to answer in, and text no Modelfile holds."""
    path = recipe.path
    if recipe.ollama.quantization.lower() not in [name.lower() for name in recipe.gguf.types]:
        raise UserError(
            f"{path}: [ollama] quantization = {recipe.ollama.quantization!r} is not among [gguf] types "
            f"{recipe.gguf.types}"
        )
    prompt, completion = recipe.data.max_prompt_tokens, recipe.grpo.max_completion_tokens
    if recipe.ollama.num_ctx < prompt + completion:
        raise UserError(
            f"{path}: [ollama] num_ctx = {recipe.ollama.num_ctx}; expected {prompt + completion} or more, which is "
            f"[data] max_prompt_tokens = {prompt} and [grpo] max_completion_tokens = {completion} together"
        )
    texts = (
        ("[format] system_prompt", "SYSTEM", recipe.format.system_prompt),
        ("[ollama] license", "LICENSE", recipe.ollama.license),
    )
    for where, command, text in texts:
        try:
            modelfile.command(command, text)
        except UserError as error:
            raise UserError(f"{path}: {where}: {error.message}") from error


def check_rewards(recipe: Recipe) -> None:
    """Raise `UserError` for a reward that GRPO could not find, or could not weigh."""
    path, table = recipe.path, recipe.rewards
    if not table.functions:
        raise UserError(f"{path}: [rewards] functions = []; expected one or more")
    if len(table.functions) != len(table.weights):
        raise UserError(f"{path}: [rewards] has {len(table.functions)} functions and {len(table.weights)} weights")
    if not any(table.weights):
        raise UserError(f"{path}: [rewards] weights = {table.weights}; expected one or more that are not 0")
    try:
        check_reward_names(recipe)
    except UserError as error:
        raise UserError(f"{path}: {error.message}") from error


def check_data(recipe: Recipe) -> None:
    """Raise `UserError` when the sources can't make the three sets."""
    path, data = recipe.path, recipe.data
    for source in data.sources:
        where = f"{path}: [[data.sources]] {source.name!r}"
        if not source.use or len(set(source.use)) < len(source.use):
            raise UserError(f"{where} use = {source.use}; expected one or more of sft, grpo, eval, each once")
        if source.name == "base-model" and source.split not in ("train", "eval"):
            raise UserError(f"{where} split = {source.split!r}; base-model makes 'train' and 'eval'")
        for key, column in (("question", source.question), ("answer", source.answer)):
            if not column:
                raise UserError(f"{where} {key} = ''; expected the name of a column")
        if source.answers == "scored" and source.scorer not in SCORERS:
            known = ", ".join(SCORERS) or "none is known yet"
            raise UserError(
                f"{where} scorer = {source.scorer!r}{nearest(source.scorer, SCORERS)}; expected one of: {known}"
            )
        for key, kind in (("decimal", "number"), ("scorer", "scored")):
            if getattr(source, key) and source.answers != kind:
                raise UserError(
                    f"{where} {key} = {getattr(source, key)!r} goes with answers = {kind!r}; found {source.answers!r}"
                )
        if source.max_rows < 0:
            raise UserError(f"{where} max_rows = {source.max_rows}; expected 0 (all) or more")
        if "sft" in source.use and not source.solution and source.style != "gsm8k":
            raise UserError(f"{where} goes to sft, so solution must name the column of the worked solution")
        if source.style == "gsm8k" and source.solution:
            raise UserError(f"{where} has style = 'gsm8k': the solution is in the answer column; leave solution out")
        if source.style == "think" and not source.solution:
            raise UserError(f"{where} has style = 'think', so solution must name the column with the <think> marks")
        if source.shares and (
            len(source.shares) != len(source.use) or min(source.shares) <= 0 or sum(source.shares) > 1 + 1e-9
        ):
            raise UserError(
                f"{where} shares = {source.shares}; expected one a set in {source.use}, over 0, at most 1 in all"
            )
        if "eval" in source.use and len(source.use) > 1 and not source.shares:
            raise UserError(f"{where} would train on its own eval problems; give shares, one a set in {source.use}")
    for name in ("sft", "grpo", "eval"):
        if not any(name in source.use for source in data.sources):
            raise UserError(f"{path}: no [[data.sources]] has {name!r} in its use; sft, grpo and eval all need one")


def check_score_base(path: Path, table: ScoreBase) -> None:
    """Raise `UserError` when groups don't fill batches, or no pass rate is within the two that are asked for."""
    size = table.completions_per_problem
    require_divides(path, "[score_base] batch_size", table.batch_size, "completions_per_problem", size)
    low, high = table.min_pass_rate, table.max_pass_rate
    if low > high:
        raise UserError(f"{path}: [score_base] min_pass_rate = {low} is over max_pass_rate = {high}")


def require_divides(path: Path, what: str, whole: int, by: str, part: int) -> None:
    """Raise `UserError` unless `part` divides `whole`."""
    if whole % part:
        raise UserError(f"{path}: {what} = {whole} is not a multiple of {by} = {part}")


def check_gguf(path: Path, gguf: Gguf) -> None:
    """Raise `UserError` for a type that llama.cpp can't make, or not without an importance matrix; and for none."""
    for where, names in (("types", gguf.types), ("max_mean_kl", gguf.max_mean_kl)):
        for name in names:
            if name.lower() not in GGUF_TYPES:
                close = nearest(name.lower(), GGUF_TYPES)
                raise UserError(
                    f"{path}: [gguf] {where}: {name!r} is no type of llama.cpp{close}; {', '.join(GGUF_TYPES)}"
                )
    if not gguf.types or len({name.lower() for name in gguf.types}) < len(gguf.types):
        raise UserError(f"{path}: [gguf] types = {gguf.types}; expected one or more, each once")
    needy = [name for name in gguf.types if name.lower() in NEED_IMPORTANCE]
    if needy and not gguf.importance_prompts:
        raise UserError(
            f"{path}: [gguf] importance_prompts = 0; expected 1 or more: without an importance matrix llama.cpp "
            f"does not make {', '.join(needy)}"
        )
