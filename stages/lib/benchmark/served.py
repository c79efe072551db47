"""A GGUF file in llama-server, as lm-eval calls a model: it completes prompts; likelihoods it does not give."""

from pathlib import Path
from typing import Any

from stages.lib.bars import open_bar
from stages.lib.errors import UserError
from stages.lib.gguf.server import LlamaServer

MAX_TOKENS = 256  # of a completion where a task states none, as in lm-eval's own models


def served(path: Path) -> Any:
    """Return a model of lm-eval on the GGUF file `path`; its process ends with this one."""
    from lm_eval.api.model import LM

    class Served(LM):
        def __init__(self) -> None:
            super().__init__()
            self.server = LlamaServer(path)

        def generate_until(self, requests: list[Any]) -> list[str]:
            """Return a greedy completion of each request's prompt, up to one of its stops."""
            completions = []
            with self.server.client() as client, open_bar(len(requests), "answer", path.name) as bar:
                for request in requests:
                    prompt, wanted = request.args
                    stops = wanted.get("until", [])
                    body = {
                        "prompt": prompt, "temperature": wanted.get("temperature", 0.0), "seed": 0,
                        "n_predict": wanted.get("max_gen_toks", MAX_TOKENS),
                        "stop": [stops] if isinstance(stops, str) else stops,
                    }  # fmt: skip
                    answer = client.post("/completion", json=body)
                    if answer.status_code != 200:
                        raise UserError(f"{path}: llama-server refused a prompt of a task: {answer.text[:300]}")
                    completions.append(answer.json()["content"])
                    bar.update()
            return completions

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            """Return the prompt of a conversation, as the file's own chat template renders it."""
            with self.server.client() as client:
                body = {"messages": chat_history, "add_generation_prompt": add_generation_prompt}
                return str(client.post("/apply-template", json=body).json()["prompt"])

        @property
        def tokenizer_name(self) -> str:
            return path.name

        def chat_template(self, chat_template: Any = False) -> str:
            return ""

        def loglikelihood(self, requests: list[Any]) -> Any:
            raise UserError(
                "TASKS: a task asks for the likelihood of given texts, which llama-server does not give. Leave OF=gguf "
                "out: the merged model in transformers or vLLM has them"
            )

        loglikelihood_rolling = loglikelihood

    return Served()
