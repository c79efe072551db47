"""The rewards: what they pay, how recipes load them, and that no completion and no user's file breaks them."""

import os
import random
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.lib.answers.formats import FORMATS, THINK, XML, Answer
from stages.lib.answers.worker import TIMEOUT_SECONDS, WORKER
from stages.lib.errors import UserError
from stages.lib.rewards.names import FOR_ANY_FORMAT, SUITES
from tests.support.rewards import check_reward_names, load_rewards

SUITE_NAMES = {
    "xml": ["xmlcount", "soft_format", "strict_format", "int", "correctness"],
    "think": ["match_format_exactly", "match_format_approximately", "check_answer", "check_numbers"],
}
PIECES = {
    "xml": [
        "<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n", " ", "42", "41", " or ", "a", "<", "NaN", "1e999",
        "\u0664",
    ],
    "think": [
        "<think>", "</think>", "<SOLUTION>", "</SOLUTION>", "\n", " ", "42", "41", " or ", "a", "<", "NaN", "1e999",
        "\u0664",
    ],
}  # fmt: skip
# What a well-formed completion with a wrong integer, not near the right one, is rewarded with.
HONEST_BUT_WRONG = {"xml": 2.0, "think": 0.5}


def suite_of(name, tmp_path):
    return load_rewards(SUITE_NAMES[name], FORMATS[name], tmp_path)


@pytest.mark.parametrize("name", SUITE_NAMES)
def test_a_suite_loads_in_the_order_of_the_recipe_under_the_names_that_logs_show(name, tmp_path):
    backwards = SUITE_NAMES[name][::-1]
    assert [reward.__name__ for reward in load_rewards(backwards, FORMATS[name], tmp_path)] == backwards
    assert list(SUITES[name]) == SUITE_NAMES[name]


@pytest.mark.parametrize("name", SUITE_NAMES)
def test_conversations_and_strings_are_rewarded_alike_and_one_number_a_completion(name, tmp_path):
    texts = [FORMATS[name].write(Answer("6 x 7", "42")), "42", ""]
    conversations = [[{"role": "assistant", "content": text}] for text in texts]
    for reward in suite_of(name, tmp_path):
        from_strings = reward(texts, answer=["42"] * 3, prompts=["?"] * 3, completion_ids=[[1]] * 3, trainer_state=None)
        assert from_strings == reward(conversations, answer=["42"] * 3)
        assert len(from_strings) == 3
        assert all(type(number) is float for number in from_strings)


@pytest.mark.parametrize("name", SUITE_NAMES)
def test_a_message_without_content_is_an_empty_completion(name, tmp_path):
    for reward in suite_of(name, tmp_path):
        assert reward([[{"role": "assistant", "content": None}]], answer=["42"]) == reward([""], answer=["42"])


@st.composite
def nearly_well_formed(draw, name):
    """A well-formed completion with up to three pieces put in, taken out or exchanged."""
    pieces = {
        "xml": ["<reasoning>", "\n", "a", "\n", "</reasoning>", "\n", "<answer>", "\n", "41", "\n", "</answer>"],
        "think": ["a", "</think>", "<SOLUTION>", "41", "</SOLUTION>"],
    }[name]
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(pieces)))
        pieces[place : place + draw(st.integers(0, 1))] = draw(st.lists(st.sampled_from(PIECES[name]), max_size=1))
    return "".join(pieces)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITE_NAMES)
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_only_a_well_formed_completion_is_rewarded_like_an_honest_wrong_one_and_only_a_right_one_more(name, data):
    completion = data.draw(nearly_well_formed(name))
    total = sum(reward([completion], answer=["7"])[0] for reward in SUITES[name].values())
    if FORMATS[name].read(completion) is None:
        assert total < HONEST_BUT_WRONG[name]
    else:
        assert total <= HONEST_BUT_WRONG[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITE_NAMES)
def test_the_time_of_a_suite_grows_with_the_length_and_no_faster(name, tmp_path):
    suite = suite_of(name, tmp_path)
    generator = random.Random(0)

    def seconds(pieces_count):
        fastest = float("inf")
        for _ in range(5):
            completion = "".join(generator.choices(PIECES[name], k=pieces_count))
            start = time.process_time()  # whatever else the machine does
            for reward in suite:
                reward([completion], answer=["42"])
            fastest = min(fastest, time.process_time() - start)
        return fastest

    assert seconds(256_000) < 16 * 5 * max(seconds(16_000), 1e-4)


@pytest.mark.parametrize("name", SUITE_NAMES)
def test_three_thousand_fuzzed_completions_raise_nothing_and_get_finite_rewards(name, tmp_path):
    suite = suite_of(name, tmp_path)
    generator = random.Random(1)
    for _ in range(3000):
        pieces = generator.choices(PIECES[name], k=generator.randrange(40))
        pieces.append("".join(chr(generator.randrange(0x110000)) for _ in range(generator.randrange(20))))
        generator.shuffle(pieces)
        for reward in suite:
            [number] = reward(["".join(pieces)], answer=["42"])
            assert -20 < number <= 5


@pytest.mark.parametrize(
    ("answer", "true", "expected"),
    [
        ("red", "red", 2.0),
        ("blue", "red", 0.0),
        ("42", "red", 0.0),
        ("red", "42", 0.0),
    ],
)
def test_an_answer_that_is_no_number_is_right_to_the_letter(answer, true, expected):
    assert SUITES["xml"]["correctness"]([XML.write(Answer("a", answer))], answer=[true]) == [expected]


@pytest.mark.parametrize(("answer", "expected"), [("red", 5.0), (" red\n", 3.5), ("blue", -4.5), ("42", -2.5)])
def test_check_answer_with_a_true_answer_that_is_no_number(answer, expected):
    completion = f"a</think><SOLUTION>{answer}</SOLUTION>"
    assert SUITES["think"]["check_answer"]([completion], answer=["red"]) == [expected]
    assert SUITES["think"]["check_numbers"]([completion], answer=["red"]) == [0.0]


# fmt: off
BUGS = [
    ("strict_format", "<reasoning>\n6 x 7\n= 42\n</reasoning>\n<answer>\n42\n</answer>\n", "42", 0.5),
    ("strict_format", "<reasoning>\na\n</reasoning>\n<answer>\n42\n</answer>", "42", 0.5),
    ("soft_format", "<reasoning>\na\n</reasoning>\n<answer>\n42\n</answer>", "42", 0.5),
    ("xmlcount", "<reasoning>\n" + "a" * 446 + "\n</reasoning>\n<answer>\n42\n</answer>", "42", 0.5),
    ("xmlcount", "<reasoning>\n\n</reasoning>\n\n<answer>\n\n</answer>\n", "42", 0.0),
    ("int", "<reasoning>\na\n</reasoning>\n<answer>\n-3\n</answer>", "42", 0.5),
    ("int", "<reasoning>\na\n</reasoning>\n<answer>\n1,200\n</answer>", "42", 0.5),
    ("correctness", "<reasoning>\na\n</reasoning>\n<answer>\n1,200\n</answer>", "1200", 2.0),
    ("correctness", "<reasoning>\n<answer>42</answer>\n</reasoning>", "42", 0.0),
    ("correctness", "<answer>41</answer><answer>42</answer>", "42", 0.0),
    ("correctness", "42", "42", 0.0),
    ("soft_format", "<reasoning>\na\n</reasoning>\n<answer>\n42\n</answer> and so on", "42", 0.0),
    ("match_format_exactly", "a</think><SOLUTION>42</SOLUTION>\nOr 43, who knows.", "42", 0.0),
    ("match_format_exactly", "a</think>blah<SOLUTION>42</SOLUTION>", "42", 0.0),
    ("check_numbers", "a</think><SOLUTION>-3</SOLUTION>", "3", -1.5),
    ("check_numbers", "a</think><SOLUTION>1,200</SOLUTION>", "1200", 3.5),
    ("check_numbers", "a</think><SOLUTION>none</SOLUTION> 7", "7", -2.5),
    ("check_answer", "a</think><SOLUTION>1,200</SOLUTION>", "1200", 3.5),
    ("check_answer", "a</think><SOLUTION>0.0</SOLUTION>", "0", 3.5),
    ("check_answer", "a</think><SOLUTION>NaN</SOLUTION>", "42", -4.5),
]
# fmt: on


@pytest.mark.parametrize(("name", "completion", "answer", "expected"), BUGS)
def test_the_bugs_of_the_copied_versions_are_not_here(name, completion, answer, expected):
    reward = (SUITES["xml"] | SUITES["think"])[name]
    assert reward([completion], answer=[answer]) == [expected]


def test_answers_and_completions_of_different_number_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        SUITES["xml"]["correctness"](["a", "b"], answer=["42"])


def test_weight_zero_logs_without_paying(tmp_path):
    weights = [1.0, 1.0, 1.0, 0.0, 1.0]
    right = XML.write(Answer("6 x 7", "42"))
    logged = [reward([right], answer=["42"])[0] for reward in suite_of("xml", tmp_path)]
    assert logged == [0.5, 0.5, 0.5, 0.5, 2.0]
    assert sum(weight * number for weight, number in zip(weights, logged, strict=True)) == 3.5


# --- length_penalty and repetition_penalty --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, 0.0), (79, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0), (101, -1.0), (1000, -1.0)],
)
def test_length_penalty_is_dapos_soft_overlong_punishment(tokens, expected, tmp_path):
    [reward] = load_rewards(["length_penalty"], XML, tmp_path, max_completion_tokens=100, length_cache_tokens=20)
    assert reward.__name__ == "length_penalty"
    assert reward(["a"], completion_ids=[[7] * tokens], answer=["42"]) == [expected]
    assert str(reward(["a"], completion_ids=[[]])[0]) == "0.0"


@pytest.mark.parametrize(
    ("ids", "expected"),
    [([], 0.0), ([1], 0.0), ([1, 2, 3, 4], 0.0), ([5, 5, 5, 5, 5], -1.5), ([1, 2, 1, 2, 1], -1.0), ([1, 1], 0.0)],
)
def test_repetition_penalty_takes_the_share_of_repeated_ngrams(ids, expected, tmp_path):
    [reward] = load_rewards(
        ["repetition_penalty"], XML, tmp_path, repetition_ngram_tokens=2, repetition_max_penalty=2.0
    )
    assert reward(["a"], completion_ids=[ids], answer=["42"]) == [expected]
    assert str(reward(["a"], completion_ids=[[]])[0]) == "0.0"


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("length_penalty", {}, "length_cache_tokens is missing: length_penalty needs it"),
        ("length_penalty", {"max_completion_tokens": 9, "length_cache_tokens": 0},
         "length_cache_tokens = 0; expected 1"),
        ("length_penalty", {"max_completion_tokens": 9, "length_cache_tokens": 10}, "10 is more than .* = 9"),
        ("repetition_penalty", {"repetition_max_penalty": 1.0}, "repetition_ngram_tokens is missing"),
        ("repetition_penalty", {"repetition_ngram_tokens": 3, "repetition_max_penalty": -1.0},
         "-1.0; expected 0 or more"),
        ("repetition_penalty", {"repetition_ngram_tokens": 3, "repetition_max_penalty": float("nan")},
         "nan; expected 0"),
    ],
)  # fmt: skip
def test_parameters_that_are_missing_or_senseless_are_refused(name, parameters, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_rewards([name], XML, tmp_path, **parameters)


# --- math_correct ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def math_correct(tmp_path_factory):
    [reward] = load_rewards(["math_correct"], XML, tmp_path_factory.mktemp("recipe"))
    return reward


@pytest.mark.parametrize(
    ("answer", "true", "expected"),
    [
        ("42", "42", 1.0), ("42.0", "42", 1.0), ("1,200", "1200", 1.0), ("x = 42", "42", 1.0),
        (r"\boxed{42}", "42", 1.0),
        (r"\frac{1}{2}", "1/2", 1.0), (r"\dfrac12", "1/2", 1.0), ("0.5", r"\frac{1}{2}", 1.0), ("0.333333", "1/3", 1.0),
        (r"2\sqrt{2}", r"\sqrt{8}", 1.0), (r"\{2, 1\}", r"\{1, 2\}", 1.0), ("1 + x", "x+1", 1.0),
        ("(1, 2)", "(1,2)", 1.0),
        (r"$\frac{3}{4}$", r"\frac{6}{8}", 1.0), (r"42 \text{ dollars}", "42", 1.0),
        ("41", "42", 0.0), ("42 or 43", "42", 0.0), ("42, 43", "42", 0.0), (r"\{42, 43\}", "42", 0.0),
        (r"\pm 42", "42", 0.0),
        ("43 = 42", "42", 0.0), ("x = 43 = 42", "42", 0.0), (r"5 = \sqrt{2}", r"\sqrt{2}", 0.0), ("6 * 7", "42", 0.0),
        ("84/2", "42", 0.0), (r"\frac{84}{2}", "42", 0.0), ("2/4", "1/2", 1.0), (r"42\text{ thousand}", "42", 0.0),
        (r"42\text{ people}", "42", 1.0),
        (r"x = 5 = \sqrt{2}", r"\sqrt{2}", 0.0), (r"6 \cdot 7", "42", 0.0), ("$42$ or $43$", "42", 0.0),
        (r"\boxed{42} \boxed{43}", "42", 0.0),
        ("(2, 1)", "(1, 2)", 0.0),
        (r"\frac{1}{0}", "42", 0.0), ("NaN", "42", 0.0), (r"\infty", "42", 0.0), ("1e999", "42", 0.0),
        ("9" * 499, "42", 0.0),
        (r"\begin{pmatrix}42\end{pmatrix}", "42", 0.0), ("forty-two", "42", 0.0), ("4 2", "42", 0.0),
        ("__import__('os')", "42", 0.0),
    ],
)  # fmt: skip
def test_math_correct_rewards_mathematical_equality(answer, true, expected, math_correct):
    assert math_correct([XML.write(Answer("a", answer))], answer=[true]) == [expected]


def test_math_correct_reads_the_answer_by_the_format(math_correct, tmp_path):
    assert math_correct(["42", "<reasoning><answer>42</answer></reasoning>"], answer=["42", "42"]) == [0.0, 0.0]
    [of_think] = load_rewards(["math_correct"], THINK, tmp_path)
    assert of_think(["a</think><SOLUTION>\\frac{1}{2}</SOLUTION>"], answer=["1/2"]) == [1.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer", ["10^{10^{10}}", "9999999!", "(" * 400, "{" * 400, "2^{2^{2^{2^{2^{2}}}}}", r"\frac{" * 80]
)
def test_math_correct_gives_up_and_goes_on(answer, math_correct):
    assert TIMEOUT_SECONDS == 0.5  # of processor time, however long the machine takes to give it
    hard, easy = XML.write(Answer("a", answer)), XML.write(Answer("a", r"\sqrt{4}/4"))
    start = time.perf_counter()
    assert math_correct([hard], answer=[r"\sqrt{2}^{9999999}+1"]) == [0.0]
    assert time.perf_counter() - start < 20
    assert math_correct([easy], answer=[r"\frac{\sqrt{4}}{4}"]) == [1.0]


def test_math_correct_does_not_take_the_time_that_it_was_kept_waiting_for_its_own(math_correct):
    assert math_correct([XML.write(Answer("a", r"\sqrt{16} x"))], answer=["4x"]) == [1.0]
    given = []
    completion = XML.write(Answer("a", r"\sqrt{25} x"))
    os.kill(WORKER.pid, signal.SIGSTOP)
    thread = threading.Thread(target=lambda: given.extend(math_correct([completion], answer=["5x"])))
    thread.start()
    thread.join(2 * TIMEOUT_SECONDS)
    assert given == []
    os.kill(WORKER.pid, signal.SIGCONT)
    thread.join()
    assert given == [1.0]


def test_math_correct_works_off_the_main_thread(math_correct):
    given = []
    completion = XML.write(Answer("a", r"\sqrt{9} x"))
    thread = threading.Thread(target=lambda: given.extend(math_correct([completion], answer=["3x"])))
    thread.start()
    thread.join()
    assert given == [1.0]


# --- the user's own -------------------------------------------------------------------------------------------------


def own(tmp_path, source, name="politeness"):
    (tmp_path / "my_rewards.py").write_text(source)
    [reward] = load_rewards([f"my_rewards.py:{name}"], XML, tmp_path)
    return reward


@pytest.mark.parametrize(
    "source",
    [
        "def politeness(completions, **kwargs):\n    return [float('please' in c[0]['content']) for c in completions]",
        "def politeness(completions):\n    return ['please' in c[0]['content'] for c in completions]",
        "def politeness(completions, answer, *, prompts=None):\n    return tuple(int(a == '42') for a in answer)",
        "politeness = lambda completions, answer: [float(a == '42') for a in answer]",
        "def politeness(**columns):\n    return [float(a == '42') for a in columns['answer']]",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: float\n"
        "def politeness(completions):\n    return [A(1.0).x, 0.0]",
        "async def politeness(completions, answer):\n    return [float(a == '42') for a in answer]",
        "import asyncio\nasync def one(a):\n    await asyncio.sleep(0)\n    return a == '42'\n"
        "async def politeness(completions, answer):\n    return await asyncio.gather(*map(one, answer))",
        "class A:\n    def __call__(self, completions, **kwargs):\n        return [1.0, 0.0]\npoliteness = A()",
        "class A:\n    async def __call__(self, completions):\n        return [1.0, 0.0]\npoliteness = A()",
        "class A:\n    def f(self, completions):\n        return [1.0, 0.0]\npoliteness = A().f",
        "import functools\ndef f(right, completions, answer):\n    return [float(a == right) for a in answer]\n"
        "politeness = functools.partial(f, '42')",
        "import functools\ndef f(completions, *, answer):\n    return [float(answer == 1), 0.0]\n"
        "politeness = functools.partial(f, answer=1)",
        "import numpy\ndef politeness(completions):\n    return numpy.array([1, 0])",
        "import numpy\ndef politeness(completions):\n    return [numpy.float32(1), numpy.bool_(False)]",
        "from fractions import Fraction\ndef politeness(completions):\n    return [Fraction(1), 0]",
    ],
)
def test_a_plain_function_of_the_users_own_is_a_reward_under_its_own_name(source, tmp_path):
    reward = own(tmp_path, source)
    completions = [[{"role": "assistant", "content": text}] for text in ("please", "now")]
    assert reward(completions, answer=["42", "41"], completion_ids=[[1], [2]], prompts=None) == [1.0, 0.0]
    assert reward.__name__ == "politeness"


@pytest.mark.torch
@pytest.mark.parametrize("value", ["tensor([1.0, 0.0], requires_grad=True)", "tensor([1, 0])", "[tensor(1.0), 0.0]"])
def test_an_own_reward_may_return_tensors(value, tmp_path):
    assert own(tmp_path, f"from torch import tensor\ndef politeness(completions): return {value}")(["a", "b"]) == [1, 0]


def test_none_is_not_scored(tmp_path):
    assert own(tmp_path, "def politeness(completions): return [None, 2]")(["a", "b"]) == [None, 2.0]


def test_async_rewards_have_one_loop_so_that_what_waits_in_it_lives_on(tmp_path):
    source = """\
import asyncio

waiting = []

async def politeness(completions):
    if not waiting:
        waiting.append(asyncio.get_running_loop().create_task(asyncio.sleep(0, "done")))
    return [float(await waiting[0] == "done")]
"""
    reward = own(tmp_path, source)
    assert [reward(["a"]), reward(["a"])] == [[1.0], [1.0]]


def test_an_own_reward_gets_every_column_of_the_row_and_none_where_a_source_lacks_it(tmp_path):
    source = """\
def politeness(completions, answer, level, tags, row, **kwargs):
    assert kwargs == {"id": ["1", "2"], "meta": [{"by": "x"}, None]}, kwargs
    assert (level, tags, answer) == ([3, None], [["a", 1.5], None], ["42", "41"])
    assert row == [{"level": 3, "tags": ["a", 1.5], "meta": {"by": "x"}, "answer": "#### 42"}, {}]
    tags[0].append("rewritten")
    return [0.0, 1.0]
"""
    rows = ['{"level": 3, "tags": ["a", 1.5], "meta": {"by": "x"}, "answer": "#### 42"}', "{}"]
    given = {"answer": ["42", "41"], "id": ["1", "2"], "row": rows}
    reward = own(tmp_path, source)
    assert reward(["a", "b"], **given) == reward(["a", "b"], **given) == [0.0, 1.0]


def test_an_error_of_an_own_reward_names_step_row_and_question(tmp_path):
    given = {
        "trainer_state": SimpleNamespace(global_step=6),
        "id": ["00ff", "0abc"],
        "prompts": [[{"role": "user", "content": text}] for text in ("What is 1 + 1?", "What is 6 x 7?")],
    }
    reward = own(tmp_path, "def politeness(completions): return [1.0, float('nan')]")
    with pytest.raises(UserError) as error:
        reward(["a", "b"], **given)
    assert error.value.message == (
        "[rewards] 'my_rewards.py:politeness' in step 7 returned nan (float) for completion 1 of row 0abc "
        "('What is 6 x 7?'); expected a finite number, 3e+38 at most in size, or None"
    )
    reward = own(tmp_path, "def politeness(completions): return [1 / 0]")
    with pytest.raises(UserError, match=r"'my_rewards.py:politeness' in step 7: .*my_rewards.py, line 1: ZeroDivision"):
        reward(["a", "b"], **given)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def politeness(completions):\n    return [1 / 0]",
            r"my_rewards.py, line 2: ZeroDivisionError: division by zero",
        ),
        ("def politeness(completions):\n    return [1.0]", "returned 1 rewards for 2 completions"),
        ("def politeness(completions):\n    return [1.0, float('nan')]", r"returned nan \(float\) for completion 1"),
        ("def politeness(completions):\n    return [float('inf'), 1.0]", r"returned inf \(float\) for completion 0"),
        ("def politeness(completions):\n    return [1.0, '1.0']", r"returned '1.0' \(str\) for completion 1"),
        (
            "import numpy\ndef politeness(completions):\n    return numpy.ones((2, 2))",
            r"returned \[1.0, 1.0\] \(list\)",
        ),
        (
            "import numpy\ndef politeness(completions):\n    return numpy.array(1.0)",
            "returned ndarray; expected a list",
        ),
        (
            "import numpy\ndef politeness(completions):\n    return numpy.array([1, numpy.nan])",
            r"returned nan \(float\) for",
        ),
        ("async def politeness(completions):\n    raise OSError('gone')", r"my_rewards.py, line 2: OSError: gone"),
        ("def politeness(completions):\n    return (1.0 for _ in completions)", "returned generator; expected a list"),
        ("def politeness(completions):\n    return [1j, 1.0]", r"\(complex\)"),
        ("def politeness(completions):\n    return [1.0, -4e38]", r"returned -4e\+38 \(float\) for completion 1"),
        ("def politeness(completions):\n    return [10**400, 1.0]", r"returned 10{59}\.\.\. \(int\) for completion 0"),
        ("def politeness(completions):\n    return [10**5000, 1.0]", "returned a number of thousands of digits"),
        ("import sys\ndef politeness(completions):\n    sys.exit()", r"my_rewards.py, line 3: SystemExit"),
        ("def politeness(completions):\n    return 1.0", "returned float; expected a list of 2 numbers"),
        ("def politeness(completions):\n    pass", "returned NoneType; expected a list of 2 numbers"),
        (
            "def politeness(completions, mood):\n    return [1.0, 1.0]",
            "asks for mood; expected names of columns: .*completions, answer",
        ),
    ],
)
def test_what_the_users_function_does_wrong_is_an_error_that_names_it(source, message, tmp_path):
    reward = own(tmp_path, source)
    with pytest.raises(UserError, match=rf"'my_rewards.py:politeness'.*{message}"):
        reward(["a", "b"], answer=["42", "42"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def politness(completions): ...",
            r"has no function 'politeness' \(did you mean 'politness'\?\); it has: politness",
        ),
        ("politeness = 3", "has no function 'politeness'; it has: none"),
        ("class politeness: ...", "has a class of this name; expected a function or an object of it"),
        ("def politeness(): ...", r"expected politeness\(completions, \*\*kwargs\).*found politeness\(\)"),
        ("def politeness(texts): ...", r"found politeness\(texts\)"),
        ("def politeness(completions, /): ...", r"found politeness\(completions, /\)"),
        ("def politeness(completions):\n    yield 1.0", "that returns a list, found a generator function"),
        ("async def politeness(completions):\n    yield 1.0", "that returns a list, found a generator function"),
        ("class A:\n    def __call__(self): ...\npoliteness = A()", r"found politeness\(\)"),
        ("from operator import itemgetter\npoliteness = itemgetter(1)", r"'my_rewards.py:politeness': "),
        ("def politeness(completions:\n", r"my_rewards.py, line 1: SyntaxError"),
        ("import no_such_module_here\n", r"my_rewards.py, line 1: ModuleNotFoundError"),
        ("\n\nraise ValueError('no')\n", r"my_rewards.py, line 3: ValueError: no"),
        ("import sys\nsys.exit(0)\n", r"my_rewards.py, line 2: SystemExit: 0"),
    ],
)
def test_a_file_that_has_no_such_reward_is_refused_when_it_is_loaded(source, message, tmp_path):
    with pytest.raises(UserError, match=message):
        own(tmp_path, source)


def test_an_own_reward_that_rewrites_what_it_gets_changes_nothing_for_the_others(tmp_path):
    reward = own(
        tmp_path,
        "def politeness(completions, answer, trainer_state):\n    completions[0][0]['content'] = answer[0] = ''\n"
        "    trainer_state['seen'] = True\n    return [0.0]",
    )
    completions, answer, state = [[{"role": "assistant", "content": "a"}]], ["42"], {}
    assert reward(completions, answer=answer, trainer_state=state) == [0.0]
    assert (completions[0][0]["content"], answer, state) == ("a", ["42"], {"seen": True})


@pytest.mark.parametrize(
    "source",
    [
        "def politeness(completions): ...",
        "politeness = lambda completions: []",
        "from elsewhere import politeness",
        "from elsewhere import rude as politeness",
        "from elsewhere import *",
        "if True:\n    def politeness(completions): ...\nelse:\n    politeness = None",
        "try:\n    from elsewhere import politeness\nexcept ImportError:\n    def politeness(texts): ...",
        "def politeness(texts): ...\npoliteness = print",
        "@renamed\ndef politeness(texts): ...",
        "# coding: latin-1\n'caf\xe9'\ndef politeness(completions): ...",
        "from elsewhere \\\nimport \\\n*",
        "if (politeness := print): ...",
        "with open('x') as politeness: ...",
        "def politeness(texts): ...",
        "def politeness(completions, /): ...",
    ],
)
def test_a_name_that_a_file_binds_is_not_refused_before_it_is_loaded(source, tmp_path):
    (tmp_path / "my_rewards.py").write_text(source, encoding="latin-1")
    check_reward_names(["my_rewards.py:politeness"], XML, tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def politness(completions): ...",
            r"has no function 'politeness' \(did you mean 'politness'\?\); it has: pol",
        ),
        ("", "has no function 'politeness'; it has: none"),
        ("class A:\n    def politeness(completions): ...", "has no function 'politeness'; it has: none"),
        ("def other(completions):\n    politeness = 1", "has no function 'politeness'; it has: other"),
        ("def _other(completions): ...\nprint(politeness)", "has no function 'politeness'; it has: none"),
        ("[politeness for politeness in ()]\n", "has no function 'politeness'; it has: none"),
        ("\ndef politeness(completions:\n", r"my_rewards.py, line 2: SyntaxError"),
        ("a = '\0'", r"my_rewards.py.*null bytes"),
        ("# coding: rot13\n", "my_rewards.py: LookupError: 'rot13' is not a text encoding"),
        ("# coding: utf-7-or-so\n", "my_rewards.py: SyntaxError: unknown encoding: utf-7-or-so"),
        ("'caf\xe9'\n", "my_rewards.py: SyntaxError: invalid or missing encoding declaration"),
    ],
)
def test_a_file_without_the_reward_is_refused_before_it_is_loaded(source, message, tmp_path):
    (tmp_path / "my_rewards.py").write_text(source, encoding="latin-1")
    with pytest.raises(UserError, match=rf"'my_rewards.py:politeness': .*{message}"):
        check_reward_names(["my_rewards.py:politeness"], XML, tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["xmlcounts"], r"'xmlcounts' is not known \(did you mean 'xmlcount'\?\); known: xmlcount, .*FILE.py:FUNCTION"),
        (["xml"], "'xml' is a suite; name its functions, with a weight each: xmlcount, soft_format"),
        (["check_answer"], "'check_answer' is of suite 'think', but .* name = 'xml'"),
        (["int", "int"], "already logged as 'int'"),
        (["missing.py:politeness"], "there is no file .*missing.py"),
        (["my_rewards.py"], "expected 'FILE.py:FUNCTION'"),
        (["my_rewards.py:"], "expected 'FILE.py:FUNCTION'"),
        (["my_rewards:politeness"], "expected 'FILE.py:FUNCTION'"),
        (["my_rewards.py:a b"], "expected 'FILE.py:FUNCTION'"),
    ],
)
def test_a_name_that_is_no_reward_is_refused_with_what_would_be(names, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_rewards(names, XML, tmp_path)


def test_an_own_reward_may_not_hide_behind_the_name_of_another(tmp_path):
    (tmp_path / "mine.py").write_text("def correctness(completions): ...")
    with pytest.raises(UserError, match=r"'mine.py:correctness': another reward is already logged as 'correctness'"):
        load_rewards(["correctness", "mine.py:correctness"], XML, tmp_path)
    with pytest.raises(UserError, match=r"'mine.py:correctness': another reward is already logged as 'correctness'"):
        check_reward_names(["correctness", "mine.py:correctness"], XML, tmp_path)


def test_every_reward_of_the_library_says_what_it_rewards():
    for reward in [*SUITES["xml"].values(), *SUITES["think"].values(), *FOR_ANY_FORMAT.values()]:
        assert reward.__doc__.startswith("Reward ")
