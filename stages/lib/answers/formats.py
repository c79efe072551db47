"""The answer formats: how a completion holds its reasoning and its answer. The one place that knows the tags.

The SFT completion (`write`), the rewards and `infer` (`read`, `split`), the system prompt, the chat template of a
base model and the stop strings all come from here.

    xml      <reasoning>        think    <think>            (pre-filled by the generation prompt)
             ...                         ...</think><SOLUTION>...</SOLUTION>
             </reasoning>
             <answer>
             ...
             </answer>

A completion is well formed when every tag it has to hold occurs in it exactly once, in order, with text inside both
blocks and nothing but white space outside them. So a second answer, an answer inside the reasoning, a nested or
repeated tag, an empty block and text before, between or after the blocks are all not well formed. White space
(`str.isspace`) around a tag is never a reason. Tags are matched to the letter: `<Answer>` is plain text.

`think`: the generation prompt ends with `<think>`, so a completion does not hold it. One that writes `<think>` again
stands for `<think> <think>` and is not well formed, wherever the second one is.
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
    """All text of a well-formed completion but its tags: the two blocks and the white space around them, as written."""

    before: str
    reasoning: str
    between: str
    answer: str
    after: str


@dataclass(frozen=True)
class Format:
    """One answer format. `generation_prefix` is text the generation prompt ends with and the completion leaves out."""

    name: str
    system_prompt: str
    reasoning_open: str
    reasoning_close: str
    answer_open: str
    answer_close: str
    separator: str  # what `write` puts between a tag and what is next to it
    generation_prefix: str = ""
    chat_template: str | None = None  # Jinja; None: the model's own
    stops: tuple[str, ...] = ()  # generation may end here; the stop string itself belongs to the completion

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags a completion has to hold, in order."""
        tags = (self.reasoning_open, self.reasoning_close, self.answer_open, self.answer_close)
        return tags[1:] if self.generation_prefix else tags

    def write(self, answer: Answer) -> str:
        """Give the completion that `read` turns back into `answer`, white space at the ends of its parts apart.

        Raises ValueError for a part that is empty or holds one of the format's tags: no completion could say it.
        """
        reasoning, final = answer.reasoning.strip(), answer.answer.strip()
        for part, text in (("reasoning", reasoning), ("answer", final)):
            if not text:
                raise ValueError(f"the {part} is empty, and format {self.name} has no way to write that")
            for tag in (self.reasoning_open, self.reasoning_close, self.answer_open, self.answer_close):
                if tag in text:
                    raise ValueError(f"the {part} holds {tag}, a tag of format {self.name} itself")
        parts = (self.reasoning_open, reasoning, self.reasoning_close, self.answer_open, final, self.answer_close)
        return self.separator.join(parts[1:] if self.generation_prefix else parts)

    def read(self, completion: str) -> Answer | None:
        """Give the parts of `completion` (decoded, without the end-of-turn token), or None if it is not well formed."""
        parts = self.split(completion)
        return None if parts is None else Answer(parts.reasoning.strip(), parts.answer.strip())

    def split(self, completion: str) -> Parts | None:
        """Give what stands between the tags of `completion` with its white space, or None if it is not well formed."""
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
        """Say whether the tags stand as `write` puts them (xml: on lines of their own); one line break may follow."""
        separator = self.separator
        blocks = (parts.reasoning, parts.answer)
        return (
            parts.before == ""
            and parts.between == separator
            and parts.after in ("", "\n")
            and all(block.startswith(separator) and block.endswith(separator) for block in blocks)
        )


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

# The line break after <think> keeps the last token of the prompt apart from the first of the completion: without it
# most BPE tokenizers join ">" to the word that follows, and the prompt's tokens would not be the start of the whole's.
_THINK_PREFIX = "<think>\n"

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
    generation_prefix=_THINK_PREFIX,
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
    """Give the format called `name`. Raises UserError for an unknown one, naming the nearest."""
    if name in FORMATS:
        return FORMATS[name]
    raise UserError(f"unknown answer format {name!r}{nearest(name, FORMATS)}; known: {', '.join(sorted(FORMATS))}")
