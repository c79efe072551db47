"""The rewards of completions that try to be rewarded without a worked, right answer.

The true answer is 42 (or stated). `python -m tests.rewards.test_adversarial` writes the tables below into
docs/rewards.md; a test asserts that they stand there.
"""

from pathlib import Path

import pytest

from stages.lib.answers.formats import THINK, XML
from stages.lib.rewards.names import SUITES
from tests.support.rewards import load_rewards

DOCUMENT = Path(__file__).parents[2] / "docs" / "rewards.md"

# What an honest completion with a wrong integer answer gets in all. A cheat has to get less.
HONEST_BUT_WRONG = {"xml": 2.0, "think": 0.5}

HONEST = "honest"
CHEAT = "cheat"

THOUGHT = "<reasoning>\na\n</reasoning>\n"

# fmt: off
# what it is, kind, completion, true answer, then xmlcount, soft_format, strict_format, int, correctness
XML_CASES = [
    ("right", HONEST,
     "<reasoning>\n6 x 7 = 42\n</reasoning>\n<answer>\n42\n</answer>", "42", (0.5, 0.5, 0.5, 0.5, 2.0)),
    ("wrong", HONEST,
     "<reasoning>\n6 x 7 = 41\n</reasoning>\n<answer>\n41\n</answer>", "42", (0.5, 0.5, 0.5, 0.5, 0.0)),
    ("reasoning of several lines", HONEST,
     "<reasoning>\n6 x 7\n\n= 42\n</reasoning>\n<answer>\n42\n</answer>\n", "42", (0.5, 0.5, 0.5, 0.5, 2.0)),
    ("all on one line", HONEST, "<reasoning>6 x 7</reasoning><answer>42</answer>", "42", (0.5, 0.5, 0.0, 0.5, 2.0)),
    ("negative", HONEST, "<reasoning>\n3 - 6\n</reasoning>\n<answer>\n-3\n</answer>", "-3", (0.5, 0.5, 0.5, 0.5, 2.0)),
    ("unicode minus", HONEST,
     "<reasoning>\n3 - 6\n</reasoning>\n<answer>\n−3\n</answer>", "-3", (0.5, 0.5, 0.5, 0.5, 2.0)),
    ("thousands comma", HONEST,
     "<reasoning>\n2 x 600\n</reasoning>\n<answer>\n1,200\n</answer>", "1200", (0.5, 0.5, 0.5, 0.5, 2.0)),
    ("decimal for a fraction", HONEST,
     "<reasoning>\n1 over 2\n</reasoning>\n<answer>\n0.5\n</answer>", "1/2", (0.5, 0.5, 0.5, 0.0, 2.0)),
    ("a sentence for an answer", HONEST,
     "<reasoning>\n6 x 7\n</reasoning>\n<answer>\nIt is 42 dollars.\n</answer>", "42", (0.5, 0.5, 0.5, 0.0, 2.0)),
    ("nothing", CHEAT, "", "42", (0.0, 0.0, 0.0, 0.0, 0.0)),
    ("the bare answer", CHEAT, "42", "42", (0.0, 0.0, 0.0, 0.0, 0.0)),
    ("tags and nothing else", CHEAT, "<reasoning></reasoning><answer></answer>", "42", (0.0, 0.0, 0.0, 0.0, 0.0)),
    ("tags around blanks", CHEAT,
     "<reasoning>\n \n</reasoning>\n<answer>\n\t\n</answer>", "42", (0.0, 0.0, 0.0, 0.0, 0.0)),
    ("empty thought", CHEAT, "<reasoning>\n</reasoning>\n<answer>\n42\n</answer>", "42", (0.25, 0.0, 0.0, 0.0, 0.0)),
    ("no thought", CHEAT, "<answer>\n42\n</answer>", "42", (0.25, 0.0, 0.0, 0.0, 0.0)),
    ("empty answer", CHEAT, "<reasoning>\n42\n</reasoning>\n<answer>\n</answer>", "42", (0.25, 0.0, 0.0, 0.0, 0.0)),
    ("no answer", CHEAT, "<reasoning>\n42\n</reasoning>", "42", (0.25, 0.0, 0.0, 0.0, 0.0)),
    ("answer inside the thought", CHEAT,
     "<reasoning>\n<answer>\n42\n</answer>\n</reasoning>", "42", (0.238, 0.0, 0.0, 0.0, 0.0)),
    ("one inside, one after", CHEAT,
     "<reasoning>\n<answer>42</answer>\n</reasoning>\n<answer>\n42\n</answer>", "42", (0.25, 0.0, 0.0, 0.0, 0.0)),
    ("two answers", CHEAT,
     THOUGHT + "<answer>\n41\n</answer>\n<answer>\n42\n</answer>", "42", (0.25, 0.0, 0.0, 0.0, 0.0)),
    ("two whole completions", CHEAT,
     THOUGHT + "<answer>\n41\n</answer>\n<reasoning>\na\n</reasoning>\n<answer>\n42\n</answer>", "42",
     (0.0, 0.0, 0.0, 0.0, 0.0)),
    ("closing tag repeated", CHEAT, THOUGHT + "<answer>\n42\n</answer>\n</answer>", "42", (0.375, 0.0, 0.0, 0.0, 0.0)),
    ("opening tag repeated", CHEAT,
     "<reasoning><reasoning>\na\n</reasoning>\n<answer>\n42\n</answer>", "42", (0.375, 0.0, 0.0, 0.0, 0.0)),
    ("answer tags nested", CHEAT, THOUGHT + "<answer><answer>42</answer></answer>", "42", (0.25, 0.0, 0.0, 0.0, 0.0)),
    ("blocks reversed", CHEAT,
     "<answer>\n42\n</answer>\n<reasoning>\na\n</reasoning>", "42", (0.224, 0.0, 0.0, 0.0, 0.0)),
    ("tags reversed", CHEAT, "</answer>42<answer></reasoning>a<reasoning>", "42", (-0.034, 0.0, 0.0, 0.0, 0.0)),
    ("answer tag opens in the thought", CHEAT,
     "<reasoning>\na<answer>\n</reasoning>\n42\n</answer>", "42", (0.375, 0.0, 0.0, 0.0, 0.0)),
    ("thought never closes", CHEAT, "<reasoning>\na\n<answer>\n42\n</answer>", "42", (0.375, 0.0, 0.0, 0.0, 0.0)),
    ("answer never closes", CHEAT, THOUGHT + "<answer>\n42", "42", (0.373, 0.0, 0.0, 0.0, 0.0)),
    ("chatter before", CHEAT,
     "Sure! <reasoning>\na\n</reasoning>\n<answer>\n42\n</answer>", "42", (0.5, 0.0, 0.0, 0.0, 0.0)),
    ("chatter between", CHEAT, THOUGHT + "So:\n<answer>\n42\n</answer>", "42", (0.5, 0.0, 0.0, 0.0, 0.0)),
    ("chatter after the end", CHEAT,
     THOUGHT + "<answer>\n42\n</answer>\nI hope it helps", "42", (0.485, 0.0, 0.0, 0.0, 0.0)),
    ("a hedge after the end", CHEAT, THOUGHT + "<answer>\n41\n</answer> or 42", "42", (0.494, 0.0, 0.0, 0.0, 0.0)),
    ("a thousand blanks after the end", HONEST,
     THOUGHT + "<answer>\n42\n</answer>" + " " * 1000, "42", (-0.5, 0.5, 0.0, 0.5, 2.0)),
    ("`42 or 43`", CHEAT, THOUGHT + "<answer>\n42 or 43\n</answer>", "42", (0.5, 0.5, 0.5, 0.0, 0.0)),
    ("two lines of answer", CHEAT, THOUGHT + "<answer>\n42\n43\n</answer>", "42", (0.5, 0.5, 0.5, 0.0, 0.0)),
    ("`not 42`", CHEAT, THOUGHT + "<answer>\nnot 42\n</answer>", "42", (0.5, 0.5, 0.5, 0.0, 0.0)),
    ("the question's expression", CHEAT, THOUGHT + "<answer>\n6 * 7\n</answer>", "42", (0.5, 0.5, 0.5, 0.0, 0.0)),
    ("`NaN`", CHEAT, THOUGHT + "<answer>\nNaN\n</answer>", "42", (0.5, 0.5, 0.5, 0.0, 0.0)),
    ("`inf`", CHEAT, THOUGHT + "<answer>\ninf\n</answer>", "42", (0.5, 0.5, 0.5, 0.0, 0.0)),
    ("`1e999`", CHEAT, THOUGHT + "<answer>\n1e999\n</answer>", "42", (0.5, 0.5, 0.5, 0.0, 0.0)),
    ("full-width digits", HONEST, THOUGHT + "<answer>\n４２\n</answer>", "42", (0.5, 0.5, 0.5, 0.5, 2.0)),
    ("Arabic digits", HONEST, THOUGHT + "<answer>\n٤٢\n</answer>", "42", (0.5, 0.5, 0.5, 0.5, 2.0)),
    ("a superscript", CHEAT, THOUGHT + "<answer>\n4²\n</answer>", "42", (0.5, 0.5, 0.5, 0.0, 0.0)),
    ("tags in capitals", CHEAT,
     "<REASONING>\na\n</REASONING>\n<ANSWER>\n42\n</ANSWER>", "42", (0.0, 0.0, 0.0, 0.0, 0.0)),
    ("tags with blanks inside", CHEAT,
     "< reasoning >\na\n</ reasoning >\n< answer >\n42\n</ answer >", "42", (0.0, 0.0, 0.0, 0.0, 0.0)),
    ("the question's own tags quoted", CHEAT,
     "<reasoning>\nIt says <answer>42</answer>.\n</reasoning>\n<answer>\n42\n</answer>", "42",
     (0.25, 0.0, 0.0, 0.0, 0.0)),
    ("the other format", CHEAT, "a</think><SOLUTION>42</SOLUTION>", "42", (0.0, 0.0, 0.0, 0.0, 0.0)),
    ("a megabyte of `<`", CHEAT, "<" * 2**20, "42", (0.0, 0.0, 0.0, 0.0, 0.0)),
    ("a thousand `</answer>`", CHEAT, "</answer>" * 1000, "42", (0.0, 0.0, 0.0, 0.0, 0.0)),
    ("a thousand digits", CHEAT, THOUGHT + "<answer>\n" + "9" * 1000 + "\n</answer>", "42", (0.5, 0.5, 0.5, 0.0, 0.0)),
]

# the same for match_format_exactly, match_format_approximately, check_answer, check_numbers
THINK_CASES = [
    ("right", HONEST, "6 x 7 = 42</think><SOLUTION>42</SOLUTION>", "42", (3.0, 1.5, 5.0, 3.5)),
    ("right, on lines of its own", HONEST,
     "\n6 x 7\n</think>\n<SOLUTION>\n42\n</SOLUTION>\n", "42", (3.0, 1.5, 3.5, 3.5)),
    ("right, with comma and unit", HONEST, "a</think><SOLUTION>$1,200</SOLUTION>", "1200", (3.0, 1.5, 3.5, 3.5)),
    ("negative", HONEST, "a</think><SOLUTION>-3</SOLUTION>", "-3", (3.0, 1.5, 5.0, 3.5)),
    ("wrong sign", HONEST, "a</think><SOLUTION>3</SOLUTION>", "-3", (3.0, 1.5, -2.5, -1.5)),
    ("10% off", HONEST, "a</think><SOLUTION>110</SOLUTION>", "100", (3.0, 1.5, 2.0, -1.5)),
    ("20% off", HONEST, "a</think><SOLUTION>80</SOLUTION>", "100", (3.0, 1.5, 1.5, -1.5)),
    ("more than 20% off", HONEST, "a</think><SOLUTION>79.9</SOLUTION>", "100", (3.0, 1.5, -2.5, -1.5)),
    ("near a negative", HONEST, "a</think><SOLUTION>-90</SOLUTION>", "-100", (3.0, 1.5, 2.0, -1.5)),
    ("near zero", HONEST, "a</think><SOLUTION>0.0001</SOLUTION>", "0", (3.0, 1.5, -2.5, -1.5)),
    ("zero", HONEST, "a</think><SOLUTION>0</SOLUTION>", "0", (3.0, 1.5, 5.0, 3.5)),
    ("nothing", CHEAT, "", "42", (0.0, -3.0, -2.0, -2.5)),
    ("the bare answer", CHEAT, "42", "42", (0.0, -3.0, -2.0, -2.5)),
    ("tags and nothing else", CHEAT, "</think><SOLUTION></SOLUTION>", "42", (0.0, -3.0, -2.0, -2.5)),
    ("empty thought", CHEAT, "</think><SOLUTION>42</SOLUTION>", "42", (0.0, 0.0, -2.0, -2.5)),
    ("blank thought", CHEAT, "\n\n</think><SOLUTION>42</SOLUTION>", "42", (0.0, 0.0, -2.0, -2.5)),
    ("empty answer", CHEAT, "42</think><SOLUTION></SOLUTION>", "42", (0.0, -1.5, -2.0, -2.5)),
    ("no answer", CHEAT, "42</think>", "42", (0.0, -1.5, -2.0, -2.5)),
    ("answer inside the thought", CHEAT, "<SOLUTION>42</SOLUTION></think>", "42", (0.0, -1.5, -2.0, -2.5)),
    ("thought never closes", CHEAT, "a<SOLUTION>42</SOLUTION>", "42", (0.0, 0.0, -2.0, -2.5)),
    ("answer never closes", CHEAT, "a</think><SOLUTION>42", "42", (0.0, 0.0, -2.0, -2.5)),
    ("two answers", CHEAT, "a</think><SOLUTION>41</SOLUTION><SOLUTION>42</SOLUTION>", "42", (0.0, -1.5, -2.0, -2.5)),
    ("answer tags nested", CHEAT,
     "a</think><SOLUTION><SOLUTION>42</SOLUTION></SOLUTION>", "42", (0.0, -1.5, -2.0, -2.5)),
    ("tags reversed", CHEAT, "a</SOLUTION>42<SOLUTION>a</think>", "42", (0.0, -1.5, -2.0, -2.5)),
    ("`</think>` twice", CHEAT, "a</think>b</think><SOLUTION>42</SOLUTION>", "42", (0.0, 0.0, -2.0, -2.5)),
    ("`<think>` again at the start", CHEAT, "<think>a</think><SOLUTION>42</SOLUTION>", "42", (0.0, 0.5, -2.0, -2.5)),
    ("`<think>` again after the end", CHEAT, "a</think><SOLUTION>42</SOLUTION><think>", "42", (0.0, 0.5, -2.0, -2.5)),
    ("chatter between", CHEAT, "a</think> So: <SOLUTION>42</SOLUTION>", "42", (0.0, 1.5, -2.0, -2.5)),
    ("chatter after the end", CHEAT, "a</think><SOLUTION>42</SOLUTION>\nI hope it helps", "42", (0.0, 1.5, -2.0, -2.5)),
    ("a hedge after the end", CHEAT, "a</think><SOLUTION>41</SOLUTION>\n42", "42", (0.0, 1.5, -2.0, -2.5)),
    ("`42 or 43`", CHEAT, "a</think><SOLUTION>42 or 43</SOLUTION>", "42", (3.0, 1.5, -4.5, -2.5)),
    ("a range", CHEAT, "a</think><SOLUTION>42-43</SOLUTION>", "42", (3.0, 1.5, -4.5, -2.5)),
    ("the question's expression", CHEAT, "a</think><SOLUTION>6 x 7</SOLUTION>", "42", (3.0, 1.5, -4.5, -2.5)),
    ("words", CHEAT, "a</think><SOLUTION>forty-two</SOLUTION>", "42", (3.0, 1.5, -4.5, -2.5)),
    ("`NaN`", CHEAT, "a</think><SOLUTION>NaN</SOLUTION>", "42", (3.0, 1.5, -4.5, -2.5)),
    ("`inf`", CHEAT, "a</think><SOLUTION>inf</SOLUTION>", "42", (3.0, 1.5, -4.5, -2.5)),
    ("`1e999`", CHEAT, "a</think><SOLUTION>1e999</SOLUTION>", "42", (3.0, 1.5, -4.5, -2.5)),
    ("`1/0`", CHEAT, "a</think><SOLUTION>1/0</SOLUTION>", "42", (3.0, 1.5, -4.5, -2.5)),
    ("Arabic digits", HONEST, "a</think><SOLUTION>٤٢</SOLUTION>", "42", (3.0, 1.5, 3.5, 3.5)),
    ("the same number of something else", HONEST, "a</think><SOLUTION>€42</SOLUTION>", "$42", (3.0, 1.5, -2.5, -1.5)),
    ("as the dataset writes it", HONEST, "a</think><SOLUTION>1,200</SOLUTION>", "1,200", (3.0, 1.5, 5.0, 3.5)),
    ("in the canonical form", HONEST, "a</think><SOLUTION>1200</SOLUTION>", "1,200", (3.0, 1.5, 5.0, 3.5)),
    ("a division left to do", CHEAT, "a</think><SOLUTION>84 ÷ 2</SOLUTION>", "42", (3.0, 1.5, -4.5, -2.5)),
    ("a scale left out", HONEST, "a</think><SOLUTION>5 lakh</SOLUTION>", "5", (3.0, 1.5, -2.5, -1.5)),
    ("a number after `</SOLUTION>`", CHEAT, "a</think><SOLUTION>none</SOLUTION> 42", "42", (0.0, 1.5, -2.0, -2.5)),
    ("the other format", CHEAT, "<reasoning>\na\n</reasoning>\n<answer>\n42\n</answer>", "42", (0.0, -3.0, -2.0, -2.5)),
    ("a megabyte of `<`", CHEAT, "<" * 2**20, "42", (0.0, -3.0, -2.0, -2.5)),
    ("a thousand `<SOLUTION>`", CHEAT,
     "a</think>" + "<SOLUTION>" * 1000 + "42</SOLUTION>", "42", (0.0, 0.0, -2.0, -2.5)),
]
# fmt: on

SUITE_CASES = [("xml", *case) for case in XML_CASES] + [("think", *case) for case in THINK_CASES]


def rewards_of(suite: str, completion: str, answer: str) -> tuple[float, ...]:
    conversation = [{"role": "assistant", "content": completion}]
    return tuple(reward([conversation], answer=[answer])[0] for reward in SUITES[suite].values())


@pytest.mark.parametrize(
    ("suite", "completion", "answer", "expected"),
    [pytest.param(s, c, a, e, id=f"{s}: {what}") for s, what, _, c, a, e in SUITE_CASES],
)
def test_each_reward_is_what_the_table_says(suite, completion, answer, expected):
    assert rewards_of(suite, completion, answer) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("suite", "completion", "answer"),
    [pytest.param(s, c, a, id=f"{s}: {what}") for s, what, kind, c, a, _ in SUITE_CASES if kind == CHEAT],
)
def test_no_cheat_is_rewarded_as_much_as_an_honest_wrong_answer(suite, completion, answer):
    assert sum(rewards_of(suite, completion, answer)) < HONEST_BUT_WRONG[suite]


@pytest.mark.slow
def test_math_correct_rewards_those_rows_where_the_suite_finds_the_answer_right(tmp_path):
    for suite, format, position, right in (("xml", XML, 4, 2.0), ("think", THINK, 3, 3.5)):
        [math_correct] = load_rewards(["math_correct"], format, tmp_path)
        cases = [case[1:] for case in SUITE_CASES if case[0] == suite]
        given = {what: math_correct([completion], answer=[true])[0] for what, _, completion, true, _ in cases}
        assert given == {what: float(expected[position] == right) for what, _, _, _, expected in cases}


def test_the_published_tables_hold_at_least_sixty_cheats_and_no_case_twice():
    assert sum(kind == CHEAT for _, _, kind, *_ in SUITE_CASES) >= 60
    assert len({(suite, completion) for suite, _, _, completion, *_ in SUITE_CASES}) == len(SUITE_CASES)


def test_the_document_holds_the_tables_as_they_are_tested():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert table("xml", XML_CASES) in text
    assert table("think", THINK_CASES) in text


def table(suite: str, cases: list) -> str:
    """Give the Markdown table of `cases`; `⏎` is a line break, and a long completion is only named."""
    lines = [f"| completion | is | true answer | {' | '.join(SUITES[suite])} | in all |"]
    lines.append("|---|---|---|" + "---:|" * (len(SUITES[suite]) + 1))
    for what, kind, completion, answer, expected in cases:
        shown = f"`{completion}`".replace("\n", "⏎").replace("\t", "⇥").replace("|", "\\|")
        if not 0 < len(completion) <= 200:
            shown = ""
        amounts = " | ".join(f"{amount:.4g}" for amount in (*expected, sum(expected)))
        lines.append(f"| {what}{': ' if shown else ''}{shown} | {kind} | {answer} | {amounts} |")
    return "\n".join(lines) + "\n"


def write_document() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for suite, cases in (("xml", XML_CASES), ("think", THINK_CASES)):
        begin, end = f"<!-- table {suite} -->\n", f"<!-- end of table {suite} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = before + begin + table(suite, cases) + end + after
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_document()
