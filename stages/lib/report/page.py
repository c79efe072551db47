"""The page of a run, report.html: one file that fetches nothing, drawn from manifests and logs alone.

`page.html.jinja` is the page; this file gathers what it shows. Completions and answers are values: Jinja escapes them,
and the page's own security policy forbids every request and every script that is not in the file itself.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from stages.lib.answers import stats
from stages.lib.artifact.manifest import MANIFEST, manifest_in
from stages.lib.recipe.tables import Recipe
from stages.lib.report.card import shown, versions
from stages.lib.report.plots import draw_accuracy, draw_curve, draw_parity_svg, draw_rewards
from stages.lib.report.terminal import interval, samples

STAGES = (
    "base-model", "prepare-data", "sft", "score-base", "grpo", "infer", "merge", "gguf", "ollama-modelfile",
)  # fmt: skip
MODELS = ("base", "sft", "grpo")
NO_REWARDS = ("step", "prompt", "completion", "advantage")  # columns of completions.jsonl; the others are rewards
SHOWN_COMPLETIONS = 1500  # of GRPO, in the file: best and worst of each step first
SHOWN_ANSWERS = 1500  # problems of infer, in the file: those that changed first
SHOWN_CHARACTERS = 6000  # of one completion

# TensorBoard's tags, as transformers and TRL write them, by the title of their curve.
SFT_CURVES = {"loss, nats a token": "train/loss", "gradient norm": "train/grad_norm"}
GRPO_CURVES = {
    "reward, weighted sum": "train/reward",
    "completion tokens, mean": "train/completions/mean_length",
    "truncated, share": "train/completions/clipped_ratio",
    "groups rewarded alike, share": "train/frac_reward_zero_std",
    "KL from the reference, nats": "train/kl",
    "gradient norm": "train/grad_norm",
}


def write(recipe: Recipe, artifacts: Path, price: float | None = None) -> str:
    """Return the page of the run of `recipe` in the folder `artifacts`, finished or not; `price`: of an hour."""
    stages = list(standing(recipe, artifacts))
    manifests = {stage["name"]: stage["manifest"] for stage in stages if stage["manifest"]}
    figures = {name: manifest["metrics"] for name, manifest in manifests.items()}
    completions = read_completions(newest(artifacts, "grpo", "completions.jsonl"), recipe.format.system_prompt)
    problems = read_answers(artifacts / "infer" / "answers.jsonl") if "infer" in manifests else []
    modelfile = artifacts / "ollama-modelfile" / "Modelfile"
    infer, gguf = figures.get("infer"), figures.get("gguf")
    plots = {"accuracy": draw_accuracy({name: infer[name] for name in MODELS})} if infer else {}
    plots |= {"parity": draw_parity_svg(gguf["files"])} if gguf else {}
    plots |= {"rewards": draw_rewards([row["reward"] for row in completions])} if completions else {}
    seconds = sum(stage["seconds"] for stage in stages)
    return page_environment().get_template("page.html.jinja").render(
        recipe=recipe, recipe_text=recipe.path.read_text(encoding="utf-8-sig").strip(), stages=stages, figures=figures,
        model=shown(recipe.model.name), sources=[shown(source.name) for source in recipe.data.sources],
        verdict=verdict(infer), models=MODELS, plots=plots,
        sampled_rows=samples(infer["sampled"]) if infer and "sampled" in infer else [],
        seconds=seconds, cost=None if price is None else price * seconds / 3600, price=price,
        curves={
            "SFT": curves(artifacts, "sft", SFT_CURVES),
            "GRPO": [*validation_curve(artifacts), *curves(artifacts, "grpo", GRPO_CURVES)],
        },
        groups=groups(completions), completions=as_json(chosen_completions(completions)), sampled=len(completions),
        problems=as_json(chosen_problems(problems)), examined=len(problems),
        modelfile=modelfile.read_text() if modelfile.is_file() else None, versions=versions(manifests),
        made=datetime.now().astimezone().isoformat(" ", "minutes"),
    )  # fmt: skip


def page_environment() -> Any:
    """Return the Jinja environment of the pages: every value is escaped, and one that is missing is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, autoescape=True,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "duration": duration, "interval": lambda bounds: interval(*bounds),
        "megabytes": lambda size: f"{size / 1e6:,.1f}", "nats": "{:.1e}".format,
        "number": "{:,}".format, "p_text": stats.p_text, "share": "{:.1%}".format,
    }  # fmt: skip
    return environment


def standing(recipe: Recipe, artifacts: Path) -> Iterator[dict[str, Any]]:
    """Yield for each stage its `name`, `state`, `seconds`, `began` and `manifest` (None where it is not finished).

    `state` is "finished", "under way or stopped", with the last checkpoint's step, or "not begun".
    """
    for name in STAGES:
        folder, unfinished = artifacts / name, artifacts / f"{name}.unfinished"
        manifest = manifest_in(folder / MANIFEST, name)
        is_optional = name == "score-base" or (name == "base-model" and not recipe.base_model)
        if is_optional and not (manifest or unfinished.is_dir()):
            continue
        steps = [int(path.name.rpartition("-")[2]) for path in (unfinished / "checkpoints").glob("checkpoint-*")]
        if unfinished.is_dir():
            state = "under way or stopped" + (f", checkpoint at step {max(steps)}" if steps else "")
        else:
            state = "finished" if manifest else "not begun"
        wall = manifest["wall"] if manifest else {}
        seconds = wall.get("seconds", 0.0)
        yield {"name": name, "state": state, "seconds": seconds, "began": wall.get("started", ""), "manifest": manifest}


def newest(artifacts: Path, stage: str, file: str) -> Path:
    """Return a file of a stage's folder, or of its checkpoints while the stage is not finished."""
    unfinished = artifacts / f"{stage}.unfinished" / "checkpoints"
    return unfinished / file if (unfinished / file).exists() else artifacts / stage / file


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON Lines file, up to the first line that is not whole: a run may be writing it."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def read_completions(path: Path, system_prompt: str) -> list[dict[str, Any]]:
    """Return GRPO's completions: `step`, `problem`, `completion`, `advantage`, `reward` and `rewards` by name.

    `problem` is the prompt without the system prompt; `reward` is the unweighted sum.
    """
    rows = []
    for row in read_jsonl(path):
        rewards = {name: value for name, value in row.items() if name not in NO_REWARDS}
        reward = sum(value for value in rewards.values() if isinstance(value, int | float))
        problem = without_roles(last_content(row["prompt"]).replace(system_prompt.strip(), ""))
        texts = {"problem": problem, "completion": last_content(row["completion"])}
        rows.append({**texts, "step": row["step"], "advantage": row["advantage"], "reward": reward, "rewards": rewards})
    return rows


def without_roles(prompt: str) -> str:
    """Return a rendered prompt without the names of roles that its markup leaves on lines of their own at its ends."""
    prompt = re.sub(r"\A\s*(?:system\s*\n)?\s*(?:user\s*\n)?", "", prompt)
    return re.sub(r"\n\s*(?:assistant|model)\s*\Z", "", prompt).strip()


def last_content(text: Any) -> str:
    """Return the last message of a conversation, or a text as it is."""
    return str(text[-1]["content"] if isinstance(text, list) and text else text)[:SHOWN_CHARACTERS]


def chosen_completions(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return at most `SHOWN_COMPLETIONS` of the rows, in their order: the best and worst of each step, then others."""
    if len(rows) <= SHOWN_COMPLETIONS:
        return list(rows)
    by_step: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        by_step.setdefault(row["step"], []).append(place)
    ranked = [sorted(places, key=lambda place: rows[place]["reward"]) for places in by_step.values()]
    extremes = [place for places in ranked for place in dict.fromkeys((places[-1], places[0]))]
    wanted = even(extremes, SHOWN_COMPLETIONS)
    rest = sorted(set(range(len(rows))) - set(wanted))
    return [rows[place] for place in sorted({*wanted, *even(rest, SHOWN_COMPLETIONS - len(wanted))})]


def even(items: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` of `items`, evenly spread over them."""
    return list(items) if len(items) <= count else [items[place * len(items) // count] for place in range(count)]


def groups(rows: Sequence[dict[str, Any]]) -> dict[str, int] | None:
    """Return the number of `groups` of GRPO, of those `alike` (no advantage at all), all of them; None without any."""
    by_problem: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        by_problem.setdefault((row["step"], row["problem"]), []).append(row["advantage"])
    alike = sum(not any(advantages) for advantages in by_problem.values())
    return {"groups": len(by_problem), "alike": alike} if by_problem else None


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Return infer's problems: `id`, `question`, `answer`, and by model the row with `completion`, `right`, `ended`."""
    problems: dict[Any, dict[str, Any]] = {}
    for row in read_jsonl(path):
        problem = problems.setdefault(row["id"], {key: row[key] for key in ("id", "question", "answer")})
        kept = {key: row[key] for key in ("right", "well_formed", "ended", "tokens", "given")}
        problem[row["model"]] = kept | {"completion": row["completion"][:SHOWN_CHARACTERS]}
    return [problem for problem in problems.values() if all(name in problem for name in MODELS)]


def chosen_problems(problems: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return at most `SHOWN_ANSWERS` of the problems, those first whose answers became right or wrong by GRPO."""
    return sorted(problems, key=lambda problem: problem["sft"]["right"] == problem["grpo"]["right"])[:SHOWN_ANSWERS]


def verdict(infer: Mapping[str, Any] | None) -> str | None:
    """Return in a sentence what GRPO changed, with the paired test; None before infer."""
    if infer is None:
        return None
    step, before, after = infer["steps"]["sft to grpo"], infer["sft"], infer["grpo"]
    change = "raised" if after["accuracy"] > before["accuracy"] else "lowered"
    change = "did not measurably change" if step["p"] >= 0.05 else change
    return (
        f"GRPO {change} accuracy: {before['accuracy']:.1%} before, {after['accuracy']:.1%} after, on "
        f"{after['problems']:,} held-out problems ({step['gained']} gained, {step['lost']} lost, exact McNemar test, "
        f"{stats.p_text(step['p'])}). The base model: {infer['base']['accuracy']:.1%}."
    )


def curves(artifacts: Path, stage: str, wanted: Mapping[str, str]) -> list[str]:
    """Return the curves of a training stage as SVG, from TensorBoard's files: `wanted`, and one of each reward."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = newest(artifacts, stage, "logs")
    if not folder.is_dir():
        return []
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    tags = read.Tags()["scalars"]
    rewards = [tag for tag in tags if tag.startswith("train/rewards/") and tag.endswith("/mean")]
    named = {**wanted, **{f"reward {tag.split('/', 2)[2].removesuffix('/mean')}": tag for tag in rewards}}
    drawn = {title: series(read.Scalars(tag)) for title, tag in named.items() if tag in tags}
    return [draw_curve(title, points) for title, points in drawn.items() if any(value for _, value in points)]


def validation_curve(artifacts: Path) -> list[str]:
    """Return the curve of GRPO's evaluations while training as SVG, from their file; none without any."""
    rows = read_jsonl(newest(artifacts, "grpo", "validation.jsonl"))
    points = [(row["step"], 100 * row["accuracy"]) for row in rows]
    return [draw_curve("validation accuracy, greedy, %", points)] if points else []


def series(events: Sequence[Any]) -> list[tuple[int, float]]:
    """Return step and value of each event; of a step that was run twice, after a kill, the later."""
    return sorted({event.step: event.value for event in events}.items())


def as_json(value: Any) -> str:
    """Return `value` as JSON for a script element: no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def duration(seconds: float) -> str:
    """Return a time as text: 45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
