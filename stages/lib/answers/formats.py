"""The answer formats: where a completion has its reasoning and its answer. Only this file knows the tags.

It has the SFT completion (`write`), what rewards and `infer` read (`read`, `split`), the system prompt, a base model's
chat template and the stop strings.

    xml      <reasoning>        think    <think>            (pre-filled by the generation prompt)
             ...                         ...</think><SOLUTION>...</SOLUTION>
             </reasoning>
             <answer>
             ...
             </answer>

A completion is well formed when each of its tags occurs in it exactly once, in order, with text inside both blocks and
only white space (`str.isspace`) outside them. So a second answer, an answer inside the reasoning, a nested or repeated
tag, an empty block and text outside the blocks are not well formed. Tags are matched to the letter: `<Answer>` is text.

In `think` the generation prompt ends with `<think>`. A completion that writes `<think>` again, wherever, has it twice
and is not well formed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from stages.lib.errors import UserError, nearest


@dataclass(frozen=True)
class Answer:
    """The two parts of a well-formed completion, without white space at either end."""

    reasoning: str
    answer: str


class Parts(NamedTuple):
    """The text of a well-formed completion without its tags: the two blocks and the white space around them."""

    before: str
    reasoning: str
    between: str
    answer: str
    after: str


@dataclass(frozen=True)
class Format:
    """An answer format. `generation_prefix` ends the generation prompt, so the completion does not repeat it."""

    name: str
    system_prompt: str
    reasoning_open: str
    reasoning_close: str
    answer_open: str
    answer_close: str
    separator: str  # between a tag and its neighbours, as `write` puts it
    generation_prefix: str = ""
    chat_template: str | None = None  # Jinja; None: the model's own
    stops: tuple[str, ...] = ()  # generation may end here; the stop string itself belongs to the completion

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags of a completion, in order."""
        tags = (self.reasoning_open, self.reasoning_close, self.answer_open, self.answer_close)
        return tags[1:] if self.generation_prefix else tags

    def write(self, answer: Answer) -> str:
        """Return the completion that `read` turns back into `answer`, its parts stripped.

        Raises ValueError for a part that is empty or holds one of the format's tags: no completion can hold it.
        """
        reasoning, final = answer.reasoning.strip(), answer.answer.strip()
        for part, text in (("reasoning", reasoning), ("answer", final)):
            if not text:
                raise ValueError(f"the {part} is empty; format {self.name} needs text there")
            for tag in (self.reasoning_open, self.reasoning_close, self.answer_open, self.answer_close):
                if tag in text:
                    raise ValueError(f"the {part} holds {tag}, a tag of format {self.name} itself")
        parts = (self.reasoning_open, reasoning, self.reasoning_close, self.answer_open, final, self.answer_close)
        return self.separator.join(parts[1:] if self.generation_prefix else parts)

    def read(self, completion: str) -> Answer | None:
        """Return the parts of `completion`, decoded and without end-of-turn token, or None if it is not well formed."""
        parts = self.split(completion)
        return None if parts is None else Answer(parts.reasoning.strip(), parts.answer.strip())

    def split(self, completion: str) -> Parts | None:
        """Return the text between the tags of `completion`, unstripped, or None if it is not well formed."""
        for tag in (self.reasoning_close, self.answer_open, self.answer_close):
            if completion.count(tag) != 1:
                return None
        before, opening, reasoning = completion.partition(self.reasoning_open)
        if self.generation_prefix:
            before, reasoning = "", before  # and no opening tag
        if bool(opening) == bool(self.generation_prefix) or self.reasoning_open in reasoning:
            return None
        reasoning, _, rest = reasoning.partition(self.reasoning_close)
        between, _, rest = rest.partition(self.answer_open)
        answer, closing, after = rest.partition(self.answer_close)
        if not closing or before.strip() or between.strip() or after.strip():
            return None
        if not reasoning.strip() or not answer.strip():
            return None
        return Parts(before, reasoning, between, answer, after)

    def is_exact(self, parts: Parts) -> bool:
        """Return whether the tags stand as `write` puts them (xml: on lines of their own); a line break may follow."""
        blocks = (parts.reasoning, parts.answer)
        outside = parts.before == "" and parts.between == self.separator and parts.after in ("", "\n")
        return outside and all(block.startswith(self.separator) and block.endswith(self.separator) for block in blocks)


XML = Format(
    name="xml",
    system_prompt=(
        "Respond in the following format:\n"
        "<reasoning>\n"
        "your reasoning, step by step\n"
        "</reasoning>\n"
        "<answer>\n"
        "the final answer and nothing else\n"
        "</answer>"
    ),
    reasoning_open="<reasoning>",
    reasoning_close="</reasoning>",
    answer_open="<answer>",
    answer_close="</answer>",
    separator="\n",
    stops=("</answer>",),
)

THINK = Format(
    name="think",
    system_prompt=(
        "You are given a problem.\n"
        "Think about it and work it out between <think> and </think>.\n"
        "Then give the final answer, and nothing else, between <SOLUTION> and </SOLUTION>."
    ),
    reasoning_open="<think>",
    reasoning_close="</think>",
    answer_open="<SOLUTION>",
    answer_close="</SOLUTION>",
    separator="",
    # Without the line break most BPE tokenizers join ">" to the completion's first word, and then the prompt's tokens
    # are not the first tokens of prompt and completion together.
    generation_prefix="<think>\n",
    # Expressions rather than bare text, so that the result is the same with and without Jinja's trim_blocks.
    chat_template=(
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}"
        "{{ '<think>\\n' + message['content'] + eos_token }}"
        "{% elif message['role'] == 'user' %}"
        "{{ message['content'] + '\\n' }}"
        "{% else %}"
        "{{ message['content'] + eos_token }}"
        "{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
    ),
    stops=("</SOLUTION>",),
)

FORMATS: Mapping[str, Format] = {"xml": XML, "think": THINK}


def get(name: str) -> Format:
    """Return the format called `name`. Raises UserError for an unknown one, naming the nearest."""
    if name in FORMATS:
        return FORMATS[name]
    raise UserError(f"unknown answer format {name!r}{nearest(name, FORMATS)}; known: {', '.join(sorted(FORMATS))}")
