"""Which template Ollama prompts a model with: the Modelfile's TEMPLATE, the GGUF file's, or a renderer of its own.

Ollama runs llama.cpp's llama-server. Where the chat template in the GGUF file can do more than TEMPLATE (tools,
thoughts), it hands the messages on and llama-server renders that one; TEMPLATE is then not read (server/images.go and
server/routes.go of ollama/ollama, v0.33). A PARSER in the Modelfile brings TEMPLATE back. For some architectures
`ollama create` chooses a renderer of Ollama's own, whatever the Modelfile says (server/create.go).
"""

OWN_RENDERER = ("gemma4", "laguna", "nemotron_h", "nemotron_h_moe", "nemotron_h_omni")  # architectures of GGUF files
TEMPLATE, GGUF, PASSTHROUGH, RENDERER = "TEMPLATE", "the GGUF file", "TEMPLATE by PARSER", "Ollama's own renderer"


def served_by(architecture: str, chat_template: str, prompt: str) -> str:
    """Return what prompts a model, one of the four names above; its TEMPLATE has neither tools nor thoughts, as ours.

    `prompt` is a prompt of the chat template. Where it ends inside a thought, the Modelfile needs a PARSER: an answer
    that never closes the thought would be thought as a whole to Ollama, and it would return no answer.
    """
    if architecture in OWN_RENDERER:
        return RENDERER
    if not has_tools(chat_template) and not has_thoughts(chat_template):
        return TEMPLATE
    return PASSTHROUGH if prompt.rfind("<think>") > prompt.rfind("</think>") else GGUF


def has_tools(chat_template: str) -> bool:
    """Return whether Ollama takes a chat template for one with tools: it searches the text."""
    return "tools" in chat_template or "tool_call" in chat_template


def has_thoughts(chat_template: str) -> bool:
    """Return whether Ollama takes a chat template for one with thoughts."""
    if "<think>" in chat_template and "</think>" in chat_template:
        return True
    cuts = any(f"content.split({quote}</think>{quote})" in chat_template for quote in "'\"")
    return cuts and "reasoning_content" not in chat_template and "<SPECIAL_12>" not in chat_template
