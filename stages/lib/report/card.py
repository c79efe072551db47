"""The model card: README.md of a repository on the hub, written from the manifests and the recipe, and nothing else.

Every figure in a card stands in a manifest. What no manifest holds (an accuracy of the 4-bit model, a language) is left
out. The front matter is what the hub reads: https://huggingface.co/docs/hub/model-cards.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.lib.answers import formats, stats
from stages.lib.recipe.tables import Recipe, Source, is_hub_name

Manifests = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Kind:
    """One kind of upload, and where its files are: (stage, folder in its artifact), the indispensable one first."""

    suffix: str  # of the repository's name
    title: str
    sources: tuple[tuple[str, str], ...]


KINDS = {
    "merged_16bit": Kind("", "The model in 16 bits", (("merge", "model/"),)),
    "merged_4bit": Kind("-4bit", "The model in 4 bits (bitsandbytes NF4)", (("merge", "model-4bit/"),)),
    "lora": Kind(
        "-LoRA", "The LoRA adapter of the model", (("grpo", "adapter/"), ("grpo", "tokenizer/"), ("gguf", ""))
    ),
    "gguf": Kind(
        "-GGUF", "The model as GGUF files, for llama.cpp and Ollama", (("gguf", ""), ("ollama-modelfile", ""))
    ),
}
# The hub's names for licences that models go out under. What is none of them is "other" there, with a name of its own.
LICENSES = (
    "agpl-3.0", "apache-2.0", "bigcode-openrail-m", "bigscience-bloom-rail-1.0", "bigscience-openrail-m",
    "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-sa-4.0",
    "cc0-1.0", "creativeml-openrail-m", "gemma", "gpl-3.0", "lgpl-3.0", "llama2", "llama3", "llama3.1", "llama3.2",
    "llama3.3", "llama4", "mit", "mpl-2.0", "openrail", "openrail++", "unlicense",
)  # fmt: skip
QUESTION = "What is 17 + 25?"


@dataclass(frozen=True)
class File:
    """A file of a repository: its name there, and where its content is."""

    name: str
    source: Path | bytes
    size: int  # bytes
    sha256: str

    @property
    def content(self) -> bytes:
        """The whole content, in memory."""
        return self.source.read_bytes() if isinstance(self.source, Path) else self.source


def repositories(name: str, kinds: Sequence[str]) -> dict[str, str]:
    """Return the repository of each kind: `name` for the merged model, and what is beside it by suffix."""
    return {kind: name + KINDS[kind].suffix for kind in kinds}


def write(kind: str, names: Mapping[str, str], recipe: Recipe, manifests: Manifests, files: Sequence[File]) -> str:
    """Return the card of `names[kind]`, which holds `files`. `names` are all repositories that this run uploads."""
    import yaml

    front = yaml.safe_dump(
        front_matter(kind, names, recipe, manifests), sort_keys=False, allow_unicode=True, width=10_000
    )
    sections = [
        [f"# {names[kind].partition('/')[2]}", "", *introduction(kind, names, recipe, manifests)],
        accuracy(manifests),
        fidelity(kind, recipe, manifests),
        ["## How to prompt it", "", *prompting(recipe)],
        ["## How to run it", "", *running(kind, names, recipe, files)],
        ["## Training", "", *training(recipe, manifests)],
        ["## Files", "", *listing(files)],
        ["## Made with", "", *versions(manifests)],
        ["## Licence", "", *licence(recipe)],
    ]
    return f"---\n{front}---\n\n" + "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def front_matter(kind: str, names: Mapping[str, str], recipe: Recipe, manifests: Manifests) -> dict[str, Any]:
    """Return what the hub reads: licence, origin, data, tags, and the accuracies that were measured on these files."""
    front: dict[str, Any] = {}
    if recipe.ollama.license in LICENSES:
        front["license"] = recipe.ollama.license
    elif recipe.ollama.license:
        front |= {"license": "other", "license_name": slug(recipe.ollama.license)}
    if kind in ("gguf", "merged_4bit") and "merged_16bit" in names:
        front |= {"base_model": names["merged_16bit"], "base_model_relation": "quantized"}
    elif is_hub_name(recipe.model.name):
        relation = "adapter" if kind == "lora" else "finetune"
        front |= {"base_model": recipe.model.name, "base_model_relation": relation}
    sources = recipe.data.sources
    if datasets := list(dict.fromkeys(source.name for source in sources if is_hub_name(source.name))):
        front["datasets"] = datasets
    # On the hub a dataset's subsets are often its languages; nothing else in a recipe says one.
    languages = {source.config for source in sources}
    if all(re.fullmatch("[a-z]{2}", language) for language in languages):
        front["language"] = sorted(languages)
    front["library_name"] = {"lora": "peft", "gguf": "gguf"}.get(kind, "transformers")
    front["pipeline_tag"] = "text-generation"
    tags = {"lora": ["lora"], "gguf": ["gguf", "llama.cpp", "ollama"], "merged_4bit": ["bitsandbytes", "4-bit"]}
    front["tags"] = ["temper", "sft", "grpo", "reasoning", "conversational", *tags.get(kind, [])]
    if measured := metrics(kind, manifests):
        examined = [source for source in sources if "eval" in source.use]
        dataset = {
            "name": ", ".join(f"{label(source)} ({source.split})" for source in examined) + ", held-out problems",
            "type": next((source.name for source in examined if is_hub_name(source.name)), "custom"),
        }
        result = {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": measured}
        front["model-index"] = [{"name": names[kind].partition("/")[2], "results": [result]}]
    return front


def metrics(kind: str, manifests: Manifests) -> list[dict[str, Any]]:
    """Return the accuracies, as shares of 1, of one kind of files: none of the 4-bit model, which nobody examined."""
    if kind == "merged_4bit":
        return []
    if kind == "gguf":
        prompts = manifests["gguf"]["metrics"]["reference"]["prompts"]
        return [
            {"type": "accuracy", "value": file["accuracy"], "name": f"accuracy of {name} ({prompts} problems, greedy)"}
            for name, file in manifests["gguf"]["metrics"]["files"].items()
        ]
    own = manifests["infer"]["metrics"]["grpo"]
    return [{"type": "accuracy", "value": own["accuracy"], "name": f"accuracy ({own['problems']} problems, greedy)"}]


def introduction(kind: str, names: Mapping[str, str], recipe: Recipe, manifests: Manifests) -> list[str]:
    """Return what this is, what it was made from, and what else there is of it."""
    parameters = manifests["merge"]["metrics"]["parameters"]
    others = [
        f"- [{name}](https://huggingface.co/{name}): {KINDS[key].title}" for key, name in names.items() if key != kind
    ]
    return [
        f"{KINDS[kind].title}. It was fine-tuned from {base(recipe)}, first on worked solutions (SFT), then with "
        f"verifiable rewards (GRPO), to reason about problems whose answers can be checked. It has {parameters:,} "
        f"parameters.",
        *(["", "Of the same run:", "", *others] if others else []),
    ]


def base(recipe: Recipe) -> str:
    """Return what the recipe's model is called in a sentence."""
    if recipe.base_model is not None:
        return "a network made on the spot (`[base_model]` in the recipe below)"
    if is_hub_name(recipe.model.name):
        url = f"https://huggingface.co/{recipe.model.name}"
        return (
            f"[{recipe.model.name}]({url}) at revision [`{recipe.model.revision}`]({url}/tree/{recipe.model.revision})"
        )
    return f"`{Path(recipe.model.name).name}`, a model from a local folder"


def accuracy(manifests: Manifests) -> list[str]:
    """Return the examination of base, SFT and GRPO model, and the paired tests."""
    figures = manifests["infer"]["metrics"]
    rows = []
    for key, title in (("base", "base"), ("sft", "after SFT"), ("grpo", "after GRPO")):
        own = figures[key]
        rows.append((
            title, f"{own['accuracy']:.1%}", interval(own["accuracy_interval"]), f"{own['well_formed']:.1%}",
            f"{own['tokens']:.1f}", f"{own['cut_off']:.1%}", f"{own['problems']:,}",
        ))  # fmt: skip
    steps = [
        f"- {step}: {own['gained']} problems gained, {own['lost']} lost (exact McNemar test, {stats.p_text(own['p'])})"
        for step, own in figures["steps"].items()
    ]
    return [
        "## Accuracy",
        "",
        "Share of held-out problems whose final answer is right, answered greedily by the adapter on its base:",
        "",
        *table(("model", "accuracy", "95% interval", "well formed", "mean tokens", "cut off", "problems"), rows),
        "",
        "The same problems, one step against the one before:",
        "",
        *steps,
    ]


def fidelity(kind: str, recipe: Recipe, manifests: Manifests) -> list[str]:
    """Return how far the files of this repository are from the trained model; [] where nobody measured that."""
    if kind == "merged_16bit":
        own = manifests["merge"]["metrics"]
        trained = []
        if "trained_in_4bit" in own:
            cost = own["trained_in_4bit"]
            trained = [
                "",
                f"It was trained on its base in 4 bits (NF4), and merged into the base in 16. As it was in training it "
                f"is a mean KL divergence of {cost['mean_kl']:.1e} nats (at most {cost['max_kl']:.1e}) away, with the "
                f"same top token at {cost['same_top']:.2%}.",
            ]
        return [
            "## Merged as trained",
            "",
            f"At {own['positions']:,} positions of {own['prompts']} held-out prompts the next-token distribution of "
            f"these {recipe.merge.dtype} weights has a mean KL divergence of {own['merged_mean_kl']:.1e} nats (at most "
            f"{own['merged_max_kl']:.1e}) from the adapter on its base, and the same top token at "
            f"{own['merged_same_top']:.2%}. The base itself is {own['base_mean_kl']:.2g} nats away.",
            *trained,
        ]
    if kind == "merged_4bit":
        own = manifests["merge"]["metrics"]["merged_4bit"]
        return [
            "## Against the trained model",
            "",
            f"The next-token distribution of these 4-bit weights has a mean KL divergence of {own['mean_kl']:.1e} nats "
            f"(at most {own['max_kl']:.1e}) from the adapter on its base, and the same top token at "
            f"{own['same_top']:.2%} of {manifests['merge']['metrics']['positions']:,} positions of held-out prompts. "
            f"Its accuracy was not examined.",
        ]
    if kind == "lora":
        if "lora" not in manifests["gguf"]["metrics"]:
            return []
        own = manifests["gguf"]["metrics"]["lora"]
        return [
            "## The adapter's GGUF against the merged model",
            "",
            f"The base as a 16-bit GGUF with this adapter on it has a mean KL divergence of {own['mean_kl']:.1e} nats "
            f"(at most {own['max_kl']:.1e}) from the merged model, and the same top token at {own['same_top']:.2%} of "
            f"{own['positions']:,} positions.",
        ]
    reference = manifests["gguf"]["metrics"]["reference"]
    rows = [
        (
            name, f"{file['bytes'] / 1e6:,.1f}", *(f"{file[key]:.1e}" for key in ("mean_kl", "p99_kl", "max_kl")),
            f"{file['same_top']:.2%}", f"{file['same_text']:.1%}", f"{file['accuracy']:.1%}",
            interval((file["accuracy_low"], file["accuracy_high"])),
            f"{file['flipped_to_wrong']} / {file['flipped_to_right']}",
            f"{file['ended']} of {reference['prompts']}",
        )
        for name, file in manifests["gguf"]["metrics"]["files"].items()
    ]  # fmt: skip
    heads = (
        "type", "MB", "mean KL", "p99 KL", "max KL", "same top token", "same text", "accuracy", "95% interval",
        "answers gone wrong / right", "ended by itself",
    )  # fmt: skip
    return [
        "## Each file against the merged model",
        "",
        f"On {reference['prompts']} held-out prompts, next-token distributions at {reference['positions']:,} "
        f"positions; KL divergence in nats. The merged model answers {reference['accuracy']:.1%} of them "
        f"({interval((reference['accuracy_low'], reference['accuracy_high']))}) rightly, and {reference['ended']} "
        f"of its completions end by themselves.",
        "",
        *table(heads, rows),
        "",
        "![KL divergence and size by type](parity.png)",
    ]


def prompting(recipe: Recipe) -> list[str]:
    """Return the system prompt of training and what an answer looks like."""
    answers = formats.get(recipe.format.name)
    example = answers.generation_prefix + answers.write(formats.Answer("the reasoning, step by step", "42"))
    begun = f"The prompt itself ends with `{answers.generation_prefix.strip()}`. " if answers.generation_prefix else ""
    return [
        "It was trained with this system prompt and answers well only with it:",
        "",
        *fenced(system_prompt(recipe), "text"),
        "",
        f"An answer has this form, and ends by itself. {begun}The chat template is the tokenizer's.".strip(),
        "",
        *fenced(example, "text"),
    ]


def running(kind: str, names: Mapping[str, str], recipe: Recipe, files: Sequence[File]) -> list[str]:
    """Return how to run this repository in each program that can, and which one to take for the others."""
    lines: list[str] = []
    if kind == "gguf":
        lines += run_gguf(names[kind], recipe)
    else:
        lines += run_weights(kind, names[kind], recipe)
    if kind == "lora":
        lines += run_lora_gguf(names[kind], files)
    instead = {"gguf": "llama.cpp and Ollama", "merged_16bit": "transformers and vLLM"}
    other = "merged_16bit" if kind == "gguf" else "gguf"
    if other in names:
        lines += ["", f"For {instead[other]} take [{names[other]}](https://huggingface.co/{names[other]})."]
    return lines


def run_weights(kind: str, name: str, recipe: Recipe) -> list[str]:
    """Return how to run safetensors, a whole model or an adapter, in transformers and vLLM."""
    origin, revision = recipe.model.name, recipe.model.revision
    if not is_hub_name(origin):
        origin, revision = "path/to/the/base/model", ""
    load = [f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")']
    serve = f"vllm serve {name}"
    imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if kind == "lora":
        imports = ["from peft import PeftModel", *imports]
        pinned = f', revision="{revision}"' if revision else ""
        load = [
            f'base = AutoModelForCausalLM.from_pretrained("{origin}"{pinned}, dtype="auto")',
            f'model = PeftModel.from_pretrained(base, "{name}")',
        ]
        serve = (
            f"vllm serve {origin}{f' --revision {revision}' if revision else ''} --tokenizer {name} --enable-lora "
            f"--max-lora-rank {recipe.lora.rank} --lora-modules {name}={name}"
        )
    if kind == "merged_4bit":
        serve += " --quantization bitsandbytes"
    code = [
        *imports,
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        *load,
        *messages(recipe),
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ").to(model.device)",
        f"output = model.generate(**inputs, max_new_tokens={recipe.infer.max_completion_tokens}, do_sample=False)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    needs = ["It needs bitsandbytes and an NVIDIA GPU.", ""] if kind == "merged_4bit" else []
    return [
        *("### transformers" + (" and PEFT" if kind == "lora" else ""), ""),
        *needs,
        *fenced("\n".join(code), "python"),
        *("", "### vLLM", ""),
        *fenced(serve, "sh"),
        *("", "and with the `openai` client:", ""),
        *fenced(client(name, recipe, 8000), "python"),
    ]


def run_lora_gguf(name: str, files: Sequence[File]) -> list[str]:
    """Return how to run the adapter's GGUF in llama.cpp; [] where there is none."""
    return [
        line
        for file in files
        if file.name.endswith(".gguf")
        for line in (
            "",
            "### llama.cpp",
            "",
            "With the base model as GGUF, which is not in this repository:",
            "",
            *fenced(
                f"hf download {name} {file.name} --local-dir .\nllama-cli -m base.gguf --lora {file.name} --jinja", "sh"
            ),
        )
    ]


def run_gguf(name: str, recipe: Recipe) -> list[str]:
    """Return how to run GGUF files in llama.cpp and Ollama, with what the Modelfile says."""
    kind = recipe.ollama.quantization.lower()
    knobs = recipe.ollama
    sampling = f"--temp {knobs.temperature} --top-p {knobs.top_p} --top-k {knobs.top_k} --min-p {knobs.min_p}"
    folder = name.partition("/")[2]
    return [
        *(f"The recommended file is `model.{kind}.gguf`.", "", "### llama.cpp", ""),
        *fenced(
            f"hf download {name} model.{kind}.gguf system --local-dir {folder}\n"
            f"llama-cli -m {folder}/model.{kind}.gguf --jinja -sysf {folder}/system -c {knobs.num_ctx} {sampling}",
            "sh",
        ),
        *(
            "",
            f"or `llama-server -m {folder}/model.{kind}.gguf --jinja -c {knobs.num_ctx}` and the `openai` client:",
            "",
        ),
        *fenced(client(name, recipe, 8080), "python"),
        *("", "### Ollama", ""),
        *fenced(f"ollama run hf.co/{name}:{kind}", "sh"),
        *("", "Ollama reads `template`, `system` and `params` of this repository. The `Modelfile` says the same:", ""),
        *fenced(
            f"hf download {name} --local-dir {folder}\ncd {folder} && ollama create {folder.lower()} -f Modelfile", "sh"
        ),
    ]


def messages(recipe: Recipe) -> list[str]:
    """Return Python that makes `messages`: the system prompt of training, and a question."""
    lines = [f"    {json.dumps(line, ensure_ascii=False)}" for line in system_prompt(recipe).splitlines(keepends=True)]
    return [
        "system = (",
        *lines,
        ")",
        f'messages = [{{"role": "system", "content": system}}, {{"role": "user", "content": {json.dumps(QUESTION)}}}]',
    ]


def client(name: str, recipe: Recipe, port: int) -> str:
    """Return Python that asks an OpenAI-compatible server on this machine."""
    knobs = recipe.ollama
    sampling = f"temperature={knobs.temperature}, top_p={knobs.top_p}"
    lines = [
        "from openai import OpenAI",
        "",
        *messages(recipe),
        f'client = OpenAI(base_url="http://127.0.0.1:{port}/v1", api_key="none")',
        "answer = client.chat.completions.create(",
        f'    model="{name}", messages=messages, max_tokens={recipe.infer.max_completion_tokens}, {sampling},',
        f'    extra_body={{"top_k": {knobs.top_k}, "min_p": {knobs.min_p}}},',
        ")",
        "print(answer.choices[0].message.content)",
    ]
    return "\n".join(lines)


def training(recipe: Recipe, manifests: Manifests) -> list[str]:
    """Return data with counts, both trainings with what they came to, the rewards, and the recipe."""
    prepared = manifests["prepare-data"]["metrics"]
    read = [
        (label(source), source.split, source.revision, ", ".join(source.use), f"{found['rows']:,}")
        for source, found in zip(recipe.data.sources, prepared["sources"], strict=True)
    ]
    sets = [
        (name, f"{found['rows']:,}", ", ".join(f"{count:,} {why}" for why, count in found["dropped"].items()) or "none")
        for name, found in prepared["sets"].items()
    ]
    sft, grpo = manifests["sft"]["metrics"], manifests["grpo"]["metrics"]
    paid = [
        (f"`{name}`", f"{weight:g}", *(f"{grpo[when]['rewards'][reward_key(name)]:.3f}" for when in ("first", "last")))
        for name, weight in zip(recipe.rewards.functions, recipe.rewards.weights, strict=True)
    ]
    batch = recipe.grpo.prompts_per_step * recipe.grpo.completions_per_prompt
    return [
        *table(("source", "split", "revision", "used for", "rows read"), read),
        "",
        *table(("set", "rows", "left out"), sets),
        "",
        f"SFT: {recipe.sft.steps} steps of {recipe.sft.batch_size} examples out of {sft['examples']:,}, LoRA of rank "
        f"{recipe.lora.rank} with {sft['trainable_parameters']:,} parameters; loss {sft['loss']:.4f} nats a token.",
        "",
        f"GRPO: {recipe.grpo.steps} steps of {batch} completions ({recipe.grpo.completions_per_prompt} a problem). "
        f"What was paid, as the mean over the first and over the last tenth of the steps (their weighted sum: "
        f"{grpo['first']['reward']:.3f} and {grpo['last']['reward']:.3f}):",
        "",
        *table(("reward", "weight", "first", "last"), paid),
        *ladder(manifests),
        "",
        "<details><summary>The recipe</summary>",
        "",
        *fenced(recipe.path.read_text().strip("\n"), "toml"),
        "",
        "</details>",
    ]


def ladder(manifests: Manifests) -> list[str]:
    """Return where a training had to make do with less than the recipe says because memory was short; [] where not."""
    lines = [
        f"- {stage}: {json.dumps(step)}"
        for stage in ("sft", "grpo")
        for step in manifests[stage]["metrics"].get("memory_ladder", [])
    ]
    return (
        ["", "Memory was short, and training went on with less than the recipe below says:", "", *lines]
        if lines
        else []
    )


def label(source: Source) -> str:
    """Return what a source of problems is called in a table: never a path on this disk."""
    if source.name == "base-model":
        return "generated with the base model"
    return source.name if is_hub_name(source.name) else Path(source.name).name


def reward_key(name: str) -> str:
    """Return what a reward of `[rewards] functions` is called in the metrics: a function in a file by its own name."""
    return name.rpartition(":")[2]


def listing(files: Sequence[File]) -> list[str]:
    """Return the files with size and sha256; this card itself is not among them."""
    rows = [(f"`{file.name}`", f"{file.size:,}", f"`{file.sha256}`") for file in files]
    return table(("file", "bytes", "sha256"), rows)


def versions(manifests: Manifests) -> list[str]:
    """Return Temper's revision, packages and hardware, each once where all stages had the same."""
    found: dict[str, dict[str, list[str]]] = {}
    for stage, manifest in manifests.items():
        where = manifest["environment"]
        git = (where["git"] or "not known").replace("-dirty", " with changes that were not committed")
        facts = {"Temper": git, "Python": where["python"], **where["packages"], "GPU": where["gpu"] or "none"}
        for name, value in facts.items():
            found.setdefault(name, {}).setdefault(value, []).append(stage)
    rows = []
    for name, values in found.items():
        stages = [f"{value} ({', '.join(at)})" for value, at in values.items()]
        rows.append((name, ", ".join(values if len(values) == 1 else stages)))
    return table(("what", "version"), rows)


def licence(recipe: Recipe) -> list[str]:
    """Return the licence as the recipe states it, with what follows from the base."""
    if not recipe.ollama.license:
        return [
            "The recipe states none. That of the base model and those of the data apply to what was made from them."
        ]
    return [*fenced(recipe.ollama.license, "text"), "", "That of the base model and those of the data apply as well."]


def system_prompt(recipe: Recipe) -> str:
    """Return the system prompt of training."""
    return recipe.format.system_prompt or formats.get(recipe.format.name).system_prompt


def slug(text: str) -> str:
    """Return the first line of `text` as the hub wants names: lower case, at most 60 characters, no blanks."""
    return re.sub(r"[^a-z0-9.]+", "-", text.strip().split("\n")[0].lower())[:60].strip("-.")


def interval(bounds: Sequence[float]) -> str:
    """Return a 95% interval of shares as text."""
    return f"{bounds[0]:.1%} to {bounds[1]:.1%}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table; no cell can end it."""
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def fenced(text: str, language: str) -> list[str]:
    """Return a code block; nothing in `text` can end it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *text.split("\n"), fence]
