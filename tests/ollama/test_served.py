"""What Ollama prompts a model with, by the words that its server searches for."""

import pytest

from stages.lib.model.template import write_choices
from stages.lib.ollama.derive import jinja_render
from stages.lib.ollama.served import served_by
from stages.lib.report import terminal
from tests.support import chat_templates

TOKENS = {"bos_token": "<bos>", "eos_token": "</s>"}
ASKED = [{"role": "user", "content": "17 + 25?"}]
TEMPLATES = {**chat_templates.llama_cpp(), **chat_templates.MADE}


@pytest.mark.parametrize(
    ("architecture", "name", "kwargs", "served"),
    [
        ("gemma3", "gemma-3", {}, "TEMPLATE"),
        ("gemma2", "google-gemma-2-2b-it", {}, "TEMPLATE"),
        ("phi3", "phi-4", {}, "TEMPLATE"),
        ("phi3", "microsoft-Phi-3.5-mini-instruct", {}, "TEMPLATE"),
        ("llama", "SmolLM2", {}, "TEMPLATE"),
        ("qwen3", "qwen-3 with think", {}, "TEMPLATE"),  # a thought that the template opens and never closes
        ("qwen2", "Qwen-Qwen2.5-7B-Instruct", {}, "the GGUF file"),
        ("qwen3", "Qwen-Qwen3-0.6B", {"enable_thinking": False}, "the GGUF file"),
        ("llama", "meta-llama-Llama-3.1-8B-Instruct", {}, "the GGUF file"),
        ("llama", "mistralai-Mistral-Nemo-Instruct-2407", {}, "the GGUF file"),
        ("qwen35", "Qwen3.5-4B", {"enable_thinking": False}, "the GGUF file"),
        ("qwen35", "Qwen3.5-4B", {"enable_thinking": True}, "TEMPLATE by PARSER"),  # the prompt opens a thought
        ("llama", "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", {}, "TEMPLATE by PARSER"),
        ("gemma4", "google-gemma-4-31B-it", {}, "Ollama's own renderer"),
        ("nemotron_h_moe", "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", {}, "Ollama's own renderer"),
    ],
)
def test_what_prompts_a_model_in_ollama(architecture, name, kwargs, served):
    template = write_choices(TEMPLATES[name], kwargs, TOKENS)
    assert served_by(architecture, template, jinja_render(template, TOKENS)(ASKED, True)) == served


@pytest.mark.parametrize(
    ("words", "served"),
    [
        ("a tool", "TEMPLATE"),
        ("tools", "the GGUF file"),
        ("my_tool_calls", "the GGUF file"),
        ("<think> alone", "TEMPLATE"),
        ("<think></think>", "the GGUF file"),
        ("content.split('</think>')", "the GGUF file"),
        ("content.split('</think>') reasoning_content", "TEMPLATE"),
    ],
)
def test_words_decide_wherever_they_stand(words, served):
    assert served_by("llama", f"{chat_templates.CHATML}{{# {words} #}}", "<|im_start|>assistant\n") == served


@pytest.mark.parametrize(
    ("prompted_by", "said"),
    [
        ("TEMPLATE", "Ollama prompts with TEMPLATE: 48 conversations are rendered as in training"),
        (
            "TEMPLATE by PARSER",
            "Ollama prompts with TEMPLATE, by PARSER passthrough: 48 conversations are rendered as in training",
        ),
        (
            "the GGUF file",
            "Ollama prompts with the chat template in m.gguf; by that and by TEMPLATE 48 conversations are rendered as "
            "in training",
        ),
        (
            "Ollama's own renderer",
            "Ollama prompts the architecture gemma4 with a renderer of its own and reads no TEMPLATE: its prompts are "
            "not proven. Run: make ollama, which compares them",
        ),
    ],
)
def test_the_stage_says_what_is_proven_and_what_is_not(prompted_by, said):
    figures = {"conversations": 48, "file": "m.gguf", "architecture": "gemma4", "prompted_by": prompted_by}
    assert terminal.ollama_modelfile(figures) == said
