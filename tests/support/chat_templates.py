"""Chat templates for tests: those of the recipes' families that llama.cpp does not carry, and shapes of their own."""

import sys
from pathlib import Path

from stages import base_model
from stages.lib.answers import formats

LLAMA_CPP = Path(sys.prefix) / "llama.cpp" / "models" / "templates"
LOOP = "{% for m in messages %}"
PROMPT = "{% if add_generation_prompt %}"

CHATML = (
    LOOP + "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    + PROMPT + "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)  # fmt: skip
PHI_4 = (
    LOOP + "{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    + PROMPT + "{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)  # fmt: skip

MADE = {
    "SmolLM2": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
        "trained by Hugging Face<|im_end|>\n' }}{% endif %}" + CHATML
    ),
    "gemma-3": base_model.CHAT_TEMPLATE,
    "qwen-3 with think": formats.THINK.chat_template,
    "phi-4": PHI_4,
    "phi-4-mini": LOOP + "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    + PROMPT + "{{ '<|assistant|>' }}{% endif %}",
    "mistral": "{{ bos_token }}" + LOOP + (
        "{% if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
        "{% elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "olmo-2": "{{ bos_token }}" + LOOP + (
        "{% if m.role == 'assistant' %}{{ '<|assistant|>\\n' + m.content + eos_token }}{{ '\\n' if not loop.last }}"
        "{% else %}{{ '<|' + m.role + '|>\\n' + m.content + '\\n' }}{% endif %}{% endfor %}"
    ) + PROMPT + "{{ '<|assistant|>\\n' }}{% endif %}",
    "chatml": CHATML,
    "chatml, prompt ends in a thought": CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}"),
    "phi-3 medium": "{{ bos_token }}" + LOOP + (
        "{% if m.role == 'user' %}{{ '<|user|>\\n' + m.content + '<|end|>\\n' }}"
        "{% elif m.role == 'assistant' %}{{ '<|assistant|>\\n' + m.content + '<|end|>\\n' }}{% endif %}{% endfor %}"
    ) + PROMPT + "{{ '<|assistant|>\\n' }}{% endif %}",
    "its own system message instead": (
        "<|im_start|>system<|im_sep|>Think first.<|im_end|>"
        "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}" + PHI_4
    ),
    "default system prompt": "{% if messages[0].role != 'system' %}<s>Be brief.</s>{% endif %}" + CHATML,
    "system prompt in the last user turn": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
        "{% set messages = messages[1:] %}{% endif %}" + LOOP + "{% if m.role == 'user' %}"
        "[INST] {{ s + '\\n\\n' if s is defined and loop.last }}{{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "an empty system prompt is none": (
        "{% if messages[0].role == 'system' %}{% if messages[0].content %}<<{{ messages[0].content }}>>{% endif %}"
        "{% set messages = messages[1:] %}{% endif %}" + CHATML
    ),
    "trims line breaks before an answer": LOOP + (
        "<{{ m.role }}>{{ m.content.lstrip('\\n') if m.role == 'assistant' else m.content }}</{{ m.role }}>{% endfor %}"
    ) + PROMPT + "<assistant>{% endif %}",
    "trims the end of a question only": LOOP + (
        "{{ m.role }}: {{ m.content.rstrip() if m.role == 'user' else m.content }}{{ '\\n' }}{% endfor %}"
    ) + PROMPT + "assistant:{% endif %}",
    "trims the system prompt": LOOP + (
        "{{ m.role }}|{{ m.content | trim if m.role == 'system' else m.content }}|{% endfor %}"
    ) + PROMPT + "assistant|{% endif %}",
    "text that Go and Modelfiles could misread": LOOP + (
        "{{ '{{ .System }} {% \"\"\" \\'\\' {' }}{{ '\\u00a0\\r\\t\\u200b{' + m.content + '}}' }}{% endfor %}"
    ) + PROMPT + "{{ '{{end}}{{/*\"\"\"' }}{% endif %}",
}  # fmt: skip


def llama_cpp() -> dict[str, str]:
    """Give the chat templates that come with llama.cpp, by file name without its ending."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(LLAMA_CPP.glob("*.jinja"))}
